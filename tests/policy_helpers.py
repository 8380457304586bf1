"""Tiny checkpoints, rollouts and rank processes for the policy's tests."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from rollout_engine.types import FinishReason, RolloutRequest, Sample, SamplingParams, VersionSpan

VOCAB = 128


def hf_model(model_type: str = "qwen3", *, tied: bool = False, num_layers: int = 4) -> Any:
    """A random Transformers model whose norms, biases and logits are far from trivial."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "dtype": "float32",
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape)).float()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" in name or "bias" in name:
                param.add_(0.2 * torch.randn_like(param))
            else:
                param.mul_(4.0)
    return model


def save_checkpoint(directory: Path, model_type: str = "qwen3", *, tied: bool = False) -> Path:
    hf_model(model_type, tied=tied).save_pretrained(directory)
    return directory


def rollout(num_prompts: int = 3, group: int = 4, seed: int = 0, *, temperature: float = 0.8) -> list[Sample]:
    """Samples of unequal lengths with made-up log-probs and advantages."""
    draw = random.Random(seed)
    samples = []
    for prompt_id in range(num_prompts):
        prompt = tuple(draw.randrange(VOCAB) for _ in range(draw.randrange(3, 9)))
        for sample_id in range(group):
            response = tuple(draw.randrange(VOCAB) for _ in range(draw.randrange(2, 14)))
            params = SamplingParams(temperature=temperature, seed=100 * prompt_id + sample_id)
            samples.append(
                Sample(
                    RolloutRequest(prompt_id, sample_id, prompt, params),
                    response,
                    tuple(draw.uniform(-6.0, -3.0) for _ in response),
                    (VersionSpan(0, len(response), 7),),
                    FinishReason.STOP,
                    reward=draw.random(),
                    advantage=draw.uniform(-2, 2),
                )
            )
    return samples


def _rank_main(rank: int, function: Callable[..., None], world: int, port: int, args: tuple) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    function(*args)
    dist.destroy_process_group()


def run_ranks(world: int, function: Callable[..., None], *args: Any) -> None:
    """Runs `function(*args)` on `world` gloo ranks; an exception on any of them fails the test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank_main, (function, world, port, args), nprocs=world)
