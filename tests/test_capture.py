"""What a draft learns from, by the compact decoder, is what Transformers computes one text at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rollout_engine import capture
from rollout_engine.capture import capture_samples
from rollout_engine.decoder import Decoder
from rollout_engine.types import FinishReason, RolloutRequest, Sample, SamplingParams
from tests.rollout_engine_helpers import save_hf_model

LENGTHS = [(3, 9), (14, 2), (1, 30), (5, 5), (8, 1)]


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 40, (count,), generator=generator).tolist())

    return [
        Sample(
            RolloutRequest(i, 7, ids(prompt), SamplingParams(temperature=0.5 + i, seed=100 + i)),
            ids(response),
            (),
            (),
            FinishReason.STOP,
        )
        for i, (prompt, response) in enumerate(LENGTHS)
    ]


@pytest.mark.parametrize("padded_tokens", [4096, 40, 1])
@torch.no_grad()
def test_states_equal_transformers(padded_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_MAX_PADDED_TOKENS", padded_tokens)
    model = save_hf_model(tmp_path, tie_word_embeddings=False)
    decoder = Decoder.from_hf(tmp_path, torch.float32)
    given = samples()
    found = capture_samples(decoder, given, (1, 3, 5))
    assert len(found) == len(given)
    for sample, draft in zip(given, found, strict=True):
        ids_T = torch.tensor(sample.request.prompt_ids + sample.token_ids)
        want = model(ids_T[None], output_hidden_states=True)
        aux_TA = torch.cat([want.hidden_states[k + 1][0] for k in (1, 3, 5)], dim=-1)
        torch.testing.assert_close(draft.aux_hidden, aux_TA, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(draft.target_logits, want.logits[0], atol=1e-4, rtol=0)
        assert torch.equal(draft.token_ids, ids_T)
        assert torch.equal(draft.embeds, model.get_input_embeddings()(ids_T))
        assert (draft.prompt_id, draft.sample_id) == sample.request.key
        assert draft.prompt_len == len(sample.request.prompt_ids)
        assert (draft.temperature, draft.seed) == (sample.request.sampling.temperature, sample.request.sampling.seed)
        assert draft.target_head is decoder.head and not draft.aux_hidden.requires_grad
