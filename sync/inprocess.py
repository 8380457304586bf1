"""Sender and engine in one process: the tensors are handed over by reference, checked in place, copied once."""

from __future__ import annotations

from dataclasses import dataclass

from sync.plan import SyncError, SyncPlan
from sync.receiver import Bundle, WeightReceiver


@dataclass(frozen=True, slots=True)
class InProcessTransport:
    receiver: WeightReceiver

    @property
    def plan(self) -> SyncPlan:
        return self.receiver.plan

    def send(self, bundle: Bundle) -> int:
        """Raises SyncError; also when a sent tensor is the engine's own memory, which training would change unseen."""
        for name, tensor in bundle.tensors.items():
            own = self.receiver.destinations.get(name)
            if own is not None and tensor.numel() and tensor.data_ptr() == own.data_ptr():
                raise SyncError(f"{name} is the engine's own tensor: give the engine and the learner separate copies")
        return self.receiver.receive(bundle)
