"""What the server is told at start."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nitsum.errors import ConfigError
from nitsum.ledger.records import Prices
from nitsum.shape import ModelShape
from nitsum.tier import DEFAULT_TIERS, Tier


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Frozen; checked once."""

    checkpoint: Path
    """Checkpoint folder: tokenizer and chat template are read from it."""
    model_names: tuple[str, ...]
    """Names the model is served under; the first is the one responses carry."""
    max_model_len: int
    """Longest prompt plus answer, tokens; the engine's number."""
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end an answer, as the checkpoint's configuration has them."""
    bos_token_id: int | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    tls_cert: Path | None = None
    """Certificate chain (PEM); with it, and only with it, the port speaks HTTPS."""
    tls_key: Path | None = None
    """The certificate's private key, unless it is in the same file."""
    api_key: str | None = field(default=None, repr=False)
    """Callers must send it as a bearer token; None lets everybody in."""
    admin_key: str | None = field(default=None, repr=False)
    """Opens the admin routes to callers from other machines."""
    keys: Path | None = None
    """Key file; None: no keys but `api_key`."""
    ledger: str = field(default="", repr=False)
    """SQLite file or database URL of the ledger; empty keeps none."""
    prices: Prices = field(default_factory=Prices)
    data_dir: Path | None = None
    """Where files, batches and what the ledger could not store are kept; None keeps nothing."""
    batch_concurrency: int = 4
    """Lines of batches that run at a time."""
    num_ranks: int = 1
    device: str = "cpu"
    """What the ledger counts as the machine's hours."""
    otlp: str = ""
    """OpenTelemetry collector that gets spans and metrics over HTTP; empty sends none."""
    tiers: tuple[Tier, ...] = DEFAULT_TIERS
    default_tier: str = "default"
    """What `service_tier: auto` means."""
    stall_s: float = 30.0
    """`/health` fails when work has waited this long and no step has completed."""
    patience_s: float = 60.0
    """A client that sends or reads nothing for this long, where it should, is cut off."""
    drain_s: float = 60.0
    """Time that requests get to finish after SIGTERM."""
    max_body_bytes: int = 32 << 20
    max_file_bytes: int = 200 << 20
    """Of one upload."""
    max_choices: int = 128
    """Answers one call may ask for: prompts times n."""

    def __post_init__(self) -> None:
        if self.tls_key is not None and self.tls_cert is None:
            raise ConfigError("A TLS key needs its certificate: give --tls-cert, too.")
        if not self.model_names:
            raise ConfigError("Give the model at least one name.")
        if self.default_tier not in {tier.name for tier in self.tiers}:
            raise ConfigError(f"default_tier {self.default_tier!r} is none of the tiers.")
        for name in (
            "max_model_len",
            "vocab_size",
            "max_body_bytes",
            "max_choices",
            "batch_concurrency",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1.")

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Path,
        *,
        model_names: tuple[str, ...] = (),
        max_model_len: int = 0,
        **others: Any,
    ) -> ServerSettings:
        """Settings with the model's facts out of its `config.json`.

        Without names the folder's name is used; a `max_model_len` of 0 takes the checkpoint's.
        """
        shape = ModelShape.from_folder(checkpoint)
        return cls(
            checkpoint=checkpoint,
            model_names=model_names or (checkpoint.resolve().name,),
            max_model_len=max_model_len or shape.max_positions,
            vocab_size=shape.vocab_size,
            eos_token_ids=shape.eos_token_ids,
            bos_token_id=shape.bos_token_id,
            **others,
        )
