"""One packed micro-batch of the policy, and the loss on it.

Axes: T packed tokens, R response tokens of the micro-batch, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist

from rollout_engine.types import Sample
from trainer import losses
from trainer.config import AlgorithmConfig
from trainer.policy_layout import RankLayout

# what a micro-batch reports: sums over response tokens, and maxima
SUM_NAMES = (
    *("loss", "entropy", "clip_frac", "kl", "logp_diff_mean", "ratio_mean", "tis_mean", "tis_clip_frac"),
    *("surprise_gap", "surprise_gap_squared"),
)
MAX_NAMES = ("logp_diff_max", "ratio_max", "tis_max")


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Whole sequences one after another; `sample_indices` point into the update's ordered samples.

    `lengths` has one entry per sequence and, when the tokens are padded up to a multiple, one more for the padding,
    which is a sequence of its own and has no response.
    """

    sample_indices: tuple[int, ...]
    lengths: tuple[int, ...]
    num_responses: tuple[int, ...]  # response tokens of each sample
    ends: torch.Tensor  # int32 [len(lengths) + 1]: 0, then one past each sequence
    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    rows_R: torch.Tensor  # where the logits of each response token are
    targets_R: torch.Tensor
    temperature_R: torch.Tensor
    advantages_R: torch.Tensor
    rollout_logp_R: torch.Tensor

    @property
    def spans(self) -> dict[int, tuple[int, int]]:
        """First and one-past-last row of each sample."""
        ends = accumulate(self.lengths)
        return {i: (end - n, end) for i, end, n in zip(self.sample_indices, ends, self.lengths, strict=False)}

    def per_sample(self, values_R: torch.Tensor) -> dict[int, torch.Tensor]:
        return dict(zip(self.sample_indices, values_R.split(self.num_responses), strict=True))

    def per_token(self, values: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Inverse of `per_sample`: [R]."""
        return torch.cat([values[i] for i in self.sample_indices])


def sequence_length(sample: Sample) -> int:
    return len(sample.request.prompt_ids) + len(sample.token_ids)


def make_micro_batch(
    samples: Sequence[Sample], indices: Sequence[int], pad_to_multiple: int, device: torch.device
) -> MicroBatch:
    """Packs `samples[i]` for i in `indices`. Without any it is a micro-batch of padding alone, with an empty loss."""
    tokens: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    lengths = []
    for i in indices:
        sample = samples[i]
        prompt_len, length = len(sample.request.prompt_ids), sequence_length(sample)
        # the logits of row t are the law of token t + 1
        rows += range(len(tokens) + prompt_len - 1, len(tokens) + length - 1)
        tokens += [*sample.request.prompt_ids, *sample.token_ids]
        positions += range(length)
        lengths.append(length)
    padding = -len(tokens) % pad_to_multiple or (0 if tokens else pad_to_multiple)
    if padding:
        tokens += [0] * padding
        positions += range(padding)
        lengths.append(padding)

    chosen = [samples[i] for i in indices]
    counts = tuple(len(s.token_ids) for s in chosen)

    def per_response_token(values: Sequence[float]) -> torch.Tensor:
        repeated = torch.tensor(values, dtype=torch.float32).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
        return repeated.to(device)

    return MicroBatch(
        sample_indices=tuple(indices),
        lengths=tuple(lengths),
        num_responses=counts,
        ends=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
        tokens_T=torch.tensor(tokens, device=device),
        positions_T=torch.tensor(positions, device=device),
        rows_R=torch.tensor(rows, dtype=torch.int64, device=device),
        targets_R=torch.tensor([t for s in chosen for t in s.token_ids], dtype=torch.int64, device=device),
        temperature_R=per_response_token([s.request.sampling.temperature or 1.0 for s in chosen]),  # greedy: 1
        advantages_R=per_response_token([s.advantage for s in chosen]),
        rollout_logp_R=torch.tensor([x for s in chosen for x in s.logprobs], dtype=torch.float32, device=device),
    )


@dataclass(frozen=True, slots=True)
class Report:
    """What the last stage says about one micro-batch; nothing here carries a gradient."""

    sample_indices: tuple[int, ...]
    num_tokens: int
    sums: torch.Tensor  # float64, SUM_NAMES
    maxima: torch.Tensor  # float64, MAX_NAMES
    log_probs: dict[int, torch.Tensor]  # sample -> [its response tokens]

    @property
    def loss(self) -> torch.Tensor:
        return self.sums[SUM_NAMES.index("loss")]


def policy_loss(
    batch: MicroBatch,
    logp_R: torch.Tensor,
    entropy_R: torch.Tensor,
    old_logp_R: torch.Tensor | None,
    ref_logp_R: torch.Tensor | None,
    algorithm: AlgorithmConfig,
) -> tuple[torch.Tensor, Report]:
    """The SUM over the micro-batch's response tokens; the division by the global token count comes with the gradients.

    `old_logp_R` is None when these weights served the rollout (one optimizer step per rollout).
    """
    served_R = logp_R.detach() if old_logp_R is None else old_logp_R
    loss_R, ratio_R, clipped_R = losses.clipped_policy_loss(
        logp_R, served_R, batch.advantages_R, algorithm.eps_clip, algorithm.eps_clip_high
    )
    weights_R = torch.ones_like(served_R)
    if algorithm.use_tis:
        weights_R = losses.tis_weights(served_R, batch.rollout_logp_R, algorithm.tis_clip)
        loss_R = loss_R * weights_R
    kl_R = torch.zeros_like(served_R)
    if ref_logp_R is not None:
        kl_R = losses.kl_to_reference(logp_R, ref_logp_R, algorithm.kl_loss_type)
        loss_R = loss_R + algorithm.kl_loss_coef * kl_R
    if algorithm.entropy_coef:
        loss_R = loss_R - algorithm.entropy_coef * entropy_R

    diff_R = (served_R - batch.rollout_logp_R).abs()
    # With old log-probs the entropy at hand is another version's than the one that sampled.
    gap_R = -served_R - entropy_R if old_logp_R is None else torch.zeros_like(served_R)
    rule_R = (loss_R, entropy_R, clipped_R, kl_R, diff_R, ratio_R, weights_R, weights_R >= algorithm.tis_clip)
    summed = (*rule_R, gap_R, gap_R.double().square())
    report = Report(
        batch.sample_indices,
        logp_R.numel(),
        torch.stack([x.detach().double().sum() for x in summed]),
        torch.stack([x.detach().double().max() for x in (diff_R, ratio_R, weights_R)]),
        batch.per_sample(logp_R.detach()),
    )
    return loss_R.sum(), report


def empty_report(device: torch.device) -> Report:
    """For a micro-batch without response tokens."""
    sums = torch.zeros(len(SUM_NAMES), dtype=torch.float64, device=device)
    return Report((), 0, sums, torch.zeros(len(MAX_NAMES), dtype=torch.float64, device=device), {})


def reduce_reports(reports: Sequence[Report], layout: RankLayout) -> dict[str, float]:
    """Token-weighted means, and maxima, over all micro-batches, steps and ranks; the same on every rank. Collective.

    Reports exist on the last pipeline stage; the earlier ones are sent the result.
    """
    sums = torch.zeros(1 + len(SUM_NAMES), dtype=torch.float64, device=layout.device)
    maxima = torch.zeros(len(MAX_NAMES), dtype=torch.float64, device=layout.device)
    for report in reports:
        sums[0] += report.num_tokens
        sums[1:] += report.sums
        maxima = torch.maximum(maxima, report.maxima)
    dist.all_reduce(sums, group=layout.dp.group)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=layout.dp.group)
    if layout.pp.size > 1:
        for values in (sums, maxima):
            dist.broadcast(values, group=layout.pp.group, group_src=layout.pp.size - 1)
    num_tokens, *totals = sums.tolist()
    by_name = dict(zip(SUM_NAMES, totals, strict=True))
    surprise = surprise_metrics(num_tokens, by_name.pop("surprise_gap"), by_name.pop("surprise_gap_squared"))
    means = {name: total / num_tokens for name, total in by_name.items()}
    return {"num_tokens": num_tokens} | means | dict(zip(MAX_NAMES, maxima.tolist(), strict=True)) | surprise


def surprise_metrics(num_tokens: float, gap_sum: float, squared_sum: float) -> dict[str, float]:
    """Whether the rollout sampled from the policy's own law: the mean of -log p(x) - H(p) over tokens, nats, and its z.

    With x drawn from p, a token's gap has mean 0 given all tokens before it, so that z is nearly a standard normal
    however alike the responses are. A biased engine (a lossy verification, stale weights) drifts away from 0;
    log-probs alone cannot show it, since a token that was wrongly drawn has a right log-prob. Top-p, top-k, min-p and
    greedy decoding make it negative by right. Empty when no gap is known.
    """
    if squared_sum == 0:
        return {}
    return {"surprise_gap": gap_sum / num_tokens, "surprise_gap_z": gap_sum / squared_sum**0.5}
