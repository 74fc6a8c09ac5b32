"""Whatever happens in whatever order: every unit accounted for, no token lost, repeated or wrong.

The fake machine checks every position a step reads and every answer has one right value, so these
properties need no further oracle. `check()` runs after every turn.
"""

from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.plan import PlanSet, parse_plan
from tests.unit.engine.machine import Machine

TIERS = ("priority", "default", "flex", "batch")

prompts = st.builds(
    lambda shared, own: [7] * shared + own,
    st.integers(0, 20),
    st.lists(st.integers(0, 3), min_size=1, max_size=20),
)
actions = st.one_of(
    st.tuples(st.just("submit"), prompts, st.integers(1, 12), st.sampled_from(TIERS)),
    st.tuples(st.just("turn"), st.integers(1, 12)),
    st.tuples(st.just("switch"), st.integers(0, 9)),
    st.tuples(st.just("abort"), st.integers(0, 30)),
    st.tuples(st.just("cancel")),
    st.tuples(st.just("die")),
)


def act(machine: Machine, action: tuple) -> None:
    match action:
        case ("submit", prompt, max_tokens, tier):
            machine.submit(prompt, max_tokens, tier, stop_token_ids=(3, 11))
        case ("turn", num_turns):
            for _ in range(num_turns):
                machine.turn()
        case ("switch", index):
            names = [plan.name for plan in machine.plans.plans]
            machine.switch(names[index % len(names)])
        case ("abort", index):
            running = list(machine.core.sequences)
            if running:
                machine.abort(running[index % len(running)])
        case ("cancel",):
            machine.core.generation.switcher.cancel_wave("the test says so")
        case ("die",):
            machine.executor.dying = True


def run(machine: Machine, script: list[tuple]) -> None:
    for action in script:
        act(machine, action)
    machine.drain()
    assert all(
        report.ok or "under way" in report.message or "killed" in report.message
        for report in machine.reports
    )


@settings(max_examples=150)
@given(
    script=st.lists(actions, max_size=30),
    seed=st.integers(0, 2**16),
    units_per_block=st.sampled_from([1, 2, 4]),
    num_blocks=st.integers(9, 24),
)
def test_four_ranks(script, seed, units_per_block, num_blocks):
    """Units per block below the degree means replicated heads."""
    run(Machine(4, seed=seed, units_per_block=units_per_block, num_blocks=num_blocks), script)


@settings(max_examples=60)
@given(script=st.lists(actions, max_size=20), seed=st.integers(0, 2**16))
def test_eight_ranks(script, seed):
    run(Machine(8, seed=seed, units_per_block=8, num_blocks=10), script)


@settings(max_examples=60)
@given(script=st.lists(actions, max_size=20), seed=st.integers(0, 2**16))
def test_without_prefix_cache(script, seed):
    run(Machine(2, seed=seed, units_per_block=2, num_blocks=10, prefix_cache=False), script)


@settings(max_examples=60)
@given(script=st.lists(actions, max_size=20), seed=st.integers(0, 2**16))
def test_plans_without_narrow_lanes(script, seed):
    """min_tp above 1: the largest page is a part of the block."""
    plans = tuple(parse_plan(name, 4) for name in ("2xTP2", "TP4", "TP4/2xTP2"))
    run(Machine(4, seed=seed, plans=PlanSet(4, plans, "2xTP2"), min_tp=2), script)


@settings(max_examples=100)
@given(
    script=st.lists(actions, max_size=30),
    seed=st.integers(0, 2**16),
    num_host_blocks=st.integers(1, 60),
    num_blocks=st.integers(9, 14),
    units_per_block=st.sampled_from([1, 2, 4]),
)
def test_with_host_memory(script, seed, num_host_blocks, num_blocks, units_per_block):
    """KV goes to host memory and comes back, into whatever layout is in force by then."""
    machine = Machine(
        4,
        seed=seed,
        units_per_block=units_per_block,
        num_blocks=num_blocks,
        num_host_blocks=num_host_blocks,
    )
    run(machine, script)


@settings(max_examples=60)
@given(
    script=st.lists(actions, max_size=25),
    seed=st.integers(0, 2**16),
    policy=st.sampled_from(["fcfs", "priority"]),
)
def test_other_policies(script, seed, policy):
    run(Machine(4, seed=seed, num_blocks=12, num_host_blocks=20, policy=policy), script)


ROLE_PLANS = {
    2: ("TP1-prefill+TP1-decode", "2xTP1", "TP2"),
    4: (
        "TP2-prefill+2xTP1-decode",
        "4xTP1",
        "2xTP1-prefill+2xTP1-decode",
        "TP2-prefill+TP2",
        "TP4",
        "TP4-prefill/4xTP1-decode",
    ),
}


@settings(max_examples=200)
@given(
    script=st.lists(actions, max_size=30),
    seed=st.integers(0, 2**16),
    num_ranks=st.sampled_from([2, 4]),
    units_per_block=st.sampled_from([1, 2, 4]),
    num_blocks=st.integers(9, 20),
    num_host_blocks=st.sampled_from([0, 12]),
)
def test_with_roles(script, seed, num_ranks, units_per_block, num_blocks, num_host_blocks):
    """Requests go from prefill to decode lanes while plans with and without roles change."""
    plans = tuple(parse_plan(name, num_ranks) for name in ROLE_PLANS[num_ranks])
    machine = Machine(
        num_ranks,
        seed=seed,
        units_per_block=units_per_block,
        num_blocks=num_blocks,
        num_host_blocks=num_host_blocks,
        plans=PlanSet(num_ranks, plans, plans[0].name),
    )
    run(machine, script)
    assert not machine.core.generation.is_moving


@settings(max_examples=60)
@given(
    script=st.lists(actions, max_size=25),
    seed=st.integers(0, 2**16),
    policy=st.sampled_from(["fcfs", "priority"]),
    prefix_cache=st.booleans(),
)
def test_roles_under_other_policies(script, seed, policy, prefix_cache):
    plans = tuple(parse_plan(name, 4) for name in ROLE_PLANS[4])
    machine = Machine(
        4,
        seed=seed,
        num_blocks=12,
        plans=PlanSet(4, plans, plans[0].name),
        policy=policy,
        prefix_cache=prefix_cache,
    )
    run(machine, script)
