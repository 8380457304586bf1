"""Losses against autograd on their plain formulas; acceptance formulas against the verifier on the same laws."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from draft_models import losses
from draft_models.losses import LossKind, SoftTarget, resolve_loss
from draft_models.types import VerifyRule
from draft_models.verify import draw_noise, expand_draft_vocab, sample_draft, verify
from tests.verify_helpers import outcome_law

ROWS, VOCAB, STEPS = 6, 11, 2
REDUCED = torch.tensor([0, 2, 3, 7, 10])


def random_logits(*shape: int, seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_forward_kl(q: Tensor, p: Tensor, renormalised: Tensor, _: Tensor) -> Tensor:
    return (renormalised * (renormalised.log() - q.log())).sum(-1)


def plain_reverse_kl(q: Tensor, p: Tensor, renormalised: Tensor, _: Tensor) -> Tensor:
    return (q * (q.log() - renormalised.log())).sum(-1)


def plain_tv(q: Tensor, p: Tensor, renormalised: Tensor, _: Tensor) -> Tensor:
    """Half the distance over the target's vocabulary; outside the draft's own it is the target's mass there."""
    return 0.5 * ((q - p).abs().sum(-1) + 1 - p.sum(-1))


def plain_lk(q: Tensor, p: Tensor, renormalised: Tensor, label: Tensor) -> Tensor:
    tv = plain_tv(q, p, renormalised, label)
    weight = torch.exp(-3 * (1 - tv.detach()))
    return weight * plain_forward_kl(q, p, renormalised, label) + (1 - weight) * tv


def plain_cross_entropy(q: Tensor, p: Tensor, renormalised: Tensor, _: Tensor) -> Tensor:
    return -(p * q.log()).sum(-1)


def plain_hard_label(q: Tensor, p: Tensor, renormalised: Tensor, label: Tensor) -> Tensor:
    picked = q.log().gather(-1, label.clamp(min=0)[:, None].expand(STEPS, ROWS, 1))[..., 0]
    return -picked * (label >= 0)


PLAIN: dict[LossKind, Callable[..., Tensor]] = {
    LossKind.FORWARD_KL: plain_forward_kl,
    LossKind.REVERSE_KL: plain_reverse_kl,
    LossKind.TV: plain_tv,
    LossKind.LK: plain_lk,
    LossKind.CROSS_ENTROPY: plain_cross_entropy,
    LossKind.HARD_LABEL: plain_hard_label,
}


@pytest.mark.parametrize("ids", [None, REDUCED], ids=["whole", "reduced"])
@pytest.mark.parametrize("kind", list(LossKind))
def test_gradients_equal_autograd_on_the_plain_formula(kind: LossKind, ids: Tensor | None) -> None:
    size = VOCAB if ids is None else len(ids)
    target_logits = random_logits(ROWS, VOCAB, seed=1)
    logits = random_logits(STEPS, ROWS, size, seed=2).requires_grad_()
    label = torch.tensor([0, 3, -1, 4, 1, 2])
    p = target_logits.softmax(-1) if ids is None else target_logits.softmax(-1)[:, ids]
    plain = PLAIN[kind](logits.softmax(-1), p, p / p.sum(-1, keepdim=True), label)
    (expected,) = torch.autograd.grad(plain.sum(), logits)

    target = losses.soft_target(target_logits, ids, with_log=True)
    loss, gradient = losses.loss_and_gradient(kind, losses.compare(logits, target), target, label)
    torch.testing.assert_close(loss, plain.detach(), atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(gradient, expected, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in LossKind if kind is not LossKind.HARD_LABEL])
def test_the_target_itself_is_a_minimum(kind: LossKind) -> None:
    target_logits = random_logits(ROWS, VOCAB, seed=3)
    target = losses.soft_target(target_logits, None, with_log=True)
    best, gradient = losses.loss_and_gradient(kind, losses.compare(target_logits, target), target)
    if kind not in (LossKind.TV, LossKind.LK):  # these two have a kink there
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)
    for seed in range(20):
        near = losses.compare(target_logits + random_logits(ROWS, VOCAB, seed=seed, scale=0.3), target)
        assert (losses.loss_and_gradient(kind, near, target)[0] > best).all()


@pytest.mark.parametrize("kind", list(LossKind))
def test_extreme_logits_give_finite_losses_and_gradients(kind: LossKind) -> None:
    """In float32: laws that share no mass, probabilities that underflow, and equal ones."""
    target_logits = torch.zeros(4, VOCAB)
    logits = torch.zeros(1, 4, VOCAB)
    target_logits[0, 0], logits[0, 0, 1] = 300.0, 300.0
    target_logits[1, 0], logits[0, 1, 0] = 300.0, 300.0
    target_logits[2, 3] = -300.0
    target = losses.soft_target(target_logits, REDUCED, with_log=True)
    found = losses.compare(logits[..., : len(REDUCED)], target)
    for rule in VerifyRule:
        accepted = losses.acceptance(rule, found, target)
        assert (accepted >= 0).all() and (accepted <= 1 + 1e-6).all()
    loss, gradient = losses.loss_and_gradient(kind, found, target, torch.tensor([0, 1, -1, 2]))
    assert loss.isfinite().all() and gradient.isfinite().all()


def test_lk_is_kl_far_from_the_target_and_tv_near_it() -> None:
    target_logits = random_logits(1, VOCAB, seed=5, scale=8.0)
    target = losses.soft_target(target_logits, None)

    def gradient(kind: LossKind, logits: Tensor) -> Tensor:
        return losses.loss_and_gradient(kind, losses.compare(logits, target), target)[1]

    for logits, like in ((-target_logits, LossKind.FORWARD_KL), (target_logits + 0.3, LossKind.TV)):
        logits = logits + random_logits(1, VOCAB, seed=6, scale=0.1)
        cosine = torch.nn.functional.cosine_similarity(gradient(LossKind.LK, logits), gradient(like, logits))
        assert float(cosine) > 0.99


@pytest.mark.parametrize(
    ("rule", "kind"),
    [
        (VerifyRule.REJECTION, LossKind.FORWARD_KL),
        (VerifyRule.COUPLED, LossKind.FORWARD_KL),
        (VerifyRule.TARGET_ONLY, LossKind.CROSS_ENTROPY),
        (VerifyRule.GREEDY, LossKind.CROSS_ENTROPY),
    ],
)
def test_auto_follows_the_rule_and_a_name_does_not(rule: VerifyRule, kind: LossKind) -> None:
    assert resolve_loss("auto", rule) is kind
    assert resolve_loss("tv", rule) is LossKind.TV
    with pytest.raises(ValueError, match="hinge"):
        resolve_loss("hinge", rule)


# ---- acceptance


def laws(ids: Tensor | None) -> tuple[Tensor, Tensor, SoftTarget, losses.Comparison]:
    """p and q over the target's vocabulary, and the same pairs as the losses see them."""
    target_logits = random_logits(ROWS, VOCAB, seed=7)
    logits = random_logits(ROWS, VOCAB if ids is None else len(ids), seed=8)
    q = logits.softmax(-1) if ids is None else expand_draft_vocab(logits.softmax(-1), ids, VOCAB)
    target = losses.soft_target(target_logits, ids)
    return target_logits.softmax(-1), q, target, losses.compare(logits, target)


@pytest.mark.parametrize("ids", [None, REDUCED], ids=["whole", "reduced"])
@pytest.mark.parametrize("rule", [VerifyRule.REJECTION, VerifyRule.TARGET_ONLY, VerifyRule.GREEDY])
def test_acceptance_is_that_of_the_verifier(rule: VerifyRule, ids: Tensor | None) -> None:
    """Every proposal of one draft token, each weighed by its chance, through the real `verify`."""
    p, q, target, found = laws(ids)
    if rule is VerifyRule.GREEDY:
        p = torch.nn.functional.one_hot(p.argmax(-1), VOCAB).double()
    proposal = q if rule is VerifyRule.REJECTION else torch.nn.functional.one_hot(q.argmax(-1), VOCAB).double()
    expected = torch.zeros(ROWS, dtype=torch.float64)
    for token in range(VOCAB):
        drafts, one = torch.full((ROWS, 1), token), torch.ones(ROWS, dtype=torch.int64)
        p_BMV = p[:, None].expand(ROWS, 2, VOCAB)
        if rule is VerifyRule.GREEDY:
            accepted = verify(rule, p_BMV, None, drafts, one, draw_noise(rule, one, one, 1, VOCAB)).num_accepted_B
        else:
            accepted = outcome_law(rule, p_BMV, proposal[:, None], drafts, one)[:, 1].sum(-1)
        expected += proposal[:, token] * accepted
    torch.testing.assert_close(losses.acceptance(rule, found, target), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("ids", [None, REDUCED], ids=["whole", "reduced"])
def test_coupled_acceptance_is_that_of_the_verifier(ids: Tensor | None) -> None:
    """By sampling under shared noise, within 4.5 standard deviations; fixed seeds."""
    p, q, target, found = laws(ids)
    count, chance = 20_000, losses.acceptance(VerifyRule.COUPLED, found, target)
    seeds, positions = torch.arange(count), torch.full((count,), 3)
    noise = draw_noise(VerifyRule.COUPLED, seeds, positions, 1, VOCAB)
    for row in range(ROWS):
        q_BD = (q[row] if ids is None else q[row, ids]).expand(count, -1)
        drafts = sample_draft(VerifyRule.COUPLED, q_BD, seeds, positions, ids)[:, None]
        p_BMV = p[row].expand(count, 2, VOCAB)
        verified = verify(VerifyRule.COUPLED, p_BMV, None, drafts, torch.ones(count, dtype=torch.int64), noise)
        share = float(verified.num_accepted_B.double().mean())
        assert abs(share - chance[row]) < 4.5 * float(chance[row] * (1 - chance[row]) / count) ** 0.5


@pytest.mark.parametrize("elements", [1, 3 * VOCAB, 1 << 24])
def test_coupled_acceptance_equals_the_plain_double_sum(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr(losses, "_SORTED_ELEMENTS", elements)
    p, q, target, found = laws(None)
    expected = torch.zeros(ROWS, dtype=torch.float64)
    for x in range(VOCAB):
        ratios = torch.maximum(p / p[:, x, None], q / q[:, x, None])
        expected += 1 / ratios.sum(-1)
    chance = losses.acceptance(VerifyRule.COUPLED, found, target)
    torch.testing.assert_close(chance, expected, atol=1e-13, rtol=1e-13)
    assert losses.coupled_acceptance(p, q.expand(2, ROWS, VOCAB)).shape == (2, ROWS)
    overlap = found.overlap
    assert (chance >= overlap / (2 - overlap)).all() and (chance <= overlap).all()  # its known bounds


def test_at_temperature_zero_every_rule_is_greedy() -> None:
    _, _, target, found = laws(None)
    expected = losses.acceptance(VerifyRule.GREEDY, found, target)
    is_greedy = torch.tensor([True, False] * (ROWS // 2))
    for rule in VerifyRule:
        mixed = losses.acceptance(rule, found, target, is_greedy)
        assert torch.equal(mixed[is_greedy], expected[is_greedy])
        assert torch.equal(mixed[~is_greedy], losses.acceptance(rule, found, target)[~is_greedy])
