"""What the memory of ranks goes to, as `nitsum serve` says at its start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

USES = {
    "weights": "weights, once for all plans",
    "kv": "KV, one arena for all plans",
    "host_kv": "KV in host memory",
    "graphs": "graphs of all plans",
    "groups_and_buffers": "groups and buffers",
    "largest_step": "the largest step",
    "rows": "tokens of requests",
    "comm": "buffers of groups",
}
"""By their names in a worker's report, in the order in which they are shown. Others are no part of
the sum: `peak_rss` counts what is shared once for each process."""


def memory_table(ranks: Sequence[Mapping[str, int]]) -> str:
    """A line a use, GiB of each rank; what is nowhere used is left out."""
    lines = [f"Memory of {'each rank' if len(ranks) > 1 else 'the rank'}, GiB:"]
    for name, words in USES.items():
        found = [uses.get(name, 0) for uses in ranks]
        if any(found):
            lines.append(f"  {words:30}{_gib(found):>13}")
    sums = [sum(uses.get(name, 0) for name in USES) for uses in ranks]
    lines.append(f"  {'together':30}{_gib(sums):>13}")
    return "\n".join(lines)


def _gib(sizes: Sequence[int]) -> str:
    """One number where ranks agree, else the least and the most."""
    low, high = (f"{size / (1 << 30):.2f}" for size in (min(sizes), max(sizes)))
    return low if low == high else f"{low} to {high}"
