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


def sequence(sample: Sample) -> torch.Tensor:
    return torch.tensor([[*sample.request.prompt_ids, *sample.token_ids]])


def response_log_probs(model: Any, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs of the response tokens, entropies), by Transformers and plain log_softmax."""
    first = len(sample.request.prompt_ids) - 1
    logits = model(sequence(sample)).logits[0, first:-1]
    log_p = (logits / (sample.request.sampling.temperature or 1.0)).log_softmax(-1)
    picked = log_p.gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0]
    return picked, -(log_p.exp() * log_p).sum(-1)


def plain_gradients(model: Any, samples: list[Sample], token_loss: Callable[..., torch.Tensor]) -> tuple[float, dict]:
    """Loss and gradients of mean-over-all-tokens `token_loss(sample, logp, entropy)` by autograd on Transformers."""
    model.zero_grad()
    total = sum(token_loss(sample, *response_log_probs(model, sample)).sum() for sample in samples)
    loss = total / sum(len(sample.token_ids) for sample in samples)
    loss.backward()
    return loss.item(), {name: param.grad.clone() for name, param in model.named_parameters()}


def assert_same_gradients(actual: dict, expected: dict, tolerance: float = 1e-5) -> None:
    """||dg|| / ||g|| of every tensor, by name."""
    assert actual.keys() == expected.keys()
    errors = {name: float((actual[name].cpu() - g.cpu()).norm() / g.norm()) for name, g in expected.items()}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= tolerance, (worst, errors[worst])
