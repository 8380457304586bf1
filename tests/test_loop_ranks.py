"""The whole loop on several gloo ranks takes the step that one rank takes, the draft's training included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import loop_helpers as helpers
from tests.policy_helpers import run_ranks
from trainer.config import RunConfig

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
COMPARED = ("loss", "grad_norm", "draft_loss", "draft_grad_norm", "predicted_accept_length", "reward", "draft_tokens")


def one_step(config: RunConfig) -> tuple[dict, dict[str, torch.Tensor] | None]:
    """(metrics of step 0, the draft's gradients where the learner lives)."""
    from trainer import loop
    from trainer.collective import from_rank_zero
    from trainer.run import build_run

    run = build_run(config)
    loop.sync_weights(run, 0)
    rollout = from_rank_zero(lambda: loop.roll_out(run, 0))
    samples, policy_metrics, captured = loop.update_policy(run, rollout)
    draft_metrics = loop.update_draft(run, 0, samples, captured)
    loop.sync_weights(run, 1)
    reward = sum(s.reward or 0.0 for s in samples)
    gradients = None
    if run.learner is not None:
        gradients = {name: p.grad for name, p in run.learner.draft.named_parameters() if p.grad is not None}
    return {**policy_metrics, **draft_metrics, "reward": reward}, gradients


def check_layouts(config: RunConfig, reference: Path, layouts: list[dict]) -> None:
    metrics, gradients = torch.load(reference)
    for number, layout in enumerate(layouts):
        policy = replace(config.policy, **layout)
        found, found_gradients = one_step(replace(config, name=f"{config.name}-{number}", policy=policy))
        for key in COMPARED:
            assert found[key] == pytest.approx(metrics[key], rel=1e-5), (layout, key)
        for name, gradient in (found_gradients or {}).items():
            error = (gradient - gradients[name]).norm() / gradients[name].norm()
            assert error <= 1e-5, (layout, name, float(error))


@pytest.mark.parametrize(
    ("world", "layouts"), [(2, [TP2, {}, PP2]), pytest.param(4, [TP2], marks=pytest.mark.slow)], ids=["two", "four"]
)
def test_ranks_take_one_ranks_step(tmp_path: Path, world: int, layouts: list[dict]) -> None:
    model = helpers.make_tiny_model(tmp_path / "tiny")
    config = helpers.tiny_config(model, tmp_path / "runs", "one", save_interval=0)
    config = replace(config, policy=replace(config.policy, max_tokens_per_gpu=64))
    torch.save(one_step(config), tmp_path / "reference.pt")
    torch.use_deterministic_algorithms(False)
    run_ranks(world, check_layouts, replace(config, name="ranks"), tmp_path / "reference.pt", layouts)
