"""A server in processes of its own, that leaves nothing behind: no orphan, no port, no accelerator memory."""

from __future__ import annotations

import atexit
import errno
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from time import monotonic, sleep

import psutil

from rollout_engine.types import EngineError

_LOWEST_PORT = 10000
_EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LEAST_END = 24576
_SUPERVISOR = Path(__file__).with_name("supervise.py")
_POLL_S = 0.25
_STOP_TIMEOUT_S = 20.0


class ServerProcess:
    """`command` under a supervisor that kills all of its processes when this process is gone, even by kill -9.

    Both output streams go to `log`. Runs in a session of its own, so that Ctrl-C in a terminal does not reach it.
    """

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str], cwd: Path) -> None:
        self._log = log
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, str(_SUPERVISOR), str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=dict(env),
                cwd=cwd,
                start_new_session=True,
            )
        atexit.register(self.close)

    @property
    def pid(self) -> int:
        """Of the supervisor: the parent of all the server's processes."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def log_tail(self, num_lines: int = 15) -> str:
        return log_tail(self._log, num_lines)

    def listens_at(self, port: int) -> bool:
        """Whether one of its processes listens at the TCP port, not another server that has it.

        Also True where the system does not tell who listens where, as some sandboxes do not.
        """
        if not _tells_who_listens():
            return True
        try:
            return any(_listens_at(process, port) for process in psutil.Process(self.pid).children(recursive=True))
        except psutil.NoSuchProcess:  # the supervisor is gone
            return False

    def wait_until(self, is_ready: Callable[[], bool], timeout_s: float) -> bool:
        """True once `is_ready`; False when `timeout_s` passed. Raises EngineError when the server ends before."""
        deadline_s = monotonic() + timeout_s
        while monotonic() < deadline_s:
            if self.exit_status is not None:
                raise EngineError(f"the server ended with status {self.exit_status} before it was ready")
            if is_ready():
                return True
            sleep(_POLL_S)
        return False

    def close(self) -> None:
        """Stop it and wait until every process is gone. Idempotent."""
        atexit.unregister(self.close)
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:  # processes that cannot die, as in a stuck driver call
                self._process.kill()
                self._process.wait()


@cache
def _tells_who_listens() -> bool:
    """Tried on this process: what it cannot see of itself it cannot see of its children."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return _listens_at(psutil.Process(), probe.getsockname()[1])


def _listens_at(process: psutil.Process, port: int) -> bool:
    try:
        connections = process.net_connections("tcp")
    except psutil.Error:  # it has ended meanwhile
        return False
    return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in connections)


def log_tail(log: Path, num_lines: int = 15) -> str:
    """The last lines of a log that may be large and still growing."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - 64 * 1024))
            lines = stream.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(lines[-num_lines:])


def free_port(host: str = "127.0.0.1", neighbour: int = 0) -> int:
    """A TCP port that nobody listens on now, as is the one `neighbour` above it.

    Below the ports that the system hands to connections of its own accord: a server binds seconds after this answer,
    and by then one of those may be some connection's. Raises EngineError when a hundred tries find none.
    """
    highest = _first_ephemeral_port() - 1 - neighbour
    for _ in range(100):
        port = random.SystemRandom().randint(_LOWEST_PORT, highest)  # no seed of a run decides, so two runs differ
        if not port_is_taken(port, host) and not port_is_taken(port + neighbour, host):
            return port
    raise EngineError(f"no free TCP port found between {_LOWEST_PORT} and {highest}")


def _first_ephemeral_port() -> int:
    """The lowest of them on Linux; where the system leaves hardly a port below, some of its own are taken too."""
    try:
        first = int(_EPHEMERAL_PORTS.read_text().split()[0])
    except FileNotFoundError:  # not Linux
        return _LEAST_END
    return max(first, _LEAST_END)


def port_is_taken(port: int, host: str = "127.0.0.1") -> bool:
    """Whether another process listens there, or it is otherwise not to be had."""
    return _bind_errno(port, host) != 0


def port_is_forbidden(port: int, host: str = "127.0.0.1") -> bool:
    """Whether this user may not listen there, whoever else does: on most systems below 1024, without root's rights."""
    return _bind_errno(port, host) == errno.EACCES


def _bind_errno(port: int, host: str) -> int:
    """EADDRINUSE or EACCES, or 0 when the port is to be had."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return error.errno
            raise
    return 0
