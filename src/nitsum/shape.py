"""What a model looks like, and how its tensors are padded and cut for every degree.

`ModelShape` is the checkpoint's own description. `Geometry` is that shape made divisible for the
degrees `min_tp..max_tp`: the padded sizes, what each degree's shard is, and the size of one unit
of KV cache. Everything here is integers; no tensor is touched.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nitsum.errors import CheckpointError, ConfigError
from nitsum.plan import is_power_of_two

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@dataclass(frozen=True)
class RopeScaling:
    """Rotary position parameters, named as in Hugging Face configs."""

    kind: str = "default"
    """`default`, `linear` or `llama3`."""
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder-only transformer, as its checkpoint describes it."""

    family: str
    num_layers: int
    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    rms_eps: float = 1e-6
    rope: RopeScaling = RopeScaling()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @property
    def q_per_kv(self) -> int:
        """Query heads that share one KV head (before padding)."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def num_params(self) -> int:
        """Number of weights, embedding counted once when tied; norms and biases left out."""
        d, h = self.head_dim, self.hidden_size
        attention = h * d * (2 * self.num_q_heads + 2 * self.num_kv_heads)
        layer = attention + 3 * h * self.intermediate_size
        vocab = self.vocab_size * h * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + vocab

    @classmethod
    def from_folder(cls, folder: Path) -> ModelShape:
        """Read `config.json`, and the eos ids of `generation_config.json`, of a checkpoint."""
        path = folder / "config.json"
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no config.json; give a Hugging Face folder or a GGUF file."
            )
        config = _parse(path)
        generation = folder / "generation_config.json"
        if generation.is_file():
            stops = _parse(generation).get("eos_token_id")
            if stops is not None:
                config["eos_token_id"] = stops
        try:
            return cls.from_hf(config)
        except KeyError as error:
            raise CheckpointError(f"{path} lacks {error}.") from error

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelShape:
        """From the parsed `config.json` of a Llama, Mistral, Qwen2 or Qwen3 checkpoint.

        Raises `CheckpointError` for anything this decoder would compute wrongly.
        """
        family = _family(config)
        _check_supported(config)
        heads = config["num_attention_heads"]
        attention_bias = bool(config.get("attention_bias", False))
        return cls(
            family=family,
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_q_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            max_positions=_max_positions(config),
            rms_eps=config.get("rms_norm_eps", 1e-6),
            rope=_rope(config),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias and family in ("llama", "qwen3"),
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            eos_token_ids=_token_ids(config.get("eos_token_id")),
            bos_token_id=config.get("bos_token_id"),
        )


def _parse(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error


def _family(config: dict[str, Any]) -> str:
    names: list[str] = config.get("architectures") or []
    for name in names:
        if name in _ARCHITECTURES:
            return _ARCHITECTURES[name]
    known = ", ".join(sorted(_ARCHITECTURES))
    raise CheckpointError(
        f"Architecture {names or 'missing'} is not supported. Supported: {known}."
    )


def _check_supported(config: dict[str, Any]) -> None:
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"Activation {activation!r} is not supported (silu is).")
    if config.get("quantization_config"):
        raise CheckpointError(
            "Quantized checkpoints are not supported. Use the unquantized one, or a GGUF file."
        )


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _max_positions(config: dict[str, Any]) -> int:
    """Context length; inside the sliding window, attention is full attention."""
    positions = config["max_position_embeddings"]
    uses_window = config.get("use_sliding_window", True)
    window = config.get("sliding_window") if uses_window else None
    return min(positions, window) if window else positions


def _rope(config: dict[str, Any]) -> RopeScaling:
    params = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = params.get("rope_type") or params.get("type") or "default"
    theta = params.get("rope_theta", config.get("rope_theta", 10000.0))
    if kind == "default":
        return RopeScaling(theta=theta)
    if kind == "linear":
        return RopeScaling("linear", theta, params["factor"])
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            theta,
            params["factor"],
            params["low_freq_factor"],
            params["high_freq_factor"],
            params["original_max_position_embeddings"],
        )
    raise CheckpointError(f"Rope scaling {kind!r} is not supported (default, linear, llama3 are).")


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def next_power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


@dataclass(frozen=True)
class Geometry:
    """A model's padded sizes and its cuts for all degrees `min_tp..max_tp` (T).

    Padding is zeros and changes no result: KV groups to a multiple of T (T <= KV heads) or to a
    power of two (T > KV heads), query heads of a group to a multiple of T / KV heads, MLP width to
    a multiple of 64 T, vocabulary to a multiple of T.
    """

    shape: ModelShape
    max_tp: int
    min_tp: int = 1

    def __post_init__(self) -> None:
        for name in ("max_tp", "min_tp"):
            if not is_power_of_two(getattr(self, name)):
                raise ConfigError(f"{name} must be a power of two, not {getattr(self, name)}.")
        if self.min_tp > self.max_tp:
            raise ConfigError(f"min_tp {self.min_tp} is above the widest degree {self.max_tp}.")

    # -- padded sizes --

    @property
    def num_kv_heads(self) -> int:
        """H: KV heads after padding."""
        heads = self.shape.num_kv_heads
        if self.max_tp <= heads:
            return round_up(heads, self.max_tp)
        return next_power_of_two(heads)

    @property
    def q_per_kv(self) -> int:
        """Query heads of a KV group after padding."""
        return round_up(self.shape.q_per_kv, max(1, self.max_tp // self.num_kv_heads))

    @property
    def intermediate_size(self) -> int:
        return round_up(self.shape.intermediate_size, 64 * self.max_tp)

    @property
    def vocab_size(self) -> int:
        return round_up(self.shape.vocab_size, self.max_tp)

    @property
    def splits_kv(self) -> bool:
        """T > H: k and v rows are a tensor of their own, so low degrees compute them once."""
        return self.max_tp > self.num_kv_heads

    # -- units of KV --

    @property
    def num_units(self) -> int:
        """U: units a block of tokens is cut into over its heads."""
        return min(self.max_tp, self.num_kv_heads)

    @property
    def heads_per_unit(self) -> int:
        return self.num_kv_heads // self.num_units

    def units_per_page(self, degree: int) -> int:
        """Units of one page, i.e. of one block on one rank, at `degree`."""
        return units_per_page(degree, self.num_units)

    def unit_bytes(self, block_tokens: int, dtype_bytes: int) -> int:
        """Bytes of one unit: K and V of one block, all layers, `heads_per_unit` heads."""
        per_layer = self.heads_per_unit * block_tokens * self.shape.head_dim * dtype_bytes
        return 2 * self.shape.num_layers * per_layer

    # -- shards --

    def kv_heads(self, degree: int, shard: int) -> range:
        """KV heads (padded numbering) that shard `shard` of `degree` works on."""
        if degree <= self.num_kv_heads:
            count = self.num_kv_heads // degree
            return range(shard * count, (shard + 1) * count)
        head = shard * self.num_kv_heads // degree
        return range(head, head + 1)

    def q_heads(self, degree: int) -> int:
        """Query heads per rank at `degree`."""
        return self.num_kv_heads * self.q_per_kv // degree


@cache
def units_per_page(degree: int, num_units: int) -> int:
    """Units of one page at `degree`, of a block that is cut into `num_units`."""
    return max(1, num_units // degree)
