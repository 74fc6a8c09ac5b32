"""Requests that no client should send: broken bodies, heads, paths, and connections."""

from __future__ import annotations

import asyncio
import json
import random
import struct
from collections.abc import Awaitable, Callable
from typing import Any

GET = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
ANSWER_S = 120.0
"""On a busy machine; a server that has not answered by then is stuck."""

LARGEST = 33 << 20
"""More than a server takes."""

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        **CHAT,
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 1,
        "stop": ["x"],
        "seed": 1,
        "logprobs": True,
        "top_logprobs": 2,
        "logit_bias": {"5": 1},
        "tools": [TOOL],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "service_tier": "auto",
        "metadata": {"chain_id": "c"},
        "stream": False,
        "user": "u",
    },
    "/v1/completions": {
        "prompt": "hi",
        "max_tokens": 2,
        "logprobs": 1,
        "echo": False,
        "min_p": 0.1,
        "top_k": 5,
        "presence_penalty": 0.5,
        "stop_token_ids": [3],
        "priority": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "/v1/embeddings": {
        "input": ["hi", "there"],
        "encoding_format": "base64",
        "user": "u",
        "service_tier": "batch",
        "metadata": {"chain_id": "c"},
    },
    "/tokenize": {"prompt": "hi", "add_special_tokens": True, "return_token_strs": True},
    "/detokenize": {"tokens": [1, 2, 3]},
    "/v1/batches": {"input_file_id": "file-1", "endpoint": "/v1/completions"},
    "/admin/plans/switch": {"plan": "nowhere"},
}
PATHS = tuple(BODIES)
STRANGE: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3.7,
        -0.0,
        1e308,
        -1e308,
        2**31,
        2**63,
        2**64,
        10**400,
        10**4000,
    ),
    *("", "x", "\0", "\ud800", "🦊" * 50, "a" * 5000, "../../etc/passwd", "NaN", "null"),
    *([], {}, [[]], [{}], [None], [1, "a"], [-1], [2**70], {"": None}, {"a": {"b": []}}),
    *([["x"]], {"role": "user"}, {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}),
)
JUNK = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"\r\n\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip\r\n\r\n",
    b"GET /\x00\xff HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 100_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"".join(b"h%d: 1\r\n" % i for i in range(3000)) + b"\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\n bad: folded\r\n\r\n",
    b"\xff\xfe\xfd" * 1000,
)
HEADERS = (
    *("authorization", "x-request-id", "x-llm-d-inference-objective", "x-slo-ttft-ms", "accept"),
    *("x-nitsum-chain-id", "x-nitsum-chain-deadline-ms", "traceparent", "content-type", "origin"),
    *("x-gateway-inference-fairness-id", "x-forwarded-for", "cookie", "expect", "range"),
)
VALUES = (
    *(
        b"",
        b"\xff\xfe",
        b"-1",
        b"nan",
        b"inf",
        b"1e999",
        b"Bearer ",
        b"Bearer \xf0\x9f",
        b"a" * 3000,
    ),
    *(
        b"100-continue",
        b"application/json",
        b"00-" + b"0" * 32 + b"-1-1",
        b"priority",
        b"\x01",
        b"5",
    ),
)


class Attacker:
    """Sends one malformed request at a time; knows what came back."""

    def __init__(self, host: str, port: int, seed: int) -> None:
        self.address = (host, port)
        self.draw = random.Random(seed)
        self.left_open: list[asyncio.StreamWriter] = []
        self.kinds: tuple[tuple[Callable[[], Awaitable[int | None]], int], ...] = (
            (self.mutated_body, 56),
            (self.broken_body, 14),
            (self.strange_headers, 10),
            (self.strange_path, 5),
            (self.junk, 6),
            (self.huge_prompt, 1),
            (self.broken_upload, 3),
            (self.slow, 2),
            (self.half_open, 2),
            (self.leaves_early, 1),
        )

    async def attack(self) -> tuple[str, int | None]:
        """One request of a kind drawn by weight; its kind and the status that came back, if any."""
        kinds, weights = zip(*self.kinds, strict=True)
        (kind,) = self.draw.choices(kinds, weights)
        try:
            return kind.__name__, await asyncio.wait_for(kind(), ANSWER_S)
        except OSError:
            return kind.__name__, None  # cut off, which is an answer too

    # -- kinds --

    async def mutated_body(self) -> int | None:
        path = self.draw.choice(PATHS)
        body = mutate(BODIES[path], self.draw)
        return await self.send(path, json.dumps(body).encode(errors="surrogatepass"))

    async def broken_body(self) -> int | None:
        path = self.draw.choice(PATHS)
        whole = json.dumps(BODIES[path]).encode()
        cut = self.draw.randrange(len(whole))
        noise = self.draw.randbytes(self.draw.randint(1, 40))
        return await self.send(
            path,
            self.draw.choice(
                (
                    whole[:cut],
                    whole[:cut] + noise + whole[cut:],
                    noise,
                    b"[" * 100_000,
                    b'{"a":' * 20_000,
                    b"\xef\xbb\xbf" + whole,
                    whole.decode().encode("utf-16"),
                    b'{"prompt": "\xff\xfe\xc3\x28"}',
                    b'{"prompt": "\\ud800"}',
                    b'{"prompt": ' + b"9" * 5000 + b"}",
                    b"",
                )
            ),
        )

    async def strange_headers(self) -> int | None:
        path = self.draw.choice(PATHS)
        names = self.draw.sample(HEADERS, 3)
        extra = [(name.encode(), self.draw.choice(VALUES)) for name in names]
        return await self.send(path, json.dumps(BODIES[path]).encode(), extra)

    async def strange_path(self) -> int | None:
        path = self.draw.choice(
            ("/v1/files/../..", "/v1/files/%00", "/v1/batches/%ff%fe", "/v1/models/" + "a" * 9000)
        )
        query = self.draw.choice(("", "?limit=x", "?limit=-1", "?after=%00", "?start_time=1e99"))
        method = self.draw.choice(("GET", "POST", "DELETE", "PUT", "BREW", "OPTIONS"))
        return await self.send(path + query, b"", method=method)

    async def junk(self) -> int | None:
        return await self.exchange(self.draw.choice(JUNK), then_close=True)

    async def huge_prompt(self) -> int | None:
        size = self.draw.choice((200_000, 1_000_000, 4_000_000))
        return await self.prompt_of(LARGEST if self.draw.random() < 0.05 else size)

    async def prompt_of(self, num_bytes: int) -> int | None:
        prompt: Any = "word " * (num_bytes // 5)
        if self.draw.random() < 0.3:
            prompt = [1] * (num_bytes // 4)
        return await self.send("/v1/completions", json.dumps({"prompt": prompt}).encode())

    async def fill(self) -> None:
        """The largest bodies, several at once: the allocator keeps some of it for good."""
        for size in (LARGEST, 4_000_000, 4_000_000):
            await asyncio.gather(*(self.prompt_of(size) for _ in range(4)), return_exceptions=True)

    async def broken_upload(self) -> int | None:
        part = b'--b\r\ncontent-disposition: form-data; name="file"; filename="\xff/../x"\r\n\r\n'
        body = self.draw.choice(
            (b"", part, part + b"not json\r\n--b--\r\n", part * 50, self.draw.randbytes(500))
        )
        kind = self.draw.choice((b"multipart/form-data; boundary=b", b"multipart/form-data", b"x"))
        return await self.send("/v1/files", body, [(b"content-type", kind)])

    async def slow(self) -> int | None:
        """A request that comes a few bytes at a time."""
        request = head("/v1/completions", 30, []) + b'{"prompt": "hi", "max_tokens":1'
        return await self.exchange(*(request[i : i + 12] for i in range(0, len(request), 12)))

    async def half_open(self) -> int | None:
        """A connection on which the rest never comes."""
        _, writer = await asyncio.open_connection(*self.address)
        request = head("/v1/completions", 30, []) + b'{"prompt":'
        writer.write(request[: self.draw.randrange(len(request))])
        self.left_open.append(writer)
        return None

    async def leaves_early(self) -> int | None:
        """A client that asks for a long stream, and resets the connection."""
        body = json.dumps({"prompt": "hi", "max_tokens": 500, "stream": True}).encode()
        reader, writer = await asyncio.open_connection(*self.address)
        writer.write(head("/v1/completions", len(body), []) + body)
        if self.draw.random() < 0.5:
            await reader.read(100)
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(1, 13, linger)  # SO_LINGER 0: RST
        writer.transport.abort()
        return None

    # -- sending --

    async def send(
        self,
        path: str,
        body: bytes,
        extra: list[tuple[bytes, bytes]] | None = None,
        *,
        method: str = "POST",
    ) -> int | None:
        return await self.exchange(head(path, len(body), extra or [], method) + body)

    async def exchange(self, *parts: bytes, then_close: bool = False) -> int | None:
        """Send parts with pauses between; the status of the answer, None where there is none."""
        reader, writer = await asyncio.open_connection(*self.address)
        try:
            for i, part in enumerate(parts):
                if i:
                    await asyncio.sleep(0.05)
                writer.write(part)
            if then_close:
                writer.write_eof()
            line = await reader.readline()
            while await reader.read(65536):
                pass
            return int(line.split()[1]) if line.startswith(b"HTTP/1.1 ") else None
        finally:
            writer.transport.abort()

    def close(self) -> None:
        for writer in self.left_open:
            writer.transport.abort()


def head(path: str, length: int, extra: list[tuple[bytes, bytes]], method: str = "POST") -> bytes:
    names = {name for name, _ in extra}
    lines = [f"{method} {path} HTTP/1.1".encode(), b"host: 127.0.0.1", b"connection: close"]
    lines += [b"content-length: %d" % length]
    if b"content-type" not in names:
        lines.append(b"content-type: application/json")
    return b"\r\n".join([*lines, *(name + b": " + value for name, value in extra)]) + b"\r\n\r\n"


def mutate(body: dict[str, Any], draw: random.Random) -> Any:
    """The body with up to three of its values, at any depth, made strange or left out."""
    mutated = json.loads(json.dumps(body))
    for _ in range(draw.randint(1, 3)):
        mutated = _mutate(mutated, draw)
    return mutated


def _mutate(value: Any, draw: random.Random) -> Any:
    if isinstance(value, dict) and value and draw.random() < 0.9:
        name = draw.choice(list(value))
        if draw.random() < 0.1:
            return {k: v for k, v in value.items() if k != name}
        return {**value, name: _mutate(value[name], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        i = draw.randrange(len(value))
        return [*value[:i], _mutate(value[i], draw), *value[i + 1 :]]
    return draw.choice(STRANGE)
