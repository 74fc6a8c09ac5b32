"""The mover's kernel: units of KV out of any rank's arena, by a list, as one launch.

An arena is `[2 * layers, units, elements of a unit in one layer]`: planes of K and V of each layer.
A destination pulls; peers' arenas are mapped memory, known by their address. A fixed, small number
of programs walks all pieces, so that the rest of the GPU keeps computing:

    piece = (plane, unit of the list, part of that unit's row)
"""

import torch

from nitsum.kernels.language import jit, next_power_of_2, tl

WORDS = 1024
"""8-byte words a program copies at a time."""


@jit
def _gather(
    bases, base_units, moves, dst, count, num_planes, first_layer, layer_count, num_layers,
    dst_units, row_words, WORDS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(row_words, WORDS)
    num_moves = tl.load(count)
    per_plane = num_moves * parts
    word = tl.arange(0, WORDS)
    total = per_plane * layer_count * 2
    for piece in tl.range(tl.program_id(0), total, tl.num_programs(0), num_stages=UNROLL):
        plane, rest = piece // per_plane, piece % per_plane
        move, part = rest // parts, rest % parts
        # planes of a range of layers: K of those layers, then V
        plane = (plane // layer_count) * num_layers + first_layer + plane % layer_count
        rank = tl.load(moves + move * 3)
        src_unit = tl.load(moves + move * 3 + 1).to(tl.int64)
        dst_unit = tl.load(moves + move * 3 + 2).to(tl.int64)
        base = tl.multiple_of(tl.load(bases + rank), 16)
        src = base.to(tl.pointer_type(tl.int64))
        src_row = (plane.to(tl.int64) * tl.load(base_units + rank) + src_unit) * row_words
        dst_row = (plane.to(tl.int64) * dst_units + dst_unit) * row_words
        at = part * WORDS + word
        words = tl.load(src + src_row + at, mask=at < row_words, other=0)
        tl.store(dst + dst_row + at, words, mask=at < row_words)


def gather_units(
    bases: torch.Tensor,
    base_units: torch.Tensor,
    moves: torch.Tensor,
    count: torch.Tensor,
    dst: torch.Tensor,
    *,
    layers: range,
    num_programs: int,
) -> None:
    """Copy K and V of `layers` of listed units from the ranks' arenas into `dst`.

    bases [ranks] int64: address of each rank's arena as this process sees it (the own one too);
    base_units [ranks] int64: its number of units; moves [capacity, 3] int32: source rank, source
    unit, destination unit, of which the first `count` [1] int32 are done; dst [2 * num_layers,
    units, elements], this rank's arena or a staging buffer; one program occupies about one SM.

    Everything may be read after something was written: where units trade places inside the own
    arena, go through a staging buffer.
    """
    planes, dst_units, elements = dst.shape
    row_bytes = elements * dst.element_size()
    assert row_bytes % 8 == 0, "rows are copied in words of 8 bytes"
    assert dst.is_contiguous()
    assert layers.step == 1
    words = min(WORDS, next_power_of_2(row_bytes // 8))
    _gather[(num_programs,)](
        bases, base_units, moves, dst.view(torch.int64), count, planes, layers.start, len(layers),
        planes // 2, dst_units, row_bytes // 8, WORDS=words, UNROLL=2, num_warps=8,
    )  # fmt: skip
