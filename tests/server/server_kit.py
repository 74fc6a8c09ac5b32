"""What the server's tests share: a small checkpoint, an app over the fake engine, calls to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from nitsum.engine.fake_client import FakeEngineClient, Script
from nitsum.request import Request
from nitsum.server.app import build_app
from nitsum.server.run import serve_async
from nitsum.server.settings import ServerSettings

MODEL = "tiny"
MAX_MODEL_LEN = 1024
CORPUS = ["the quick brown fox jumps over the lazy dog", "Hello world, hello there! STOP now."] * 4

TEMPLATE = """
{%- if tools %}{{ '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'refuse-me' %}{{ raise_exception('no') }}{% endif %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


def make_checkpoint(
    folder: Path, *, tokenizer: bool = True, template: str | None = TEMPLATE, bos: bool = True
) -> Path:
    """A folder with what the server reads; there are no weights in it."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        made = byte_level_bpe()
        made.save(str(folder / "tokenizer.json"))
        config = {"eos_token": "<|im_end|>", "unk_token": None}
        if bos:
            config["bos_token"] = {"content": "<|bos|>", "lstrip": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def byte_level_bpe() -> Tokenizer:
    """Bytes, some merges learned from a few words, and special tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|bos|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens([AddedToken("<tool_call>", special=False)])
    return made


def settings_of(checkpoint: Path, **changes: Any) -> ServerSettings:
    settings = ServerSettings(
        checkpoint=checkpoint,
        model_names=(MODEL, "alias"),
        max_model_len=MAX_MODEL_LEN,
        vocab_size=512,
        port=0,
    )
    return replace(settings, **changes)


class Bench:
    """An app over a fake engine, called in process."""

    def __init__(
        self, checkpoint: Path, engine: FakeEngineClient | None = None, **changes: Any
    ) -> None:
        self.engine = engine or FakeEngineClient()
        self.app = build_app(self.engine, settings_of(checkpoint, **changes))
        self.codec = self.app.state.service.codec

    def says(self, text: str, *, end: bool = True) -> Bench:
        """From now on the engine draws the tokens of `text` (and the end token)."""
        self.engine.script = self.script(text, end=end)
        return self

    def script(self, text: str, *, end: bool = True) -> Script:
        tokens = self.ids(text) + ([self.codec.eos_id] if end else [])
        return lambda request: tokens

    def ids(self, text: str) -> list[int]:
        return self.codec.encode(text, add_special_tokens=False, param="")

    @property
    def sent(self) -> Request:
        """The request the engine got; there must be one."""
        (request,) = self.engine.requests
        return request

    async def acall(
        self, method: str, path: str, body: object = None, client: str = "127.0.0.1", **kwargs: Any
    ) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=True, client=(client, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.request(method, path, json=body, **kwargs)

    def call(self, method: str, path: str, body: object = None, **kwargs: Any) -> httpx.Response:
        return asyncio.run(self.acall(method, path, body, **kwargs))

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return self.call("GET", path, **kwargs)

    def post(self, path: str, body: object, **kwargs: Any) -> httpx.Response:
        return self.call("POST", path, body, **kwargs)

    def chat(self, text: str = "hi", **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}
        return self.post("/v1/chat/completions", body)

    def complete(self, prompt: object = "hi", **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"model": MODEL, "prompt": prompt, **fields})


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """Chunks of a stream that ended as it should."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def joined_text(chunks: Sequence[dict[str, Any]], index: int = 0) -> str:
    """Text of one choice of a chat or completion stream."""
    text = ""
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] == index:
                text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
    return text


@asynccontextmanager
async def served(bench: Bench) -> AsyncIterator[str]:
    """The same app's parts behind uvicorn on a free port; yields the URL."""
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    settings = bench.app.state.service.settings
    task = asyncio.create_task(serve_async(settings, bench.engine, on_ready=url.set_result))
    try:
        yield await asyncio.wait_for(url, 10)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
