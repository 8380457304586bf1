"""Fine-tuning a draft, from prompts to the folder that engines load; what was killed goes on, what is bad is named."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from draft_models.checkpoint import load_draft, save_draft
from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config
from draft_models.spellings import Spelling, spelling_of
from rollout_engine.config import RolloutConfig
from rollout_engine.decoder import Decoder
from rollout_engine.hf_checkpoint import read_config
from rollout_engine.torch_engine import TorchEngine
from rollout_engine.types import EngineError, RolloutRequest, SamplingParams, SpecStats
from tests import finetune_helpers as helpers
from tests.crash_helpers import KILLED, exit_code
from tests.policy_helpers import run_ranks
from trainer import cli, finetune_answers, finetune_steps
from trainer.config import ConfigError
from trainer.draft_learner import DraftLearner
from trainer.finetune import FinetuneError, _split, finetune
from trainer.finetune_answers import as_samples, make_requests, read_answers
from trainer.finetune_config import FinetuneConfig, warnings_of
from trainer.finetune_inputs import draft_settings, new_draft, read_inputs
from trainer.finetune_progress import LENGTH
from trainer.finetune_score import HeldOut
from trainer.finetune_steps import lr_factor

Config = Callable[..., FinetuneConfig]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def unbroken(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.run(helpers.config_for(model, tmp_path_factory.mktemp("unbroken") / "draft"))


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Config:
    def made(*flags: str, out: Path | None = None, **own: Any) -> FinetuneConfig:
        return helpers.config_for(model, out or tmp_path / "draft", *flags, **own)

    return made


@pytest.fixture
def rollouts(unbroken: Path, tmp_path: Path) -> Path:
    """Prompts with the answers that the policy gave to them."""
    return Path(f"{unbroken}.finetune", "answers.jsonl")


def test_a_draft_gets_better_and_is_what_the_engine_then_observes(unbroken: Path, model: Path) -> None:
    lines = helpers.metrics(unbroken)
    judged = [line for line in lines if LENGTH in line]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    assert len(judged) >= 3 and judged[-1][LENGTH] > judged[0][LENGTH] > 1.0
    draft = load_draft(unbroken, read_config(model))
    config = RolloutConfig(controller="fixed", max_running_requests=8)
    engine = TorchEngine(Decoder.from_hf(model, torch.float32), config, draft=draft, eos_token_ids=(0,))
    rows = [json.loads(line) for line in Path(f"{unbroken}.finetune", "answers.jsonl").read_text().splitlines()]
    requests = [
        RolloutRequest(i, 0, tuple(row["prompt"]), SamplingParams(max_new_tokens=24, seed=900 + i))
        for i, row in enumerate(rows)
    ]
    observed = sum((sample.spec for sample in engine.generate(requests)), SpecStats())
    assert observed.accept_length == pytest.approx(max(line[LENGTH] for line in judged), abs=0.25)


def test_what_is_published_is_the_best_and_not_the_last(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its fifth step on the draft is ruined; that goes on until patience ends it."""
    take, settings = DraftLearner._take_step, config(epochs=4, patience=2)
    taken = []

    def ruined(self: DraftLearner) -> None:
        take(self)
        taken.append(1)
        if len(taken) > 4:
            with torch.no_grad():
                self.draft.lm_head.weight.mul_(8.0)

    monkeypatch.setattr(DraftLearner, "_take_step", ruined)
    with monkeypatch.context() as patch:
        patch.setattr("trainer.finetune._publish", lambda *_: raise_error(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            finetune(settings)
    out = helpers.run(replace(settings, resume=True))  # nothing is left to do but to publish
    assert len(taken) == 8
    lengths = [line[LENGTH] for line in helpers.metrics(out) if LENGTH in line]
    assert len(lengths) == 4 and lengths[1] == max(lengths) > lengths[-1] + 0.5
    assert judged_again(out, settings) == pytest.approx(lengths[1], rel=1e-6)


def judged_again(out: Path, config: FinetuneConfig) -> float:
    """The published draft on the held-out texts of its own run."""
    inputs, run = read_inputs(config), config.run
    requests = make_requests(inputs.texts.rows, run.rollout, run.data.n_samples_per_prompt, run.seed)
    samples = as_samples(requests, read_answers(Path(f"{out}.finetune", "answers.jsonl")))
    _, held_out = _split(config, [s for s in samples if len(s.token_ids) >= 2])
    decoder = Decoder.from_hf(config.target, torch.float32)
    judge = HeldOut(held_out, decoder, draft_settings(config), run.draft.max_tokens_per_update)
    return judge.judge(load_draft(out)).accept_length


def test_it_stops_early(config: Config) -> None:
    settings = config("--draft.lr=1e-9", patience=1, epochs=50, eval_interval=1)
    with pytest.raises(FinetuneError, match="not published"):
        finetune(settings)
    assert len(helpers.metrics(Path(settings.out))) <= 5


def test_ones_own_answers_are_rollouts_too(unbroken: Path, config: Config, rollouts: Path) -> None:
    """The answers that it wrote down, given as finished rollouts, train the same draft."""
    data = rollouts.read_text().splitlines()
    out = helpers.run(config(data=str(rollouts)))
    assert len(data) == 48
    assert [line["draft_loss"] for line in helpers.metrics(out)] == pytest.approx(
        [line["draft_loss"] for line in helpers.metrics(unbroken)], rel=1e-4
    )


def test_a_reduced_vocabulary_is_that_of_the_answers(config: Config, model: Path, rollouts: Path) -> None:
    settings = config("--draft.draft-vocab-size=40", data=str(rollouts))
    inputs = read_inputs(settings)
    rows = inputs.texts.rows
    samples = as_samples(make_requests(rows, settings.run.rollout, 1, 0), [row.response_ids or () for row in rows])
    ids = new_draft(settings, inputs, samples).target_ids
    assert ids is not None and len(ids) == 40 and 0 in ids  # 0 ends a response
    said = Counter(token for row in rows for token in row.response_ids or ())
    assert len(said) > 60, "the answers hold few tokens: nothing is left out"
    least = sorted(said.values(), reverse=True)[39]
    assert {token for token, count in said.items() if count > least} <= set(ids.tolist())
    assert all(said[token] >= least or token == 0 for token in ids.tolist())


def test_prompts_fill_a_vocabulary_that_the_answers_do_not(config: Config, rollouts: Path) -> None:
    settings = config("--draft.draft-vocab-size=5", data=str(rollouts))
    requests = [RolloutRequest(0, 0, (9, 9, 7, 7, 7, 200))]
    ids = new_draft(settings, read_inputs(settings), as_samples(requests, [(300, 300)])).target_ids
    assert ids is not None and ids.tolist() == [0, 7, 9, 200, 300]


def test_no_more_than_one_steps_states_are_kept(
    config: Config, rollouts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref] = []
    capture = finetune_steps.capture_samples

    def watched(*args: Any) -> list[Any]:
        assert not [ref for ref in alive if ref() is not None], "states of an earlier step are still there"
        found = capture(*args)
        assert sum(len(sample.token_ids) for sample in found) <= 400
        alive.extend(weakref.ref(tensor) for sample in found for tensor in (sample.aux_hidden, sample.target_hidden))
        return found

    monkeypatch.setattr(finetune_steps, "capture_samples", watched)
    monkeypatch.setattr("trainer.finetune_score.capture_samples", watched)
    helpers.run(config(data=str(rollouts)))
    assert len(alive) > 100


# ---------------------------------------------------------------- kill and resume


@pytest.mark.parametrize("call", [8, 30])
def test_killed_and_resumed_is_unbroken(unbroken: Path, config: Config, call: int) -> None:
    settings = config()
    assert exit_code(helpers.run_and_die, settings, call) == KILLED
    assert_resumes(unbroken, settings)


@pytest.fixture(scope="module")
def num_calls(model: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Calls of a whole run that touch the disk."""
    folder = tmp_path_factory.mktemp("counted")
    settings = helpers.config_for(model, folder / "draft")
    assert exit_code(helpers.run_and_count, settings, folder / "count") == 0
    return int((folder / "count").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("part", range(12))
def test_killed_at_many_places_and_resumed(unbroken: Path, config: Config, num_calls: int, part: int) -> None:
    settings = config()
    assert exit_code(helpers.run_and_die, settings, part * num_calls // 12) == KILLED
    assert_resumes(unbroken, settings)


def assert_resumes(unbroken: Path, settings: FinetuneConfig) -> None:
    out = Path(settings.out)
    if not out.exists():
        resume = Path(f"{out}.finetune", "settings.json").exists()
        helpers.run(replace(settings, resume=resume))
    helpers.assert_same_run(unbroken, out)


def test_answers_go_on_behind_the_last_whole_group(
    unbroken: Path, config: Config, rollouts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune_answers, "GROUP", 10)
    settings = config()
    work = Path(f"{settings.out}.finetune")
    with monkeypatch.context() as patch:
        patch.setattr("trainer.finetune.read_answers", lambda file: raise_error(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            finetune(settings)
    lines = (work / "answers.jsonl").read_text().splitlines(keepends=True)
    (work / "answers.jsonl").write_text("".join(lines[:23]) + lines[23][:9])
    settings_file, now = work / "settings.json", (work / "settings.json").read_text()
    before = {key: value for key, value in json.loads(now).items() if "random numbers" not in key}
    settings_file.write_text(json.dumps(before))  # begun when answers had the numbers of a training run
    with pytest.raises(ConfigError, match=r"random numbers of its answers.*remove .*finetune and start again"):
        finetune(replace(settings, resume=True))
    settings_file.write_text(now)
    asked: list[int] = []
    generate = TorchEngine.generate
    monkeypatch.setattr(TorchEngine, "generate", lambda self, r: (asked.append(len(r)), generate(self, r))[1])
    out = helpers.run(replace(settings, resume=True))
    assert asked == [10, 10, 8]
    assert (work / "answers.jsonl").read_text() == "".join(lines) and len(lines) == 48
    assert helpers.metrics(out)[-1][LENGTH] > 1


def raise_error(error: Exception) -> Any:
    raise error


def test_a_resumed_run_has_the_settings_and_the_data_of_the_first(
    config: Config, rollouts: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(rollouts.read_text())
    with pytest.raises(ConfigError, match="holds no run to resume"):
        finetune(config(data=str(data), resume=True))
    settings = config("--draft.lr=1e-9", data=str(data), patience=1)
    with pytest.raises(FinetuneError):
        finetune(settings)
    with pytest.raises(ConfigError, match="holds a run already: continue it with --resume"):
        finetune(settings)
    with pytest.raises(ConfigError, match=r"draft.lr = 0.5, but the run to resume was started with 1e-09"):
        finetune(config("--draft.lr=0.5", data=str(data), resume=True))
    with pytest.raises(ConfigError, match=r"--epochs = 9, but the run to resume was started with 2"):
        finetune(config("--draft.lr=1e-9", data=str(data), resume=True, epochs=9))
    data.write_text("\n".join(rollouts.read_text().splitlines()[1:]) + "\n")
    with pytest.raises(ConfigError, match="data"):
        finetune(replace(settings, resume=True))
    Path(f"{settings.out}.finetune", "settings.json").write_text('{"target": ')
    with pytest.raises(ConfigError, match=r"settings\.json was changed and is no JSON object: remove"):
        finetune(replace(settings, resume=True))


def test_answers_that_were_changed_are_named(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    for bad in ('{"prompt": [1], "respon', '{"prompt": [1]}', "7"):
        file.write_text(f'{{"prompt": [1], "response": [2, 3]}}\n{bad}\n')
        with pytest.raises(ConfigError, match=r"answers\.jsonl line 2: it was changed and is no answer"):
            read_answers(file)


def test_a_run_that_kept_nothing_is_not_in_the_way(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config()
    monkeypatch.setattr("trainer.finetune.build_engine", lambda *_, **__: raise_error(EngineError("no engine")))
    for _ in range(2):
        with pytest.raises(EngineError, match="no engine"):
            finetune(settings)
        assert not Path(f"{settings.out}.finetune").exists()


# ---------------------------------------------------------------- ranks


def check_ranks(config: FinetuneConfig, useless: FinetuneConfig, reference: Path, start: Path) -> None:
    assert dist.get_world_size() == 2
    check_all_ranks_raise(useless)
    assert finetune(config) == 0
    if dist.get_rank() > 0:
        return
    found, expected = helpers.metrics(Path(config.out)), helpers.metrics(reference)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for key in ("draft_loss", "draft_grad_norm", "draft_tokens", "predicted_accept_length", LENGTH):
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=2e-4), (a["step"], key)
    trained, alone, before = (helpers.weights(folder) for folder in (Path(config.out), reference, start))
    for name, weight in alone.items():
        error = (trained[name] - weight).norm() / (weight - before[name]).norm()
        assert error <= 0.02, (name, float(error))  # Adam turns rounding of small gradients into small steps


def test_two_ranks_take_the_steps_of_one(model: Path, rollouts: Path, tmp_path: Path) -> None:
    def config(name: str, *flags: str) -> FinetuneConfig:
        return helpers.config_for(model, tmp_path / name, *flags, data=str(rollouts))

    reference = helpers.run(config("one"))
    save_draft(Eagle3(Eagle3Config.from_target(read_config(model), DraftConfig()), seed=0), tmp_path / "start")
    useless = replace(config("useless", "--draft.lr=1e-9"), patience=1)
    run_ranks(2, check_ranks, config("two"), useless, reference, tmp_path / "start")


def check_all_ranks_raise(config: FinetuneConfig) -> None:
    with pytest.raises(FinetuneError, match="not published"):
        finetune(config)
    assert Path(f"{config.out}.not-published", "model.safetensors").exists() and not Path(config.out).exists()


# ---------------------------------------------------------------- spellings


def test_import_export_and_training_from_another_spelling(
    unbroken: Path, config: Config, model: Path, rollouts: Path
) -> None:
    there = helpers.run(config(data="", import_=str(unbroken), export="speculators"))
    assert spelling_of(json.loads((there / "config.json").read_text())) is Spelling.SPECULATORS
    back = Path(f"{there}-back")
    helpers.run(config(data="", import_=str(there), out=back))
    assert (back / "config.json").read_text() == (unbroken / "config.json").read_text()
    helpers.loop_helpers.assert_same_tensors(helpers.weights(back), helpers.weights(unbroken))
    for flag in ({"init": str(back)}, {"import_": str(there)}):
        out = helpers.run(config(data=str(rollouts), out=Path(f"{there}-{next(iter(flag))}"), **flag))
        assert helpers.metrics(out)[0]["predicted_accept_length"] > 1.2  # it starts where the other ended


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("spelling", ["sglang", "speculators"])
def test_a_full_disk_names_the_folder_that_was_asked_for(
    spelling: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file-size limit stands for it. Nothing is written elsewhere, and nothing is left."""
    draft = Eagle3(Eagle3Config.from_target(read_config(model), DraftConfig()))
    save_draft(draft, tmp_path / "given")
    arguments = ["finetune-draft", "--target", str(model), "--import", str(tmp_path / "given"), "--export", spelling]
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal_before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the limit kills the process
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    try:
        status = cli.main([*arguments, "--out", str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        signal.signal(signal.SIGXFSZ, signal_before)
    said = capsys.readouterr().err
    assert status == 1 and said.startswith(f"slipstream: error: {tmp_path / 'out'}: the draft cannot be saved (")
    assert said.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["given"]


def test_nan_is_named_and_nothing_is_published(config: Config, rollouts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(data=str(rollouts))
    update = DraftLearner.update

    def broken(self: DraftLearner, captured: Any, plan: Any) -> Any:
        captured[0].aux_hidden[0] = float("nan")
        return update(self, captured, plan)

    monkeypatch.setattr(DraftLearner, "update", broken)
    with pytest.raises(RuntimeError, match=r"draft update refused: .* not finite"):
        finetune(settings)
    assert not Path(settings.out).exists()


def test_a_draft_that_is_no_better_is_put_aside(
    config: Config, unbroken: Path, rollouts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config("--draft.lr=1e-9", data=str(rollouts), init=str(unbroken), patience=1)
    with pytest.raises(FinetuneError, match=f"accept length on held-out text is .*, that of the draft in {unbroken}"):
        finetune(settings)
    assert not Path(settings.out).exists()
    assert load_draft(Path(f"{settings.out}.not-published")).config == load_draft(unbroken).config


def change_config(folder: Path, copy: Path, **changes: Any) -> Path:
    shutil.copytree(folder, copy)
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return copy


def test_bad_input_is_one_line_and_status_2_or_1(
    config: Config, unbroken: Path, model: Path, rollouts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = change_config(unbroken, tmp_path / "other", vocab_size=41)
    wide = change_config(unbroken, tmp_path / "wide", hidden_size=64, target_hidden_size=64)
    theirs = helpers.run(config(data="", import_=str(unbroken), export="speculators", out=tmp_path / "theirs"))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "x").touch()
    bad = tmp_path / "bad.jsonl"
    bad.write_text(f"{rollouts.read_text().splitlines()[0]}\n{{garbled\n")
    silent = tmp_path / "silent.jsonl"
    silent.write_text(json.dumps({"prompt": "ab", "response": ""}) + "\n")
    lonely = tmp_path / "lonely.jsonl"
    lonely.write_text(json.dumps({"prompt": "ab"}) + "\n")
    capsys.readouterr()
    base = ["finetune-draft", "--target", str(model)]
    trained = [*base, "--data", str(rollouts), "--out", str(tmp_path / "out")]
    cases = [
        ([*trained, "--init", str(other)], "vocab_size is 41, the target has"),
        ([*trained, "--init", str(wide)], "hidden_size is 64, the target has 48"),
        ([*trained, "--init", str(theirs)], f"in the spelling of speculators; .* --import {theirs}"),
        (
            [*trained, "--init", str(unbroken), "--draft.draft-vocab-size", "9"],
            "draft_vocab_size = 9, but the draft in",
        ),
        ([*trained, "--draft.aux-layer-ids", "1,2,9"], "expected three ascending ids from 0 to 2"),
        ([*trained, "--lr", "1"], "--lr is a setting of train .* did you mean --draft.lr"),
        ([*trained, "--eps-clip", "1"], "--eps-clip is a setting of train"),
        ([*trained, "--speculative-algorithm", "EAGLE3"], "answers are generated before there is a draft"),
        ([*trained, "--rollout.verify-rule", "coupled"], "depends on the noise that chose each token"),
        ([*trained, "--draft.lr", "-1"], "draft.lr = -1.0: it must be at least 0"),
        ([*trained, "--held-out", "1"], "--held-out 1.0: it must be above 0 and below 1"),
        ([*trained, "--export", "sglan"], "--export 'sglan' is unknown, did you mean 'sglang'"),
        ([*trained, "--epoch", "2"], "did you mean '--epochs'.; slipstream finetune-draft --help"),
        ([*trained, "--num-rollouts", "2"], "unknown flag --num-rollouts, did you mean '--rollout.*finetune-draft"),
        ([*trained, "--import", str(unbroken), "--init", str(unbroken)], "--init and --import are both given"),
        ([*base, "--data", str(rollouts), "--out", str(taken)], "taken exists already"),
        ([*base, "--data", str(bad), "--out", str(tmp_path / "out")], "bad.jsonl line 2: not JSON"),
        ([*base, "--data", str(silent), "--out", str(tmp_path / "out")], "no answer tokens"),
        ([*base, "--data", str(lonely), "--out", str(tmp_path / "out")], "lonely.jsonl: there is one prompt only"),
        ([*base, "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")], "No such file"),
        ([*base, "--out", str(tmp_path / "out")], "--data is not set"),
        (
            [*base, "--import", str(unbroken), "--out", str(tmp_path / "out"), "--resume"],
            "--resume: --import without --data only converts",
        ),
        ([*base, "--import", str(unbroken), "--out", str(tmp_path / "out"), "--patience", "9"], "--patience: --import"),
        (
            [*base, "--import", str(unbroken), "--out", str(tmp_path / "out"), "--draft.lr=1"],
            "--draft.lr: --import wit",
        ),
        ([*base, "--import", str(model), "--out", str(tmp_path / "out")], "is no EAGLE-3 draft as sglang, specforge"),
        (["finetune-draft", "--target", str(tmp_path), "--data", str(rollouts), "--out", "o"], "config.json: missing"),
    ]
    for arguments, message in cases:
        assert cli.main(arguments) == 2, arguments
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith("slipstream: error: ")
        assert re.search(message, err), (arguments, err)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.finetune").exists()


# ---------------------------------------------------------------- pure parts


def test_the_learning_rate_warms_up_and_decays(config: Config) -> None:
    settings = config(warmup_steps=4)
    rates = [lr_factor(settings, step, 20) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.02
    constant = config(warmup_steps=0, lr_decay="constant")
    assert {lr_factor(constant, step, 20) for step in range(20)} == {1.0}


def test_a_filtered_law_is_warned_of(config: Config) -> None:
    assert warnings_of(config()) == []
    (line,) = warnings_of(config("--speculative-num-steps=5"))
    assert "beyond the first 3 are never trained" in line
    (line,) = warnings_of(config("--rollout-top-p=0.9", "--rollout-top-k=20"))
    assert line.startswith("rollout.top_p = 0.9 and top_k = 20: ") and "\n" not in line
