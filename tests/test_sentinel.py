"""The sentinel's statistics against enumeration, its error rate, and what it says of a difference."""

from __future__ import annotations

import itertools
import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from draft_models.forecast import EmittedTokens, accept_posterior
from draft_models.histogram_law import texts_log_norm, texts_log_norm_plain, texts_variance, texts_variance_plain
from draft_models.sentinel import (
    BETS,
    Look,
    Pattern,
    Sentinel,
    is_of_text,
    kept_histogram,
    look_at_counts,
    look_at_traces,
    pattern,
    visible_change,
)
from draft_models.training import make_batch
from draft_models.types import VerifyRule
from rollout_engine.types import FinishReason, RolloutRequest, Sample, SpecStats, VersionSpan
from tests.draft_helpers import random_sample
from trainer.draft_forecast import look_at_batch

DEPTH = 2
CHANCES = torch.tensor([[0.3, 0.9], [0.6, 0.2], [0.8, 0.5], [0.4, 0.0], [0.7, 0.6], [0.1, 0.0]], dtype=torch.float64)
NUM_CHAINS = [4, 2]  # of the two texts


def runs(chance_CK: Tensor, rank: int = 0) -> Iterator[tuple[float, list[tuple[int, int, int]]]]:
    """Every way to decode one text, with its chance: steps of (proposed, accepted, kept)."""
    num_chains = len(chance_CK)
    if rank >= num_chains:
        yield 1.0, []
        return
    left = num_chains - rank
    depth = min(DEPTH, left)
    stood = 1.0
    for accepted in range(depth + 1):
        rejected = 1.0 if accepted == depth else 1.0 - float(chance_CK[rank, accepted])
        step = (DEPTH, accepted, min(accepted + 1, left))
        for chance, later in runs(chance_CK, rank + accepted + 1):
            yield stood * rejected * chance, [step, *later]
        if accepted < depth:
            stood *= float(chance_CK[rank, accepted])


def trace(steps: list[tuple[int, int, int]]) -> bytes:
    return array("h", itertools.chain(*steps)).tobytes()


def histogram(steps: list[tuple[int, int, int]]) -> list[int]:
    return [sum(accepted == n for _, accepted, _ in steps) for n in range(DEPTH + 1)]


def both_looks(steps: tuple[list[tuple[int, int, int]], ...], min_effect: float = 0.0) -> list[Look]:
    return [
        look_at_traces(CHANCES, NUM_CHAINS, [trace(s) for s in steps], min_effect),
        look_at_counts(CHANCES, NUM_CHAINS, [histogram(s) for s in steps], min_effect),
    ]


def all_runs(chances: Tensor = CHANCES) -> Iterator[tuple[float, tuple[list[tuple[int, int, int]], ...]]]:
    texts = [list(runs(part)) for part in chances.split(NUM_CHAINS)]
    for (chance_a, steps_a), (chance_b, steps_b) in itertools.product(*texts):
        yield chance_a * chance_b, (steps_a, steps_b)


def test_a_bet_is_fair_and_expectations_are_exact() -> None:
    """Over every way to decode both texts: gains have expectation 1, residuals 0, and the variance is theirs."""
    gain = torch.zeros(2, len(BETS), dtype=torch.float64)
    residual = torch.zeros(2, DEPTH + 1, dtype=torch.float64)
    square, variance = torch.zeros_like(residual), torch.zeros_like(residual)
    total = 0.0
    for chance, steps in all_runs():
        total += chance
        for row, look in enumerate(both_looks(steps)):
            difference = look.observed_K - look.expected_K
            difference = torch.cat((difference, difference.sum()[None]))
            gain[row] += chance * look.log_gain_C.exp()
            residual[row] += chance * difference
            square[row] += chance * difference**2
            variance[row] += chance * torch.cat((look.variance_K, look.variance[None]))
    assert total == pytest.approx(1.0)
    torch.testing.assert_close(gain, torch.ones_like(gain))
    torch.testing.assert_close(residual, torch.zeros_like(residual), atol=1e-12, rtol=0)
    torch.testing.assert_close(square, variance)


@pytest.mark.parametrize("shift", [-0.1, 0.1, "down at the first, up at the second"])
def test_no_bet_wins_on_differences_within_the_tolerance(shift: float | str) -> None:
    """The engine's chances differ from the forecast by 0.1 everywhere; a sentinel that tolerates less does win."""
    signs = torch.tensor([-0.1, 0.1] if isinstance(shift, str) else [shift, shift], dtype=torch.float64)
    shifted = (CHANCES + signs * (CHANCES > 0)).clamp(0, 1)
    gains = {}
    for min_effect in (0.1, 0.02):
        gain = torch.zeros(2, len(BETS), dtype=torch.float64)
        for chance, steps in all_runs(shifted):
            gain += chance * torch.stack([look.log_gain_C for look in both_looks(steps, min_effect)]).exp()
        gains[min_effect] = gain
    assert float(gains[0.1].max()) <= 1 + 1e-9
    assert float(gains[0.02].max(1).values.min()) > 1.01


@pytest.mark.parametrize("min_effect", [0.0, 0.02])
@pytest.mark.parametrize("depth", [1, 3, 7])
def test_the_law_by_tokens_is_the_law_by_steps(depth: int, min_effect: float) -> None:
    """Texts of all lengths, some of which no float64 holds without its scale; also chances that are certain."""
    generator = torch.Generator().manual_seed(depth)
    num_chains = [1, 301, 2, depth, depth + 1, 64, 65, 1, 130]
    chance_QK = torch.rand(sum(num_chains), depth, generator=generator, dtype=torch.float64)
    chance_QK[1:302] = 1.0
    chance_QK[310::3] = chance_QK[310::3].round()
    exponent_CM = torch.tensor([[bet.exponent(n) for n in range(depth + 1)] for bet in BETS], dtype=torch.float64)
    feature_MF = torch.randn(depth + 1, 4, generator=generator, dtype=torch.float64)
    for fast, plain, values in (
        (texts_log_norm, texts_log_norm_plain, exponent_CM),
        (texts_variance, texts_variance_plain, feature_MF),
    ):
        expected = plain(chance_QK, num_chains, values, min_effect)
        torch.testing.assert_close(fast(chance_QK, num_chains, values, min_effect), expected, rtol=1e-10, atol=1e-10)
        assert float(expected.abs().max()) > (800 if values is exponent_CM and depth > 1 else 1)


def test_drafts_behind_the_end_of_a_text_are_taken_out() -> None:
    """SGLang counts them; the bonus token behind accepted drafts is none of them."""
    assert kept_histogram([1, 0, 2], 7) == [1, 0, 2]  # 1 + 3 + 3 tokens
    assert kept_histogram([1, 0, 2], 6) == [1, 0, 2]  # the end is an accepted draft
    assert kept_histogram([1, 0, 2], 5) == [1, 1, 1]  # one more was accepted behind it
    assert kept_histogram([1, 2, 0], 5) == [1, 2, 0]


@pytest.mark.parametrize(
    ("histogram", "num_chains", "expected"),
    [
        ([1, 0, 2], 7, True),
        ([1, 0, 2], 5, True),  # of the last step only its first token stands in the text
        ([1, 0, 2], 4, False),  # a step behind the end
        ([1, 0, 2], 8, False),  # a token that no step brought
        ([0, 0, 0], 1, False),
        ([3, 0, 0], 3, True),
        ([3, 0, 0], 2, False),
    ],
)
def test_a_histogram_is_of_the_text_or_not(histogram: list[int], num_chains: int, expected: bool) -> None:
    assert is_of_text(histogram, num_chains) is expected


def test_a_request_that_was_prefilled_again_is_left_out() -> None:
    """SGLang throws requests back under KV pressure: its histogram goes on, and the new prefill brings a token too."""
    batch = make_batch([random_sample(9, 3, 0)])
    assert batch is not None and batch.num_chains == (5,)
    (key,) = batch.sample_keys
    for steps, expected in (([3, 1, 0], 4), ([2, 1, 0], 0)):  # 3 + 2 tokens, or 2 + 2 and that of a prefill
        spec = SpecStats(sum(steps), sum(steps), tuple(steps), (sum(steps),) * 2, (1, 0))
        sample = Sample(RolloutRequest(*key, (1,)), (), (), (VersionSpan(0, 6, 0),), FinishReason.LENGTH, spec)
        look = look_at_batch(torch.full((5, DEPTH), 0.1), batch, {key: sample}, 0.02)
        assert int(look.num_steps) == expected


def test_a_step_that_the_draft_model_had_no_part_in_only_moves_the_start() -> None:
    steps = [(0, 0, 1), (DEPTH, 1, 2), (0, 1, 1)]
    look = look_at_traces(CHANCES[:4], [4], [trace(steps)], 0.0)
    assert float(look.num_steps) == 1
    torch.testing.assert_close(look.expected_K, torch.tensor([0.6, 0.12], dtype=torch.float64))
    assert look.observed_K.tolist() == [1, 0]


def test_a_step_that_drafts_less_is_expected_to_accept_less() -> None:
    look = look_at_traces(CHANCES[:4], [4], [trace([(1, 1, 2), (DEPTH, 2, 2)])], 0.0)
    torch.testing.assert_close(look.expected_K, torch.tensor([0.3 + 0.8, 0.8 * 0.5], dtype=torch.float64))


def test_a_trace_that_is_not_the_text_s_is_refused() -> None:
    with pytest.raises(ValueError, match="a text of 4 tokens kept 3"):
        look_at_traces(CHANCES[:4], [4], [trace([(DEPTH, 2, 3)])], 0.0)


@pytest.mark.parametrize("traced", [True, False])
def test_aborted_texts_and_forecasts_that_are_no_number_are_left_out(traced: bool) -> None:
    texts = [random_sample(9, 3, seed) for seed in range(2)]
    batch = make_batch(texts)
    assert batch is not None and batch.num_chains == (5, 5)
    steps = [(DEPTH, 0, 1)] * 5
    spec = SpecStats(5, 5, (5, 0, 0), (5, 5), (0, 0))
    shown = {
        key: Sample(RolloutRequest(*key, (1,)), (), (), (VersionSpan(0, 6, 0),), FinishReason.LENGTH, spec)
        for key in batch.sample_keys
    }
    if traced:
        shown = {key: replace(sample, trace=trace(steps)) for key, sample in shown.items()}
    chances = torch.full((10, DEPTH), 0.1)
    assert int(look_at_batch(chances, batch, shown, 0.02).num_steps) == 10
    first = batch.sample_keys[0]
    aborted = shown | {first: replace(shown[first], finish_reason=FinishReason.ABORT)}
    assert int(look_at_batch(chances, batch, aborted, 0.02).num_steps) == 5
    chances[7, 0] = torch.nan
    look = look_at_batch(chances, batch, shown, 0.02)
    assert int(look.num_steps) == 5 and bool(look.flat().isfinite().all())


def test_a_token_that_neither_law_holds_is_never_accepted() -> None:
    logits = torch.zeros(2, 8)
    logits[:, 3] = torch.tensor([-200.0, 0.0])  # q underflows in the first row, p in both
    emitted = EmittedTokens(torch.tensor([3, 3]), torch.zeros(2), torch.zeros(2), torch.tensor([5, 6]))
    found = accept_posterior(VerifyRule.REJECTION, logits, torch.ones(2), emitted)
    assert found.tolist() == [0.0, 1.0]


# ------------------------------------------------------------ over looks

ACCEPTANCE = torch.tensor([0.75, 0.7, 0.6], dtype=torch.float64)
MIN_EFFECT = 0.02


def simulated(num_steps: int, generator: torch.Generator, acceptance: Tensor = ACCEPTANCE) -> Look:
    """A look at `num_steps` verify steps that accept with these chances, forecast with ACCEPTANCE."""
    stands_SK = torch.rand(num_steps, len(ACCEPTANCE), generator=generator, dtype=torch.float64) < acceptance
    accepted = stands_SK.long().cumprod(1).sum(1).tolist()
    steps = [(len(ACCEPTANCE), n, n + 1) for n in accepted]
    num_chains = sum(kept for _, _, kept in steps)
    return look_at_traces(ACCEPTANCE.expand(num_chains, -1), [num_chains], [trace(steps)], MIN_EFFECT)


def test_a_sound_engine_is_seldom_accused() -> None:
    """At alpha = 0.2 and no tolerance, 100 runs of 12 looks: the bound is 20, and the bets do play."""
    generator = torch.Generator().manual_seed(1)
    alarms, top = 0, []
    for _ in range(100):
        sentinel = Sentinel(0.2)
        highest = -math.inf
        for step in range(12):
            look = simulated(40, generator)
            exact = look.log_gain_C
            sentinel.take(look, step)
            assert bool(exact.isfinite().all())
            highest = max(highest, sentinel.evidence)
        alarms += sentinel.alarm is not None
        top.append(highest)
    assert alarms <= 20
    assert max(top) > -0.5


def test_a_change_is_dated() -> None:
    generator = torch.Generator().manual_seed(2)
    sentinel = Sentinel(1e-3)
    for step in range(30):
        assert sentinel.take(simulated(200, generator), step) is None
    broken = ACCEPTANCE * torch.tensor([1.0, 0.5, 0.5])
    alarms = [sentinel.take(simulated(200, generator, broken), step) for step in range(30, 34)]
    alarm = sentinel.alarm
    assert alarm is not None and alarms.count(None) == 3
    assert alarm.since_step == 30 and alarm.was_sound and alarm.pattern is Pattern.CHAIN
    assert alarm.rates[1] < 0.65 * alarm.expected_rates[1]
    assert sentinel.take(simulated(200, generator, broken), 40) is None  # it says so once


def test_state_survives_a_checkpoint() -> None:
    broken = ACCEPTANCE * 0.85

    def play(breaks: int | None) -> Sentinel:
        generator, sentinel = torch.Generator().manual_seed(3), Sentinel(1e-3)
        for step in range(12):
            if step == breaks:
                state = json.loads(json.dumps(sentinel.state()))
                sentinel = Sentinel(1e-3)
                sentinel.load_state(state, len(ACCEPTANCE))
            sentinel.take(simulated(60, generator, broken), step)
        return sentinel

    unbroken = play(None)
    assert unbroken.alarm is not None and unbroken.alarm.step > 3
    for breaks in (0, 3, 11):
        resumed = play(breaks)
        assert resumed.alarm == unbroken.alarm and resumed.evidence == unbroken.evidence


@pytest.mark.parametrize(
    ("factor", "found"),
    [
        ([0.2, 0.2, 0.2], Pattern.LOST),
        ([0.8, 0.8, 0.8], Pattern.DIFFERENT),
        ([1.0, 0.5, 0.5], Pattern.CHAIN),
        ([1.2, 1.2, 1.2], Pattern.HIGHER),
    ],
)
def test_patterns(factor: list[float], found: Pattern) -> None:
    look = simulated(1000, torch.Generator().manual_seed(4), ACCEPTANCE * torch.tensor(factor))
    assert pattern(look) is found


@pytest.mark.parametrize("num_steps", [500, 4000])
def test_the_smallest_visible_change_is_seen_half_of_the_time(num_steps: int) -> None:
    change = visible_change(ACCEPTANCE.tolist(), num_steps, alpha=1e-3, min_effect=MIN_EFFECT)
    assert change > MIN_EFFECT
    generator = torch.Generator().manual_seed(5)
    seen = {}
    for part in (0.75, 1.0, 1.3):
        looks = [simulated(num_steps, generator, ACCEPTANCE - part * change) for _ in range(40)]
        seen[part] = sum(Sentinel(1e-3).take(look, 0) is not None for look in looks) / len(looks)
    assert seen[0.75] < 0.3 and 0.2 < seen[1.0] < 0.85 and seen[1.3] > 0.9
