"""Time by phase of a training step: a recipe is run for a few steps by `slipstream train`, and its metrics are read."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import append_results, arguments, console, positive, provenance, run
from trainer.metrics import METRICS_FILE, read_metrics
from trainer.progress import phase_seconds


def run_recipe(recipe: Path, num_steps: int, run_dir: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The metrics lines of a fresh run of the recipe. Raises SystemExit with the run's own status when it fails."""
    command = [sys.executable, "-m", "trainer.cli", "train", str(recipe), f"--num_rollout={num_steps}"]
    command += [f"--run_dir={run_dir}", "--name=step", *overrides]
    done = subprocess.run(command, check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    return read_metrics(run_dir / "step" / METRICS_FILE)


def rows_of(lines: Sequence[Mapping[str, Any]], num_warmup: int) -> list[dict[str, Any]]:
    """Median seconds of each phase over the steps after the warm-up, and its share of their sum."""
    measured = [phase_seconds(line) for line in lines[num_warmup:]]
    phases = dict.fromkeys(name for times in measured for name in times)
    medians = {name: statistics.median(times.get(name, 0.0) for times in measured) for name in phases}
    whole = sum(medians.values())
    ordered = sorted(medians.items(), key=lambda item: -item[1])
    return [{"phase": name, "median_s": median, "share": median / whole} for name, median in ordered]


def show(out: Console, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    table = Table(title=title)
    for head in ("phase", "median s", "share"):
        table.add_column(head, justify="left" if head == "phase" else "right")
    for row in rows:
        table.add_row(row["phase"], f"{row['median_s']:.3f}", f"{row['share']:.1%}")
    table.add_section()
    table.add_row("sum", f"{sum(row['median_s'] for row in rows):.3f}", "")
    out.print(table)


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = arguments("benchmarks.step", f"{__doc__} Further --key=value arguments go to the run.")
    parser.add_argument("recipe", type=Path, help="TOML recipe")
    parser.add_argument("--steps", type=positive, default=6, help="steps that are measured")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them that are not")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args, overrides = parse(argv)
    if args.threads:
        raise SystemExit("--threads: set OMP_NUM_THREADS for the run that this benchmark starts")
    with tempfile.TemporaryDirectory() as folder:
        lines = run_recipe(args.recipe, args.warmup + args.steps, Path(folder), overrides)
    rows = rows_of(lines, args.warmup)
    show(console(), rows, f"a step of {args.recipe.name}, median of {args.steps} after {args.warmup} of warm-up")
    shared = {"recipe": str(args.recipe), "steps": args.steps, "warmup": args.warmup, "overrides": overrides}
    append_results(args.results, [shared | row for row in rows], provenance("benchmarks.step"))


if __name__ == "__main__":
    run(main)
