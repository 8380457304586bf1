"""Tiny Hugging Face models, saved to a folder by Transformers from a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TINY: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def make_hf_model(architecture: str, *, seed: int = 0, scale: float = 3.0, **overrides: Any) -> Any:
    """A Transformers model in float32; `scale` spreads its logits, so that sampling is neither flat nor certain."""
    import transformers

    settings = {**TINY, **overrides}
    if architecture == "Qwen2":
        settings.pop("head_dim")
    config = getattr(transformers, f"{architecture}Config")(**settings)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.12, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            if name == "model.norm.weight":
                parameter.mul_(scale)
    return model


def save_hf_model(directory: Path, architecture: str = "Qwen3", shard: str = "5GB", **overrides: Any) -> Any:
    """Save a model of `make_hf_model` to `directory` and return it."""
    model = make_hf_model(architecture, **overrides)
    model.save_pretrained(directory, max_shard_size=shard)
    return model
