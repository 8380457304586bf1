"""Slow and obvious: a version is a folder of safetensors files, one per bucket, and a manifest.

    directory/version_000007/manifest.json    version, plan digest, and per tensor: file, checksum
                            /bucket_00000.safetensors ...

The folder is written aside and renamed, so a reader finds a version whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sync.atomic import clear_leftovers, remove_folder, whole_folder, write_file
from sync.plan import SyncError, SyncPlan
from sync.receiver import Bundle, WeightReceiver
from sync.wire import Deliver

MANIFEST = "manifest.json"
_VERSION_FOLDER = re.compile(r"version_\d{6,}")
_SEND_ANYWAY = "unplanned"  # what the plan does not know still travels: the receiver must see it to refuse it


@dataclass(frozen=True, slots=True)
class DiskTransport:
    """Writes each version under `directory`, keeps the newest `keep_last`, and tells the engine by `notify`.

    `notify(folder)` makes the engine read that folder and returns the version it then serves, or raises
    SyncError. In one process it is `partial(receive_folder, receiver)`.
    """

    directory: Path
    plan: SyncPlan
    notify: Callable[[Path], int]
    keep_last: int = 2

    def send(self, bundle: Bundle) -> int:
        """Raises SyncError when the disk or the engine refuses. A refused version is not left lying on the disk."""
        carrier = DiskCarrier(self.directory, self.plan, self.keep_last)
        try:
            source = carrier.put(bundle)
        except SyncError as error:
            raise SyncError(f"{error}; the engine was not told, its old version serves on") from error
        try:
            serving = self.notify(Path(source["folder"]))
        except SyncError:
            carrier.settle(accepted=False)
            raise
        carrier.settle(accepted=True)
        return serving


def own_folder(exchange_dir: Path) -> Path:
    """A new folder for this process's versions in one that others may use; those of processes of this machine that are
    gone are removed, as far as this user may: after kill -9 nobody else does it, and nobody reads them."""
    for folder in exchange_dir.glob(f"weights-{_MACHINE}-*-*"):
        if not psutil.pid_exists(int(folder.name.split("-")[-2])):
            shutil.rmtree(folder, ignore_errors=True)
    return exchange_dir / f"weights-{_MACHINE}-{os.getpid()}-{uuid.uuid4().hex}"


def _machine() -> str:
    """Where a process number means this process: machines may share a name, and each container counts anew."""
    boot, numbers = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    booted = boot.read_text().strip().replace("-", "") if boot.exists() else socket.gethostname().replace("-", "_")
    return f"{booted}-{numbers.stat().st_ino if numbers.exists() else 0}"


_MACHINE = _machine()


class DiskCarrier:
    """Writes each version under `directory` for an engine that is told the folder; keeps the newest `keep_last`."""

    def __init__(self, directory: Path, plan: SyncPlan, keep_last: int = 2) -> None:
        self._directory = directory
        self._plan = plan
        self._keep_last = keep_last
        self._folder: Path | None = None

    def put(self, bundle: Bundle) -> Mapping[str, Any]:
        """Write one version; where it is. Raises SyncError with nothing written."""
        folder = version_folder(self._directory, bundle.version)
        if folder.exists():
            raise SyncError(
                f"sync of version {bundle.version}: {folder} exists already (remove what an earlier run left)"
            )
        try:
            clear_leftovers(self._directory)
            write_version(folder, self._plan, bundle)
        except (OSError, SafetensorError) as error:  # safetensors wraps the operating system's errors
            raise SyncError(f"sync of version {bundle.version}: {folder} not written: {error}") from error
        self._folder = folder
        return {"kind": "disk", "folder": str(folder)}

    def send(self, deliver: Deliver, payload: bytes) -> None:
        deliver(payload)

    def settle(self, accepted: bool) -> None:
        """Remove the version when it was refused, and what it made old when it was not."""
        if not accepted and self._folder is not None:
            remove_folder(self._folder)
        elif accepted:
            for old in list_versions(self._directory)[: -self._keep_last]:
                remove_folder(old)
        self._folder = None

    def close(self) -> None:
        """Remove the versions: the engine has taken over what it wanted of them."""
        shutil.rmtree(self._directory, ignore_errors=True)


def version_folder(directory: Path, version: int) -> Path:
    """Where a version lies, or would."""
    return directory / f"version_{version:06d}"


def list_versions(directory: Path) -> list[Path]:
    """Complete versions under `directory`, oldest first."""
    return sorted((path for path in directory.iterdir() if _VERSION_FOLDER.fullmatch(path.name)), key=_version_of)


def _version_of(folder: Path) -> int:
    return int(folder.name.removeprefix("version_"))


def write_version(folder: Path, plan: SyncPlan, bundle: Bundle) -> None:
    """Write `bundle` as `folder`, whole or not at all. Raises OSError or SafetensorError."""
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in bundle.tensors.items():
        spec = plan.by_name.get(name)
        file = f"bucket_{spec.bucket:05d}.safetensors" if spec else f"{_SEND_ANYWAY}.safetensors"
        files.setdefault(file, {})[name] = tensor
    manifest = {
        "version": bundle.version,
        "plan_digest": bundle.plan_digest,
        "tensors": {
            name: {"file": file, "checksum": bundle.checksums[name]} for file, names in files.items() for name in names
        },
    }
    with whole_folder(folder) as aside:
        for file, tensors in files.items():
            # safetensors refuses tied tensors, which share memory; each is written out for itself.
            save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, aside / file)
        write_file(aside / MANIFEST, json.dumps(manifest, indent=1))


def receive_folder(receiver: WeightReceiver, folder: Path) -> int:
    """Read one version and hand it to `receiver`. Raises SyncError naming file or tensor; then nothing changed."""
    return receiver.receive(read_version(folder))


def read_version(folder: Path) -> Bundle:
    """One version from the disk, on the CPU, as the sender named it. Raises SyncError naming file or tensor."""
    version, plan_digest, entries = _read_manifest(folder / MANIFEST)
    tensors = {name: _read_tensor(folder / file, name) for name, (file, _) in entries.items()}
    checksums = {name: sent for name, (_, sent) in entries.items()}
    return Bundle(version, plan_digest, tensors, checksums)


def _read_manifest(path: Path) -> tuple[int, str, dict[str, tuple[str, int]]]:
    """(version, plan digest, {full name: (file, checksum)})"""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        entries = {name: (entry["file"], entry["checksum"]) for name, entry in manifest["tensors"].items()}
        return manifest["version"], manifest["plan_digest"], entries
    except (OSError, ValueError, LookupError) as error:
        raise SyncError(f"{path} is not a readable manifest ({error!r}); the engine was not touched") from error


def _read_tensor(path: Path, name: str) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise SyncError(f"{path}: {name} cannot be read ({error}); the engine was not touched") from error
    return tensor
