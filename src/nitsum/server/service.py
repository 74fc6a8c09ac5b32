"""What all routes share: one object, made once, passed as `request.app.state.service`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ParamSpec, TypeVar, cast

from starlette.requests import Request as HttpRequest

from nitsum.engine.client import EngineClient
from nitsum.errors import ApiError
from nitsum.server.books import Books
from nitsum.server.caller import Caller, Entrance, now_s, read_caller
from nitsum.server.fields import Limits, check_token, too_long
from nitsum.server.keyfile import Key
from nitsum.server.keys import KeyRing
from nitsum.server.metrics import Metrics
from nitsum.server.schema import CallerBody
from nitsum.server.settings import ServerSettings
from nitsum.server.tokenizer import TextCodec
from nitsum.tier import TierSet

if TYPE_CHECKING:
    from nitsum.server.batchwork import BatchWork

Params = ParamSpec("Params")
ResultT = TypeVar("ResultT")

# Longer texts are tokenized in a thread: about a millisecond of work for the event loop.
MAX_INLINE_CHARS = 4096


@dataclass
class Service:
    """The server's parts. `draining` is the only thing that changes."""

    engine: EngineClient
    settings: ServerSettings
    codec: TextCodec
    tiers: TierSet
    limits: Limits
    metrics: Metrics
    books: Books
    keys: KeyRing | None
    created_s: int
    draining: bool = field(default=False)
    batch_work: BatchWork | None = None
    """Files and batches, while the server runs and has a folder for them."""

    @property
    def work(self) -> BatchWork:
        """Files and batches; raises a 503 where this server has no folder of its own."""
        if self.batch_work is None:
            raise ApiError(
                "This server keeps no files or batches: it has no data folder to itself. Start it "
                "with --data-dir DIR.",
                status=503,
                type="server_error",
                code="no_data_folder",
            )
        return self.batch_work

    @property
    def model_name(self) -> str:
        return self.settings.model_names[0]

    def check_model(self, name: str | None) -> None:
        """Raise a 404 for a model that is not served; no name means the only one."""
        if name is not None and name not in self.settings.model_names:
            raise ApiError(
                f"The model {name!r} does not exist. This server has {self.model_name!r}.",
                status=404,
                param="model",
                code="model_not_found",
            )

    def check_accepting(self) -> None:
        """Raise a 503 while draining."""
        if self.draining:
            raise ApiError(
                "This server is shutting down. Send the request to another one.",
                status=503,
                type="server_error",
                code="server_is_overloaded",
                retry_after_s=5.0,
            )

    def caller(self, request: HttpRequest, body: CallerBody, auto: str | None = None) -> Caller:
        """Who asks. The clock started when the request's head arrived.

        `auto` is the tier that `service_tier: auto` means, if it is not the server's default.
        """
        scope = request.scope
        entrance = Entrance(
            request_id=cast(str, scope.get("nitsum.request_id", "")),
            arrival_s=cast(float, scope.get("nitsum.arrival_s") or now_s()),
            endpoint=request.url.path,
            key=key_of(request),
            batch_id=cast("str | None", scope.get("nitsum.batch_id")),
        )
        auto = auto or self.settings.default_tier
        return read_caller(request.headers, body, self.tiers, auto, entrance)

    async def encode(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        """Token ids of a text, off the event loop when it is long."""
        self._check_chars(text, param)
        return await inline_or_thread(
            len(text), self.codec.encode, text, add_special_tokens=add_special_tokens, param=param
        )

    def _check_chars(self, text: str, param: str) -> None:
        """Refuse what cannot fit without tokenizing it."""
        longest = self.codec.max_token_chars
        if longest is not None and len(text) > longest * self.limits.max_model_len:
            raise too_long(f"The prompt has {len(text)} characters", self.limits, param)

    def check_prompt(self, tokens: list[int], param: str) -> list[int]:
        """The prompt, or the begin token for an empty one; raises a 400 for bad ids."""
        if tokens:
            for token in (min(tokens), max(tokens)):
                check_token(token, self.limits.vocab_size, param)
            return tokens
        bos = self.settings.bos_token_id if self.codec.bos_id is None else self.codec.bos_id
        if bos is None:
            raise ApiError(
                "The prompt is empty and this model has no begin token. Give it some text.",
                param=param,
            )
        return [bos]


def key_of(request: HttpRequest) -> Key | None:
    """The key the caller came with; None where the server has no key file."""
    return cast("Key | None", request.scope.get("nitsum.key"))


def tenant_of(request: HttpRequest) -> str:
    """The tenant whose files, batches and usage the caller may see."""
    key = key_of(request)
    return "" if key is None else key.tenant


def service_of(request: HttpRequest) -> Service:
    return cast(Service, request.app.state.service)


async def inline_or_thread(
    num_chars: int,
    work: Callable[Params, ResultT],
    *args: Params.args,
    **kwargs: Params.kwargs,
) -> ResultT:
    """Do `work` here when its input is short, else in a thread."""
    if num_chars <= MAX_INLINE_CHARS:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)


async def read_body(request: HttpRequest) -> bytes:
    """The request's body; raises a 413 as soon as it is too large."""
    limit = service_of(request).settings.max_body_bytes
    received = bytearray()
    async for part in request.stream():
        received += part
        if len(received) > limit:
            raise ApiError(f"The body is larger than {limit} bytes. Send less.", status=413)
    return bytes(received)
