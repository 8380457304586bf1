"""The metrics line: token-weighted means, absent rather than NaN, and a clock whose phases add up."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from rollout_engine.types import FinishReason, RolloutRequest, Sample, SpecStats, VersionSpan
from trainer import metrics as m


def sample(prompt_id: int, length: int, reward: float | None, spec: SpecStats | None = None) -> Sample:
    return Sample(
        request=RolloutRequest(prompt_id, 0, (1, 2)),
        token_ids=tuple(range(length)),
        logprobs=(-1.0,) * length,
        policy_versions=(VersionSpan(0, length, 4),),
        finish_reason=FinishReason.LENGTH if length > 9 else FinishReason.STOP,
        spec=spec or SpecStats(),
        reward=reward,
    )


def test_accept_length_weights_tokens_not_samples():
    long = SpecStats(9, 9, (0, 0, 9), (9, 9), (9, 9))  # 9 verify steps, all accepted: 3 tokens each
    short = SpecStats(1, 1, (1,), (1, 1), (0, 0))  # one verify step, nothing accepted
    got = m.rollout_metrics([sample(0, 27, 1.0, long), sample(0, 2, 0.0, short)], rollout_s=2.0)
    assert got["accept_length"] == pytest.approx(2.8)  # 28 tokens in 10 steps, not (3 + 1) / 2
    assert got["accept_rate_by_position"] == [0.9, 0.9]
    assert got["tokens_per_s"] == 14.5
    assert got["policy_version"] == 4
    assert got["finish_reasons"] == {"length": 1, "stop": 1}


def test_nothing_proposed_means_no_acceptance_keys():
    got = m.speculation_metrics(SpecStats(num_decode_steps=5))
    assert got == {"decode_steps": 5, "tokens_per_forward": 1.0}


def test_groups_with_signal_counts_groups_whose_rewards_differ():
    got = m.reward_metrics([sample(0, 1, 0.0), sample(0, 1, 1.0), sample(1, 1, 1.0), sample(1, 1, 1.0)])
    assert got == {"reward": 0.75, "groups_with_signal": 0.5}
    assert m.reward_metrics([sample(0, 1, None)]) == {}


def test_percentiles_are_nearest_rank_and_the_histogram_is_by_power_of_two():
    got = m.length_metrics([1, 2, 3, 4, 100])
    assert (got["response_len_p50"], got["response_len_p90"], got["response_len_max"]) == (3, 100, 100)
    assert got["response_len_histogram"] == [1, 2, 1, 0, 0, 0, 1]


def test_running_batch_is_weighted_by_time():
    # 8 requests for the first 3 of 4 seconds, then 2
    assert m.running_by_time([(0.0, 8), (3.0, 2)], end_s=4.0, num_bins=2) == [8.0, 5.0]
    assert m.running_by_time([(1.0, 6)], end_s=4.0, num_bins=4) == [0.0, 6.0, 6.0, 6.0]


def test_running_requests_follow_from_finish_times():
    # three requests on two slots: the third starts when the first ends
    points = m.running_from_finishes([3.0, 1.0, 4.0], num_slots=2)
    assert points == [(0.0, 2), (1.0, 2), (3.0, 1), (4.0, 0)]
    assert m.running_by_time(points, end_s=4.0, num_bins=4) == [2.0, 2.0, 2.0, 1.0]


def test_probe_compares_tokens_per_second():
    got = m.plain_probe_metrics([sample(0, 20, 1.0)], 2.0, [sample(0, 10, 1.0)], 2.0)
    assert got == {"speedup_vs_plain": 2.0, "plain_tokens_per_s": 5.0}


def test_a_line_leaves_out_none_and_refuses_what_is_not_finite():
    assert m.step_line(3, {"reward": 1.0, "eval_reward": None}) == {"step": 3, "reward": 1.0}
    with pytest.raises(m.MetricsError, match="step 3: metric 'draft_loss' is nan"):
        m.step_line(3, {"draft_loss": float("nan")})
    with pytest.raises(m.MetricsError, match="'rates' is inf"):
        m.step_line(3, {"rates": [0.5, float("inf")]})
    with pytest.raises(m.MetricsError, match="given twice"):
        m.step_line(3, {"reward": 1.0}, {"reward": 2.0})


def test_expected_accept_length_takes_the_depths_that_were_drafted():
    spec = SpecStats(10, 10, (2, 4, 4), (10, 5), (8, 4))  # two drafts in half of the steps, one in the others
    forecast = {"predicted_accept_length": 2.4, "predicted_accept_rate_by_position": [0.8, 0.6]}
    line = m.step_line(0, m.speculation_metrics(spec), forecast)
    assert line["expected_accept_length"] == pytest.approx(1 + 0.8 + 0.6 * 0.5)
    assert "expected_accept_length" not in m.step_line(0, forecast)


def test_history_and_model_are_told_apart_and_nothing_is_expected_of_their_mixture():
    history = SpecStats(4, 4, (1, 0, 3), (4, 4), (3, 3))
    spec = SpecStats(12, 10, (5, 2, 3), (10, 10), (5, 3), history)
    line = m.step_line(0, m.speculation_metrics(spec), {"predicted_accept_rate_by_position": [0.8, 0.6]})
    assert (line["verify_steps"], line["accept_length"]) == (10, 1.8)
    assert (line["history_verify_steps"], line["history_accept_length"]) == (4, 2.5)
    assert (line["history_share"], line["history_proposed"], line["history_accepted"]) == (0.4, 8, 6)
    assert line["draft_accept_length"] == pytest.approx(1 + 2 / 6)
    assert "expected_accept_length" not in line
    alone = m.speculation_metrics(SpecStats(4, 4, (1, 0, 3), (4, 4), (3, 3), history))
    assert alone["history_accept_length"] == 2.5 and "draft_accept_length" not in alone


def test_clock_gives_the_inner_phase_its_own_time():
    clock = m.PhaseClock()
    start = time.perf_counter()
    with clock("rollout"):
        with clock("reward"):
            time.sleep(0.02)
        time.sleep(0.01)
    wall = time.perf_counter() - start
    taken = clock.take()
    assert sorted(taken) == ["time_reward_s", "time_rollout_s"]
    assert sum(taken.values()) <= wall  # the inner phase is not counted twice
    assert taken["time_reward_s"] >= 0.02 and clock.take() == {}


def test_clock_records_a_phase_that_raises():
    clock = m.PhaseClock()
    with pytest.raises(RuntimeError), clock("policy"):
        raise RuntimeError("loss is nan")
    assert "time_policy_s" in clock.take()


def test_written_lines_are_read_back_and_appear_in_tensorboard(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = m.MetricsWriter(tmp_path)
    line = m.step_line(1, {"reward": 0.5, "accept_rate_by_position": [0.5, 0.25], "finish_reasons": {"stop": 3}})
    writer.write(line)
    writer.close()
    assert m.read_metrics(tmp_path / m.METRICS_FILE) == [json.loads(json.dumps(line))]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert tags == {"reward", "accept_rate_by_position/0", "accept_rate_by_position/1", "finish_reasons/stop"}
    assert events.Scalars("accept_rate_by_position/1")[0].value == 0.25


def test_a_run_resumed_from_its_start_hides_what_the_dead_one_left(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed_at, rewards in ((None, (0.1, 0.2)), (0, (0.3,))):
        writer = m.MetricsWriter(tmp_path, resumed_at)
        for step, reward in enumerate(rewards):
            writer.write(m.step_line(step, {"reward": reward}))
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("reward")] == pytest.approx([0.3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 0}\n{"step": 1, "rew', ":2: not JSON"),
        ('{"reward": 1}\n', ":1: not a metrics line"),
        ("", "empty"),
    ],
)
def test_a_broken_metrics_file_is_one_clear_error(tmp_path: Path, text: str, message: str):
    path = tmp_path / m.METRICS_FILE
    path.write_text(text)
    with pytest.raises(m.MetricsError, match=message) as caught:
        m.read_metrics(path)
    assert "\n" not in str(caught.value)


def test_a_missing_metrics_file_says_what_to_give(tmp_path: Path):
    with pytest.raises(m.MetricsError, match="no metrics file there"):
        m.read_metrics(tmp_path / "none")
