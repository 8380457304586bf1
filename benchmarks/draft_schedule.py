"""When to train the draft, measured inside RL on the embedded engine: how often, how soon after a shock, how much.

From nothing: a small policy is made and warm-started, and a draft is trained on its rollouts. Then, seed by seed, RL at
temperature 1 in arms that differ in the draft's training alone:

  rl      frozen, always and pays from that draft; always and pays from a random one
  shock   the policy's learning rate x 10 for one step, or the other half of the task's words from one step on
  curve   a fixed share of the tokens in every step: what of the acceptance is lost with fewer
  history always, with and without history drafts beside it, on few prompts that come again and again, 8 at a time

State lies under --work: the same command goes on behind the last finished arm, and is refused where runs of other
sizes, code or hardware lie. A line is added to the results after every arm. `--arms warm` makes only what all arms
start from: copies of that folder let arms run in several processes, whose result files are then one, end to end.
`--rehearse` runs all of it with tiny sizes, whose figures mean nothing.
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

from benchmarks.common import append_results, arguments, check_same_setting, console, integers, provenance, run, words
from benchmarks.draft_schedule_report import OF_KIND, show_all
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
from benchmarks.plateau import most_of
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
    """From the start to 90 % of the drafts that stand on the plateau that the run itself ends on."""
    return {"steps_to_90": first_at(values, most_of(plateau(values)))}


def recovery(values: Sequence[float], shocked: int) -> dict[str, Any]:
    """Steps until acceptance is back, counted from `shocked`, the first rollout that can show the shock; None: never.

    0 = it was never below. 90 % are of the drafts that stand, without the bonus token; all of the plateau is what lies
    above it less one standard deviation of its steps.
    """
    before, after = values[:shocked], values[shocked:]
    level = plateau(before)
    spread = statistics.stdev(before[-PLATEAU_STEPS:]) if len(before) > 1 else 0.0
    low = min(range(len(after)), key=after.__getitem__)
    return {
        "plateau": level,
        "lowest": after[low],
        "recovered_90": back_at(after, low, most_of(level)),
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
        found |= shock_figures(plan, arm, lines)
    if arm.kind == "history":
        found |= history_figures(plan, lines)
    return found


def shock_figures(plan: Plan, arm: Arm, lines: Lines) -> dict[str, Any]:
    """How acceptance came back, beside that of the draft as it was at the shock.

    No recovery where the shock's step had no update, every group having been dropped: the shock did not happen.
    """
    frozen = [line["frozen_accept_length"] for line in lines if "frozen_accept_length" in line]
    found = {"frozen_accept_length_by_step": [round(value, 4) for value in frozen]}
    if arm.shock == "lr" and lines[plan.shock_step].get("policy_skipped"):
        return found | {"shock_missed": True}
    # A step's update shows in the next rollout; other prompts show in their own.
    return found | recovery(lengths(lines), plan.shock_step + (arm.shock == "lr"))


def history_figures(plan: Plan, lines: Lines) -> dict[str, Any]:
    """What history did, step by step: 0 where it had no part, as in the arm without."""
    verifies = sum(line["verify_steps"] for line in lines)
    of_history = sum(line.get("history_verify_steps", 0) for line in lines)
    drafted = [line["history_accept_length"] for line in lines if line.get("history_verify_steps")]
    return {
        "epoch_by_step": [line["step"] * plan.prompts // plan.history_rows for line in lines],
        "tokens_per_forward_by_step": [round(line["tokens_per_forward"], 4) for line in lines],
        "tokens_per_s_by_step": [round(line["tokens_per_s"], 2) for line in lines],
        "history_share": of_history / verifies,
        "history_share_by_step": [round(line.get("history_share", 0.0), 4) for line in lines],
        "history_accept_length": statistics.fmean(drafted) if drafted else None,
        "running_requests": plan.history_running,
    }


# ---- the jobs ----


def all_jobs(names: Sequence[str], seeds: Sequence[int]) -> list[tuple[Arm, int]]:
    """Every arm once a seed, the first place rotating, so that a machine's drift meets all arms alike.

    A seed's order is its own, whichever others are asked for: seeds may run in processes of their own.
    """
    arms = [arm for arm in ARMS if arm.name in names]
    firsts = [seed % len(arms) if arms else 0 for seed in seeds]
    return [(arm, seed) for seed, i in zip(seeds, firsts, strict=True) for arm in (*arms[i:], *arms[:i])]


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


# ---- command ----


def experiment(args: argparse.Namespace) -> None:
    plan, place = REHEARSAL if args.rehearse else Plan(), Place(args.work)
    deadline_s = time.monotonic() + args.budget_s
    place.work.mkdir(parents=True, exist_ok=True)
    holds_runs = place.policy.exists() or place.draft.exists()
    check_same_setting(place.work, asdict(plan), provenance(MODULE), holds_runs=holds_runs)
    make_start(plan, place)
    jobs = all_jobs(args.arms, args.seeds)
    left_out = run_jobs(plan, place, [(WARM, WARM_SEED)], deadline_s, args.results)
    left_out += run_jobs(plan, place, jobs, deadline_s, args.results) if not left_out else [arm.name for arm, _ in jobs]
    out = console()
    show_all(out, [row_of(plan, place, arm, seed) for arm, seed in jobs if is_done(place, arm, seed)])
    if left_out:
        out.print(f"no time left for {', '.join(left_out)}: give the same command again")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments(MODULE, __doc__.splitlines()[0])
    names = tuple(arm.name for arm in ARMS)
    parser.add_argument("--work", type=Path, required=True, help="state of the experiment; give it again to go on")
    parser.add_argument(
        "--arms",
        type=words,
        default=names,
        help="arms, or all of a kind: rl, shock, curve, history; warm: none, only what they start from",
    )
    parser.add_argument("--seeds", type=integers, default=(0, 1))
    parser.add_argument("--budget-s", type=float, default=3600.0, help="no arm begins that would end later than this")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args(argv)
    for name in args.arms:
        if name not in {*names, *OF_KIND, WARM.name}:
            parser.error(f"unknown arm {name!r}; use some of {', '.join((WARM.name, *OF_KIND, *names))}")
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
