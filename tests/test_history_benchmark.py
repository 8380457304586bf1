"""`slipstream bench history`: its replay against texts whose answer is known, and the command on a tiny policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import history
from rollout_engine.types import FinishReason, RolloutRequest, Sample
from trainer.make_model import MakeModelConfig, make_model


def sample(prompt_id: int, sample_id: int, prompt: tuple[int, ...], response: tuple[int, ...]) -> Sample:
    return Sample(RolloutRequest(prompt_id, sample_id, prompt), response, (), (), FinishReason.LENGTH)


def test_a_replay_finds_the_epoch_before_by_what_the_prompt_says():
    args = history.parse(["--policy", "unused", "--k", "3"])
    text, other = tuple(range(10, 51)), tuple(range(60, 101))
    epochs = [[sample(0, 0, (1, 2), text)], [sample(7, 0, (1, 2), text), sample(8, 0, (3, 4), other)]]
    first, second = history.replay(args, epochs)
    assert first["history_alone_proposes"] == 0.0 and first["look_ups"] == 40
    # The known text takes ten steps of four tokens, all proposed; the other is as new as the first was.
    assert second["look_ups"] == 10 + 40
    assert second["history_alone_tokens_per_verify"] == pytest.approx(4.0)
    assert second["history_alone_accept_rate_1"] == 1.0 and second["history_alone_proposes"] == pytest.approx(0.2)
    assert second["history_alone_tokens_per_forward"] == pytest.approx(1 + 30 / 50)
    assert 0 < second["look_up_p50_us"] <= second["look_up_p99_us"] <= second["look_up_max_us"]


def test_siblings_are_replayed_in_turns():
    args = history.parse(["--policy", "unused", "--k", "3"])
    text = tuple(range(10, 51))
    (found,) = history.replay(args, [[sample(0, i, (1, 2), text) for i in range(2)]])
    # The second finds each step's two words in the first, which is one token ahead, and so catches up and is alone.
    assert found["history_alone_tokens_per_verify"] == pytest.approx(2.0)
    assert found["history_alone_accept_rate_1"] == 1.0


def test_both_arms_answer_the_same_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made = MakeModelConfig(out=tmp_path / "policy", eps_residual=0.2, num_train_prompts=8, num_eval_prompts=4)
    policy, results = make_model(made), tmp_path / "history.jsonl"
    history.main(
        f"--policy {policy} --results {results} --prompts-per-seed 2 --group 3 --seeds 0,1 --max-new-tokens 16 "
        "--batch-size 4 --controller fixed --train-draft-steps 1 --train-draft-samples 4 --min-match 1 "
        "--index-tokens 3000".split()
    )
    *rows, index = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(row["epoch"], row["num_seeds"]) for row in rows] == [(1, 2), (2, 2)]
    for row in rows:
        assert row["target_sum_p2"] <= row["target_max_prob"] <= 1 <= row["both_tokens_per_verify"]
        assert row["tokens_per_verify_gain"] == pytest.approx(row["tokens_per_forward_gain"])  # fixed: all steps draft
        assert row["tokens_per_s_ratio"]["low"] < row["tokens_per_s_ratio"]["high"]
        assert row["policy"] == str(policy) and row["controller"] == "fixed" and row["commit"]
    assert (index["kind"], index["indexed_tokens"], index["k"], index["look_ups"]) == ("index", 3000, 3, 10_000)
    said = capsys.readouterr().out
    assert "EAGLE-3 + history, tokens per verify / forward" in said and "p99, us" in said


def test_most_look_ups_in_random_walks_find_what_can_follow():
    args = history.parse(["--policy", "unused", "--batch-size", "4"])
    found = history.big_index(args, 20_000)
    assert found["indexed_tokens"] == 20_000 and found["found"] > 0.9
    assert 0 < found["look_up_p50_us"] <= found["look_up_p99_us"] <= found["look_up_max_us"]
    assert 300 < found["bytes_per_token"] < 310
