"""Agent chains: one deadline, one growing prefix."""

from __future__ import annotations

from nitsum.events import Started
from nitsum.request import Request, SamplingParams
from tests.unit.engine.machine import Machine


def call(
    machine: Machine,
    request_id: str,
    prompt: list[int],
    chain_id: str | None,
    deadline_s: float | None = None,
) -> None:
    request = Request(
        request_id,
        prompt,
        SamplingParams(max_tokens=3),
        tier="default",
        arrival_s=machine.clock.now(),
        chain_id=chain_id,
        chain_deadline_s=deadline_s,
    )
    machine.requests[request_id] = request
    machine.answers[request_id] = []
    machine.core.submit(request)


def make_machine(**options) -> Machine:
    return Machine(1, units_per_block=1, **{"num_blocks": 24, **options})


def cached(machine: Machine, request_id: str) -> int:
    return next(
        e.num_cached
        for e in machine.log.events
        if isinstance(e, Started) and e.request_id == request_id
    )


def crowd(machine: Machine, first: int) -> None:
    """More of other prompts than the arena can cache."""
    for i in range(first, first + 6):
        machine.submit([100 + i] * 20, max_tokens=2, tier="priority")
        machine.run()


def test_a_live_chains_prefix_outlives_the_rest_of_the_cache():
    machine = make_machine()
    prompt = list(range(16))
    call(machine, "call-1", prompt, "chain")
    machine.run()
    crowd(machine, 0)
    call(machine, "call-2", [*prompt, 1, 2, 3], "chain")
    machine.drain()
    assert cached(machine, "call-2") == 16


def test_without_a_chain_it_would_have_gone():
    machine = make_machine()
    prompt = list(range(16))
    call(machine, "call-1", prompt, None)
    machine.run()
    crowd(machine, 0)
    call(machine, "call-2", [*prompt, 1, 2, 3], None)
    machine.drain()
    assert cached(machine, "call-2") < 16


def test_an_idle_chain_is_forgotten():
    machine = make_machine(chain_idle_s=0.5)
    prompt = list(range(16))
    call(machine, "call-1", prompt, "chain")
    machine.run()
    assert len(machine.core.memory.chains) == 1
    for _ in range(600):
        machine.turn()
    assert len(machine.core.memory.chains) == 0
    crowd(machine, 0)
    call(machine, "call-2", [*prompt, 1, 2, 3], "chain")
    machine.drain()
    assert cached(machine, "call-2") < 16


def test_kept_blocks_give_way_when_nothing_else_does():
    machine = make_machine()
    call(machine, "call-1", list(range(40)), "chain")
    machine.run()
    large = machine.submit([9] * 85, max_tokens=2)
    machine.drain()
    assert machine.ended[large] == "length"


def test_later_calls_rise_as_their_chain_runs_out_of_time():
    """Both calls wait; the one whose chain ends sooner starts first, though it arrived later."""
    machine = make_machine(max_num_seqs=1)
    blocker = machine.submit([1] * 5, max_tokens=20)
    machine.turn()
    call(machine, "plain", [2] * 5, None)
    machine.turn()
    call(machine, "late-chain", [3] * 5, "b", deadline_s=machine.clock.now() + 900.0)
    call(machine, "soon-chain", [4] * 5, "a", deadline_s=machine.clock.now() + 1.0)
    machine.drain()
    order = [e.request_id for e in machine.log.events if isinstance(e, Started)]
    assert order == [blocker, "soon-chain", "plain", "late-chain"]


def test_a_call_inherits_the_deadline_its_chain_named_before():
    machine = make_machine(max_num_seqs=1)
    call(machine, "first", [1] * 5, "a", deadline_s=2.0)
    machine.run()
    machine.submit([1] * 5, max_tokens=20)
    machine.turn()
    call(machine, "plain", [2] * 5, None)
    call(machine, "second", [3] * 5, "a")
    machine.drain()
    order = [e.request_id for e in machine.log.events if isinstance(e, Started)]
    assert order.index("second") < order.index("plain")


def test_chains_survive_the_workers():
    machine = make_machine()
    call(machine, "call-1", list(range(16)), "chain", deadline_s=50.0)
    machine.run()
    machine.executor.dying = True
    machine.turn()
    call(machine, "call-2", list(range(16)), "chain")
    machine.drain()
    chains = machine.core.memory.chains
    assert chains.deadline_s(machine.requests["call-2"]) == 50.0
