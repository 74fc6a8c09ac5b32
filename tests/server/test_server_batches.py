"""Files and batches: OpenAI's client, the lowest tier, restarts, cancelling, what is refused."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from nitsum.engine.fake_client import FakeEngineClient
from nitsum.ledger.store import Store
from nitsum.messages import Output
from nitsum.request import Request
from nitsum.server.batchlines import check_lines
from nitsum.server.datafolder import DataFolder, read_whole_lines
from nitsum.server.keyfile import Key, change_keys, hash_token
from tests.server.server_kit import MODEL, Bench, error_of, served

CHAT = "/v1/chat/completions"
Body = Callable[[openai.AsyncOpenAI], Awaitable[None]]


def line(name: str, text: str = "hi", url: str = CHAT, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def jsonl(*lines: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


def bench_of(checkpoint: Path, folder: Path, engine: Any = None, **changes: Any) -> Bench:
    bench = Bench(checkpoint, engine, data_dir=folder, **changes)
    return bench.says("Hello world")


def run(bench: Bench, body: Body, key: str = "x") -> None:
    """`body` with OpenAI's client against a server that starts and ends."""

    async def main() -> None:
        async with (
            served(bench) as url,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client,
        ):
            await asyncio.wait_for(body(client), 20)

    asyncio.run(main())


async def upload(client: openai.AsyncOpenAI, *lines: dict[str, Any]) -> str:
    made = await client.files.create(file=("in.jsonl", jsonl(*lines)), purpose="batch")
    return made.id


async def submit(client: openai.AsyncOpenAI, *lines: dict[str, Any]) -> str:
    file_id = await upload(client, *lines)
    batch = await client.batches.create(
        input_file_id=file_id, endpoint=CHAT, completion_window="24h", metadata={"a": "b"}
    )
    assert batch.status == "validating"
    return batch.id


async def ended(client: openai.AsyncOpenAI, batch_id: str) -> openai.types.Batch:
    while True:
        batch = await client.batches.retrieve(batch_id)
        if batch.status in ("completed", "failed", "expired", "cancelled"):
            return batch
        await asyncio.sleep(0.02)


async def results(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(one) for one in (await client.files.content(file_id)).text.splitlines()]


def test_a_batch_by_the_openai_client(checkpoint: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.db"
    bench = bench_of(checkpoint, tmp_path, ledger=str(ledger))
    good = [line(f"line-{i}", service_tier="priority") for i in range(8)] + [line("line-8")]

    async def body(client: openai.AsyncOpenAI) -> None:
        batch_id = await submit(client, *good, line("bad", temperature=99))
        batch = await ended(client, batch_id)
        assert (batch.status, batch.metadata, batch.errors) == ("completed", {"a": "b"}, None)
        counts = batch.request_counts
        assert counts is not None
        assert (counts.total, counts.completed, counts.failed) == (10, 9, 1)
        out = await results(client, batch.output_file_id)
        assert {one["custom_id"] for one in out} == {f"line-{i}" for i in range(9)}
        for one in out:
            answer = one["response"]["body"]
            assert one["response"]["status_code"] == 200
            assert answer["choices"][0]["message"]["content"] == "Hello world"
            assert answer["service_tier"] == "batch"
        (bad,) = await results(client, batch.error_file_id)
        assert bad["response"]["status_code"] == 400
        assert bad["response"]["body"]["error"]["param"] == "temperature"
        assert [b.id async for b in client.batches.list()] == [batch_id]

    run(bench, body)
    assert {r.tier for r in bench.engine.requests} == {"batch"}
    store = Store(str(ledger))
    records = list(store.records())
    store.close()
    assert len(records) == 9
    assert {(r.tier_asked, r.tier_served) for r in records} == {
        ("priority", "batch"),
        ("batch", "batch"),
    }
    assert [r.reason is None for r in records if r.tier_asked == "batch"] == [True]
    assert len({r.batch_id for r in records}) == 1


def test_files_by_the_openai_client(checkpoint: Path, tmp_path: Path) -> None:
    async def body(client: openai.AsyncOpenAI) -> None:
        ids = [await upload(client, line(str(i))) for i in range(3)]
        assert [f.id async for f in client.files.list(limit=2)] == ids[::-1]
        assert [f.id async for f in client.files.list(order="asc", purpose="batch")] == ids
        found = await client.files.retrieve(ids[0])
        assert (found.filename, found.purpose, found.bytes) == (
            "in.jsonl",
            "batch",
            len(jsonl(line("0"))),
        )
        assert (await client.files.content(ids[0])).content == jsonl(line("0"))
        assert (await client.files.delete(ids[0])).deleted
        for call in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError):
                await call(ids[0])

    run(bench_of(checkpoint, tmp_path), body)
    assert len(list((tmp_path / "files").iterdir())) == 4, "deleted means gone from the disk"


@pytest.mark.parametrize("concurrency", [1, 3])
def test_lines_run_a_few_at_a_time(checkpoint: Path, tmp_path: Path, concurrency: int) -> None:
    most = 0

    class Counting(FakeEngineClient):
        def _outputs(self, request: Request) -> Any:
            nonlocal most
            most = max(most, len(self._running))
            return super()._outputs(request)

    engine = Counting(delay_s=0.01)  # long enough for others to begin meanwhile
    bench = bench_of(checkpoint, tmp_path, engine, batch_concurrency=concurrency)

    async def body(client: openai.AsyncOpenAI) -> None:
        many = [await submit(client, *[line(f"{i}") for i in range(12)]) for _ in range(2)]
        for batch_id in many:
            assert (await ended(client, batch_id)).status == "completed"

    run(bench, body)
    assert most == concurrency


def test_a_batch_survives_a_restart_without_repeating_a_line(
    checkpoint: Path, tmp_path: Path
) -> None:
    lines = [line(f"line-{i}", f"text {i}") for i in range(30)]
    made: list[str] = []
    first = bench_of(checkpoint, tmp_path, FakeEngineClient(delay_s=0.02))

    async def begin(client: openai.AsyncOpenAI) -> None:
        made.append(await submit(client, *lines))
        while True:
            batch = await client.batches.retrieve(made[0])
            assert batch.request_counts is not None
            if batch.request_counts.completed >= 8:
                return
            await asyncio.sleep(0.01)

    run(first, begin)
    (data,) = [
        p for p in (tmp_path / "files").glob("*.data") if b"chat.completion" in p.read_bytes()
    ]
    done = {json.loads(one)["custom_id"] for one in data.read_bytes().splitlines()}
    assert 8 <= len(done) < 30
    with data.open("ab") as file:
        file.write(b'{"custom_id": "line-29", "respo')  # as a power cut leaves it

    second = bench_of(checkpoint, tmp_path)

    async def finish(client: openai.AsyncOpenAI) -> None:
        batch = await ended(client, made[0])
        assert batch.request_counts is not None
        assert (batch.status, batch.request_counts.completed) == ("completed", 30)
        out = await results(client, batch.output_file_id)
        assert sorted(one["custom_id"] for one in out) == sorted(one["custom_id"] for one in lines)

    run(second, finish)
    assert len(second.engine.requests) == 30 - len(done)


def test_busy_lines_come_back(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("nitsum.server.batchwork._RETRY_S", 0.01)
    seen: list[str] = []

    def refuse(request: Request) -> Output | None:
        seen.append(request.request_id)
        if len(seen) > 4:
            return None
        return Output(
            request.request_id,
            error="no",
            error_status=429 if len(seen) % 2 else 503,
            retry_after_s=0.001,
        )

    async def body(client: openai.AsyncOpenAI) -> None:
        batch = await ended(client, await submit(client, line("a"), line("b")))
        assert batch.request_counts is not None
        assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 0)

    run(bench_of(checkpoint, tmp_path, FakeEngineClient(refuse=refuse)), body)
    assert len(seen) == 6


def test_cancelling_keeps_what_is_finished(checkpoint: Path, tmp_path: Path) -> None:
    bench = bench_of(checkpoint, tmp_path, FakeEngineClient(delay_s=0.02), batch_concurrency=2)

    async def body(client: openai.AsyncOpenAI) -> None:
        batch_id = await submit(client, *[line(f"{i}") for i in range(200)])
        while len(bench.engine.requests) < 6:
            await asyncio.sleep(0.01)
        assert (await client.batches.cancel(batch_id)).status == "cancelling"
        batch = await ended(client, batch_id)
        assert batch.status == "cancelled"
        assert batch.request_counts is not None
        out = await results(client, batch.output_file_id)
        assert 1 <= len(out) == batch.request_counts.completed < 200
        with pytest.raises(openai.ConflictError):
            await client.batches.cancel(batch_id)

    run(bench, body)
    assert len(bench.engine.aborted) <= 2


def test_what_has_no_time_left_expires(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nitsum.server.batches.WINDOW_S", 1)
    bench = bench_of(checkpoint, tmp_path, FakeEngineClient(delay_s=0.1), batch_concurrency=1)

    async def body(client: openai.AsyncOpenAI) -> None:
        batch = await ended(client, await submit(client, *[line(f"{i}") for i in range(40)]))
        assert batch.status == "expired"
        assert batch.request_counts is not None
        assert batch.request_counts.completed + batch.request_counts.failed == 40
        late = await results(client, batch.error_file_id)
        assert {one["error"]["code"] for one in late} == {"batch_expired"}
        finished = await results(client, batch.output_file_id)
        assert len({one["custom_id"] for one in [*late, *finished]}) == 40

    run(bench, body)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty_file"),
        (b"\n \n", "empty_file"),
        (b"not json\n", "invalid_json_line"),
        (b"\xff\xfe\n", "invalid_json_line"),
        (b'{"custom_id": "a"}\n', "invalid_json_line"),
        (jsonl(line("a"), line("a")), "duplicate_custom_id"),
        (jsonl(line("a", url="/v1/completions")), "mismatched_endpoint"),
        (jsonl({**line("a"), "method": "GET"}), "invalid_method"),
        (jsonl(line("a", stream=True)), "invalid_stream"),
    ],
)
def test_bad_files_fail_the_batch(
    checkpoint: Path, tmp_path: Path, content: bytes, code: str
) -> None:
    bench = bench_of(checkpoint, tmp_path)

    async def body(client: openai.AsyncOpenAI) -> None:
        made = await client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = await client.batches.create(
            input_file_id=made.id, endpoint=CHAT, completion_window="24h"
        )
        batch = await ended(client, batch.id)
        assert batch.status == "failed"
        assert batch.errors is not None
        assert batch.errors.data is not None
        assert batch.errors.data[0].code == code

    run(bench, body)
    assert bench.engine.requests == []


def test_too_many_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nitsum.server.batchlines.MAX_LINES", 3)
    path = tmp_path / "in"
    path.write_bytes(jsonl(*[line(str(i)) for i in range(4)]))
    (error,) = check_lines(path, CHAT)[1]
    assert error.code == "too_many_lines"


def test_refusals_by_name(checkpoint: Path, tmp_path: Path) -> None:
    bench = bench_of(checkpoint, tmp_path, max_file_bytes=2000)

    async def body(client: openai.AsyncOpenAI) -> None:
        file_id = await upload(client, line("a"))
        for fields, param in (
            ({"endpoint": "/v1/responses"}, "endpoint"),
            ({"completion_window": "1h"}, "completion_window"),
            ({"input_file_id": "file-none"}, "input_file_id"),
            ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires"),
        ):
            good: dict[str, Any] = {
                "input_file_id": file_id,
                "endpoint": CHAT,
                "completion_window": "24h",
            }
            with pytest.raises(openai.BadRequestError) as bad:
                await client.batches.create(**{**good, **fields})
            assert (bad.value.param or "").startswith(param)
        with pytest.raises(openai.BadRequestError) as bad:
            await client.files.create(file=b"x", purpose="fine-tune")
        assert bad.value.param == "purpose"
        with pytest.raises(openai.APIStatusError) as large:
            await client.files.create(file=b"x" * 4000, purpose="batch")
        assert large.value.status_code == 413
        with pytest.raises(openai.BadRequestError):
            await client.batches.list(after="batch_none")

    run(bench, body)
    assert len(list((tmp_path / "files").glob("*.data"))) == 1


def test_tenants_do_not_see_each_other(checkpoint: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    made = [Key(id=t, sha256=hash_token(t), tenant=t, rpm=20) for t in ("a", "b")]
    change_keys(keys, lambda _: made)
    bench = bench_of(checkpoint, tmp_path, keys=keys)

    async def body(client: openai.AsyncOpenAI) -> None:
        batch_id = await submit(client, *[line(str(i)) for i in range(40)])
        other = client.with_options(api_key="b")
        with pytest.raises(openai.NotFoundError):
            await other.batches.retrieve(batch_id)
        assert [f async for f in other.files.list()] == []
        batch = await ended(client, batch_id)
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 40, "a minute's requests are not its limit"
        with pytest.raises(openai.BadRequestError):
            await other.batches.create(
                input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"
            )

    run(bench, body, "a")
    assert {r.tenant for r in bench.engine.requests} == {"a"}


def test_lines_of_a_revoked_key_fail(checkpoint: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    change_keys(keys, lambda _: [Key(id="k", sha256=hash_token("a"))])
    slow = bench_of(checkpoint, tmp_path, FakeEngineClient(delay_s=5.0), keys=keys)
    made: list[str] = []

    async def begin(client: openai.AsyncOpenAI) -> None:
        made.append(await submit(client, line("one")))

    run(slow, begin, "a")
    both = [Key(id="k", sha256=hash_token("a"), revoked_s=1), Key(id="n", sha256=hash_token("n"))]
    change_keys(keys, lambda _: both)

    async def finish(client: openai.AsyncOpenAI) -> None:
        batch = await ended(client, made[0])
        (failed,) = await results(client, batch.error_file_id)
        assert failed["response"]["status_code"] == 401

    run(bench_of(checkpoint, tmp_path, keys=keys), finish, "n")


def test_one_server_owns_the_folder(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    owner = DataFolder(tmp_path)
    assert owner.open()
    bench = bench_of(checkpoint, tmp_path)

    async def body(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.InternalServerError) as refused:
            await client.files.list()
        assert "--data-dir" in refused.value.message

    run(bench, body)
    assert "another server" in caplog.text
    owner.close()


def test_without_a_folder_batches_say_what_to_do(bench: Bench) -> None:
    response = bench.get("/v1/batches")
    assert response.status_code == 503
    assert "--data-dir" in error_of(response)["message"]


def test_a_drain_ends_with_lines_to_go(checkpoint: Path, tmp_path: Path) -> None:
    bench = bench_of(checkpoint, tmp_path, FakeEngineClient(delay_s=0.02), batch_concurrency=1)

    async def body(client: openai.AsyncOpenAI) -> None:
        await submit(client, *[line(str(i)) for i in range(500)])
        while not bench.engine.requests:
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(10):
            while not bench.engine.num_closed:
                await asyncio.sleep(0.01)

    run(bench, body)
    assert len(bench.engine.requests) < 50


def test_ends_that_were_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "data"
    assert read_whole_lines(path) == []
    path.write_bytes(b"a\nb\nc")
    assert read_whole_lines(path) == [b"a", b"b"]
    assert path.read_bytes() == b"a\nb\n"


def test_uploads_that_are_no_uploads(checkpoint: Path, tmp_path: Path) -> None:
    bench = bench_of(checkpoint, tmp_path)

    async def main() -> None:
        async with served(bench) as url, httpx.AsyncClient(base_url=url) as http:
            assert (await http.post("/v1/files", json={})).status_code == 415
            fields = {"purpose": "batch", "file": "text"}
            kind = {"content-type": "multipart/form-data; boundary=x"}
            broken = await http.post("/v1/files", content=b"--x\r\nnonsense", headers=kind)
            assert broken.status_code == 400
            plain = await http.post("/v1/files", data=fields, files={"other": b""})
            assert error_of(plain)["param"] == "file"

    asyncio.run(main())
