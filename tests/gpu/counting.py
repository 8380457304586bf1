"""Policies that can tell one draft from another: they count, a draft that knows the step is right, any other is wrong.

A random policy accepts next to nothing of a random draft, so that nothing shows when a draft is lost or stale.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from draft_models.checkpoint import save_draft
from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config
from tests.rollout_engine_helpers import save_hf_model

VOCAB, EOS, WIDTH = 512, 511, 256
# Head size 64, which every attention backend has.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 512,
    "head_dim": 64,
    "tie_word_embeddings": False,
}
EMBED_SCALE = 5.0  # a token says most of what comes next, and the layers the rest: about every sixth jumps
DRAFT_LAYER_SCALE = 20.0  # enough for the draft's own layer to turn some of its proposals over


def save_counting(policy: Path, draft: Path, step: int, dtype: torch.dtype) -> None:
    """A policy that mostly goes on with its last token + `step`, and a draft that proposes just that.

    The draft reads the deepest captured state, of the token before the last one, and adds 2 * `step`: its first
    proposal is mostly right, those behind it, made from the same state, are wrong.
    """
    model = save_hf_model(policy, seed=step, max_position_embeddings=1024, eos_token_id=EOS, **SIZES)
    embed_VH = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(step))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(embed_VH * EMBED_SCALE)
        model.lm_head.weight.copy_(_head(embed_VH, step))
    model.to(dtype).save_pretrained(policy)
    config = json.loads((policy / "config.json").read_text())
    reader = Eagle3(Eagle3Config.from_target(config, DraftConfig()), seed=step)
    with torch.no_grad():
        reader.fc.weight.zero_()
        reader.fc.weight[:, -WIDTH:] = torch.eye(WIDTH)
        reader.midlayer.self_attn.o_proj.weight.mul_(DRAFT_LAYER_SCALE)
        reader.midlayer.mlp.down_proj.weight.mul_(DRAFT_LAYER_SCALE)
        reader.lm_head.weight.copy_(_head(embed_VH, 2 * step))
    save_draft(reader.to(dtype), draft)


def _head(embed_VH: torch.Tensor, ahead: int) -> torch.Tensor:
    """Reads the embedding of token t as t + `ahead`, and never as the end."""
    head_VH = embed_VH.roll(ahead, 0) / 2
    head_VH[EOS] = 0.0
    return head_VH
