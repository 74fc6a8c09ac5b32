"""Bodies of requests: types, and what is refused by name.

Unknown fields are tolerated; fields of OpenAI's API (and well-known ones of other servers) that are
not implemented are refused, never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from nitsum.errors import ApiError, bad_request

StructT = TypeVar("StructT", bound=msgspec.Struct)


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class CallerBody(msgspec.Struct, kw_only=True):
    """Fields that say who asks and how urgently; None is "not given" everywhere."""

    model: str | None = None
    user: str | None = None
    """Names who shares fairly with others, unless a header does."""
    safety_identifier: str | None = None
    """OpenAI's new name for `user`."""
    metadata: dict[str, str] | None = None
    """`chain_id` names an agent's chain; other keys mean nothing to the server."""
    service_tier: str | None = None
    priority: int | None = None


class EmbeddingBody(CallerBody, kw_only=True):
    input: str | list[str | int | list[int]]
    encoding_format: str | None = None


class CommonBody(CallerBody, kw_only=True):
    """Fields of both completion endpoints."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    """OpenAI's new name for `max_tokens`, in chats; taken everywhere."""
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    """Adds `token_ids` to each choice."""
    prompt_cache_key: str | None = None
    """A hint where a prefix may be cached; prefixes are found by content, with or without it."""


class CompletionBody(CommonBody, kw_only=True):
    prompt: str | list[str | int | list[int]] | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None


class ContentPart(msgspec.Struct):
    type: str
    text: str | None = None


class FunctionCallInput(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any]


class ToolCallInput(msgspec.Struct):
    function: FunctionCallInput
    id: str | None = None
    type: str = "function"


class Message(msgspec.Struct, kw_only=True):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCallInput] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    audio: Any = None
    function_call: Any = None


class FunctionTool(msgspec.Struct):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    type: str
    function: FunctionTool | None = None


class JsonSchemaFormat(msgspec.Struct):
    schema: dict[str, Any] | bool | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    """Schemas are kept to in any case."""


class ResponseFormat(msgspec.Struct):
    type: str
    json_schema: JsonSchemaFormat | None = None


class ChatBody(CommonBody, kw_only=True):
    messages: list[Message]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeBody(msgspec.Struct, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    tokens: list[int]
    model: str | None = None


class SwitchBody(msgspec.Struct, kw_only=True):
    plan: str
    op_id: str | None = None


# --- refused by name ----------------------------------------------------------------------------

# Field -> values besides null that ask for nothing, so that they can be accepted.
_COMMON_REFUSED: Mapping[str, tuple[object, ...]] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "detokenize": (True,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": ({},),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "moderation": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
_TEMPLATE_REFUSED: Mapping[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
}
# Of conversations; by mistake they also reach text completions.
_CHAT_FIELDS_REFUSED: Mapping[str, tuple[object, ...]] = {
    **_TEMPLATE_REFUSED,
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
CHAT_REFUSED: Mapping[str, tuple[object, ...]] = {
    **_COMMON_REFUSED,
    **_CHAT_FIELDS_REFUSED,
    "add_special_tokens": (False,),
    "best_of": (1,),
    "echo": (False,),
    "prompt": (),
    "suffix": ("",),
}
COMPLETION_REFUSED: Mapping[str, tuple[object, ...]] = {
    **_COMMON_REFUSED,
    **_CHAT_FIELDS_REFUSED,
    "add_special_tokens": (True,),
    "chat_template_kwargs": ({},),
    "messages": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (),
}
TOKENIZE_REFUSED: Mapping[str, tuple[object, ...]] = {
    **_TEMPLATE_REFUSED,
    "chat_template_kwargs": ({},),
    "tools": ([],),
}
EMBEDDING_REFUSED: Mapping[str, tuple[object, ...]] = {
    "add_special_tokens": (True,),
    "continue_final_message": (False,),
    "dimensions": (),
    "embed_dtype": ("float32",),
    "messages": (),
    "normalize": (True,),
    "truncate_prompt_tokens": (),
    "use_activation": (True,),
}
NOTHING_REFUSED: Mapping[str, tuple[object, ...]] = {}


def parse_body(
    body: bytes,
    kind: type[StructT],
    refused: Mapping[str, tuple[object, ...]] = NOTHING_REFUSED,
) -> StructT:
    """The typed body; raises `ApiError` (400) that names the field."""
    raw = _parse_json(body)
    for name, harmless in refused.items():
        value = raw.get(name)
        if value is not None and value not in harmless:
            raise bad_request(
                f"{name!r} is not supported by this server. Leave it out.",
                name,
                "unsupported_parameter",
            )
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise _type_error(str(error)) from None


def _parse_json(body: bytes) -> dict[str, Any]:
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(f"The body cannot be read as JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise ApiError("The body must be a JSON object.")
    return raw


_AT = re.compile(r"^(?P<what>.*?)(?: - at `\$(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"missing required field `(\w+)`")


def _type_error(message: str) -> ApiError:
    """OpenAI's error for one of msgspec, whose messages end in ``- at `$.stop[1]` ``."""
    match = _AT.match(message)
    assert match is not None
    path = (match["path"] or "").replace("[...]", "").lstrip(".")
    missing = _MISSING.search(match["what"])
    if missing is not None:
        param = f"{path}.{missing[1]}".lstrip(".")
        return bad_request(
            f"Missing required field {param!r}.", param, "missing_required_parameter"
        )
    what = match["what"].replace("`", "")
    return bad_request(f"Invalid type for {path!r}: {what}.", path, "invalid_type")
