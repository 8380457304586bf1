"""Losses and acceptance measures of a draft, as pure functions of logits and probabilities.

Axes: N rows, V target vocabulary, D draft vocabulary; draft logits may carry further axes in front. With a reduced
vocabulary `target_ids_D` gives the target id of every draft id; None means that the two vocabularies are one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from draft_models.types import VerifyRule


class LossKind(StrEnum):
    """What a draft is trained to minimise."""

    FORWARD_KL = "forward_kl"
    REVERSE_KL = "reverse_kl"
    TV = "tv"
    LK = "lk"
    CROSS_ENTROPY = "cross_entropy"
    HARD_LABEL = "hard_label"


def resolve_loss(name: str, rule: VerifyRule) -> LossKind:
    """The loss called `name`; "auto" is the one that matches the rule. Raises ValueError for an unknown name."""
    return LossKind.FORWARD_KL if name == "auto" else LossKind(name)


@dataclass(frozen=True, slots=True)
class SoftTarget:
    """The target's law at N positions as the draft is compared with it."""

    learn_ND: Tensor  # what the draft should say: p over the draft vocabulary, renormalised
    accept_ND: Tensor  # what acceptance sees: p at the draft's tokens, NOT renormalised
    entropy_N: Tensor  # of learn_ND, in nats


def soft_target(logits_NV: Tensor, target_ids_D: Tensor | None) -> SoftTarget:
    """Target law from logits that are already divided by the temperature."""
    p_NV = logits_NV.softmax(-1)
    if target_ids_D is None:
        learn_ND = accept_ND = p_NV
    else:
        accept_ND = p_NV[:, target_ids_D]
        # Over the draft's tokens only: a softmax of its own cannot divide by a mass that underflowed.
        learn_ND = logits_NV[:, target_ids_D].softmax(-1)
    return SoftTarget(learn_ND, accept_ND, -torch.xlogy(learn_ND, learn_ND).sum(-1))


@dataclass(frozen=True, slots=True)
class Comparison:
    """What one row of draft logits says against the target, [..., N] each.

    `overlap` is sum min(p, q), what the rejection rule accepts (1 - TV; the coupled rule at least
    (1 - TV) / (1 + TV)). `top1` is p(argmax q), what target-only accepts. `agree` is 1 where argmax p = argmax q; it
    looks at the draft's tokens only.
    """

    kl: Tensor  # KL(p || q) in nats, zero only where the draft equals the target
    overlap: Tensor
    top1: Tensor
    agree: Tensor
    grad: Tensor  # [..., N, D]: of `kl` with respect to the logits


def compare(draft_logits: Tensor, target: SoftTarget) -> Comparison:
    """Draft logits [..., N, D], divided by the temperature, against the target; no autograd is needed or recorded."""
    with torch.no_grad():
        log_q = draft_logits.log_softmax(-1)
        kl = -(target.learn_ND * log_q).sum(-1) - target.entropy_N
        best = log_q.argmax(-1, keepdim=True)
        top1 = target.accept_ND.expand_as(log_q).gather(-1, best)[..., 0]
        q = log_q.exp_()
        return Comparison(
            kl=kl,
            overlap=torch.minimum(q, target.accept_ND).sum(-1),
            top1=top1,
            agree=(top1 >= target.accept_ND.amax(-1)).to(q.dtype),
            grad=q.sub_(target.learn_ND),
        )
