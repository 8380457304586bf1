"""The environment of the servers, and a time limit on every test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sglang import helpers

TEST_TIMEOUT_S = 240  # a server's start included; a hang, never a slow machine


@pytest.fixture(scope="session", autouse=True)
def server_environment() -> Iterator[None]:
    """What a server inherits: the stand-ins, forbidden to run unless a test wants speculation, and one thread."""
    if not helpers.SGLANG_PYTHON.exists():
        pytest.fail(f"{helpers.SGLANG_PYTHON} is missing: run make setup-sglang", pytrace=False)
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(helpers.STAND_IN))
    patch.setenv("TORCHDYNAMO_DISABLE", "1")  # or SGLang compiles C++ for one small function of its drafting
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setenv("SLIPSTREAM_STAND_IN", "forbid")
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def time_limit(request: pytest.FixtureRequest) -> Iterator[None]:
    def expire(signum: int, frame: object) -> None:
        raise TimeoutError(f"{request.node.name} takes longer than {TEST_TIMEOUT_S} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(TEST_TIMEOUT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy with a real tokenizer."""
    return helpers.make_policy(tmp_path_factory.mktemp("policy") / "tiny")


@pytest.fixture
def stand_ins_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLIPSTREAM_STAND_IN", raising=False)


def pytest_report_header() -> str:
    return f"SGLang: {os.path.relpath(helpers.SGLANG_PYTHON)}"
