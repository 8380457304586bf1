"""Servers that cannot start, die, or lose their parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from draft_models.checkpoint import save_draft
from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config
from rollout_engine.hf_checkpoint import read_config
from rollout_engine.types import EngineConfigError, EngineError
from sync.publish import publish
from tests.sglang import helpers
from tests.sglang.helpers import greedy, greedy_batch

pytestmark = pytest.mark.sglang
GONE_TIMEOUT_S = 60.0
SCHEDULER = "sglang::scheduler"

_PARENT = """
import sys, time
from pathlib import Path
import psutil
from tests.sglang import helpers
engine = helpers.start(Path(sys.argv[1]), Path(sys.argv[2]))
print(engine.address, *(p.pid for p in psutil.Process().children(recursive=True)), flush=True)
time.sleep(600)
"""


def our_servers() -> list[psutil.Process]:
    """All processes that descend from this one, but for Python's own helpers of multiprocessing."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "multiprocessing" not in " ".join(child.cmdline())]


def wait_until_gone(pids: list[int]) -> list[int]:
    """Those that are still there after a while."""
    deadline_s = time.monotonic() + GONE_TIMEOUT_S
    while (left := [pid for pid in pids if psutil.pid_exists(pid)]) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return left


def test_a_server_that_dies_in_the_middle_is_an_error_with_its_last_words(model: Path, tmp_path: Path) -> None:
    engine = helpers.start(model, tmp_path)
    try:
        publish(helpers.weights_of(model), None, engine.transport, 0)
        iterator = engine.generate([greedy((5, 6, 7), 99, max_new_tokens=1), *greedy_batch(8, 300, max_new_tokens=110)])
        next(iterator)
        (scheduler,) = [process for process in our_servers() if process.name().startswith(SCHEDULER[:15])]
        scheduler.send_signal(signal.SIGKILL)
        with pytest.raises(EngineError, match=r"by Subprocess scheduler_0 .* crashed.*engine\.log") as raised:
            list(iterator)
        assert len(str(raised.value).splitlines()) > 5
        with pytest.raises(EngineError):
            list(engine.generate([greedy((5, 6, 7))]))
    finally:
        engine.close()
    assert our_servers() == []
    assert not helpers.listens(engine.address)


def test_a_killed_parent_leaves_no_process_and_no_port(model: Path, tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(model), str(tmp_path)],
        cwd=helpers.ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(helpers.STAND_IN), str(helpers.ROOT)])},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    address, *pids = parent.stdout.readline().split()
    assert len(pids) >= 3 and helpers.listens(address)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert wait_until_gone([int(pid) for pid in pids]) == []
    assert not helpers.listens(address)


def test_a_server_that_does_not_become_healthy_shows_its_log(model: Path, tmp_path: Path) -> None:
    """Its import alone takes longer than three seconds: it is stopped in the middle of it."""
    with pytest.raises(EngineError, match="not healthy after 3 s") as raised:
        helpers.start(model, tmp_path, sglang_start_timeout_s=3.0, sglang={"log_level": "debug"})
    assert str(tmp_path / "engine.log") in str(raised.value)
    assert our_servers() == []


def test_a_value_that_only_the_server_can_judge(model: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineConfigError, match="--schedule-policy") as raised:
        helpers.start(model, tmp_path, sglang={"schedule_policy": "whoever-shouts"})
    assert "invalid choice" in str(raised.value)
    assert our_servers() == []


def test_an_unknown_flag_names_the_nearest_one(model: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineConfigError, match=r"schedule_polcy.*schedule_policy"):
        helpers.start(model, tmp_path, sglang={"schedule_polcy": "lpm"})
    assert our_servers() == []


def test_a_port_that_is_taken(model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EngineConfigError, match=f"{port} is taken"):
            helpers.start(model, tmp_path, sglang={"port": port})


def test_a_draft_that_does_not_fit(model: Path, tmp_path: Path) -> None:
    sizes = read_config(model) | {"hidden_size": 64, "vocab_size": 128}
    save_draft(Eagle3(Eagle3Config.from_target(sizes, DraftConfig())), tmp_path / "draft")
    settings = {"speculative_algorithm": "EAGLE3", "temperature": 0.0}
    with pytest.raises(EngineConfigError, match=r"does not fit.*128.*320"):
        helpers.start(model, tmp_path / "work", draft=tmp_path / "draft", **settings)


def test_an_environment_without_sglang(model: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineConfigError, match=r"not installed.*sglang_python"):
        helpers.start(model, tmp_path, sglang_python=sys.executable)
