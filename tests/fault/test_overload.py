"""More work than fits: the lower tiers are turned away, the higher are served."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fault.running import RunningServer

pytestmark = pytest.mark.fault

TIERS = """
- {name: priority, level: 0, ttft_s: 60, tpot_s: 10}
- {name: default, level: 1, ttft_s: 60, tpot_s: 10}
- {name: flex, level: 2, deadline_s: 600, max_queue_requests: 2}
"""


def test_overload_sheds_the_lower_tier(checkpoint: Path, tmp_path: Path) -> None:
    tiers = tmp_path / "tiers.yaml"
    tiers.write_text(TIERS)
    flags = ("--ranks", "1", "--kv-memory", "32MiB", "--max-num-seqs", "2", "--tiers", str(tiers))
    with RunningServer(checkpoint, tmp_path, *flags) as server:
        flex, priority = asyncio.run(_crowd(server.url))
        refused = [answer for answer in flex if answer.status_code == 429]
        assert {answer.status_code for answer in flex} == {200, 429}
        assert all(int(answer.headers["retry-after-ms"]) > 0 for answer in refused)
        assert {answer.status_code for answer in priority} == {200}
        shown = httpx.get(f"{server.url}/metrics").text
        lines = [line for line in shown.splitlines() if line.startswith("nitsum:refusals_total{")]
        counts = {line.split("}")[0].split("tier=")[1]: float(line.split()[-1]) for line in lines}
        assert list(counts.values()) == [len(refused)]
        assert all("flex" in tier for tier in counts)


async def _crowd(url: str) -> tuple[list[httpx.Response], list[httpx.Response]]:
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:

        async def ask(tier: str) -> httpx.Response:
            request: dict[str, Any] = {"prompt": "hello", "max_tokens": 100, "ignore_eos": True}
            return await http.post("/v1/completions", json={**request, "service_tier": tier})

        flex = [asyncio.create_task(ask("flex")) for _ in range(12)]
        await asyncio.sleep(0.05)
        priority = await asyncio.gather(*(ask("priority") for _ in range(4)))
        return list(await asyncio.gather(*flex)), list(priority)
