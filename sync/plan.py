"""What is sent, in which order and in which buckets: made once, the same on both sides. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

MODELS = ("policy", "draft")
DEFAULT_BUCKET_BYTES = 256 << 20


class SyncError(RuntimeError):
    """A sync that did not happen. One line: which version, which tensor, and what the engine serves now."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor on the wire, as the receiver wants it."""

    model: str  # "policy" or "draft": both have an lm_head.weight, so a bare name says nothing
    name: str  # within its model, Hugging Face spelling
    shape: tuple[int, ...]
    dtype: torch.dtype
    bucket: int

    @property
    def full_name(self) -> str:
        return f"{self.model}.{self.name}"

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class SyncPlan:
    """Every tensor of policy and draft, ordered by full name. An engine without a draft has none in its plan."""

    tensors: tuple[TensorSpec, ...]

    @cached_property
    def by_name(self) -> Mapping[str, TensorSpec]:
        return {spec.full_name: spec for spec in self.tensors}

    @property
    def has_draft(self) -> bool:
        return any(spec.model == "draft" for spec in self.tensors)

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.tensors)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, shapes, dtypes and buckets: equal digests, equal plans."""
        lines = (f"{s.full_name} {list(s.shape)} {s.dtype} {s.bucket}\n" for s in self.tensors)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def make_plan(tensors: Mapping[str, torch.Tensor], bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> SyncPlan:
    """Plan for `tensors`, keyed "policy.NAME" or "draft.NAME"; only their shapes and dtypes are read.

    Buckets are filled in name order and closed before they exceed `bucket_bytes`; a larger tensor gets its own.
    Raises ValueError for a name without the model in front.
    """
    specs: list[TensorSpec] = []
    bucket, filled_bytes = 0, 0
    for full_name in sorted(tensors):
        model, _, name = full_name.partition(".")
        if model not in MODELS or not name:
            raise ValueError(f"{full_name}: a synced tensor is named policy.NAME or draft.NAME")
        tensor = tensors[full_name]
        num_bytes = tensor.numel() * tensor.dtype.itemsize
        if filled_bytes and filled_bytes + num_bytes > bucket_bytes:
            bucket, filled_bytes = bucket + 1, 0
        filled_bytes += num_bytes
        specs.append(TensorSpec(model, name, tuple(tensor.shape), tensor.dtype, bucket))
    return SyncPlan(tuple(specs))
