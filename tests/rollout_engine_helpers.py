"""Tiny Hugging Face models, saved to a folder by Transformers from a seed, and engines over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config
from rollout_engine.config import RolloutConfig
from rollout_engine.decoder import Decoder
from rollout_engine.hf_checkpoint import decoder_config
from rollout_engine.torch_engine import TorchEngine
from rollout_engine.types import RolloutRequest, Sample, SamplingParams, SpecStats

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


def load_pair(
    directory: Path, dtype: torch.dtype = torch.float64, *, seed: int = 5, **overrides: Any
) -> tuple[Decoder, Eagle3]:
    """A tiny decoder and a random draft whose logits are spread enough to be accepted now and then."""
    save_hf_model(directory, **overrides)
    config = json.loads((directory / "config.json").read_text())
    decoder = Decoder.from_hf(directory, dtype)
    draft = Eagle3(Eagle3Config.from_target(config, DraftConfig()), seed=seed).to(dtype)
    with torch.no_grad():
        draft.lm_head.weight.mul_(10.0)
    return decoder, draft


def make_requests(
    num_prompts: int = 4, num_siblings: int = 4, temperature: float = 1.0, **sampling: Any
) -> list[RolloutRequest]:
    """Prompts of 3, 4, 5 .. tokens; siblings of different lengths and seeds."""
    settings: dict[str, Any] = {"temperature": temperature, "stop_token_ids": (5,)} | sampling
    return [
        RolloutRequest(
            prompt_id=prompt,
            sample_id=sibling,
            prompt_ids=tuple((7 * prompt + 3 * i) % 11 for i in range(3 + prompt)),
            sampling=SamplingParams(
                **({"max_new_tokens": 12 + 4 * sibling, "seed": 1_000_003 * prompt + 7919 * sibling} | settings)
            ),
        )
        for prompt in range(num_prompts)
        for sibling in range(num_siblings)
    ]


def make_engine(decoder: Decoder, draft: Eagle3 | None = None, **settings: Any) -> TorchEngine:
    """Fixed depth 3 with a draft, plain decoding without."""
    eos = settings.pop("eos_token_ids", ())
    detokenize = settings.pop("detokenize", None)
    algorithm = "EAGLE3" if draft is not None else "NONE"
    config = RolloutConfig(**({"controller": "fixed", "speculative_algorithm": algorithm} | settings))
    return TorchEngine(decoder, config, draft=draft, eos_token_ids=eos, detokenize=detokenize)


def run_engine(engine: TorchEngine, requests: list[RolloutRequest]) -> dict[tuple[int, int], Sample]:
    samples = {sample.request.key: sample for sample in engine.generate(requests)}
    assert samples.keys() == {request.key for request in requests}
    return samples


def tokens_of(samples: dict[tuple[int, int], Sample]) -> dict[tuple[int, int], tuple[int, ...]]:
    return {key: sample.token_ids for key, sample in samples.items()}


def total_spec(samples: dict[tuple[int, int], Sample]) -> SpecStats:
    return sum((sample.spec for sample in samples.values()), SpecStats())


def random_pair(dtype: torch.dtype, device: str) -> tuple[Decoder, Eagle3]:
    """A decoder and a draft from a seed, the same on every device, without any file."""
    settings = TINY | {"architectures": ["Qwen3ForCausalLM"]}
    decoder = Decoder(decoder_config(settings), dtype, device)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in decoder.named_tensors().items():
        values = torch.randn(tensor.shape, generator=generator) * 0.12 + (tensor.dim() == 1)
        tensor.copy_(values * (3.0 if name == "model.norm.weight" else 1.0))
    draft = Eagle3(Eagle3Config.from_target(settings, DraftConfig()), seed=5)
    with torch.no_grad():
        draft.lm_head.weight.mul_(10.0)
    return decoder, draft.to(device=device, dtype=dtype)
