"""Texts cut into windows are those cut by hand, and a weight on a token multiplies its loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from draft_models.training import accept_posteriors, draft_loss, make_batch
from draft_models.types import DraftSample, VerifyRule
from tests.draft_helpers import batch_of, random_sample, small_draft


def cut_by_hand(sample: DraftSample, start: int, stop: int) -> DraftSample:
    rows = slice(start, stop)
    return replace(
        sample,
        token_ids=sample.token_ids[rows],
        embeds=sample.embeds[rows],
        aux_hidden=sample.aux_hidden[rows],
        target_hidden=sample.target_hidden[rows],
        prompt_len=max(sample.prompt_len - start, 1),
    )


def test_windows_are_texts_cut_by_hand() -> None:
    sample, draft = random_sample(20, 4, 3, dtype=torch.float64), small_draft(dtype=torch.float64)
    batch = make_batch([sample], window=8)
    by_hand = [cut_by_hand(sample, start, min(start + 8, 20)) for start in (0, 6, 12)]
    expected = batch_of(by_hand)
    assert batch.num_chains == expected.num_chains == (3, 6, 6) and sum(batch.num_chains) == 20 - 4 - 1
    assert batch.next_index_Q.tolist() == list(range(5, 20)) and batch.key_position_S.max() == 5
    for window in (20, 0):  # nothing to cut
        assert make_batch([sample], window=window).num_chains == (15,)
    results = [draft_loss(draft, b, 3, 0.8) for b in (batch, expected)]
    assert torch.equal(results[0].loss_sum, results[1].loss_sum)
    assert not torch.isclose(results[0].loss_sum, draft_loss(draft, batch_of([sample]), 3, 0.8).loss_sum)
    with pytest.raises(ValueError, match="a window of 2 tokens"):
        make_batch([sample], window=2)


def test_the_coupled_noise_of_a_window_is_that_of_the_whole_text() -> None:
    """Step 0 of a first window sees what it sees in the whole text; of later ones the index alone is checked."""
    sample, draft = random_sample(20, 4, 3, dtype=torch.float64), small_draft(dtype=torch.float64)
    whole = accept_posteriors(draft, batch_of([sample]), 1, VerifyRule.COUPLED)
    windows = make_batch([sample], window=8)
    first = accept_posteriors(draft, windows, 1, VerifyRule.COUPLED)[:3]
    assert torch.equal(first, whole[:3])


@pytest.mark.parametrize("window", [0, 5])
def test_weights_multiply_each_tokens_loss(window: int) -> None:
    """Twice the weight on one response token is its loss once more, at every step that predicts it."""
    sample, draft = random_sample(12, 4, 3, dtype=torch.float64), small_draft(dtype=torch.float64)

    def loss_of(weights: Tensor) -> Tensor:
        batch = make_batch([replace(sample, token_weights=weights)], window=window)
        return draft_loss(draft, batch, 3, 0.8).loss_sum.detach()

    ones, plain = torch.ones(8, dtype=torch.float64), draft_loss(draft, make_batch([sample], window=window), 3, 0.8)
    torch.testing.assert_close(loss_of(ones), plain.loss_sum.detach())
    parts = [loss_of(torch.nn.functional.one_hot(torch.tensor(token), 8).double()) for token in range(8)]
    assert parts[0] == 0 and all(part > 0 for part in parts[1:])  # the first token is sampled, never drafted
    torch.testing.assert_close(loss_of(torch.arange(8.0)), sum(token * part for token, part in enumerate(parts)))
