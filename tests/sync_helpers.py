"""Two small models whose names collide, and an engine that receives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from sync.disk import DiskTransport, receive_folder
from sync.inprocess import InProcessTransport
from sync.publish import Transport
from sync.receiver import WeightReceiver

Weights = dict[str, torch.Tensor]
MakeTransport = Callable[[WeightReceiver, Path], Transport]


def policy_weights(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(64, 16, generator=generator),
        "model.layers.0.mlp.weight": torch.randn(300, 300, generator=generator),  # above the checksum's small size
        "model.norm.weight": torch.randn(16, generator=generator).bfloat16(),
        "lm_head.weight": torch.randn(64, 16, generator=generator),
    }


def draft_weights(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(1000 + seed)
    return {
        "fc.weight": torch.randn(16, 48, generator=generator),
        "lm_head.weight": torch.randn(64, 16, generator=generator),
        "d2t": torch.randint(0, 9, (64,), generator=generator),
        "t2d": torch.rand(64, generator=generator) > 0.5,
    }


def named(policy: Mapping[str, torch.Tensor], draft: Mapping[str, torch.Tensor]) -> Weights:
    weights = {f"policy.{name}": tensor for name, tensor in policy.items()}
    return weights | {f"draft.{name}": tensor for name, tensor in draft.items()}


def weights_at(seed: int) -> Weights:
    return named(policy_weights(seed), draft_weights(seed))


def same_bits(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(bits(a[name]) == bits(b[name]) for name in a)


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def engine_at(version: int, bucket_bytes: int = 100_000) -> WeightReceiver:
    """An engine that serves the weights of seed `version`."""
    return WeightReceiver({k: v.clone() for k, v in weights_at(version).items()}, version, bucket_bytes)


def in_process(receiver: WeightReceiver, directory: Path) -> Transport:
    return InProcessTransport(receiver)


def on_disk(receiver: WeightReceiver, directory: Path) -> Transport:
    return DiskTransport(directory, receiver.plan, partial(receive_folder, receiver))


TRANSPORTS: dict[str, MakeTransport] = {"inprocess": in_process, "disk": on_disk}
