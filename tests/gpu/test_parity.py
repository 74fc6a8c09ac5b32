"""GPU workers against `transformers`: switching in float32, rounding in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nitsum.bench.reference import HfModel, from_bytes
from nitsum.bench.scenario import Scenario, engine_config
from nitsum.bench.verify import verify
from nitsum.messages import Join, Pages, StepDone, Work
from nitsum.plan import Group, default_plans
from nitsum.request import SamplingParams
from tests.checkpoints import write_checkpoint
from tests.processes.driver import ALONE_0, ALONE_1, BOTH, Driver, make_config

pytestmark = [pytest.mark.gpu, pytest.mark.processes, pytest.mark.timeout(600)]
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

HEADS = {
    "llama": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 1},
}
"""Grouped heads; biases; norms of q and k, and fewer KV heads than ranks."""
NUM_POSITIONS = 27
WORST_RATIO = 1.5
"""Our error may be so much larger than that of bfloat16 `transformers`, on the same tokens."""


@pytest.fixture(scope="module", autouse=True)
def one_gpu_for_all() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if torch.cuda.device_count() < 2:
            patch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        yield


def test_switching_changes_no_result(tmp_path: Path):
    write_checkpoint(tmp_path, "llama")
    plans = default_plans(2)
    scenario = Scenario(num_switches=20, num_requests=24, seed=2)
    config = replace(engine_config(tmp_path, plans, scenario), device="cuda")
    report = verify(config, plans, scenario, lambda *_: None, lambda _: None)
    assert report.verdict == "pass", (report.errors, report.unproven, report.against)
    assert report.num_switches >= 20
    assert report.highest_use > 0.9


@pytest.mark.parametrize("family", HEADS)
def test_bfloat16_rounds_no_worse_than_transformers(tmp_path: Path, family: str):
    sizes = {"hidden_size": 64, "vocab_size": 256, "max_position_embeddings": 256}
    write_checkpoint(tmp_path, family, **HEADS[family], **sizes)
    tokens = torch.randint(256, (NUM_POSITIONS + 1,), generator=torch.Generator().manual_seed(5))
    model = HfModel(tmp_path).model
    with torch.inference_mode():
        exact = model(tokens[None]).logits[0, :NUM_POSITIONS]
        rounded = model.to(torch.bfloat16).cuda()(tokens[None].cuda()).logits[0, :NUM_POSITIONS]
    theirs = rms(rounded.float().cpu() - exact)
    for group, ours in all_lanes(tmp_path, tokens.tolist()).items():
        error = rms(ours - exact)
        print(f"{family} {group}: error {error:.5f}, transformers {theirs:.5f}")
        assert error < WORST_RATIO * theirs, f"{group}: {error:.5f} against {theirs:.5f}"


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def all_lanes(folder: Path, tokens: list[int]) -> dict[Group, torch.Tensor]:
    """Logits of each position of `tokens` but the last, teacher-forced, in each lane."""
    kept = (folder / "config.json").read_text()
    config = make_config(folder, device="cuda", dtype="bfloat16", load_format="auto")
    (folder / "config.json").write_text(kept)
    driver = Driver(config)
    driver.executor.start()
    try:
        return {
            group: logits_of(force(driver, group, tokens)) for group in (ALONE_0, ALONE_1, BOTH)
        }
    finally:
        driver.executor.close()


def force(driver: Driver, group: Group, tokens: list[int]) -> list[StepDone]:
    """A prompt of one token, the others given: each step draws what it is told."""
    slot, unit = driver.place()
    sampling = SamplingParams(temperature=0.0, return_logits=True)
    join = Join(slot, tokens, 1, len(tokens), sampling)
    pages = Pages(slot, 0, driver.pages(group, unit))
    driver.step(group, Work(slot, 0, 1, True), [join], [pages])
    driver.decode(group, slot, 1, NUM_POSITIONS - 1)
    return driver.collect(NUM_POSITIONS)


def logits_of(done: list[StepDone]) -> torch.Tensor:
    return from_bytes([raw for reply in done for raw in reply.logits if raw is not None])
