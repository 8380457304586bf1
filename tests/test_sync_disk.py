"""Where versions lie that travel by disk, and what a killed trainer leaves there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sync.disk import own_folder


def test_versions_of_a_killed_trainer_are_removed_and_those_of_others_are_not(tmp_path: Path) -> None:
    """A process of this machine that is gone; one that lives; one of another machine."""
    program = (
        "import sys; from pathlib import Path; from sync.disk import own_folder; print(own_folder(Path(sys.argv[1])))"
    )
    root = Path(__file__).resolve().parents[1]
    said = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=root, capture_output=True, text=True, check=True
    )
    gone, mine = Path(said.stdout.strip()), own_folder(tmp_path)
    _, boot, *rest = gone.name.split("-")
    elsewhere = tmp_path / "-".join(["weights", boot[::-1], *rest])
    for folder in (gone, mine, elsewhere):
        (folder / "version_000001").mkdir(parents=True)
    another = own_folder(tmp_path)
    assert another not in (gone, mine) and not another.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([mine.name, elsewhere.name])
