"""Steps, pages and weights for kernel tests; the same checks run interpreted and on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nitsum.kernels.attention import HostLengths, Sequences
from nitsum.messages import Join, Pages, Work
from nitsum.model.attention import num_blocks, written_rows
from nitsum.model.interface import StepInput
from nitsum.model.views import LayerWeights
from nitsum.request import SamplingParams
from nitsum.worker.slots import Slots
from tests.lanes import Part, compose

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def close(ours: torch.Tensor, reference: torch.Tensor) -> None:
    """Near in norm, and finite: rounding of 16-bit types is not the same everywhere."""
    ours, reference = ours.detach().float().cpu(), reference.detach().float().cpu()
    assert ours.shape == reference.shape
    assert torch.isfinite(ours).all()
    error = (ours - reference).norm() / reference.norm().clamp_min(1e-30)
    assert error < 1e-2, f"relative error {error:.2e}"
    assert (ours - reference).abs().max() <= 0.1 * reference.abs().max() + 1e-6


def exact(ours: torch.Tensor, reference: torch.Tensor) -> None:
    """As near as float32 arithmetic in another order gets."""
    torch.testing.assert_close(ours.cpu(), reference.cpu(), rtol=2e-5, atol=2e-5, check_dtype=False)


def randn(*size: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).to(dtype).to(DEVICE)


@dataclass
class Step:
    """A step of sequences over pages filled with random keys and values."""

    step: StepInput  # on the CPU
    sequences: Sequences
    lengths: HostLengths
    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    def reference_inputs(self) -> tuple[StepInput, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The step and its q, keys and values in float32 on the CPU."""
        return self.step, *(x.float().cpu() for x in (self.q, self.keys, self.values))


def make_step(
    parts: Sequence[tuple[int, int]],
    heads: tuple[int, int, int],
    block_tokens: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    num_padding: int = 0,
) -> Step:
    """`parts` are (start, num_tokens); heads are (G, g, d). Padding sequences follow behind."""
    num_kv, g, d = heads
    generator = torch.Generator().manual_seed(seed)
    counts = [num_blocks(start + n, block_tokens) for start, n in parts]
    free = torch.randperm(1 + sum(counts), generator=generator).tolist()
    lines = [Part([0] * n, start, [free.pop() for _ in range(count)])
             for (start, n), count in zip(parts, counts, strict=True)]  # fmt: skip
    step = compose(lines, block_tokens)
    # What no sequence owns is large, so that reading it would show.
    cache = torch.full((2, 1 + sum(counts), num_kv, block_tokens, d), 50.0)
    for line in lines:
        own = range(line.start + len(line.tokens))
        slots = torch.tensor([line.pages[p // block_tokens] * block_tokens + p % block_tokens
                              for p in own])  # fmt: skip
        rows = written_rows(slots, num_kv, block_tokens)
        for side in (0, 1):
            filled = torch.randn(len(rows), d, generator=generator)
            cache[side].view(-1, d).index_copy_(0, rows, filled)
    q = torch.randn(len(step.tokens) + num_padding, num_kv, g, d, generator=generator)
    cache = cache.to(dtype).to(DEVICE)
    sequences, lengths = device_sequences(step, num_padding)
    return Step(step, sequences, lengths, q.to(dtype).to(DEVICE), cache[0], cache[1])


def device_sequences(step: StepInput, num_padding: int) -> tuple[Sequences, HostLengths]:
    contexts = [span.context for span in step.spans] + [0] * num_padding
    decode = all(span.num_tokens == 1 for span in step.spans)
    counts = [span.num_tokens for span in step.spans] + [int(decode)] * num_padding
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    table = torch.nn.functional.pad(step.page_table, (0, 0, 0, num_padding), value=0)

    def ints(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    sequences = Sequences(ints(starts), ints(contexts), table.int().to(DEVICE))
    return sequences, HostLengths(counts, contexts)


def layer_weights(**given: torch.Tensor | None) -> LayerWeights:
    """A layer of which only what is `given` will be read."""
    unread = torch.empty(0)
    names = ("input_norm", "qkv", "o", "post_norm", "gate_up", "down")
    optional = ("qkv_bias", "kv", "kv_bias", "q_norm", "k_norm", "o_bias", "gate_up_bias",
                "down_bias")  # fmt: skip
    fields: dict[str, torch.Tensor | None] = dict.fromkeys(names, unread)
    fields |= dict.fromkeys(optional)
    return LayerWeights(**(fields | given))  # type: ignore[arg-type]


def filled_slots(
    num_slots: int, row_tokens: int, block_tokens: int, seed: int
) -> tuple[Slots, torch.Tensor, torch.Tensor]:
    """CPU slots with random rows and page tables, and the same as device tensors."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 1000, (num_slots, row_tokens), generator=generator, dtype=torch.int32)
    slots = Slots(rows, block_tokens)
    max_pages = num_blocks(row_tokens, block_tokens)
    tables = torch.randint(0, 500, (num_slots, max_pages), generator=generator, dtype=torch.int32)
    for slot in range(num_slots):
        slots.join(Join(slot, [], 0, 0, SamplingParams()))
        slots.set_pages(Pages(slot, 0, [tables[slot].tolist()]), 0)
    return slots, rows.clone().to(DEVICE), tables.to(DEVICE)


def packed(work: Sequence[Work], bucket: int) -> torch.Tensor:
    """[bucket, 4] int32: a line a sequence, then padding."""
    lines = [[part.slot, part.start, part.num_tokens, int(part.samples)] for part in work]
    lines += [[-1, 7, 3, 1]] * (bucket - len(work))  # padding means nothing but its slot
    return torch.tensor(lines, dtype=torch.int32, device=DEVICE)
