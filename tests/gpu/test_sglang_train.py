"""A whole run as a user starts it: recipes/gpu-eagle3.toml, SGLang and Megatron on one GPU, memory given back between.

`tests/sglang/test_train.py` is the same on a CPU. Nothing here depends on time.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from draft_models.checkpoint import load_draft
from rollout_engine.hf_checkpoint import read_config
from tests import loop_helpers
from tests.test_server_process import wait_for
from trainer.make_model import MakeModelConfig, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs SGLang: pip install '.[sglang]'"),
    pytest.mark.skipif(importlib.util.find_spec("torch_memory_saver") is None, reason="needs torch_memory_saver"),
]
ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 500  # of one start of the trainer; more is a hang
BFLOAT16_LOGPROB = 0.1  # nats, mean: both sides round each product; another version or temperature costs more

# The recipe's own settings stand but for sizes, and for what a run of few steps needs: rates at which weights move, and
# a reward that differs within nearly every group of a policy that can do little.
SMALL = (
    *("--name=run", "--lr=1e-4", "--lr-warmup-iters=0", "--rollout-max-response-len=64", "--max-running-requests=32"),
    *("--rollout.context-length=512", "--rollout-batch-size=8", "--custom-rm-path=tests.loop_helpers:graded_reward"),
    *("--eval-interval=2", "--num-eval-prompts=8"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Head size 64, which every attention backend has; taught for a moment, so that its laws are not uniform."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = tmp_path_factory.mktemp("model") / "policy"
    sizes = {"context_length": 512, "num_train_prompts": 64, "num_eval_prompts": 8}
    return make_model(MakeModelConfig(out=out, size="30m", task="repeat", warm_start_steps=40, **sizes), device=device)


def train(model: Path, runs: Path, *flags: str) -> list[dict[str, Any]]:
    """`slipstream train` in a process of its own; the metrics lines without their times."""
    files = (f"--hf-checkpoint={model}", f"--prompt-data={model}/train.jsonl", f"--eval-prompt-data={model}/eval.jsonl")
    command = [sys.executable, "-m", "trainer.cli", "train", "recipes/gpu-eagle3.toml", f"--run-dir={runs}"]
    done = subprocess.run(
        [*command, *files, *SMALL, *flags], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    logs = "".join(f"\n{path}:\n{path.read_text()[-3000:]}" for path in sorted(runs.rglob("engine.log")))
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}{logs}"
    return loop_helpers.metrics(runs / "run")


def running_in(folder: Path) -> Iterator[int]:
    """Processes of a server: each works in the run's folder."""
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder):
                yield process.pid
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue


def test_the_recipe_trains_serves_and_resumes(model: Path, tmp_path: Path) -> None:
    """Three steps, then a fourth in a new server with everything from the checkpoint."""
    folder = tmp_path / "run"
    assert len(train(model, tmp_path, "--num-rollout=3")) == 3
    wait_for(lambda: not list(running_in(tmp_path)), "the end of the server's processes")
    lines = train(model, tmp_path, "--num-rollout=4", "--resume")
    wait_for(lambda: not list(running_in(tmp_path)), "the end of the resumed server's processes")

    assert [(line["step"], line["policy_version"], line["next_version"]) for line in lines] == [
        (step, step, step + 1) for step in range(4)
    ]
    assert [line["step"] for line in lines if "eval_reward" in line] == [1, 3]
    for line in lines:
        assert line["logp_diff_mean"] < BFLOAT16_LOGPROB, "trainer and server compute the same policy"
        assert abs(line["surprise_gap_z"]) < 5, "the server samples from the policy's own law"
        assert line["verify_steps"] > 0 and line["draft_loss"] > 0
        assert line["sentinel_verify_steps"] > 0 and "sentinel_alarm" not in line, line.get("sentinel_alarm")
        assert abs(line["sentinel_z"]) < 5, "the server accepts as many drafts as the trainer's own weights foretell"
        assert not line["reproducible"], "no seeds are sent"
        assert line["grad_norm"] > 0 and line["draft_samples_dropped"] == 0
    assert lines[3]["draft_loss"] < lines[0]["draft_loss"], "the draft learns, and keeps what it learned over a resume"

    policy = loop_helpers.weights(folder, "policy")
    before = loop_helpers.weights(model.parent, model.name)
    assert policy.keys() == before.keys()
    assert any(not tensor.equal(before[name].to(tensor.dtype)) for name, tensor in policy.items()), "the policy moved"
    draft = load_draft(folder / "draft", read_config(folder / "policy"))
    assert all(bool(tensor.isfinite().all()) for tensor in draft.named_tensors().values())
    assert not draft.config.is_reduced and not (folder / "draft.not-published").exists()
    assert (folder / "report.html").exists()
