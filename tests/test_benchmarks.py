"""Benchmarks: fair order, honest intervals, complete result lines, and a tiny run of each."""

from __future__ import annotations

import importlib
import io
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import (
    common,
    gpu_session,
    rollout,
    rollout_anchor,
    rollout_direct,
    rollout_runs,
    rollout_sglang,
    step,
    sync,
)
from rollout_engine.speculation import CostTable
from rollout_engine.types import EngineError, FinishReason, RolloutRequest, Sample, SamplingParams, SpecStats
from sync.plan import SyncError
from trainer.config import ConfigError
from trainer.make_model import MakeModelConfig, make_model


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "policy"
    return make_model(MakeModelConfig(out=out, eps_residual=0.2, num_train_prompts=16, num_eval_prompts=4))


def result_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["rollout", "sync", "draft", "draft_schedule", "step"])
def test_help(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert exit_.value.code == 0 and "--results" in capsys.readouterr().out


def test_paired_ratio_uses_pairs():
    # Each pair has the ratio 2 although seeds differ tenfold: no spread. Unpaired, the interval would be huge.
    ratio = common.paired_ratio([20.0, 200.0, 2.0], [10.0, 100.0, 1.0])
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))
    spread = common.paired_ratio([2.0, 8.0], [1.0, 1.0])
    assert spread.mean == pytest.approx(4.0)
    # log ratios log2, log8: mean log4, standard error log2, t(1 degree) = 12.706
    assert math.log(spread.high) == pytest.approx(math.log(4) + 12.706 * math.log(2))
    assert str(common.paired_ratio([3.0], [2.0])) == "1.50"


def test_interleaving_meets_every_arm_once_a_round_and_rotates():
    calls: list[tuple[str, int]] = []
    arms = {name: lambda n, name=name: calls.append((name, n)) for name in "ab"}
    common.interleaved(arms, [7, 8])
    assert calls == [("a", 7), ("b", 7), ("b", 8), ("a", 8)]


def test_a_transformers_response_ends_with_its_first_end_of_sequence():
    assert rollout.response_length([5, 6, 0, 1, 1], (0,)) == 3
    assert rollout.response_length([5, 6, 7], (0,)) == 3


def test_tau_leaves_out_the_bonus_token_behind_the_end_of_a_text():
    def sample(num_tokens: int, num_accepted: int, num_plain_steps: int) -> Sample:
        spec = SpecStats(1 + num_plain_steps, 1, (0, 0, 1), (1, 1), (1, num_accepted - 1))
        return Sample(RolloutRequest(0, 0, (1,)), (7,) * num_tokens, (), (), FinishReason.STOP, spec)

    whole = sample(1 + 3 + 1, num_accepted=2, num_plain_steps=1)  # prefill, two drafts and a bonus, a plain step
    cut = sample(1 + 2, num_accepted=2, num_plain_steps=0)  # the second draft was the end

    def tau(*samples: Sample) -> float | None:
        spec = sum((sample.spec for sample in samples), SpecStats())
        return rollout_runs.emitted_per_verify(spec, [len(sample.token_ids) for sample in samples])

    assert tau(whole) == whole.spec.accept_length == 3.0
    assert tau(cut) == 2.0 < cut.spec.accept_length
    assert tau(whole, cut) == 2.5


def test_rollout_compares_all_arms(policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rollout, "COST_TABLE_BUDGET_S", 0.0)
    results = tmp_path / "rollout.jsonl"
    arguments = f"--policy {policy_dir} --results {results} --batch-sizes 2 --seeds 2 --waves 2 --max-new-tokens 12"
    rollout.main(
        [
            *arguments.split(),
            "--train-draft-steps",
            "2",
            "--train-draft-samples",
            "8",
            "--save-cost-table",
            str(tmp_path / "new" / "costs.json"),
        ]
    )
    rows = {row["arm"]: row for row in result_lines(results)}
    assert set(rows) == set(rollout.ARMS)
    for row in rows.values():
        assert {"command", "hardware", "commit", "date", "rule", "target_entropy"} <= set(row)
        assert len(row["tokens_per_s_by_seed"]) == 2 and "SYNTHETIC" in row["policy_note"]
    eagle = rows["eagle3"]
    assert eagle["speed_over_tau"] == pytest.approx(eagle["speed_vs_plain"]["mean"] / eagle["tau"])
    assert 1.0 <= eagle["tau"] <= eagle["accept_length"]
    table = CostTable.load(tmp_path / "new" / "costs.json")
    assert table.batches == (1, 2) and table.max_depth == 3
    assert "accept_length" not in rows["none"] and "speed_vs_plain" not in rows["none"]


def test_a_wrong_arm_or_policy_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        rollout.main(["--policy", "x", "--spec", "eagle4"])
    assert "unknown arm 'eagle4'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        rollout.main(["--policy", "x", "--spec", "none", "--save-cost-table", "t.json"])
    assert "--save-cost-table needs the arm eagle3 or ngram" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        common.run(lambda: rollout.main(["--policy", str(tmp_path)]))
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and "config.json" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("draft", "--target x --samples 0", "argument --samples: '0' is not a whole number from 1 on"),
        ("rollout", "--policy x --batch-sizes 1,-2", "argument --batch-sizes: '-2' is not a whole number from 1 on"),
        ("history", "--policy x --group two", "argument --group: 'two' is not a whole number from 1 on"),
        ("gpu_session", "train --out x --fast", "unrecognized arguments: --fast"),
        ("rl_on_gpu", "--work x --out y --samples 0", "argument --samples: '0' is not a whole number from 1 on"),
        ("history", "", "the following arguments are required: --policy/--target"),
    ],
)
def test_wrong_arguments_are_one_line(name: str, arguments: str, message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(f"benchmarks.{name}").main(arguments.split())
    said = f"slipstream: error: {message}; see python -m benchmarks.{name} --help\n"
    assert exit_.value.code == 2 and capsys.readouterr().err == said


@pytest.mark.parametrize("error", [SyncError, EngineError])
def test_a_failed_sync_and_a_dead_engine_are_one_line(error: type[Exception], capsys: pytest.CaptureFixture[str]):
    def fail() -> None:
        raise error("version 3 did not arrive")

    with pytest.raises(SystemExit) as exit_:
        common.run(fail)
    assert exit_.value.code == 1 and capsys.readouterr().err == "slipstream: error: version 3 did not arrive\n"


def test_results_that_cannot_be_written_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_:
        common.run(lambda: common.append_results(tmp_path / "file" / "results.jsonl", [], {}))
    said = capsys.readouterr().err
    assert exit_.value.code == 1 and said.count("\n") == 1 and str(tmp_path / "file") in said


def run_with(seconds: float, lengths: tuple[int, ...], finish_s: tuple[float, ...] | None = None, **more):
    return rollout_runs.ArmRun(seconds, lengths, finish_s or (seconds,) * len(lengths), **more)


def test_runs_of_another_setting_in_the_same_place_are_refused(tmp_path: Path):
    def check(work: Path, settings: dict, origin: dict, *, holds_runs: bool = True) -> None:
        common.check_same_setting(work, settings, origin, holds_runs=holds_runs)

    hardware = {"cpu": "c", "cores": 2, "gpu": "H200", "torch": "2"}
    settings, origin = {"lr": 0.5, "seeds": (0, 1)}, {"commit": "a1", "hardware": hardware, "versions": {"sglang": "1"}}
    with pytest.raises(ConfigError, match="holds runs of other settings, commit, hardware, versions"):
        check(tmp_path, settings, origin)  # nobody told of what they are
    check(tmp_path, settings, origin, holds_runs=False)
    check(tmp_path, settings, origin)
    check(tmp_path, settings, origin | {"hardware": hardware | {"cores": 4}})
    with pytest.raises(ConfigError, match="holds runs of other settings: give another --work"):
        check(tmp_path, settings | {"lr": 1.0}, origin)
    for key, value in (("commit", "b2"), ("hardware", hardware | {"gpu": "H100"}), ("versions", {"sglang": "2"})):
        with pytest.raises(ConfigError, match=f"holds runs of other {key}"):
            check(tmp_path, settings, origin | {key: value})


def test_waves_join_to_one_run_whose_makespan_is_a_waves():
    stats = SpecStats(2, 2, (1, 1), (2,), (1,))
    waves = [run_with(1.0, (3, 4), (0.5, 1.0), spec=stats), run_with(3.0, (5,), (3.0,), spec=stats)]
    joined = rollout_runs.joined(waves)
    assert (joined.seconds, joined.lengths, joined.num_waves) == (4.0, (3, 4, 5), 2)
    assert joined.spec == stats + stats and joined.tokens_per_s == 3.0
    assert rollout_runs.joined([run_with(1.0, (3,))]).spec is None
    row = rollout_runs.arm_row("eagle3", [joined], [run_with(4.0, (6,))])
    assert row["makespan_s"] == 2.0 and row["speed_vs_plain"].mean == pytest.approx(2.0)
    assert [row[f"finish_s_p{p}"] for p in (50, 90, 99)] == [1.0, 3.0, 3.0]


def test_a_seed_decides_the_waves_and_repeats_no_prompt():
    prompts = rollout_sglang.PromptSet(tuple((token, 7) for token in range(20)), (0,))
    waves = rollout_sglang.waves_of(prompts, SamplingParams(), 5, 4, seed=1)
    assert [len(wave) for wave in waves] == [5, 5, 5, 5]
    assert len({request.prompt_ids for wave in waves for request in wave}) == 20
    assert waves == rollout_sglang.waves_of(prompts, SamplingParams(), 5, 4, seed=1)
    assert waves != rollout_sglang.waves_of(prompts, SamplingParams(), 5, 4, seed=2)
    more = rollout_sglang.waves_of(prompts, SamplingParams(), 30, 1, seed=1)[0]  # more than there are prompts
    assert len(more) == 30 and len({request.key for request in more}) == 30


def test_rows_compare_ours_with_each_driver_and_each_driver_with_its_own_plain_decoding():
    arms = [
        rollout_sglang.Arm(spec, driver, run=None, flush=None)
        for spec, driver in [("none", "slipstream"), ("none", "engine"), ("eagle3", "slipstream"), ("eagle3", "engine")]
    ]
    sample = Sample(RolloutRequest(0, 0, (1,)), (7, 8), (-1.0, -3.0), (), FinishReason.STOP)
    runs = {
        "none/slipstream": [run_with(2.0, (4, 6), samples=(sample,))],
        "none/engine": [run_with(1.0, (6, 4))],
        "eagle3/slipstream": [run_with(1.0, (20,), samples=(sample,))],
        "eagle3/engine": [run_with(1.0, (40,))],
    }
    rows = {(row["arm"], row["driver"]): row for row in rollout_sglang.rows_of(arms, runs)}
    ours, speculative = rows["none", "slipstream"], rows["eagle3", "slipstream"]
    assert ours["speed_vs_engine"].mean == pytest.approx(0.5) and ours["same_lengths_as_engine"]
    assert speculative["speed_vs_engine"].mean == pytest.approx(0.5) and not speculative["same_lengths_as_engine"]
    assert speculative["speed_vs_plain"].mean == rows["eagle3", "engine"]["speed_vs_plain"].mean == pytest.approx(4.0)
    assert ours["sampled_entropy"] == 2.0 and "speed_vs_http" not in ours and "speed_vs_plain" not in ours


def test_sglangs_answers_become_a_run():
    plain = rollout_anchor.run_of(2.0, [{"completion_tokens": 3, "e2e_latency": 1.5}], draft_depth=0)
    assert plain == rollout_runs.ArmRun(2.0, (3,), (1.5,), SpecStats(num_decode_steps=2))
    spec = {"completion_tokens": 6, "e2e_latency": 1.0, "spec_verify_ct": 3, "spec_correct_drafts_histogram": [1, 2]}
    run = rollout_anchor.run_of(1.0, [spec, spec], draft_depth=3)
    assert run.spec == SpecStats(6, 6, (2, 4, 0, 0), (6, 6, 6), (4, 0, 0))
    assert rollout_anchor.draft_depth({"speculative_algorithm": "EAGLE3", "speculative_num_draft_tokens": 4}) == 3
    assert rollout_anchor.draft_depth({"speculative_algorithm": None, "speculative_num_draft_tokens": None}) == 0


def test_servers_that_are_not_set_alike_are_found():
    ours = {"port": 1, "dtype": "bfloat16", "mem_fraction_static": 0.1, "only_here": 1}
    assert rollout_anchor.setting_differences(ours, ours | {"port": 2}) == {}
    found = rollout_anchor.setting_differences(ours, {"port": 1, "dtype": "bfloat16", "mem_fraction_static": 0.2})
    assert found == {"mem_fraction_static": [0.1, 0.2]}


def test_a_request_keeps_its_sampling_when_sglang_is_driven_directly():
    request = RolloutRequest(0, 0, (1,), SamplingParams(0.7, 0.9, 0, 33, stop_token_ids=(5,)))
    told = rollout_anchor.sampling_params(request, (0, 5))
    assert told == {"temperature": 0.7, "top_p": 0.9, "top_k": -1, "max_new_tokens": 33, "stop_token_ids": [0, 5]}


class CountingEngine:
    """Answers like `sglang.Engine`; it is idle at the third time of asking."""

    def __init__(self) -> None:
        self.asked: list[dict] = []
        self.num_flushes = 0

    def generate(self, **arguments):
        self.asked.append(arguments)
        meta = {"completion_tokens": 2, "e2e_latency": 0.1, "output_token_logprobs": [(0.0, 1, None)]}
        return [{"meta_info": meta} for _ in arguments["input_ids"]]

    def flush_cache(self):
        self.num_flushes += 1
        return SimpleNamespace(success=self.num_flushes == 3)


def test_the_direct_driver_answers_each_command_with_one_line():
    engine, answers = CountingEngine(), io.StringIO()
    work = {"generate": {"input_ids": [[1], [2]], "sampling_params": {"temperature": 0.0}}}
    commands = [{"flush": {}}, work, {"close": {}}, {"flush": {}}]
    rollout_direct.serve(engine, io.StringIO("".join(json.dumps(c) + "\n" for c in commands)), answers)
    flushed, generated, closed = map(json.loads, answers.getvalue().splitlines())
    assert flushed == closed == {} and engine.num_flushes == 3  # none after "close"
    assert [out["completion_tokens"] for out in generated["outputs"]] == [2, 2] and generated["seconds"] > 0
    assert engine.asked == [work["generate"] | {"return_logprob": True}]
    assert set(generated["outputs"][0]) == set(rollout_direct.KEPT)  # no log-probs: they would only cost time


def test_an_anchor_that_does_not_start_shows_its_log(tmp_path: Path):
    with pytest.raises(EngineError, match="No module named 'sglang'"):
        rollout_anchor.DirectEngine(sys.executable, {"model_path": "x"}, (0,), tmp_path / "direct.log")


def test_an_anchor_behind_a_dead_address_is_one_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        common.run(lambda: rollout_anchor.DirectHttp("http://127.0.0.1:9", (0,)))
    said = capsys.readouterr().err
    assert exit_.value.code == 1 and said.count("\n") == 1
    assert said.startswith("slipstream: error: http://127.0.0.1:9/server_info: no answer")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--engine sglang --spec hf", "unknown arm 'hf'"),
        ("--engine sglang --spec eagle3", "needs --draft"),
        ("--engine sglang --spec none --direct grpc", "unknown driver 'grpc'"),
        ("--spec none --sglang-page-size 1", "unrecognized arguments: --sglang-page-size"),
    ],
)
def test_bad_arguments_of_the_sglang_arms(arguments: str, said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        rollout.parse(["--policy", "x", *arguments.split()])
    assert said in capsys.readouterr().err


def test_what_was_measured_is_kept_when_a_server_dies_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def measured(args):
        yield [{"batch_size": 1, "arm": "none"}]
        raise EngineError("the server died")

    monkeypatch.setattr(rollout_sglang, "measure_all", measured)
    results = tmp_path / "rows.jsonl"
    with pytest.raises(EngineError, match="died"):
        rollout.main(["--policy", "x", "--engine", "sglang", "--spec", "none", "--results", str(results)])
    assert [json.loads(line)["batch_size"] for line in results.read_text().splitlines()] == [1]


def test_each_server_has_a_place_for_the_largest_batch_at_its_longest():
    flags = "--engine sglang --spec none,eagle3 --draft d --batch-sizes 1,128,8 --max-new-tokens 50 --k 2"
    args = rollout.parse(["--policy", "x", *flags.split(), "--device", "cuda", "--sglang-page-size", "1"])
    prompts = rollout_sglang.PromptSet(((1,), (1, 2, 3)), (0,))
    config = rollout_sglang.engine_config(args, "eagle3", prompts)
    assert (config.max_running_requests, config.context_length, config.speculative_num_steps) == (128, 53, 2)
    share = rollout_sglang.MEM_FRACTION_STATIC
    assert config.sglang == {"sleep_on_idle": True, "mem_fraction_static": share, "page_size": 1}
    assert rollout_sglang.engine_config(args, "none", prompts).speculative_algorithm == "NONE"


def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: dict[str, gpu_session.Command], *more: str):
    monkeypatch.setattr(gpu_session, "STAGES", {name: (command,) for name, command in commands.items()})
    monkeypatch.setattr(gpu_session, "STOP_GRACE_S", 0.2)
    arguments = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *more]
    status = gpu_session.main([",".join(commands), *arguments])
    return status, (tmp_path / "out" / "session.log").read_text()


def python(code: str, limit_s: float = 60.0, makes: str = "") -> gpu_session.Command:
    return gpu_session.Command(("{python}", "-c", code), limit_s, makes)


def test_a_session_goes_on_after_a_failed_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    commands = {
        "bad": python("print('why it failed'); raise SystemExit(3)"),
        "good": python("open(r'{results}', 'a').write('one line')", makes="{work}/never"),
        "made": python("raise SystemExit(1)", makes="{work}"),
    }
    status, log = session(tmp_path, monkeypatch, commands)
    assert status == 1 and "failed (3)" in log and "why it failed" in log and "why it failed" in capsys.readouterr().out
    assert "there already" in log and (tmp_path / "out" / "results.jsonl").read_text() == "one line"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.jsonl", "session.log"]
    assert session(tmp_path, monkeypatch, {"good": commands["good"]})[0] == 0


def test_a_command_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pulse = tmp_path / "pulse"
    child = f"import time\nwhile True: open({str(pulse)!r}, 'a').write('.'); time.sleep(0.01)"
    code = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"while not os.path.exists({str(pulse)!r}): time.sleep(0.01)"
    )
    assert session(tmp_path, monkeypatch, {"careless": python(code)})[0] == 0
    beats = pulse.stat().st_size
    time.sleep(0.5)
    assert pulse.stat().st_size == beats


def test_a_command_over_its_time_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    status, log = session(tmp_path, monkeypatch, {"slow": python("import time; time.sleep(600)", limit_s=0.5)})
    assert status == 1 and "over time" in log
    assert "no time left" in session(tmp_path, monkeypatch, {"late": python("")}, "--limit-s", "1")[1]


def test_the_stages_ask_for_what_the_benchmarks_know():
    places = {"python": sys.executable, "work": "w", "out": "o", "results": "o/results.jsonl"}
    places |= {"rl_policy": "w/rl/policy", "rl_draft": "w/rl/drafts/offline"}
    asked = set()
    for command in (command for stage in gpu_session.STAGES.values() for command in stage):
        filled = [gpu_session.filled(word, places) for word in command.words]
        assert filled[:2] == [sys.executable, "-m"] and not any("{" in word for word in filled)
        asked.add(filled[2])
        if filled[2].startswith("benchmarks."):
            importlib.import_module(filled[2]).parse(filled[3:])  # exits on an argument that it does not know
    assert {"benchmarks.rollout", "benchmarks.sync", "trainer.cli", "pytest"} <= asked


def test_sync_measures_the_same_bytes(policy_dir: Path, tmp_path: Path):
    results = tmp_path / "sync.jsonl"
    sync.main(["--policy", str(policy_dir), "--results", str(results), "--repeats", "2"])
    rows = result_lines(results)
    assert [row["arm"] for row in rows] == ["plain copy", "in process", "disk"]
    assert len({row["num_bytes"] for row in rows}) == 1 and rows[0]["over_copy"] == 1.0


def test_step_takes_medians_after_the_warm_up():
    times = ((100.0, 100.0), (3.0, 1.0), (5.0, 1.0), (4.0, 4.0))
    lines = [{"step": i, "time_rollout_s": r, "time_policy_s": p} for i, (r, p) in enumerate(times)]
    rows = step.rows_of(lines, num_warmup=1)
    shown = [(row["phase"], row["median_s"], row["share"]) for row in rows]
    assert shown == [("rollout", 4.0, 0.8), ("policy", 1.0, 0.2)]


@pytest.mark.parametrize("path", sorted(common.RESULTS.rglob("*.jsonl")), ids=lambda path: path.parent.name + path.stem)
def test_recorded_results_can_be_read_and_say_where_they_are_from(path: Path):
    for line in result_lines(path):
        assert {"command", "hardware", "commit", "date"} <= line.keys(), sorted(line)
        assert "/tmp/" not in line["command"] and not line["command"].startswith("/"), line["command"]
