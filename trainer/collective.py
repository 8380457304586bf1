"""What one rank knows, given to all: the engine lives on the first rank, the draft on the last pipeline stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from trainer.distributed import rank, world_size

T = TypeVar("T")


class RemoteError(RuntimeError):
    """Another rank failed; the message is that rank's own line."""


def from_rank_zero(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and give every rank its result. Collective.

    A ValueError, RuntimeError or OSError of rank 0 (bad input, a failed reward, an engine error, a full disk) is raised
    there, and as RemoteError elsewhere, so that no rank waits for one that has gone.
    """
    if world_size() == 1:
        return action()
    if rank() != 0:
        return _receive()
    try:
        result = action()
    except (ValueError, RuntimeError, OSError) as error:
        dist.broadcast_object_list([None, f"{type(error).__name__}: {error}"], src=0)
        raise
    dist.broadcast_object_list([result, None], src=0)
    return result


def from_last_rank(value: T) -> T:
    """The value that the last rank passed in, on every rank. Collective."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=world_size() - 1)
    return box[0]


def _receive() -> T:
    box: list = [None, None]
    dist.broadcast_object_list(box, src=0)
    result, message = box
    if message is not None:
        raise RemoteError(message)
    return result
