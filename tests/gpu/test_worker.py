"""GPU workers against CPU workers, message for message, on one small random checkpoint.

Two ranks run on however many GPUs there are; on one, they take turns, which proves order and
results but no speed.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from nitsum.messages import Fault, Join, Pages, StepDone, Work
from nitsum.plan import Group
from nitsum.request import SamplingParams
from tests.checkpoints import write_checkpoint
from tests.processes.driver import (
    ALONE_0,
    ALONE_1,
    BOTH,
    PROMPT,
    Driver,
    largest_difference,
    logits_of,
    make_config,
    tokens_of,
)
from tests.server.server_kit import byte_level_bpe

pytestmark = [pytest.mark.gpu, pytest.mark.processes, pytest.mark.timeout(600)]
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

GREEDY = SamplingParams(temperature=0.0, return_logits=True)
KEEPS_GRAMMARS = find_spec("llguidance") is not None
needs_llguidance = pytest.mark.skipif(not KEEPS_GRAMMARS, reason="llguidance is not installed")
VOCAB = 448
"""More than the tokenizer has."""
HIDDEN_SIZE = 48
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
    write_checkpoint(folder, "llama", max_position_embeddings=256, vocab_size=VOCAB)
    byte_level_bpe().save(str(folder / "tokenizer.json"))
    return folder


def started(folder: Path, device: str, fault: Fault | None = None) -> Driver:
    (folder / "config.json").rename(folder / "kept.json")
    config = make_config(
        folder,
        device=device,
        load_format="auto",
        fault=fault,
        timeout_s=60.0,
        host_kv_bytes=1 << 18,
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
            "state": driver.generate(ALONE_0, 2, STATE),
            "held": driver.generate(ALONE_0, NUM_TOKENS, HELD) if KEEPS_GRAMMARS else [],
        }
    finally:
        driver.executor.close()


RANDOM = SamplingParams(
    temperature=1.5, seed=9, top_p=0.95, frequency_penalty=0.8, repetition_penalty=1.2, logprobs=2
)
STATE = SamplingParams(temperature=0.0, return_hidden=True)
HELD = SamplingParams(
    temperature=1.0,
    seed=4,
    stop_token_ids=(2,),
    frequency_penalty=0.5,
    grammar='%llguidance {}\nstart: %json {"type": "array", "items": {"enum": [1, 22]}, '
    '"minItems": 1, "maxItems": 2, "x-guidance": {"whitespace_flexible": false}}\n',
)
"""Ends before `NUM_TOKENS`; what is drawn behind the end is the end."""


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


@pytest.mark.parametrize("group", [ALONE_0, ALONE_1, BOTH], ids=str)
def test_states_are_those_of_cpu_ranks(
    driver: Driver, reference: dict[str, list[StepDone]], group: Group
):
    """Of a step with a chunk, and of one with nothing but decodes."""
    done = driver.generate(group, 2, STATE)
    for one, other in zip(done, reference["state"], strict=True):
        ours, theirs = (torch.frombuffer(bytearray(d.hidden[0] or b""), dtype=torch.float32)
                        for d in (one, other))  # fmt: skip
        assert len(ours) == HIDDEN_SIZE
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@needs_llguidance
@pytest.mark.parametrize("group", [ALONE_0, BOTH], ids=str)
def test_grammars_are_kept_as_on_cpu_ranks(
    driver: Driver, reference: dict[str, list[StepDone]], group: Group
):
    """All steps are sent at once: each waits by itself for the token before it."""
    tokens = tokens_of(driver.generate(group, NUM_TOKENS, HELD))
    assert tokens == tokens_of(reference["held"])
    found = json.loads(byte_level_bpe().decode(tokens[: tokens.index(2)]))
    assert set(found) <= {1, 22}


@needs_llguidance
def test_free_answers_share_steps_with_held_ones(
    driver: Driver, reference: dict[str, list[StepDone]]
):
    """One step for both: draws of its graph, one row of its logits masked before."""
    num_prompt = len(PROMPT)
    wanted = (replace(GREEDY, return_logits=False), HELD)
    joins: list[Join] = []
    places: list[Pages] = []
    for sampling in wanted:
        slot, unit = driver.place()
        joins.append(Join(slot, PROMPT, num_prompt, num_prompt, sampling))
        places.append(Pages(slot, 0, driver.pages(BOTH, unit)))
    slots = [join.slot for join in joins]
    driver.send(BOTH, [Work(slot, 0, num_prompt, True) for slot in slots], joins, places)
    for position in range(num_prompt, num_prompt + NUM_TOKENS - 1):
        driver.send(BOTH, [Work(slot, position, 1, True) for slot in slots])
    done = driver.collect(NUM_TOKENS)
    free, held = (list(tokens) for tokens in zip(*(d.tokens for d in done), strict=True))
    assert free == tokens_of(reference["greedy"])
    assert held == tokens_of(reference["held"])


@needs_llguidance
def test_an_answer_that_changes_lanes_keeps_to_its_grammar(
    driver: Driver, reference: dict[str, list[StepDone]]
):
    done = driver.generate_across(ALONE_0, BOTH, 3, NUM_TOKENS, HELD)
    assert tokens_of(done) == tokens_of(reference["held"])


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
    ("src", "dst"), [(ALONE_0, ALONE_0), (BOTH, BOTH), (BOTH, ALONE_1), (ALONE_0, BOTH)], ids=str
)
def test_a_sequence_that_was_in_host_memory_goes_on_as_if_it_had_not(
    driver: Driver, reference: dict[str, list[StepDone]], src: Group, dst: Group
):
    """Saved, its units given to another at once, loaded elsewhere: nobody waits for a reply."""
    place, num_before = driver.place(), 4
    driver.prefill(src, *place, GREEDY)
    driver.decode(src, place[0], len(PROMPT), num_before - 1)
    saved = driver.save(src, place[1])
    driver.prefill(src, driver.place()[0], place[1], RANDOM)
    position = len(PROMPT) + num_before
    slot = driver.load(src, dst, position, place, saved, GREEDY)
    driver.decode(dst, slot, position, NUM_TOKENS - num_before - 1)
    done = driver.collect(NUM_TOKENS + 3)
    done = done[1 : 1 + num_before] + done[3 + num_before :]
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
