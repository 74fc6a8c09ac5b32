"""Text to tokens and back, from a checkpoint's own files; or ids only where it has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer as HfTokenizer

from nitsum.errors import ApiError, CheckpointError, bad_request
from nitsum.server.detokenize import (
    ByteDetokenizer,
    Detokenizer,
    IdDetokenizer,
    WindowDetokenizer,
)
from nitsum.server.template import ChatTemplate, read_chat_template, read_json

_SPECIAL_TOKEN_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class TextCodec(Protocol):
    """What the routes need of a tokenizer. Methods may be called from several threads."""

    template: ChatTemplate | None
    bos_id: int | None
    eos_id: int | None
    max_token_chars: int | None
    """Characters one token can stand for at most, where that is known."""
    added_tokens: frozenset[str]
    """Texts that are one token each, however they are split elsewhere."""

    def encode(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        """Token ids; `param` is the field that an `ApiError` names."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text, special tokens included."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for; for a token outside the vocabulary nothing."""
        ...

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer: ...


def load_codec(folder: Path) -> TextCodec:
    """The tokenizer of a checkpoint folder; `NoTokenizer` when it has none.

    Raises `CheckpointError` when its files cannot be read.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        return TokenizerCodec(folder)
    if any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json")):
        raise CheckpointError(
            f"{folder} has a tokenizer but no tokenizer.json. Write one with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    return NoTokenizer()


class TokenizerCodec:
    """A `tokenizer.json`, with special tokens and chat template of its neighbours."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = _read_tokenizer(folder / "tokenizer.json")
        special_tokens = _special_tokens(read_json(folder / "tokenizer_config.json"))
        self.template = read_chat_template(folder, special_tokens)
        self.bos_id = self._id_of(special_tokens.get("bos_token"))
        self.eos_id = self._id_of(special_tokens.get("eos_token"))
        added = self._tokenizer.get_added_tokens_decoder()
        self.added_tokens = frozenset(token.content for token in added.values())
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        parts = _decoder_parts(read_json(folder / "tokenizer.json").get("decoder"))
        self._is_byte_level = "ByteLevel" in parts
        self._has_byte_fallback = "ByteFallback" in parts
        self.max_token_chars = self._longest_token() if self._is_byte_level else None
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str | None] = {}

    def encode(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError):  # what it raises for text that is not UTF-8
            raise bad_request(
                "The text holds half of a surrogate pair, which is not a character.", param
            ) from None

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._token_bytes(token)
        return known

    def _token_text(self, token: int) -> str | None:
        """The text of a token that is whole characters; None for any other."""
        if token in self._texts:
            return self._texts[token]
        try:
            text = self.token_bytes(token).decode()
        except UnicodeDecodeError:
            text = None
        self._texts[token] = text
        return text

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        inner = (
            ByteDetokenizer(self.token_bytes, self._token_text)
            if self._is_byte_level
            else WindowDetokenizer(self.decode)
        )
        return _SkipSpecial(inner, self._special_ids) if skip_special_tokens else inner

    def _longest_token(self) -> int:
        return max(map(len, self._tokenizer.get_vocab()))

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)

    def _token_bytes(self, token: int) -> bytes:
        text = self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if self._is_byte_level:
            return _byte_level_bytes(text)
        if self._has_byte_fallback and len(text) == 6 and text.startswith("<0x"):
            return bytes([int(text[3:5], 16)])
        # Before a letter, so that a decoder that strips a leading space leaves the token's own.
        anchored = self._tokenizer.token_to_id("a")
        if anchored is None:
            return self.decode([token]).encode()
        return self.decode([anchored, token])[len(self.decode([anchored])) :].encode()


class NoTokenizer:
    """Serves token ids: prompts are lists of ids, text is the ids in decimal."""

    template: ChatTemplate | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    max_token_chars: int | None = None
    added_tokens: frozenset[str] = frozenset()

    def encode(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        raise no_tokenizer(param)

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))

    def token_bytes(self, token: int) -> bytes:
        return str(token).encode()

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        return IdDetokenizer()


def no_tokenizer(param: str) -> ApiError:
    return bad_request(
        "This model's checkpoint has no tokenizer. Use /v1/completions with a prompt of token ids.",
        param,
    )


class _SkipSpecial:
    def __init__(self, inner: Detokenizer, special_ids: frozenset[int]) -> None:
        self._inner = inner
        self._special_ids = special_ids

    def add(self, token: int) -> str:
        return "" if token in self._special_ids else self._inner.add(token)

    def flush(self) -> str:
        return self._inner.flush()


def _read_tokenizer(file: Path) -> HfTokenizer:
    try:
        tokenizer = HfTokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Names to texts; an entry is a text or an object with `content`."""
    found: dict[str, str] = {}
    for key in _SPECIAL_TOKEN_KEYS:
        entry = config.get(key)
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str):
            found[key] = text
    return found


def _decoder_parts(decoder: Mapping[str, Any] | None) -> set[str]:
    """Names of the steps a `tokenizer.json` decodes with."""
    if decoder is None:
        return set()
    return {decoder["type"], *(part["type"] for part in decoder.get("decoders", ()))}


def _byte_level_alphabet() -> dict[str, int]:
    """The character byte-level vocabularies write for each byte (as GPT-2 began it).

    Printable bytes stand for themselves, the others for the characters from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return alphabet


_BYTE_OF = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    """Bytes of a token; one with any other character (an added token) stands for itself."""
    if all(char in _BYTE_OF for char in token):
        return bytes(_BYTE_OF[char] for char in token)
    return token.encode()
