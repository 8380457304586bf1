"""Policy losses, advantages and vocabulary-parallel log-probs, against numbers worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch

from tests.policy_helpers import rollout
from trainer import vocab_parallel
from trainer.advantages import drop_groups_without_signal, group_advantages, with_advantages
from trainer.config import ConfigError
from trainer.losses import clipped_policy_loss, kl_to_reference, tis_weights
from trainer.vocab_parallel import log_probs_and_entropy


def test_clipped_loss_by_hand():
    # ratios 1.5, 1.5, 0.5, 0.5, 1.1 with eps 0.2 below and 0.3 above
    logp = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    loss, ratio, clipped = clipped_policy_loss(logp, torch.zeros(5), advantages, 0.2, 0.3)
    torch.testing.assert_close(loss, torch.tensor([-1.3, 1.5, -0.5, 0.8, -2.2]))
    torch.testing.assert_close(ratio, torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1]))
    assert clipped.tolist() == [True, False, False, True, False]
    loss.sum().backward()
    # a clipped token gives no gradient; others -A r
    torch.testing.assert_close(logp.grad, torch.tensor([0.0, 1.5, -0.5, 0.0, -2.2]))


def test_clip_higher_differs_from_symmetric_clip():
    logp = torch.tensor([1.25]).log()
    symmetric, _, _ = clipped_policy_loss(logp, torch.zeros(1), torch.ones(1), 0.2, 0.2)
    higher, _, _ = clipped_policy_loss(logp, torch.zeros(1), torch.ones(1), 0.2, 0.28)
    assert symmetric.item() == pytest.approx(-1.2)
    assert higher.item() == pytest.approx(-1.25)


def test_on_policy_gradient_is_minus_advantage():
    logp = torch.tensor([-0.3, -2.0], requires_grad=True)
    loss, ratio, clipped = clipped_policy_loss(logp, logp.detach(), torch.tensor([0.7, -1.2]), 0.2, 0.28)
    loss.sum().backward()
    assert ratio.tolist() == [1.0, 1.0] and not clipped.any()
    torch.testing.assert_close(logp.grad, torch.tensor([-0.7, 1.2]))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", math.log(2)),
        ("k2", math.log(2) ** 2 / 2),
        ("k3", 0.5 - 1 + math.log(2)),
        ("low_var_kl", math.log(2) - 0.5),
    ],
)
def test_kl_estimators_by_hand(kind, expected):
    # the policy gives 0.4 and the reference 0.2: log ratio log 2
    kl = kl_to_reference(torch.tensor([0.4]).log(), torch.tensor([0.2]).log(), kind)
    assert kl.item() == pytest.approx(expected, rel=1e-5)


def test_low_var_kl_is_bounded_and_k3_is_not():
    far = torch.tensor([-20.0]), torch.tensor([0.0])
    assert kl_to_reference(*far, "low_var_kl").item() == 10.0
    assert kl_to_reference(*far, "k3").item() > 1e8


def test_unknown_kl_names_the_known_ones():
    with pytest.raises(ConfigError, match="low_var_kl"):
        kl_to_reference(torch.zeros(1), torch.zeros(1), "abs")


def test_tis_weights_by_hand():
    train = torch.tensor([0.4, 0.1, 0.9]).log().requires_grad_()
    weights = tis_weights(train, torch.tensor([0.2, 0.2, 0.1]).log(), clip=3.0)
    torch.testing.assert_close(weights, torch.tensor([2.0, 0.5, 3.0]))
    assert not weights.requires_grad


def test_group_advantages_by_hand():
    assert group_advantages([1.0, 0.0, 0.0, 1.0], normalize_std=False) == [0.5, -0.5, -0.5, 0.5]
    std = math.sqrt(4 * 0.25 / 3)
    assert group_advantages([1.0, 0.0, 0.0, 1.0], normalize_std=True) == pytest.approx(
        [0.5 / std, -0.5 / std, -0.5 / std, 0.5 / std], rel=1e-5
    )
    assert group_advantages([2.0, 2.0], normalize_std=True) == [0.0, 0.0]


def test_advantages_stay_within_their_group():
    samples = [replace(s, reward=float(s.request.prompt_id * 10 + s.request.sample_id)) for s in rollout(2, 3)]
    result = with_advantages(samples[::-1], normalize_std=False)
    assert [s.request.key for s in result] == [(p, i) for p in range(2) for i in range(3)]
    assert [s.advantage for s in result] == [-1.0, 0.0, 1.0] * 2  # over the whole batch prompt 0 would be all negative


def test_missing_reward_is_an_error():
    with pytest.raises(ValueError, match="prompt 0"):
        with_advantages([replace(s, reward=None) for s in rollout(1, 2)], normalize_std=True)


def test_dynamic_sampling_drops_groups_of_equal_reward():
    samples = [
        replace(s, reward=1.0 if s.request.prompt_id == 1 else float(s.request.sample_id)) for s in rollout(3, 2)
    ]
    assert {s.request.prompt_id for s in drop_groups_without_signal(samples)} == {0, 2}


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("elements", [1, 70, 1 << 24])
def test_log_probs_and_entropy_equal_autograd_and_leave_the_logits_alone(monkeypatch, elements, with_entropy):
    """On some of the rows, in pieces of any size."""
    monkeypatch.setattr(vocab_parallel, "_PIECE_ELEMENTS", elements)
    torch.manual_seed(0)
    logits, targets, rows = torch.randn(9, 33) * 3, torch.randint(0, 33, (7,)), torch.tensor([0, 1, 3, 4, 5, 6, 8])
    temperature, (w, u) = torch.linspace(0.5, 2.0, 7), torch.randn(2, 7)
    plain = logits.clone().requires_grad_()
    log_p = (plain[rows] / temperature[:, None]).log_softmax(-1)
    logp, entropy = log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    (w * logp + with_entropy * u * entropy).sum().backward()

    ours = logits.clone().requires_grad_()
    our_logp, our_entropy = log_probs_and_entropy(ours, rows, targets, temperature)
    loss = (w * our_logp).sum()
    (loss + (u * our_entropy).sum() if with_entropy else loss).backward()
    torch.testing.assert_close(our_logp, logp)
    torch.testing.assert_close(our_entropy, entropy)
    torch.testing.assert_close(ours.grad, plain.grad)
    assert torch.equal(ours.detach(), logits)


def test_temperature_matters_to_log_probs():
    logits, targets = torch.tensor([[0.0, 2.0]]), torch.tensor([1])
    cold, _ = log_probs_and_entropy(logits, torch.tensor([0]), targets, torch.tensor([0.5]))
    assert cold.item() == pytest.approx(-math.log1p(math.exp(-4.0)), rel=1e-4)
