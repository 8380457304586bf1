"""The draft's learner and when the loop calls it: parts of a rollout, clipping, refused steps, the frozen copy."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from draft_models.config import DraftConfig
from draft_models.types import DraftSample, VerifyRule
from tests.draft_helpers import random_sample, small_draft
from tests.policy_helpers import rollout, run_ranks
from trainer import loop
from trainer.config import RunConfig
from trainer.draft_learner import DraftLearner, DraftSettings, DraftUpdateError, plan_updates
from trainer.metrics import PhaseClock


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


def test_an_update_that_is_not_finite_changes_nothing() -> None:
    learner, bad = make_learner(), captured()
    learner.update(captured(), everything(bad))
    before = copied(learner.state_dict())
    bad[0].aux_hidden[0, 0] = float("nan")
    with pytest.raises(DraftUpdateError, match="refused"):
        learner.update(bad, everything(bad))
    assert same(before, learner.state_dict())
    learner.update(captured(), everything(bad))
    assert not same(before, learner.state_dict())


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
    return SimpleNamespace(capture=object(), learner=learner, clock=PhaseClock(), config=RunConfig(**changes))


def test_the_copy_is_frozen_at_its_step_though_every_group_was_dropped() -> None:
    learner = make_learner()
    run = fake_run(learner, frozen_draft_step=3)
    assert loop.update_draft(run, 1, [], []) == {} and learner.state_dict()["frozen"] is None
    assert loop.update_draft(run, 2, [], []) == {} and learner.state_dict()["frozen"] is not None


def refuse_on_the_last_rank() -> None:
    class Refusing:
        def update(self, *_: object) -> dict[str, Any]:
            raise DraftUpdateError("draft update refused: of the last rank")

    learner = Refusing() if torch.distributed.get_rank() == 1 else None
    with pytest.raises(DraftUpdateError, match="of the last rank"):
        loop.update_draft(fake_run(learner), 0, rollout(), [])


def test_a_refused_update_is_raised_by_ranks_without_a_learner_too() -> None:
    run_ranks(2, refuse_on_the_last_rank)


def test_evaluation_leaves_the_depth_controller_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from rollout_engine.speculation import DepthController, SpecPlan

    controller = DepthController(2, None)
    run = SimpleNamespace(
        config=RunConfig(eval_interval=1),
        eval_prompts=("p",),
        clock=PhaseClock(),
        engine=SimpleNamespace(state=controller.state, load_state=controller.load_state),
        sampling=None,
        reward=None,
    )

    def evaluate(*_: object) -> dict[str, float]:
        controller.observe(SpecPlan(2, 8), [2] * 8)
        return {"eval_reward": 1.0}

    monkeypatch.setattr(loop, "evaluate", evaluate)
    before = controller.state()
    assert loop.after_step(run, 0) == {"eval_reward": 1.0}
    assert controller.state() == before
