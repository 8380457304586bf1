"""Rolled-out samples laid end to end, with the rows where an engine could have started to draft.

Axes: B samples, S key rows, Q chains, A captured width (3H), W width of what the target's output layer reads, V target
vocabulary, K unroll steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    so that nothing waits for the device; floating-point tensors have the dtype in which they were captured. Cut into
    windows, each window stands as a sample of its own.
    """

    key_embeds_SH: Tensor  # embed(x_{t+1}) of key row t
    key_aux_SA: Tensor  # captured states of key row t
    key_position_S: Tensor  # int64: t, counted from the window's start
    chain_key_Q: Tensor  # int64: the key row where the chain starts
    chain_rank_Q: Tensor  # int64: 0, 1, .. within the sample
    chain_sample_Q: Tensor  # int64
    steps_left_Q: Tensor  # int64, at least 1
    next_token_Q: Tensor  # int64: the token that step 0 predicts
    next_index_Q: Tensor  # int64: its index in the whole text
    weight_Q: Tensor | None  # of that token in the loss; None = all 1
    total_weight: float  # of all chains: what a sum over them is divided by for their mean
    target_hidden_QW: Tensor  # what the target's output layer read for that token
    target_head_VW: Tensor  # the output layer
    temperature_B: Tensor  # float64; 0 = greedy
    seed_B: Tensor  # int64
    sample_keys: tuple[tuple[int, int], ...]  # (prompt_id, sample_id)
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

    Args:
        samples: all of one forward.
        window: cut each text into windows of so many tokens, as trainers do that hold no long text: a chain sees its
            own window alone, at positions counted from its start. Windows overlap by two tokens, so that no chain is
            lost, though chains end at their window's end. 0 = whole texts.

    Raises ValueError for samples of different forwards, whose output layers may differ, and for a window below 3.
    """
    if window and window < 3:
        raise ValueError(f"a window of {window} tokens holds no chain: give at least 3, or 0 for whole texts")
    cuts = [cut for sample in samples for cut in _cut(sample, window) if cut.num_chains > 0]
    if not cuts:
        return None
    head_VW, weight_Q = cuts[0].sample.target_head, _weights(cuts)
    if any(cut.sample.target_head is not head_VW for cut in cuts):
        raise ValueError("samples of different forwards in one draft batch: each has an output layer of its own")
    cuts.sort(key=lambda cut: cut.num_keys)
    device = head_VW.device
    num_keys, num_chains = tuple(cut.num_keys for cut in cuts), tuple(cut.num_chains for cut in cuts)
    # Indices are computed on the CPU, where sizes are known, and sent without waiting for what the device still does.
    send = partial(torch.Tensor.to, device=device, non_blocking=True)
    num_keys_B, num_chains_B = torch.tensor(num_keys), torch.tensor(num_chains)
    _, key_position_S = _ranks(num_keys_B)
    chain_sample_Q, chain_rank_Q = _ranks(num_chains_B)
    first_chain_key_B = num_keys_B.cumsum(0) - num_chains_B
    first_chain_B = torch.tensor([cut.first_chain for cut in cuts])
    return DraftBatch(
        key_embeds_SH=torch.cat([cut.sample.embeds[cut.start + 1 : cut.stop - 1] for cut in cuts]),
        key_aux_SA=torch.cat([cut.sample.aux_hidden[cut.start : cut.stop - 2] for cut in cuts]),
        key_position_S=send(key_position_S),
        chain_key_Q=send(first_chain_key_B[chain_sample_Q] + chain_rank_Q),
        chain_rank_Q=send(chain_rank_Q),
        chain_sample_Q=send(chain_sample_Q),
        steps_left_Q=send(num_chains_B[chain_sample_Q] - chain_rank_Q),
        next_token_Q=torch.cat([cut.sample.token_ids[cut.first_chain + 2 : cut.stop] for cut in cuts]),
        next_index_Q=send(first_chain_B[chain_sample_Q] + chain_rank_Q + 2),
        weight_Q=None if weight_Q is None else send(weight_Q),
        total_weight=float(sum(num_chains) if weight_Q is None else weight_Q.sum(dtype=torch.float64)),
        target_hidden_QW=torch.cat([cut.sample.target_hidden[cut.first_chain + 1 : cut.stop - 1] for cut in cuts]),
        target_head_VW=head_VW,
        temperature_B=send(torch.tensor([cut.sample.temperature for cut in cuts], dtype=torch.float64)),
        seed_B=send(torch.tensor([cut.sample.seed for cut in cuts], dtype=torch.int64)),
        sample_keys=tuple((cut.sample.prompt_id, cut.sample.sample_id) for cut in cuts),
        num_keys=num_keys,
        num_chains=num_chains,
        spans=_spans(num_keys, num_chains),
    )


@dataclass(frozen=True, slots=True)
class _Cut:
    """Tokens `start` to `stop` of a sample, trained on as a text of their own."""

    sample: DraftSample
    start: int
    stop: int

    @property
    def num_keys(self) -> int:
        return self.stop - self.start - 2

    @property
    def first_chain(self) -> int:
        """Its row in the whole text."""
        return max(self.sample.prompt_len - 1, self.start)

    @property
    def num_chains(self) -> int:
        return self.stop - 2 - self.first_chain

    @property
    def next_token_weights(self) -> Tensor:
        """[C] on any device; ones where the sample has none."""
        weight_R = self.sample.token_weights
        if weight_R is None:
            return torch.ones(self.num_chains)
        first = self.first_chain + 2 - self.sample.prompt_len
        return weight_R[first : first + self.num_chains]


def _weights(cuts: Sequence[_Cut]) -> Tensor | None:
    if all(cut.sample.token_weights is None for cut in cuts):
        return None
    return torch.cat([cut.next_token_weights for cut in cuts])


def _cut(sample: DraftSample, window: int) -> Iterator[_Cut]:
    length = len(sample.token_ids)
    if not window or length <= window:
        yield _Cut(sample, 0, length)
        return
    for start in range(0, length - 2, window - 2):
        yield _Cut(sample, start, min(start + window, length))


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
