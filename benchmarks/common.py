"""What every benchmark needs: where it ran, fair order, a ratio with its uncertainty, and a line in results/."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from rich.console import Console

from draft_models.eagle3 import DraftError
from rollout_engine.hf_checkpoint import CheckpointError
from rollout_engine.types import BadRequest, EngineConfigError, EngineError
from sync.atomic import write_file
from sync.plan import SyncError
from trainer.config import ConfigError, DataConfig
from trainer.run_dir import RunDir

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
T = TypeVar("T")

# Two-sided 95 % quantiles of Student's t for 1..30 degrees of freedom; beyond, the normal's 1.96 is near enough.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Geometric mean of paired ratios and its 95 % confidence interval; no interval from a single pair."""

    mean: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.low is None else f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Ratio of two arms measured in pairs. Student's t on the logs: noise of a machine multiplies."""
    logs = [math.log(a / b) for a, b in zip(numerators, denominators, strict=True)]
    mean, half = statistics.fmean(logs), half_width_95(logs)
    if half is None:
        return Ratio(math.exp(mean))
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def half_width_95(values: Sequence[float]) -> float | None:
    """Half of the 95 % confidence interval of the values' mean (Student's t); None from a single value."""
    if len(values) < 2:
        return None
    quantile = _T95[len(values) - 2] if len(values) - 2 < len(_T95) else 1.96
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def interleaved(arms: Mapping[str, Callable[[int], T]], rounds: Sequence[int]) -> dict[str, list[T]]:
    """Every arm once a round, the first place rotating, so that a machine's drift meets all arms alike.

    An arm is called with the round's number (a seed, say).
    """
    names = list(arms)
    results: dict[str, list[T]] = {name: [] for name in names}
    for i, number in enumerate(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            results[name].append(arms[name](number))
    return results


def seconds(action: Callable[[], object]) -> float:
    """Wall seconds of one call, pending CUDA work included."""
    synchronize()
    start_s = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - start_s


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def hardware() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit that was measured, with "+dirty" when tracked files differ from it; "unknown" outside a clone.

    SLIPSTREAM_COMMIT says it for a copy of the files that travelled without their history.
    """
    if told := os.environ.get("SLIPSTREAM_COMMIT"):
        return told
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+dirty" if _git("status", "--porcelain", "--untracked-files=no", "--", "*.py") else "")


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def provenance(module: str) -> dict[str, Any]:
    """What makes a figure checkable: command, hardware, commit, date."""
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "hardware": hardware(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def check_same_setting(work: Path, settings: Mapping[str, Any], origin: Mapping[str, Any], *, holds_runs: bool) -> None:
    """ConfigError when `work` holds runs of other sizes, code or hardware, which must not be compared with new ones.

    `origin` is what `provenance` says, with the `versions` of packages where they count. `holds_runs`: something of an
    earlier call lies in `work`, which without a setting told beside it is of who knows what.
    """
    hardware = {key: origin["hardware"][key] for key in ("cpu", "gpu", "torch")}
    mine = {"settings": settings, "commit": origin["commit"], "hardware": hardware}
    if "versions" in origin:
        mine["versions"] = origin["versions"]
    mine = json.loads(json.dumps(mine))  # as it is read back
    told = work / "setting.json"
    untold = {} if holds_runs else mine
    found = json.loads(told.read_text()) if told.exists() else untold
    if other := [key for key in mine if found.get(key) != mine[key]]:
        raise ConfigError(f"{work} holds runs of other {', '.join(other)}: give another --work, or remove it")
    write_file(told, json.dumps(mine))


def copy_published_draft(run: RunDir, to: Path) -> None:
    """EngineError when the run put its draft aside, as one that should not be served: nothing may start from it."""
    if not run.draft.is_dir():
        raise EngineError(
            f"{run.path}: the run published no draft, and nothing can start from it; sentinel_alarm or draft_decision "
            f"in {run.metrics_file.name} says why, and the draft itself lies in {run.unpublished_draft.name}"
        )
    shutil.copytree(run.draft, to, dirs_exist_ok=True)


def append_results(path: Path, rows: Sequence[Mapping[str, Any]], origin: Mapping[str, Any]) -> None:
    """One JSON line a row, each with the whole origin, so that a line can be quoted alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**row, **origin}, default=asdict, allow_nan=False) + "\n")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"slipstream: error: {message}; see {self.prog} --help\n")


def arguments(module: str, description: str | None) -> Parser:
    """A parser with the options that all benchmarks share."""
    parser = Parser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    name = module.rsplit(".", 1)[-1]
    parser.add_argument("--results", type=Path, default=RESULTS / f"{name}.jsonl", help="JSON lines are appended here")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 = torch's own choice")
    return parser


def console(width: int = 120) -> Console:
    """The terminal's width, or `width`, in which tables fit, when there is no terminal."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=width)


def add_policy_options(parser: argparse.ArgumentParser) -> None:
    """Which policy is measured, on which prompts, in which dtype and where."""
    parser.add_argument(
        "--policy", "--target", dest="policy", type=Path, required=True, help="Hugging Face folder of the policy"
    )
    parser.add_argument("--prompts", type=Path, help="JSONL file; default: train.jsonl of the policy's folder")
    parser.add_argument("--input-key", default="prompt")
    parser.add_argument("--label-key", default="label")
    parser.add_argument("--apply-chat-template", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def data_config(args: argparse.Namespace) -> DataConfig:
    return DataConfig(input_key=args.input_key, label_key=args.label_key, apply_chat_template=args.apply_chat_template)


def run(main: Callable[[], None]) -> None:
    """Run a benchmark from the command line. An error is one line; exit status 2 for bad input, 1 for a dead engine, a
    failed sync or a file that cannot be written."""
    try:
        main()
    except (ConfigError, CheckpointError, DraftError, EngineConfigError, EngineError, BadRequest, SyncError) as error:
        print(f"slipstream: error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None
    except OSError as error:
        what = error.strerror or str(error)
        print(f"slipstream: error: {error.filename or 'input or output'}: {what}", file=sys.stderr)
        raise SystemExit(1) from None


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def positives(text: str) -> tuple[int, ...]:
    """`1,8,32` as such numbers."""
    return tuple(positive(part) for part in text.split(","))


def integers(text: str) -> tuple[int, ...]:
    """`1,8,32` as numbers, for argparse."""
    return tuple(int(part) for part in text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))
