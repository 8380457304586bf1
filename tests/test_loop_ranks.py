"""The whole loop on several gloo ranks takes the step that one rank takes, the draft's training included;
a failure of one is raised by all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rollout_engine.types import EngineError
from tests import loop_helpers as helpers
from tests.policy_helpers import run_ranks
from trainer import loop
from trainer.collective import RemoteError, from_rank_zero, tensors_to_rank_zero
from trainer.config import RunConfig
from trainer.run import Run, build_run

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
COMPARED = ("loss", "grad_norm", "draft_loss", "draft_grad_norm", "predicted_accept_length", "reward", "draft_tokens")


def one_step(config: RunConfig) -> tuple[dict, dict[str, torch.Tensor] | None]:
    """(metrics of step 0, the draft's gradients where the learner lives)."""
    run = build_run(config)
    loop.sync_weights(run, 0)
    rollout = from_rank_zero(lambda: loop.roll_out(run, 0))
    samples, policy_metrics, captured = loop.update_policy(run, rollout)
    decision, _ = loop.decide_draft(run, 0, rollout, policy_metrics)
    draft_metrics = loop.update_draft(run, 0, samples, captured, decision)
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
    config = helpers.tiny_config(model, tmp_path / "runs", "one", save_interval=0, draft__train_when="pays")
    config = replace(config, policy=replace(config.policy, max_tokens_per_gpu=64))
    torch.save(one_step(config), tmp_path / "reference.pt")
    torch.use_deterministic_algorithms(False)
    run_ranks(world, check_layouts, replace(config, name="ranks"), tmp_path / "reference.pt", layouts)


def raise_error(error: Exception) -> None:
    raise error


def check_one_line_everywhere(config: RunConfig, rank: int, break_run: Callable[[Run], None], line: str) -> None:
    """What fails on one rank is raised there as itself and on the other as RemoteError with the same line."""
    run = build_run(config)
    break_run(run)
    with pytest.raises(RuntimeError, match=line) as raised:
        loop.train(run)
    assert (raised.type is RemoteError) == (dist.get_rank() != rank)
    run.close()


def engine_dies(run: Run) -> None:
    if run.engine is not None:
        run.engine.generate = lambda requests: raise_error(EngineError("the engine is gone"))


def draft_is_incomplete(run: Run) -> None:
    if run.learner is not None:
        tensors = run.learner.tensors
        run.learner.tensors = lambda: {name: tensor for name, tensor in tensors().items() if name != "fc.weight"}


def metrics_cannot_be_written(run: Run) -> None:
    run._record = lambda *_: raise_error(RuntimeError("no number of the step"))


def draft_cannot_be_saved(run: Run) -> None:
    run._why_unpublished = lambda: ""  # read from metrics, which this run does not write
    run._save_draft = lambda *_: raise_error(RuntimeError("no room for the draft"))


def check_failures(config: RunConfig) -> None:
    last = dist.get_world_size() - 1
    failures = [
        (0, engine_dies, "the engine is gone"),
        (0, draft_is_incomplete, "draft.fc.weight is missing"),
        (0, metrics_cannot_be_written, "no number of the step"),
        (last, draft_cannot_be_saved, "no room for the draft"),
    ]
    for number, (rank, break_run, line) in enumerate(failures):
        check_one_line_everywhere(replace(config, name=f"broken-{number}"), rank, break_run, line)


def test_what_fails_on_one_rank_is_one_line_on_all(tmp_path: Path) -> None:
    model = helpers.make_tiny_model(tmp_path / "tiny")
    config = helpers.tiny_config(model, tmp_path / "runs", "broken", save_interval=0, num_rollout=1)
    run_ranks(2, check_failures, config)


def check_tensors_arrive() -> None:
    sent = {
        "weight": torch.arange(6.0).view(2, 3).T,
        "d2t": torch.tensor([1, 5]),
        "t2d": torch.tensor([True, False]),
        "half": torch.ones(3, dtype=torch.bfloat16),
    }
    found = tensors_to_rank_zero(sent if dist.get_rank() == 1 else {}, torch.device("cpu"))
    assert found.keys() == (sent.keys() if dist.get_rank() == 0 else set())
    assert all(torch.equal(found[name], sent[name]) and found[name].dtype == sent[name].dtype for name in found)


def test_the_draft_comes_to_the_first_rank() -> None:
    run_ranks(2, check_tensors_arrive)


def test_the_draft_comes_onto_the_policys_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever device the last rank has it on: two GPUs in one bundle are refused."""
    monkeypatch.setattr("trainer.collective.world_size", lambda: 2)
    monkeypatch.setattr("trainer.collective.rank", lambda: 0)
    monkeypatch.setattr("trainer.collective.from_last_rank", lambda _: [("w", torch.Size([2]), torch.float32)])
    monkeypatch.setattr("torch.distributed.recv", lambda tensor, src: None)
    assert tensors_to_rank_zero({}, torch.device("meta"))["w"].device.type == "meta"
