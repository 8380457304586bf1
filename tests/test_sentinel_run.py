"""A run whose engine keeps an old draft: the sentinel stops speculation; the run goes on, says so, and resumes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from draft_models.checkpoint import load_draft
from draft_models.eagle3 import Eagle3, Eagle3Config
from rollout_engine.config import RolloutConfig, SpeculationConfig
from rollout_engine.memory import TrainerNeed
from rollout_engine.sglang_checks import check_sglang
from sync.receiver import WeightReceiver
from tests import loop_helpers as helpers
from trainer import run as run_module
from trainer.config import RunConfig
from trainer.hf_files import read_config
from trainer.report import write_report
from trainer.run import Run
from trainer.run_dir import RunDir
from trainer.sentinel_watch import SentinelWatch, can_stop, plain_rollout
from trainer.serving import trainer_need

Config = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("sentinel")
    model = helpers.make_tiny_model(folder / "model")
    changes = {"rollout__verify_rule": "coupled", "draft__lr": 3e-2, "data__rollout_batch_size": 6}
    return lambda name, **more: helpers.tiny_config(model, folder / "runs", name, **changes, **more)


@pytest.fixture
def old_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that take every policy but only the first draft, and hide it from the sync."""
    monkeypatch.setattr(WeightReceiver, "_copy_all", helpers.keep_the_first_draft)
    monkeypatch.setattr(WeightReceiver, "_verify_written", lambda *_: None)


def test_a_stale_draft_stops_speculation_and_the_run_goes_on(
    config: Config, old_draft: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = helpers.run(config("stale", num_rollout=5))
    lines = helpers.metrics(folder)
    (alarm,) = [line for line in lines if "sentinel_alarm" in line]
    step = alarm["step"]
    assert 1 <= step <= 3  # in step 0 the draft is the one that was sent
    text = alarm["sentinel_alarm"]
    assert "\n" not in text and "speculation is stopped and the run goes on without it" in text
    assert text.startswith(f"sentinel, step {step}:") and "--speculation.sentinel false" in text
    out = capsys.readouterr().out
    assert (
        f"slipstream: {text}" in out and "took the draft out of service (sentinel_alarm in the metrics): the dr" in out
    )
    for line in lines:
        assert ("accept_length" in line) == (line["step"] <= step)
        assert line.get("speculation_stopped", 0) == (line["step"] > step)
        assert ("draft_loss" in line) == ("predicted_accept_length" in line) == (line["step"] <= step)
        assert line["policy_version"] == line["step"] and line["logp_diff_max"] < 1e-4
    assert "Speculation was stopped" in write_report(folder).read_text()
    assert not (folder / "draft").exists() and (folder / "draft.not-published" / "model.safetensors").exists()

    first = config("resumed", num_rollout=step + 2)
    helpers.run(first)
    capsys.readouterr()
    helpers.assert_same_run(folder, helpers.run(replace(first, num_rollout=5, resume=True)))
    assert "speculation stays stopped" in capsys.readouterr().out

    again = replace(first, num_rollout=step + 3, resume=True, speculation=SpeculationConfig(sentinel=False))
    again = replace(again, name="mended")
    helpers.run(replace(first, name="mended"))
    last = helpers.metrics(helpers.run(again))[-1]
    assert last["verify_steps"] > 0 and "draft_loss" in last
    mended = Path(again.run_dir) / "mended"
    assert (mended / "draft").exists() and not (mended / "draft.not-published").exists(), "of the earlier life"


def test_a_draft_that_cannot_be_withdrawn_is_told(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an earlier life's draft/ would stay there to be served."""
    folder = helpers.run(config("withdrawn", num_rollout=1))
    published, aside = folder / "draft", folder / "draft.not-published"
    learner = SimpleNamespace(served=load_draft(published))

    def refuse(source: Path, target: Path) -> None:
        if source == published:
            raise OSError(errno.EACCES, "Permission denied", str(source))
        rename(source, target)

    rename = os.rename
    with monkeypatch.context() as patch, pytest.raises(PermissionError, match=str(published)):
        patch.setattr(os, "rename", refuse)
        Run._save_draft(SimpleNamespace(learner=learner), aside, published)
    assert published.exists()
    Run._save_draft(SimpleNamespace(learner=learner), aside, published)
    assert aside.exists() and not published.exists()


def test_the_engine_of_a_resumed_alarm_leaves_no_room_for_a_draft_that_is_not_trained(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config("room", num_rollout=1)
    folder = Path(settings.policy.hf_checkpoint)
    draft = Eagle3(Eagle3Config.from_target(read_config(folder), settings.draft))
    monkeypatch.setattr(run_module, "_plain_engine", lambda *arguments: arguments[-1])
    monkeypatch.setattr(run_module, "build_engine", lambda *_, trainer, **__: trainer)

    def left(*, plain: bool) -> TrainerNeed:
        inputs, directory = SimpleNamespace(folder=folder, tokenizer=None), RunDir(folder / "none")
        return run_module._start_engine(settings, inputs, draft, directory, None, plain=plain)

    assert left(plain=False).draft_bytes > 0 and left(plain=False).capture_bytes > 0
    assert (
        left(plain=True)
        == trainer_need(folder, settings, None)
        == replace(left(plain=False), draft_bytes=0, capture_bytes=0, sync_bytes=left(plain=True).sync_bytes)
    )


def test_a_sound_run_is_left_alone(config: Config) -> None:
    lines = helpers.metrics(helpers.run(config("sound", num_rollout=3)))
    assert all(line["sentinel_verify_steps"] > 50 and "sentinel_alarm" not in line for line in lines)
    assert all(line["sentinel_z"] == 0 and line["sentinel_evidence"] < 0 for line in lines)  # coupled: no chance
    for line in lines:
        assert line["sentinel_accept_length"] == pytest.approx(line["sentinel_expected_accept_length"])


def test_an_engine_that_is_not_ours_only_raises_the_alarm() -> None:
    ours = RolloutConfig(engine="sglang", sglang={"speculative_attention_mode": "decode", "mem_fraction_static": 0.3})
    assert can_stop(ours) and not can_stop(replace(ours, sglang_address="http://elsewhere:30000"))
    plain = plain_rollout(ours)
    assert plain.speculative_algorithm == "NONE" and plain.sglang == {"mem_fraction_static": 0.3}
    check_sglang(plain)


@pytest.mark.parametrize(
    ("change", "is_watching"),
    [
        ({}, True),
        ({"top_p": 0.9}, False),
        ({"top_k": 5}, False),
        ({"top_p": 0.9, "temperature": 0.0}, True),
        ({"speculative_algorithm": "NGRAM"}, False),
        ({"engine": "sglang", "sglang": {"speculative_adaptive": True}}, False),
    ],
)
def test_what_cannot_be_forecast_is_not_watched(change: dict[str, Any], is_watching: bool) -> None:
    assert SentinelWatch(RunConfig(rollout=RolloutConfig(**change))).is_watching is is_watching
