"""The trainer's side of a sync: one transaction for policy and draft."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from sync.checksum import checksums
from sync.plan import SyncError, SyncPlan
from sync.receiver import Bundle


class Transport(Protocol):
    """Carries a bundle to one engine and brings its verdict back."""

    @property
    def plan(self) -> SyncPlan:
        """What the engine at the other end expects."""

    def send(self, bundle: Bundle) -> int:
        """Deliver; return the version that the engine serves now. Raises SyncError when it was refused or broke."""


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One sync that the engine has confirmed; `time_s` is all of `publish`."""

    version: int
    num_tensors: int
    num_bytes: int
    time_s: float


def publish(
    policy: Mapping[str, torch.Tensor],
    draft: Mapping[str, torch.Tensor] | None,
    transport: Transport,
    version: int,
) -> SyncReport:
    """Send policy and draft (Hugging Face names, no prefix) as `version`, or raise SyncError with nothing mixed.

    Floating tensors are cast to the dtypes of the engine's plan. `draft` is None for an engine without a
    trained draft (`transport.plan.has_draft` is False). Returns once the engine has confirmed the version.
    """
    start_s = time.perf_counter()
    bundle = make_bundle(transport.plan, policy, draft, version)
    serving = transport.send(bundle)
    if serving != version:
        raise SyncError(f"sync of version {version}: the engine answers that it serves version {serving}")
    return SyncReport(version, len(bundle.tensors), transport.plan.num_bytes, time.perf_counter() - start_s)


@torch.no_grad()
def make_bundle(
    plan: SyncPlan,
    policy: Mapping[str, torch.Tensor],
    draft: Mapping[str, torch.Tensor] | None,
    version: int,
) -> Bundle:
    """Name, cast and checksum. Judging is the receiver's: what does not fit the plan goes through unchanged."""
    sources = {f"policy.{name}": tensor for name, tensor in policy.items()}
    sources |= {f"draft.{name}": tensor for name, tensor in (draft or {}).items()}
    tensors = {name: _cast(plan, name, tensor.detach()) for name, tensor in sources.items()}
    return Bundle(version, plan.digest, tensors, checksums(tensors))


def _cast(plan: SyncPlan, full_name: str, tensor: torch.Tensor) -> torch.Tensor:
    spec = plan.by_name.get(full_name)
    if spec is None or not (spec.dtype.is_floating_point and tensor.is_floating_point()):
        return tensor
    return tensor.to(spec.dtype)
