"""When to train the draft, measured inside RL on the embedded engine: how often, how soon after a shock, how much.

From nothing: a small policy is made and warm-started, and a draft is trained on its rollouts. Then, seed by seed, RL at
temperature 1 in arms that differ in the draft's training alone:

  rl      frozen, always and pays from that draft; always and pays from a random one
  shock   the policy's learning rate x 10 for one step, or the other half of the task's words from one step on
  curve   a fixed share of the tokens in every step: what of the acceptance is lost with fewer

State lies under --work: the same command goes on behind the last finished arm. A line is added to the results after
every arm. `--rehearse` runs all of it with tiny sizes, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import append_results, arguments, console, half_width_95, integers, provenance, run, words
from benchmarks.draft_schedule_runs import (
    ARMS,
    REHEARSAL,
    WARM,
    WARM_SEED,
    Arm,
    Place,
    Plan,
    is_done,
    make_start,
    num_steps,
    read_done,
    run_arm,
    seconds_per_step,
)
from trainer.progress import phase_seconds

MODULE = "benchmarks.draft_schedule"
PLATEAU_STEPS = 4  # whose mean accept length is a plateau
FIRST_GUESS_S = 10.0  # of a step, before one was timed

Lines = Sequence[Mapping[str, Any]]


# ---- what a run says: pure functions of its metrics ----


def lengths(lines: Lines) -> list[float]:
    return [line["accept_length"] for line in lines]


def plateau(values: Sequence[float]) -> float:
    """Mean of the last steps."""
    return statistics.fmean(values[-PLATEAU_STEPS:])


def first_at(values: Sequence[float], level: float) -> int | None:
    """How many steps passed before a value of at least `level`; None when there was none."""
    return next((i for i, value in enumerate(values) if value >= level), None)


def rise(values: Sequence[float]) -> dict[str, Any]:
    """From the start to the plateau that the run itself ends on."""
    return {"steps_to_90": first_at(values, 0.9 * plateau(values))}


def recovery(values: Sequence[float], shocked: int) -> dict[str, Any]:
    """Steps until acceptance is back, counted from `shocked`, the first rollout that can show the shock; None: never.

    0 = it was never below. All of the plateau is what lies above it less one standard deviation of its steps.
    """
    before, after = values[:shocked], values[shocked:]
    level = plateau(before)
    spread = statistics.stdev(before[-PLATEAU_STEPS:]) if len(before) > 1 else 0.0
    low = min(range(len(after)), key=after.__getitem__)
    return {
        "plateau": level,
        "lowest": after[low],
        "recovered_90": back_at(after, low, 0.9 * level),
        "recovered_100": back_at(after, low, level - spread),
    }


def back_at(after: Sequence[float], low: int, level: float) -> int | None:
    """The first step from the lowest one on that reaches `level`; 0 when even that does."""
    if after[low] >= level:
        return 0
    steps = first_at(after[low:], level)
    return None if steps is None else low + steps


def describe(plan: Plan, arm: Arm, lines: Lines, seconds: float) -> dict[str, Any]:
    """The result line of one run."""
    values = lengths(lines)
    times = [phase_seconds(line) for line in lines]
    total = {name: sum(t.get(name, 0.0) for t in times) for name in sorted({name for t in times for name in t})}
    found = {
        "accept_length": plateau(values),
        "accept_length_by_step": [round(value, 4) for value in values],
        "entropy_by_step": [round(line["entropy"], 4) for line in lines if "entropy" in line],
        "reward": plateau([line["reward"] for line in lines]),
        "token_share": statistics.fmean(line.get("draft_token_share", 0.0) for line in lines),
        "steps_trained": sum(line.get("draft_token_share", 0.0) > 0 for line in lines),
        "draft_share": total["draft"] / sum(total.values()),
        "seconds_by_phase": {name: round(value, 3) for name, value in total.items()},
        "seconds": seconds,
        "saved_s": sum(line["draft_saved_time_s"] for line in lines),
        "saved_basis": lines[-1]["draft_saved_time_basis"],
        "spent_s": sum(line["draft_spent_time_s"] for line in lines),
        "decisions": [line.get("draft_decision", arm.train_when) for line in lines],
    }
    if arm.draft == "random":
        found |= rise(values)
    if arm.shock:
        # A step's update shows in the next rollout; other prompts show in their own.
        shocked = plan.shock_step + (arm.shock == "lr")
        frozen = [line["frozen_accept_length"] for line in lines if "frozen_accept_length" in line]
        found |= recovery(values, shocked) | {"frozen_accept_length_by_step": [round(value, 4) for value in frozen]}
    return found


# ---- the jobs ----


def all_jobs(names: Sequence[str], seeds: Sequence[int]) -> list[tuple[Arm, int]]:
    """Every arm once a seed, the first place rotating, so that a machine's drift meets all arms alike."""
    arms = [arm for arm in ARMS if arm.name in names]
    return [(arm, seed) for i, seed in enumerate(seeds) for arm in (arms[i % len(arms) :] + arms[: i % len(arms)])]


def run_jobs(plan: Plan, place: Place, jobs: Sequence[tuple[Arm, int]], deadline_s: float, results: Path) -> list[str]:
    """Run what is not done; the names of what there was no time for. A result line follows each run."""
    left_out = []
    for arm, seed in jobs:
        if is_done(place, arm, seed):
            continue
        step_s = max(seconds_per_step(place, jobs), default=FIRST_GUESS_S)
        if time.monotonic() + 1.2 * step_s * num_steps(plan, arm) > deadline_s:
            left_out.append(f"{arm.name}-{seed}")
            continue
        run_arm(plan, place, arm, seed)
        append_results(results, [row_of(plan, place, arm, seed)], provenance(MODULE))
    return left_out


def row_of(plan: Plan, place: Place, arm: Arm, seed: int) -> dict[str, Any]:
    lines, seconds = read_done(place, arm, seed)
    return {**asdict(arm), "seed": seed, **describe(plan, arm, lines, seconds), "plan": asdict(plan)}


# ---- what is shown ----

COLUMNS = {  # key -> heading, format
    "accept_length": ("accept length", ".3f"),
    "token_share": ("tokens", ".0%"),
    "steps_trained": ("steps trained", ".1f"),
    "draft_share": ("draft's time", ".1%"),
    "spent_s": ("spent s", ".1f"),
    "seconds": ("whole run s", ".1f"),
}
OF_KIND = {
    "rl": {"steps_to_90": ("steps to 90 %", ".1f")},
    "shock": {
        "plateau": ("plateau", ".3f"),
        "lowest": ("lowest", ".3f"),
        "recovered_90": ("to 90 %", ".1f"),
        "recovered_100": ("to 100 %", ".1f"),
    },
    "curve": {},
}


def mean_of(values: Sequence[float | None], spec: str) -> str:
    """Mean and half of its 95 % interval; how many of the runs have none, where some do not."""
    found = [value for value in values if value is not None]
    if not found:
        return "never" if values else ""
    half = half_width_95(found)
    text = format(statistics.fmean(found), spec) + (f" ± {format(half, spec)}" if half is not None else "")
    return text + (f" ({len(values) - len(found)} never)" if len(found) < len(values) else "")


def show(out: Console, rows: Sequence[Mapping[str, Any]], kind: str) -> None:
    """One table of a kind's arms, over the seeds that are done."""
    columns = {**COLUMNS, **OF_KIND[kind]}
    table = Table(title=f"{kind}: mean over seeds ± half of the 95 % interval")
    table.add_column("arm")
    for heading, _ in columns.values():
        table.add_column(heading, justify="right")
    for name in dict.fromkeys(row["name"] for row in rows if row["kind"] == kind):
        of_arm = [row for row in rows if row["name"] == name]
        cells = ([row[key] for row in of_arm if key in row] for key in columns)
        texts = [mean_of(values, spec) for values, (_, spec) in zip(cells, columns.values(), strict=True)]
        table.add_row(f"{name} ({len(of_arm)})", *texts)
    if table.row_count:
        out.print(table)


def loss_of_acceptance(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(share of the tokens trained on, share of the accept length lost against all tokens), paired by seed."""
    curve = [row for row in rows if row["kind"] == "curve"]
    whole = {row["seed"]: row["accept_length"] for row in curve if row["share"] == 1.0}
    points = []
    for share in sorted({row["share"] for row in curve} - {1.0}):
        lost = [1 - r["accept_length"] / whole[r["seed"]] for r in curve if r["share"] == share and r["seed"] in whole]
        if lost:
            points.append((share, statistics.fmean(lost)))
    return points


def point_used(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where "pays" lies beside "always", from the same draft, paired by seed; empty before both are done."""
    always, pays = ({r["seed"]: r for r in rows if r["kind"] == "rl" and r["name"] == n} for n in ("always", "pays"))
    seeds = always.keys() & pays.keys()
    if not seeds:
        return ""

    def mean(key: str) -> float:
        return statistics.fmean(pays[seed][key] for seed in seeds)

    lost = statistics.fmean(1 - pays[seed]["accept_length"] / always[seed]["accept_length"] for seed in seeds)
    return (
        f"point used by pays: {mean('token_share'):.1%} of the tokens, {mean('draft_share'):.1%} of the time, accept "
        f"length {lost:+.1%} lost against training on {statistics.fmean(always[s]['token_share'] for s in seeds):.0%} "
        "in every step"
    )


def experiment(args: argparse.Namespace) -> None:
    plan, place = REHEARSAL if args.rehearse else Plan(), Place(args.work)
    deadline_s = time.monotonic() + args.budget_s
    make_start(plan, place)
    jobs = all_jobs(args.arms, args.seeds)
    left_out = run_jobs(plan, place, [(WARM, WARM_SEED)], deadline_s, args.results)
    left_out += run_jobs(plan, place, jobs, deadline_s, args.results) if not left_out else [arm.name for arm, _ in jobs]
    rows = [row_of(plan, place, arm, seed) for arm, seed in jobs if is_done(place, arm, seed)]
    out = console()
    for kind in OF_KIND:
        show(out, rows, kind)
    for share, lost in loss_of_acceptance(rows):
        out.print(f"trained on {share:.0%} of the tokens: accept length {lost:+.1%} lost against all of them")
    if point := point_used(rows):
        out.print(point)
    out.print("On a CPU, fixed depth, no plain probe: seconds are this machine's, and what is saved is a bound.")
    if left_out:
        out.print(f"no time left for {', '.join(left_out)}: give the same command again")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments(MODULE, __doc__.splitlines()[0])
    names = tuple(arm.name for arm in ARMS)
    parser.add_argument("--work", type=Path, required=True, help="state of the experiment; give it again to go on")
    parser.add_argument("--arms", type=words, default=names, help="arms, or all of a kind: rl, shock, curve")
    parser.add_argument("--seeds", type=integers, default=(0, 1))
    parser.add_argument("--budget-s", type=float, default=3600.0, help="no arm begins that would end later than this")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args(argv)
    for name in args.arms:
        if name not in {*names, *OF_KIND}:
            parser.error(f"unknown arm {name!r}; use some of {', '.join((*OF_KIND, *names))}")
    args.arms = tuple(arm.name for arm in ARMS if arm.name in args.arms or arm.kind in args.arms)
    if WARM_SEED in args.seeds:
        parser.error(f"seed {WARM_SEED} is the given draft's: leave it out of --seeds")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    sys.stdout.reconfigure(line_buffering=True)
    args = parse(argv)
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    experiment(args)


if __name__ == "__main__":
    run(main)
