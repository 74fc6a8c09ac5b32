"""Incremental text equals the whole decode; stop strings; templates."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from nitsum.errors import ApiError, CheckpointError
from nitsum.server.detokenize import StopFinder
from nitsum.server.template import ChatTemplate, read_chat_template
from nitsum.server.tokenizer import NoTokenizer, TextCodec, TokenizerCodec, load_codec
from tests.server.server_kit import byte_level_bpe, make_checkpoint

FAST = settings(max_examples=60)
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


def sentencepiece_like() -> Tokenizer:
    """Words with a marker for spaces, single bytes for everything else (as Llama 2 has it)."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in ("▁", "▁the", "▁fox", "fox", "a", "b", "é", "x", "▁a"):
        vocab[piece] = len(vocab)
    made = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return made


@pytest.fixture(scope="module")
def byte_codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    return load_codec(make_checkpoint(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def piece_codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    folder = tmp_path_factory.mktemp("pieces")
    sentencepiece_like().save(str(folder / "tokenizer.json"))
    return load_codec(folder)


def incremental(codec: TextCodec, tokens: list[int]) -> list[str]:
    detokenizer = codec.detokenizer(skip_special_tokens=False)
    return [*map(detokenizer.add, tokens), detokenizer.flush()]


@FAST
@given(text=TEXTS)
def test_incremental_equals_whole_for_any_text(byte_codec: TextCodec, text: str) -> None:
    tokens = byte_codec.encode(text, add_special_tokens=False, param="")
    assert "".join(incremental(byte_codec, tokens)) == text
    # Nothing is ever taken back or torn: every part is valid by itself.
    assert all(part == "" or part in text for part in incremental(byte_codec, tokens))


@FAST
@given(tokens=st.lists(st.integers(0, 399), max_size=60))
def test_incremental_equals_whole_for_any_tokens(byte_codec: TextCodec, tokens: list[int]) -> None:
    assert "".join(incremental(byte_codec, tokens)) == byte_codec.decode(tokens)


@FAST
@given(text=st.text(st.sampled_from("abé the fox🦊漢x ñ"), max_size=30))
def test_incremental_equals_whole_with_byte_fallback(piece_codec: TextCodec, text: str) -> None:
    tokens = piece_codec.encode("▁" + text.replace(" ", "▁"), add_special_tokens=False, param="")
    assert piece_codec.decode(tokens) == text
    parts = incremental(piece_codec, tokens)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


def test_text_comes_out_as_soon_as_it_is_whole(piece_codec: TextCodec) -> None:
    tokens = piece_codec.encode("a🦊b", add_special_tokens=False, param="")
    parts = incremental(piece_codec, tokens)
    assert parts == ["a", "", "", "", "🦊", "b", ""]


def test_bytes_that_are_no_text_do_not_hold_up_the_rest(piece_codec: TextCodec) -> None:
    tokens = [3 + 0xF0] * 50 + piece_codec.encode("a", add_special_tokens=False, param="")
    parts = incremental(piece_codec, tokens)
    assert "".join(parts).endswith("a")
    assert sum(part != "" for part in parts) > 5


def test_special_tokens_are_skipped_unless_wanted(byte_codec: TextCodec) -> None:
    tokens = byte_codec.encode("<|im_start|>hi<|im_end|>", add_special_tokens=False, param="")
    skipping = byte_codec.detokenizer()
    assert "".join(map(skipping.add, tokens)) == "hi"
    assert "".join(incremental(byte_codec, tokens)) == "<|im_start|>hi<|im_end|>"


def test_token_bytes(byte_codec: TextCodec, piece_codec: TextCodec) -> None:
    for codec in (byte_codec, piece_codec):
        tokens = codec.encode("a🦊", add_special_tokens=False, param="")
        assert b"".join(map(codec.token_bytes, tokens)).decode() == "a🦊"
        assert codec.token_bytes(9999) == b""
    the = piece_codec.encode("▁the", add_special_tokens=False, param="")
    assert b"".join(map(piece_codec.token_bytes, the)) == b" the"


def test_half_a_surrogate_pair_is_named(byte_codec: TextCodec) -> None:
    with pytest.raises(ApiError) as caught:
        byte_codec.encode("\ud800", add_special_tokens=False, param="prompt")
    assert caught.value.param == "prompt"


def test_checkpoints_with_and_without_tokenizer(tmp_path: Path) -> None:
    assert isinstance(load_codec(tmp_path), NoTokenizer)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="save_pretrained"):
        load_codec(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_codec(tmp_path)
    byte_level_bpe().save(str(tmp_path / "tokenizer.json"))
    assert isinstance(load_codec(tmp_path), TokenizerCodec)


# --- stop strings -------------------------------------------------------------------------------

STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=300)
@given(stops=STOPS, parts=st.lists(st.text("abc", max_size=3), max_size=12))
def test_stop_finder_against_a_plain_search(stops: list[str], parts: list[str]) -> None:
    """The first stop string to be complete ends the text; nothing before it is lost or late."""
    finder = StopFinder(stops)
    out, seen = "", ""
    for part in parts:
        seen += part
        out += finder.add(part)
        starts = [seen.find(stop) for stop in stops if stop in seen]
        assert finder.found == bool(starts)
        if starts:
            assert out == seen[: min(starts)]
            return
        held = seen[len(out) :]
        assert seen.startswith(out)
        assert held == "" or any(stop.startswith(held) for stop in stops)
    assert out + finder.flush() == seen


# --- templates ----------------------------------------------------------------------------------


def render(source: str, **variables: object) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>"})
    return template.render([{"role": "user", "content": "<&>é"}], None, variables)


def test_what_templates_may_use() -> None:
    assert render("{{ bos_token }}{{ messages | tojson }}") == (
        '<s>[{"role": "user", "content": "<&>é"}]'
    )
    assert render("{{ strftime_now('%Y') }}") == f"{datetime.now():%Y}"
    assert render("{% for m in messages %}{% break %}x{% endfor %}y") == "y"
    assert render("{% generation %}a{% endgeneration %}b") == "ab"
    assert render("  {% if true %}\n  a\n{% endif %}\nb") == "  a\nb"
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1) }}") == '{\n "b": 1,\n "a": 2\n}'
    assert render("{{ enable_thinking }}", enable_thinking=False) == "False"
    assert render("{{ add_generation_prompt }}{{ tools is none }}") == "TrueTrue"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[0].content + none }}",
        "{{ messages[5].content }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
    ],
)
def test_templates_that_fail_are_a_400(source: str) -> None:
    with pytest.raises(ApiError) as caught:
        render(source)
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_a_broken_template_is_found_at_start() -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        ChatTemplate("{% if %}", {})


def test_where_templates_are_read_from(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    assert read_chat_template(tmp_path, {}) is None
    config.write_text(json.dumps({"chat_template": "one"}))
    assert _read(tmp_path) == "one"
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": "two"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert _read(tmp_path) == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert _read(tmp_path) == "three"


def _read(folder: Path) -> str:
    template = read_chat_template(folder, {})
    assert template is not None
    return template.render([])
