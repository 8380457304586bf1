"""One trainer at a time writes a run's folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
from io import TextIOWrapper
from pathlib import Path

from trainer.config import ConfigError


class RunLock:
    """The lock on `runs/NAME/lock`, held until `release` or the end of the process, kill -9 included."""

    def __init__(self, path: Path, flag: str = "--name"):
        """Take it. Raises ConfigError naming the process that has it and the `flag` that chooses another folder,
        OSError when it cannot be made or locked."""
        self._path = path
        self._file = _open_locked(path, flag)
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()
        _held.add(self)

    def release(self) -> None:
        """Remove the file and let others in. Twice is harmless."""
        if self._file.closed:
            return
        if _is_at(self._file, self._path):
            self._path.unlink()
        self.close()

    def close(self) -> None:
        """Let go of the file in this process alone: one forked from the holder would keep the lock beyond its death."""
        _held.discard(self)
        self._file.close()


def _close_in_child() -> None:
    for lock in tuple(_held):
        lock.close()


_held: set[RunLock] = set()
os.register_at_fork(after_in_child=_close_in_child)


def refuse_in_use(path: Path) -> None:
    """ConfigError naming the process that holds the lock; nothing is made or changed."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        _lock(file, path, fcntl.LOCK_SH)


def _open_locked(path: Path, flag: str) -> TextIOWrapper:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            _lock(file, path, fcntl.LOCK_EX, flag)
            if _is_at(file, path):  # else the one before removed it between the two calls, and another may hold the new
                return file
        except BaseException:  # Ctrl-C too: an open file would keep the lock
            file.close()
            raise
        file.close()


def _lock(file: TextIOWrapper, path: Path, kind: int, flag: str = "--name") -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = path.read_text(encoding="utf-8").strip() if path.exists() else ""
        holder = f"process {pid}" if pid else "another process"
        raise ConfigError(
            f"run {path.parent.name} is in use by {holder} ({path}); wait for it or stop it, or choose another {flag}"
        ) from None


def _is_at(file: TextIOWrapper, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
