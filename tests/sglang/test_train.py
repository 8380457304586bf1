"""A whole run with `--engine sglang`: the loop is the same, and so is what it leaves behind."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollout_engine.server_process import free_port
from tests import loop_helpers
from tests.sglang import helpers
from trainer.config import RunConfig

pytestmark = pytest.mark.sglang


def on_sglang(model: Path, runs: Path, **changes: Any) -> RunConfig:
    settings = {"engine": "sglang", "sglang_python": str(helpers.SGLANG_PYTHON), "sglang": {"sleep_on_idle": True}}
    rollout = {f"rollout__{name}": value for name, value in settings.items()}
    return loop_helpers.tiny_config(model, runs, "served", plain_probe_interval=0, num_rollout=2, **rollout, **changes)


def test_a_run_is_the_same_but_for_its_engine(model: Path, tmp_path: Path) -> None:
    changes = {"rollout__speculative_algorithm": "NONE", "num_rollout": 2, "plain_probe_interval": 0}
    embedded = loop_helpers.run(loop_helpers.tiny_config(model, tmp_path, "embedded", **changes))
    folder = loop_helpers.run(on_sglang(model, tmp_path, rollout__speculative_algorithm="NONE"))
    expected, found = loop_helpers.metrics(embedded), loop_helpers.metrics(folder)
    assert [line.keys() - {"reproducible"} for line in found] == [line.keys() for line in expected]
    assert not any(line["reproducible"] for line in found)  # no seeds are sent
    assert [line["policy_version"] for line in found] == [0, 1]
    assert max(line["logp_diff_max"] for line in found) < helpers.LOGPROB_TOLERANCE
    assert all(abs(line["surprise_gap_z"]) < 5 for line in found), "SGLang samples from the policy's own law"
    assert (folder / "policy" / "model.safetensors").exists() and (folder / "report.html").exists()


def test_policy_and_draft_are_trained_served_and_resumed(model: Path, tmp_path: Path, stand_ins_allowed: None) -> None:
    """Two steps, then a third in a new server. A CPU's SGLang accepts drafts greedily, hence allow_lossy."""
    config = on_sglang(model, tmp_path, rollout__allow_lossy=True)
    loop_helpers.run(config)
    folder = loop_helpers.run(replace(config, num_rollout=3, resume=True))
    found = loop_helpers.metrics(folder)
    assert [(line["step"], line["policy_version"]) for line in found] == [(0, 0), (1, 1), (2, 2)]
    assert max(line["logp_diff_max"] for line in found) < helpers.LOGPROB_TOLERANCE
    assert all(line["accept_length"] >= 1.0 and line["draft_loss"] > 0 for line in found)
    assert all(line["surprise_gap_z"] < -5 for line in found), "its greedy verification shows, right log-probs or not"
    assert (folder / "draft" / "model.safetensors").exists()


def test_two_ranks_of_a_trainer_share_a_server(model: Path, tmp_path: Path) -> None:
    """As torchrun starts them: its environment must not make the server one of its ranks."""
    flags = (
        *(f"--hf-checkpoint={model}", f"--prompt-data={model}/train.jsonl", f"--run-dir={tmp_path}", "--name=two"),
        *("--custom-rm-path=tests.loop_helpers:graded_reward", "--num-rollout=2", "--rollout-batch-size=2"),
        *("--n-samples-per-prompt=4", "--rollout-max-response-len=12", "--max-running-requests=4"),
        *("--engine=sglang", "--rollout.device=cpu", f"--sglang-python={helpers.SGLANG_PYTHON}"),
        *("--sglang-sleep-on-idle", "--speculative-algorithm=NONE", "--tensor-model-parallel-size=2"),
    )
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", str(free_port()))
    done = subprocess.run(
        [*torchrun, "-m", "trainer.cli", "train", *flags], cwd=helpers.ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found = loop_helpers.metrics(tmp_path / "two")
    assert [line["policy_version"] for line in found] == [0, 1]
    assert max(line["logp_diff_max"] for line in found) < helpers.LOGPROB_TOLERANCE
