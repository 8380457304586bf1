"""A server's processes never outlive the one that started them, however that one ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rollout_engine import server_process
from rollout_engine.server_process import ServerProcess, free_port, log_tail, port_is_taken
from rollout_engine.types import EngineError

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 30.0

# A server like SGLang: workers of its own, one in another session, and one whose parent has already gone.
SERVER = """
import os, socket, subprocess, sys, time
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
pids = [os.getpid(), subprocess.Popen(SLEEP).pid, subprocess.Popen(SLEEP, start_new_session=True).pid]
orphan = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], stdout=-3, stderr=-3).pid)"
pids.append(int(subprocess.run([sys.executable, "-c", orphan, *SLEEP], capture_output=True, text=True).stdout))
listener = socket.create_server(("127.0.0.1", int(sys.argv[2])))
open(sys.argv[1] + ".aside", "w").write(" ".join(map(str, pids)))
os.rename(sys.argv[1] + ".aside", sys.argv[1])
print("ready", flush=True)
time.sleep(600)
"""

PARENT = """
import os, sys, time
from pathlib import Path
from rollout_engine.server_process import ServerProcess
folder = Path(sys.argv[1])
command = [sys.executable, str(folder / "server.py"), str(folder / "pids"), sys.argv[2]]
server = ServerProcess(command, folder / "log", os.environ, folder)
(folder / "supervisor").write_text(str(server.pid))
if sys.argv[3:] == ["returns"]:
    while not (folder / "pids").exists():
        time.sleep(0.05)
    sys.exit(0)
time.sleep(600)
"""


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"{what} took more than {LIMIT_S} s"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def read_pids(folder: Path) -> list[int]:
    wait_for((folder / "pids").exists, "the server's start")
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def server_command(folder: Path, port: int) -> list[str]:
    (folder / "server.py").write_text(SERVER)
    return [sys.executable, str(folder / "server.py"), str(folder / "pids"), str(port)]


def start_parent(folder: Path, port: int, *words: str) -> subprocess.Popen[bytes]:
    server_command(folder, port)
    (folder / "parent.py").write_text(PARENT)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, str(folder / "parent.py"), str(folder), str(port), *words], env=env)


def assert_nothing_left(pids: list[int], port: int) -> None:
    wait_for(lambda: not any(map(is_running, pids)), f"the end of {pids}")
    assert not port_is_taken(port)


def test_kill_9_of_the_parent_leaves_no_process_and_no_port(tmp_path: Path) -> None:
    port = free_port()
    parent = start_parent(tmp_path, port)
    try:
        pids = read_pids(tmp_path)
        supervisor = int((tmp_path / "supervisor").read_text())
        assert all(map(is_running, [supervisor, *pids])) and port_is_taken(port)
    finally:
        parent.kill()
        parent.wait()
    assert_nothing_left([supervisor, *pids], port)


def test_a_parent_that_forgets_to_close_leaves_nothing(tmp_path: Path) -> None:
    port = free_port()
    parent = start_parent(tmp_path, port, "returns")
    try:
        assert parent.wait(LIMIT_S) == 0
    finally:
        parent.kill()
    assert_nothing_left(read_pids(tmp_path), port)


def test_close_ends_every_process_and_may_be_repeated(tmp_path: Path) -> None:
    port = free_port()
    server = ServerProcess(server_command(tmp_path, port), tmp_path / "log", os.environ, tmp_path)
    pids = read_pids(tmp_path)
    assert server.wait_until(lambda: "ready" in server.log_tail(), LIMIT_S)
    server.close()
    assert not any(map(is_running, pids)), "close() returns when all are gone"
    assert not port_is_taken(port)
    server.close()


def test_a_server_listens_at_its_own_port_alone(tmp_path: Path) -> None:
    port = free_port()
    server = ServerProcess(server_command(tmp_path, port), tmp_path / "log", os.environ, tmp_path)
    try:
        assert server.wait_until(lambda: server.listens_at(port), LIMIT_S)
        with socket.create_server(("127.0.0.1", 0)) as another:
            assert not server.listens_at(another.getsockname()[1])
    finally:
        server.close()
    assert not server.listens_at(port)


def test_where_the_system_tells_nothing_a_server_is_taken_at_its_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ServerProcess(server_command(tmp_path, free_port()), tmp_path / "log", os.environ, tmp_path)
    try:
        assert not server.listens_at(1)
        monkeypatch.setattr(server_process, "_listens_at", lambda *_: False)
        server_process._tells_who_listens.cache_clear()
        assert server.listens_at(1)
    finally:
        server.close()
        server_process._tells_who_listens.cache_clear()


def test_a_killed_supervisor_takes_the_server_with_it(tmp_path: Path) -> None:
    server = ServerProcess(server_command(tmp_path, free_port()), tmp_path / "log", os.environ, tmp_path)
    pids = read_pids(tmp_path)
    try:
        os.kill(server.pid, signal.SIGKILL)
        wait_for(lambda: not is_running(pids[0]), "the server's end")
        assert server.exit_status == -signal.SIGKILL
    finally:
        for pid in pids[1:]:
            os.kill(pid, signal.SIGKILL)
        server.close()


def test_a_server_that_ends_takes_its_workers_along_and_says_its_status(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import subprocess, sys
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        print("worker", worker.pid, file=sys.stderr)
        sys.exit(3)
    """)
    server = ServerProcess([sys.executable, "-c", program], tmp_path / "log", os.environ, tmp_path)
    with pytest.raises(EngineError, match="status 3"):
        server.wait_until(lambda: False, LIMIT_S)
    assert not is_running(int(server.log_tail().split()[-1]))
    server.close()


def test_waiting_ends_when_the_time_is_over(tmp_path: Path) -> None:
    server = ServerProcess([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "log", {}, tmp_path)
    assert not server.wait_until(lambda: False, 0.01)
    server.close()


def test_log_tail_reads_the_end_only(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert log_tail(log) == ""
    log.write_text("".join(f"line {number}\n" for number in range(20_000)))
    assert log_tail(log, 2) == "line 19998\nline 19999"


def test_a_taken_port_is_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert port_is_taken(listener.getsockname()[1])


def test_a_server_that_is_stopped_leaves_no_shared_memory(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import multiprocessing as mp, time
        from multiprocessing.shared_memory import SharedMemory
        memory = SharedMemory(create=True, size=64)
        worker = mp.get_context("spawn").Process(target=time.sleep, args=(600,))
        worker.start()
        print("memory", memory.name, flush=True)
        time.sleep(600)
    """)
    server = ServerProcess([sys.executable, "-c", program], tmp_path / "log", os.environ, tmp_path)
    assert server.wait_until(lambda: "memory" in server.log_tail(), LIMIT_S)
    memory = Path("/dev/shm") / server.log_tail().split()[1]
    assert memory.exists()
    server.close()
    assert not memory.exists()
