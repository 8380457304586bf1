"""What a token costs in wall clock, by hand, and that the draft's loss is weighed by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from draft_models.config import DraftConfig
from draft_models.types import VerifyRule
from rollout_engine.types import Sample
from tests.draft_helpers import random_sample, small_draft
from tests.policy_helpers import rollout
from trainer.draft_learner import DraftLearner, DraftSettings
from trainer.draft_weights import start_times, token_weights, weighed


def of_lengths(*lengths: int) -> list[Sample]:
    samples = rollout(num_prompts=1, group=len(lengths))
    return [replace(s, token_ids=(1,) * n) for s, n in zip(samples, lengths, strict=True)]


def test_weights_by_hand() -> None:
    """Two requests run for two steps, one of them alone for two more."""
    weights = list(token_weights(of_lengths(4, 2), slots=8).values())
    shared, alone = 1 / 2 + 1 / 32, 1 + 1 / 32
    mean = (4 * shared + 2 * alone) / 6
    torch.testing.assert_close(weights[0], torch.tensor([shared, shared, alone, alone]) / mean)
    torch.testing.assert_close(weights[1], torch.tensor([shared, shared]) / mean)


def test_the_mean_weight_is_one_and_equal_lengths_weigh_the_same() -> None:
    weights = torch.cat(list(token_weights(of_lengths(40, 3, 17, 1, 9), slots=3).values()))
    assert float(weights.mean()) == pytest.approx(1) and weights.max() > 2 * weights.min()
    same = torch.cat(list(token_weights(of_lengths(5, 5, 5), slots=3).values()))
    torch.testing.assert_close(same, torch.ones(15))


def test_requests_start_at_the_first_free_place() -> None:
    assert start_times([5, 2, 4, 1], slots=2) == [0, 0, 2, 5]
    assert start_times([5, 2, 4, 1], slots=1) == [0, 5, 7, 11]
    assert start_times([5, 2], slots=8) == [0, 0]


def test_an_update_is_weighed() -> None:
    """A long sample whose tail counts more than the short ones gives another gradient, by the weights alone."""
    captured = [random_sample(length, 4, seed) for seed, length in enumerate((10, 24))]
    heavy = weighed(captured, of_lengths(6, 20), slots=4)
    assert [len(s.token_weights) for s in heavy] == [6, 20]
    plan = [frozenset({(0, 0), (0, 1)})]
    losses = [
        DraftLearner(small_draft(), DraftConfig(), DraftSettings(VerifyRule.REJECTION, 3)).update(samples, plan)
        for samples in (captured, heavy, [replace(s, token_weights=torch.ones(len(s.token_ids) - 4)) for s in captured])
    ]
    assert losses[0]["draft_loss"] == losses[2]["draft_loss"] != losses[1]["draft_loss"]
    assert losses[0]["draft_accept_by_step"] == losses[1]["draft_accept_by_step"]  # figures are not weighed


@pytest.mark.parametrize("most", [0, 12])
def test_weights_are_relative(most: int) -> None:
    """Eight times the weight of every token, in one forward or in several, is the same loss and the same gradient."""
    captured = weighed(
        [random_sample(length, 4, seed) for seed, length in enumerate((10, 24))], of_lengths(6, 20), slots=4
    )
    heavy = [replace(s, token_weights=8 * s.token_weights) for s in captured]
    config, settings = DraftConfig(max_tokens_per_forward=most), DraftSettings(VerifyRule.REJECTION, 3)
    keys = frozenset((s.prompt_id, s.sample_id) for s in captured)
    one, other = (
        DraftLearner(small_draft(), config, settings).update(samples, [keys]) for samples in (captured, heavy)
    )
    assert one["draft_loss"] == other["draft_loss"] and one["draft_grad_norm"] == other["draft_grad_norm"]
    assert one["draft_tokens"] == other["draft_tokens"] == 5 + 19
