"""The models of the GPU tests tell one draft from another, and a whole draft from one that has lost its layer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from draft_models.checkpoint import load_draft
from draft_models.eagle3 import Eagle3
from rollout_engine.decoder import Decoder
from rollout_engine.hf_checkpoint import read_config
from rollout_engine.types import RolloutRequest, SamplingParams, SpecStats
from tests.gpu.counting import EOS, VOCAB, save_counting
from tests.rollout_engine_helpers import make_engine


@dataclass(frozen=True)
class Pair:
    policy: Path
    draft: Path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """Steps 1 and 3."""
    found = []
    for step in (1, 3):
        folder = tmp_path_factory.mktemp(f"step{step}")
        found.append(Pair(folder / "policy", folder / "draft"))
        save_counting(found[-1].policy, found[-1].draft, step, torch.float32)
    return found


def decoded(policy: Path, draft: Eagle3) -> tuple[list[tuple[int, ...]], SpecStats]:
    """Greedy, as the GPU tests decode."""
    engine = make_engine(Decoder.from_hf(policy, torch.float32), draft, eos_token_ids=(EOS,), verify_rule="target_only")
    sampling = SamplingParams(temperature=0.0, max_new_tokens=64)
    work = [RolloutRequest(0, i, tuple((13 * i + 7 * j + 3) % VOCAB for j in range(4 + i)), sampling) for i in range(6)]
    samples = sorted(engine.generate(work), key=lambda sample: sample.request.key)
    return [sample.token_ids for sample in samples], sum((sample.spec for sample in samples), SpecStats())


def test_only_its_own_draft_is_accepted(pairs: list[Pair]) -> None:
    first, second = pairs
    config = read_config(second.policy)
    text, own = decoded(second.policy, load_draft(second.draft, config))
    same_text, other = decoded(second.policy, load_draft(first.draft, config))
    assert text == same_text, "the draft decides how fast, never what"
    assert own.accept_length > 1.4 and other.accept_length < 1.1
    assert text != decoded(first.policy, load_draft(first.draft, config))[0]
    steps = [b - a for response in text for a, b in pairwise(response)]
    assert 0.5 < steps.count(3) / len(steps) < 0.95, "the layers have their say"


def test_a_draft_that_lost_its_layer_is_found(pairs: list[Pair]) -> None:
    second = pairs[1]
    config = read_config(second.policy)
    whole = decoded(second.policy, load_draft(second.draft, config))[1]
    for name in ("midlayer.self_attn.o_proj.weight", "midlayer.mlp.down_proj.weight"):
        draft = load_draft(second.draft, config)
        with torch.no_grad():
            draft.get_parameter(name).zero_()
        assert decoded(second.policy, draft)[1] != whole, name
