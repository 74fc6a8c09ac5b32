"""What streams feel of a switch, in virtual time: old lanes end together, nobody waits."""

import gc
from itertools import pairwise
from random import Random

import pytest

from nitsum.bench.driver import Driver
from nitsum.bench.virtual import VirtualMachine
from nitsum.config import EngineConfig
from nitsum.control.filling import Filling
from nitsum.control.switch import Switch
from nitsum.control.switching import Switcher
from nitsum.cost.machines import Machine
from nitsum.cost.shapes import SHAPES
from nitsum.engine.landing import TOGETHER_S
from nitsum.metrics.records import Recorder
from nitsum.plan import read_plans
from nitsum.request import Request, SamplingParams

NUM_STREAMS = 16
NUM_PROMPTS = 8
"""Under way at any time: enough that every step of every lane takes some on."""


@pytest.fixture
def driver() -> Driver:
    """Two lanes of one rank with streams, and prompts enough that every step takes some on."""
    config = EngineConfig(
        model="none",
        plans=read_plans(["2xTP1", "TP2"], 2),
        device="cuda",
        dtype="bfloat16",
        kv_bytes=16 << 30,
        max_num_seqs=64,
        max_batch_tokens=512,
        policy="fcfs",
    )
    machine = VirtualMachine(config, SHAPES["Llama-3.1-8B"], Machine.parse("2xH100"))
    driver = Driver(config, machine, Recorder())
    for number in range(NUM_STREAMS):
        submit(driver, f"s{number}", 64 + 40 * number, 2000)
    number = 0
    while len(driver.answers["s15"].tokens) < 5:
        driver.turn()
    while driver.num_active < NUM_STREAMS + NUM_PROMPTS:
        submit(driver, f"b{number}", 4000 + 100 * number, 4)
        number += 1
    return driver


def submit(driver: Driver, name: str, num_prompt: int, max_tokens: int) -> None:
    prompt = Random(name).choices(range(1000), k=num_prompt)
    driver.submit(Request(name, prompt, SamplingParams(max_tokens=max_tokens)))


def run_until_switched(driver: Driver, plan: str) -> None:
    num_before = len(driver.reports)
    number = 0
    driver.switch(plan)
    while len(driver.reports) == num_before:
        if driver.num_active < NUM_STREAMS + NUM_PROMPTS:
            submit(driver, f"{plan}-{number}", 4000, 4)
            number += 1
        driver.turn()


def test_steps_of_old_lanes_end_together_and_the_cut_over_comes_early_in_them(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
):
    ends: list[tuple[float, float]] = []
    original = Switcher._cut_over  # pyright: ignore[reportPrivateUsage]

    def spy(self: Switcher, switch: Switch, filling: Filling) -> None:
        now = driver.clock.now()
        free_s = driver.core.generation.rank_load.free_s
        ends.append((min(free_s) - now, max(free_s) - now))
        original(self, switch, filling)

    monkeypatch.setattr(Switcher, "_cut_over", spy)
    for plan in ("TP2", "2xTP1", "TP2"):
        run_until_switched(driver, plan)
    assert len(ends) == 3  # one wave each: nobody was left behind
    for first_s, last_s in ends:
        assert last_s - first_s <= TOGETHER_S
        assert first_s > 4e-3


def test_no_gap_at_a_switch_is_longer_than_those_without(driver: Driver):
    """All steps take on as many tokens, so that gaps are alike within a layout."""
    for plan in ("TP2", "2xTP1", "TP2", "2xTP1"):
        run_until_switched(driver, plan)
        for _ in range(100):
            if driver.num_active < NUM_STREAMS + NUM_PROMPTS:
                submit(driver, f"{plan}-{len(driver.answers)}", 1500, 4)
            driver.turn()
    recorder = driver.core.sink
    assert isinstance(recorder, Recorder)
    spans = [(switch.started_s, switch.ended_s or 0.0) for switch in recorder.switches]
    within, without = list[float](), list[float]()
    for a, b in pairwise(driver.answers["s0"].times_s):
        is_touched = any(a < end_s and b > start_s for start_s, end_s in spans)
        (within if is_touched else without).append(b - a)
    assert len(without) > 20
    assert max(within) <= sorted(without)[9 * len(without) // 10] + 2e-3


def test_nobody_new_gets_kv_in_a_lane_about_to_be_emptied(driver: Driver):
    """It would be left behind, and keep the old lane going beside the new one."""
    driver.switch("TP2")
    landing = driver.core.generation.landing
    while not landing.is_under_way:
        driver.turn()
    driver.submit(Request("late", [1] * 600, SamplingParams(max_tokens=4), tier="priority"))
    while landing.is_under_way:
        assert "late" not in driver.core.generation.kv.tables
        driver.turn()
    group = driver.core.sequences["late"].group
    assert group is not None
    assert group.degree == 2


def test_steps_are_short_while_a_switch_is_under_way(driver: Driver):
    """Streams wait no longer for a step before or after the cut over than they do without it."""
    recorder = driver.core.sink
    assert isinstance(recorder, Recorder)
    limit, steps = driver.core.config.max_batch_tokens, recorder.steps
    settle(driver)
    before = len(steps)
    assert steps[-1].num_decode + steps[-1].prefill_tokens > 0.9 * limit
    run_until_switched(driver, "TP2")
    proposed_s = recorder.switches[0].waves[0].proposed_s
    during = [step for step in steps[before:] if step.ended_s > proposed_s]
    assert len(during) > 4
    assert all(step.num_decode + step.prefill_tokens <= limit // 2 for step in during)
    settle(driver)
    assert steps[-1].num_decode + steps[-1].prefill_tokens > 0.9 * limit


def settle(driver: Driver) -> None:
    """A second without a switch."""
    until_s = driver.clock.now() + 1.0
    while driver.clock.now() < until_s:
        if driver.num_active < NUM_STREAMS + NUM_PROMPTS:
            submit(driver, f"calm-{len(driver.answers)}", 4000, 4)
        driver.turn()


def test_requests_and_switches_leave_nothing_to_the_garbage_collector(driver: Driver):
    """An engine under load never collects: what is cyclic would stay for ever."""
    driver.turn()
    gc.collect()
    gc.disable()
    try:
        for plan in ("TP2", "2xTP1", "TP2"):
            run_until_switched(driver, plan)
        settle(driver)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert [type(o) for o in gc.garbage if type(o).__module__.startswith("nitsum")] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
