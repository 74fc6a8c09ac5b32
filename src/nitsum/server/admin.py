"""Admin routes: plans, switches, drain. `access` lets in only who may."""

from __future__ import annotations

import uuid

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from nitsum.engine.client import op_id_in_use
from nitsum.errors import ApiError, bad_request
from nitsum.messages import LaneStatus, SwitchReport
from nitsum.server.respond import json_response
from nitsum.server.schema import SwitchBody, parse_body
from nitsum.server.service import read_body, service_of

MAX_DECISIONS = 256


async def plans(http: HttpRequest) -> Response:
    """The plans that are resident, the one served, and its lanes."""
    status = await service_of(http).engine.status()
    return json_response(
        {
            "plan": status.plan,
            "plans": status.plans,
            "switching_to": status.switching_to,
            "lanes": [_lane(lane) for lane in status.lanes],
            "kv_used": status.kv_used,
            "generation": status.generation,
            "draining": status.draining,
        }
    )


def _lane(lane: LaneStatus) -> dict[str, object]:
    fields: dict[str, object] = msgspec.to_builtins(lane)
    fields["group"] = str(lane.group)
    return {**fields, "degree": lane.group.degree, "ranks": list(lane.group.ranks)}


async def switch(http: HttpRequest) -> Response:
    """Go to a plan; answers when the switch has ended.

    The target is absolute. An `op_id` names the operation, so that asking again changes nothing.
    """
    if not http.headers.get("content-type", "").startswith("application/json"):
        # What a page of another site can send without asking the browser first.
        raise ApiError("Send JSON, with content-type: application/json.", status=415)
    service = service_of(http)
    body = parse_body(await read_body(http), SwitchBody)
    known = (await service.engine.status()).plans
    if body.plan not in known:
        raise bad_request(
            f"Unknown plan {body.plan!r}. This server holds: {', '.join(known)}.", "plan"
        )
    op_id = body.op_id or f"switch-{uuid.uuid4().hex}"
    service.metrics.asked_switch(op_id)
    report = await service.engine.switch(op_id, body.plan)
    if report.to_plan != body.plan:
        raise op_id_in_use(op_id, report.to_plan, body.plan)
    return _report(report)


def _report(report: SwitchReport) -> Response:
    if not report.ok:
        raise ApiError(
            f"The switch to {report.to_plan} was not done: {report.message}",
            status=409,
            code="switch_refused",
        )
    fields: dict[str, object] = msgspec.to_builtins(report)
    fields.pop("type", None)
    return json_response({"op_id": report.op_id, "ok": True, **fields})


async def decisions(http: HttpRequest) -> Response:
    """What the controller decided lately, and why, the newest first; `?limit=` bounds how many."""
    given = http.query_params.get("limit", "20")
    if not given.isdecimal() or not 1 <= int(given) <= MAX_DECISIONS:
        raise bad_request(f"limit is a number from 1 to {MAX_DECISIONS}.", "limit")
    status = await service_of(http).engine.status(int(given))
    found = [
        {**msgspec.to_builtins(decision.event), "words": decision.words}
        for decision in reversed(status.decisions)
    ]
    return json_response({"plan": status.plan, "decisions": found})


async def drain(http: HttpRequest) -> Response:
    """Accept no more requests; those that are here finish."""
    service = service_of(http)
    service.draining = True
    await service.engine.drain()
    return json_response({"draining": True, "num_open": len(service.metrics.open)})
