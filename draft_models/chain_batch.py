"""Rolled-out samples laid end to end, with the rows where an engine could have started to draft.

Axes: B samples, S key rows, Q chains, A captured width (3H), W width of what the target's output layer reads, V target
vocabulary, K unroll steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from draft_models.types import DraftSample

_LIKE_LENGTH = 1.3  # samples whose longest and shortest differ by no more are padded together


@dataclass(frozen=True, slots=True)
class SampleSpan:
    """Neighbouring samples of like length, with their key rows and chains."""

    samples: slice
    keys: slice
    chains: slice


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """Samples end to end, by length. Chain c at step j is compared with target row c + j, while j < steps_left_Q[c].

    A chain starts at every row t whose x_{t+1} is a response token and whose x_{t+2} exists. Sizes are Python numbers,
    so that nothing waits for the device; floating-point tensors have the dtype in which they were captured.
    """

    key_embeds_SH: Tensor  # embed(x_{t+1}) of key row t
    key_aux_SA: Tensor  # captured states of key row t
    key_position_S: Tensor  # int64: t
    chain_key_Q: Tensor  # int64: the key row where the chain starts
    chain_rank_Q: Tensor  # int64: 0, 1, .. within the sample
    chain_sample_Q: Tensor  # int64
    steps_left_Q: Tensor  # int64, at least 1
    next_token_Q: Tensor  # int64: the token that step 0 predicts
    target_hidden_QW: Tensor  # what the target's output layer read for that token
    target_head_VW: Tensor  # the output layer
    temperature_B: Tensor  # float64; 0 = greedy
    seed_B: Tensor  # int64
    num_keys: tuple[int, ...]  # by sample
    num_chains: tuple[int, ...]  # by sample, at least 1
    spans: tuple[SampleSpan, ...]

    def counts(self, depth: int) -> tuple[int, ...]:
        """Chains that are still inside their text at each of `depth` steps."""
        return tuple(sum(max(0, n - step) for n in self.num_chains) for step in range(depth))

    def ahead(self, step: int) -> Tensor:
        """Rows [Q] between a chain's start and its place at `step`; held at the last one beyond the text's end."""
        return (self.steps_left_Q - 1).clamp(max=step)

    def position_at(self, step: int) -> Tensor:
        """RoPE position [Q] of each chain's step."""
        return self.key_position_S.index_select(0, self.chain_key_Q) + self.ahead(step)


def make_batch(samples: Sequence[DraftSample], *, window: int = 0) -> DraftBatch | None:
    """Join samples in order of length (stable), without those too short to hold a chain; None when none is left.

    Raises ValueError when they come from different forwards, whose output layers may differ.
    """
    if window:
        raise NotImplementedError("draft batches of windows are not there yet")
    samples = [s for s in samples if len(s.token_ids) - s.prompt_len >= 2]
    if not samples:
        return None
    if any(s.target_head is not samples[0].target_head for s in samples):
        raise ValueError("samples of different forwards in one draft batch: each has an output layer of its own")
    samples.sort(key=lambda s: len(s.token_ids))
    device = samples[0].token_ids.device
    num_keys = tuple(len(s.token_ids) - 2 for s in samples)
    num_chains = tuple(len(s.token_ids) - s.prompt_len - 1 for s in samples)
    # Indices are computed on the CPU, where sizes are known, and sent without waiting for what the device still does.
    send = partial(torch.Tensor.to, device=device, non_blocking=True)
    num_keys_B, num_chains_B = torch.tensor(num_keys), torch.tensor(num_chains)
    _, key_position_S = _ranks(num_keys_B)
    chain_sample_Q, chain_rank_Q = _ranks(num_chains_B)
    first_chain_key_B = num_keys_B.cumsum(0) - num_chains_B
    return DraftBatch(
        key_embeds_SH=torch.cat([s.embeds[1:-1] for s in samples]),
        key_aux_SA=torch.cat([s.aux_hidden[:-2] for s in samples]),
        key_position_S=send(key_position_S),
        chain_key_Q=send(first_chain_key_B[chain_sample_Q] + chain_rank_Q),
        chain_rank_Q=send(chain_rank_Q),
        chain_sample_Q=send(chain_sample_Q),
        steps_left_Q=send(num_chains_B[chain_sample_Q] - chain_rank_Q),
        next_token_Q=torch.cat([s.token_ids[s.prompt_len + 1 :] for s in samples]),
        target_hidden_QW=torch.cat([s.target_hidden[s.prompt_len : -1] for s in samples]),
        target_head_VW=samples[0].target_head,
        temperature_B=send(torch.tensor([s.temperature for s in samples], dtype=torch.float64)),
        seed_B=send(torch.tensor([s.seed for s in samples], dtype=torch.int64)),
        num_keys=num_keys,
        num_chains=num_chains,
        spans=_spans(num_keys, num_chains),
    )


def split_by_tokens(samples: Sequence[DraftSample], most: int) -> list[list[DraftSample]]:
    """Samples in order of length (stable), cut into runs of at most `most` tokens but of at least one; 0 = one run."""
    runs: list[list[DraftSample]] = []
    tokens = 0
    for sample in sorted(samples, key=lambda s: len(s.token_ids)):
        tokens += len(sample.token_ids)
        if not runs or (most and tokens > most):
            runs.append([])
            tokens = len(sample.token_ids)
        runs[-1].append(sample)
    return runs


def _spans(num_keys: Sequence[int], num_chains: Sequence[int]) -> tuple[SampleSpan, ...]:
    """Cut ascending lengths where a sample is too long to be padded with the first of its span."""
    key_ends, chain_ends = [0, *accumulate(num_keys)], [0, *accumulate(num_chains)]
    cuts = [0]
    for index, length in enumerate(num_keys):
        if length > _LIKE_LENGTH * num_keys[cuts[-1]]:
            cuts.append(index)
    return tuple(
        SampleSpan(slice(a, b), slice(key_ends[a], key_ends[b]), slice(chain_ends[a], chain_ends[b]))
        for a, b in zip(cuts, [*cuts[1:], len(num_keys)], strict=True)
    )


def _ranks(counts_B: Tensor) -> tuple[Tensor, Tensor]:
    """For `counts_B[b]` items of each sample, end to end: the sample of every item, and its rank within it."""
    sample = torch.arange(len(counts_B)).repeat_interleave(counts_B)
    first_B = counts_B.cumsum(0) - counts_B
    return sample, torch.arange(len(sample)) - first_B[sample]
