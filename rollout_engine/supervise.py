"""Runs one command and outlives its parent only to clean up: `python supervise.py PARENT_PID COMMAND...`.

When the parent is gone, however it died, or the command has ended, or SIGTERM arrives, every process that came from the
command is killed and waited for, whatever process group or session it has moved to. Standard library and psutil only,
because it runs as a file, outside the package. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

import psutil

_POLL_S = 0.2
_TRACKER_S = 3.0  # for removing files, before they are killed too
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main(parent_pid: int, command: list[str]) -> int:
    """The command's exit status, 128 + signal when a signal ended it, 143 when it was stopped."""
    # Orphans of the command become children of this process, so that no descendant is ever out of reach.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.getppid() != parent_pid:
        return 143
    # Should this process itself be killed, the command goes too.
    child = subprocess.Popen(command, preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL))
    while child.poll() is None and not stopped and os.getppid() == parent_pid:
        time.sleep(_POLL_S)
    status = child.poll()
    kill_descendants()
    if status is None:
        return 143
    return 128 - status if status < 0 else status


def kill_descendants() -> None:
    """Kill and reap until no descendant is left: a process may have started another one in between.

    Python's resource trackers come last: without anyone left to use it, they remove the shared memory and semaphores
    that would otherwise stay in /dev/shm, and end by themselves.
    """
    me = psutil.Process()
    while users := [process for process in me.children(recursive=True) if not _is_tracker(process)]:
        _kill(users)
    psutil.wait_procs(me.children(recursive=True), timeout=_TRACKER_S)
    while rest := me.children(recursive=True):
        _kill(rest)
    _reap()


def _is_tracker(process: psutil.Process) -> bool:
    try:
        return "multiprocessing.resource_tracker" in " ".join(process.cmdline())
    except psutil.Error:  # gone, or a zombie, which _kill reaps
        return False


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=1.0)
    _reap()


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
