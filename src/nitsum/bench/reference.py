"""Hugging Face `transformers` on the same weights, and the distance between two sets of logits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nitsum.errors import MissingDependency, require_torch

if TYPE_CHECKING:
    import torch


def require_transformers() -> None:
    """Raises `MissingDependency` with what to install."""
    require_torch()
    if find_spec("transformers") is None:
        raise MissingDependency(
            "The comparison needs Hugging Face transformers, which is not installed: "
            "install nitsum[hf]."
        )


class HfModel:
    """A checkpoint in `transformers`: float32 on the CPU, unless told otherwise."""

    def __init__(self, folder: Path, dtype: str = "float32", device: str = "cpu") -> None:
        require_transformers()
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._device = device
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True
        )
        self.model.to(device).eval()

    def answer_logits(self, prompt: list[int], answer: list[int]) -> torch.Tensor:
        """float32 [len(answer), vocabulary]: what each answer token is drawn from."""
        import torch

        tokens = torch.tensor([prompt + answer[:-1]], device=self._device)
        with torch.inference_mode():
            return self.model(tokens, logits_to_keep=len(answer)).logits[0].float().cpu()


def from_bytes(rows: list[bytes]) -> torch.Tensor:
    """float32 [m, vocabulary] of logits as workers return them."""
    import torch

    return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.float32).view(len(rows), -1)


@dataclass
class Difference:
    """How far logits are from a reference, over all positions added so far."""

    num_positions: int = 0
    nll: float = 0.0
    """Sum over positions, nats."""
    reference_nll: float = 0.0
    logits: float = 0.0
    """Largest over positions of max |difference| / max |reference|."""
    worst: str = ""
    """The request and position of that."""
    squared: float = 0.0
    """Sum over positions of the mean squared difference of their logits."""

    @property
    def nll_difference(self) -> float:
        """Between the mean NLLs, nats per token."""
        if not self.num_positions:
            return math.nan
        return abs(self.nll - self.reference_nll) / self.num_positions

    @property
    def rms(self) -> float:
        """Root mean square difference of all logits."""
        return math.sqrt(self.squared / self.num_positions) if self.num_positions else math.nan

    def add(
        self, name: str, tokens: list[int], ours: torch.Tensor, reference: torch.Tensor
    ) -> None:
        """One request: its answer, and both logits [len(tokens), vocabulary]."""
        self.num_positions += len(tokens)
        self.nll += _nll(ours, tokens)
        self.reference_nll += _nll(reference, tokens)
        self.squared += (ours - reference).square().mean(-1).sum().item()
        distance = (ours - reference).abs().amax(-1) / reference.abs().amax(-1)
        for position, value in enumerate(_finite(distance.tolist())):
            if value > self.logits:
                self.logits, self.worst = value, f"{name}, answer token {position}"


def _finite(values: Iterable[float]) -> list[float]:
    """NaN compares as no difference at all; it is the largest one."""
    return [math.inf if math.isnan(value) else value for value in values]


def _nll(logits: torch.Tensor, tokens: list[int]) -> float:
    import torch

    chosen = torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(tokens)[:, None])
    return -chosen.sum().item()
