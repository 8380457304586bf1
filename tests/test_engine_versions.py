"""Weights that arrive while samples are handed out: every token is recorded under the weights that gave it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rollout_engine.types import EngineError, RolloutRequest, Sample, SamplingParams
from tests.rollout_engine_helpers import load_pair, make_engine, make_hf_model
from tests.test_torch_engine import send

_CHANGED = "model.layers.2."
_SCALE = 1.3


def teacher_forced(sample: Sample) -> list[float]:
    """Log-probs of the response by Transformers, each token under the version that the sample names for it."""
    ids = torch.tensor([sample.request.prompt_ids + sample.token_ids])
    by_version = {}
    for version, scale in ((0, 1.0), (7, _SCALE)):
        model = make_hf_model("Qwen3").double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith(_CHANGED):
                    parameter.mul_(scale)
            logits_TV = model(ids).logits[0]
        by_version[version] = logits_TV[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    start = len(sample.request.prompt_ids) - 1
    return [
        by_version[span.version][start + i].item()
        for span in sample.policy_versions
        for i in range(span.start, span.end)
    ]


def one_token_beside(max_new_tokens: int) -> list[RolloutRequest]:
    """The first request ends on the token of its prefill, the second runs on."""
    return [
        RolloutRequest(0, 0, (1, 2, 3), SamplingParams(max_new_tokens=1, seed=11)),
        RolloutRequest(1, 0, (4, 5, 6, 7), SamplingParams(max_new_tokens=max_new_tokens, seed=12)),
    ]


@pytest.mark.parametrize("is_speculative", [False, True])
def test_a_sync_at_a_sample_that_ends_on_its_first_token(tmp_path: Path, is_speculative: bool) -> None:
    decoder, draft = load_pair(tmp_path)
    engine = make_engine(decoder, draft if is_speculative else None)
    stream = engine.generate(one_token_beside(20))
    first = next(stream)
    assert first.request.key == (0, 0) and len(first.token_ids) == 1
    send(engine.receiver, 7, _SCALE, f"policy.{_CHANGED}")
    (second,) = stream
    assert [span.version for span in second.policy_versions] == [0, 7]
    assert second.logprobs == pytest.approx(teacher_forced(second), abs=1e-5)
    assert first.logprobs == pytest.approx(teacher_forced(first), abs=1e-5)


@pytest.mark.parametrize("length", [2, 20])
def test_an_engine_that_turns_dirty_at_a_sample_computes_nothing_more(tmp_path: Path, length: int) -> None:
    decoder, _ = load_pair(tmp_path)
    engine = make_engine(decoder)
    stream = engine.generate(one_token_beside(length))
    next(stream)
    engine.receiver._dirty = True
    decoder.embed.fill_(float("nan"))
    if length == 2:  # finished before the weights broke
        (second,) = stream
        assert second.logprobs == pytest.approx(teacher_forced(second), abs=1e-5)
    else:
        with pytest.raises(EngineError, match="mixture of versions"):
            next(stream)
