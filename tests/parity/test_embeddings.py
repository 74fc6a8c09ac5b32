"""Embeddings of a served model against `transformers`, at every degree and through switches."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from tests.checkpoints import write_checkpoint
from tests.fault.running import RunningServer
from tests.server.server_kit import make_checkpoint

pytestmark = pytest.mark.processes

TOLERANCE = 2e-5
"""Of a component of a vector of length 1."""


class Embedder:
    """A server of four ranks, and the same model in `transformers`."""

    def __init__(self, server: RunningServer, model: Any) -> None:
        self.server = server
        self._model = model

    def reference(self, prompt: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            state = self._model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
        return state / state.norm()

    def check(self, prompts: list[list[int]], answer: dict[str, Any]) -> None:
        assert len(answer["data"]) == len(prompts)
        for prompt, one in zip(prompts, answer["data"], strict=True):
            found = torch.tensor(one["embedding"])
            assert (found - self.reference(prompt)).abs().max() < TOLERANCE, len(prompt)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedder]:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model = write_checkpoint(folder, "qwen3", vocab_size=512, max_position_embeddings=1024)
    make_checkpoint(folder)
    flags = ("--ranks", "4", "--kv-memory", "8MiB", "--max-batch-tokens", "64")
    with RunningServer(folder, tmp_path_factory.mktemp("data"), *flags) as server:
        yield Embedder(server, model)


def prompts_of(seed: int) -> list[list[int]]:
    """Of one token, of less than a block, of several steps; two share a beginning."""
    draw = random.Random(seed)
    long = [draw.randrange(512) for _ in range(300)]
    return [[7], [draw.randrange(512) for _ in range(11)], long, [*long[:200], 5, 6], long]


async def embed(http: httpx.AsyncClient, prompts: list[list[int]]) -> dict[str, Any]:
    call = {"input": prompts, "service_tier": "batch"}
    return (await http.post("/v1/embeddings", json=call)).raise_for_status().json()


async def switch(http: httpx.AsyncClient, plan: str) -> dict[str, Any]:
    done = await http.post("/admin/plans/switch", json={"plan": plan})
    return done.raise_for_status().json()


@pytest.mark.parametrize("plan", ["4xTP1", "2xTP2", "TP4"])
def test_every_degree_gives_the_states_of_transformers(embedder: Embedder, plan: str) -> None:
    async def main() -> dict[str, Any]:
        async with httpx.AsyncClient(base_url=embedder.server.url, timeout=120) as http:
            await switch(http, plan)
            return await embed(http, prompts)

    prompts = prompts_of(len(plan))
    embedder.check(prompts, asyncio.run(main()))


def test_switches_on_the_way_change_nothing(embedder: Embedder) -> None:
    async def main() -> tuple[list[dict[str, Any]], int]:
        async with httpx.AsyncClient(base_url=embedder.server.url, timeout=120) as http:
            calls = [asyncio.create_task(embed(http, prompts)) for prompts in many]
            reports = [await switch(http, plan) for plan in ("4xTP1", "TP4", "2xTP2", "4xTP1")]
            moved = sum(wave["num_requests"] for report in reports for wave in report["waves"])
            return list(await asyncio.gather(*calls)), moved

    many = [prompts_of(seed) for seed in range(100, 112)]
    answers, num_moved = asyncio.run(main())
    for prompts, answer in zip(many, answers, strict=True):
        embedder.check(prompts, answer)
    assert num_moved > 0, "no request was under way when a plan changed"
