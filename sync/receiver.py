"""The engine's side: check everything, then copy everything, then read back; policy and draft share one version.

State machine: clean(v) --refused--> clean(v);  clean(v) --receive--> clean(v');
               clean(v) --failure while copying--> dirty;  dirty --complete receive--> clean(v').
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from sync.buckets import pack
from sync.checksum import checksums
from sync.plan import DEFAULT_BUCKET_BYTES, SyncError, SyncPlan, make_plan

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

    `destinations` maps "policy.NAME" / "draft.NAME" to those tensors. `fixed` are tensors of the plan that the engine
    cannot change while it runs: they must arrive equal and are not written. `dirty` is an engine whose weights are of
    no known version. The engine calls `require_clean()` before it decodes and never receives while it decodes.
    """

    def __init__(
        self,
        destinations: Mapping[str, torch.Tensor],
        version: int = 0,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        *,
        fixed: Mapping[str, torch.Tensor] | None = None,
        dirty: bool = False,
    ) -> None:
        self.destinations = dict(sorted(destinations.items()))  # in the order of the plan
        self.plan: SyncPlan = make_plan(self.destinations | dict(fixed or {}), bucket_bytes)
        self._fixed_checksums = checksums(fixed or {})
        self._version = version
        self._dirty = dirty
        self._read_back: dict[str, int] = {}

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
            raise SyncError(f"weights are a mixture of versions: {self.serving()}")

    def receive(self, bundle: Bundle) -> int:
        """Take over `bundle` whole and return its version.

        Raises SyncError naming the tensors. Refused before the first copy: nothing has changed. Failed after
        it: `dirty` is set, and stays so until a later bundle arrives whole.
        """
        faults = [*find_faults(self.plan, bundle, self._version), *self._fixed_faults(bundle)]
        if faults:
            raise SyncError(f"sync of version {bundle.version} refused: {join_faults(faults)}; {self.serving()}")
        self._dirty = True  # before the first byte, so that no kind of interruption leaves a mixture looking clean
        with torch.inference_mode():  # destinations may be parameters, or themselves inference tensors
            self._copy_all(bundle)
        self._verify_written(bundle)
        self._version, self._dirty = bundle.version, False
        return self._version

    @property
    def read_back(self) -> Mapping[str, int]:
        """Checksums by full name of what the engine held after the last copy, `fixed` tensors included."""
        return self._read_back

    def serving(self) -> str:
        """The end of an error: what the engine serves now."""
        return describe_serving(self._version, self._dirty)

    def _fixed_faults(self, bundle: Bundle) -> Iterator[str]:
        for name, expected in self._fixed_checksums.items():
            if name in bundle.tensors and bundle.checksums.get(name) != expected:
                yield f"{name} is not the engine's, which cannot change while it runs (restart it with the new one)"

    def _copy_all(self, bundle: Bundle) -> None:
        """In few launches; only when that fails one by one, to name the tensor."""
        try:
            pack(self.destinations, bundle.tensors)
        except RuntimeError:
            for name, destination in self.destinations.items():
                self._copy(name, destination, bundle)

    def _copy(self, name: str, destination: torch.Tensor, bundle: Bundle) -> None:
        try:
            destination.copy_(bundle.tensors[name])
        except RuntimeError as error:
            raise SyncError(
                f"sync of version {bundle.version} broke off while writing {name}: {error}; {self.serving()}"
            ) from error

    def _verify_written(self, bundle: Bundle) -> None:
        self._read_back = checksums(self.destinations) | self._fixed_checksums
        for name, found in self._read_back.items():
            if found != bundle.checksums[name]:
                raise SyncError(
                    f"sync of version {bundle.version}: {name} reads back other bytes than were sent; {self.serving()}"
                )


def describe_serving(version: int, dirty: bool) -> str:
    """What an engine serves, as the end of an error."""
    if dirty:
        return f"the engine is dirty and serves nothing until a complete sync (last whole version {version})"
    return f"version {version} serves on"


def find_faults(plan: SyncPlan, bundle: Bundle, serving_version: int) -> Iterator[str]:
    """Why `bundle` may not be applied, one line per fault, layout first. Changes nothing."""
    if bundle.version <= serving_version:
        yield f"version {bundle.version} is not newer than version {serving_version}"
        return
    yield from layout_faults(plan, bundle.tensors)
    for name, found in checksums(dict(_fitting(plan, bundle.tensors))).items():
        if name not in bundle.checksums:
            yield f"{name} came without a checksum"
        elif found != bundle.checksums[name]:
            yield f"{name} was changed on the way (checksum differs)"
    if bundle.tensors.keys() == plan.by_name.keys() and bundle.plan_digest != plan.digest:
        yield f"the sender's plan {bundle.plan_digest[:12]} is not this engine's plan {plan.digest[:12]}"


def layout_faults(plan: SyncPlan, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """In which names, shapes and dtypes `tensors` are not those of the plan, one line per fault."""
    for extra in sorted(tensors.keys() - plan.by_name.keys()):
        yield f"{extra} is not a tensor of this engine"
    for name, spec in plan.by_name.items():
        tensor = tensors.get(name)
        if tensor is None:
            yield f"{name} is missing"
        elif tensor.shape != spec.shape:
            yield f"{name} has shape {list(tensor.shape)}, expected {list(spec.shape)}"
        elif tensor.dtype != spec.dtype:
            yield f"{name} is {tensor.dtype}, expected {spec.dtype}"


def _fitting(plan: SyncPlan, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, spec in plan.by_name.items():
        tensor = tensors.get(name)
        if tensor is not None and tensor.shape == spec.shape and tensor.dtype == spec.dtype:
            yield name, tensor


def join_faults(faults: Sequence[str]) -> str:
    """The first few faults in one line, and how many more there are."""
    shown = "; ".join(faults[:_FAULTS_SHOWN])
    return shown if len(faults) <= _FAULTS_SHOWN else f"{shown}; and {len(faults) - _FAULTS_SHOWN} more"
