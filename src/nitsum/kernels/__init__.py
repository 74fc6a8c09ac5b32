"""The GPU kernels, each with a torch reference in `model`; they also run in Triton's interpreter.

Everything here can be captured into a CUDA graph: no host reads, fixed grids, and no allocation
where `out` is given. What changes from step to step is read from device tensors.
"""

from nitsum.errors import require_torch

require_torch()
