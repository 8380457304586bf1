"""Several GPUs or machines: the buckets are broadcast from the trainer (rank 0) to the engine's loader (rank 1).

NCCL for CUDA tensors, gloo for the rest, in a process group of its own: neither side's default group is touched. The
group outlives a version; after a failed one the next builds another. The engine stages a whole version before it
copies, so it needs memory for one more set of weights. NCCL refuses two ranks on one GPU: there, use `sync.ipc`.
"""

from __future__ import annotations

import logging
import socket
import threading
import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from sync.buckets import bucket_sizes_bytes, bucket_views, pack
from sync.ipc import common_device
from sync.plan import SyncError, SyncPlan
from sync.receiver import Bundle
from sync.wire import Deliver

TRAINER, ENGINE = 0, 1
_LOG = logging.getLogger(__name__)
_GRACE_S = 5.0  # the engine has answered: what is left of the trainer's part takes no longer than this
Source = Mapping[str, Any]


class BroadcastCarrier:
    """The trainer's side. `host`: the address under which the engine reaches this machine."""

    def __init__(self, plan: SyncPlan, host: str = "", timeout_s: float = 60.0) -> None:
        self._plan = plan
        self._host = host or _own_address()
        self._timeout_s = timeout_s
        self._store: distributed.TCPStore | None = None
        self._buckets: list[torch.Tensor] = []
        self._group: Any = None
        self._group_id = ""
        self._part: threading.Thread | None = None

    @property
    def buckets(self) -> Sequence[torch.Tensor]:
        """What is broadcast (uint8); empty before the first version."""
        return self._buckets

    def put(self, bundle: Bundle) -> Source:
        """Fill the buckets; how the engine joins. Waits for what is left of a failed broadcast, which reads them."""
        if self._part is not None:
            self._part.join()
            self._part = None
        device = common_device(bundle.tensors)
        if not self._buckets or self._buckets[0].device != device:
            sizes = bucket_sizes_bytes(self._plan)
            self._buckets = [torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes]
            self._group_id = ""
        pack(bucket_views(self._plan, self._buckets), bundle.tensors)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the broadcast runs in another thread, on another stream
        if self._store is None:
            self._store = distributed.TCPStore(
                "0.0.0.0", 0, None, True, timeout=timedelta(seconds=self._timeout_s), wait_for_workers=False
            )
        if not self._group_id:
            self._group, self._group_id = None, uuid.uuid4().hex
        return {
            "kind": "broadcast",
            "host": self._host,
            "port": self._store.port,
            "group": self._group_id,
            "backend": "nccl" if device.type == "cuda" else "gloo",
            "sizes_bytes": [len(bucket) for bucket in self._buckets],
            "timeout_s": self._timeout_s,
        }

    def send(self, deliver: Deliver, payload: bytes) -> None:
        """Broadcast while the engine handles the message; its verdict says whether the bytes arrived."""
        arguments = (self._store, self._buckets)
        self._part = threading.Thread(target=self._broadcast, args=arguments, name="slipstream-broadcast", daemon=True)
        self._part.start()
        deliver(payload)
        self._part.join(_GRACE_S)

    def settle(self, accepted: bool) -> None:
        if not accepted:
            self._group_id = ""  # ranks may stand at different buckets: never use this group again
            if self._group is not None and self._buckets[0].is_cuda:
                self._group.abort()  # NCCL does not give up by itself

    def close(self) -> None:
        if self._part is not None:
            self._part.join(_GRACE_S)  # one that still waits for an engine that is gone ends by its timeout
        self._group, self._store, self._buckets = None, None, []

    def _broadcast(self, store: distributed.Store, buckets: Sequence[torch.Tensor]) -> None:
        try:
            if self._group is None:
                backend = "nccl" if buckets[0].is_cuda else "gloo"
                self._group = _join(store, self._group_id, TRAINER, backend, self._timeout_s)
            _broadcast_all(self._group, buckets)
        except RuntimeError as error:  # the engine's verdict tells what it lacks; this says why
            _LOG.warning("broadcast to the engine broke off: %s", error)


class Receiving:
    """The engine's side: its rank in the trainer's group, and the memory in which it stages a version."""

    def __init__(self) -> None:
        self._group: Any = None
        self._group_id = ""
        self._buckets: list[torch.Tensor] = []

    def __call__(self, source: Source, device: torch.device) -> Sequence[torch.Tensor]:
        """Receive every bucket that is announced, whatever it holds: leaving early would leave the sender waiting."""
        if source["backend"] == "gloo":
            device = torch.device("cpu")
        try:
            if source["group"] != self._group_id:
                self._group, self._group_id = None, ""
                timeout = timedelta(seconds=source["timeout_s"])
                store = distributed.TCPStore(
                    source["host"], source["port"], None, False, timeout=timeout, wait_for_workers=False
                )
                self._group = _join(store, source["group"], ENGINE, source["backend"], source["timeout_s"])
                self._group_id = source["group"]
            if [len(bucket) for bucket in self._buckets] != source["sizes_bytes"]:
                self._buckets = [torch.empty(n, dtype=torch.uint8, device=device) for n in source["sizes_bytes"]]
            _broadcast_all(self._group, self._buckets)
        except RuntimeError as error:
            self._group_id = ""
            raise SyncError(f"the broadcast from {source['host']}:{source['port']} broke off ({error})") from error
        return self._buckets


def _join(store: distributed.Store, group_id: str, rank: int, backend: str, timeout_s: float) -> Any:
    own = distributed.PrefixStore(group_id, store)
    timeout = timedelta(seconds=timeout_s)
    if backend == "gloo":
        return distributed.ProcessGroupGloo(own, rank, 2, timeout)
    options = distributed.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return distributed.ProcessGroupNCCL(own, rank, 2, options)


def _broadcast_all(group: Any, buckets: Sequence[torch.Tensor]) -> None:
    options = distributed.BroadcastOptions()
    options.rootRank = TRAINER
    for bucket in buckets:
        group.broadcast([bucket], options).wait()
    if buckets and buckets[0].is_cuda:
        torch.cuda.synchronize(buckets[0].device)


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"
