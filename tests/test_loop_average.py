"""A whole run whose published draft is an average, weighed by wall clock and trained in several forwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sync.publish import publish
from tests.loop_helpers import assert_same_run, make_tiny_model, metrics, run, tiny_config, weights
from trainer import loop
from trainer.draft_learner import DraftLearner

AVERAGED = {"draft__ema": 0.5, "draft__token_weighting": "tail", "draft__max_tokens_per_forward": 60}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def test_the_average_is_published_and_exported_and_a_resumed_run_repeats_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learners, sent = [], []

    def note(policy, draft, *rest):
        sent.append({name: tensor.clone() for name, tensor in draft.items()})
        return publish(policy, draft, *rest)

    make = DraftLearner.__init__
    monkeypatch.setattr(DraftLearner, "__init__", lambda self, *a, **k: learners.append(self) or make(self, *a, **k))
    monkeypatch.setattr(loop, "publish", note)
    config = tiny_config(model, tmp_path, "whole", **AVERAGED)
    whole = run(config)
    (learner,) = learners
    exported, averaged = weights(whole, "draft"), learner.served.named_tensors()
    assert learner.served is not learner.draft and len(sent) == 4
    for name, tensor in averaged.items():
        assert torch.equal(exported[name], tensor) and torch.equal(sent[-1][name], tensor), name
        assert not torch.equal(learner.draft.named_tensors()[name], tensor), name
    assert all(line["draft_loss_kind"] == "forward_kl" and line["draft_accept_by_step"] for line in metrics(whole))

    halves = replace(config, name="halves", num_rollout=2)
    run(halves)
    assert_same_run(whole, run(replace(halves, num_rollout=3, resume=True)))
