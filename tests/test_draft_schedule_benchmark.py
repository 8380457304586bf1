"""What the benchmark of the draft's schedule makes of a run's metrics, and its arms' settings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import draft_schedule as bench
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
from trainer.config_check import validate

PLATEAU = [2.0, 2.1, 1.9, 2.0, 2.05, 1.95]  # the last four: mean 1.975, standard deviation 0.065


@pytest.mark.parametrize(
    ("after", "to_90", "to_100"),
    [
        ([1.2, 1.7, 1.8, 1.95], 2, 3),
        ([1.9, 1.4, 1.85, 1.9], 2, None),
        ([1.95, 2.0, 2.0], 0, 0),
        ([1.8, 1.85, 1.92], 0, 2),
        ([1.0, 1.1], None, None),
    ],
)
def test_recovery_is_counted_from_the_first_rollout_that_shows_the_shock(after, to_90, to_100):
    found = bench.recovery([*PLATEAU, *after], len(PLATEAU))
    assert found["plateau"] == pytest.approx(1.975) and found["lowest"] == min(after)
    assert (found["recovered_90"], found["recovered_100"]) == (to_90, to_100)


def test_the_rise_is_towards_the_plateau_that_a_run_ends_on():
    assert bench.rise([1.0, 1.5, 1.9, 2.0, 2.0, 2.0, 2.0]) == {"steps_to_90": 2}


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
    assert bench.loss_of_acceptance(rows) == [(0.1, pytest.approx(0.1))]
    assert bench.loss_of_acceptance(rows[:1]) == []  # its counterpart is not done yet


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
    assert "15.0% of the tokens, 3.0% of the time, accept length +5.0% lost" in bench.point_used(rows)
    assert "training on 40%" in bench.point_used(rows)
    assert bench.point_used(rows[:1]) == ""


def test_runs_that_never_got_there_are_counted_apart():
    assert bench.mean_of([2.0, None], ".1f") == "2.0 (1 never)"
    assert bench.mean_of([None], ".1f") == "never" and bench.mean_of([], ".1f") == ""


def test_the_shock_is_one_update_long():
    class Policy:
        def __init__(self) -> None:
            self.seen: list[float] = []
            self._optimizer = self
            self.param_groups = [{"lr": 1.0}]

        def update(self, samples: object) -> None:
            self.seen.append(self.param_groups[0]["lr"])
            self.param_groups[0]["lr"] = 1.0  # as the schedule does

    policy = Policy()
    shocked = ShockedPolicy(policy, 2)
    for _ in range(4):
        shocked.update(None)
    assert policy.seen == [1.0, 1.0, 10.0, 1.0]


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


def test_an_arm_that_does_not_fit_the_budget_is_left_for_the_next_call(tmp_path: Path):
    place = Place(tmp_path)
    assert bench.run_jobs(REHEARSAL, place, [(WARM, WARM_SEED)], 0.0, tmp_path / "results") == [f"warm-{WARM_SEED}"]
    assert not is_done(place, WARM, WARM_SEED) and not (tmp_path / "results").exists()


def test_arms_are_named_alone_or_by_kind():
    args = bench.parse(["--work", "x", "--arms", "curve,pays"])
    assert args.arms == ("pays", *(arm.name for arm in ARMS if arm.kind == "curve"))
    with pytest.raises(SystemExit):
        bench.parse(["--work", "x", "--arms", "nothing"])


@pytest.mark.slow
def test_the_whole_at_its_smallest(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results.jsonl"), "--rehearse"]
    command += ["--arms", "always,pays,mix-pays,share-0.25,share-1", "--seeds", "0"]
    bench.main(command)
    bench.main(command)  # nothing is left to do
    rows = [json.loads(text) for text in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["warm", "always", "pays", "mix-pays", "share-0.25", "share-1"]
    assert rows[4]["token_share"] < 0.5 < rows[5]["token_share"]
    assert "trained on 25% of the tokens" in capsys.readouterr().out
