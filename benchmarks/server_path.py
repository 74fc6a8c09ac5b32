"""What a token costs the server's own code, from the engine's frame to the transport's `write`.

    python -m benchmarks.server_path [--model FOLDER] [--streams 48] [--tokens 200]

One process without sockets, so that it can be measured on a busy machine too: the application
behind uvicorn's protocol, an engine client that is handed frames, a transport that counts writes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import uvicorn
from uvicorn.server import ServerState

from nitsum.engine.client import ZmqEngineClient
from nitsum.messages import FromEngine, Output, ToEngine, Tokens, encode, from_engine_decoder
from nitsum.server.app import build_app
from nitsum.server.run import loop_factory
from nitsum.server.settings import ServerSettings

MODEL = Path.home() / ".cache/nitsum/smollm2-135m-instruct"


class Client(ZmqEngineClient):
    """Takes requests and forgets them; frames come from the script."""

    def _post(self, message: ToEngine) -> bool:
        return True

    def hand(self, message: FromEngine) -> None:
        self._deliver(from_engine_decoder.decode(encode(message)))

    @property
    def request_ids(self) -> list[str]:
        return list(self._inboxes)


class Transport(asyncio.Transport):
    num_writes = 0

    def write(self, data: object) -> None:
        Transport.num_writes += 1

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--streams", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    logging.disable(logging.INFO)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        figures = runner.run(measure(args.model, args.streams, args.tokens))
    for name, value in figures.items():
        print(f"{name:45}{value:12.1f}")


async def measure(model: Path, num_streams: int, num_tokens: int) -> dict[str, float]:
    client = Client("ipc:///nowhere")
    settings = ServerSettings(
        checkpoint=model, model_names=("none",), max_model_len=2048, vocab_size=30_000
    )
    config = uvicorn.Config(build_app(client, settings), log_config=None, access_log=False)
    config.load()
    start_s = time.process_time()
    await begin(config, client, num_streams, num_tokens)
    ids = client.request_ids
    begun_s = time.process_time()
    before = Transport.num_writes
    for step in range(num_tokens - 2):
        client.hand(Tokens(ids, [1000 + (step + 7 * i) % 4000 for i in range(num_streams)]))
        await turns(6)
    ended_s = time.process_time()
    num_sent = num_streams * (num_tokens - 2)
    assert Transport.num_writes - before == num_sent, "every token is one write"
    await end(client)
    return {
        "server_python_per_token_us": 1e6 * (ended_s - begun_s) / num_sent,
        "server_python_begin_per_request_us": 1e6 * (begun_s - start_s) / num_streams,
    }


async def begin(config: uvicorn.Config, client: Client, num_streams: int, num_tokens: int) -> None:
    """Every request is here, and has its first token."""
    state = ServerState()
    make = cast(Callable[..., asyncio.Protocol], config.http_protocol_class)
    for _ in range(num_streams):
        protocol = make(config=config, server_state=state, app_state={})
        protocol.connection_made(Transport())
        protocol.data_received(request(num_tokens))
    while len(client.request_ids) < num_streams:
        await asyncio.sleep(0)
    for request_id in client.request_ids:
        client.hand(Output(request_id, [1000], plan="TP1", lane="TP1@0", queue_s=0.01))
    await turns(20)


async def end(client: Client) -> None:
    """Every answer has its last token, and who sent it is done: the loop has nobody to cancel."""
    for request_id in client.request_ids:
        client.hand(Output(request_id, [1000], "length", plan="TP1", lane="TP1@0", queue_s=0.01))
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others)


def request(num_tokens: int) -> bytes:
    options = {"include_usage": True, "continuous_usage_stats": True}
    fields = {"stream": True, "stream_options": options, "temperature": 0, "ignore_eos": True}
    body = json.dumps({"prompt": list(range(100, 1255)), "max_tokens": num_tokens, **fields})
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    return (head + body).encode()


async def turns(count: int) -> None:
    """Let the event loop go round."""
    for _ in range(count):
        await asyncio.sleep(0)


if __name__ == "__main__":
    main()
