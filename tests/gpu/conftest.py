"""What the GPU tests share."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch reads it once, at its first deterministic product


def pytest_collection_finish(session: pytest.Session) -> None:
    """Under `make test-gpu` nothing is skipped in silence for want of what it is there to test."""
    if os.environ.get("SLIPSTREAM_GPU") != "require":
        return
    missing = [] if torch.cuda.is_available() else ["a GPU that torch can use"]
    missing += [name for name in ("sglang", "torch_memory_saver", "triton") if not importlib.util.find_spec(name)]
    if missing:
        where = f"in the environment of {sys.executable}: pip install '.[sglang,dev]'"
        pytest.exit(f"the GPU tests need {', '.join(missing)} {where}", returncode=1)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Failures at once: these tests are slow, and a run that is cut off never comes to its summary."""
    if report.failed:
        print(f"\n{report.nodeid} ({report.when})\n{report.longreprtext}", file=sys.stderr, flush=True)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Torch's deterministic mode for one test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
