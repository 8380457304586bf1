"""Which sample goes into which micro-batch on which data-parallel rank. Pure and deterministic."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def split_evenly(num_items: int, num_parts: int) -> list[range]:
    """Consecutive ranges over [0, num_items) whose sizes differ by at most one, larger ones first."""
    size, extra = divmod(num_items, num_parts)
    starts = [i * size + min(i, extra) for i in range(num_parts + 1)]
    return [range(a, b) for a, b in itertools.pairwise(starts)]


def pack(lengths: Sequence[int], max_tokens: int, dp_size: int) -> list[list[tuple[int, ...]]]:
    """Micro-batches of at most `max_tokens` tokens for each data-parallel rank.

    As few micro-batches as first-fit decreasing finds, rounded up to a multiple of `dp_size`; among these the
    samples are spread evenly (each to the least loaded that has room, longest first), more micro-batches being
    taken where even spreading does not fit. A sample longer than the budget has a micro-batch of its own.

    Args:
        lengths: tokens of each sample; index i stands for sample i in the result.

    Returns:
        [rank][micro-batch] -> sample indices, ascending. Every rank has the same number of micro-batches, since
        collectives run once for each; some are empty when there are fewer samples than micro-batches.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = _first_fit(lengths, longest_first, max_tokens)
    count = max(dp_size, -(-count // dp_size) * dp_size)
    bins = _spread(lengths, longest_first, max_tokens, count)
    while bins is None:
        count += dp_size
        bins = _spread(lengths, longest_first, max_tokens, count)
    return _deal(lengths, bins, dp_size)


def _first_fit(lengths: Sequence[int], order: Sequence[int], max_tokens: int) -> int:
    loads: list[int] = []
    for i in order:
        slot = next((b for b, load in enumerate(loads) if load + lengths[i] <= max_tokens), None)
        if slot is None:
            loads.append(lengths[i])
        else:
            loads[slot] += lengths[i]
    return len(loads)


def _spread(lengths: Sequence[int], order: Sequence[int], max_tokens: int, count: int) -> list[list[int]] | None:
    """Each sample to the least loaded of `count` bins; None when one does not fit."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for i in order:
        slot = min(range(count), key=lambda b: (loads[b], b))
        if bins[slot] and loads[slot] + lengths[i] > max_tokens:
            return None
        bins[slot].append(i)
        loads[slot] += lengths[i]
    return bins


def _deal(lengths: Sequence[int], bins: list[list[int]], dp_size: int) -> list[list[tuple[int, ...]]]:
    """Bins to ranks, heaviest first, back and forth, so that ranks have like loads; then in sample order."""
    heaviest_first = sorted(bins, key=lambda b: (-sum(lengths[i] for i in b), sorted(b)))
    ranks: list[list[tuple[int, ...]]] = [[] for _ in range(dp_size)]
    for n, members in enumerate(heaviest_first):
        turn, place = divmod(n, dp_size)
        ranks[place if turn % 2 == 0 else dp_size - 1 - place].append(tuple(sorted(members)))
    return [sorted(rank, key=lambda b: (not b, b)) for rank in ranks]
