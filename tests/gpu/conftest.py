"""What the GPU tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch reads it once, at its first deterministic product


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
