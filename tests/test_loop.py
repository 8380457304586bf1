"""Whole runs: what they leave behind, reproducibility, resume after kill -9, and what the draft may not touch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout_engine.torch_engine import TorchEngine
from rollout_engine.types import EngineError
from sync.receiver import WeightReceiver
from tests import loop_helpers as helpers
from tests.crash_helpers import KILLED, exit_code
from trainer import loop, run
from trainer.config import ConfigError, RunConfig
from trainer.draft_learner import DraftLearner
from trainer.megatron_policy import MegatronPolicy
from trainer.rewards import RewardError

Config = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Iterator[Config]:
    yield lambda name, **changes: helpers.tiny_config(model, tmp_path, name, **changes)


@pytest.fixture(scope="module")
def unbroken(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that others are compared with."""
    return helpers.run(helpers.tiny_config(model, tmp_path_factory.mktemp("unbroken"), "run"))


def test_what_a_run_leaves_behind(unbroken: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from draft_models.checkpoint import load_draft
    from rollout_engine.hf_checkpoint import read_config

    policy = AutoModelForCausalLM.from_pretrained(unbroken / "policy")
    assert {k: v.shape for k, v in policy.state_dict().items()}.keys() >= helpers.weights(unbroken, "policy").keys()
    assert AutoTokenizer.from_pretrained(unbroken / "policy").chat_template
    draft = load_draft(unbroken / "draft", read_config(unbroken / "policy"))
    assert len(draft.config.aux_layer_ids) == 3
    lines = helpers.metrics(unbroken)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [line["policy_version"] for line in lines] == [0, 1, 2]  # each step is served by the weights before it
    assert {"reward", "accept_length", "predicted_accept_length", "logp_diff_mean", "logp_diff_max"} <= lines[0].keys()
    assert max(line["logp_diff_max"] for line in lines) < 1e-4
    assert all(abs(line["surprise_gap_z"]) < 5 for line in lines), "the engine samples from the policy's own law"
    assert "<svg" in (unbroken / "report.html").read_text()
    assert list((unbroken / "tensorboard").iterdir())


def test_the_same_seed_gives_the_same_run(unbroken: Path, config: Config) -> None:
    helpers.assert_same_run(unbroken, helpers.run(config("again")))


def test_another_seed_gives_another_run(unbroken: Path, config: Config) -> None:
    other = helpers.run(config("other", seed=1, num_rollout=1))
    assert helpers.metrics(other)[0]["reward"] != helpers.metrics(unbroken)[0]["reward"]


def test_policy_is_bitwise_the_same_with_draft_training_off(unbroken: Path, config: Config) -> None:
    # The draft's weights change the rejection rule's tokens, so the rule here is one that leaves tokens alone.
    exact = {"rollout__verify_rule": "coupled", "rollout__batch_invariant": True}
    trained = helpers.run(config("trained", num_rollout=2, **exact))
    frozen = helpers.run(config("frozen", num_rollout=2, draft__train=False, **exact))
    plain = helpers.run(config("plain", num_rollout=2, rollout__speculative_algorithm="NONE", **exact))
    helpers.assert_same_tensors(helpers.weights(trained, "policy"), helpers.weights(frozen, "policy"))
    helpers.assert_same_tensors(helpers.weights(trained, "policy"), helpers.weights(plain, "policy"))
    moved = [
        k for k, v in helpers.weights(trained, "draft").items() if not v.equal(helpers.weights(frozen, "draft")[k])
    ]
    assert moved  # otherwise nothing was trained and the comparison says nothing


def test_forecast_equals_what_the_engine_shows(config: Config) -> None:
    """Given the text, the coupled rule leaves nothing to chance: the forecast is the observation."""
    folder = helpers.run(config("coupled", rollout__verify_rule="coupled", data__rollout_batch_size=6))
    for line in helpers.metrics(folder):
        assert line["predicted_accept_length"] == pytest.approx(line["accept_length"], rel=0.02)
        assert line["predicted_accept_rate_by_position"] == pytest.approx(line["accept_rate_by_position"], abs=0.03)


def test_forecast_sees_a_draft_that_was_not_synced(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: an engine left with an old draft no longer shows what the learner expects."""
    monkeypatch.setattr(WeightReceiver, "_copy_all", helpers.keep_the_first_draft)
    monkeypatch.setattr(WeightReceiver, "_verify_written", lambda *_: None)
    changes = {"draft__lr": 3e-2, "data__rollout_batch_size": 6, "speculation__sentinel": False}
    folder = helpers.run(config("stale", num_rollout=8, rollout__verify_rule="coupled", **changes))
    gaps = [abs(line["predicted_accept_length"] - line["accept_length"]) for line in helpers.metrics(folder)]
    assert gaps[0] < 0.1 and max(gaps) > 0.5  # in step 0 the draft is the one that was sent


def test_resume_equals_an_unbroken_run(unbroken: Path, config: Config) -> None:
    first = config("run", num_rollout=2)
    helpers.run(first)
    with open(Path(first.run_dir) / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "reward": 99.0}\n{"step": 3, "rew')  # of a life that was killed after the checkpoint
    helpers.assert_same_run(unbroken, helpers.run(replace(first, num_rollout=3, resume=True)))


def test_resume_refuses_settings_that_the_checkpoint_would_override(config: Config, unbroken: Path) -> None:
    changed = replace(config("run", policy__lr=2e-3), run_dir=str(unbroken.parent), resume=True)
    written = sorted(unbroken.iterdir())
    with pytest.raises(ConfigError, match=r"policy.lr = 0.002, but .* made with 0.001"):
        helpers.run(changed)
    assert sorted(unbroken.iterdir()) == written


@pytest.mark.parametrize("call", [25, 60])
def test_killed_anywhere_and_resumed(unbroken: Path, config: Config, call: int) -> None:
    settings = config("run")
    assert exit_code(helpers.run_and_die, settings, call) == KILLED
    resumable = Path(settings.run_dir, "run").exists() and any(Path(settings.run_dir, "run").iterdir())
    helpers.assert_same_run(unbroken, helpers.run(replace(settings, resume=resumable)))


@pytest.fixture(scope="module")
def num_calls(model: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Calls of a whole run that touch the disk."""
    folder = tmp_path_factory.mktemp("counted")
    assert exit_code(helpers.run_and_count, helpers.tiny_config(model, folder, "run"), folder / "count") == 0
    return int((folder / "count").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("part", range(18))
def test_killed_at_many_places_and_resumed(unbroken: Path, config: Config, num_calls: int, part: int) -> None:
    settings = config("run")
    assert exit_code(helpers.run_and_die, settings, part * num_calls // 18) == KILLED
    resumable = Path(settings.run_dir, "run").exists() and any(Path(settings.run_dir, "run").iterdir())
    helpers.assert_same_run(unbroken, helpers.run(replace(settings, resume=resumable)))


def test_an_offloaded_engine_gives_its_memory_back_for_the_updates_and_serves_the_same(
    unbroken: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def note(owner: type, name: str, event: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kw: (events.append(event), original(*args, **kw))[1])

    note(TorchEngine, "generate", "roll out")
    note(TorchEngine, "offload", "offload")
    note(MegatronPolicy, "update", "policy")
    note(DraftLearner, "update", "draft")
    note(TorchEngine, "onload", "onload")
    note(WeightReceiver, "receive", "sync")
    folder = helpers.run(config("offloaded", rollout__offload=True))
    assert events == ["sync", *["roll out", "offload", "policy", "draft", "onload", "sync"] * 3]
    helpers.assert_same_run(unbroken, folder)


def test_what_was_captured_is_gone_when_the_engine_takes_its_memory_again(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would lie beside the engine's KV, and beside what the next step captures."""
    captured: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    update, onload = MegatronPolicy.update, TorchEngine.onload

    def updated(*args: Any) -> Any:
        found = update(*args)
        captured.extend(weakref.ref(sample.target_hidden) for sample in found.draft_samples)
        return found

    def onloaded(engine: TorchEngine) -> None:
        alive.append(sum(ref() is not None for ref in captured))
        onload(engine)

    monkeypatch.setattr(MegatronPolicy, "update", updated)
    monkeypatch.setattr(TorchEngine, "onload", onloaded)
    helpers.run(config("released", num_rollout=2, rollout__offload=True))
    assert len(captured) == 24 and alive == [0, 0]


def test_without_offload_the_engine_keeps_its_memory(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(TorchEngine, "offload")
    monkeypatch.delattr(TorchEngine, "onload")
    assert helpers.metrics(helpers.run(config("kept", num_rollout=1)))


@pytest.mark.parametrize("error", [None, RewardError, KeyboardInterrupt])
def test_the_engine_is_closed_on_every_way_out(
    config: Config, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None
) -> None:
    closed: list[TorchEngine] = []
    close = TorchEngine.close
    monkeypatch.setattr(TorchEngine, "close", lambda self: (closed.append(self), close(self))[1])
    settings = config("closed", num_rollout=1)
    if error is None:
        helpers.run(settings)
    else:
        monkeypatch.setattr(loop, "update_policy", raising(error))
        with pytest.raises(error):
            helpers.run(settings)
    assert len(closed) == 1


def raising(error: type[BaseException]) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error("on purpose")

    return fail


def test_an_engine_that_does_not_start_leaves_its_log_and_the_name_free(
    unbroken: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: type[BaseException], *arguments: object, **_: object) -> None:
        work_dir = arguments[-1]
        assert isinstance(work_dir, Path)
        work_dir.mkdir(exist_ok=True)
        (work_dir / "engine.log").write_text("no GPU\n")
        raise error("on purpose")

    settings = config("run")
    left = Path(settings.run_dir) / "run"
    for error in (EngineError, KeyboardInterrupt):
        with monkeypatch.context() as patched:
            patched.setattr(run, "build_engine", partial(fail, error))
            with pytest.raises(error):
                helpers.run(settings)
        assert [path.relative_to(left).as_posix() for path in left.rglob("*.*")] == ["engine/engine.log"]
    helpers.assert_same_run(unbroken, helpers.run(settings))


def test_several_policy_steps_a_rollout_and_several_draft_updates(config: Config) -> None:
    folder = helpers.run(config("steps", num_rollout=2, algorithm__num_steps_per_rollout=2, draft__updates_per_step=3))
    line = helpers.metrics(folder)[0]
    assert line["draft_updates"] == 3
    assert line["ratio_max"] != 1.0  # the second policy step learns from samples of the policy before the first


def test_ngram_needs_no_draft(config: Config) -> None:
    folder = helpers.run(config("ngram", num_rollout=2, rollout__speculative_algorithm="NGRAM"))
    assert not (folder / "draft").exists()
    assert helpers.metrics(folder)[0]["reward"] > 0


def test_groups_without_signal_are_dropped(config: Config) -> None:
    constant = config(
        "constant", num_rollout=1, algorithm__dynamic_sampling=True, data__reward="tests.test_loop:constant_reward"
    )
    folder = helpers.run(constant)
    assert helpers.metrics(folder)[0]["policy_skipped"] == 1
    start = helpers.weights(Path(constant.policy.hf_checkpoint).parent, "tiny")
    helpers.assert_same_tensors(helpers.weights(folder, "policy"), start)


def constant_reward(prompt: str, response: str, label: str) -> float:
    return 1.0


def test_an_existing_run_folder_is_refused(unbroken: Path, config: Config) -> None:
    with pytest.raises(ConfigError, match="--resume"):
        helpers.run(replace(config("run"), run_dir=str(unbroken.parent)))
