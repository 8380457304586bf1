"""The engine's side: check everything, then copy everything, then read back; policy and draft share one version.

State machine: clean(v) --refused--> clean(v);  clean(v) --receive--> clean(v');
               clean(v) --failure while copying--> dirty;  dirty --complete receive--> clean(v').
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from sync.checksum import checksum
from sync.plan import DEFAULT_BUCKET_BYTES, SyncError, SyncPlan, TensorSpec, make_plan

_FAULTS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Bundle:
    """One version of policy and draft as it arrives: tensors and the sender's checksums by full name."""

    version: int
    plan_digest: str
    tensors: Mapping[str, torch.Tensor]
    checksums: Mapping[str, int]


class WeightReceiver:
    """Writes bundles into the tensors that the engine computes with, in place, so that views and ties stay.

    `destinations` maps "policy.NAME" / "draft.NAME" to those tensors. The engine calls `require_clean()`
    before it decodes and never receives while it decodes.
    """

    def __init__(
        self,
        destinations: Mapping[str, torch.Tensor],
        version: int = 0,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    ) -> None:
        self.destinations = dict(destinations)
        self.plan: SyncPlan = make_plan(self.destinations, bucket_bytes)
        self._version = version
        self._dirty = False

    @property
    def version(self) -> int:
        """The last version that arrived whole."""
        return self._version

    @property
    def dirty(self) -> bool:
        """A copy broke off half-way: the tensors are a mixture and nothing may be served."""
        return self._dirty

    def require_clean(self) -> None:
        """Raise SyncError when the tensors are a mixture of versions."""
        if self._dirty:
            raise SyncError(f"weights are a mixture of versions: {self._serving()}")

    def receive(self, bundle: Bundle) -> int:
        """Take over `bundle` whole and return its version.

        Raises SyncError naming the tensors. Refused before the first copy: nothing has changed. Failed after
        it: `dirty` is set, and stays so until a later bundle arrives whole.
        """
        faults = list(find_faults(self.plan, bundle, self._version))
        if faults:
            raise SyncError(f"sync of version {bundle.version} refused: {_join(faults)}; {self._serving()}")
        self._dirty = True  # before the first byte, so that no kind of interruption leaves a mixture looking clean
        for spec in self.plan.tensors:
            self._copy(spec, bundle)
        for spec in self.plan.tensors:
            self._verify_written(spec, bundle)
        self._version, self._dirty = bundle.version, False
        return self._version

    def _copy(self, spec: TensorSpec, bundle: Bundle) -> None:
        try:
            with torch.inference_mode():  # destinations may be parameters, or themselves inference tensors
                self.destinations[spec.full_name].copy_(bundle.tensors[spec.full_name])
        except RuntimeError as error:
            raise SyncError(
                f"sync of version {bundle.version} broke off while writing {spec.full_name}: {error}; {self._serving()}"
            ) from error

    def _verify_written(self, spec: TensorSpec, bundle: Bundle) -> None:
        if checksum(self.destinations[spec.full_name]) != bundle.checksums[spec.full_name]:
            raise SyncError(
                f"sync of version {bundle.version}: {spec.full_name} reads back other bytes than were sent; "
                f"{self._serving()}"
            )

    def _serving(self) -> str:
        if self._dirty:
            return f"the engine is dirty and serves nothing until a complete sync (last whole version {self._version})"
        return f"version {self._version} serves on"


def find_faults(plan: SyncPlan, bundle: Bundle, serving_version: int) -> Iterator[str]:
    """Why `bundle` may not be applied, one line per fault, in the order of the plan. Changes nothing."""
    if bundle.version <= serving_version:
        yield f"version {bundle.version} is not newer than version {serving_version}"
        return
    names_agree = True
    for extra in sorted(bundle.tensors.keys() - plan.by_name.keys()):
        names_agree = False
        yield f"{extra} is not a tensor of this engine"
    for spec in plan.tensors:
        tensor = bundle.tensors.get(spec.full_name)
        if tensor is None:
            names_agree = False
            yield f"{spec.full_name} is missing"
        else:
            yield from _tensor_faults(spec, tensor, bundle.checksums.get(spec.full_name))
    if names_agree and bundle.plan_digest != plan.digest:
        yield f"the sender's plan {bundle.plan_digest[:12]} is not this engine's plan {plan.digest[:12]}"


def _tensor_faults(spec: TensorSpec, tensor: torch.Tensor, sent_checksum: int | None) -> Iterator[str]:
    if tuple(tensor.shape) != spec.shape:
        yield f"{spec.full_name} has shape {list(tensor.shape)}, expected {list(spec.shape)}"
    elif tensor.dtype != spec.dtype:
        yield f"{spec.full_name} is {tensor.dtype}, expected {spec.dtype}"
    elif sent_checksum is None:
        yield f"{spec.full_name} came without a checksum"
    elif checksum(tensor) != sent_checksum:
        yield f"{spec.full_name} was changed on the way (checksum differs)"


def _join(faults: list[str]) -> str:
    shown = "; ".join(faults[:_FAULTS_SHOWN])
    return shown if len(faults) <= _FAULTS_SHOWN else f"{shown}; and {len(faults) - _FAULTS_SHOWN} more"
