"""Benchmarks: fair order, honest intervals, complete result lines, and a tiny run of each."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest

from benchmarks import common, draft, rollout, step, sync
from rollout_engine.speculation import CostTable
from rollout_engine.types import FinishReason, RolloutRequest, Sample, SpecStats
from trainer.make_model import MakeModelConfig, make_model


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "policy"
    return make_model(MakeModelConfig(out=out, eps_residual=0.2, num_train_prompts=16, num_eval_prompts=4))


def result_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["rollout", "sync", "draft", "step"])
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
    assert rollout.emitted_per_verify([whole]) == whole.spec.accept_length == 3.0
    assert rollout.emitted_per_verify([cut]) == 2.0 < cut.spec.accept_length
    assert rollout.emitted_per_verify([whole, cut]) == 2.5


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


def test_sync_measures_the_same_bytes(policy_dir: Path, tmp_path: Path):
    results = tmp_path / "sync.jsonl"
    sync.main(["--policy", str(policy_dir), "--results", str(results), "--repeats", "2"])
    rows = result_lines(results)
    assert [row["arm"] for row in rows] == ["plain copy", "in process", "disk"]
    assert len({row["num_bytes"] for row in rows}) == 1 and rows[0]["over_copy"] == 1.0


def test_draft_scores_every_rule(policy_dir: Path, tmp_path: Path):
    results = tmp_path / "draft.jsonl"
    draft.main(["--policy", str(policy_dir), "--results", str(results), "--samples", "16", "--max-new-tokens", "24"])
    rows = result_lines(results)
    assert [row["rule"] for row in rows] == ["target_only", "rejection", "coupled"]
    for row in rows:
        assert 1.0 <= row["accept_length"] <= 4.0 and row["draft"] == "random"
    # Coupled acceptance is at least (1 - TV) / (1 + TV), TV = 1 - rejection's: it fails when the text was sampled with
    # other noise than the rule's. 0.8: room for the noise of a few tokens.
    target_only, rejection, coupled = (row["accept_rate_by_position"][0] for row in rows)
    assert target_only < coupled < 1 and coupled > 0.8 * rejection / (2 - rejection)


def test_step_takes_medians_after_the_warm_up():
    times = ((100.0, 100.0), (3.0, 1.0), (5.0, 1.0), (4.0, 4.0))
    lines = [{"step": i, "time_rollout_s": r, "time_policy_s": p} for i, (r, p) in enumerate(times)]
    rows = step.rows_of(lines, num_warmup=1)
    shown = [(row["phase"], row["median_s"], row["share"]) for row in rows]
    assert shown == [("rollout", 4.0, 0.8), ("policy", 1.0, 0.2)]
