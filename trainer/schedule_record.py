"""`draft_schedule.jsonl`: when a run's draft learned, one decision a line, for the run to be taken again alike.

{"step": 0, "share": 1.0, "reason": "start"}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sync.atomic import write_file
from trainer.config import ConfigError
from trainer.draft_schedule import Decision, Reason

Schedule = Mapping[int, Decision]


def read_schedule(path: Path, num_steps: int) -> Schedule:
    """Step -> decision. ConfigError for a file that is no record, or that has not each of `num_steps` steps."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"draft.schedule = {str(path)!r} cannot be read ({error})") from error
    schedule = dict(_parsed(path, number, text) for number, text in enumerate(lines, 1))
    missing = next((step for step in range(num_steps) if step not in schedule), None)
    if missing is not None:
        raise ConfigError(
            f"draft.schedule = {str(path)!r} has no step {missing}, but num_rollout = {num_steps}: give the record of "
            "a run of as many steps, or lower num_rollout; --resume without draft.schedule then goes on beyond it"
        )
    return schedule


def append_decision(path: Path, step: int, decision: Decision) -> None:
    """Add one line; a kill can leave a part of it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(step, decision))


def cut_schedule(path: Path, next_step: int) -> Schedule:
    """Drop the decisions of `next_step` and later, and a last line that a kill left unfinished; return those dropped.

    For a run that is resumed there. Raises ConfigError for a line that is no decision.
    """
    if not path.exists():
        return {}
    whole = [text for text in path.read_text(encoding="utf-8").splitlines(keepends=True) if text.endswith("\n")]
    schedule = dict(_parsed(path, number, text) for number, text in enumerate(whole, 1))
    write_file(path, "".join(_line(step, decision) for step, decision in schedule.items() if step < next_step))
    return {step: decision for step, decision in schedule.items() if step >= next_step}


def _line(step: int, decision: Decision) -> str:
    return json.dumps({"step": step, "share": decision.share, "reason": decision.reason.value}) + "\n"


def _parsed(path: Path, number: int, text: str) -> tuple[int, Decision]:
    try:
        row: dict[str, Any] = json.loads(text)
        step, share, reason = int(row["step"]), float(row["share"]), Reason(row["reason"])
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path} line {number} is not a decision with step, share and reason: mend it") from error
    if not 0.0 <= share < math.inf:
        raise ConfigError(f"{path} line {number}: share = {share}, but it must be 0 or more")
    return step, Decision(share, reason)
