"""Made-up policies and rollouts of given sizes, for timing training alone: weights and tokens are random.

Matrix products and attention are counted as FLOPs of the model itself; a forward that is recomputed counts once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.common import positive, seconds
from rollout_engine.types import FinishReason, RolloutRequest, Sample, SamplingParams, VersionSpan


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen3 policy's sizes."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def hf_config(self, context: int) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": context,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "rope_theta": 10000.0,
        }

    @property
    def layer_weights(self) -> int:
        """Of one layer's matrices."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim * self.hidden
        return qkv + self.heads * self.head_dim * self.hidden + 3 * self.hidden * self.ffn

    @property
    def num_parameters(self) -> int:
        """Matrices, the tied embedding once."""
        return self.layers * self.layer_weights + self.vocab * self.hidden

    def training_flops(self, lengths: Sequence[int]) -> float:
        """Forward and backward over sequences of these lengths: 6 a weight and token, and causal attention."""
        attention = 6 * self.layers * self.heads * self.head_dim * sum(n * n for n in lengths)
        return 6.0 * self.num_parameters * sum(lengths) + attention


SHAPES = {
    "tiny": Shape(4, 64, 128, 4, 2, 16, 512),  # to try the command on a CPU
    "100m": Shape(28, 512, 1536, 8, 4, 64, 8192),
    "0.6b": Shape(28, 1024, 3072, 16, 8, 128, 151_936),
}


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="100m")
    parser.add_argument("--samples", type=positive, default=256)
    parser.add_argument("--prompt-tokens", type=positive, default=64)
    parser.add_argument("--response-tokens", type=int, nargs=2, default=(60, 1000), metavar=("LOW", "HIGH"))
    parser.add_argument("--repeats", type=positive, default=3, help="timed updates, after one that is not")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the same as --results")


def rollout(args: argparse.Namespace, vocab: int) -> list[Sample]:
    """Random samples; lengths are log-uniform between the bounds, hence long-tailed."""
    draw = Random(args.seed)
    low, high = args.response_tokens
    samples = []
    for number in range(args.samples):
        prompt = tuple(draw.choices(range(vocab), k=args.prompt_tokens))
        response = tuple(draw.choices(range(vocab), k=round(low * (high / low) ** draw.random())))
        samples.append(
            Sample(
                RolloutRequest(number, 0, prompt, SamplingParams(temperature=1.0, seed=number)),
                response,
                (-5.0,) * len(response),
                (VersionSpan(0, len(response), 0),),
                FinishReason.STOP,
                reward=0.0,
                advantage=draw.uniform(-1, 1),
            )
        )
    return samples


def sample_lengths(samples: Sequence[Sample]) -> list[int]:
    return [len(s.request.prompt_ids) + len(s.token_ids) for s in samples]


def write_checkpoint(folder: Path, shape: Shape, context: int, device: str) -> None:
    """A Hugging Face folder of random bfloat16 weights."""
    (folder / "config.json").write_text(json.dumps(shape.hf_config(context)))
    generator = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        weight = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.float32)
        return weight.mul_(columns**-0.5).to(torch.bfloat16).cpu()

    def norm(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    q_size, kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors = {
        "model.embed_tokens.weight": matrix(shape.vocab, shape.hidden),
        "model.norm.weight": norm(shape.hidden),
    }
    for layer in range(shape.layers):
        parts = {
            "self_attn.q_proj": matrix(q_size, shape.hidden),
            "self_attn.k_proj": matrix(kv_size, shape.hidden),
            "self_attn.v_proj": matrix(kv_size, shape.hidden),
            "self_attn.o_proj": matrix(shape.hidden, q_size),
            "self_attn.q_norm": norm(shape.head_dim),
            "self_attn.k_norm": norm(shape.head_dim),
            "input_layernorm": norm(shape.hidden),
            "post_attention_layernorm": norm(shape.hidden),
            "mlp.gate_proj": matrix(shape.ffn, shape.hidden),
            "mlp.up_proj": matrix(shape.ffn, shape.hidden),
            "mlp.down_proj": matrix(shape.hidden, shape.ffn),
        }
        tensors |= {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors")


@contextmanager
def phases_of(owner: Any, methods: Mapping[str, str]) -> Iterator[dict[str, float]]:
    """Milliseconds in each of the owner's methods (phase -> method name), all pending device work included.

    For one timed call apart from those that give the throughput: waiting between phases costs time.
    """
    spent = dict.fromkeys(methods, 0.0)
    originals = {name: getattr(owner, name) for name in methods.values()}

    def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = []
            spent[phase] += 1e3 * seconds(lambda: result.append(function(*args, **kwargs)))
            return result[0]

        return call

    for phase, name in methods.items():
        setattr(owner, name, timed(phase, originals[name]))
    try:
        yield spent
    finally:
        for name, original in originals.items():
            setattr(owner, name, original)


def peak_gib() -> float | None:
    """Of the device memory since the last reset; None on the CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
