"""A snapshot of the engine for health checks, metrics and dashboards."""

from __future__ import annotations

from nitsum.engine.generation import Generation
from nitsum.engine.lanes import LaneLoop
from nitsum.messages import LaneStatus, Status
from nitsum.plan import PlanSet


def status_of(
    op_id: str,
    generation: Generation,
    plans: PlanSet,
    *,
    number: int,
    seconds_since_step: float,
    draining: bool,
) -> Status:
    lanes = [_lane_status(loop) for loop in generation.loops.values()]
    switch = generation.switcher.current
    return Status(
        op_id=op_id,
        plan=generation.switcher.plan.name,
        plans=[plan.name for plan in plans.plans],
        switching_to=None if switch is None else switch.dst.name,
        lanes=lanes,
        kv_used=[generation.kv.used_share(rank) for rank in range(plans.num_ranks)],
        num_waiting=sum(lane.num_waiting for lane in lanes),
        num_running=sum(lane.num_running for lane in lanes),
        seconds_since_step=seconds_since_step,
        generation=number,
        draining=draining,
    )


def _lane_status(loop: LaneLoop) -> LaneStatus:
    scheduler = loop.scheduler
    return LaneStatus(
        group=loop.group,
        role=loop.lane.role,
        tiers=loop.lane.tiers,
        num_running=scheduler.num_running,
        num_paused=scheduler.num_paused,
        num_waiting=scheduler.num_waiting,
        draining=loop.draining,
    )
