"""A run folder with made-up metrics, for tests of what reads one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CONFIG = """
name = "made-up"
num_rollout = 6
[rollout]
speculative_algorithm = "EAGLE3"
speculative_num_steps = 2
verify_rule = "rejection"
temperature = 1.0
"""


def full_line(step: int) -> dict[str, Any]:
    """Every metric that a step can have, each from the step by a rule that a test can repeat."""
    return {
        "step": step,
        "reward": 0.1 + 0.1 * step,
        "eval_reward": 0.15 + 0.1 * step,
        "accept_length": 1.2 + 0.2 * step,
        "accept_rate_by_position": [0.1 * step + 0.15, 0.1 * step + 0.05],
        "predicted_accept_length": 1.23 + 0.2 * step,
        "expected_accept_length": 1.22 + 0.2 * step,
        "predicted_accept_rate_by_position": [0.1 * step + 0.16, 0.1 * step + 0.07],
        "frozen_accept_length": 1.17,
        "sentinel_verify_steps": 250,
        "sentinel_accept_length": 1.21 + 0.2 * step,
        "sentinel_expected_accept_length": 1.22 + 0.2 * step,
        "sentinel_z": -0.3,
        "sentinel_z_by_position": [-0.2, -0.4],
        "sentinel_evidence": -0.7,
        "history_verify_steps": 60,
        "history_share": 0.2,
        "history_accept_length": 2.5,
        "history_proposed": 180,
        "history_accepted": 90,
        "draft_accept_length": 1.1 + 0.2 * step,
        "decode_steps": 400,
        "verify_steps": 300,
        "tokens_per_forward": 1.1 + 0.2 * step,
        "tokens_per_s": 700.0 + 10 * step,
        "speedup_vs_plain": 0.55 + 0.05 * step,
        "plain_tokens_per_s": 1000.0,
        "logp_diff_mean": 3e-7,
        "logp_diff_max": 2e-6 + 1e-7 * step,
        "surprise_gap": 0.001,
        "surprise_gap_z": 0.5,
        "num_tokens": 1000.0,
        "policy_version": step,
        "reproducible": False,
        "response_len_mean": 20.5,
        "response_len_max": 63,
        "response_len_p50": 18,
        "response_len_p90": 40,
        "response_len_p99": 61,
        "response_len_histogram": [0, 1, 3, 9, 16, 3],
        "entropy": 1.5 - 0.1 * step,
        "finish_reasons": {"length": 2, "stop": 30},
        "running_batch": [32.0, 32.0, 20.0, 7.0],
        "draft_loss": 4.0 - 0.3 * step,
        "draft_loss_kind": "lk",
        "draft_accept_by_step": [0.5 + 0.04 * step, 0.4 + 0.03 * step],
        "draft_decision": "rising" if step < 3 else "losing",
        "draft_token_share": 0.5 if step < 3 else 0.0,
        "draft_saved_time_s": 2.0,
        "draft_saved_time_basis": "probe",
        "draft_spent_time_s": 0.5,
        "draft_balance_time_s": 1.5 * (step + 1),
        "draft_accept_residual": 0.01,
        "draft_accept_residual_z": 0.4,
        "time_rollout_s": 3.0,
        "time_policy_s": 1.5,
        "time_sync_s": 0.5,
    }


def make_run(folder: Path, lines: Sequence[Mapping[str, Any]], config: str = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
