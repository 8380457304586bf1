"""Slow and obvious: a version is a folder of safetensors files, one per bucket, and a manifest.

    directory/version_000007/manifest.json    version, plan digest, and per tensor: file, checksum
                            /bucket_00000.safetensors ...

The folder is written aside and renamed, so a reader finds a version whole or not at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sync.atomic import remove_folder, whole_folder, write_file
from sync.plan import SyncError, SyncPlan
from sync.receiver import Bundle, WeightReceiver

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
        folder = version_folder(self.directory, bundle.version)
        if folder.exists():
            raise SyncError(
                f"sync of version {bundle.version}: {folder} exists already (remove what an earlier run left); "
                "the old version serves on"
            )
        try:
            write_version(folder, self.plan, bundle)
        except (OSError, SafetensorError) as error:  # safetensors wraps the operating system's errors
            raise SyncError(
                f"sync of version {bundle.version}: {folder} not written: {error}; the engine was not told, "
                "its old version serves on"
            ) from error
        try:
            serving = self.notify(folder)
        except SyncError:
            remove_folder(folder)
            raise
        for old in list_versions(self.directory)[: -self.keep_last]:
            remove_folder(old)
        return serving


def version_folder(directory: Path, version: int) -> Path:
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
    version, plan_digest, entries = _read_manifest(folder / MANIFEST)
    tensors = {name: _read_tensor(folder / file, name) for name, (file, _) in entries.items()}
    checksums = {name: sent for name, (_, sent) in entries.items()}
    return receiver.receive(Bundle(version, plan_digest, tensors, checksums))


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
