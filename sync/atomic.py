"""Files and folders that appear whole or not at all: written aside, fsynced, renamed.

A full disk, or a kill at any point, leaves the names that readers look at as they were before; but replacing a
folder takes two renames, and after a kill between them the name is gone until its next writer puts the old folder
back. There is one writer per name, which also removes what a killed one left aside; others may write beside it. Where
one writer has a parent folder for itself and its names change, it calls `clear_leftovers`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ASIDE = ".aside-"  # readers look for other names, so they never see these
_REPLACED, _REMOVED = f"{ASIDE}replaced-", f"{ASIDE}removed-"


def write_file(path: Path, content: str, durable: bool = True) -> None:
    """Create or replace `path` with UTF-8 `content`; not `durable`: whole for readers, but lost with the power."""
    aside = path.with_name(ASIDE + path.name)
    with open(aside, "w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    os.replace(aside, path)
    if durable:
        fsync(path.parent)


def begin_folder(final: Path) -> Path:
    """An empty folder aside, to be filled and then given to `finish_folder`. Clears what earlier writers of it left."""
    final.parent.mkdir(parents=True, exist_ok=True)
    _put_back(final.with_name(_REPLACED + final.name), final)
    aside = final.with_name(ASIDE + final.name)
    for leftover in (aside, final.with_name(_REMOVED + final.name)):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir()
    return aside


def clear_leftovers(parent: Path) -> None:
    """What killed writers left of any name in a folder that nobody else writes to."""
    for replaced in parent.glob(f"{_REPLACED}*"):
        _put_back(replaced, parent / replaced.name.removeprefix(_REPLACED))
    for leftover in parent.glob(f"{ASIDE}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _put_back(replaced: Path, final: Path) -> None:
    """End a replacement that was cut off: the old folder has its name again, unless the new one was there already."""
    if not replaced.exists():
        return
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        os.rename(replaced, final)


def finish_folder(aside: Path, final: Path) -> None:
    """Make a filled folder durable, then visible as `final`; a folder of that name is replaced."""
    for folder, _, files in os.walk(aside):
        for name in files:
            fsync(Path(folder, name))
        fsync(Path(folder))
    replaced = final.with_name(_REPLACED + final.name)
    if final.exists():
        os.rename(final, replaced)
    try:
        os.rename(aside, final)
    except OSError:
        if replaced.exists():
            os.rename(replaced, final)
        raise
    fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Take the name away first: deleting takes many steps, and a reader must never see a part."""
    doomed = path.with_name(_REMOVED + path.name)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Fill the yielded folder; it becomes `final` when the block ends, and vanishes when the block raises."""
    aside = begin_folder(final)
    try:
        yield aside
        finish_folder(aside, final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def fsync(path: Path) -> None:
    """Flush a file's or a folder's own entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
