"""The runs behind `draft_schedule`: their settings, the shocks, and what is kept of each."""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from benchmarks.common import copy_published_draft
from draft_models.config import DraftConfig
from rollout_engine.config import RolloutConfig, SpeculationConfig
from sync.atomic import whole_folder, write_file
from trainer import loop
from trainer.config import DataConfig, PolicyConfig, RunConfig
from trainer.draft_schedule import Decision, Reason
from trainer.make_model import MakeModelConfig, make_model
from trainer.metrics import METRICS_FILE, MetricsWriter, read_metrics
from trainer.progress import Progress
from trainer.run import Run, build_run
from trainer.run_dir import RunDir
from trainer.schedule_record import append_decision
from trainer.tasks import TRAIN_START, Problem, get_task
from trainer.tasks.synthetic import draw_repeat

WARM_SEED = 1_000_003  # no arm's: the draft that arms start from has not seen an arm's prompts in an arm's order
TASK = "repeat"
LEARNING_RATE_SHOCK = 10.0
_HALF = frozenset({"red", "sun", "tree", "moon", "fish", "bird", "stone", "cloud"})  # of the task's words


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of the whole; for a CPU of two cores about an hour.

    The draft's budget in the arms is small beside a rollout, as it is on a GPU: what pays depends on that.
    """

    warm_start_steps: int = 450  # of the policy, as in the demo
    draft_steps: int = 30  # rollouts of the start policy that the given draft learns from
    steps: int = 24  # of an arm of RL
    shock_step: int = 12  # the first 12 are the plateau
    after_shock: int = 10
    curve_steps: int = 20
    prompts: int = 64
    samples: int = 8
    rows: int = 2048  # prompts of either half of the task
    history_rows: int = 256  # prompts of the history arms, whose epochs are so many prompts long; whole steps
    history_running: int = 8  # requests that run at a time there
    max_response_len: int = 80
    num_steps: int = 3  # k
    lr: float = 5e-4
    draft_lr: float = 2e-3
    draft_updates: int = 4
    draft_tokens: int = 400  # of one update
    all_updates: int = 8  # of the given draft and of the curve, which are to see all of a rollout
    all_tokens: int = 1600


REHEARSAL = Plan(
    warm_start_steps=30,
    draft_steps=3,
    steps=3,
    shock_step=3,
    after_shock=3,
    curve_steps=2,
    prompts=6,
    samples=4,
    rows=64,
    history_rows=6,
    max_response_len=32,
    draft_tokens=100,
    all_updates=4,
    all_tokens=200,
)


@dataclass(frozen=True, slots=True)
class Arm:
    """`kind`: what it is for. `share` above 0: that part of the tokens in every step, whatever pays."""

    name: str
    kind: str  # warm | rl | shock | curve | history
    train_when: str = "always"
    draft: str = "given"  # given: trained on rollouts of the start policy | random
    shock: str = ""  # lr: learning rate x 10 for one step | mix: the other half of the task from then on
    share: float = 0.0
    history: bool = False


WARM = Arm("warm", "warm", draft="random")
SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
ARMS = (
    Arm("frozen", "rl", "never"),
    Arm("always", "rl"),
    Arm("pays", "rl", "pays"),
    Arm("always-random", "rl", draft="random"),
    Arm("pays-random", "rl", "pays", draft="random"),
    *(Arm(f"{shock}-{when}", "shock", when, shock=shock) for shock in ("lr", "mix") for when in ("always", "pays")),
    *(Arm(f"share-{share:g}", "curve", "pays", share=share) for share in SHARES),
    Arm("online", "history"),
    Arm("online+history", "history", history=True),
)


def num_steps(plan: Plan, arm: Arm) -> int:
    by_kind = {
        "warm": plan.draft_steps,
        "rl": plan.steps,
        "shock": plan.shock_step + plan.after_shock,
        "curve": plan.curve_steps,
        "history": plan.steps,
    }
    return by_kind[arm.kind]


@dataclass(frozen=True, slots=True)
class Place:
    """Where things lie: all of it can be made again, and what is whole is not."""

    work: Path

    @property
    def policy(self) -> Path:
        return self.work / "policy"

    @property
    def draft(self) -> Path:
        return self.work / "draft"

    @property
    def runs(self) -> Path:
        return self.work / "runs"

    def done(self, arm: Arm, seed: int) -> Path:
        return self.work / "done" / f"{arm.name}-{seed}"

    def prompts(self, name: str) -> Path:
        """`name`: first (half of the task's words), few of those, or mix, which goes over to the other half."""
        return self.work / f"{name}.jsonl"


# ---- what arms start from ----


def make_start(plan: Plan, place: Place) -> None:
    """The policy and the prompt files, unless they are there."""
    place.work.mkdir(parents=True, exist_ok=True)
    if not place.policy.exists():
        make_model(MakeModelConfig(out=place.policy, task=TASK, warm_start_steps=plan.warm_start_steps))
    first = [_row(problem) for problem in islice(filter(_is_first_half, _problems()), plan.rows)]
    other = [_row(problem) for problem in islice(filter(_is_other_half, _problems()), plan.rows)]
    before = plan.shock_step * plan.prompts
    repeated = [first[i % len(first)] for i in range(before)]
    write_file(place.prompts("first"), "".join(first))
    write_file(place.prompts("few"), "".join(first[: plan.history_rows]))
    write_file(place.prompts("mix"), "".join(repeated + other))


def _problems() -> Iterator[Problem]:
    task = get_task(TASK)
    assert task.draw is draw_repeat
    return (task.problem(0, TRAIN_START + i) for i in count())


def _is_first_half(problem: Problem) -> bool:
    return set(problem.prompt.split()[2:]) <= _HALF


def _is_other_half(problem: Problem) -> bool:
    return not set(problem.prompt.split()[2:]) & _HALF


def _row(problem: Problem) -> str:
    return json.dumps({"prompt": problem.prompt, "label": problem.label}) + "\n"


# ---- one run ----


def run_config(plan: Plan, place: Place, arm: Arm, seed: int) -> RunConfig:
    """A fixed depth and no plain probe: what a verification costs on this machine decides nothing."""
    steps = num_steps(plan, arm)
    sees_all = arm.kind in ("warm", "curve")
    return RunConfig(
        name=f"{arm.name}-{seed}",
        run_dir=str(place.runs),
        seed=seed,
        num_rollout=steps,
        frozen_draft_step=plan.shock_step if arm.kind == "shock" else 0,
        policy=PolicyConfig(
            hf_checkpoint=str(place.policy), lr=0.0 if arm.kind == "warm" else plan.lr, max_tokens_per_gpu=4096
        ),
        draft=DraftConfig(
            train_when=arm.train_when,
            schedule=str(_write_schedule(place, arm, steps)) if arm.share else "",
            unroll=plan.num_steps,
            lr=plan.draft_lr,
            updates_per_step=plan.all_updates if sees_all else plan.draft_updates,
            max_tokens_per_update=plan.all_tokens if sees_all else plan.draft_tokens,
        ),
        rollout=RolloutConfig(
            max_running_requests=plan.history_running if arm.kind == "history" else 32,
            max_response_len=plan.max_response_len,
            speculative_num_steps=plan.num_steps,
            speculative_draft_model_path=str(place.draft) if arm.draft == "given" else "",
            verify_rule="rejection",
            controller="fixed",
        ),
        speculation=SpeculationConfig(history=arm.history),
        data=DataConfig(
            prompt_data=str(place.prompts(_prompts_of(arm))),
            apply_chat_template=True,
            rollout_shuffle=arm.shock != "mix",
            rollout_batch_size=plan.prompts,
            n_samples_per_prompt=plan.samples,
            reward=get_task(TASK).reward,
        ),
    )


def _prompts_of(arm: Arm) -> str:
    if arm.kind == "history":
        return "few"
    return "mix" if arm.shock == "mix" else "first"


def _write_schedule(place: Place, arm: Arm, steps: int) -> Path:
    path = place.work / f"{arm.name}.jsonl"
    path.unlink(missing_ok=True)
    for step in range(steps):
        append_decision(path, step, Decision(arm.share, Reason.KEEP))
    return path


class ShockedPolicy:
    """The run's policy, whose learning rate is ten times itself in one step; its schedule sets the next one's."""

    def __init__(self, run: Run, step: int) -> None:
        self._run, self._policy, self._step = run, run.policy, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def update(self, *arguments: Any) -> Any:
        if self._run.next_step == self._step:
            for group in self._policy._optimizer.param_groups:
                group["lr"] *= LEARNING_RATE_SHOCK
        return self._policy.update(*arguments)


def run_arm(plan: Plan, place: Place, arm: Arm, seed: int) -> None:
    """Run, and keep the metrics whole or not at all; the draft too of the arm that others start from."""
    config = run_config(plan, place, arm, seed)
    folder = place.runs / config.name
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off: an arm starts again
    print(f"{config.name}: {config.num_rollout} steps", flush=True)
    start_s = time.perf_counter()
    _train(config, folder, shock_step=plan.shock_step if arm.shock == "lr" else -1)
    seconds = time.perf_counter() - start_s
    if arm.kind == "warm":
        with whole_folder(place.draft) as draft:
            copy_published_draft(RunDir(folder), draft)
    done = place.done(arm, seed)
    done.parent.mkdir(exist_ok=True)
    with whole_folder(done) as kept:
        shutil.copy(folder / METRICS_FILE, kept / METRICS_FILE)
        write_file(kept / "seconds.json", json.dumps(seconds))
    shutil.rmtree(folder)
    gc.collect()


def _train(config: RunConfig, folder: Path, shock_step: int) -> None:
    """What `trainer.run.train` does, without report and lines on a terminal."""
    run: Run = build_run(config)
    try:
        if shock_step >= 0:
            run.policy = ShockedPolicy(run, shock_step)
        with Progress(config.num_rollout, str(folder)) as progress:
            run.progress, run.writer = progress, MetricsWriter(folder)
            loop.train(run)
            run.writer.close()
    finally:
        run.close()


def is_done(place: Place, arm: Arm, seed: int) -> bool:
    return place.done(arm, seed).is_dir()


def read_done(place: Place, arm: Arm, seed: int) -> tuple[list[dict[str, Any]], float]:
    """(metrics lines, wall seconds of the whole run, start and export included)."""
    folder = place.done(arm, seed)
    return read_metrics(folder / METRICS_FILE), json.loads((folder / "seconds.json").read_text())


def seconds_per_step(place: Place, jobs: Sequence[tuple[Arm, int]]) -> list[float]:
    found = [read_done(place, arm, seed) for arm, seed in jobs if is_done(place, arm, seed)]
    return [seconds / len(lines) for lines, seconds in found]
