"""Canaries: short requests beside a load that tell how a server feels, and are no part of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nitsum.metrics.records import Recorder
from nitsum.workload.items import Segment, WorkItem

TENANT = "canary"
TIER = "default"


def with_canaries(
    items: Iterable[WorkItem], every_s: float, duration_s: float
) -> Iterator[WorkItem]:
    """`items` with a short `default` request every `every_s` seconds."""
    next_s = every_s
    for item in items:
        while next_s < min(item.at_s, duration_s):
            yield _canary(next_s)
            next_s += every_s
        yield item


def _canary(at_s: float) -> WorkItem:
    request_id = f"canary.{at_s:g}"
    return WorkItem(
        request_id=request_id,
        at_s=at_s,
        num_output=8,
        tier=TIER,
        tenant=TENANT,
        segments=(Segment(request_id, 32),),
    )


def take_canaries(recorder: Recorder) -> list[str]:
    """Remove canaries from the records; a note about them."""
    found = {k: r for k, r in recorder.requests.items() if r.tenant == TENANT}
    for request_id in found:
        del recorder.requests[request_id]
    times = sorted(record.ttft_s for record in found.values() if record.ttft_s is not None)
    if not found:
        return []
    if not times:
        return [f"{len(found)} canaries, none answered"]
    middle, longest = times[len(times) // 2], times[-1]
    return [
        f"{len(found)} canaries (32 tokens in, 8 out, default): first token after "
        f"{1e3 * middle:.0f} ms in the median, {1e3 * longest:.0f} ms at most"
    ]
