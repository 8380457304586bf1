"""A draft that finetune-draft wrote, loaded from its folder by a real server: it drafts there what it drafts here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from draft_models.checkpoint import load_draft
from rollout_engine.config import RolloutConfig
from rollout_engine.decoder import Decoder
from rollout_engine.hf_checkpoint import read_config
from rollout_engine.torch_engine import TorchEngine
from rollout_engine.types import SpecStats
from tests import finetune_helpers
from tests.sglang import helpers
from tests.sglang.helpers import Reference, greedy_batch, serve
from trainer.serving import build_engine, load_tokenizer

pytestmark = pytest.mark.sglang
DEPTH = 3
NUM_REQUESTS = 12
SEEN, ASKED = 24, 48  # tokens that the draft has learned, and those of the requests: so it is right about some


@pytest.fixture
def parrot(tmp_path: Path) -> Path:
    return helpers.make_parrot(tmp_path / "parrot")


@pytest.mark.usefixtures("stand_ins_allowed")
def test_a_finetuned_draft_serves_in_sglang(parrot: Path, tmp_path: Path) -> None:
    """Greedy, as SGLang verifies on a CPU. Only SGLang counts drafts accepted behind a response's end: at most one a
    position and request."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": list(prompt)}) + "\n" for prompt in helpers.prompts(96, SEEN)))
    flags = ("--rollout-temperature=0", "--draft.lr=1e-2", "--n-samples-per-prompt=1")
    config = finetune_helpers.config_for(parrot, tmp_path / "draft", *flags, data=str(data), epochs=8, eval_interval=8)
    folder = finetune_helpers.run(config)
    rollout = RolloutConfig(
        engine="sglang",
        device="cpu",
        max_running_requests=4,
        context_length=helpers.CONTEXT,
        temperature=0.0,
        speculative_num_steps=DEPTH,
        speculative_draft_model_path=str(folder),
        sglang_python=str(helpers.SGLANG_PYTHON),
        sglang_start_timeout_s=200.0,
    )
    draft = load_draft(folder, read_config(parrot))
    requests = greedy_batch(NUM_REQUESTS, ASKED, max_new_tokens=40)
    here = TorchEngine(
        Decoder.from_hf(parrot, torch.float32),
        replace(rollout, engine="torch", controller="fixed"),
        draft=draft,
        eos_token_ids=(helpers.EOS,),
    )
    expected = sum((sample.spec for sample in here.generate(requests)), SpecStats())
    server = build_engine(parrot, rollout, draft, load_tokenizer(parrot), tmp_path / "server", serves_files=True)
    try:
        samples = serve(server, requests)
    finally:
        server.close()
    reference = Reference(parrot, helpers.weights_of(parrot))
    for sample in samples.values():
        helpers.assert_greedy(reference, sample)
    found = sum((sample.spec for sample in samples.values()), SpecStats())
    assert 1.5 < expected.accept_length < DEPTH + 0.8, "right about all or none: another draft would pass"
    assert abs(found.num_verify_steps - expected.num_verify_steps) <= 4  # near ties
    for a, b in zip(found.accepted_by_position, expected.accepted_by_position, strict=True):
        assert abs(a - b) <= NUM_REQUESTS + 4, (found, expected)
