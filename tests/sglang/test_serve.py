"""`slipstream serve` with a real server: OpenAI's endpoints, a run that is pointed at it, an end without leftovers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from rollout_engine.decoder import Decoder
from rollout_engine.torch_engine import TorchEngine
from tests import loop_helpers
from tests.sglang import helpers
from trainer.serving import load_tokenizer

pytestmark = pytest.mark.sglang
NUM_TOKENS = 8


def post(address: str, path: str, payload: dict[str, Any]) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address + path, json.dumps({"model": "default", **payload}).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def greedy_text(policy: Path, prompt: str) -> str:
    """What the embedded engine says over the weights in the folder."""
    tokenizer = load_tokenizer(policy)
    engine = TorchEngine(
        Decoder.from_hf(policy, torch.float32),
        loop_helpers.tiny_config(policy, policy, "unused", rollout__speculative_algorithm="NONE").rollout,
        eos_token_ids=(helpers.EOS,),
    )
    (sample,) = engine.generate([helpers.greedy(tokenizer.encode(prompt), max_new_tokens=NUM_TOKENS)])
    return tokenizer.decode(list(sample.token_ids))


def test_it_serves_openais_endpoints_and_a_run_and_ends_when_told(model: Path, tmp_path: Path) -> None:
    flags = (f"--policy={model}", f"--work-dir={tmp_path / 'serve'}", f"--sglang-python={helpers.SGLANG_PYTHON}")
    server = subprocess.Popen(
        [sys.executable, "-m", "trainer.cli", "serve", *flags, "--rollout.device=cpu", "--max-running-requests=5"],
        cwd=helpers.ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(helpers.STAND_IN), str(helpers.ROOT)])},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        said = server.stdout.readline()
        assert said.startswith(f"serving {model} at http://127.0.0.1:"), said
        address = said.split(" at ")[1].split(" ")[0]
        pids = [process.pid for process in psutil.Process(server.pid).children(recursive=True)]

        asked = {"prompt": "repeat: b a", "max_tokens": NUM_TOKENS, "temperature": 0}
        answer = post(address, "/v1/completions", asked)
        assert answer["choices"][0]["text"] == greedy_text(model, asked["prompt"])
        chat = {"messages": [{"role": "user", "content": "repeat: b a"}], "max_tokens": NUM_TOKENS}
        assert post(address, "/v1/chat/completions", chat)["usage"]["completion_tokens"] == NUM_TOKENS

        elsewhere = {"engine": "sglang", "sglang_address": address, "sync_dir": str(tmp_path / "exchange")}
        rollout = {f"rollout__{name}": value for name, value in elsewhere.items()}
        as_started = {"attention_backend": "torch_native", "sleep_on_idle": True, "log_requests": False}
        rollout |= {"rollout__sglang": as_started, "rollout__speculative_algorithm": "NONE"}
        config = loop_helpers.tiny_config(model, tmp_path, "run", num_rollout=2, **rollout)
        found = loop_helpers.metrics(loop_helpers.run(config))
        assert [line["policy_version"] for line in found] == [0, 1]
        assert max(line["logp_diff_max"] for line in found) < helpers.LOGPROB_TOLERANCE
        assert server.poll() is None and helpers.listens(address), "a run leaves a server of others running"
        assert post(address, "/v1/completions", asked)["usage"]["completion_tokens"] > 0
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(60)
    assert status == 0
    assert not helpers.listens(address) and not any(map(psutil.pid_exists, pids))
