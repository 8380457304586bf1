"""Small drafts, samples and laws for the tests of draft_models."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config
from draft_models.training import DraftBatch, make_batch
from draft_models.types import DraftSample

TARGET_CONFIG = {
    "hidden_size": 32,
    "vocab_size": 40,
    "num_hidden_layers": 8,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}


def small_draft(seed: int = 0, draft_vocab_size: int = 0, dtype: torch.dtype = torch.float32) -> Eagle3:
    config = Eagle3Config.from_target(TARGET_CONFIG, DraftConfig(draft_vocab_size=draft_vocab_size))
    generator = torch.Generator().manual_seed(seed)
    ids = None
    if draft_vocab_size:
        ids = torch.randperm(config.vocab_size, generator=generator)[:draft_vocab_size].sort().values
    draft = Eagle3(config, seed=seed, target_ids=ids).to(dtype)
    with torch.no_grad():
        for weight in draft.parameters():  # norms away from 1, so that a swapped norm shows
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator, dtype=dtype))
    return draft


@cache
def identity_head(dtype: torch.dtype) -> Tensor:
    """An output layer whose input is the logits; one tensor, as all samples of a forward share theirs."""
    return torch.eye(int(TARGET_CONFIG["vocab_size"]), dtype=dtype)


def random_sample(
    length: int,
    prompt_len: int,
    seed: int,
    *,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> DraftSample:
    generator = torch.Generator().manual_seed(seed)
    hidden, vocab = TARGET_CONFIG["hidden_size"], TARGET_CONFIG["vocab_size"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return DraftSample(
        prompt_id=0,
        sample_id=seed,
        token_ids=torch.randint(int(vocab), (length,), generator=generator),
        embeds=normal(length, int(hidden)),
        aux_hidden=normal(length, 3 * int(hidden)),
        target_hidden=2 * normal(length, int(vocab)),
        target_head=identity_head(dtype),
        prompt_len=prompt_len,
        temperature=temperature,
        seed=seed,
        policy_version=0,
    )


def batch_of(samples: list[DraftSample]) -> DraftBatch:
    batch = make_batch(samples)
    assert batch is not None
    return batch
