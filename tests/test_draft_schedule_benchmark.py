"""What the benchmark of the draft's schedule makes of a run's metrics, and its arms' settings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import draft_schedule as bench
from benchmarks import draft_schedule_report as report
from benchmarks import draft_schedule_runs
from benchmarks.draft_schedule_runs import (
    ARMS,
    REHEARSAL,
    WARM,
    WARM_SEED,
    Place,
    Plan,
    ShockedPolicy,
    is_done,
    make_start,
    run_config,
)
from benchmarks.plateau import most_of
from rollout_engine.types import EngineError
from trainer.config import ConfigError
from trainer.config_check import validate

PLATEAU = [2.0, 2.1, 1.9, 2.0, 2.05, 1.95]  # the last four: mean 1.975, standard deviation 0.065


@pytest.mark.parametrize(
    ("after", "to_90", "to_100"),
    [
        ([1.2, 1.7, 1.88, 1.95], 2, 3),
        ([1.9, 1.4, 1.85, 1.9], 3, None),
        ([1.95, 2.0, 2.0], 0, 0),
        ([1.88, 1.85, 1.89, 1.92], 2, 3),  # 1.85 is 94 % of the accept length, but 87 % of the drafts that stood
        ([1.0, 1.1], None, None),
    ],
)
def test_recovery_is_counted_from_the_first_rollout_that_shows_the_shock(after, to_90, to_100):
    found = bench.recovery([*PLATEAU, *after], len(PLATEAU))
    assert found["plateau"] == pytest.approx(1.975) and found["lowest"] == min(after)
    assert (found["recovered_90"], found["recovered_100"]) == (to_90, to_100)


def test_the_rise_is_towards_the_plateau_that_a_run_ends_on():
    assert bench.rise([1.0, 1.5, 1.85, 1.9, 2.0, 2.0, 2.0, 2.0]) == {"steps_to_90": 3}


def test_90_percent_leave_out_the_bonus_token():
    assert most_of(2.5) == pytest.approx(2.35) and most_of(1.0) == 1.0
    assert bench.recovery([2.5] * 4 + [2.3, 2.36], 4)["recovered_90"] == 1


def line(step: int, length: float, share: float) -> dict[str, Any]:
    return {
        "step": step,
        "accept_length": length,
        "entropy": 1.0,
        "reward": 0.5,
        "draft_token_share": share,
        "draft_decision": "keep" if share else "rest",
        "draft_saved_time_s": 1.0,
        "draft_saved_time_basis": "bound",
        "draft_spent_time_s": 0.5,
        "time_rollout_s": 3.0,
        "time_draft_s": 1.0,
    }


def test_a_run_is_described_by_its_shares_of_time_and_tokens():
    arm = next(arm for arm in ARMS if arm.name == "pays")
    row = bench.describe(Plan(), arm, [line(0, 2.0, 1.0), line(1, 2.2, 0.0)], 9.0)
    assert (row["token_share"], row["steps_trained"], row["draft_share"]) == (0.5, 1, 0.25)
    assert (row["saved_s"], row["spent_s"], row["seconds"]) == (2.0, 1.0, 9.0)
    assert row["decisions"] == ["keep", "rest"] and row["accept_length"] == pytest.approx(2.1)


def test_a_learning_rate_shock_shows_one_rollout_after_its_step_and_other_prompts_in_their_own():
    plan = replace(Plan(), shock_step=4)
    lines = [line(i, length, 1.0) for i, length in enumerate([2.0, 2.0, 2.0, 2.0, 1.5, 1.9, 2.0])]
    found = {arm.shock: bench.describe(plan, arm, lines, 1.0) for arm in ARMS if arm.kind == "shock"}
    assert found["mix"]["plateau"] == 2.0 and found["mix"]["recovered_90"] == 1
    assert found["lr"]["plateau"] == pytest.approx(1.875) and found["lr"]["recovered_90"] == 0


def test_what_is_lost_is_paired_by_seed():
    rows = [
        {"kind": "curve", "seed": seed, "share": share, "accept_length": base * (1.0 if share == 1.0 else 0.9)}
        for seed, base in ((0, 2.0), (1, 3.0))
        for share in (0.1, 1.0)
    ]
    assert report.loss_of_acceptance(rows) == [(0.1, pytest.approx(0.1))]
    assert report.loss_of_acceptance(rows[:1]) == []  # its counterpart is not done yet


def test_the_point_used_is_that_of_pays_beside_always():
    def row(name: str, seed: int, length: float, share: float) -> dict[str, Any]:
        return {
            "kind": "rl",
            "name": name,
            "seed": seed,
            "accept_length": length,
            "token_share": share,
            "draft_share": share / 5,
        }

    rows = [row("always", 0, 2.0, 0.4), row("pays", 0, 1.9, 0.1), row("always", 1, 3.0, 0.4), row("pays", 1, 2.85, 0.2)]
    assert "15.0% of the tokens, 3.0% of the time, accept length +5.0% lost" in report.point_used(rows)
    assert "training on 40%" in report.point_used(rows)
    assert report.point_used(rows[:1]) == ""


def test_runs_that_never_got_there_are_counted_apart():
    assert report.mean_of([2.0, None], ".1f") == "2.0 (1 never)"
    assert report.mean_of([None], ".1f") == "never" and report.mean_of([], ".1f") == ""
    assert report.mean_of([0.1, 0.1], "+.1f") == "+0.1 ± 0.0"


def test_the_shock_is_one_step_long_and_belongs_to_its_step_whatever_steps_had_no_update():
    class Policy:
        def __init__(self) -> None:
            self.seen: list[float] = []
            self._optimizer = self
            self.param_groups = [{"lr": 1.0}]

        def update(self, samples: object) -> None:
            self.seen.append(self.param_groups[0]["lr"])
            self.param_groups[0]["lr"] = 1.0  # as the schedule does

    run: Any = SimpleNamespace(policy=Policy(), next_step=0)
    shocked = ShockedPolicy(run, 2)
    for run.next_step in (0, 2, 3):  # in step 1 every group was dropped
        shocked.update(None)
    assert run.policy.seen == [1.0, 10.0, 1.0]


def test_a_shock_whose_step_had_no_update_has_no_recovery():
    plan, arm = replace(Plan(), shock_step=4), next(arm for arm in ARMS if arm.shock == "lr")
    lines = [line(i, 2.0, 1.0) for i in range(6)]
    assert bench.describe(plan, arm, lines, 1.0)["recovered_90"] == 0
    lines[4]["policy_skipped"] = 1
    found = bench.describe(plan, arm, lines, 1.0)
    assert found["shock_missed"] and "recovered_90" not in found


# ---- history beside the same arm without ----


def history_row(name: str, seed: int, tokens_per_verify: float, tokens_per_s: float) -> dict[str, Any]:
    """Steps 0 and 1 are the first epoch of 128 prompts, step 2 begins the second."""
    arm = next(arm for arm in ARMS if arm.name == name)
    lines = []
    for step in range(3):
        history = {"history_verify_steps": 25 * step, "history_share": step / 4, "history_accept_length": 3.0}
        more = {"verify_steps": 100, "tokens_per_forward": tokens_per_verify, "tokens_per_s": tokens_per_s + step}
        if arm.history:
            more |= history
        lines.append(line(step, tokens_per_verify + arm.history * step / 10, 1.0) | more)
    plan = replace(Plan(), prompts=64, history_rows=128)
    return {"name": name, "kind": "history", "seed": seed, **bench.describe(plan, arm, lines, 1.0)}


def test_history_is_read_by_epoch_of_the_prompts_and_paired_by_seed_and_step():
    rows = [history_row("online", seed, 2.0 + seed, 100.0) for seed in (0, 1)]
    rows += [history_row("online+history", seed, 2.2 + seed, 110.0) for seed in (0, 1)]
    first, second = report.history_gains(rows)
    assert (first["epoch"], second["epoch"]) == (0, 1)
    assert first["accept_length"] == pytest.approx([0.25, 0.25]) and second["accept_length"] == pytest.approx([0.4] * 2)
    assert first["tokens_per_forward"] == pytest.approx([0.2, 0.2])
    assert first["tokens_per_s"].mean == pytest.approx((110 / 100 * 111 / 101) ** 0.5)
    assert second["tokens_per_s"].mean == pytest.approx(112 / 102) and second["history_share"] == [0.5, 0.5]
    assert rows[-1]["history_share"] == 0.25 and rows[0]["history_share"] == 0.0
    assert report.history_gains(rows[:3]) and not report.history_gains(rows[:2])  # a pair is needed


def test_the_history_arms_differ_in_history_alone_and_their_prompts_come_again(tmp_path: Path):
    place, plan = Place(tmp_path), Plan()
    plain, both = (
        run_config(plan, place, next(arm for arm in ARMS if arm.name == name), 0)
        for name in ("online", "online+history")
    )
    assert both.speculation.history and not plain.speculation.history
    assert replace(both, name=plain.name, speculation=plain.speculation) == plain
    assert plan.history_rows % plan.prompts == 0 and plan.steps * plan.prompts >= 4 * plan.history_rows
    assert REHEARSAL.history_rows % REHEARSAL.prompts == 0


def test_lines_of_several_processes_are_one_result_and_those_of_other_sizes_are_refused(tmp_path: Path):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]

    def write(file: Path, *rows: tuple[str, int, float]) -> None:
        texts = (json.dumps({"name": n, "seed": s, "accept_length": x, "plan": {"steps": 3}}) for n, s, x in rows)
        file.write_text("".join(f"{text}\n" for text in texts))

    write(files[0], ("always", 0, 2.0), ("warm", 7, 1.0))
    write(files[1], ("always", 1, 3.0), ("warm", 7, 1.5))
    found = {(row["name"], row["seed"]): row["accept_length"] for row in report.read_rows(files)}
    assert found == {("always", 0): 2.0, ("always", 1): 3.0, ("warm", 7): 1.5}
    files[1].write_text(files[1].read_text().replace(": 3}", ": 24}"))
    with pytest.raises(ConfigError, match="several sizes"):
        report.read_rows(files)


def test_a_seed_has_its_own_order_of_arms_whichever_others_are_asked_for():
    names = ("always", "pays")
    together = [arm.name for arm, seed in bench.all_jobs(names, (0, 1)) if seed == 1]
    assert together == [arm.name for arm, _ in bench.all_jobs(names, (1,))] == ["pays", "always"]
    assert bench.all_jobs((), (0, 1)) == []


def test_every_arm_is_a_run_that_would_start_and_the_mix_changes_at_its_step(tmp_path: Path):
    place = Place(tmp_path)
    place.policy.mkdir()  # is there: not made again
    make_start(REHEARSAL, place)
    for arm in (WARM, *ARMS):
        config = run_config(REHEARSAL, place, arm, 0)
        validate(config)
        assert (config.draft.when == "pays") == (arm.train_when == "pays")
        assert (config.policy.lr == 0) == (arm is WARM)
    texts = [json.loads(text)["prompt"].split()[2:] for text in place.prompts("mix").read_text().splitlines()]
    change = REHEARSAL.shock_step * REHEARSAL.prompts
    before = {word for words in texts[:change] for word in words}
    after = {word for words in texts[change:] for word in words}
    assert before and after and not before & after


def test_a_real_run_does_not_go_on_behind_a_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nor without knowing of what size, code and hardware the runs are that lie there."""
    begun: list[Plan] = []
    monkeypatch.setattr(bench, "make_start", lambda plan, place: begun.append(plan))
    command = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results"), "--budget-s", "0"]
    monkeypatch.setenv("SLIPSTREAM_COMMIT", "one")
    bench.main([*command, "--rehearse"])
    bench.main([*command, "--rehearse"])
    with pytest.raises(ConfigError, match="work holds runs of other settings: give another --work"):
        bench.main(command)
    monkeypatch.setenv("SLIPSTREAM_COMMIT", "another")
    with pytest.raises(ConfigError, match="work holds runs of other commit"):
        bench.main([*command, "--rehearse"])
    assert begun == [REHEARSAL, REHEARSAL]
    (tmp_path / "untold" / "policy").mkdir(parents=True)
    with pytest.raises(ConfigError, match="untold holds runs of other settings, commit, hardware"):
        bench.main(["--work", str(tmp_path / "untold")])


def test_a_draft_that_was_put_aside_is_no_start_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a run ends after an alarm of the sentinel."""
    place = Place(tmp_path)
    monkeypatch.setattr(
        draft_schedule_runs,
        "_train",
        lambda config, folder, shock_step: (folder / "draft.not-published").mkdir(parents=True),
    )
    with pytest.raises(
        EngineError, match=r"runs/warm-\d+: the run published no draft.* sentinel_alarm .*not-published$"
    ):
        draft_schedule_runs.run_arm(REHEARSAL, place, WARM, WARM_SEED)
    assert not place.draft.exists() and not is_done(place, WARM, WARM_SEED)
    assert (place.runs / f"warm-{WARM_SEED}" / "draft.not-published").exists(), "to be looked at"


def test_an_arm_that_does_not_fit_the_budget_is_left_for_the_next_call(tmp_path: Path):
    place = Place(tmp_path)
    assert bench.run_jobs(REHEARSAL, place, [(WARM, WARM_SEED)], 0.0, tmp_path / "results") == [f"warm-{WARM_SEED}"]
    assert not is_done(place, WARM, WARM_SEED) and not (tmp_path / "results").exists()


def test_arms_are_named_alone_or_by_kind():
    args = bench.parse(["--work", "x", "--arms", "curve,pays"])
    assert args.arms == ("pays", *(arm.name for arm in ARMS if arm.kind == "curve"))
    assert bench.parse(["--work", "x", "--arms", "warm"]).arms == ()
    with pytest.raises(SystemExit):
        bench.parse(["--work", "x", "--arms", "nothing"])


@pytest.mark.slow
def test_the_whole_at_its_smallest(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results.jsonl"), "--rehearse"]
    command += ["--arms", "always,pays,mix-pays,share-0.25,share-1,history", "--seeds", "0"]
    bench.main(command)
    bench.main(command)  # nothing is left to do
    rows = [json.loads(text) for text in (tmp_path / "results.jsonl").read_text().splitlines()]
    names = ["warm", "always", "pays", "mix-pays", "share-0.25", "share-1", "online", "online+history"]
    assert [row["name"] for row in rows] == names
    assert rows[4]["token_share"] < 0.5 < rows[5]["token_share"]
    assert rows[6]["epoch_by_step"] == rows[7]["epoch_by_step"] == [0, 1, 2]
    shown = capsys.readouterr().out
    assert "trained on 25% of the tokens" in shown and "epoch of the prompts" in shown
    report.main([str(tmp_path / "results.jsonl")])
    assert "epoch of the prompts" in capsys.readouterr().out
