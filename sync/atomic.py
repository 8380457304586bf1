"""Files and folders that appear whole or not at all: written aside, fsynced, renamed.

A full disk, or a kill at any point, leaves the names that readers look at as they were before; but replacing a
folder takes two renames, and after a kill between them the name is gone until the next writer puts the old folder
back. There is one writer per parent folder; what a killed writer left aside is removed by the next one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ASIDE = ".aside-"  # readers look for other names, so they never see these
_REPLACED = f"{ASIDE}replaced-"


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
    """An empty folder aside, to be filled and then given to `finish_folder`. Clears what earlier writers left."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for replaced in final.parent.glob(f"{_REPLACED}*"):
        name = final.with_name(replaced.name.removeprefix(_REPLACED))
        if not name.exists():
            os.rename(replaced, name)
    for leftover in final.parent.glob(f"{ASIDE}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    aside = final.with_name(ASIDE + final.name)
    aside.mkdir()
    return aside


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
    doomed = path.with_name(f"{ASIDE}removed-{path.name}")
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
