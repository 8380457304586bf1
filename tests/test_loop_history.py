"""History drafts in a run: nothing about the policy changes, and a resumed run looks up what the unbroken one would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rollout_engine.history_plan as plan_module
from rollout_engine.speculation import CostTable
from tests import loop_helpers as helpers
from trainer.config import RunConfig

HISTORY: dict[str, Any] = {"speculation__history": True, "speculation__history_min_match": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.make_tiny_model(tmp_path_factory.mktemp("model") / "policy")


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Three prompts, so that every step is an epoch."""
    prompts = tmp_path / "three.jsonl"
    prompts.write_text("".join((model / "train.jsonl").read_text().splitlines(keepends=True)[:3]))

    def make(name: str, **changes: Any) -> RunConfig:
        changes = {"data__prompt_data": str(prompts), "data__num_eval_prompts": 2, "eval_interval": 1} | changes
        return helpers.tiny_config(model, tmp_path / "runs", name, **changes)

    return make


@pytest.fixture(autouse=True)
def _history_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever anything matches: a policy of random weights is easier to follow for a draft model than for history."""
    monkeypatch.setattr(plan_module, "prefers_history", lambda gains, depth, width: True)


def test_a_resumed_run_is_the_unbroken_one(config: Callable[..., RunConfig]) -> None:
    """Under the rejection rule every proposal leaves its mark on the tokens; evaluations come in between."""
    unbroken = helpers.run(config("unbroken", **HISTORY))
    lines = helpers.metrics(unbroken)
    assert all(line["history_verify_steps"] > 0 and "expected_accept_length" not in line for line in lines[1:])
    helpers.run(config("run", num_rollout=2, **HISTORY))
    helpers.assert_same_run(unbroken, helpers.run(replace(config("run", **HISTORY), resume=True)))


def test_a_run_is_bitwise_the_same_with_evaluations(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Of the run's own prompts. With given costs that leave a choice, what the engine has learnt leaves its mark."""
    drafted, given = (1.0, 1.6, 2.2, 2.8), (1.0, 1.01, 1.02, 1.03)
    CostTable((1,), (drafted,), (given,)).save(tmp_path / "costs.json")
    changes = {"rollout__controller": "adaptive", "rollout__cost_table": str(tmp_path / "costs.json"), **HISTORY}
    changes["data__eval_prompt_data"] = str(tmp_path / "three.jsonl")
    watched = helpers.run(config("watched", num_rollout=4, **changes))
    left_alone = helpers.run(config("left_alone", num_rollout=4, eval_interval=0, **changes))
    lines = helpers.metrics(watched)
    assert all("eval_reward" in line for line in lines[1:])
    assert any(line.get("history_verify_steps") for line in lines[1:]), "history drafts after an evaluation"
    without = [{key: value for key, value in line.items() if not key.startswith("eval_")} for line in lines]
    assert without == helpers.metrics(left_alone)
    for name in ("policy", "draft"):
        helpers.assert_same_tensors(helpers.weights(watched, name), helpers.weights(left_alone, name))


def test_the_policy_is_bitwise_the_same_with_history(config: Callable[..., RunConfig]) -> None:
    exact = {"rollout__verify_rule": "coupled", "rollout__batch_invariant": True, "num_rollout": 2}
    with_history, without = (helpers.run(config(name, **exact, **more)) for name, more in (("a", HISTORY), ("b", {})))
    helpers.assert_same_tensors(helpers.weights(with_history, "policy"), helpers.weights(without, "policy"))
    assert helpers.metrics(with_history)[-1]["history_verify_steps"] > 0
