"""Everything that is measured on a GPU, in stages: one command, bounded in time, that goes on after a failure.

    python -m benchmarks.gpu_session prepare,rollout --out results-gpu

A stage is a list of the other commands, each run as a process with a time limit of its own. The folder of --out gets
`results.jsonl`, where all of them append their lines, and `session.log` with the end of what each of them printed.
Models that the stages share are made once in --work; a command whose product is there already is left out.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import ROOT, Parser, words

STOP_GRACE_S = 15.0  # for a command that is over its time, to stop its servers
LOG_BYTES = 1024 * 1024  # kept of what one command printed
SHOWN_LINES = 25  # of a failed command, on the terminal
LEAST_S = 5.0  # with less time left a command is not started

MODULE = ("{python}", "-m")
POLICY, DRAFT = "{work}/policy", "{work}/draft"
MODELS = ("--policy", POLICY, "--draft", DRAFT)
RESULTS = ("--results", "{results}")
ROLLOUT = (
    *(*MODULE, "benchmarks.rollout", "--engine", "sglang", *MODELS, "--dtype", "bfloat16", *RESULTS),
    *("--batch-sizes", "1,8,32,128", "--seeds", "4", "--waves", "1", "--max-new-tokens", "256"),
)


@dataclass(frozen=True, slots=True)
class Command:
    words: tuple[str, ...]  # {python}, {work}, {out}, {results}, {rl_policy} and {rl_draft} are filled in
    limit_s: float
    makes: str = ""  # a path; when it exists the command is left out


@dataclass(frozen=True, slots=True)
class Outcome:
    stage: str
    command: str
    status: str  # "ok", "failed (STATUS)", "over time", "there already" or "no time left"
    seconds: float

    @property
    def is_good(self) -> bool:
        return self.status in ("ok", "there already")


# A random policy, sharpened, that any machine makes in seconds; its draft is trained on its own text.
MAKE_POLICY = (
    *(*MODULE, "trainer.cli", "make-model", "--size", "100m", "--task", "repeat", "--context-length", "1024"),
    *("--eps-residual", "0.1", "--embed-scale", "50", "--logit-scale", "6", "--out", POLICY),
)
MAKE_DRAFT = (
    *(*MODULE, "benchmarks.rollout", "--policy", POLICY, "--spec", "none,eagle3", "--batch-sizes", "1", "--seeds", "1"),
    *("--max-new-tokens", "64", "--train-draft-steps", "1200", "--train-draft-samples", "1536"),
    *("--train-draft-lr", "1e-3", "--save-draft", DRAFT, "--results", "{work}/prepare.jsonl"),
)
ENGINE_TESTS = (*MODULE, "pytest", "-m", "gpu", "-v", "--durations=10")
STAGES: dict[str, tuple[Command, ...]] = {
    "tests": (
        Command(
            (
                *(*MODULE, "pytest", "-m", "gpu", "-q", "--durations=10", "tests"),
                *("--ignore", "tests/gpu/test_sglang_engine.py", "--ignore", "tests/gpu/test_sglang_train.py"),
            ),
            560,
        ),
    ),
    # Nothing else may run on the GPU beside these: they watch its memory. A server starts in 40 to 90 s
    "engine-tests": (
        Command((*ENGINE_TESTS, "tests/gpu/test_sglang_engine.py", "-k", "logprobs"), 590),
        Command((*ENGINE_TESTS, "tests/gpu/test_sglang_engine.py", "-k", "not logprobs"), 590),
        Command((*ENGINE_TESTS, "tests/gpu/test_sglang_train.py"), 500),
    ),
    "prepare": (Command(MAKE_POLICY, 120, makes=POLICY), Command(MAKE_DRAFT, 300, makes=DRAFT)),
    # Starting a server takes most of a minute: no offline engines here
    "rollout": (
        Command((*ROLLOUT, "--spec", "none,eagle3,ngram", "--direct", "http", "--work-dir", "{work}/rollout"), 560),
    ),
    # Greedy decoding gives every driver the same tokens, hence the same work: the engine's overhead without noise
    "overhead": (
        Command((*ROLLOUT, "--spec", "none,eagle3", "--temperature", "0", "--work-dir", "{work}/overhead"), 560),
    ),
    "sync": (
        Command((*MODULE, "benchmarks.sync", "--engine", "sglang", "--shape", "0.6b", *RESULTS), 300),
        Command(
            (*MODULE, "benchmarks.sync", "--engine", "sglang", "--shape", "0.6b", "--transport", "disk", *RESULTS), 240
        ),
    ),
    "policy": (
        Command((*MODULE, "benchmarks.policy_update", "--shape", "100m", *RESULTS), 180),
        Command((*MODULE, "benchmarks.policy_update", "--shape", "0.6b", *RESULTS), 240),
    ),
    "draft": (
        Command((*MODULE, "benchmarks.draft_update", "--shape", "100m", *RESULTS), 180),
        Command((*MODULE, "benchmarks.draft_update", "--shape", "0.6b", *RESULTS), 240),
    ),
    "ablation": (
        Command(
            (
                *(*MODULE, "benchmarks.draft_ablation", "--plan", "h200", "--budget-s", "290"),
                *("--work", "{work}/ablation", "--out", "{out}/ablation"),
            ),
            330,
        ),
    ),
    # Two servers, one after another. On the models of the stage rl, unless --policy and --draft name others
    "profile": (
        Command(
            (
                *(*MODULE, "benchmarks.step_profile", "--policy", "{rl_policy}", "--draft", "{rl_draft}", *RESULTS),
                *("--limit-s", "380", "--work-dir", "{work}/profile"),
            ),
            500,
        ),
    ),
    "kernels": (Command((*MODULE, "benchmarks.sglang_kernels", *RESULTS), 560),),
    # Goes on where the last call stopped, so that it may be asked for several times
    "rl": (Command((*MODULE, "benchmarks.rl_on_gpu", "--work", "{work}/rl", "--out", "{out}/rl"), 580),),
}


def filled(text: str, places: Mapping[str, str]) -> str:
    """`text` with {name} replaced; other braces stay as they are."""
    for name, value in places.items():
        text = text.replace("{" + name + "}", value)
    return text


def run_command(command: Sequence[str], limit_s: float, log: Path) -> tuple[str, float]:
    """Status and seconds of one command, whose whole process group ends with it. What it prints goes to `log`."""
    start_s = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit_s)
            said = "ok" if status == 0 else f"failed ({status})"
        except subprocess.TimeoutExpired:
            said = "over time"
            process.terminate()  # alone: it stops what it started
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_GRACE_S)
        finally:
            with suppress(ProcessLookupError):  # nothing of it is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return said, time.monotonic() - start_s


def keep_log(log: Path, whole: Path, head: str) -> list[str]:
    """Move the end of one command's output to the session's log; its last lines."""
    text = log.read_bytes()[-LOG_BYTES:].decode(errors="replace")
    with whole.open("a", encoding="utf-8") as file:
        file.write(f"\n===== {head}\n{text}")
    log.unlink()
    return text.splitlines()[-SHOWN_LINES:]


def run_stage(stage: str, places: Mapping[str, str], deadline_s: float) -> list[Outcome]:
    """Each command of a stage in turn, also after one that failed; all end by `deadline_s` (time.monotonic)."""
    out = Path(places["out"])
    outcomes = []
    for command in STAGES[stage]:
        filled_words = [filled(word, places) for word in command.words]
        line = " ".join(filled_words[1:])
        left_s = deadline_s - time.monotonic() - STOP_GRACE_S
        if command.makes and Path(filled(command.makes, places)).exists():
            outcomes.append(Outcome(stage, line, "there already", 0.0))
            continue
        if left_s < LEAST_S:
            outcomes.append(Outcome(stage, line, "no time left", 0.0))
            continue
        status, seconds = run_command(filled_words, min(command.limit_s, left_s), out / "running.log")
        outcome = Outcome(stage, line, status, seconds)
        end = keep_log(out / "running.log", out / "session.log", f"{stage}: {line}: {status}, {seconds:.1f} s")
        print("\n".join(end), flush=True)
        print(f"----- {stage}: {status}, {seconds:.1f} s", flush=True)
        outcomes.append(outcome)
    return outcomes


def show(outcomes: Sequence[Outcome]) -> str:
    """One line a command."""
    return "\n".join(f"{o.stage:10} {o.status:14} {o.seconds:7.1f} s  {o.command[:90]}" for o in outcomes)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.gpu_session", description=__doc__.splitlines()[0])
    parser.add_argument("stages", type=words, help=f"any of {','.join(STAGES)}, in the order to run them")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl and session.log")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "gpu_session", help="folder for models and logs")
    parser.add_argument("--limit-s", type=float, default=570.0, help="everything is over by then")
    parser.add_argument("--policy", type=Path, help="that the stage profile looks at; by default that of the stage rl")
    parser.add_argument("--draft", type=Path, help="its draft; by default the offline one of the stage rl")
    args = parser.parse_args(argv)
    unknown = [name for name in args.stages if name not in STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}; stages: {', '.join(STAGES)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 when every command did its work, else 1."""
    args = parse(argv)
    deadline_s = time.monotonic() + args.limit_s
    out, work = args.out.resolve(), args.work.resolve()
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    places = {"python": sys.executable, "work": str(work), "out": str(out), "results": str(out / "results.jsonl")}
    places["rl_policy"] = str((args.policy or work / "rl" / "policy").resolve())
    places["rl_draft"] = str((args.draft or work / "rl" / "drafts" / "offline").resolve())
    outcomes = [outcome for stage in args.stages for outcome in run_stage(stage, places, deadline_s)]
    summary = show(outcomes)
    print(summary)
    with (out / "session.log").open("a", encoding="utf-8") as file:
        file.write(f"\n===== summary\n{summary}\n")
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
