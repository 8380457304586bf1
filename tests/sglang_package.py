"""A package that is found as SGLang: its version and the fields of its server's arguments, and no server."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: str, init: str = "") -> Path:
    """Its folder, on the path of interpreters that are started from here. `fields`: of server_args.py."""
    package = tmp_path / "packages" / "sglang"
    (package / "srt").mkdir(parents=True)
    (package / "__init__.py").write_text(init)
    (package / "_version.py").write_text("__version__ = version = '0.5.20'\n")
    (package / "srt" / "server_args.py").write_text(fields)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    return package


def install_without_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: str) -> None:
    """One that must not be imported, on a machine without a GPU."""
    install(tmp_path, monkeypatch, fields, "raise SystemExit('imported')")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
