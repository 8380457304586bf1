"""Checkpoints that are whole or absent, whatever kills the run.

    checkpoints/step_000012/manifest.json    step, world size, counters, every file with its size
                           /policy/          what the policy's writer puts there (collective over ranks)
                           /draft/ ...       one folder per part

The folder is filled aside and renamed. Every function that takes parts is collective: each rank calls it with
the same parts in the same order, and an error of one rank is raised by all.
"""

from __future__ import annotations

import json
import pickle
import random
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sync.atomic import ASIDE, begin_folder, clear_leftovers, finish_folder, remove_folder, write_file
from trainer.distributed import first_message, rank, world_size

MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"step_\d{6,}")

# A failed write or read; torch reports its own as RuntimeError, a state that does not fit as one of the others.
_FAILURES = (OSError, RuntimeError, ValueError, LookupError, EOFError, pickle.UnpicklingError)

_OLDER = "remove the folder to resume from the one before"

State = dict[str, Any]


class CheckpointError(RuntimeError):
    """A checkpoint that was not written or cannot be read: one line saying which, why and what is still valid."""


@dataclass(frozen=True, slots=True)
class Part:
    """One owner of state. Both callables get the part's own folder and are called on every rank."""

    name: str
    save: Callable[[Path], None]
    load: Callable[[Path], None]


def shared_part(
    name: str,
    get_state: Callable[[], State],
    set_state: Callable[[State], None],
    *,
    writes: bool,
    reads: bool = True,
) -> Part:
    """State that is the same wherever it lives. `writes` is True on exactly one rank, `reads` on all that hold it."""

    def save(folder: Path) -> None:
        if writes:
            _save_state(get_state(), folder / "state.pt")

    def load(folder: Path) -> None:
        if reads:
            set_state(_load_state(folder / "state.pt"))

    return Part(name, save, load)


def per_rank_part(name: str, get_state: Callable[[], State], set_state: Callable[[State], None]) -> Part:
    """State that every rank has for itself, such as its generators."""
    file = f"rank_{rank():05d}.pt"
    return Part(
        name,
        save=lambda folder: _save_state(get_state(), folder / file),
        load=lambda folder: set_state(_load_state(folder / file)),
    )


def rng_part() -> Part:
    """The generators of torch (CPU and every CUDA device), numpy and random."""
    return per_rank_part("rng", _rng_state, _set_rng_state)


def save_checkpoint(
    directory: Path, step: int, parts: Sequence[Part], counters: dict[str, Any], keep_last: int = 2
) -> Path:
    """Write `directory/step_NNNNNN`, then remove all but the newest `keep_last`. Collective.

    `counters` is JSON: data position, versions, totals. Raises CheckpointError, for instance when the disk is
    full; the earlier checkpoints are then as they were.
    """
    final = directory / f"step_{step:06d}"
    aside = final.with_name(ASIDE + final.name)
    failed = f"checkpoint {final} not written"
    valid = latest_checkpoint(directory)
    mend = f"{valid} stays valid" if valid else "there is no earlier one"
    mend += "; free space or mend the folder, then continue with --resume"

    def begin() -> None:
        if rank() == 0:
            clear_leftovers(directory)
            begin_folder(final)
            for part in parts:
                (aside / part.name).mkdir()

    def finish() -> None:
        if rank() == 0:
            _write_manifest(aside, step, parts, counters)
            finish_folder(aside, final)
            for old in list_checkpoints(directory)[:-keep_last]:
                remove_folder(old)

    try:
        _on_all_ranks(begin, failed, mend)
        for part in parts:
            _on_all_ranks(partial(part.save, aside / part.name), f"{failed} ({part.name})", mend)
        _on_all_ranks(finish, failed, mend)
    except CheckpointError:
        if rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)  # a full disk needs its room back
        raise
    return final


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(filter(_is_complete, directory.iterdir()), key=lambda path: int(path.name.removeprefix("step_")))


def _is_complete(folder: Path) -> bool:
    return _STEP_FOLDER.fullmatch(folder.name) is not None and (folder / MANIFEST).exists()


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    checkpoints = list_checkpoints(directory)
    return checkpoints[-1] if checkpoints else None


def load_checkpoint(folder: Path, parts: Sequence[Part]) -> tuple[int, dict[str, Any]]:
    """Give every part its state back; returns (step, counters). Collective.

    Raises CheckpointError before any part is touched when files are missing or cut short, when a part is not
    in the checkpoint, or when another number of ranks wrote it.
    """
    unreadable = f"checkpoint {folder} cannot be loaded"
    manifest: dict[str, Any] = {}
    _on_all_ranks(lambda: manifest.update(_read_manifest(folder, parts)), unreadable, _OLDER)
    for part in parts:
        _on_all_ranks(partial(part.load, folder / part.name), f"{unreadable} ({part.name})", _OLDER)
    return manifest["step"], manifest["counters"]


def read_part(folder: Path, name: str) -> State:
    """The state of one `shared_part`, from a folder that `latest_checkpoint` gave; tensors are read when used."""
    state: State = torch.load(folder / name / "state.pt", map_location="cpu", weights_only=True, mmap=True)
    return state


def read_counters(folder: Path) -> dict[str, Any]:
    """The counters of a checkpoint, before anything of it is loaded. Raises CheckpointError."""
    try:
        counters: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["counters"]
    except (OSError, ValueError, LookupError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be loaded: {error}; {_OLDER}") from error
    return counters


def _on_all_ranks(action: Callable[[], None], failed: str, mend: str) -> None:
    """Run `action`; when it fails on any rank, all raise the same line. Ends in a barrier either way."""
    cause: Exception | None = None
    try:
        action()
    except _FAILURES as error:
        cause = error
    message = first_message(" ".join(str(cause).split()) if cause else None)
    if message is not None:
        raise CheckpointError(f"{failed}: {message}; {mend}") from cause


def _write_manifest(aside: Path, step: int, parts: Sequence[Part], counters: dict[str, Any]) -> None:
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    manifest = {
        "step": step,
        "world_size": world_size(),
        "parts": [part.name for part in parts],
        "counters": counters,
        "files": {str(path.relative_to(aside)): path.stat().st_size for path in files},
    }
    write_file(aside / MANIFEST, json.dumps(manifest, indent=1))


def _read_manifest(folder: Path, parts: Sequence[Part]) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for name, num_bytes in manifest["files"].items():
        path = folder / name
        found = path.stat().st_size if path.exists() else "no file"
        if found != num_bytes:
            raise CheckpointError(f"{name} should have {num_bytes} bytes, found {found}")
    if manifest["world_size"] != world_size():
        raise CheckpointError(f"{manifest['world_size']} ranks wrote it, {world_size()} are running")
    for part in parts:
        if part.name not in manifest["parts"]:
            raise CheckpointError(f"it holds no {part.name} (only {', '.join(manifest['parts'])})")
    return manifest


def _save_state(state: State, path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)


def _load_state(path: Path) -> State:
    state: State = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _rng_state() -> State:
    name, keys, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (name, np.asarray(keys).tolist(), position, has_gauss, cached_gaussian),
        "random": random.getstate(),
    }


def _set_rng_state(state: State) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    random.setstate(state["random"])
