"""RL with speculative rollouts, and without: the main experiment, made from nothing by this one command.

A small policy is made and warm-started, a draft is trained on its rollouts, and the policy is trained by RL at
temperature 1 in arms that differ in speculation alone: none; an EAGLE-3 draft trained before and frozen; one trained
online from random weights, after every rollout; one trained so when it pays; and for comparison one under the
target-only rule with a reduced vocabulary. Arms are interleaved within each seed.

State lies under --work: call the command again and it goes on behind the last finished arm. Results are written to
--out after every arm. `--rehearse` runs all of it on a CPU with the embedded engine and tiny sizes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Parser, check_same_setting, integers, positive, provenance, run, words
from benchmarks.rl_on_gpu_arms import (
    ARMS,
    MAIN_ARMS,
    OFFLINE,
    OFFLINE_SEED,
    REHEARSAL,
    Arm,
    Place,
    Plan,
    is_done,
    num_steps,
    read_record,
    run_arm,
)
from benchmarks.rl_on_gpu_report import write_results
from benchmarks.rl_on_gpu_start import (
    NoServers,
    Servers,
    make_drafts,
    make_policy,
    make_shape,
    serving,
    start_statistics,
    with_flags,
)
from trainer.config import ConfigError

START_REWARD = (0.05, 0.85)  # outside, RL has nothing to learn from, or nothing left to learn
MOST_MAX_PROB = 0.85  # E[max p] above which a draft has it easy
LONG_TAIL = 3.0  # p99 over p50 of the response lengths, at least: batches that shrink are where speculation pays
FIRST_GUESS_S = 120.0  # of an arm, before one has been measured
MODULE = "benchmarks.rl_on_gpu"


@dataclass(frozen=True, slots=True)
class Schedule:
    """What runs in which order, and until when it may begin."""

    jobs: tuple[tuple[Arm, int], ...]
    deadline_s: float  # of time.monotonic


def interleaved_jobs(names: Sequence[str], seeds: Sequence[int]) -> tuple[tuple[Arm, int], ...]:
    """Every main arm once a seed, the first place rotating; then the arms for comparison, first seed first."""
    main = [name for name in names if name in MAIN_ARMS]
    jobs = [(name, seed) for i, seed in enumerate(seeds) for name in (main[i % len(main) :] + main[: i % len(main)])]
    jobs += [(name, seed) for seed in seeds[:1] for name in names if name not in MAIN_ARMS]
    return tuple((ARMS[name], seed) for name, seed in jobs)


def fits(seconds_by_step: Sequence[float], steps: int, left_s: float) -> bool:
    """Whether an arm of so many steps will be over in `left_s`, judged by the slowest measured so far."""
    expected_s = max(seconds_by_step) * steps * 1.1 if seconds_by_step else FIRST_GUESS_S
    return expected_s <= left_s


def run_jobs(
    plan: Plan, place: Place, schedule: Schedule, servers: Servers | NoServers, publish: Callable[[], None]
) -> list[str]:
    """Run what is not done yet, `publish` after each; the names of what there was no time for."""
    left_out: list[str] = []
    for arm, seed in schedule.jobs:
        if is_done(place, arm, seed):
            continue
        left_s = schedule.deadline_s - time.monotonic()
        if not fits(seconds_by_step(place, schedule.jobs), num_steps(plan, arm), left_s):
            left_out.append(f"{arm.name}-{seed}")
            continue
        run_arm(plan, place, arm, seed, servers.address(arm))
        publish()
    return left_out


def seconds_by_step(place: Place, jobs: Sequence[tuple[Arm, int]]) -> list[float]:
    """Wall seconds over steps of every finished run, starting and saving included."""
    runs = [read_record(place.finished(arm, seed)) for arm, seed in jobs if is_done(place, arm, seed)]
    return [run.about["seconds"] / len(run.steps) for run in runs]


def prepare(plan: Plan, place: Place, jobs: Sequence[tuple[Arm, int]], servers: Servers | NoServers) -> dict[str, Any]:
    """Start policy, drafts and servers, and the offline draft; what the start is like. Done once per --work."""
    shape = make_shape(plan, place)
    make_drafts(plan, place, shape)
    waiting = [arm for arm, seed in jobs if not is_done(place, arm, seed)]
    if not is_done(place, OFFLINE, OFFLINE_SEED):
        waiting.append(OFFLINE)
    servers.start(waiting, shape)
    about = make_policy(plan, place)
    if not is_done(place, OFFLINE, OFFLINE_SEED):
        run_arm(plan, place, OFFLINE, OFFLINE_SEED, servers.address(OFFLINE))
    return about | start_statistics(plan, place.finished(OFFLINE, OFFLINE_SEED))


def check_start(start: Mapping[str, Any], plan: Plan) -> None:
    if start["max_prob"] > MOST_MAX_PROB:
        raise ConfigError(
            f"the start policy's E[max p] is {start['max_prob']:.3f}, above {MOST_MAX_PROB}: such text is easy "
            "to draft; remove --work and give another --size or --warm-start-s, or --any-start"
        )
    if start["p99"] < LONG_TAIL * start["p50"]:
        raise ConfigError(
            f"the start policy's responses have no long tail: p99 {start['p99']:.0f}, p50 {start['p50']:.0f} tokens; "
            "remove --work and give another --max-response-len or --warm-start-s, or --any-start"
        )
    low, high = START_REWARD
    if not low <= start["reward"] <= high:
        raise ConfigError(
            f"the start policy's reward is {start['reward']:.3f}, outside {low} to {high}: RL would have nothing to "
            f"learn; remove --work and give another --warm-start-s than {plan.warm_start_s:g}, or --any-start"
        )


def experiment(args: argparse.Namespace, plan: Plan) -> None:
    began_s = time.monotonic()
    place = Place(args.work.resolve())
    place.work.mkdir(parents=True, exist_ok=True)
    jobs = interleaved_jobs(args.arms, args.seeds)
    origin = provenance(MODULE) | {"plan": asdict(plan), "versions": versions()}
    check_same_setting(place.work, asdict(plan), origin, holds_runs=place.done.exists())
    with serving(plan, place) as servers:
        start = prepare(plan, place, jobs, servers)
        if not (args.any_start or args.rehearse):
            check_start(start, plan)

        def publish() -> None:
            write_results(place, args.out, start, origin)

        publish()
        left_out = run_jobs(plan, place, Schedule(jobs, began_s + args.budget_s), servers, publish)
    done = [f"{arm.name}-{seed}" for arm, seed in jobs if is_done(place, arm, seed)]
    print(
        f"{len(done)} of {len(jobs)} runs are done in {time.monotonic() - began_s:.0f} s of this call: {' '.join(done)}"
    )
    if left_out:
        print(f"no time for {' '.join(left_out)}: run the same command again with the same --work")


def versions() -> dict[str, str]:
    """Of the packages that figures depend on; those that are not installed here are left out."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("sglang", "sglang-kernel", "flashinfer-python", "megatron-core", "transformers", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"cuda": str(torch.version.cuda)}


def _options() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "--steps", {"type": int, "help": "RL steps of an arm"}
    yield "--short-steps", {"type": int, "help": "RL steps of the arm under the target-only rule"}
    yield "--prompts", {"type": int, "help": "prompts of a step"}
    yield "--samples", {"type": positive, "help": "responses to a prompt"}
    yield "--max-response-len", {"type": int, "help": "tokens"}
    yield "--warm-start-s", {"type": float, "help": "seconds of the warm start"}
    yield "--warm-start-lr", {"type": float, "help": "learning rate of the warm start"}
    yield "--lr", {"type": float, "help": "learning rate of RL"}
    yield "--draft-lr", {"type": float, "help": "learning rate of the draft"}
    yield "--draft-updates", {"type": int, "help": "optimizer steps of the online draft in an RL step"}
    yield "--draft-tokens", {"type": int, "help": "tokens of one of them"}
    yield "--offline-steps", {"type": int, "help": "rollouts that the offline draft learns from"}
    yield "--engine", {"choices": ("sglang", "torch"), "help": "who serves the rollouts"}
    yield "--sglang-python", {"help": "interpreter of SGLang's environment; default: this one"}
    yield "--dtype", {"help": "of policy and engine"}
    yield "--size", {"help": "preset of make-model"}
    yield "--max-tokens-per-gpu", {"type": int, "help": "of one packed micro-batch of the policy's update"}


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Plan]:
    parser = Parser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work", type=Path, required=True, help="state on this machine's disk; give it again to go on")
    add("--out", type=Path, required=True, help="folder that the results are written to, after every arm")
    add("--arms", type=words, default=tuple(ARMS), help=f"default: {','.join(ARMS)}")
    add("--seeds", type=integers, default=(0, 1), help="default: 0,1")
    add("--budget-s", type=float, default=520.0, help="no arm begins that would end later than this (default 520)")
    add("--rehearse", action="store_true", help="tiny sizes and the embedded engine")
    add(
        "--any-start",
        action="store_true",
        help="go on from a policy that is too good, too bad, too certain or too even",
    )
    add("--sglang", action="append", default=[], metavar="NAME=VALUE", help="a further flag of SGLang's server")
    add("--allow-lossy", action="store_true", help="for a rehearsal with SGLang on a CPU, which verifies greedily")
    for name, options in _options():
        add(name, **options)
    args = parser.parse_args(argv)
    for name in args.arms:
        if name not in ARMS:
            parser.error(f"unknown arm {name!r}; use some of {', '.join(ARMS)}")
    if OFFLINE_SEED in args.seeds:
        parser.error(f"seed {OFFLINE_SEED} is the offline draft's: leave it out of --seeds")
    if not set(args.arms) & set(MAIN_ARMS):
        parser.error(f"--arms needs one of {', '.join(MAIN_ARMS)}")
    return args, make_plan(args)


def make_plan(args: argparse.Namespace) -> Plan:
    names = [name.removeprefix("--").replace("-", "_") for name, _ in _options()]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    plan = replace(REHEARSAL if args.rehearse else Plan(), **given, allow_lossy=args.allow_lossy)
    if "warm_start_s" in given:
        plan = replace(plan, warm_start_steps=0)
    return with_flags(plan, args.sglang)


def main(argv: Sequence[str] | None = None) -> None:
    sys.stdout.reconfigure(line_buffering=True)
    experiment(*parse(argv))


if __name__ == "__main__":
    run(main)
