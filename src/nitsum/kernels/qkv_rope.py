"""From the projections to what attention reads: bias, norm, rope, q aside, k and v into pages.

One program takes a few tokens of one KV group. Its tile has a row for each head of the group, two
halves wide, since rope pairs dimension i with i + d/2:

    rows 0..g-1: q heads    row g: k    row g+1: v (neither normed nor rotated)    rest: idle

Fused rows `[n, G, g + 2, d]` and split ones `[n, G, g, d]` + `[n, G, 2, d]` are both strided views
of the same two things, q heads and k/v heads, so one kernel serves both.
"""

import torch

from nitsum.kernels.language import cdiv, jit, next_power_of_2, tl


@jit
def _load_heads(q, kv, r, col, alive, G: tl.constexpr, D: tl.constexpr):
    """Rows r of the tile: q heads from `q`, then k and v from `kv`; zeros behind."""
    from_q = tl.load(q + r * D + col, mask=alive & (r < G), other=0.0)
    from_kv = tl.load(kv + (r - G) * D + col, mask=alive & (r >= G), other=0.0)
    return from_q.to(tl.float32) + from_kv.to(tl.float32)


@jit
def _load_scales(q_norm, k_norm, r, col, inside, G: tl.constexpr):
    for_q = tl.load(q_norm + col, mask=inside & (r < G), other=0.0)
    for_k = tl.load(k_norm + col, mask=inside & (r == G), other=0.0)
    return for_q.to(tl.float32) + for_k.to(tl.float32)


@jit
def _norm_heads(
    low, high, q_norm, k_norm, r, col, inside, eps, G: tl.constexpr, HALF: tl.constexpr, dtype
):
    mean = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF)
    factor = tl.rsqrt(mean + eps)[:, None]
    low_scale = _load_scales(q_norm, k_norm, r, col, inside, G)
    high_scale = _load_scales(q_norm, k_norm, r, col + HALF, inside, G)
    is_v = r == G + 1
    normed_low = ((low * factor).to(dtype).to(tl.float32) * low_scale).to(dtype).to(tl.float32)
    normed_high = ((high * factor).to(dtype).to(tl.float32) * high_scale).to(dtype).to(tl.float32)
    return tl.where(is_v, low, normed_low), tl.where(is_v, high, normed_high)


@jit
def _qkv_rope_write(
    q, kv, q_bias, kv_bias, q_norm, k_norm, table, positions, kv_slots, out, keys, values,
    num_tokens, q_row, q_group, kv_row, kv_group, q_bias_group, kv_bias_group, eps,
    NUM_KV: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    D: tl.constexpr, COLS: tl.constexpr, PAGE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    group = tl.program_id(1)
    lane = tl.arange(0, TOKENS * ROWS)
    token = (tl.program_id(0) * TOKENS + lane // ROWS).to(tl.int64)[:, None]
    r = (lane % ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    inside = (token < num_tokens) & (col < HALF)
    alive = inside & (r < G + 2)
    dtype = out.dtype.element_ty

    q_at = q + token * q_row + group * q_group
    kv_at = kv + token * kv_row + group * kv_group
    low = _load_heads(q_at, kv_at, r, col, alive, G, D)
    high = _load_heads(q_at, kv_at, r, col + HALF, alive, G, D)
    if HAS_BIAS:
        q_bias += group * q_bias_group
        kv_bias += group * kv_bias_group
        low += _load_heads(q_bias, kv_bias, r, col, alive, G, D)
        high += _load_heads(q_bias, kv_bias, r, col + HALF, alive, G, D)
        low, high = low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)
    if HAS_NORM:
        low, high = _norm_heads(low, high, q_norm, k_norm, r, col, inside, eps, G, HALF, dtype)

    position = tl.load(positions + token, mask=token < num_tokens, other=0)
    turns = inside & (r <= G)
    cos = tl.load(table + position * D + col, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(table + position * D + HALF + col, mask=turns, other=0.0).to(tl.float32)
    new_low = (low * cos - high * sin).to(dtype)
    new_high = (high * cos + low * sin).to(dtype)

    out_at = out + ((token * NUM_KV + group) * G + r) * D + col
    tl.store(out_at, new_low, mask=alive & (r < G))
    tl.store(out_at + HALF, new_high, mask=alive & (r < G))
    slot = tl.load(kv_slots + token, mask=token < num_tokens, other=-1).to(tl.int64)
    page = (slot // PAGE) * NUM_KV + group
    at = (page * PAGE + slot % PAGE) * D + col
    tl.store(keys + at, new_low, mask=alive & (r == G) & (slot >= 0))
    tl.store(keys + at + HALF, new_high, mask=alive & (r == G) & (slot >= 0))
    tl.store(values + at, new_low, mask=alive & (r == G + 1) & (slot >= 0))
    tl.store(values + at + HALF, new_high, mask=alive & (r == G + 1) & (slot >= 0))


def split_heads(
    qkv: torch.Tensor, kv: torch.Tensor | None, num_kv: int, q_per_kv: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views q [..., G, g, d] and k/v [..., G, 2, d] of fused or split rows (or biases)."""
    if kv is not None:
        q = qkv.unflatten(-1, (num_kv, q_per_kv, head_dim))
        return q, kv.unflatten(-1, (num_kv, 2, head_dim))
    groups = qkv.unflatten(-1, (num_kv, q_per_kv + 2, head_dim))
    return groups[..., :q_per_kv, :], groups[..., q_per_kv:, :]


def qkv_rope_write(
    q: torch.Tensor,
    kv: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    biases: tuple[torch.Tensor, torch.Tensor] | None = None,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Writes k and v of n tokens into one layer's pages; returns q [n, G, g, d], ready to attend.

    q [n, G, g, d] and kv [n, G, 2, d] are views from `split_heads` (so are `biases`); table is
    [positions, 2 (cos, sin), d / 2]; positions and kv_slots are [n], slot -1 writes nothing; keys
    and values are [pages, G, block_tokens, d]; norms are the weights [d] of the norms of q and k.
    """
    n, num_kv, g, d = q.shape
    out = q.new_empty(n, num_kv, g, d) if out is None else out
    if not n:
        return out
    q_bias, kv_bias = biases or (q[0], kv[0])
    q_norm, k_norm = norms or (table, table)
    rows = next_power_of_2(g + 2)
    tokens = 1 if n <= 256 else max(1, 32 // rows)
    _qkv_rope_write[(cdiv(n, tokens), num_kv)](
        q, kv, q_bias, kv_bias, q_norm, k_norm, table, positions, kv_slots, out, keys, values,
        n, q.stride(0), q.stride(1), kv.stride(0), kv.stride(1),
        q_bias.stride(0), kv_bias.stride(0), eps,
        NUM_KV=num_kv, G=g, ROWS=rows, TOKENS=tokens, D=d, COLS=next_power_of_2(d // 2),
        PAGE=keys.shape[2], HAS_BIAS=biases is not None, HAS_NORM=norms is not None,
        num_warps=1 if tokens == 1 else 4,
    )  # fmt: skip
    return out
