"""What each token of a rollout cost in wall clock, as its weight in the draft's loss (`draft.token_weighting`).

A decode step of b running requests takes about 1 + b / 32 times as long as one of a single request, and its cost is
shared by the b tokens that it decides. So a token of the long tail, where few requests are left, costs many times one
of the full batch: what a better draft saves there is what the rollout waits for.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from draft_models.types import DraftSample
from rollout_engine.types import Sample

_DOUBLING_BATCH = 32  # requests at which a decode step takes twice as long as with none; not timed, so that runs repeat


def weighed(captured: Sequence[DraftSample], rollout: Sequence[Sample], slots: int) -> list[DraftSample]:
    """The captured samples with their `token_weights`, from the lengths of the whole rollout."""
    weights = token_weights(rollout, slots)
    return [replace(s, token_weights=weights[s.prompt_id, s.sample_id]) for s in captured]


def token_weights(samples: Sequence[Sample], slots: int) -> dict[tuple[int, int], Tensor]:
    """Weights [R] (float32) of each response's tokens by (prompt_id, sample_id); their mean over all tokens is 1.

    Requests are taken to start in this order, as soon as one of `slots` places is free, and to gain one token in each
    decode step: what speculation gains is left out, because it is much the same for all.
    """
    lengths = [len(s.token_ids) for s in samples]
    starts = start_times(lengths, slots)
    live_T = torch.zeros(max((a + n for a, n in zip(starts, lengths, strict=True)), default=0) + 1)
    for start, length in zip(starts, lengths, strict=True):
        live_T[start] += 1
        live_T[start + length] -= 1
    cost_T = 1 / live_T.cumsum(0).clamp_(min=1) + 1 / _DOUBLING_BATCH
    costs = [cost_T[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    mean = sum(float(cost.sum(dtype=torch.float64)) for cost in costs) / max(1, sum(lengths))
    return {s.request.key: cost / mean for s, cost in zip(samples, costs, strict=True)}


def start_times(lengths: Sequence[int], slots: int) -> list[int]:
    """The decode step in which each request starts, taken in order, each at the first free place."""
    free_at = [0] * slots  # equal entries are a heap
    starts = []
    for length in lengths:
        start = heapq.heappop(free_at)
        starts.append(start)
        heapq.heappush(free_at, start + length)
    return starts
