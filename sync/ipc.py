"""One machine: the tensors lie in buckets that trainer and engine both map, and only their names travel.

On a GPU the buckets are exported once as CUDA IPC handles, with the device's UUID (the two processes may number their
devices differently); otherwise they are one file in shared memory. The engine keeps what it has mapped, so later
versions travel without any export or mapping. The engine reads in place: no copy is made between the processes.
"""

from __future__ import annotations

import base64
import os
import tempfile
import uuid
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sync.buckets import bucket_sizes_bytes, bucket_views, pack
from sync.plan import SyncError, SyncPlan
from sync.receiver import Bundle
from sync.wire import Deliver

SHARED_MEMORY = Path("/dev/shm")
Source = Mapping[str, Any]


class IpcCarrier:
    """The trainer's side. Holds one set of buckets as large as the plan, on the device of what is sent."""

    def __init__(self, plan: SyncPlan, directory: Path = SHARED_MEMORY) -> None:
        self._plan = plan
        self._directory = directory
        self._shared: _SharedBuckets | None = None

    @property
    def buckets(self) -> Sequence[torch.Tensor]:
        """What the engine reads (uint8); empty before the first version."""
        return self._shared.buckets if self._shared else ()

    def put(self, bundle: Bundle) -> Source:
        """Fill the buckets; where the engine finds them. Raises SyncError when there is no room for them."""
        device = common_device(bundle.tensors)
        if self._shared is None or self._shared.device != device:
            self.close()
            on_gpu = device.type == "cuda"
            self._shared = (
                _share_on_gpu(self._plan, device) if on_gpu else _share_in_memory(self._plan, self._directory)
            )
            if self._shared.file is not None:  # a trainer that ends over a refused first version must not leave it
                weakref.finalize(self, self._shared.file.unlink, missing_ok=True)
        pack(self._shared.views, bundle.tensors)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # another process is about to read: stream order ends here
        return self._shared.source

    def send(self, deliver: Deliver, payload: bytes) -> None:
        deliver(payload)

    def settle(self, accepted: bool) -> None:
        """Once the engine has mapped the file its name is not needed: a killed trainer then leaves nothing behind."""
        if accepted and self._shared is not None and self._shared.file is not None:
            self._shared.file.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the buckets back. Exported GPU memory is free once the engine has dropped it too, as an attach does."""
        shared, self._shared = self._shared, None
        if shared is None:
            return
        if shared.file is not None:
            shared.file.unlink(missing_ok=True)
        if shared.device.type == "cuda":
            del shared
            torch.cuda.ipc_collect()


@dataclass(frozen=True, slots=True)
class _SharedBuckets:
    device: torch.device
    buckets: Sequence[torch.Tensor]
    views: Mapping[str, torch.Tensor]
    source: Source
    file: Path | None = None


def common_device(tensors: Mapping[str, torch.Tensor]) -> torch.device:
    """The GPU that the tensors are on, or the CPU when none is. Raises SyncError for two GPUs."""
    devices = {tensor.device for tensor in tensors.values() if tensor.device.type != "cpu"}
    if len(devices) > 1:
        names = ", ".join(sorted(str(device) for device in devices))
        raise SyncError(f"policy and draft lie on several devices ({names}): bring them onto one before the sync")
    return devices.pop() if devices else torch.device("cpu")


def _share_on_gpu(plan: SyncPlan, device: torch.device) -> _SharedBuckets:
    sizes = bucket_sizes_bytes(plan)
    try:
        buckets = [torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes]
    except torch.OutOfMemoryError as error:
        raise SyncError(
            f"{device}: no room for the {sum(sizes)} bytes of a sync: lower rollout.sglang.mem_fraction_static or the "
            "tokens per GPU, or set sync_transport = disk"
        ) from error
    source = {
        "kind": "cuda",
        "key": uuid.uuid4().hex,
        "device_uuid": str(torch.cuda.get_device_properties(device).uuid),
        "buckets": [_export(bucket) for bucket in buckets],
    }
    return _SharedBuckets(device, buckets, bucket_views(plan, buckets), source)


def _share_in_memory(plan: SyncPlan, directory: Path) -> _SharedBuckets:
    sizes = bucket_sizes_bytes(plan)
    file = _make_file(directory, sum(sizes))
    buckets = torch.from_file(str(file), shared=True, size=sum(sizes), dtype=torch.uint8).split(sizes)
    source = {"kind": "file", "key": str(file), "sizes_bytes": sizes}
    return _SharedBuckets(torch.device("cpu"), buckets, bucket_views(plan, buckets), source, file)


def _make_file(directory: Path, num_bytes: int) -> Path:
    """A file whose space is reserved: memory that is mapped but not there kills whoever writes to it."""
    try:
        descriptor, name = tempfile.mkstemp(prefix="slipstream-", dir=directory)
    except OSError as error:
        raise SyncError(f"{directory}: no file can be made for the sync ({error.strerror})") from error
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        os.unlink(name)
        raise SyncError(
            f"{directory}: no room for the {num_bytes} bytes of a sync ({error.strerror}): "
            "enlarge it (containers: --shm-size) or set sync_transport = disk"
        ) from error
    finally:
        os.close(descriptor)
    return Path(name)


def _export(bucket: torch.Tensor) -> dict[str, Any]:
    (_, handle, size_bytes, offset_bytes, counter_handle, counter_offset, event_handle, event_sync) = (
        bucket.untyped_storage()._share_cuda_()
    )
    return {
        "handle": base64.b64encode(handle).decode(),
        "size_bytes": size_bytes,
        "offset_bytes": offset_bytes,
        "counter_handle": base64.b64encode(counter_handle).decode(),
        "counter_offset": counter_offset,
        "event_handle": base64.b64encode(event_handle).decode(),
        "event_sync": event_sync,
    }


class Mappings:
    """The engine's side: buckets of other processes, mapped once and kept until the next attach."""

    def __init__(self) -> None:
        self._key = ""
        self._buckets: list[torch.Tensor] = []

    def __call__(self, source: Source) -> Sequence[torch.Tensor]:
        """The buckets that a message names. Raises SyncError when they are not to be found on this machine."""
        if source["key"] != self._key:
            buckets = _import_cuda(source) if source["kind"] == "cuda" else _map_file(source)
            self._key, self._buckets = source["key"], buckets
        return self._buckets


def _import_cuda(source: Source) -> list[torch.Tensor]:
    device = _device_of(source["device_uuid"])
    buckets = []
    for bucket in source["buckets"]:
        storage = torch.UntypedStorage._new_shared_cuda(
            device.index,
            base64.b64decode(bucket["handle"]),
            bucket["size_bytes"],
            bucket["offset_bytes"],
            base64.b64decode(bucket["counter_handle"]),
            bucket["counter_offset"],
            base64.b64decode(bucket["event_handle"]),
            bucket["event_sync"],
        )
        buckets.append(torch.empty(0, dtype=torch.uint8, device=device).set_(storage))
    return buckets


def _device_of(device_uuid: str) -> torch.device:
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == device_uuid:
            return torch.device("cuda", index)
    raise SyncError(
        f"the trainer's GPU {device_uuid} is not visible to the engine: set sync_transport = broadcast or disk"
    )


def _map_file(source: Source) -> list[torch.Tensor]:
    path, sizes = Path(source["key"]), source["sizes_bytes"]
    if not path.is_file() or path.stat().st_size != sum(sizes):
        raise SyncError(
            f"{path} is not the sender's shared memory: is the engine on another machine or in a container?"
        )
    return list(torch.from_file(str(path), shared=True, size=sum(sizes), dtype=torch.uint8).split(sizes))
