"""Losses and acceptance measures of a draft, as pure functions of logits and probabilities.

Axes: N rows, V target vocabulary, D draft vocabulary. With a reduced vocabulary `target_ids_D` gives the target id of
every draft id; None means that the two vocabularies are one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SoftTarget:
    """The target's law at N positions as the draft is compared with it."""

    learn_ND: Tensor  # what the draft should say: p over the draft vocabulary, renormalised
    accept_ND: Tensor  # what acceptance sees: p at the draft's tokens, NOT renormalised
    entropy_N: Tensor  # of learn_ND, in nats

    def rows(self, index: Tensor) -> SoftTarget:
        learn_ND = self.learn_ND[index]
        accept_ND = learn_ND if self.accept_ND is self.learn_ND else self.accept_ND[index]
        return SoftTarget(learn_ND, accept_ND, self.entropy_N[index])


def soft_target(logits_NV: Tensor, temperature_N1: Tensor, target_ids_D: Tensor | None) -> SoftTarget:
    """Target law from raw logits at temperatures [N, 1], all above 0."""
    p_NV = (logits_NV / temperature_N1).softmax(-1)
    if target_ids_D is None:
        learn_ND = accept_ND = p_NV
    else:
        accept_ND = p_NV[:, target_ids_D]
        # Over the draft's tokens only: a softmax of its own cannot divide by a mass that underflowed.
        learn_ND = (logits_NV[:, target_ids_D] / temperature_N1).softmax(-1)
    return SoftTarget(learn_ND, accept_ND, -torch.xlogy(learn_ND, learn_ND).sum(-1))


def forward_kl(draft_logits_ND: Tensor, target: SoftTarget) -> Tensor:
    """KL(p || softmax(draft logits)) per row, [N] in nats; logits already divided by the temperature.

    Differentiable in the draft's logits alone, and zero only where the draft equals the target.
    """
    cross_entropy_N = draft_logits_ND.logsumexp(-1) - (target.learn_ND * draft_logits_ND).sum(-1)
    return cross_entropy_N - target.entropy_N


@dataclass(frozen=True, slots=True)
class AcceptanceSums:
    """Sums over the N rows of one unroll step, float64 [3]: divide by `count` for means.

    `overlap` is sum min(p, q), what the rejection rule accepts (1 - TV; the coupled rule at least
    (1 - TV) / (1 + TV)). `top1` is p(argmax q), what target-only accepts. `agree` counts argmax p = argmax q.
    """

    overlap: Tensor
    top1: Tensor
    agree: Tensor


def acceptance_sums(draft_logits_ND: Tensor, target: SoftTarget) -> AcceptanceSums:
    """Chance of acceptance by rule, summed over rows; no gradient. `agree` looks at the draft's tokens only."""
    with torch.no_grad():
        q_ND = draft_logits_ND.softmax(-1)
        best_N1 = draft_logits_ND.argmax(-1, keepdim=True)
        top_p_N1 = target.accept_ND.gather(1, best_N1)
        return AcceptanceSums(
            overlap=torch.minimum(q_ND, target.accept_ND).sum(dtype=torch.float64),
            top1=top_p_N1.sum(dtype=torch.float64),
            agree=(top_p_N1 >= target.accept_ND.amax(-1, keepdim=True)).sum(dtype=torch.float64),
        )
