"""The same code on one CUDA GPU: numbers equal the CPU's, exactness holds there, and a whole run goes through."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config
from rollout_engine.decoder import Decoder
from sync.checksum import checksum
from tests import loop_helpers
from tests.rollout_engine_helpers import make_engine, make_requests, run_engine, save_hf_model, tokens_of, total_spec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
GPU = torch.device("cuda")


def load(folder: Path, dtype: torch.dtype, device: torch.device | str) -> tuple[Decoder, Eagle3]:
    config = json.loads((folder / "config.json").read_text())
    draft = Eagle3(Eagle3Config.from_target(config, DraftConfig()), seed=5).to(device=device, dtype=dtype)
    with torch.no_grad():
        draft.lm_head.weight.mul_(10.0)
    return Decoder.from_hf(folder, dtype, device), draft


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_hf_model(path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("count", [3, 100_003])
def test_checksums_equal_the_cpus(dtype: torch.dtype, count: int) -> None:
    tensor = (torch.randn(count) * 100).to(dtype)
    assert checksum(tensor.to(GPU)) == checksum(tensor)


def test_float32_logprobs_equal_the_cpus(folder: Path) -> None:
    requests = make_requests(temperature=0.0)
    results = []
    for device in ("cpu", "cuda"):
        decoder, _ = load(folder, torch.float32, device)
        results.append(run_engine(make_engine(decoder, device=device), requests))
    assert tokens_of(results[0]) == tokens_of(results[1])
    for key, sample in results[0].items():
        assert sample.logprobs == pytest.approx(results[1][key].logprobs, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_gives_plain_decodings_tokens_and_the_cpus(folder: Path, temperature: float) -> None:
    requests = make_requests(temperature=temperature)
    texts = []
    for device in ("cpu", "cuda"):
        decoder, draft = load(folder, torch.float64, device)
        plain = run_engine(make_engine(decoder, device=device, verify_rule="coupled"), requests)
        for depth, slots in ((1, 16), (3, 5)):
            engine = make_engine(
                decoder,
                draft,
                device=device,
                verify_rule="coupled",
                speculative_num_steps=depth,
                max_running_requests=slots,
            )
            samples = run_engine(engine, requests)
            assert tokens_of(samples) == tokens_of(plain)
            assert temperature == 0.0 or total_spec(samples).num_accepted > 0
        texts.append(tokens_of(plain))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_run(tmp_path: Path, dtype: str) -> None:
    model = loop_helpers.make_tiny_model(tmp_path / "tiny")
    config = loop_helpers.tiny_config(model, tmp_path, "gpu", deterministic=False, save_interval=2)
    config = replace(
        config,
        policy=replace(config.policy, dtype=dtype),
        rollout=replace(config.rollout, dtype=dtype, controller="adaptive"),
    )
    folder = loop_helpers.run(config)
    lines = loop_helpers.metrics(folder)
    assert [line["policy_version"] for line in lines] == [0, 1, 2]
    assert max(line["logp_diff_mean"] for line in lines) < (1e-4 if dtype == "float32" else 0.05)
    assert all(line["draft_loss"] >= 0 for line in lines)
    resumed = loop_helpers.run(replace(config, num_rollout=4, resume=True))
    assert [line["step"] for line in loop_helpers.metrics(resumed)] == [0, 1, 2, 3]
