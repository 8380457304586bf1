"""Many drafts trained in one process on one recorded rollout set of a fixed target, each choice on its own, by seeds.

    python -m benchmarks.draft_ablation --plan h200 --work WORK --out OUT --budget-s 290   # on a GPU
    python -m benchmarks.draft_ablation --plan cpu --work WORK --out OUT                    # tiny, and labelled so
    python -m benchmarks.draft_ablation_report      # the tables of docs/drafters.md

Target and rollouts are made once per --work. Each finished (arm, seed) is one line of OUT/runs.jsonl; the same command
goes on behind the last one. Several calls with seeds of their own may run side by side on one --work and one --out: a
small draft's update is bound by launches, and leaves most of a GPU idle. No arm begins that would end after --budget-s:
OUT/about.json names what was left out.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Parser, integers, provenance, run, words
from benchmarks.draft_ablation_arms import AXES, PLANS, Arm, Plan, arms_of, jobs_of
from benchmarks.draft_ablation_texts import Texts, load_texts
from benchmarks.draft_ablation_train import train_arm
from sync.atomic import write_file
from trainer.config import ConfigError

MODULE = "benchmarks.draft_ablation"
RUNS, ABOUT = "runs.jsonl", "about.json"
FIRST_GUESS_S = 20.0  # of an arm, before one has been measured
_MARGIN = 1.15


@dataclass(slots=True)
class Results:
    """What is known so far, in `out`: a line for each finished run, and what it was all about."""

    out: Path
    about: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, out: Path, about: dict[str, Any]) -> Results:
        """Go on with what `out` holds. ConfigError when its runs saw other texts or other sizes."""
        results = cls(out, about, read_runs(out))
        for record in results.records:
            if (record["fingerprint"], record["plan"]) != (about["fingerprint"], about["plan"]):
                raise ConfigError(
                    f"{out} holds runs on other texts or of other sizes: give another --out, or remove it"
                )
        return results

    def has(self, arm: Arm, seed: int) -> bool:
        return any((record["arm"]["name"], record["seed"]) == (arm.name, seed) for record in self.records)

    def add(self, record: dict[str, Any]) -> None:
        shared = {key: self.about[key] for key in ("fingerprint", "plan")}
        self.records.append(record | shared | self.about["origin"])
        with alone(self.out):
            written = [*read_runs(self.out), self.records[-1]]  # another call's lines too
            write_file(self.out / RUNS, "".join(json.dumps(r, allow_nan=False) + "\n" for r in written))

    def write_about(self, left_out: dict[str, str]) -> None:
        """What this call was asked for and left out, beside what others say of their seeds."""
        seeds = set(self.about["asked"]["seeds"])
        with alone(self.out):
            told = read_about(self.out)
            others = {run: why for run, why in told.get("left_out", {}).items() if _seed_of(run) not in seeds}
            asked = {
                key: list(dict.fromkeys([*told.get("asked", {}).get(key, ()), *self.about["asked"][key]]))
                for key in ("arms", "seeds")
            }
            about = self.about | {"asked": asked | {"seeds": sorted(asked["seeds"])}, "left_out": others | left_out}
            write_file(self.out / ABOUT, json.dumps(about, indent=1) + "\n")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Calls that share a folder come in here one after another."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_about(out: Path) -> dict[str, Any]:
    path = out / ABOUT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_runs(out: Path) -> list[dict[str, Any]]:
    path = out / RUNS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def expected_s(arm: Arm, records: Sequence[dict[str, Any]]) -> float:
    """Seconds of the arm, by the slowest training per unit of work and the slowest scoring seen so far.

    The first run also pays for what a device does once, so it counts only while it is alone.
    """
    seen = [record for record in records if "failed" not in record]
    seen = seen[1:] or seen
    if not seen:
        return FIRST_GUESS_S
    per_unit_s = max(record["train_s"] / _work(Arm(**record["arm"])) for record in seen)
    return _MARGIN * (per_unit_s * _work(arm) + max(record["score_s"] for record in seen))


def run_name(arm: Arm, seed: int) -> str:
    return f"{arm.name}, seed {seed}"


def _seed_of(run: str) -> int:
    return int(run.rpartition(" ")[2])


def _work(arm: Arm) -> float:
    """Tokens times unrolled steps; the step-0 keys and the target's law cost about one more."""
    return arm.updates * arm.batch_tokens * (1.0 + arm.unroll)


def ablate(
    plan: Plan, texts: Texts, results: Results, jobs: Sequence[tuple[Arm, int]], deadline_s: float, device: str
) -> None:
    """Run what is not done yet, until `deadline_s` (time.monotonic); what there is no time for is named."""
    left_out: dict[str, str] = {}
    results.write_about(left_out)
    for arm, seed in jobs:
        if results.has(arm, seed):
            continue
        needs_s, left_s = expected_s(arm, results.records), deadline_s - time.monotonic()
        if needs_s > left_s:
            left_out[run_name(arm, seed)] = f"no time: {needs_s:.0f} s needed, {max(left_s, 0):.0f} s left"
            continue
        record = train_arm(arm, seed, texts, plan, device)
        results.add(record)
        results.write_about(left_out)
        found = record.get("failed") or f"accept length {record['curve'][-1]['accept_length']:.2f}"
        print(f"{run_name(arm, seed)}: {found}; {record['train_s']:.1f} s + {record['score_s']:.1f} s", flush=True)
    results.write_about(left_out)
    if left_out:
        print(f"no time for {len(left_out)} runs: the same command goes on with them")


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Plan]:
    parser = Parser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--plan", choices=tuple(PLANS), default="h200", help="sizes")
    add("--work", type=Path, required=True, help="target and rollouts on this machine; give it again to go on")
    add("--out", type=Path, required=True, help="folder of the results")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    add("--budget-s", type=float, default=float("inf"), help="no arm begins that would end later, from the start")
    add("--seeds", type=integers, default=(0, 1, 2), help="default: 0,1,2")
    add("--axes", type=words, default=AXES, help=f"default: {','.join(AXES)}; the base arm belongs to all")
    add("--threads", type=int, default=0, help="torch threads; 0 = torch's own choice")
    overrides: dict[str, type] = {"size": str, "dtype": str, "warm_start_s": float, "record_s": float}
    overrides |= {"updates": int, "train_prompts": int}
    for name, kind in overrides.items():
        add(f"--{name.replace('_', '-')}", type=kind, help=f"instead of the plan's {name}")
    args = parser.parse_args(argv)
    for axis in args.axes:
        if axis not in AXES:
            parser.error(f"unknown axis {axis!r}; use some of {', '.join(AXES)}")
    given = {name: getattr(args, name) for name in overrides if getattr(args, name) is not None}
    if "warm_start_s" in given:
        given["warm_start_steps"] = 0
    return args, replace(PLANS[args.plan], **given)


def _origin(args: argparse.Namespace) -> dict[str, Any]:
    """Where the figures come from; the folders of this machine go by their options' names."""
    origin = provenance(MODULE)
    places = {str(args.work): "WORK", str(args.out): "OUT"}
    return origin | {"command": " ".join(places.get(word, word) for word in shlex.split(origin["command"]))}


def main(argv: Sequence[str] | None = None) -> None:
    began_s = time.monotonic()
    args, plan = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    sys.stdout.reconfigure(line_buffering=True)
    work = args.work.resolve()
    with alone(work):  # the first call makes what the others read
        texts = load_texts(plan, work, args.device)
    told = json.loads(json.dumps(asdict(plan)))  # as it is read back
    base, *others = arms_of(plan)
    arms = [base, *(arm for arm in others if arm.axis in args.axes)]
    ready_s = time.monotonic() - began_s
    print(f"target and texts after {ready_s:.0f} s: {json.dumps(texts.about['target'])}")
    asked = {"arms": [arm.name for arm in arms], "seeds": list(args.seeds)}
    about = {"plan": told, "origin": _origin(args), "ready_s": ready_s, "asked": asked}
    results = Results.open(args.out, texts.about | about)
    ablate(plan, texts, results, jobs_of(arms, args.seeds), began_s + args.budget_s, args.device)


if __name__ == "__main__":
    run(main)
