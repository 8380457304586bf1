"""The main experiment's analysis on constructed runs, and the whole command in miniature, cut off and continued."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import rl_on_gpu, rl_on_gpu_arms, rl_on_gpu_report, rl_on_gpu_start, sglang_kernels
from benchmarks.rl_on_gpu_analysis import (
    Response,
    RunRecord,
    StepRecord,
    Stretch,
    bucket_speeds,
    by_bucket,
    catch_up,
    draft_share,
    mean_reward,
    phase_medians_s,
    reward_test,
    speedup,
    stretches,
    surprise,
    sync_speed,
    without_first,
)
from benchmarks.rl_on_gpu_arms import ARMS, OFFLINE_SEED, REHEARSAL, Place
from benchmarks.rl_on_gpu_goals import exactness_goal, goals, shortfall
from rollout_engine.types import FinishReason, RolloutRequest, Sample, SamplingParams
from tests.rollout_engine_helpers import save_hf_model
from trainer import make_model as make_model_module
from trainer.config import ConfigError
from trainer.make_model import Shape


def response(finish_s: float, tokens: int, forwards: int, reward: float = 0.0, prompt_id: int = 0) -> Response:
    return Response(prompt_id, finish_s, tokens, forwards, reward)


def decoded(lengths: list[int], step_s: list[float], tokens_per_forward: int = 1, reward: float = 0.0) -> StepRecord:
    """A rollout in lockstep: with n requests live, a forward takes step_s[n - 1] seconds."""
    responses, time_s, done = [], 0.0, 0
    for i, forwards in enumerate(sorted(lengths)):
        time_s += (forwards - done) * step_s[len(lengths) - i - 1]
        done = forwards
        responses.append(response(time_s, forwards * tokens_per_forward, forwards, reward, i))
    return StepRecord({"time_rollout_s": time_s}, tuple(responses), 0.5)


def record(arm: str, steps: list[StepRecord], seed: int = 0, **about) -> RunRecord:
    return RunRecord(arm, seed, tuple(steps), about)


# ---- live batches ----


def test_stretches_recover_the_step_time_of_each_batch_size():
    step = decoded([10, 30, 60], [0.01, 0.02, 0.04])
    assert [part.live for part in stretches(step.responses)] == [3, 2, 1]
    for part, step_s in zip(stretches(step.responses), [0.04, 0.02, 0.01], strict=True):
        assert part.seconds / part.forwards == pytest.approx(step_s)
        assert part.tokens == pytest.approx(part.request_forwards)  # one token a request and forward


def test_stretches_lose_no_token_and_no_second_whatever_the_order():
    # The second finishes later though it took fewer forwards; the last was over with its prefill; two end together.
    responses = [response(1.0, 40, 20), response(1.5, 12, 12), response(2.0, 90, 30), response(2.0, 7, 5)]
    responses.append(response(0.1, 1, 0))
    parts = stretches(responses)
    assert math.fsum(part.tokens for part in parts) == pytest.approx(150)
    assert math.fsum(part.seconds for part in parts) == pytest.approx(2.0)
    assert [part.live for part in parts] == [5, 4, 3, 2, 1]
    assert parts[0] == Stretch(5, 0.1, 0, 1.0)


def test_buckets_hold_their_bounds_and_leave_out_what_never_ran():
    parts = [Stretch(n, 1.0, 2, n) for n in (1, 2, 8, 9, 32, 33, 128)]
    found = by_bucket(parts)
    assert {bucket: total.seconds for bucket, total in found.items()} == {
        (1, 1): 1,
        (2, 8): 2,
        (9, 32): 2,
        (33, 128): 2,
    }
    assert found[2, 8].forwards == 4 and found[2, 8].request_forwards == 20


def test_bucket_speeds_and_the_accept_length_that_would_be_needed():
    lengths = [12, 24, 48]
    plain = record("none", [decoded(lengths, [0.010, 0.020, 0.020])])
    # Half the forwards for the same tokens; alone a step costs 1.5 times as much, with 2 or 3 live 4 times.
    fast = record("online", [decoded([n // 2 for n in lengths], [0.015, 0.080, 0.080], tokens_per_forward=2)])
    alone, few = bucket_speeds([fast], [plain])
    assert (alone.bucket, few.bucket) == ((1, 1), (2, 8))
    assert alone.speedup.mean == pytest.approx(2 / 1.5) and few.speedup.mean == pytest.approx(2 / 4)
    assert alone.needed == pytest.approx(1.5) and few.needed == pytest.approx(4.0)
    assert alone.tokens_per_forward == few.tokens_per_forward == pytest.approx(2.0)
    assert alone.plain_forward_ms == pytest.approx(10) and few.forward_ms == pytest.approx(80)
    assert alone.share_of_time + few.share_of_time == pytest.approx(1.0)


# ---- whole runs ----


def test_a_speedup_is_over_matched_seeds_and_steps_only():
    slow, fast = decoded([10], [0.2]), decoded([10], [0.1])
    very_slow = decoded([10], [20.0])
    runs = [
        record("none", [slow, slow, very_slow], seed=0),  # the third step has no partner
        record("none", [very_slow], seed=2),  # nor has this seed
        record("online", [fast, fast], seed=0),
    ]
    found = speedup(runs, "online")
    assert (found.num_seeds, found.num_pairs) == (1, 2)
    assert found.tokens_per_s.mean == found.makespan.mean == pytest.approx(2.0)
    assert found.tokens_per_s_by_seed == pytest.approx((2.0,))
    assert speedup(runs, "frozen") is None
    rest = speedup(without_first(runs), "online")
    assert (rest.num_seeds, rest.num_pairs) == (1, 1)


def test_the_whole_step_counts_what_surrounds_the_rollout_but_no_checkpoint():
    def step(**phases: float) -> StepRecord:
        return replace(decoded([10], [0.1]), metrics={f"time_{name}_s": value for name, value in phases.items()})

    plain = record("none", [step(rollout=4.0, policy=2.0, checkpoint=9.0, warm_up=9.0, eval=9.0)])
    online = record("online", [step(rollout=2.0, policy=2.0, draft=1.0, sync=1.0)])
    found = speedup([plain, online], "online")
    assert found.makespan.mean == pytest.approx(2.0) and found.step.mean == pytest.approx(1.0)


def with_metrics(**metrics) -> StepRecord:
    return StepRecord(metrics, (), 0.5)


def test_phases_without_the_first_step():
    steps = [
        with_metrics(time_rollout_s=100.0, time_draft_s=100.0),
        *(with_metrics(time_rollout_s=t, time_draft_s=1.0) for t in (3.0, 9.0, 4.0)),
    ]
    run = record("online", steps)
    assert phase_medians_s(without_first([run])) == {"rollout": 4.0, "draft": 1.0}
    assert draft_share(without_first([run])) == pytest.approx(3 / 19)
    assert phase_medians_s([run]) == {"rollout": 6.5, "draft": 1.0} and draft_share([run]) == pytest.approx(103 / 219)


def test_catching_up_is_the_mean_over_seeds_at_ninety_percent():
    def curve(arm: str, seed: int, values: list[float]) -> RunRecord:
        return record(arm, [with_metrics(accept_length=v) for v in values], seed)

    runs = [curve("frozen", 0, [2.0, 2.0, 2.0, 2.0]), curve("frozen", 1, [2.0, 2.0, 2.0, 2.0])]
    runs += [curve("online", 0, [1.0, 1.9, 2.2, 1.8]), curve("online", 1, [1.0, 1.8, 2.0, 2.0])]
    found = catch_up(runs, "online", "frozen")
    assert (found.first_step, found.steps_below_after, found.steps_after, found.num_seeds) == (1, 1, 2, 2)
    assert found.final_ratio == pytest.approx(0.95)
    assert (found.below_from, found.steps_from) == (0, 0)
    runs = [curve("frozen", 0, 14 * [2.0]), curve("online", 0, [*(10 * [1.9]), 2.1, 1.9, 2.1, 1.9])]
    found = catch_up(runs, "online", "frozen")
    assert (found.first_step, found.below_from, found.steps_from) == (0, 2, 4)
    assert (found.steps_below_after, found.steps_after) == (11, 13)
    assert catch_up([run for run in runs if run.arm == "frozen"], "online", "frozen") is None


def test_the_variance_of_a_mean_reward_is_that_of_sampling_within_prompts():
    # Prompt 0 is always right and prompt 1 always wrong: other samples of the same prompts would give the same mean.
    certain = [response(1, 1, 1, reward=1.0 - p, prompt_id=p) for p in (0, 0, 1, 1)]
    assert mean_reward(StepRecord({}, tuple(certain), 0.5)) == (0.5, 0.0)
    # One prompt, half right of 4: the mean's variance is s^2 / 4 with s^2 = 1/3.
    mixed = [response(1, 1, 1, reward=r) for r in (0.0, 0.0, 1.0, 1.0)]
    assert mean_reward(StepRecord({}, tuple(mixed), 0.5)) == (0.5, pytest.approx(1 / 12))


def test_rewards_differ_by_z_of_sampling_noise():
    def step(*rewards: float) -> StepRecord:
        return StepRecord({}, tuple(response(1, 1, 1, reward=r) for r in rewards), 0.5)

    half, high, sure = step(0, 0, 1, 1), step(0, 1, 1, 1), step(1, 1, 1, 1)
    runs = [record("none", [half, half], 0), record("none", [high, half], 1)]
    runs += [record("online", [half, high], 0), record("online", [half, sure], 1)]
    found = reward_test(runs, "online")
    first = -0.25 / math.sqrt(1 / 12 + 1 / 16)  # variance of `high`: (1/4) / 4
    assert found.z_first_steps == (0.0, pytest.approx(first))
    assert found.difference_by_seed == pytest.approx((0.125, 0.125)) and found.mean_difference == pytest.approx(0.125)
    assert (found.num_z, found.num_outside) == (4, 0)
    assert found.seed_spread == pytest.approx(math.sqrt((0.25**2 + 0) / 2))


def test_sync_is_compared_with_a_copy_of_the_same_bytes():
    steps = [with_metrics(sync_time_s=t, time_sync_s=2 * t, sync_bytes=2_000_000) for t in (9.0, 0.002, 0.004, 0.003)]
    found = sync_speed([record("online", steps, device_copy_s=0.001)])
    assert (found.num_syncs, found.median_ms, found.phase_ms, found.copy_ms) == (3, 3.0, 6.0, 1.0)
    assert found.gb_per_s == pytest.approx(2 / 3) and found.over_copy == pytest.approx(3.0)


def test_surprise_over_a_run_is_that_of_all_its_tokens():
    gaps = [[0.3, -0.2, 0.4, 0.1], [-0.6, 0.2]]
    steps = [
        with_metrics(
            num_tokens=float(len(part)),
            surprise_gap=sum(part) / len(part),
            surprise_gap_z=sum(part) / math.sqrt(sum(gap * gap for gap in part)),
        )
        for part in gaps
    ]
    together = [gap for part in gaps for gap in part]
    found = surprise([record("frozen", steps)])
    assert found.num_tokens == 6 and found.mean == pytest.approx(sum(together) / 6)
    assert found.z == pytest.approx(sum(together) / math.sqrt(sum(gap * gap for gap in together)))
    assert surprise([record("frozen", [*steps, with_metrics(num_tokens=3.0)])]) is None


@pytest.mark.parametrize(("z", "verdict"), [(3.0, True), (-9.0, False)])
def test_a_biased_sampler_misses_its_goal(z, verdict):
    step = with_metrics(num_tokens=100.0, surprise_gap=0.01 * z, surprise_gap_z=z)
    assert exactness_goal("frozen", [record("frozen", [step])]).met is verdict


# ---- the goals ----


def met(runs: list[RunRecord]) -> dict[str, bool | None]:
    """Verdicts by a goal's first words."""
    found = [goal for goal in goals(runs, ["none", "frozen", "online"]) if "own law" not in goal.goal]
    return {" ".join(goal.goal.split()[:4]): goal.met for goal in found}


def accepting(arm: str, values: list[float]) -> RunRecord:
    response_of = (response(1.0, 1, 1),)
    lines = ({"accept_length": v, "time_rollout_s": 1.0, "time_draft_s": 0.1} for v in values)
    return record(arm, [StepRecord(line, response_of, 0.5) for line in lines])


@pytest.mark.parametrize(
    ("online", "in_time", "stays"),
    [
        ([1.0] * 9 + [1.8, 2.0], True, True),
        ([1.0] * 9 + [1.8, 1.9], True, False),
        ([1.0] * 10 + [2.0], False, True),
        ([1.0] * 11, False, False),
        ([1.0] * 9, None, None),
    ],
)
def test_catching_up_within_ten_steps_and_staying_there(online: list[float], in_time: bool | None, stays: bool | None):
    found = met([accepting("frozen", [2.0] * len(online)), accepting("online", online)])
    assert found == {
        "online accept length >=": in_time,
        "online accept length not": stays,
        "draft training <= 10%": True,
    }


def test_rewards_are_within_noise_only_when_no_test_tells_them_apart_and_one_seed_decides_nothing():
    def run(arm: str, seed: int, *rewards: float) -> RunRecord:
        return record(arm, [with_reward(r) for r in rewards], seed)

    def with_reward(share: float) -> StepRecord:
        responses = tuple(response(1.0, 1, 1, reward=float(i < 10 * share)) for i in range(10))
        return StepRecord({"time_rollout_s": 1.0}, responses, 0.5)

    name = "reward curve of frozen"
    plain = [run("none", 0, 0.3, 0.5), run("none", 1, 0.4, 0.6)]
    assert met([*plain, run("frozen", 0, 0.3, 0.6), run("frozen", 1, 0.4, 0.5)])[name] is True
    assert met([*plain, run("frozen", 0, 0.9, 0.9), run("frozen", 1, 0.9, 1.0)])[name] is False
    assert met([plain[0], run("frozen", 0, 0.3, 0.6)])[name] is None
    nothing = [run(arm, seed, 0.0, 0.0) for arm in ("none", "frozen") for seed in (0, 1)]
    assert met(nothing)[name] is None


def test_a_slower_bucket_is_explained_by_its_step_times():
    plain = record("none", [decoded([12, 24], [0.010, 0.020])])
    fast = record("online", [decoded([6, 12], [0.015, 0.080], tokens_per_forward=2)])
    (line,) = shortfall("online", bucket_speeds([fast], [plain]))  # alone it is faster
    assert "2-8 live: S = 0.50" in line and "20.00 ms" in line and "80.00 ms (4.00 times" in line
    assert "takes 4.00 tokens per forward and request; it had 2.00" in line


# ---- the start ----


def test_ngram_hits_count_guesses_that_came_true():
    assert rl_on_gpu_start.ngram_hits([((0, 0), [1, 2, 3, 4, 5, 6])]) == 0.0
    repeated = rl_on_gpu_start.ngram_hits([((0, 0), [1, 2, 3, 4]), ((0, 1), [1, 2, 3, 4])])
    assert repeated == 2 / 8  # the second text's 3 and 4, behind a known pair
    assert rl_on_gpu_start.ngram_hits([((0, 0), [1, 2, 3, 4]), ((1, 0), [1, 2, 3, 4])]) == 0.0  # no siblings


# ---- the plan ----


def test_main_arms_are_interleaved_and_the_first_place_rotates():
    jobs = [(arm.name, seed) for arm, seed in rl_on_gpu.interleaved_jobs(tuple(ARMS), (0, 1))]
    first = [("none", 0), ("frozen", 0), ("online", 0), ("pays", 0)]
    assert jobs == [*first, ("frozen", 1), ("online", 1), ("pays", 1), ("none", 1), ("target_only", 0)]


def test_an_arm_begins_only_when_it_will_be_over_in_time():
    assert rl_on_gpu.fits([2.0, 3.0], 10, 33.1) and not rl_on_gpu.fits([2.0, 3.0], 10, 32.9)
    assert not rl_on_gpu.fits([], 1, 100.0)


def test_the_offline_draft_has_seen_no_arm_s_prompts_in_its_order(capsys: pytest.CaptureFixture[str]):
    assert OFFLINE_SEED not in rl_on_gpu.parse(["--work", "w", "--out", "o"])[0].seeds
    with pytest.raises(SystemExit):
        rl_on_gpu.parse(["--work", "w", "--out", "o", "--seeds", f"0,{OFFLINE_SEED}"])
    assert "is the offline draft's" in capsys.readouterr().err


def test_what_is_noted_of_an_update_is_computed_when_its_line_is_written(tmp_path: Path):
    sample = Sample(RolloutRequest(3, 0, (5, 6)), (7, 8), (math.log(0.5),) * 2, (), FinishReason.STOP)
    path = tmp_path / "responses.jsonl"
    engine = SimpleNamespace(finish_s={sample.request.key: 0.25})
    policy = SimpleNamespace(update=lambda samples, capture: SimpleNamespace(draft_samples=[]))
    watched = rl_on_gpu_arms.WatchedPolicy(policy, engine, path, keep_tokens=False)
    watched.update([sample], None)
    engine.finish_s = {}  # of a later rollout, an evaluation's say
    assert not path.exists()
    written: list[dict] = []
    writer = rl_on_gpu_arms.NotingWriter(SimpleNamespace(write=written.append), watched)
    writer.write({"step": 0})
    (line,) = map(json.loads, path.read_text().splitlines())
    assert line["sampled_prob"] == pytest.approx(0.5) and line["responses"][0][:3] == [3, 0.25, 2]
    assert written == [{"step": 0}]


def test_unknown_arms_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        rl_on_gpu.parse(["--work", "w", "--out", "o", "--arms", "onlin"])
    assert "unknown arm 'onlin'" in capsys.readouterr().err


def test_runs_of_another_plan_in_the_same_place_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before anything is started, and without a change to what lies there."""
    monkeypatch.setattr(rl_on_gpu, "serving", lambda *_: pytest.fail("began"))
    (tmp_path / "done").mkdir()  # of before a setting was told
    args, plan = rl_on_gpu.parse(["--work", str(tmp_path), "--out", str(tmp_path / "out"), "--rehearse"])
    with pytest.raises(ConfigError, match="holds runs of other settings, commit, hardware, versions"):
        rl_on_gpu.experiment(args, plan)
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


def test_the_last_policys_highest_probabilities_are_known_without_any_capture(tmp_path: Path):
    model = save_hf_model(tmp_path)
    prompt, answer = (3, 7, 11), (5, 2, 9, 4)
    sampling = SamplingParams(temperature=0.5)
    sample = Sample(RolloutRequest(0, 0, prompt, sampling), answer, (0.0,) * 4, (), FinishReason.LENGTH)
    with torch.no_grad():
        laws_TV = (model.float()(torch.tensor([[*prompt, *answer]])).logits[0] / 0.5).softmax(-1)
    expected = laws_TV[len(prompt) - 1 : -1].amax(-1).mean().item()
    assert rl_on_gpu_arms.exported_max_prob(tmp_path, [sample], "float32") == pytest.approx(expected, abs=1e-4)


def test_only_the_offline_run_leaves_the_policy_as_it_is(tmp_path: Path):
    arms = [*ARMS.values(), rl_on_gpu_arms.OFFLINE]
    configs = {arm.name: rl_on_gpu_arms.run_config(REHEARSAL, Place(tmp_path), arm, 0) for arm in arms}
    assert [name for name, config in configs.items() if config.policy.lr == 0] == ["offline"]
    when = {name: config.draft.when for name, config in configs.items() if config.draft.when != "never"}
    assert when == {"online": "always", "pays": "pays", "target_only": "always", "offline": "always"}
    assert {name: config.rollout.speculative_algorithm for name, config in configs.items()} == {
        "none": "NONE"
    } | dict.fromkeys(("frozen", "online", "pays", "target_only", "offline"), "EAGLE3")
    # all of a rollout's requests run from its start, which the analysis by live requests rests on
    assert all(config.rollout.max_running_requests == REHEARSAL.requests for config in configs.values())
    assert configs["target_only"].draft.draft_vocab_size and not configs["online"].draft.draft_vocab_size


# ---- the whole command ----


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(make_model_module.PRESETS, "3m", Shape(32, 7, 2, 1, 16, 48))
    plan = replace(REHEARSAL, warm_start_steps=3, warm_start_tokens=256, steps=2, offline_steps=1, prompts=3, samples=2)
    monkeypatch.setattr(rl_on_gpu, "REHEARSAL", replace(plan, max_response_len=10, short_steps=1, reduced_vocab=64))


def test_the_command_goes_on_where_it_was_cut_off(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch):
    work, out = tmp_path / "work", tmp_path / "out"
    command = ["--rehearse", "--work", str(work), "--out", str(out), "--seeds", "0"]

    device_copy_s, left = rl_on_gpu_arms.device_copy_s, iter(["offline", "none"])

    def cut_off_in_the_third_run(num_bytes: int) -> float:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return device_copy_s(num_bytes)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rl_on_gpu_arms, "device_copy_s", cut_off_in_the_third_run)
        rl_on_gpu.main(command)
    done = {path.name: path.stat().st_mtime_ns for path in (work / "done").iterdir()}
    assert set(done) == {f"offline-{OFFLINE_SEED}", "none-0"}
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows if row["kind"] == "run"] == ["none"]

    rl_on_gpu.main(command)
    assert {path.name for path in (work / "done").iterdir()} == {
        *(f"{name}-0" for name in ARMS),
        f"offline-{OFFLINE_SEED}",
    }
    assert all((work / "done" / name).stat().st_mtime_ns == time for name, time in done.items())  # not run again
    assert not list((work / "runs").iterdir())
    check_outputs(out)


def check_outputs(out: Path) -> None:
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows if row["kind"] == "run"] == ["frozen", "none", "online", "pays", "target_only"]
    kinds = {row["kind"] for row in rows}
    assert kinds == {"start", "run", "phases", "sync", "speedup", "reward_test", "bucket", "catch_up", "goal"}
    assert all({"command", "hardware", "commit", "date", "plan", "versions"} <= set(row) for row in rows)
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    text = (out / "summary.md").read_text()
    assert all(f"| {name} |" in text for name in ARMS)
    before = {name: (out / name).read_text() for name in ("results.jsonl", "summary.md")}
    rl_on_gpu_report.main([str(out / "records.json.gz")])
    assert {name: (out / name).read_text() for name in before} == before  # the records hold all that was found


def test_without_time_nothing_begins_and_it_says_so(tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str]):
    rl_on_gpu.main(["--rehearse", "--work", str(tmp_path / "w"), "--out", str(tmp_path / "o"), "--budget-s", "0"])
    said = capsys.readouterr().out
    assert "0 of 9 runs are done" in said and "no time for none-0 frozen-0 online-0 pays-0" in said
    assert (tmp_path / "o" / "summary.md").read_text().count("Start policy") == 1


# ---- the kernels' table ----


def test_a_kernel_row_says_what_accept_length_would_be_needed():
    def several(rate: float, tokens_per_verify: float) -> list[sglang_kernels.Decoding]:
        return [sglang_kernels.Decoding(rate * factor, tokens_per_verify) for factor in (0.9, 1.0, 1.1)]

    found = {"none": several(1000.0, 1.0), "rejection": several(500.0, 3.0)}
    plain, fast = sglang_kernels.rows_of(found, 8, sglang_kernels.LABEL)
    assert plain["step_ms"] == pytest.approx(8.0) and "speed_vs_plain" not in plain
    assert fast["step_ms"] == pytest.approx(48.0)  # 8 requests x 3 tokens at 500 tokens/s
    assert fast["needed_tokens_per_verify"] == pytest.approx(6.0) == fast["step_ms"] / plain["step_ms"]
    assert fast["speed_vs_plain"].mean == pytest.approx(0.5) and "simulated" in fast["label"]


def test_the_arms_of_the_kernels_differ_in_speculation_alone(tmp_path: Path):
    args = sglang_kernels.parse(["--arms", "none,rejection,target_only"])
    plain, rejection, target_only = (sglang_kernels.engine_settings(args, arm, tmp_path) for arm in args.arms)
    for settings in (rejection, target_only):
        assert {name: settings[name] for name in plain} == plain
        assert all("speculative" in name for name in settings.keys() - plain.keys())
    assert max(plain["cuda_graph_bs_decode"]) == plain["max_running_requests"] == 128
    sizes = [json.loads((tmp_path / f"draft-{arm}" / "config.json").read_text()) for arm in args.arms[1:]]
    assert [size["draft_vocab_size"] for size in sizes] == [151_936, 32_000]  # rejection needs all of it


@pytest.mark.parametrize("wrong", [["--arms", "rejection"], ["--arms", "none,ngram"], ["--simulate", "5"]])
def test_the_kernels_refuse_what_cannot_be_compared(wrong: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        sglang_kernels.parse(wrong)
    assert wrong[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"reward": 0.95}, "reward is 0.950, .* RL would have nothing to learn"),
        ({"reward": 0.02}, "RL would have nothing to learn"),
        ({"max_prob": 0.9}, r"E\[max p\] is 0.900, above 0.85"),
        ({"p99": 250.0}, "no long tail: p99 250, p50 95 tokens"),
    ],
)
def test_a_start_policy_that_would_make_it_easy_or_pointless_is_refused(found: dict[str, float], said: str) -> None:
    start = {"reward": 0.68, "max_prob": 0.72, "p50": 95.0, "p99": 910.0}
    rl_on_gpu.check_start(start, REHEARSAL)
    with pytest.raises(ConfigError, match=said):
        rl_on_gpu.check_start(start | found, REHEARSAL)
