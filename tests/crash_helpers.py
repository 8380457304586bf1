"""Processes that die: by kill -9 at a chosen call that touches the disk, or whenever the test says.

They come from a fork server, so they start quickly and inherit no threads, process groups or devices.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
# torch._dynamo: every optimizer imports it at its first use, which takes longer than the tests.
_CONTEXT.set_forkserver_preload(["torch._dynamo", "tests.checkpoint_helpers", "tests.sync_helpers"])

KILLED = -signal.SIGKILL


def start(target: Callable[..., object], *args: object) -> BaseProcess:
    process = _CONTEXT.Process(target=target, args=args)
    process.start()
    return process


def exit_code(target: Callable[..., object], *args: object) -> int | None:
    """Run to the end: 0, 1 after an exception, KILLED."""
    process = start(target, *args)
    process.join()
    return process.exitcode


def die_at(call: int) -> list[int]:
    """From here on this process kills itself at its n-th call that touches the disk (never at a negative one).

    Returns the count of such calls so far, as a list of one number that grows.
    """
    calls = [0]
    victim = os.getpid()  # also when a child that it forked to write a checkpoint makes the call

    def dying(function: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object, **kwargs: object) -> object:
            if calls[0] == call:
                os.kill(victim, signal.SIGKILL)
                os._exit(1)
            calls[0] += 1
            return function(*args, **kwargs)

        return wrapper

    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    torch.save = dying(torch.save)
    return calls
