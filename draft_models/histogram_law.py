"""The law of a text's histogram of accepted drafts, where nobody says at which tokens the verify steps started.

A step that starts at rank r and accepts n drafts is followed by one at r + n + 1 (a renewal process). What is asked of
it, an expectation over all ways to decode the text, is a recursion from its end to its beginning. The plain functions
go by steps: of each rank, over all n. The fast ones go by tokens: at a token of which the step has j drafts behind it,
in state j, the draft stands, which leads to state j + 1 at the next token, or it does not, which ends the step and
leads to state 0. All states of a token and all texts are then a few operations, however deep the engine drafts.

Axes: Q chains of all texts end to end, K draft depth, M = K + 1 accepted drafts of a step, B texts, R ranks of a text
(padded), C bets, F features; J = K + 1 states, I the same and an empty one behind them, T tokens of a stretch, from
the last of each text towards its first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

STRONGEST = 4.0  # nats that an accepted draft may win or lose a bet
_STRETCH = int(256 / STRONGEST)  # tokens after which a float64 has still not overflowed, whatever the bet


def bounds(chance: Tensor, inside: Tensor, min_effect: float) -> tuple[Tensor, Tensor]:
    """The least and the greatest chance of a sound engine; nothing stands behind the end of a text."""
    return (chance - min_effect).clamp(min=0) * inside, (chance + min_effect).clamp(max=1) * inside


def unsure(chance: Tensor, inside: Tensor, min_effect: float) -> Tensor:
    """Chances for a variance: rounding turns over up to `min_effect` of the decisions that the text makes certain."""
    return chance.clamp(min_effect, 1 - min_effect) * inside


def step_law(chance_NK: Tensor) -> Tensor:
    """P(n drafts accepted) [.., K + 1] of conditional chances by position [.., K]."""
    reach_NM = pad(chance_NK.cumprod(-1), (1, 1))
    reach_NM[..., 0] = 1.0
    return reach_NM[..., :-1] - reach_NM[..., 1:]


def step_log_norm(low_NK: Tensor, high_NK: Tensor, after_NCM: Tensor, exponent_CM: Tensor) -> Tensor:
    """log of the greatest E[exp(exponent(n) + after(n))] that chances between the bounds allow, [N, C]."""
    value_NC = after_NCM[..., -1] + exponent_CM[:, -1]
    stands_2NK1 = torch.stack((low_NK, high_NK))[..., None]
    log_2NK1, log_not_2NK1 = stands_2NK1.log(), (1 - stands_2NK1).log()
    for position in reversed(range(low_NK.shape[1])):
        rejected_NC = after_NCM[..., position] + exponent_CM[:, position]
        wins_NC = value_NC > rejected_NC  # the greater chance of what is worth more is the greatest
        log_NC = torch.where(wins_NC, log_2NK1[1, :, position], log_2NK1[0, :, position])
        log_not_NC = torch.where(wins_NC, log_not_2NK1[1, :, position], log_not_2NK1[0, :, position])
        value_NC = torch.logaddexp(log_NC + value_NC, log_not_NC + rejected_NC)
    return value_NC


# ------------------------------------------------------------ by tokens


def texts_log_norm(posterior_QK: Tensor, num_chains: Sequence[int], exponent_CM: Tensor, min_effect: float) -> Tensor:
    """log of the greatest E[exp(sum of exponent(n) over the steps)] of a sound engine, [C], all texts together.

    Args:
        posterior_QK: float64, CPU; see `forecast.accept_posterior`.
        num_chains: by text, response length - 1.
        exponent_CM: 0 for no accepted draft, at most `STRONGEST` more or less for each one more.
    """
    factor_JC = exponent_CM.T.exp()
    # A text's end is worth 1. So is a step that accepts nothing, of which those are that short texts wait with.
    worth_BIC = pad(factor_JC, (0, 0, 0, 1)).repeat(len(num_chains), 1, 1)
    log_norm_BC = torch.zeros(len(num_chains), len(exponent_CM), dtype=torch.float64)
    for chance_TBJ1, exists_TBJ1 in _stretches(posterior_QK, num_chains):
        living = slice(chance_TBJ1.shape[1])
        low_TBJ1, high_TBJ1 = bounds(chance_TBJ1, exists_TBJ1, min_effect)
        found_BIC = _worth_before(worth_BIC[living], low_TBJ1, high_TBJ1, factor_JC)
        log_norm_BC[living] += found_BIC[:, 0].log()
        worth_BIC[living] = found_BIC / found_BIC[:, :1]
    return log_norm_BC.sum(0)


def _worth_before(worth_BIC: Tensor, low_TBJ1: Tensor, high_TBJ1: Tensor, factor_JC: Tensor) -> Tensor:
    """What a bet's stake is worth at each state T tokens earlier: the greater of what both bounds make of it."""
    buffers = [worth_BIC.clone(), torch.zeros_like(worth_BIC)]
    views = [(w[:, :1], w[:, 1:], w[:, :-1]) for w in buffers]
    ends_BJC, least_BJC = torch.empty_like(views[0][2]), torch.empty_like(views[0][2])
    chances = (low_TBJ1, 1 - low_TBJ1, high_TBJ1, 1 - high_TBJ1)
    for low, not_low, high, not_high in zip(*(chance.unbind(0) for chance in chances), strict=True):
        (start, stands, _), (_, _, before) = views
        torch.mul(factor_JC, start, out=ends_BJC)
        torch.mul(ends_BJC, not_low, out=least_BJC).addcmul_(stands, low)
        torch.maximum(ends_BJC.mul_(not_high).addcmul_(stands, high), least_BJC, out=before)
        views.reverse()
    return buffers[len(low_TBJ1) % 2]


def texts_variance(posterior_QK: Tensor, num_chains: Sequence[int], feature_MF: Tensor, min_effect: float) -> Tensor:
    """Variance [F] of the sum of a feature of n over the steps, all texts together; arguments as above."""
    mean_BIF = pad(feature_MF, (0, 0, 0, 1)).repeat(len(num_chains), 1, 1)
    mean_BIF[:, 0] = 0.0  # of a text's end, where no step is
    variance_BIF = torch.zeros_like(mean_BIF)
    for chance_TBJ1, exists_TBJ1 in _stretches(posterior_QK, num_chains):
        living = slice(chance_TBJ1.shape[1])
        _spread_before(mean_BIF[living], variance_BIF[living], unsure(chance_TBJ1, exists_TBJ1, min_effect), feature_MF)
    return variance_BIF[:, 0].sum(0)


def _spread_before(mean_BIF: Tensor, variance_BIF: Tensor, chance_TBJ1: Tensor, feature_MF: Tensor) -> None:
    """Mean and variance at each state T tokens earlier, in place: the mean of the variances of both outcomes, and
    the variance of their means."""
    (mean, stands_mean, new_mean), (variance, stands_variance, new_variance) = (
        (x[:, :1], x[:, 1:], x[:, :-1]) for x in (mean_BIF, variance_BIF)
    )
    for chance_BJ1, both_BJ1 in zip(chance_TBJ1.unbind(0), (chance_TBJ1 * (1 - chance_TBJ1)).unbind(0), strict=True):
        ends_BJF = feature_MF + mean
        more_BJF = stands_mean - ends_BJF
        new_mean.copy_(ends_BJF.addcmul_(more_BJF, chance_BJ1))
        variance_BJF = torch.lerp(variance, stands_variance, chance_BJ1)
        new_variance.copy_(variance_BJF.addcmul_(more_BJF.square_(), both_BJ1))


def _stretches(posterior_QK: Tensor, num_chains: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """By tokens from the texts' ends on: each state's chance that the draft stands, and whether there is one, both
    [T, B, J, 1], of the texts that are so long. The longest come first."""
    depth = posterior_QK.shape[1]
    num_chains_B, order_B = torch.tensor(num_chains).sort(descending=True, stable=True)
    first_B = torch.tensor([0, *num_chains]).cumsum(0)[order_B]
    state_J = torch.arange(depth + 1)
    for done in range(0, int(num_chains_B[0]), _STRETCH):
        living = slice(int((num_chains_B > done).sum()))
        back_T11 = torch.arange(done + 1, min(done + _STRETCH, int(num_chains_B[0])) + 1)[:, None, None]
        rank_TBJ = num_chains_B[living, None] - back_T11 - state_J  # at which the step has started
        exists_TBJ = (rank_TBJ >= 0) & (state_J < depth)
        chain_TBJ = torch.where(exists_TBJ, first_B[living, None] + rank_TBJ, 0)
        chance_TBJ = posterior_QK[chain_TBJ, state_J.clamp(max=depth - 1)]
        yield torch.where(exists_TBJ, chance_TBJ, 0.0)[..., None], exists_TBJ[..., None]


# ------------------------------------------------------------ by steps, plainly


def texts_log_norm_plain(
    posterior_QK: Tensor, num_chains: Sequence[int], exponent_CM: Tensor, min_effect: float
) -> Tensor:
    """`texts_log_norm` in logarithms."""
    chance_BRK, inside_BRK = _by_rank(posterior_QK, num_chains)
    low_BRK, high_BRK = bounds(chance_BRK, inside_BRK, min_effect)
    num_texts, num_ranks, depth = chance_BRK.shape
    after_BCR = torch.zeros(num_texts, len(exponent_CM), num_ranks + depth + 1, dtype=torch.float64)
    for rank in reversed(range(num_ranks)):
        after_BCM = after_BCR[..., rank + 1 : rank + depth + 2]
        after_BCR[..., rank] = step_log_norm(low_BRK[:, rank], high_BRK[:, rank], after_BCM, exponent_CM)
    return after_BCR[..., 0].sum(0)


def texts_variance_plain(
    posterior_QK: Tensor, num_chains: Sequence[int], feature_MF: Tensor, min_effect: float
) -> Tensor:
    """`texts_variance`, from the law of each step."""
    chance_BRK, inside_BRK = _by_rank(posterior_QK, num_chains)
    law_BRM = step_law(unsure(chance_BRK, inside_BRK, min_effect))
    num_texts, num_ranks, width = law_BRM.shape
    mean_BRF = torch.zeros(num_texts, num_ranks + width, feature_MF.shape[1], dtype=torch.float64)
    variance_BRF = torch.zeros_like(mean_BRF)
    for rank in reversed(range(num_ranks)):
        following = slice(rank + 1, rank + 1 + width)
        law_BM1 = law_BRM[:, rank, :, None]
        value_BMF = feature_MF + mean_BRF[:, following]
        mean_BF = (law_BM1 * value_BMF).sum(1)
        spread_BMF = (value_BMF - mean_BF[:, None]) ** 2 + variance_BRF[:, following]
        exists_B1 = (rank < torch.tensor(num_chains))[:, None]  # behind a text's end there is no step
        mean_BRF[:, rank] = mean_BF * exists_B1
        variance_BRF[:, rank] = (law_BM1 * spread_BMF).sum(1) * exists_B1
    return variance_BRF[:, 0].sum(0)


def _by_rank(posterior_QK: Tensor, num_chains: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Each rank's chances and whether the text goes on so far, [B, R, K], filled up with 0."""
    left_BR = torch.tensor(num_chains)[:, None] - torch.arange(max(num_chains))
    inside_BRK = torch.arange(posterior_QK.shape[1]) < left_BR[..., None]
    chance_BRK = torch.zeros(inside_BRK.shape, dtype=torch.float64)
    chance_BRK[left_BR > 0] = posterior_QK
    return torch.where(inside_BRK, chance_BRK, 0.0), inside_BRK
