"""The folder that a run leaves behind, and the rules for making, refusing and resuming one."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from sync.atomic import write_file
from trainer.config import ConfigError, RunConfig
from trainer.run_lock import RunLock, refuse_in_use
from trainer.toml_writer import to_toml


@dataclass(frozen=True, slots=True)
class RunDir:
    """`runs/NAME`: where everything of one run lies."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved settings of the first start; a resumed run's are beside it in `config.resumed.toml`."""
        return self.path / "config.toml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def draft_schedule(self) -> Path:
        """When the draft learned, with `draft.train_when = "pays"`; see `trainer.schedule_record`."""
        return self.path / "draft_schedule.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def lock_file(self) -> Path:
        return self.path / "lock"

    @property
    def engine(self) -> Path:
        """What a server leaves: its log, the draft that it started from, verdicts. No part of the run's results."""
        return self.path / "engine"

    @property
    def policy(self) -> Path:
        return self.path / "policy"

    @property
    def draft(self) -> Path:
        return self.path / "draft"

    @property
    def unpublished_draft(self) -> Path:
        """In the place of `draft` where the run found that it should not be served."""
        return self.path / "draft.not-published"


def check_run_dir(config: RunConfig) -> RunDir:
    """The run's folder, checked and not yet made: call it before heavy work.

    Raises ConfigError when another process writes it, when it holds something and the run does not resume, or when
    there is nothing to resume.
    """
    run = RunDir(Path(config.run_dir) / config.name)
    try:
        refuse_in_use(run.lock_file)
        _check_contents(config, run)
        _check_writable(run.path)
    except OSError as error:
        raise _unusable(run, error) from error
    return run


def _check_writable(path: Path) -> None:
    """OSError when `path`, or the first folder above it that is there, takes no files: nothing is made to find out."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"{there} is not writable", str(there))


def _check_contents(config: RunConfig, run: RunDir) -> None:
    of_no_run = (run.engine, run.lock_file)
    occupied = run.path.exists() and any(path not in of_no_run for path in run.path.iterdir())
    if occupied and not config.resume:
        raise ConfigError(f"{run.path} exists already: continue it with --resume, or choose another --name")
    if config.resume and not occupied:
        raise ConfigError(f"{run.path} holds no run to resume: check --name and --run-dir, or drop --resume")


def make_run_dir(config: RunConfig) -> tuple[RunDir, RunLock]:
    """Check, make the folder, lock it and write the resolved settings. For rank zero, which releases the lock.

    Raises ConfigError; of two starts at one moment, for one.
    """
    run = check_run_dir(config)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(run.lock_file)
        try:
            _check_contents(config, run)  # again: another start may have been and gone since
            # The first start's settings stay, so that a resumed run that differs can be compared with them.
            resumed = config.resume and run.config_file.exists()
            write_file(run.path / "config.resumed.toml" if resumed else run.config_file, to_toml(config))
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        raise _unusable(run, error) from error
    return run, lock


def clear_unless_resumed(config: RunConfig, run: RunDir) -> None:
    """Remove what a run that finished no step has written; a server's log stays, and is in nobody's way."""
    if config.resume or not run.path.exists():
        return
    for path in run.path.iterdir():
        if path.is_dir() and path != run.engine:
            shutil.rmtree(path)
        elif path != run.engine:
            path.unlink()
    if not run.engine.exists():
        run.path.rmdir()


def _unusable(run: RunDir, error: OSError) -> ConfigError:
    return ConfigError(f"{run.path} cannot be used as run folder: {error.strerror}; choose another --run-dir")


def cut_metrics(path: Path, after_step: int) -> None:
    """Drop the lines of steps above `after_step`, and a last line that a kill left unfinished. Atomic.

    A run resumed from the checkpoint of `after_step` writes them again; from no checkpoint, pass -1.
    Raises ConfigError for a line inside the file that is not a record.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    write_file(path, "".join(line for number, line in enumerate(lines, 1) if _step(path, number, line) <= after_step))


def _step(path: Path, number: int, line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path} line {number} is not a metrics record: mend or remove it to resume") from error
