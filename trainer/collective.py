"""What one rank knows, given to all: the engine lives on the first rank, the draft on the last pipeline stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from trainer.distributed import rank, world_size
from trainer.interrupt import interruptible

T = TypeVar("T")


class RemoteError(RuntimeError):
    """Another rank failed; the message is that rank's own line."""


def from_rank_zero(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and give every rank its result. Collective.

    A ValueError, RuntimeError or OSError of rank 0 (bad input, a failed reward, an engine error, a full disk) and its
    Ctrl-C are raised there, and as RemoteError elsewhere, so that no rank waits for one that has gone.
    """
    return _from(0, action)


def from_last_rank(action: Callable[[], T]) -> T:
    """`from_rank_zero` for the last rank, which is one of the draft's. Collective."""
    return _from(world_size() - 1, action)


def tensors_to_rank_zero(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The last rank's `tensors`, on rank 0 and on its `device`; nothing elsewhere. Collective.

    A pickled tensor would come up on the device that it came from, which is the last rank's.
    """
    last = world_size() - 1
    if last == 0:
        return dict(tensors)
    described = from_last_rank(lambda: [(name, t.shape, t.dtype) for name, t in tensors.items()])
    if rank() == last:
        for tensor in tensors.values():
            dist.send(tensor.contiguous(), dst=0)
    found: dict[str, torch.Tensor] = {}
    if rank() == 0:
        for name, shape, dtype in described:
            found[name] = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(found[name], src=last)
    return found


def _from(source: int, action: Callable[[], T]) -> T:
    if world_size() == 1:
        with interruptible():
            return action()
    if rank() != source:
        return _receive(source)
    try:
        result = _act(source, action)
    except (ValueError, RuntimeError, OSError, KeyboardInterrupt) as error:
        dist.broadcast_object_list([None, f"{type(error).__name__}: {error}"], src=source)
        raise
    dist.broadcast_object_list([result, None], src=source)
    return result


def _act(source: int, action: Callable[[], T]) -> T:
    if source != 0:  # one rank decides about Ctrl-C, which a terminal sends to all
        return action()
    with interruptible():
        return action()


def _receive(source: int) -> T:
    box: list = [None, None]
    dist.broadcast_object_list(box, src=source)
    result, message = box
    if message is not None:
        raise RemoteError(message)
    return result
