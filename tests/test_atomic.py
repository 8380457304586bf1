"""Folders that appear whole or not at all, whoever writes beside them."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from sync import atomic
from tests.crash_helpers import KILLED, die_at, exit_code


def _replace_and_die(folder: Path, call: int) -> None:
    die_at(call)
    with atomic.whole_folder(folder) as aside:
        (aside / "a").write_text("new")
        (aside / "b").write_text("new")


def test_a_folder_is_replaced_whole_whenever_the_writer_dies(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    seen, deaths = set(), 0
    while True:
        with atomic.whole_folder(folder) as aside:
            (aside / "a").write_text("old")
            (aside / "b").write_text("old")
        if exit_code(_replace_and_die, folder, deaths) != KILLED:
            break
        deaths += 1
        shutil.rmtree(atomic.begin_folder(folder))  # the next writer of it, which gives up
        seen.add(((folder / "a").read_text(), (folder / "b").read_text()))
    assert seen == {("old", "old"), ("new", "new")} and deaths > 5
    assert (folder / "a").read_text() == "new" and not list(tmp_path.glob(".aside-*"))


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    with atomic.whole_folder(folder) as aside:
        (aside / "a").write_text("old")
    rename = os.rename

    def refuse_new(source: Path, target: Path) -> None:
        if source.name == ".aside-folder":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_new)
    with pytest.raises(OSError, match="error"), atomic.whole_folder(folder) as aside:
        (aside / "a").write_text("new")
    assert (folder / "a").read_text() == "old" and list(tmp_path.iterdir()) == [folder]


def test_two_writers_beside_each_other_leave_each_others_work_alone(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    with atomic.whole_folder(a) as first:
        (first / "x").write_text("a")
        with atomic.whole_folder(b) as second:
            (second / "x").write_text("b")
    assert ((a / "x").read_text(), (b / "x").read_text()) == ("a", "b")
    replaced = tmp_path / ".aside-replaced-b"
    b.rename(replaced)  # its writer is between two renames
    with atomic.whole_folder(a):
        pass
    assert replaced.exists() and not b.exists()
    shutil.rmtree(atomic.begin_folder(b))
    assert (b / "x").read_text() == "b" and sorted(tmp_path.iterdir()) == [a, b]


def test_the_only_writer_of_a_folder_clears_what_was_left_of_any_name(tmp_path: Path) -> None:
    for left in (".aside-step_1", ".aside-removed-step_2", ".aside-replaced-step_3", ".aside-replaced-step_4"):
        (tmp_path / left).mkdir()
    (tmp_path / "step_4").mkdir()
    atomic.clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_3", "step_4"]
