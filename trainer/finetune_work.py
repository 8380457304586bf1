"""`DIR.finetune` beside `--out DIR`: what a fine-tuning needs to go on after a kill, and its curves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sync.atomic import write_file
from trainer.collective import from_rank_zero
from trainer.config import ConfigError
from trainer.finetune_config import FinetuneConfig, flag_of
from trainer.run_lock import RunLock, refuse_in_use

_FREE = frozenset({"resume", "export", "patience"})  # what a resumed run may change


@dataclass(frozen=True, slots=True)
class WorkDir:
    path: Path

    @property
    def settings_file(self) -> Path:
        return self.path / "settings.json"

    @property
    def answers_file(self) -> Path:
        """The target's answers, in the form that --data reads."""
        return self.path / "answers.jsonl"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def engine(self) -> Path:
        """What a server leaves."""
        return self.path / "engine"

    @property
    def lock_file(self) -> Path:
        return self.path / "lock"


def refuse_taken(out: Path) -> None:
    """ConfigError when something lies at `out`: nothing is ever overwritten."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out} exists already: choose another folder, or remove it")


@contextmanager
def taken(config: FinetuneConfig, found: Mapping[str, Any]) -> Iterator[WorkDir]:
    """The work folder, made or resumed, locked until the block ends. Collective.

    `found` is what else decides the result (the data). Raises ConfigError when it is in use, when it holds a run and
    `resume` is off, when there is none to resume, and for the first setting that differs from the one to resume.
    """
    work = WorkDir(Path(config.out + ".finetune"))
    locks: list[RunLock] = []  # of the first rank alone; a lock does not travel
    from_rank_zero(lambda: locks.append(_take(work, config, found)))
    try:
        yield work
    except BaseException:
        if locks and not config.resume:
            _clear_unless_begun(work)
        raise
    finally:
        for lock in locks:
            lock.release()


def _clear_unless_begun(work: WorkDir) -> None:
    """What a run that kept nothing leaves is in the way of the next try; a server's log stays."""
    if work.checkpoints.exists() or work.answers_file.exists():
        return
    work.settings_file.unlink(missing_ok=True)
    if not any(path != work.lock_file for path in work.path.iterdir()):
        shutil.rmtree(work.path)


def _take(work: WorkDir, config: FinetuneConfig, found: Mapping[str, Any]) -> RunLock:
    settings = json.loads(json.dumps({**_flat(asdict(config)), **found}))
    try:
        if work.path.exists():
            refuse_in_use(work.lock_file)
        saved = _saved_settings(work)
        if config.resume:
            _check_same(saved, settings, work)
        elif saved is not None:
            raise ConfigError(f"{work.path} holds a run already: continue it with --resume, or remove it")
        work.path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(work.lock_file)
        write_file(work.settings_file, json.dumps(settings, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(
            f"{work.path} cannot be used as work folder: {error.strerror}; choose another --out"
        ) from error
    return lock


def _saved_settings(work: WorkDir) -> dict[str, Any] | None:
    """None when no run has begun there."""
    if not work.settings_file.exists():
        return None
    try:
        saved = json.loads(work.settings_file.read_text(encoding="utf-8"))
    except ValueError:
        saved = None
    if not isinstance(saved, dict):
        raise ConfigError(f"{work.settings_file} was changed and is no JSON object: remove {work.path} and start again")
    return saved


def _check_same(saved: Mapping[str, Any] | None, settings: Mapping[str, Any], work: WorkDir) -> None:
    if saved is None:
        raise ConfigError(f"{work.path} holds no run to resume: check --out, or drop --resume")
    defaults = json.loads(json.dumps(_flat(asdict(FinetuneConfig()))))
    for key, now in settings.items():
        before = saved.get(key, defaults.get(key))  # a run begun before there was such a setting had its default
        if key not in _FREE and before != now:
            name = key.removeprefix("run.") if key.startswith("run.") else flag_of(key)
            raise ConfigError(
                f"{name} = {now!r}, but the run to resume was started with {before!r}: give the old value, or remove "
                f"{work.path} and start again"
            )


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in table.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return leaves
