"""The decoder: config-driven layers over views of resident weights. Parallelism is an argument."""

from nitsum.errors import require_torch

require_torch()
