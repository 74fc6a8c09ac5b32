"""The mover's kernel: units of KV out of any rank's arena, by a list, as one launch.

An arena is `[2 * layers, units, elements of a unit in one layer]`: planes of K and V of each layer.
A destination pulls; peers' arenas are mapped memory, known by their address. A fixed, small number
of programs walks all pieces, so that the rest of the GPU keeps computing:

    piece = (plane, a few units of the list, part of their rows)
"""

import torch

from nitsum.kernels.language import jit, next_power_of_2, tl

WORDS = 4096
"""8-byte words a program has in flight: several short rows, or a part of a long one."""


@jit
def _gather(
    bases, base_units, moves, dst, count, first_layer, layer_count, num_layers, dst_units,
    row_words, MOVES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    num_moves = tl.load(count)
    parts = tl.cdiv(row_words, WORDS)
    per_plane = tl.cdiv(num_moves, MOVES) * parts
    word = tl.arange(0, WORDS)[None, :]
    total = per_plane * layer_count * 2
    for piece in tl.range(tl.program_id(0), total, tl.num_programs(0), num_stages=1):
        plane, rest = piece // per_plane, piece % per_plane
        # planes of a range of layers: K of those layers, then V
        plane = ((plane // layer_count) * num_layers + first_layer + plane % layer_count).to(
            tl.int64
        )
        move = (rest // parts * MOVES + tl.arange(0, MOVES))[:, None]
        listed = move < num_moves
        rank = tl.load(moves + move * 3, mask=listed, other=0)
        src_unit = tl.load(moves + move * 3 + 1, mask=listed, other=0).to(tl.int64)
        dst_unit = tl.load(moves + move * 3 + 2, mask=listed, other=0).to(tl.int64)
        src = tl.load(bases + rank).to(tl.pointer_type(tl.int64))
        at = rest % parts * WORDS + word
        src_row = (plane * tl.load(base_units + rank) + src_unit) * row_words
        dst_row = (plane * dst_units + dst_unit) * row_words
        # Arenas and rows are aligned; said here, words are loaded two at a time.
        src_at = tl.multiple_of(src + src_row + at, [16, 16])
        words = tl.load(src_at, mask=listed & (at < row_words), other=0)
        tl.store(dst + dst_row + at, words, mask=listed & (at < row_words))


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
    assert row_bytes % 16 == 0, "rows are copied 16 bytes at a time"
    assert dst.is_contiguous()
    assert layers.step == 1
    words = min(WORDS, next_power_of_2(row_bytes // 8))
    moves_at_once = WORDS // words
    _gather[(num_programs,)](
        bases, base_units, moves, dst.view(torch.int64), count, layers.start, len(layers),
        planes // 2, dst_units, row_bytes // 8, MOVES=moves_at_once, WORDS=words, num_warps=8,
    )  # fmt: skip
