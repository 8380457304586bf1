"""The draft's learner and when the loop calls it: parts of a rollout, clipping, refused steps, the frozen copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3
from draft_models.training import split_by_tokens
from draft_models.types import DraftSample, VerifyRule
from rollout_engine.config import SpeculationConfig
from tests.draft_helpers import random_sample, small_draft
from tests.policy_helpers import rollout, run_ranks
from trainer import loop
from trainer.config import RunConfig
from trainer.draft_learner import DraftLearner, DraftSettings, DraftUpdateError, plan_updates
from trainer.draft_schedule import Decision, Reason
from trainer.metrics import PhaseClock
from trainer.sentinel_watch import SentinelWatch

ALWAYS = Decision(1.0, Reason.ALWAYS)


def captured() -> list[DraftSample]:
    return [random_sample(16, 5, seed) for seed in range(4)]


def everything(samples: list[DraftSample]) -> list[frozenset[tuple[int, int]]]:
    return [frozenset((s.prompt_id, s.sample_id) for s in samples)]


def make_learner(**changes: Any) -> DraftLearner:
    return DraftLearner(small_draft(), DraftConfig(**changes), DraftSettings(VerifyRule.REJECTION, 3))


def test_parts_are_disjoint_and_within_budget() -> None:
    samples = rollout(num_prompts=6, group=4)
    length = {s.request.key: len(s.request.prompt_ids) + len(s.token_ids) for s in samples}
    parts = plan_updates(samples, DraftConfig(updates_per_step=3, max_tokens_per_update=60), seed=1, step=2)
    assert len(parts) == 3
    assert sum(map(len, parts)) == len(frozenset.union(*parts))
    assert all(sum(length[key] for key in part) <= 60 for part in parts)
    assert parts != plan_updates(samples, DraftConfig(updates_per_step=3, max_tokens_per_update=60), seed=1, step=3)
    assert plan_updates(samples, DraftConfig(max_tokens_per_update=10_000), seed=1, step=2) == [frozenset(length)]


def test_a_part_does_not_fill_up_with_short_samples() -> None:
    """Two lengths, half of the samples each: with short ones taken behind a long one that no longer fits they would be
    far more than half of what is taken."""
    samples = [replace(s, token_ids=(1,) * (91 if s.request.sample_id % 2 else 1)) for s in rollout(40, 4)]
    samples = [replace(s, request=replace(s.request, prompt_ids=(1,) * 9)) for s in samples]
    short = total = 0
    for step in range(50):
        (part,) = plan_updates(samples, DraftConfig(max_tokens_per_update=400), seed=0, step=step)
        total += len(part)
        short += sum(sample_id % 2 == 0 for _, sample_id in part)
    assert 0.4 < short / total < 0.66


def test_a_share_takes_fewer_then_smaller_steps_and_a_burst_more_of_them() -> None:
    samples = rollout(num_prompts=20, group=4)
    config = DraftConfig(updates_per_step=4, max_tokens_per_update=100)
    length = {s.request.key: len(s.request.prompt_ids) + len(s.token_ids) for s in samples}
    found = {}
    for share in (0.1, 0.5, 1.0, 2.0):
        parts = plan_updates(samples, config, seed=1, step=2, share=share)
        found[share] = (len(parts), sum(length[key] for part in parts for key in part))
        assert sum(map(len, parts)) == len(frozenset().union(*parts))
        assert all(sum(length[key] for key in part) <= 100 for part in parts)
    assert [steps for steps, _ in found.values()] == [1, 2, 4, 8]
    tokens = [tokens for _, tokens in found.values()]
    assert [count / tokens[2] for count in tokens] == pytest.approx([0.1, 0.5, 1.0, 2.0], abs=0.12)


def test_a_part_has_at_least_one_sample() -> None:
    (part,) = plan_updates(rollout(), DraftConfig(max_tokens_per_update=1), seed=0, step=0)
    assert len(part) == 1


def test_clip_grad_zero_is_no_clipping() -> None:
    free, clipped = make_learner(clip_grad=0.0), make_learner(clip_grad=1e-3)
    norms = [learner.update(captured(), everything(captured()))["draft_grad_norm"] for learner in (free, clipped)]
    assert norms[0] == norms[1] > 1e-2  # of the gradient as it was before the clip
    left = [torch.cat([p.grad.flatten() for p in learner.draft.parameters()]).norm() for learner in (free, clipped)]
    assert float(left[0]) == pytest.approx(norms[0], rel=1e-5)
    assert float(left[1]) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("changes", [{}, {"ema": 0.5}, {"max_tokens_per_forward": 20}], ids=["plain", "ema", "parts"])
def test_an_update_that_is_not_finite_changes_nothing(changes: dict[str, Any]) -> None:
    learner, bad = make_learner(**changes), captured()
    learner.update(captured(), everything(bad))
    before = copied(learner.state_dict())
    bad[0].aux_hidden[0, 0] = float("nan")
    with pytest.raises(DraftUpdateError, match=r"refused.*hidden states of the captured layers are not finite"):
        learner.update(bad, everything(bad))
    assert same(before, learner.state_dict())
    learner.update(captured(), everything(bad))
    assert not same(before, learner.state_dict())


def test_a_refused_update_names_what_is_not_finite() -> None:
    learner = make_learner()
    with torch.no_grad():
        learner.draft.norm.weight[0] = float("inf")
    with pytest.raises(DraftUpdateError, match=r"the draft's own norm\.weight is not finite"):
        learner.update(captured(), everything(captured()))
    learner = make_learner()
    with torch.no_grad():
        learner.draft.lm_head.weight.mul_(3e38)
    with pytest.raises(DraftUpdateError, match=r"loss nan.*lower draft.lr"):
        learner.update(captured(), everything(captured()))


@pytest.mark.parametrize("most", [1, 20, 40])
def test_gradients_of_several_forwards_are_those_of_one(most: int) -> None:
    """In float64: weights after two steps, and every metric, the forecast's included."""
    found = []
    for limit in (0, most):
        samples = [random_sample(8 + 2 * seed, 3, seed, dtype=torch.float64) for seed in range(5)]
        config = DraftConfig(max_tokens_per_forward=limit, updates_per_step=2)
        learner = DraftLearner(small_draft(dtype=torch.float64), config, DraftSettings(VerifyRule.REJECTION, 3))
        plan = [frozenset({(0, 0), (0, 2), (0, 4)}), frozenset({(0, 1), (0, 3)})]
        metrics = learner.update(samples, plan)
        found.append((metrics, [weight.detach() for weight in learner.draft.parameters()]))
    (one, weights), (several, same_weights) = found
    assert one.keys() == several.keys() and "predicted_accept_length" in one
    for key in one.keys() - {"draft_loss_kind"}:
        assert several[key] == pytest.approx(one[key], rel=1e-9), key
    for a, b in zip(weights, same_weights, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_forwards_stay_within_their_tokens() -> None:
    samples = [random_sample(length, 2, length) for length in (9, 4, 30, 6, 12)]
    runs = [[len(s.token_ids) for s in run] for run in split_by_tokens(samples, 20)]
    assert runs == [[4, 6, 9], [12], [30]]
    assert [[len(s.token_ids) for s in run] for run in split_by_tokens(samples, 0)] == [[4, 6, 9, 12, 30]]
    assert split_by_tokens([], 20) == []


@pytest.mark.parametrize(
    ("rule", "kind", "figure"),
    [
        (VerifyRule.REJECTION, "forward_kl", "draft_overlap_by_step"),
        (VerifyRule.TARGET_ONLY, "cross_entropy", "draft_top1_by_step"),
    ],
)
def test_the_loss_follows_the_rule_and_stands_beside_its_acceptance(rule: VerifyRule, kind: str, figure: str) -> None:
    learner = DraftLearner(small_draft(), DraftConfig(), DraftSettings(rule, 3))
    metrics = learner.update(captured(), everything(captured()))
    assert metrics["draft_loss_kind"] == kind
    assert metrics["draft_accept_by_step"] == metrics[figure] and len(metrics[figure]) == 3
    named = DraftLearner(small_draft(), DraftConfig(loss=kind), DraftSettings(VerifyRule.COUPLED, 3))
    other = named.update(captured(), everything(captured()))
    assert other["draft_loss"] == metrics["draft_loss"]
    assert all(a < b for a, b in zip(other["draft_accept_by_step"], other["draft_overlap_by_step"], strict=True))


# ---- the averaged copy


def bits(draft: Eagle3) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in draft.named_tensors().values()]


def test_the_average_is_what_serves_and_the_draft_is_trained_as_without_it() -> None:
    plain, averaged = make_learner(), make_learner(ema=0.75)
    expected = [weight.detach().clone() for weight in plain.draft.parameters()]
    for _ in range(3):
        for learner in (plain, averaged):
            learner.update(captured(), everything(captured()))
        expected = [a.lerp(b, 0.25) for a, b in zip(expected, plain.draft.parameters(), strict=True)]
    assert all(map(torch.equal, bits(plain.draft), bits(averaged.draft)))
    assert all(map(torch.equal, expected, averaged.served.parameters()))
    assert all(map(torch.equal, bits(averaged.served), averaged.tensors().values()))
    assert not any(map(torch.equal, expected, averaged.draft.parameters()))
    assert plain.served is plain.draft


def test_the_forecast_is_that_of_the_average() -> None:
    learner = make_learner(ema=0.9, lr=0.1)
    learner.update(captured(), everything(captured()))
    serving = DraftLearner(learner.served, DraftConfig(), learner.settings)
    alone = serving.score(captured(), everything(captured()))
    learner.freeze_copy()
    metrics = learner.update(captured(), everything(captured()))
    assert metrics["predicted_accept_length"] == pytest.approx(alone["predicted_accept_length"], rel=1e-6)
    assert metrics["frozen_accept_length"] == metrics["predicted_accept_length"]


def test_the_average_survives_resume_bit_for_bit() -> None:
    whole, first = make_learner(ema=0.75), make_learner(ema=0.75)
    for learner in (whole, first):
        learner.update(captured(), everything(captured()))
    resumed = make_learner(ema=0.75)
    resumed.load_state_dict(copied(first.state_dict()))
    for learner in (whole, resumed):
        learner.update(captured(), everything(captured()))
    assert same(whole.state_dict(), resumed.state_dict())
    assert all(map(torch.equal, bits(whole.served), bits(resumed.served)))


def copied(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return [copied(item) for item in state] if isinstance(state, list) else state


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def fake_run(learner: Any, **changes: Any) -> Any:
    config = RunConfig(**changes)
    watch = SentinelWatch(replace(config, speculation=SpeculationConfig(sentinel=False)))
    return SimpleNamespace(capture=object(), learner=learner, clock=PhaseClock(), config=config, watch=watch)


def test_the_copy_is_frozen_at_its_step_though_every_group_was_dropped() -> None:
    learner = make_learner()
    run = fake_run(learner, frozen_draft_step=3)
    assert loop.update_draft(run, 1, [], [], ALWAYS) == {} and learner.state_dict()["frozen"] is None
    assert loop.update_draft(run, 2, [], [], ALWAYS) == {} and learner.state_dict()["frozen"] is not None


def refuse_on_the_last_rank() -> None:
    class Refusing:
        def update(self, *_: object) -> dict[str, Any]:
            raise DraftUpdateError("draft update refused: of the last rank")

    learner = Refusing() if torch.distributed.get_rank() == 1 else None
    with pytest.raises(DraftUpdateError, match="of the last rank"):
        loop.update_draft(fake_run(learner), 0, rollout(), [], ALWAYS)


def test_a_refused_update_is_raised_by_ranks_without_a_learner_too() -> None:
    run_ranks(2, refuse_on_the_last_rank)


def test_evaluation_is_asked_to_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    @contextmanager
    def leaving_no_trace() -> Iterator[None]:
        events.append("begin")
        yield
        events.append("end")

    run = SimpleNamespace(
        config=RunConfig(eval_interval=1),
        eval_prompts=("p",),
        clock=PhaseClock(),
        engine=SimpleNamespace(leaving_no_trace=leaving_no_trace),
        sampling=None,
        reward=None,
    )

    def evaluate(*_: object) -> dict[str, float]:
        events.append("evaluate")
        return {"eval_reward": 1.0}

    monkeypatch.setattr(loop, "evaluate", evaluate)
    assert loop.after_step(run, 0) == {"eval_reward": 1.0}
    assert events == ["begin", "evaluate", "end"]


def test_a_reduced_vocabulary_tells_what_it_covers() -> None:
    draft = small_draft(draft_vocab_size=11)
    learner = DraftLearner(draft, DraftConfig(max_tokens_per_forward=20), DraftSettings(VerifyRule.REJECTION, 3))
    metrics = learner.update(captured(), everything(captured()))
    next_tokens = [int(token) for s in captured() for token in s.token_ids[s.prompt_len + 1 :]]
    said = sum(token in draft.target_ids.tolist() for token in next_tokens)
    assert metrics["draft_vocab_coverage"] == pytest.approx(said / len(next_tokens)) and 0 < said < len(next_tokens)
    whole = make_learner().update(captured(), everything(captured()))
    assert "draft_vocab_coverage" not in whole
