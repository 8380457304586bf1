"""Ctrl-C in a run: taken where it is safe, by rank 0 alone, and never lost.

A KeyboardInterrupt can arrive inside a callback whose exceptions Python drops (one of a fork, say), or in the middle of
a collective that the other ranks are in. So it is raised only while rank 0 acts alone, which is when it waits for
samples, scores, syncs and evaluates; one that comes at another time waits for the next such moment. A second one is
raised at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_LATER = b"\nslipstream: stopping after this phase; Ctrl-C again stops at once\n"


class _Interrupts:
    """The state of SIGINT in this process."""

    def __init__(self) -> None:
        self.asked = False
        self.may_raise = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        is_second, self.asked = self.asked, True
        if is_second or self.may_raise:
            raise KeyboardInterrupt("stopped by Ctrl-C")
        if os.environ.get("RANK", "0") == "0":
            os.write(2, _LATER)  # print may be what was interrupted


_interrupts = _Interrupts()


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Inside, Ctrl-C waits for `interruptible`. Leaves SIGINT alone where the caller has its own way with it."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _interrupts.handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _interrupts.asked = False


@contextmanager
def interruptible() -> Iterator[None]:
    """KeyboardInterrupt at once for a Ctrl-C that came before, or whose exception was dropped, and for one inside."""
    was, _interrupts.may_raise = _interrupts.may_raise, True
    try:
        if _interrupts.asked:
            raise KeyboardInterrupt("stopped by Ctrl-C")
        yield
    finally:
        _interrupts.may_raise = was
