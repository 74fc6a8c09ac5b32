"""What `nitsum serve` can be told: every flag, its type, its help and its default, once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nitsum.cli.readers import (
    amount,
    boolean,
    entries,
    http_url,
    one_of,
    seconds,
    size_bytes,
    text,
    whole_number,
)
from nitsum.cli.sources import setting
from nitsum.limits import DTYPES, STEP_LIMITS, StepLimits, step_limits
from nitsum.messages import Dtype
from nitsum.plan import PlanSet

CPU_KV_BYTES = 256 << 20


def by_device(name: str) -> str:
    """The default of one of `StepLimits`, in words."""
    cpu, cuda = (getattr(STEP_LIMITS[device], name) for device in ("cpu", "cuda"))
    return f"{cpu} on cpu, {cuda} on cuda"


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """The ranks and the plans that are resident on them."""

    ranks: int = setting(whole_number(1), 1, "processes (CPU) or GPUs; a power of two", "N")
    plans: tuple[object, ...] = setting(
        entries,
        (),
        "plans to hold ready: a YAML file or shorthand such as 2xTP1,TP2 "
        "(default: a useful set for this number of ranks)",
        "FILE|PLAN,...",
    )
    plan: str = setting(text, "", "the plan to begin with (default: the first)")
    min_tp: int = setting(
        whole_number(),
        0,
        "each rank holds 1/N of the weights; no lane may be narrower (default: the narrowest lane)",
        "N",
    )

    def min_tp_of(self, plans: PlanSet) -> int:
        """What was asked for, or as little of the weights as `plans` need."""
        return self.min_tp or plans.degrees[0]


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """Where ranks compute, and in what."""

    device: Literal["cpu", "cuda"] = setting(one_of("cpu", "cuda"), "cpu", "cpu or cuda")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        one_of("auto", "float32", "bfloat16"),
        "auto",
        "float32 or bfloat16 (default: float32 on cpu, bfloat16 on cuda)",
    )

    @property
    def chosen_dtype(self) -> Dtype:
        """What `auto` stands for."""
        if self.dtype != "auto":
            return self.dtype
        return DTYPES[self.device]


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """How large steps and KV blocks are; 0 is what the device has by default."""

    block_tokens: int = setting(
        whole_number(), 0, f"tokens of one KV block (default: {by_device('block_tokens')})", "N"
    )
    max_num_seqs: int = setting(
        whole_number(),
        0,
        f"sequences one lane steps at once (default: {by_device('max_num_seqs')})",
        "N",
    )
    max_batch_tokens: int = setting(
        whole_number(),
        0,
        f"tokens one step may compute (default: {by_device('max_batch_tokens')})",
        "N",
    )


@dataclass(frozen=True, kw_only=True)
class StepSettings(StepSizes, DeviceSettings):
    """The same, of a device."""

    @property
    def limits(self) -> StepLimits:
        """What was asked for; the device's own where nothing was."""
        return step_limits(
            self.device,
            block_tokens=self.block_tokens,
            max_num_seqs=self.max_num_seqs,
            max_batch_tokens=self.max_batch_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class ModelSettings(StepSettings, PlanSettings):
    """What ranks load, and the memory they give it."""

    model: str = setting(
        text, "", "a checkpoint folder, a .gguf file, or `demo`", "MODEL", positional=True
    )
    load_format: Literal["auto", "dummy"] = setting(
        one_of("auto", "dummy"), "auto", "auto reads the weights, dummy draws random ones", "FORMAT"
    )
    threads: int = setting(
        whole_number(), 0, "CPU threads of one worker (default: the cores, divided)", "N"
    )
    kv_memory: int | None = setting(
        size_bytes,
        None,
        "KV arena of one rank, e.g. 256MiB (default: 256MiB on cpu, what is left on cuda)",
        "SIZE",
    )
    max_model_len: int = setting(
        whole_number(), 0, "longest prompt plus answer, tokens (default: the checkpoint's)", "N"
    )

    @property
    def kv_bytes(self) -> int:
        """Of a rank's arena; 0 is all that is left."""
        if self.kv_memory is not None:
            return self.kv_memory
        return CPU_KV_BYTES if self.device == "cpu" else 0


@dataclass(frozen=True, kw_only=True)
class ServeSettings(ModelSettings):
    """Plans, engine and server together."""

    seed: int = setting(whole_number(), 0, "of dummy weights", "N")
    host_kv_memory: int = setting(
        size_bytes, 0, "host memory of one rank for KV of displaced requests", "SIZE"
    )
    max_mixed_tokens: int = setting(
        whole_number(),
        0,
        "tokens of a step that has decodes, which its prompts keep waiting (default: "
        f"{by_device('max_mixed_tokens')}; max-batch-tokens if that is given)",
        "N",
    )
    prefix_cache: bool = setting(boolean, True, "keep the KV of prompts for later requests")
    step_timeout: float = setting(
        seconds, 60.0, "a step that takes longer restarts the workers, seconds", "SECONDS"
    )
    tiers: tuple[object, ...] = setting(
        entries, (), "tiers to serve: a YAML file (default: priority, default, flex, batch)", "FILE"
    )
    targets: str = setting(
        text, "", "tiers promise what this file of targets says (see `nitsum bench serve`)", "FILE"
    )
    host: str = setting(text, "127.0.0.1", "address to listen on")
    port: int = setting(whole_number(0, 65535), 8000, "port to listen on; 0 takes a free one")
    served_model_name: str = setting(
        text, "", "the model's name in the API (default: its folder's name)"
    )
    api_key: str = setting(text, "", "clients must send this key (default: none needed)")
    admin_key: str = setting(
        text, "", "admin routes need this key (default: loopback callers only)"
    )
    tls_cert: str = setting(
        text, "", "serve HTTPS with this certificate chain (PEM; default: HTTP)", "FILE"
    )
    tls_key: str = setting(
        text, "", "the certificate's private key, unless it is in the same file", "FILE"
    )
    keys: str = setting(
        text, "", "key file made by `nitsum keys add` (default: no keys needed)", "FILE"
    )
    data_dir: str = setting(
        text,
        "",
        "folder for files, batches and the ledger (default: ~/.local/share/nitsum)",
        "DIR",
    )
    ledger: str = setting(
        text,
        "",
        "SQLite file or database URL for one record a request, or `none` "
        "(default: ledger.db in the data folder)",
        "PATH|URL",
    )
    price_input: float = setting(
        amount, 0.0, "price of a million prompt tokens at a tier's multiplier of 1", "MONEY"
    )
    price_output: float = setting(
        amount, 0.0, "price of a million answer tokens at a tier's multiplier of 1", "MONEY"
    )
    batch_concurrency: int = setting(
        whole_number(1), 4, "lines of /v1/batches that run at a time", "N"
    )
    shutdown_timeout: float = setting(
        seconds, 30.0, "time for running requests to finish at shutdown, seconds", "SECONDS"
    )
    client_timeout: float = setting(
        seconds,
        60.0,
        "a client that sends or reads nothing for this long, where it should, is cut off",
        "SECONDS",
    )
    stall_timeout: float = setting(
        seconds, 30.0, "/health fails when work waits and no step ends for this long", "SECONDS"
    )
    otlp: str = setting(
        http_url,
        "",
        "send spans and metrics to this OpenTelemetry collector (needs nitsum[otel])",
        "URL",
    )
    policy: Literal["nitsum", "priority", "fcfs"] = setting(
        one_of(
            "nitsum",
            "priority",
            "fcfs",
            elsewhere={word: f"--controller {word}" for word in ("static", "adaptive")},
        ),
        "nitsum",
        "how lanes order their work; priority (by tier, then by arrival) and fcfs (by arrival) are "
        "what to compare with",
        "POLICY",
    )
    controller: Literal["static", "adaptive"] = setting(
        one_of(
            "static",
            "adaptive",
            elsewhere={word: f"--policy {word}" for word in ("nitsum", "priority", "fcfs")},
        ),
        "static",
        "adaptive: change plans when that pays; static: only when told to",
        "WHO",
    )
    cost: str = setting(
        text,
        "",
        "step times to begin with: a file of `nitsum profile`, or `analytic` (default: the table "
        "that comes with Nitsum for these GPUs and this model; without one, analytic)",
        "FILE",
    )
    events: str = setting(
        text, "", "append what happens, one JSON object a line, to this file", "FILE"
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        one_of("debug", "info", "warning", "error"),
        "info",
        "debug, info (a line at the end of each request), warning or error",
    )
    log_format: Literal["text", "json"] = setting(one_of("text", "json"), "text", "text or json")
