"""Flat byte buffers that hold the tensors of a plan: few and large, as memory is exported, mapped and broadcast.

Both sides lay them out from their plan, so equal digests mean equal layouts and no offset ever travels. A sender makes
its buckets once and fills them anew for each version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sync.plan import SyncPlan

_ALIGN_BYTES = 512  # a device's allocation granule: copies and checksums of every tensor run at full width


def bucket_sizes_bytes(plan: SyncPlan) -> list[int]:
    """Size of each bucket, padding between the tensors included."""
    sizes = [0] * (max((spec.bucket for spec in plan.tensors), default=-1) + 1)
    for spec in plan.tensors:
        sizes[spec.bucket] = _aligned(sizes[spec.bucket]) + spec.num_bytes
    return [_aligned(size) for size in sizes]


def bucket_views(plan: SyncPlan, buckets: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The plan's tensors by full name, sharing memory with `buckets` (uint8, of `bucket_sizes_bytes`)."""
    ends = [0] * len(buckets)
    views: dict[str, torch.Tensor] = {}
    for spec in plan.tensors:
        start = _aligned(ends[spec.bucket])
        ends[spec.bucket] = start + spec.num_bytes
        flat = buckets[spec.bucket][start : ends[spec.bucket]]
        views[spec.full_name] = flat.view(spec.dtype).view(spec.shape)
    return views


@torch.no_grad()
def pack(views: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy `tensors` into the views of the same names; tensors of one dtype and device go in few launches."""
    groups: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name in views:
        groups.setdefault((tensors[name].dtype, tensors[name].device), []).append(name)
    for names in groups.values():
        torch._foreach_copy_([views[name] for name in names], [tensors[name].detach() for name in names])


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
