"""A model on a machine: how large its steps are, and what they take."""

from __future__ import annotations

from dataclasses import dataclass

from nitsum.cost.analytic import AnalyticCost
from nitsum.cost.machines import Machine
from nitsum.cost.protocol import CostModel
from nitsum.limits import StepLimits, step_limits
from nitsum.messages import Dtype
from nitsum.shape import ModelShape
from nitsum.shared import DTYPE_BYTES


@dataclass(frozen=True, kw_only=True)
class ModelSite:
    """What plans and simulations of it share."""

    shape: ModelShape
    machine: Machine
    dtype: Dtype = "bfloat16"
    cost: CostModel | None = None
    """Instead of the analytic model: a measured table."""
    max_num_seqs: int = 0
    """Like the other sizes of steps: 0 is what is served on such a machine."""
    max_batch_tokens: int = 0
    max_mixed_tokens: int = 0
    """Of steps with decodes."""

    @property
    def num_ranks(self) -> int:
        return self.machine.num_gpus

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def limits(self) -> StepLimits:
        return step_limits(
            self.machine.device,
            max_num_seqs=self.max_num_seqs,
            max_batch_tokens=self.max_batch_tokens,
            max_mixed_tokens=self.max_mixed_tokens,
        )

    def cost_model(self, min_tp: int, max_tp: int) -> CostModel:
        """Of ranks that hold 1/min_tp of the weights, for lanes of up to `max_tp` of them."""
        return self.cost or AnalyticCost(
            self.shape, self.machine, max_tp=max_tp, min_tp=min_tp, dtype_bytes=self.dtype_bytes
        )
