"""From checked fields of a body to sampling parameters."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from nitsum.errors import ApiError, bad_request
from nitsum.request import SamplingParams
from nitsum.server.schema import ChatBody, CommonBody, CompletionBody

MAX_STOPS = 16
MAX_STOP_CHARS = 1000
MAX_LOGPROBS = 20
MAX_STOP_TOKENS = 48
MAX_BIASES = 512
"""Workers keep both in a table of fixed width on the device; the model's own end tokens add to the
stop tokens there."""
_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1
_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, bits well spread: seeds of copies share no pattern


@dataclass(frozen=True)
class Limits:
    """What the model allows."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


def check_range(
    value: float | None, param: str, low: float, high: float, *, above: bool = False
) -> None:
    """Raise a 400 unless `value` lies in low..high (with `above`, over `low`); None passes."""
    if value is None:
        return
    if not low <= value <= high or (above and value == low):
        least = f"above {low:g}" if above else f"at least {low:g}"
        raise bad_request(
            f"{param} must be {least} and at most {high:g}, not {_shown(value)}.",
            param,
            "invalid_value",
        )


def _shown(value: float) -> str:
    """JSON's whole numbers know no bounds; what no float can hold is not repeated."""
    try:
        return f"{value:g}"
    except OverflowError:
        return "a number this long"


def check_common(body: CommonBody, limits: Limits) -> None:
    """Ranges of all fields that need no prompt to be checked."""
    check_range(body.n, "n", 1, 128)
    check_range(body.temperature, "temperature", 0, 2)
    check_range(body.top_p, "top_p", 0, 1, above=True)
    check_range(body.top_k, "top_k", -1, _INT32_MAX)
    check_range(body.min_p, "min_p", 0, 1)
    check_range(body.presence_penalty, "presence_penalty", -2, 2)
    check_range(body.frequency_penalty, "frequency_penalty", -2, 2)
    check_range(body.repetition_penalty, "repetition_penalty", 0, 100, above=True)
    check_range(body.max_tokens, "max_tokens", 1, _INT32_MAX)
    check_range(body.min_tokens, "min_tokens", 0, _INT32_MAX)
    check_range(body.seed, "seed", -_INT64_MAX - 1, _INT64_MAX)
    check_range(body.priority, "priority", -_INT32_MAX, _INT32_MAX)
    if len(body.stop_token_ids or ()) > MAX_STOP_TOKENS:
        raise bad_request(f"Give {MAX_STOP_TOKENS} stop_token_ids at most.", "stop_token_ids")
    for token in body.stop_token_ids or ():
        check_token(token, limits.vocab_size, "stop_token_ids")
    _check_stream_options(body)


def check_token(token: int, vocab_size: int, param: str) -> None:
    if not 0 <= token < vocab_size:
        raise bad_request(
            f"{param}: token {token} is outside the vocabulary (0 to {vocab_size - 1}).",
            param,
            "invalid_value",
        )


def _check_stream_options(body: CommonBody) -> None:
    options = body.stream_options
    if options is None:
        return
    if not body.stream:
        raise bad_request("stream_options needs stream: true.", "stream_options")
    if options.include_obfuscation:
        raise bad_request(
            "include_obfuscation is not supported by this server. Leave it out.",
            "stream_options.include_obfuscation",
            "unsupported_parameter",
        )


def stop_strings(body: CommonBody) -> tuple[str, ...]:
    """The body's `stop`, as a tuple of texts that are not empty."""
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(stops) > MAX_STOPS:
        raise bad_request(f"stop takes at most {MAX_STOPS} strings, not {len(stops)}.", "stop")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise bad_request(f"A stop string has 1 to {MAX_STOP_CHARS} characters.", "stop")
    return stops


_COMPLETION_TOKENS = 16
"""What OpenAI's API has as the default of text completions."""


def answer_length(body: ChatBody | CompletionBody, room: int, limits: Limits) -> int:
    """Tokens the answer may have; raises a 400 when the caller wants more than fit."""
    asked = _asked_max_tokens(body)
    if asked is None:
        return min(room, _COMPLETION_TOKENS) if isinstance(body, CompletionBody) else room
    if asked > room:
        param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        raise bad_request(
            f"{param} is {asked}, but the prompt leaves {room} of the {limits.max_model_len} "
            f"tokens of this model's context. Ask for less, or leave {param} out.",
            param,
            "context_length_exceeded",
        )
    return asked


def _asked_max_tokens(body: CommonBody) -> int | None:
    """The longest answer the caller wants, None where it leaves that open."""
    check_range(body.max_completion_tokens, "max_completion_tokens", 1, _INT32_MAX)
    if body.max_completion_tokens is None:
        return body.max_tokens
    if body.max_tokens not in (None, body.max_completion_tokens):
        raise bad_request(
            "max_tokens and max_completion_tokens differ. Give only one.", "max_completion_tokens"
        )
    return body.max_completion_tokens


def room_for_answer(num_prompt: int, limits: Limits, param: str) -> int:
    """Tokens that fit behind the prompt; raises a 400 when there is no room for one."""
    room = limits.max_model_len - num_prompt
    if room < 1:
        raise too_long(f"The prompt has {num_prompt} tokens", limits, param)
    return room


def too_long(what: str, limits: Limits, param: str) -> ApiError:
    return bad_request(
        f"{what}; the context of this model is {limits.max_model_len} tokens, answer included. "
        "Shorten it.",
        param,
        "context_length_exceeded",
    )


def num_logprobs(body: ChatBody | CompletionBody) -> int | None:
    """Alternatives to report beside the drawn token; None for no report at all."""
    if isinstance(body, CompletionBody):
        check_range(body.logprobs, "logprobs", 0, MAX_LOGPROBS)
        return body.logprobs
    check_range(body.top_logprobs, "top_logprobs", 0, MAX_LOGPROBS)
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise bad_request("top_logprobs needs logprobs: true.", "top_logprobs")
    return None


def sampling_params(body: ChatBody | CompletionBody, room: int, limits: Limits) -> SamplingParams:
    """For an answer with room for `room` tokens; `check_common` has passed."""
    max_tokens = answer_length(body, room, limits)
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise bad_request(
            f"min_tokens ({min_tokens}) is above the {max_tokens} tokens the answer may have.",
            "min_tokens",
        )
    eos = () if body.ignore_eos else limits.eos_token_ids
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_or(body.temperature, 1.0),
        top_k=max(0, body.top_k or 0),
        top_p=_or(body.top_p, 1.0),
        min_p=_or(body.min_p, 0.0),
        seed=secrets.randbits(63) if body.seed is None else body.seed & _INT64_MAX,
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=_logit_bias(body, limits.vocab_size),
        logprobs=num_logprobs(body),
        stop_token_ids=tuple(dict.fromkeys((*eos, *(body.stop_token_ids or ())))),
        min_tokens=min_tokens,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def copy_seed(seed: int, copy: int) -> int:
    """The seed of the copy-th answer to one prompt; the first keeps the caller's."""
    return (seed + copy * _SEED_STRIDE) & _INT64_MAX


def _logit_bias(body: CommonBody, vocab_size: int) -> dict[int, float]:
    if len(body.logit_bias or {}) > MAX_BIASES:
        raise bad_request(f"logit_bias may name {MAX_BIASES} tokens at most.", "logit_bias")
    found: dict[int, float] = {}
    for key, bias in (body.logit_bias or {}).items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise bad_request(f"logit_bias: {key!r} is not a token id.", "logit_bias")
        check_token(int(key), vocab_size, "logit_bias")
        check_range(bias, "logit_bias", -100, 100)
        found[int(key)] = bias
    return found
