"""torch.distributed: one way to start it, with and without torchrun, and agreement on errors."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

# The other ranks wait in a broadcast for rank 0's rollout, evaluation and server start. The defaults (gloo 30 minutes,
# NCCL 10) would end a run whose rollout is merely long. A rank that died is seen earlier, by torchrun.
TIMEOUT = timedelta(hours=12)


def init_distributed() -> torch.device:
    """Starts the default process group and returns this rank's device. Starting it twice is harmless.

    Under torchrun (RANK in the environment) it joins the others; otherwise the process is a world of one, which
    needs no environment. Gloo on the CPU; with CUDA also NCCL, on device LOCAL_RANK.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def first_message(message: str | None) -> str | None:
    """The message of the lowest rank that has one, on every rank. Collective.

    Lets all ranks raise the same error together: a rank that raised alone would leave the others waiting for it.
    """
    if world_size() == 1:
        return message
    messages: list[str | None] = [None] * world_size()
    dist.all_gather_object(messages, message)
    return next((m for m in messages if m is not None), None)
