"""The ZeroMQ client against the engine's end of the socket, in one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nitsum.engine.client import ZmqEngineClient
from nitsum.engine.ipc import ServerLink
from nitsum.errors import ApiError
from nitsum.messages import (
    Abort,
    Drain,
    GetStatus,
    Output,
    Status,
    Submit,
    SwitchPlan,
    SwitchReport,
    ToEngine,
)
from nitsum.request import Request, SamplingParams

Body = Callable[[ZmqEngineClient, ServerLink], Awaitable[None]]


@asynccontextmanager
async def pair(address: str) -> AsyncIterator[tuple[ZmqEngineClient, ServerLink]]:
    client = ZmqEngineClient(address, status_timeout_s=0.2, switch_timeout_s=2.0)
    await client.start()
    link = ServerLink(address)
    try:
        await asyncio.wait_for(client.wait_connected(), 5)
        yield client, link
    finally:
        link.close()
        await client.close()


def run(tmp_path: Path, body: Body) -> None:
    async def main() -> None:
        async with pair(f"ipc://{tmp_path}/engine.sock") as (client, link):
            await asyncio.wait_for(body(client, link), 10)

    asyncio.run(main())


async def received(link: ServerLink) -> list[ToEngine]:
    while True:
        messages = link.receive(99)
        if messages:
            return messages
        await asyncio.sleep(0.001)


def request(name: str) -> Request:
    return Request(name, [1, 2], SamplingParams(max_tokens=4))


def status(op_id: str) -> Status:
    return Status(op_id, "TP1", ["TP1"], None, [], [0.5], 1, 2, 0.1, 0, False)


async def collect(client: ZmqEngineClient, name: str) -> list[Output]:
    return [output async for output in client.generate(request(name))]


def test_outputs_reach_their_request_in_order(tmp_path: Path) -> None:
    async def body(client: ZmqEngineClient, link: ServerLink) -> None:
        tasks = [asyncio.create_task(collect(client, name)) for name in "ab"]
        submitted: list[ToEngine] = []
        while len(submitted) < 2:
            submitted += await received(link)
        assert submitted == [Submit(request("a")), Submit(request("b"))]
        link.send(Output("b", [7]), Output("a", [1]), Output("a", [2], "length"))
        link.send(Output("b", [8], "stop"))
        a, b = await asyncio.gather(*tasks)
        assert [output.tokens for output in a] == [[1], [2]]
        assert [output.tokens for output in b] == [[7], [8]]
        assert link.receive(99) == []

    run(tmp_path, body)


def test_tokens_of_a_step_come_in_one_frame(tmp_path: Path) -> None:
    async def body(client: ZmqEngineClient, link: ServerLink) -> None:
        tasks = [asyncio.create_task(collect(client, name)) for name in "ab"]
        submitted: list[ToEngine] = []
        while len(submitted) < 2:
            submitted += await received(link)
        link.send(Output("a", [1], tier="flex"), Output("b", [2]))
        link.send(Output("a", [3], tier="flex"), Output("b", [4]), Output("c", [5]))
        link.send(Output("c", [6]))
        link.send(Output("a", [], "stop", tier="flex"), Output("b", [5], "length"))
        a, b = await asyncio.gather(*tasks)
        assert [output.tokens for output in a] == [[1], [3], []]
        assert {output.tier for output in a} == {"flex"}
        assert [token for output in b for token in output.tokens] == [2, 4, 5]
        # Nobody reads c: each message about it says so.
        aborts = [m for m in await received(link) if isinstance(m, Abort)]
        assert set(aborts) == {Abort("c")}

    run(tmp_path, body)


def test_closing_a_stream_early_aborts_it(tmp_path: Path) -> None:
    async def body(client: ZmqEngineClient, link: ServerLink) -> None:
        stream = client.generate(request("a"))
        first = asyncio.create_task(anext(stream))
        await received(link)
        link.send(Output("a", [1]))
        assert (await first).tokens == [1]
        await stream.aclose()
        assert await received(link) == [Abort("a")]
        # What was under way is dropped.
        link.send(Output("a", [2], "length"))

    run(tmp_path, body)


def test_a_request_nobody_reads_is_aborted(tmp_path: Path) -> None:
    async def body(client: ZmqEngineClient, link: ServerLink) -> None:
        # The engine's end may learn of the connection a moment after the server's.
        while not link.send(Output("of-an-earlier-server", [1])):
            await asyncio.sleep(0.001)
        assert await received(link) == [Abort("of-an-earlier-server")]

    run(tmp_path, body)


def test_cancelling_the_reader_aborts(tmp_path: Path) -> None:
    async def body(client: ZmqEngineClient, link: ServerLink) -> None:
        task = asyncio.create_task(collect(client, "a"))
        await received(link)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await received(link) == [Abort("a")]

    run(tmp_path, body)


def test_a_dead_engine_ends_open_requests_and_its_successor_is_used(tmp_path: Path) -> None:
    async def body(client: ZmqEngineClient, link: ServerLink) -> None:
        address = f"ipc://{tmp_path}/engine.sock"
        task = asyncio.create_task(collect(client, "a"))
        await received(link)
        switch = asyncio.create_task(client.switch("op", "TP1"))
        await received(link)
        link.send(Output("a", [1]))
        link.close()
        outputs = await task
        assert outputs[0].tokens == [1]
        assert outputs[-1].error_status == 503
        assert outputs[-1].error is not None
        with pytest.raises(ApiError, match="not running"):
            await switch
        # Nothing may wait for a successor.
        assert (await collect(client, "b"))[0].error_status == 503
        with pytest.raises(ApiError, match="not running"):
            await client.status()

        successor = ServerLink(address)
        await client.wait_connected()
        task = asyncio.create_task(collect(client, "c"))
        assert await received(successor) == [Submit(request("c"))]
        successor.send(Output("c", [], "stop"))
        assert (await task)[-1].finish_reason == "stop"
        successor.close()

    run(tmp_path, body)


def test_replies_find_who_asked(tmp_path: Path) -> None:
    async def body(client: ZmqEngineClient, link: ServerLink) -> None:
        heard: list[SwitchReport] = []
        client.on_switch(heard.append)
        asks = [asyncio.create_task(client.switch("op", "4xTP1")) for _ in range(2)]
        assert await received(link) == [SwitchPlan("op", "4xTP1")], "one id is one switch"
        report = SwitchReport("op", "TP4", "4xTP1", ok=True, duration_s=0.2)
        by_controller = SwitchReport("ctl-1", "4xTP1", "TP4", ok=True)
        link.send(report, by_controller)
        assert await asyncio.gather(*asks) == [report, report]
        await asyncio.sleep(0)
        assert heard == [report, by_controller]

        ask = asyncio.create_task(client.status())
        (message,) = await received(link)
        assert isinstance(message, GetStatus)
        link.send(status(message.op_id))
        assert (await ask).num_running == 2

        await client.drain()
        assert await received(link) == [Drain()]

    run(tmp_path, body)


def test_one_operation_has_one_plan(tmp_path: Path) -> None:
    async def body(client: ZmqEngineClient, link: ServerLink) -> None:
        ask = asyncio.create_task(client.switch("op", "4xTP1"))
        assert await received(link) == [SwitchPlan("op", "4xTP1")]
        with pytest.raises(ApiError, match="'op' is a switch to 4xTP1") as caught:
            await client.switch("op", "TP4")
        assert (caught.value.status, caught.value.param) == (409, "op_id")
        assert caught.value.code == "op_id_in_use"
        report = SwitchReport("op", "TP4", "4xTP1", ok=True)
        link.send(report)
        assert await ask == report, "the refused one changes nothing"
        assert link.receive(99) == []

    run(tmp_path, body)


def test_a_silent_engine_is_an_error(tmp_path: Path) -> None:
    async def body(client: ZmqEngineClient, link: ServerLink) -> None:
        with pytest.raises(ApiError, match="not answered") as caught:
            await client.status()
        assert caught.value.status == 503

    run(tmp_path, body)


def test_a_caller_that_leaves_does_not_cancel_the_switch_of_another(tmp_path: Path) -> None:
    async def body(client: ZmqEngineClient, link: ServerLink) -> None:
        first, second = (asyncio.create_task(client.switch("op", "p")) for _ in range(2))
        await received(link)
        first.cancel()
        await asyncio.sleep(0)
        link.send(SwitchReport("op", "q", "p", ok=True))
        assert (await second).ok

    run(tmp_path, body)


def test_send_without_a_server_drops(tmp_path: Path) -> None:
    link = ServerLink(f"ipc://{tmp_path}/alone.sock")
    assert link.send(Output("a")) is False
    assert link.send() is True
    link.close()
    link.close()
