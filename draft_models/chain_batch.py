"""Rolled-out samples laid end to end, with the rows where an engine could have started to draft.

Axes: B samples, S key rows, Q chains, A captured width (3H), V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

    A chain starts at every row t whose x_{t+1} is a response token and whose x_{t+2} exists.
    """

    key_embeds_SH: Tensor  # embed(x_{t+1}) of key row t
    key_aux_SA: Tensor  # captured states of key row t
    key_sample_S: Tensor  # int64: the row's sample
    key_position_S: Tensor  # int64: t
    chain_key_Q: Tensor  # int64: the key row where the chain starts
    chain_rank_Q: Tensor  # int64: 0, 1, .. within the sample
    steps_left_Q: Tensor  # int64, at least 1
    next_token_Q: Tensor  # int64: the token that step 0 predicts
    target_logits_QV: Tensor  # the target's raw logits for that token
    temperature_B: Tensor  # float64; 0 = greedy
    seed_B: Tensor  # int64
    num_chains_B: Tensor  # int64, at least 1
    spans: tuple[SampleSpan, ...]

    @property
    def chain_sample_Q(self) -> Tensor:
        return self.key_sample_S[self.chain_key_Q]

    @property
    def chain_position_Q(self) -> Tensor:
        """The row t where each chain starts."""
        return self.key_position_S[self.chain_key_Q]


def make_batch(samples: Sequence[DraftSample]) -> DraftBatch | None:
    """Join samples in order of length (stable), without those too short to hold a chain; None when none is left."""
    samples = [s for s in samples if len(s.token_ids) - s.prompt_len >= 2]
    if not samples:
        return None
    samples.sort(key=lambda s: len(s.token_ids))
    device = samples[0].token_ids.device

    def integers(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    num_keys = [len(s.token_ids) - 2 for s in samples]
    num_chains = [len(s.token_ids) - s.prompt_len - 1 for s in samples]
    num_keys_B, num_chains_B = integers(num_keys), integers(num_chains)
    key_sample_S, key_position_S = _ranks(num_keys_B)
    chain_sample_Q, chain_rank_Q = _ranks(num_chains_B)
    first_chain_key_B = num_keys_B.cumsum(0) - num_chains_B
    return DraftBatch(
        key_embeds_SH=_at_least_float32(torch.cat([s.embeds[1:-1] for s in samples])),
        key_aux_SA=_at_least_float32(torch.cat([s.aux_hidden[:-2] for s in samples])),
        key_sample_S=key_sample_S,
        key_position_S=key_position_S,
        chain_key_Q=first_chain_key_B[chain_sample_Q] + chain_rank_Q,
        chain_rank_Q=chain_rank_Q,
        steps_left_Q=num_chains_B[chain_sample_Q] - chain_rank_Q,
        next_token_Q=torch.cat([s.token_ids[s.prompt_len + 1 :] for s in samples]),
        target_logits_QV=_at_least_float32(torch.cat([s.target_logits[s.prompt_len : -1] for s in samples])),
        temperature_B=torch.tensor([s.temperature for s in samples], dtype=torch.float64, device=device),
        seed_B=integers([s.seed for s in samples]),
        num_chains_B=num_chains_B,
        spans=_spans(num_keys, num_chains),
    )


def _at_least_float32(x: Tensor) -> Tensor:
    """A draft is trained in float32 whatever its policy computes in; float64 stays, for tests."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


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
    sample = torch.arange(len(counts_B), device=counts_B.device).repeat_interleave(counts_B)
    first_B = counts_B.cumsum(0) - counts_B
    return sample, torch.arange(len(sample), device=counts_B.device) - first_B[sample]
