"""Speculative decoding emits what plain sampling emits: exactly, by enumeration, and with its own random numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from draft_models import verify as verify_module
from draft_models.randomness import Purpose, uniforms
from draft_models.types import VerifyRule
from draft_models.verify import (
    Noise,
    draw_noise,
    expand_draft_vocab,
    inverse_cdf,
    residual,
    sample_draft,
    take_row,
    target_probs,
    verify,
)
from rollout_engine.sampling import Proposal
from tests.verify_helpers import ALMOST_ONE, Toy, outcome_law, plain_law, speculative_law

TARGET_ONLY, REJECTION, COUPLED, GREEDY = (
    VerifyRule.TARGET_ONLY,
    VerifyRule.REJECTION,
    VerifyRule.COUPLED,
    VerifyRule.GREEDY,
)

TOYS = {
    "rejection": Toy(REJECTION),
    "rejection, four tokens": Toy(REJECTION, vocab=4, k=1, seed=1),
    "rejection, depth 3": Toy(REJECTION, k=3, seed=2),
    "rejection, varying depth": Toy(REJECTION, seed=3, vary_num_drafts=True),
    "rejection, q has zeros": Toy(REJECTION, seed=4, vocab=4, k=1, q_top_k=2),
    "rejection, q is a point mass": Toy(REJECTION, seed=5, q_temperature=0.0),
    "rejection, reduced draft vocabulary": Toy(REJECTION, seed=6, vocab=4, k=1, q_ids=(1, 3)),
    "rejection, top-p and top-k": Toy(REJECTION, seed=7, vocab=4, k=1, top_p=0.8, top_k=3, q_top_p=0.7),
    "rejection, top-k on p alone": Toy(REJECTION, seed=8, top_k=2, vary_num_drafts=True),
    "rejection, p and q are one-hot": Toy(REJECTION, seed=9, temperature=0.0, q_temperature=0.0),
    "rejection, q equals p": Toy(REJECTION, seed=10, q_is_p=True),
    "rejection, hot draft": Toy(REJECTION, seed=11, temperature=0.5, q_temperature=3.0),
    "rejection, given drafts in between": Toy(REJECTION, seed=20, gives=True),
    "rejection, given drafts, varying depth, top-k": Toy(REJECTION, seed=21, gives=True, vary_num_drafts=True, top_k=2),
    "rejection, given drafts outside the draft vocabulary": Toy(
        REJECTION, seed=22, vocab=4, k=1, q_ids=(1, 3), gives=True
    ),
    "target-only, given drafts in between": Toy(TARGET_ONLY, seed=23, gives=True, vary_num_drafts=True),
    "target-only": Toy(TARGET_ONLY, seed=12),
    "target-only, depth 3, varying": Toy(TARGET_ONLY, seed=13, k=3, vary_num_drafts=True),
    "target-only, top-p": Toy(TARGET_ONLY, seed=14, vocab=4, top_p=0.7),
    "target-only, reduced draft vocabulary": Toy(TARGET_ONLY, seed=15, vocab=5, k=1, q_ids=(0, 4)),
    "target-only, temperature 0": Toy(TARGET_ONLY, seed=16, temperature=0.0),
}


def law_error(toy: Toy, length: int = 3) -> float:
    return (speculative_law(toy, length) - plain_law(toy, length)).abs().max().item()


@pytest.mark.parametrize("name", TOYS)
def test_law_is_that_of_plain_sampling(name: str) -> None:
    assert law_error(TOYS[name]) <= 1e-12


# ------------------------------------------------------------------ each fault is seen


def too_eager(p: Tensor, q: Tensor | None) -> Tensor:
    return (1.01 * p / (1.0 if q is None else q)).clamp(max=1.0)


def not_subtracted(p: Tensor, q: Tensor) -> Tensor:
    return p


def not_renormalised(weights_BV: Tensor, u_B: Tensor) -> Tensor:
    cdf = weights_BV.cumsum(-1, dtype=torch.float64)
    return (cdf <= u_B[:, None]).sum(-1).clamp(max=weights_BV.shape[-1] - 1)


def one_row_early(x_BMV: Tensor, index_B: Tensor) -> Tensor:
    """Takes the bonus token's law from the position before it."""
    return take_row(x_BMV, index_B.clamp(max=max(x_BMV.shape[1] - 2, 0)))


FAULTS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "accept with 1.01 p/q": ("accept_probability", too_eager),
    "residual not subtracted": ("residual", not_subtracted),
    "residual not renormalised": ("inverse_cdf", not_renormalised),
    "bonus token of the row before": ("take_row", one_row_early),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["rejection", "target-only"])
def test_enumeration_sees_a_fault(fault: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seam, broken = FAULTS[fault]
    monkeypatch.setattr(verify_module, seam, broken)
    assert law_error(TOYS[name]) > 1e-4


def test_enumeration_sees_a_given_draft_that_is_taken_for_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens are history's, the laws that verification is told are still the draft model's."""
    with_given = Proposal.with_given

    def keeps_the_laws(self: Proposal, given: Sequence[Sequence[int]]) -> Proposal:
        assert self.probs_BKV is not None
        merged = with_given(dataclasses.replace(self, probs_BKV=None), given)
        extra = merged.tokens_BK.shape[1] - self.tokens_BK.shape[1]
        last = self.probs_BKV[:, -1:].expand(-1, extra, -1)
        return dataclasses.replace(merged, probs_BKV=torch.cat((self.probs_BKV, last), 1))

    monkeypatch.setattr(Proposal, "with_given", keeps_the_laws)
    assert law_error(TOYS["rejection, given drafts in between"]) > 1e-3


def test_enumeration_sees_a_choice_that_depends_on_the_models_draft() -> None:
    """Given drafts only where the model drew something else: each is verified by its own law, and the sum is wrong."""
    toy = TOYS["rejection, given drafts in between"]
    assert law_error(dataclasses.replace(toy, peeks=True)) > 1e-3


def test_given_drafts_stand_between_the_models() -> None:
    """What the exactness tests above are about: rows of both sources, of different lengths, in one batch."""
    toy = TOYS["rejection, given drafts in between"]
    second = [toy.given((token,)) for token in range(toy.vocab)]
    third = [toy.given((a, b)) for a in range(toy.vocab) for b in range(toy.vocab)]
    for lengths in ({len(given) for given in second}, {len(given) for given in third}):
        assert 0 in lengths and len(lengths) > 1
    assert toy.k + 1 in {len(given) for given in third}


def test_enumeration_sees_a_stale_proposal() -> None:
    assert law_error(Toy(REJECTION)) <= 1e-12
    assert law_error(Toy(REJECTION, stale_q=True)) > 1e-3


# ------------------------------------------------------------------ rounding


def test_law_in_float32_is_right_to_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(64, 3, 5, generator=generator).softmax(-1)
    q = torch.randn(64, 2, 5, generator=generator).softmax(-1)
    drafts, full = torch.randint(5, (64, 2), generator=generator), torch.full((64,), 2)
    single = outcome_law(REJECTION, p, q, drafts, full)
    double = outcome_law(REJECTION, p.double(), q.double(), drafts, full)
    torch.testing.assert_close(single, double, atol=1e-6, rtol=0)


def test_rejection_by_rounding_draws_from_p() -> None:
    """p and q one bit apart: the ratio is below 1, and the residual may be nothing at all."""
    q = torch.tensor([[[0.5, 0.25, 0.25, 0.0]]])
    p = torch.tensor([[[0.49999997, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]]])
    noise = Noise(torch.tensor([[ALMOST_ONE]]).double(), torch.tensor([[0.99, 0.5]]).double())
    result = verify(REJECTION, p, q, torch.tensor([[0]]), torch.tensor([1]), noise)
    assert result.num_accepted_B.tolist() == [0]
    assert result.tokens_BM[0, 0] == 2  # a token of p, never the last id of weight 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_cdf_never_returns_a_token_of_weight_zero(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(2000, 50, generator=generator, dtype=dtype) ** 8
    weights = weights.masked_fill(torch.rand(2000, 50, generator=generator) < 0.7, 0.0)
    weights[:, 17] += 1e-30
    for u in (0.0, 0.5, 1 - 2.0**-24, ALMOST_ONE):
        index = inverse_cdf(weights, torch.full((2000,), u, dtype=torch.float64))
        assert (weights.gather(1, index[:, None]) > 0).all()


def test_impossible_tokens_are_neither_accepted_nor_emitted() -> None:
    p = torch.tensor([[[0.0, 1.0, 0.0], [0.3, 0.3, 0.4]]] * 2)
    q = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]]])
    noise = Noise(torch.zeros(2, 1).double(), torch.full((2, 2), ALMOST_ONE).double())
    result = verify(REJECTION, p, q, torch.tensor([[0], [0]]), torch.tensor([1, 1]), noise)  # row 1: p = q = 0
    assert result.num_accepted_B.tolist() == [0, 0]
    assert result.tokens_BM[:, 0].tolist() == [1, 1]


# ------------------------------------------------------------------ the sampling law


def test_filters_keep_what_their_definition_keeps() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).double().log().expand(5, 4)
    top_k, top_p = torch.tensor([0, 2, 0, 3, 1]), torch.tensor([1.0, 1.0, 0.6, 0.75, 0.01])
    probs = target_probs(logits, torch.ones(5), top_p, top_k)
    expected = torch.tensor(
        [
            [0.5, 0.2, 0.2, 0.1],
            [5 / 7, 2 / 7, 0.0, 0.0],  # equal probabilities: the lower id stays
            [5 / 7, 2 / 7, 0.0, 0.0],
            [5 / 7, 2 / 7, 0.0, 0.0],  # 0.75 of the 0.9 that top-k left
            [1.0, 0.0, 0.0, 0.0],
        ]
    ).double()
    torch.testing.assert_close(probs, expected, atol=1e-7, rtol=0)


def test_temperature_zero_is_the_argmax_beside_sampled_rows() -> None:
    logits = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(0))
    probs = target_probs(logits, torch.tensor([0.0, 1.0, 0.5]))
    torch.testing.assert_close(probs[0], torch.nn.functional.one_hot(logits[0].argmax(-1), 6).float())
    torch.testing.assert_close(probs[1], logits[1].softmax(-1))
    torch.testing.assert_close(probs[2], (2 * logits[2]).softmax(-1))


# ------------------------------------------------------------------ greedy and coupled: the tokens of plain decoding


def random_case(rows: int, k: int, vocab: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, k + 1, vocab, generator=generator, dtype=torch.float64)
    q_logits = logits[:, :k] + 0.7 * torch.randn(rows, k, vocab, generator=generator, dtype=torch.float64)
    num_drafts = torch.randint(0, k + 1, (rows,), generator=generator)
    return logits.softmax(-1), q_logits.softmax(-1), torch.arange(rows), num_drafts


@pytest.mark.parametrize("rule", [GREEDY, COUPLED])
def test_tokens_are_the_plain_choice(rule: VerifyRule) -> None:
    rows, k, vocab, start = 4000, 3, 6, 11
    p, q, seeds, num_drafts = random_case(rows, k, vocab, 0)
    first = torch.full((rows,), start)
    drafts = torch.stack([sample_draft(rule, q[:, j], seeds, first + j) for j in range(k)], dim=1)
    result = verify(rule, p, None, drafts, num_drafts, draw_noise(rule, seeds, first, k, vocab))
    assert (result.num_accepted_B <= num_drafts).all()
    seen = 0
    for j in range(k + 1):
        alone = verify(
            rule, p[:, j : j + 1], None, drafts[:, :0], 0 * num_drafts, draw_noise(rule, seeds, first + j, 0, vocab)
        )
        emitted = result.num_accepted_B >= j
        assert (result.tokens_BM[emitted, j] == alone.tokens_BM[emitted, 0]).all()
        seen += int(emitted.sum())
    assert seen > 1.5 * rows  # a good part was accepted


def acceptance(rule: VerifyRule, rows: int, q_is_other_noise: bool = False) -> tuple[float, float]:
    """Measured acceptance of one draft token, and 1 - TV, for one fixed pair of laws."""
    p, q, _, _ = random_case(1, 1, 5, 3)
    seeds, first = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    q_rows = q[:, 0].expand(rows, -1)
    drafts = sample_draft(rule, q_rows, seeds + q_is_other_noise * 10**6, first)[:, None]
    noise = draw_noise(rule, seeds, first, 1, 5)
    result = verify(rule, p.expand(rows, -1, -1), q_rows[:, None], drafts, torch.ones_like(first), noise)
    return result.num_accepted_B.double().mean().item(), torch.minimum(p[0, 0], q[0, 0]).sum().item()


def test_coupled_acceptance_reaches_its_bound() -> None:
    rows = 100_000
    measured, overlap = acceptance(COUPLED, rows)
    bound, margin = overlap / (2 - overlap), 4 * 0.5 / rows**0.5
    assert bound - margin <= measured <= overlap + margin
    without_shared_noise, _ = acceptance(COUPLED, rows, q_is_other_noise=True)
    assert without_shared_noise < bound - margin


def test_rejection_accepts_the_overlap() -> None:
    measured, overlap = acceptance(REJECTION, 100_000)
    assert abs(measured - overlap) < 4 * (overlap * (1 - overlap) / 100_000) ** 0.5


def test_coupled_choice_has_the_target_law() -> None:
    rows = 200_000
    p, _, _, _ = random_case(1, 0, 6, 5)
    noise = draw_noise(COUPLED, torch.arange(rows), torch.full((rows,), 7), 0, 6)
    none = torch.zeros(rows, 0, dtype=torch.int64)
    result = verify(COUPLED, p.expand(rows, -1, -1), None, none, torch.zeros(rows, dtype=torch.int64), noise)
    assert worst_z(torch.bincount(result.tokens_BM[:, 0], minlength=6), p[0, 0]) < 4


def test_coupled_noise_is_keyed_by_the_target_id() -> None:
    """A draft over a part of the vocabulary that knows p there picks the target's choice whenever it can."""
    rows = 2000
    p, _, _, _ = random_case(1, 0, 6, 6)
    ids, seeds, first = torch.tensor([1, 4, 5]), torch.arange(rows), torch.full((rows,), 3)
    part = p[0, 0, ids].expand(rows, -1)
    drafts = sample_draft(COUPLED, part, seeds, first, ids)
    noise = draw_noise(COUPLED, seeds, first, 0, 6)
    target = verify_module.target_choice(p.expand(rows, -1, -1), noise.gumbel_BMV)[:, 0]
    known = torch.isin(target, ids)
    assert known.any()
    assert (drafts[known] == target[known]).all()


# ------------------------------------------------------------------ with the engine's own random numbers


def worst_z(counts: Tensor, law: Tensor) -> float:
    total = counts.sum().double()
    possible = law > 0
    assert (counts[~possible] == 0).all()
    deviation = (counts - total * law)[possible] / (total * law * (1 - law))[possible].sqrt().clamp(min=1e-9)
    return deviation.abs().max().item()


def decode(rule: VerifyRule, rows: int, length: int, k: int, vocab: int) -> Tensor:
    """Texts [rows, length] of speculative decoding on a random table over two tokens of context."""
    generator = torch.Generator().manual_seed(1)
    p_table = (1.5 * torch.randn(vocab, vocab, generator=generator, dtype=torch.float64)).softmax(-1)
    q_table = (1.5 * torch.randn(vocab, vocab, generator=generator, dtype=torch.float64)).softmax(-1)
    seeds, row = torch.arange(rows), torch.arange(rows)
    text, done = torch.zeros(rows, length + k + 1, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    while int(done.min()) < length:
        last = torch.where(done > 0, text[row, (done - 1).clamp(min=0)], 0)
        active = done < length
        drafts, q = torch.zeros(rows, k, dtype=torch.int64), torch.zeros(rows, k, vocab, dtype=torch.float64)
        context, p = last, [p_table[last]]
        for j in range(k):
            q[:, j] = q_table[context]
            context = drafts[:, j] = sample_draft(rule, q[:, j], seeds, done + j)
            p.append(p_table[context])
        num_drafts = (done + seeds) % (k + 1)
        noise = draw_noise(rule, seeds, done, k, vocab)
        result = verify(rule, torch.stack(p, 1), q, drafts, num_drafts, noise)
        for j in range(k + 1):
            emits = active & (result.num_accepted_B >= j)
            text[row[emits], done[emits] + j] = result.tokens_BM[emits, j]
        done = torch.where(active, done + result.num_accepted_B + 1, done)
    return text[:, :length]


def text_law(vocab: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    table = (1.5 * torch.randn(vocab, vocab, generator=generator, dtype=torch.float64)).softmax(-1)
    law = table[0]
    for _ in range(length - 1):
        law = law[..., None] * table
    return law.flatten()


def text_z(rule: VerifyRule) -> float:
    vocab, length = 3, 4
    texts = decode(rule, 100_000, length, 2, vocab)
    index = (texts * vocab ** torch.arange(length - 1, -1, -1)).sum(1)
    return worst_z(torch.bincount(index, minlength=vocab**length), text_law(vocab, length))


@pytest.mark.parametrize("rule", [TARGET_ONLY, REJECTION, COUPLED])
def test_decoded_texts_have_the_target_law(rule: VerifyRule) -> None:
    assert text_z(rule) < 4


@pytest.mark.parametrize("mixed_up", [(Purpose.DRAFT, Purpose.ACCEPT), (Purpose.DRAFT, Purpose.RESIDUAL)])
def test_numbers_used_for_two_purposes_are_seen(
    mixed_up: tuple[Purpose, Purpose], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_as = dict([mixed_up])
    monkeypatch.setattr(
        verify_module, "uniforms", lambda seeds, positions, purpose: uniforms(seeds, positions, drawn_as[purpose])
    )
    assert text_z(REJECTION) > 10


def test_expanded_draft_law_is_zero_elsewhere() -> None:
    q = expand_draft_vocab(torch.tensor([[0.25, 0.75]]), torch.tensor([1, 3]), 5)
    assert q.tolist() == [[0.0, 0.25, 0.0, 0.75, 0.0]]
    assert residual(torch.full((1, 5), 0.2), q).tolist()[0][3] == 0.0
