"""What a draft is worth on given text, for every rule and depth at once, in expectation and without random numbers.

One forward of the unrolled draft gives its law q beside the target's p at every row and step; from these follow, for
every rule, the chance that a token of the text came from an accepted draft, and by the renewal recursion of
`draft_models.forecast` what an engine would show. The coupled rule is averaged over its noise: both sides take the
argmax under the same Gumbel noise, so P(both take x) = 1 / sum_y max(p_y / p_x, q_y / q_x), whatever noise the text was
really drawn with.

Axes: Q chains of a batch, c target rows of a piece, K draft steps, V target vocabulary.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from draft_models.eagle3 import Eagle3
from draft_models.forecast import AcceptForecast, forecast_acceptance
from draft_models.layers import FAST, MixedNumerics, Numerics
from draft_models.training import DraftBatch, make_batch, unroll
from draft_models.types import DraftSample, VerifyRule
from draft_models.verify import accept_probability, expand_draft_vocab

RULES = (VerifyRule.TARGET_ONLY, VerifyRule.REJECTION, VerifyRule.COUPLED)
_PIECE_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}  # of [c, V]: one draft step at a time
_TOKENS_AT_ONCE = 16384  # of one forward of the draft; bounds the states that are held
RANK_EDGES = (64, 256, 512)  # response tokens, where `accept_length_by_rank` is cut


@dataclass(frozen=True, slots=True)
class StepFigures:
    """Means over the rows of a text, by draft step."""

    kl: tuple[float, ...]  # KL(p || q), nats; infinite with a reduced vocabulary, then left out: ()
    overlap: tuple[float, ...]  # sum min(p, q) = 1 - TV: what the rejection rule accepts
    top1: tuple[float, ...]  # p(argmax q): what target-only accepts


@dataclass(frozen=True, slots=True)
class DraftScores:
    """One draft on one text."""

    forecasts: dict[tuple[VerifyRule, int], AcceptForecast]  # by rule and depth k
    steps: StepFigures
    accept_length_by_rank: dict[VerifyRule, tuple[float | None, ...]]  # at the largest k, cut at RANK_EDGES


def accept_rates(forecast: AcceptForecast) -> list[float]:
    """By position, the share of verify steps in which that draft stands: an engine's own count."""
    proposed = zip(forecast.accepted_by_position, forecast.proposed_by_position, strict=True)
    return [accepted / count for accepted, count in proposed]


def chain_rates(forecast: AcceptForecast) -> list[float]:
    """By position, how often a draft stands when all before it did; ends where none is reached."""
    reached = (forecast.num_verify_steps, *forecast.accepted_by_position)
    return [now / before for before, now in itertools.pairwise(reached) if before > 0]


@torch.no_grad()
def score(
    draft: Eagle3,
    samples: Sequence[DraftSample],
    asked: Sequence[tuple[VerifyRule, int]],
    *,
    product_dtype: torch.dtype | None = None,
) -> DraftScores:
    """Scores on texts of one temperature for the (rule, k) asked for. At temperature 0 every rule is greedy.

    Raises ValueError when no text has the two response tokens that drafting takes.
    """
    depth = max(k for _, k in asked)
    batches = list(_batches(samples))
    if not batches:
        raise ValueError("all responses are shorter than two tokens: there is nothing to draft")
    tables = [_tables(draft, batch, depth, product_dtype) for batch in batches]
    num_chains = [count for batch in batches for count in batch.num_chains]
    rank_Q = torch.cat([batch.chain_rank_Q for batch in batches]).cpu()
    posterior_QK = {
        rule: torch.cat([table.posterior_QK[rule] for table in tables]).cpu()
        for rule in dict.fromkeys(r for r, _ in asked)
    }
    counts_K = torch.tensor([batch.counts(depth) for batch in batches], dtype=torch.float64).sum(0)
    sums_FK = torch.stack([table.sums_FK for table in tables]).sum(0).cpu()
    kl, overlap, top1 = (tuple(row_K.tolist()) for row_K in (sums_FK / counts_K)[:, counts_K > 0])
    return DraftScores(
        {(rule, k): forecast_acceptance(posterior_QK[rule], num_chains, k) for rule, k in asked},
        StepFigures(kl if all(map(math.isfinite, kl)) else (), overlap, top1),
        {rule: _by_rank(table_QK, rank_Q) for rule, table_QK in posterior_QK.items()},
    )


def coupled_posterior(p_nV: Tensor, q_nV: Tensor, token_n: Tensor) -> Tensor:
    """Chance [n] that the draft takes the token that the target took, under shared Gumbel noise.

    P(both take x) / p_x. Each side takes the first of V exponential clocks, those of one token sharing their noise, so
    that both take x with probability 1 / sum_y max(p_y / p_x, q_y / q_x) (Daliri, Musco & Suresh 2024).
    """
    p_n1, q_n1 = (law.gather(1, token_n[:, None]) for law in (p_nV, q_nV))
    # Next to a q_x that has all but underflowed the ratio is infinite: a token that is never drafted is no rival then.
    drafted_nV = torch.where(q_nV > 0, q_nV * (p_n1 / q_n1), 0.0)
    rivals_n = torch.maximum(p_nV, drafted_nV).sum(-1)
    return torch.where(q_n1[:, 0] > 0, 1.0 / rivals_n, 0.0)


def law_statistics(samples: Sequence[DraftSample]) -> dict[str, float]:
    """Of the target's law at the response tokens and the rollout's temperature (1 for greedy): means over tokens.

    Entropy in nats; E[max p], the most that target-only can accept; E[sum p^2], what a sibling's token drawn from the
    same law would match.
    """
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for sample in samples:
        logits_RV = sample.target_logits[sample.prompt_len - 1 : -1].float() / (sample.temperature or 1.0)
        p_RV = logits_RV.softmax(-1)
        figures = (-torch.xlogy(p_RV, p_RV).sum(-1), p_RV.amax(-1), p_RV.square().sum(-1))
        sums += torch.stack([figure_R.sum(dtype=torch.float64) for figure_R in figures]).cpu()
        count += len(p_RV)
    entropy, max_prob, square = (sums / max(count, 1)).tolist()
    return {"target_entropy": entropy, "target_max_prob": max_prob, "target_sum_p2": square}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line through the points."""
    return statistics.linear_regression(x, y).slope


# ---- one batch ----


def _batches(samples: Sequence[DraftSample]) -> Iterator[DraftBatch]:
    """Texts of like length together, a bounded number of tokens at once."""
    part: list[DraftSample] = []
    tokens = 0
    for sample in sorted(samples, key=lambda s: len(s.token_ids)):
        if part and tokens + len(sample.token_ids) > _TOKENS_AT_ONCE:
            yield from filter(None, [make_batch(part)])
            part, tokens = [], 0
        part.append(sample)
        tokens += len(sample.token_ids)
    yield from filter(None, [make_batch(part)])


@dataclass(frozen=True, slots=True)
class _Tables:
    posterior_QK: dict[VerifyRule, Tensor]  # 0 beyond the end of a chain's text
    sums_FK: Tensor  # float64: of KL, overlap and top1 over the rows that a chain meets at that step


def _tables(draft: Eagle3, batch: DraftBatch, depth: int, product_dtype: torch.dtype | None) -> _Tables:
    numerics = FAST if product_dtype is None else MixedNumerics(product_dtype)
    num_rows, device = len(batch.next_token_Q), batch.next_token_Q.device
    # Step j of a chain meets target row chain + j: rolled by j, all steps of a row stand together.
    states = [state_QH.roll(step, 0) for step, state_QH in enumerate(unroll(draft, batch, depth, numerics))]
    figures_FKQ = torch.zeros(3, depth, num_rows, device=device)
    posterior_KQ = {rule: torch.zeros(depth, num_rows, device=device) for rule in VerifyRule}
    temperature_Q1 = batch.temperature_B[batch.chain_sample_Q, None].float()
    is_greedy = bool((temperature_Q1 == 0).all())
    scale_Q1 = torch.where(temperature_Q1 == 0, 1.0, temperature_Q1)
    piece = max(1, _PIECE_ELEMENTS[device.type] // len(batch.target_head_VW))
    for start in range(0, num_rows, piece):
        rows = slice(start, start + piece)
        logits_cV = F.linear(batch.target_hidden_QW[rows], batch.target_head_VW)
        p_cV, token_c = (logits_cV.float() / scale_Q1[rows]).softmax(-1), batch.next_token_Q[rows]
        for step, state_QH in enumerate(states):
            q_cV = _draft_law(draft, state_QH[rows], scale_Q1[rows], numerics)
            figures_FKQ[:, step, rows] = _figures(p_cV, q_cV)
            for rule, value_c in _posteriors(p_cV, q_cV, token_c, is_greedy=is_greedy).items():
                posterior_KQ[rule][step, rows] = value_c
    inside_KQ = batch.chain_rank_Q >= torch.arange(depth, device=device)[:, None]
    by_chain = {
        rule: torch.stack([row_Q.roll(-j, 0) for j, row_Q in enumerate(torch.where(inside_KQ, table_KQ, 0.0))], dim=1)
        for rule, table_KQ in posterior_KQ.items()
    }
    return _Tables(by_chain, torch.where(inside_KQ, figures_FKQ, 0.0).sum(-1, dtype=torch.float64))


def _draft_law(draft: Eagle3, state_cH: Tensor, scale_c1: Tensor, numerics: Numerics) -> Tensor:
    """The draft's law [c, V] over the target's vocabulary at the temperature."""
    q_cR = (draft.logits(state_cH, numerics).float() / scale_c1).softmax(-1)
    ids_R = draft.target_ids
    return q_cR if ids_R is None else expand_draft_vocab(q_cR, ids_R, draft.config.vocab_size)


def _figures(p_cV: Tensor, q_cV: Tensor) -> Tensor:
    kl_c = (torch.xlogy(p_cV, p_cV) - torch.xlogy(p_cV, q_cV)).sum(-1)
    top1_c = p_cV.gather(1, q_cV.argmax(-1, keepdim=True))[:, 0]
    return torch.stack((kl_c, torch.minimum(p_cV, q_cV).sum(-1), top1_c))


def _posteriors(p_cV: Tensor, q_cV: Tensor, token_c: Tensor, *, is_greedy: bool) -> dict[VerifyRule, Tensor]:
    """Chance [c] that the text's token came from an accepted draft, given that drafting got there."""
    is_best_c = (q_cV.argmax(-1) == token_c).float()
    if is_greedy:
        return dict.fromkeys(VerifyRule, is_best_c)
    p_c, q_c = (law.gather(1, token_c[:, None])[:, 0] for law in (p_cV, q_cV))
    return {
        VerifyRule.TARGET_ONLY: is_best_c,
        VerifyRule.REJECTION: accept_probability(q_c, p_c).nan_to_num(0.0),  # q min(1, p/q) out of p
        VerifyRule.COUPLED: coupled_posterior(p_cV, q_cV, token_c),
    }


def _by_rank(posterior_QK: Tensor, rank_Q: Tensor) -> tuple[float | None, ...]:
    """Tokens per verification that starts at a place of the response, by place; None where there is none."""
    accepted_Q = posterior_QK.double().cumprod(-1).sum(-1)
    bucket_Q = torch.bucketize(rank_Q, torch.tensor(RANK_EDGES), right=True)
    means = [accepted_Q[bucket_Q == bucket] for bucket in range(len(RANK_EDGES) + 1)]
    return tuple(1.0 + part.mean().item() if len(part) else None for part in means)
