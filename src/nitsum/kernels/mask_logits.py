"""Masks of grammars over logits: what must not come next becomes -inf.

A line of the one array that is uploaded for a step belongs to one masked draw:

    row of the logits | bits, 32 tokens a word: token t is bit t % 32 of word t // 32, 1 if allowed
"""

import torch

from nitsum.kernels.language import cdiv, jit, tl

PART = 8192
"""Logits a program looks at."""


@jit
def _mask(logits, lines, row_stride, line_ints, vocab, PART: tl.constexpr):
    line = lines + tl.program_id(0) * line_ints
    row = tl.load(line).to(tl.int64)
    at = tl.program_id(1) * PART + tl.arange(0, PART)
    word = tl.load(line + 1 + at // 32, mask=at < vocab, other=-1)
    hidden = tl.full([PART], -float("inf"), tl.float32)
    tl.store(logits + row * row_stride + at, hidden, mask=((word >> (at % 32)) & 1) == 0)


def mask_logits(logits: torch.Tensor, lines: torch.Tensor) -> None:
    """Set what `lines` [draws, 1 + words] int32 forbid to -inf in float32 `logits` [m, V].

    A line holds the row it is about, then one bit for each of at least V tokens.
    """
    vocab = logits.shape[1]
    assert logits.dtype == torch.float32
    assert 32 * (lines.shape[1] - 1) >= vocab
    _mask[(lines.shape[0], cdiv(vocab, PART))](
        logits, lines, logits.stride(0), lines.shape[1], vocab, PART=PART, num_warps=8
    )
