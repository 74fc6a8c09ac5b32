"""GPU workers against CPU workers, message for message, on one small random checkpoint.

Two ranks run on however many GPUs there are; on one, they take turns, which proves order and
results but no speed.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nitsum.messages import Fault, StepDone
from nitsum.plan import Group
from nitsum.request import SamplingParams
from tests.checkpoints import write_checkpoint
from tests.processes.driver import (
    ALONE_0,
    ALONE_1,
    BOTH,
    Driver,
    largest_difference,
    logits_of,
    make_config,
    tokens_of,
)

pytestmark = [pytest.mark.gpu, pytest.mark.processes, pytest.mark.timeout(600)]
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

GREEDY = SamplingParams(temperature=0.0, return_logits=True)
NUM_TOKENS = 9
TOLERANCE = 1e-3
"""Of logits with a standard deviation of a few units, float32 on both sides."""


@pytest.fixture(scope="module", autouse=True)
def one_gpu_for_all() -> Iterator[None]:
    """Allow two ranks on one GPU where there is no second one."""
    with pytest.MonkeyPatch.context() as patch:
        if torch.cuda.device_count() < 2:
            patch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, "llama", max_position_embeddings=256)
    return folder


def started(folder: Path, device: str, fault: Fault | None = None) -> Driver:
    (folder / "config.json").rename(folder / "kept.json")
    config = make_config(
        folder, device=device, load_format="auto", fault=fault, timeout_s=60.0
    )  # writes a config.json of its own
    (folder / "kept.json").replace(folder / "config.json")
    driver = Driver(config)
    driver.executor.start()
    return driver


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, list[StepDone]]:
    """What CPU ranks say."""
    os.environ["OMP_NUM_THREADS"] = "1"
    driver = started(folder, "cpu")
    try:
        return {
            "greedy": driver.generate(ALONE_0, NUM_TOKENS, GREEDY),
            "random": driver.generate(ALONE_0, NUM_TOKENS, RANDOM),
        }
    finally:
        driver.executor.close()


RANDOM = SamplingParams(
    temperature=1.5, seed=9, top_p=0.95, frequency_penalty=0.8, repetition_penalty=1.2, logprobs=2
)


@pytest.fixture(scope="module")
def driver(folder: Path) -> Iterator[Driver]:
    driver = started(folder, "cuda")
    yield driver
    driver.executor.close()


@pytest.mark.parametrize("group", [ALONE_0, ALONE_1, BOTH], ids=str)
def test_every_lane_computes_what_cpu_ranks_do(
    driver: Driver, reference: dict[str, list[StepDone]], group: Group
):
    done = driver.generate(group, NUM_TOKENS, GREEDY)
    assert len(logits_of(done)) == NUM_TOKENS
    assert largest_difference(done, reference["greedy"]) < TOLERANCE
    assert tokens_of(done) == tokens_of(reference["greedy"])
    assert all(reply.rank == group.leader and reply.seconds > 0 for reply in done)


@pytest.mark.parametrize("group", [ALONE_0, BOTH], ids=str)
def test_random_draws_are_those_of_cpu_ranks(
    driver: Driver, reference: dict[str, list[StepDone]], group: Group
):
    done = driver.generate(group, NUM_TOKENS, RANDOM)
    assert tokens_of(done) == tokens_of(reference["random"])
    ours = [reply.logprobs[0] for reply in done]
    theirs = [reply.logprobs[0] for reply in reference["random"]]
    for one, other in zip(ours, theirs, strict=True):
        assert one is not None
        assert other is not None
        assert one.top_ids == other.top_ids
        assert one.logprob == pytest.approx(other.logprob, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("src", "dst"), list(itertools.permutations([ALONE_0, ALONE_1, BOTH], 2)), ids=str
)
@pytest.mark.parametrize("num_before", [1, 6])
def test_a_sequence_that_changes_lanes_goes_on_as_if_it_had_not(
    driver: Driver,
    reference: dict[str, list[StepDone]],
    src: Group,
    dst: Group,
    num_before: int,
):
    done = driver.generate_across(src, dst, num_before, NUM_TOKENS, GREEDY)
    assert largest_difference(done, reference["greedy"]) < TOLERANCE
    assert tokens_of(done) == tokens_of(reference["greedy"])


@pytest.mark.parametrize(
    ("fault", "src", "dst"),
    [
        ("swap-heads", ALONE_0, BOTH),
        ("stale-block", ALONE_0, ALONE_1),
        ("lost-tail", BOTH, ALONE_1),
        ("wrong-vocab", ALONE_0, BOTH),
    ],
)
def test_planted_faults_are_seen(
    folder: Path,
    reference: dict[str, list[StepDone]],
    fault: Fault,
    src: Group,
    dst: Group,
):
    driver = started(folder, "cuda", fault)
    try:
        done = driver.generate_across(src, dst, 4, NUM_TOKENS, GREEDY)
    finally:
        driver.executor.close()
    before, after = slice(0, 4), slice(4, None)
    assert largest_difference(done[before], reference["greedy"][before]) < TOLERANCE
    assert largest_difference(done[after], reference["greedy"][after]) > 10 * TOLERANCE
