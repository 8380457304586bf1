"""Losses and acceptance measures of a draft, as pure functions of logits and probabilities.

Every loss comes with its gradient with respect to the draft's logits, written out: the head's loss is computed piece by
piece and keeps no logits for autograd. Each fits a way to verify (see `VerifyRule` and `resolve_loss`):

| loss | of one row | pulls towards |
|---|---|---|
| forward KL | sum p log(p / q) | the whole law, what the draft says too rarely first |
| reverse KL | sum q log(q / p) | one mode; what the draft says too often first |
| TV | 1 - sum min(p, q) | what the rejection rule accepts, itself; its gradient vanishes where p and q hardly meet |
| LK | w KL + (1 - w) TV, w = exp(-3 sum min(p, q)) | KL far from the target, TV near it (arXiv 2602.23881) |
| cross-entropy | -sum p log q | as forward KL, but a row counts by the mass of p that the draft can say at all |
| hard label | -log q(x) | the token that was emitted, whatever else was likely |

With a reduced vocabulary the two KLs take p renormalised over the draft's tokens; acceptance, TV and cross-entropy take
it as it is, because that is what verification sees.

Axes: N rows, V target vocabulary, D draft vocabulary; draft logits may carry further axes in front. With a reduced
vocabulary `target_ids_D` gives the target id of every draft id; None means that the two vocabularies are one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from draft_models.types import VerifyRule

_SORTED_ELEMENTS = 1 << 24  # probabilities sorted at once for the coupled rule; bounds memory
_UNIT = 1 << 52  # of probabilities as whole numbers
_LK_RATE = 3.0  # of the paper: at an overlap of 0.23 half of the loss is TV, at 0.9 all but 7 %


class LossKind(StrEnum):
    """What a draft is trained to minimise; the module's first lines say what each is."""

    FORWARD_KL = "forward_kl"
    REVERSE_KL = "reverse_kl"
    TV = "tv"
    LK = "lk"
    CROSS_ENTROPY = "cross_entropy"
    HARD_LABEL = "hard_label"


def resolve_loss(name: str, rule: VerifyRule) -> LossKind:
    """The loss called `name`; "auto" is the one that matches the rule. Raises ValueError for an unknown name.

    Rejection and coupled accept by the overlap of the two laws. LK raises it itself, but forward KL raised it faster
    in each of three seeds (docs/drafters.md), and how fast a draft learns is what counts in a run. Target-only and
    greedy accept the draft's argmax by the target's law: p(argmax q) has no gradient, and cross-entropy on p puts the
    argmax right.
    """
    if name != "auto":
        return LossKind(name)
    return LossKind.FORWARD_KL if rule in (VerifyRule.REJECTION, VerifyRule.COUPLED) else LossKind.CROSS_ENTROPY


@dataclass(frozen=True, slots=True)
class SoftTarget:
    """The target's law at N positions as the draft is compared with it."""

    learn_ND: Tensor  # what the draft should say: p over the draft vocabulary, renormalised
    accept_ND: Tensor  # what acceptance sees: p at the draft's tokens, NOT renormalised
    entropy_N: Tensor  # of learn_ND, in nats
    best_N: Tensor  # the highest p over the target's whole vocabulary
    log_learn_ND: Tensor | None = None  # for reverse KL, which needs it where p underflows

    def at(self, rows: Tensor) -> SoftTarget:
        """Some of the rows [n]."""
        log_learn = None if self.log_learn_ND is None else self.log_learn_ND[rows]
        return SoftTarget(self.learn_ND[rows], self.accept_ND[rows], self.entropy_N[rows], self.best_N[rows], log_learn)


def soft_target(logits_NV: Tensor, target_ids_D: Tensor | None, *, with_log: bool = False) -> SoftTarget:
    """Target law from logits that are already divided by the temperature; `with_log` for reverse KL."""
    p_NV = logits_NV.softmax(-1)
    draft_logits_ND = logits_NV if target_ids_D is None else logits_NV[:, target_ids_D]
    if target_ids_D is None:
        learn_ND = accept_ND = p_NV
    else:
        accept_ND = p_NV[:, target_ids_D]
        # Over the draft's tokens only: a softmax of its own cannot divide by a mass that underflowed.
        learn_ND = draft_logits_ND.softmax(-1)
    entropy_N = -torch.xlogy(learn_ND, learn_ND).sum(-1)
    log_learn_ND = draft_logits_ND.log_softmax(-1) if with_log else None
    return SoftTarget(learn_ND, accept_ND, entropy_N, p_NV.amax(-1), log_learn_ND)


# ---------------------------------------------------------------- acceptance


@dataclass(frozen=True, slots=True)
class Comparison:
    """What one row of draft logits says against the target, [..., N] each.

    `overlap` is sum min(p, q), what the rejection rule accepts (1 - TV). `top1` is p(argmax q), what target-only
    accepts. `agree` is 1 where argmax p = argmax q; it looks at the draft's tokens only.
    """

    kl: Tensor  # KL(p || q) in nats, zero only where the draft equals the target
    overlap: Tensor
    top1: Tensor
    agree: Tensor
    log_q: Tensor  # [..., N, D]
    q: Tensor

    def at(self, rows: Tensor) -> Comparison:
        """Some of the rows [n]."""
        kl, overlap, top1, agree = (x[..., rows] for x in (self.kl, self.overlap, self.top1, self.agree))
        return Comparison(kl, overlap, top1, agree, self.log_q[..., rows, :], self.q[..., rows, :])


def compare(draft_logits: Tensor, target: SoftTarget) -> Comparison:
    """Draft logits [..., N, D], divided by the temperature, against the target; no autograd is needed or recorded."""
    with torch.no_grad():
        log_q = draft_logits.log_softmax(-1)
        kl = -(target.learn_ND * log_q).sum(-1) - target.entropy_N
        best = log_q.argmax(-1, keepdim=True)
        top1 = target.accept_ND.expand_as(log_q).gather(-1, best)[..., 0]
        q = log_q.exp()
        return Comparison(
            kl=kl,
            overlap=torch.minimum(q, target.accept_ND).sum(-1),
            top1=top1,
            agree=(top1 >= target.accept_ND.amax(-1)).to(q.dtype),
            log_q=log_q,
            q=q,
        )


def acceptance(rule: VerifyRule, found: Comparison, target: SoftTarget, is_greedy_N: Tensor | None = None) -> Tensor:
    """Chance [..., N] that `rule` accepts the draft's proposal; at temperature 0 (`is_greedy_N`) every rule is greedy.

    Greedy looks at the target's whole vocabulary: a draft that cannot say the target's argmax is never accepted.
    """
    greedy = (found.top1 >= target.best_N).to(found.top1.dtype)
    match rule:
        case VerifyRule.GREEDY:
            return greedy
        case VerifyRule.TARGET_ONLY:
            chance = found.top1
        case VerifyRule.REJECTION:
            chance = found.overlap
        case VerifyRule.COUPLED:
            chance = coupled_acceptance(target.accept_ND, found.q)
    return chance if is_greedy_N is None else torch.where(is_greedy_N, greedy, chance)


def coupled_acceptance(p_ND: Tensor, q: Tensor) -> Tensor:
    """P(argmax(log p + g) = argmax(log q + g)) [..., N] under shared standard Gumbel noise g.

    sum over x of 1 / (sum over y of max(p_y / p_x, q_y / q_x)) (Daliri et al. 2024, "Coupling without Communication").
    In order of falling p / q the inner maximum is p's up to x and q's behind it, so that a sort and two running sums
    replace the square. p_ND need not sum to 1: what is missing lies on tokens that the draft never says.
    """
    p_nD, q_nD = p_ND.expand_as(q).reshape(-1, q.shape[-1]), q.reshape(-1, q.shape[-1])
    rows = max(1, _SORTED_ELEMENTS // q.shape[-1])
    parts = [_coupled_acceptance(p, q) for p, q in zip(p_nD.split(rows), q_nD.split(rows), strict=True)]
    return torch.cat(parts).view(q.shape[:-1])


def _coupled_acceptance(p_nD: Tensor, q_nD: Tensor) -> Tensor:
    # p = q = 0 adds nothing anywhere
    order = (p_nD / q_nD).nan_to_num_(nan=torch.inf).sort(dim=-1, descending=True, stable=True).indices
    p, q = p_nD.gather(-1, order), q_nD.gather(-1, order)
    # Running sums of whole numbers are exact, and the same in any order: a GPU adds floating-point ones as it likes.
    p_whole, q_whole = ((x.double() * _UNIT).long() for x in (p, q))
    p_sum, q_sum = p_whole.cumsum(-1), q_whole.cumsum(-1)
    missing = (_UNIT - p_sum[:, -1:]).clamp_(min=0)
    p_until = torch.maximum((p_sum + missing).to(p.dtype) / _UNIT, p)
    q_behind = (q_sum[:, -1:] - q_sum).to(q.dtype) / _UNIT
    return torch.where((p > 0) & (q > 0), 1 / (p_until / p + q_behind / q), 0.0).sum(-1)


# ---------------------------------------------------------------- losses


def loss_and_gradient(
    kind: LossKind, found: Comparison, target: SoftTarget, label_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss [..., N] and its gradient [..., N, D] with respect to the draft's logits, both without autograd.

    `label_N` (int64, draft ids, -1 for a token that the draft cannot say, which has neither loss nor gradient) is for
    the hard label. May overwrite `found.q`.
    """
    with torch.no_grad():
        if kind is LossKind.HARD_LABEL:
            assert label_N is not None
            return _hard_label(found, label_N)
        return _SOFT_LOSSES[kind](found, target)


def _forward_kl(found: Comparison, target: SoftTarget) -> tuple[Tensor, Tensor]:
    return found.kl, found.q.sub_(target.learn_ND)


def _reverse_kl(found: Comparison, target: SoftTarget) -> tuple[Tensor, Tensor]:
    assert target.log_learn_ND is not None
    log_ratio = found.log_q - target.log_learn_ND
    loss = (found.q * log_ratio).sum(-1)
    return loss, log_ratio.sub_(loss[..., None]).mul_(found.q)


def _total_variation(found: Comparison, target: SoftTarget) -> tuple[Tensor, Tensor]:
    rises = found.q < target.accept_ND  # where a larger q is a larger overlap
    share = (found.q * rises).sum(-1, keepdim=True)
    return 1 - found.overlap, found.q.mul_(torch.where(rises, share - 1, share))


def _lk(found: Comparison, target: SoftTarget) -> tuple[Tensor, Tensor]:
    """The weight is each row's own and is not differentiated."""
    kl_weight = torch.exp(-_LK_RATE * found.overlap)
    loss = torch.lerp(1 - found.overlap, found.kl, kl_weight)
    kl_weight, tv_weight = kl_weight[..., None], 1 - kl_weight[..., None]
    rises = found.q < target.accept_ND
    of_q = kl_weight + tv_weight * (found.q * rises).sum(-1, keepdim=True)
    gradient = found.q.mul_(torch.where(rises, of_q - tv_weight, of_q))
    return loss, gradient.addcmul_(target.learn_ND, kl_weight, value=-1)


def _cross_entropy(found: Comparison, target: SoftTarget) -> tuple[Tensor, Tensor]:
    loss = -(target.accept_ND * found.log_q).sum(-1)
    return loss, found.q.mul_(target.accept_ND.sum(-1, keepdim=True)).sub_(target.accept_ND)


def _hard_label(found: Comparison, label_N: Tensor) -> tuple[Tensor, Tensor]:
    known_N = label_N >= 0
    index = label_N.clamp(min=0)[:, None].expand(*found.log_q.shape[:-1], 1)
    loss = torch.where(known_N, -found.log_q.gather(-1, index)[..., 0], 0.0)
    gradient = found.q.scatter_(-1, index, found.q.gather(-1, index) - 1)
    return loss, gradient.mul_(known_N[:, None])


_SOFT_LOSSES: dict[LossKind, Callable[[Comparison, SoftTarget], tuple[Tensor, Tensor]]] = {
    LossKind.FORWARD_KL: _forward_kl,
    LossKind.REVERSE_KL: _reverse_kl,
    LossKind.TV: _total_variation,
    LossKind.LK: _lk,
    LossKind.CROSS_ENTROPY: _cross_entropy,
}
