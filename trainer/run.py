"""Everything a run holds, put together from its settings: `train(config)` is what the command line calls."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from draft_models.checkpoint import save_draft
from draft_models.eagle3 import DraftError, Eagle3, Eagle3Config
from draft_models.types import VerifyRule
from rollout_engine.config import RolloutConfig
from rollout_engine.memory import TrainerNeed
from rollout_engine.sglang_checks import check_draft_vocabulary
from rollout_engine.types import RolloutEngine, SamplingParams
from sync.atomic import remove_folder, whole_folder
from sync.publish import SyncReport
from trainer import loop
from trainer.checkpoint import (
    Part,
    latest_checkpoint,
    load_checkpoint,
    read_counters,
    rng_part,
    save_checkpoint,
    shared_part,
)
from trainer.collective import from_last_rank, from_rank_zero
from trainer.config import ConfigError, RunConfig
from trainer.data import DataPosition, Prompt, PromptData, load_prompts
from trainer.distributed import init_distributed, rank, world_size
from trainer.draft_learner import DraftLearner, DraftSettings
from trainer.draft_pacing import DraftPacer
from trainer.draft_schedule import Reason
from trainer.draft_vocab import run_vocabulary
from trainer.hf_files import HFWeights, read_config
from trainer.interrupt import deferred_interrupts
from trainer.megatron_policy import CaptureSpec, MegatronPolicy
from trainer.megatron_settings import rope_frequencies, transformer_settings
from trainer.metrics import MetricsWriter, PhaseClock, read_metrics
from trainer.progress import Progress
from trainer.resume_check import check_resumed, flat_settings
from trainer.rewards import Reward, load_reward
from trainer.rollouts import Rollout, sampling_params
from trainer.run_dir import RunDir, check_run_dir, clear_unless_resumed, cut_metrics, make_run_dir
from trainer.run_lock import RunLock
from trainer.schedule_record import Schedule, read_schedule
from trainer.sentinel_watch import SentinelWatch, plain_rollout
from trainer.serving import (
    build_engine,
    check_asked,
    check_engine_for,
    context_length,
    eos_token_ids,
    load_tokenizer,
    read_draft,
    trainer_need,
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the user gave, read and checked before anything heavy is built."""

    folder: Path  # of the policy
    hf_config: dict[str, Any]
    tokenizer: Any
    prompts: PromptData
    eval_prompts: tuple[Prompt, ...]
    reward: Reward
    eos_token_ids: tuple[int, ...]
    draft_schedule: Schedule  # the draft's decisions to take again; {} = decide


@dataclass
class Run:
    """One run on this rank. On rank 0: `engine`, `lock`, `pacer`, `progress`, `writer`; on draft ranks: `learner`."""

    config: RunConfig
    directory: RunDir
    inputs: Inputs
    policy: MegatronPolicy
    engine: RolloutEngine | None
    learner: DraftLearner | None
    capture: CaptureSpec | None  # None without an EAGLE-3 draft
    progress: Progress | None
    lock: RunLock | None
    watch: SentinelWatch
    pacer: DraftPacer | None = None  # with an EAGLE-3 draft
    writer: MetricsWriter | None = None
    position: DataPosition = field(default_factory=DataPosition)
    next_step: int = 0
    clock: PhaseClock = field(default_factory=PhaseClock)

    @property
    def prompts(self) -> PromptData:
        return self.inputs.prompts

    @property
    def eval_prompts(self) -> tuple[Prompt, ...]:
        return self.inputs.eval_prompts

    @property
    def reward(self) -> Reward:
        return self.inputs.reward

    @property
    def sampling(self) -> SamplingParams:
        return sampling_params(self.config.rollout)

    def record(self, step: int, rollout: Rollout, report: SyncReport, *parts: dict[str, Any]) -> None:
        """Write the step's metrics line and show it, on rank 0; raises on every rank when that cannot be done."""
        from_rank_zero(lambda: self._record(step, rollout, report, *parts))

    def _record(self, step: int, rollout: Rollout, report: SyncReport, *parts: dict[str, Any]) -> None:
        if self.writer is None or self.progress is None:
            return
        sync = {"sync_time_s": report.time_s, "sync_bytes": report.num_bytes, "next_version": report.version}
        # An SGLang server takes no seeds, so that two equal runs differ: every line says so.
        repeats = {"reproducible": False} if self.config.rollout.engine == "sglang" else {}
        line = loop.metrics_line(step, rollout, sync, self.clock.take(), repeats, *parts)
        self.writer.write(line)
        self.progress.step(line)

    def should_save(self, done: int) -> bool:
        interval = self.config.save_interval
        return done == self.config.num_rollout or bool(interval and done % interval == 0)

    def parts(self, *, takes_controller: bool = True) -> list[Part]:
        """Owners of state, in the order in which a checkpoint holds them."""
        parts = [Part("policy", self.policy.save, self.policy.load), rng_part()]
        if self.capture is not None:
            learner = self.learner
            parts.append(
                shared_part(
                    "draft",
                    lambda: learner.state_dict() if learner else {},
                    lambda state: learner.load_state_dict(state) if learner else None,
                    writes=rank() == world_size() - 1,
                    reads=learner is not None,
                )
            )
        engine = self.engine
        parts.append(
            shared_part(
                "controller",
                lambda: engine.state() if engine else {},
                lambda state: engine.load_state(state) if engine else None,
                writes=engine is not None,
                reads=engine is not None and takes_controller,
            )
        )
        return parts

    def save_checkpoint(self) -> None:
        with self.clock("checkpoint"):
            counters = {
                "position": {"epoch": self.position.epoch, "index": self.position.index},
                "settings": flat_settings(self.config),
            }
            if self.pacer is not None:
                counters["draft_pacer"] = self.pacer.state()
            counters["sentinel"] = self.watch.state()
            save_checkpoint(self.directory.checkpoints, self.next_step, self.parts(), counters)

    def restore(self) -> None:
        """Continue from the newest whole checkpoint, or from the start when the run was killed before its first."""
        folder = latest_checkpoint(self.directory.checkpoints)
        counters: dict[str, Any] = {}
        if folder is not None:
            was_stopped = read_counters(folder).get("sentinel", {}).get("stopped", False)
            # An engine that is to speculate again after its mending has nothing to learn from one that did not.
            parts = self.parts(takes_controller=was_stopped == self.watch.stopped)
            self.next_step, counters = load_checkpoint(folder, parts)
            self.position = DataPosition(**counters["position"])
        from_rank_zero(lambda: cut_metrics(self.directory.metrics_file, self.next_step - 1))
        if self.capture is not None:
            from_rank_zero(lambda: self.pacer.resume(counters.get("draft_pacer"), self.next_step))

    def tell(self, text: str) -> None:
        """A line that must not be missed (rank 0)."""
        if self.progress is not None:
            self.progress.note(f"slipstream: {text}")

    def decode_plainly(self) -> None:
        """Replace the engine by one of the same policy without a draft, which serves nothing before a sync (rank 0)."""
        self.engine, old = None, self.engine
        old.close()
        del old  # its memory, before the next one takes its own
        to_come = trainer_need(self.inputs.folder, self.config, None)
        to_come = replace(to_come, policy_bytes=0)  # the optimizer has its memory since the first step
        self.engine = _plain_engine(self.config, self.inputs, self.directory, to_come)

    def close(self) -> None:
        """Stop the engine, and the server behind it when there is one; then the folder is free for others."""
        try:
            if self.engine is not None:
                self.engine.close()
        finally:
            if self.lock is not None:
                self.lock.release()

    def export(self) -> None:
        """Policy and draft in Hugging Face form under the run's folder; a draft not to be served lies aside."""
        self.policy.save_hf(self.directory.policy)
        if self.capture is None:
            return
        why = from_rank_zero(self._why_unpublished)
        published, aside = self.directory.draft, self.directory.unpublished_draft
        place, other = (aside, published) if why else (published, aside)
        from_last_rank(lambda: self._save_draft(place, other))
        if why:
            self.tell(f"{why}: the draft is not published, it lies in {aside}")

    def _why_unpublished(self) -> str:
        """What speaks against serving the draft; "" for nothing (rank 0)."""
        if self.watch.stopped:
            return "the sentinel took the draft out of service (sentinel_alarm in the metrics)"
        last_step = read_metrics(self.directory.metrics_file)[-1]
        if last_step.get("draft_decision") == Reason.LOSING:
            return "at the end speculation with the draft cost more than it saved (draft_decision = losing)"
        return ""

    def _save_draft(self, place: Path, other: Path) -> None:
        """`other` holds what an earlier life of the run thought of an earlier draft."""
        with whole_folder(place) as folder:
            save_draft(self.learner.served, folder)
        if other.exists():
            remove_folder(other)  # an error is told: an old draft/ must not stay published


def check_folder(config: RunConfig) -> RunDir:
    """The run's folder, yet to be made; ConfigError when it is taken, or holds a run with other settings to resume."""
    directory = check_run_dir(config)
    newest = latest_checkpoint(directory.checkpoints)
    if newest is not None:
        check_resumed(read_counters(newest)["settings"], config)
    return directory


def read_inputs(config: RunConfig) -> Inputs:
    """Read prompts, tokenizer, reward and the weights' names and shapes.

    Raises ConfigError for anything missing or wrong; writes nothing.
    """
    folder = Path(config.policy.hf_checkpoint)
    hf_config = read_config(folder)
    check_policy(config, folder, hf_config)
    tokenizer = load_tokenizer(folder)
    longest = _longest_prompt(folder, config.rollout)
    data = config.data

    def load(path: str) -> PromptData:
        return load_prompts(
            path, data, tokenizer, max_prompt_len=longest, seed=config.seed, vocab_size=hf_config["vocab_size"]
        )

    return Inputs(
        folder,
        hf_config,
        tokenizer,
        prompts=load(data.prompt_data),
        eval_prompts=load(data.eval_prompt_data).first(data.num_eval_prompts) if config.eval_interval else (),
        reward=load_reward(data.reward, tokenizer),
        eos_token_ids=eos_token_ids(folder, tokenizer),
        draft_schedule=read_schedule(Path(path), config.num_rollout) if (path := config.draft.schedule) else {},
    )


def _longest_prompt(folder: Path, rollout: RolloutConfig) -> int:
    """Tokens. ConfigError when a whole response leaves no room for any, the length being the checkpoint's or set."""
    positions = context_length(folder, rollout)
    if rollout.max_response_len >= positions:
        raise ConfigError(
            f"rollout.max_response_len = {rollout.max_response_len} leaves no room for a prompt in the {positions} "
            f"positions of {folder}"
        )
    return positions - 1


def check_policy(config: RunConfig, folder: Path, hf_config: dict[str, Any]) -> None:
    """ConfigError for an architecture, weights, a reference or an engine that the run would refuse later."""
    check_engine_for(config, folder, hf_config)
    HFWeights(folder)
    architecture = transformer_settings(hf_config)
    rope_frequencies(hf_config, architecture["kv_channels"])
    if config.algorithm.use_kl_loss and config.policy.ref_load:
        HFWeights(Path(config.policy.ref_load))


def make_draft(
    config: RunConfig, inputs: Inputs, vocabulary: Callable[[Eagle3Config], torch.Tensor] | None = None
) -> Eagle3 | None:
    """The run's EAGLE-3 draft: read from its checkpoint, or random; None for other speculation.

    `vocabulary` gives the tokens of a random draft of reduced vocabulary; None for a draft that is only looked at.
    Raises ConfigError for one that does not fit the policy, EngineConfigError for one that the engine cannot verify.
    """
    if config.rollout.speculative_algorithm != "EAGLE3":
        return None
    draft = _read_or_random_draft(config, inputs, vocabulary)
    if config.rollout.engine == "sglang":
        check_draft_vocabulary(config.rollout, draft.config.is_reduced)
    return draft


def _read_or_random_draft(
    config: RunConfig, inputs: Inputs, vocabulary: Callable[[Eagle3Config], torch.Tensor] | None
) -> Eagle3:
    path = config.rollout.speculative_draft_model_path
    if path:
        draft = read_draft(Path(path), inputs.folder)
        check_asked(config.draft, draft, Path(path))
        return draft
    try:
        sizes = Eagle3Config.from_target(inputs.hf_config, config.draft)
    except DraftError as error:
        raise ConfigError(str(error)) from error
    target_ids = vocabulary(sizes) if vocabulary and sizes.is_reduced else None
    return Eagle3(sizes, seed=config.seed, target_ids=target_ids)


def build_run(config: RunConfig) -> Run:
    """Read the inputs, then build every part on this rank. ConfigError before anything is written."""
    device = init_distributed()
    newest = latest_checkpoint(check_folder(config).checkpoints)
    inputs = read_inputs(config)
    draft = make_draft(config, inputs, lambda sizes: run_vocabulary(config, inputs, sizes, newest))
    policy = MegatronPolicy(
        config.policy,
        config.algorithm,
        inputs.folder,
        train_iters=config.num_rollout * config.algorithm.num_steps_per_rollout,
    )
    engine_draft = copy.deepcopy(draft)
    learner = _make_learner(config, draft.to(device), policy.draft_group) if draft and policy.is_draft_rank else None
    directory, lock = _take_folder(config)
    watch = _make_watch(config, directory)
    return Run(
        config=config,
        directory=directory,
        inputs=inputs,
        policy=policy,
        engine=_start_engine(config, inputs, engine_draft, directory, lock, plain=watch.stopped),
        learner=learner,
        capture=None if draft is None else CaptureSpec(draft.config.aux_layer_ids, config.draft.capture_max_bytes),
        progress=None,
        lock=lock,
        watch=watch,
        pacer=DraftPacer(config, inputs.draft_schedule, directory.draft_schedule) if draft and rank() == 0 else None,
    )


def _take_folder(config: RunConfig) -> tuple[RunDir, RunLock | None]:
    """The run's folder, made, and on rank 0 its lock, which does not travel."""
    locks: list[RunLock] = []

    def make() -> RunDir:
        directory, lock = make_run_dir(config)
        locks.append(lock)
        return directory

    directory = from_rank_zero(make)
    return directory, locks[0] if locks else None


def _make_watch(config: RunConfig, directory: RunDir) -> SentinelWatch:
    """As the checkpoint to resume left it."""
    watch = SentinelWatch(config)
    newest = latest_checkpoint(directory.checkpoints) if config.resume else None
    if newest is not None:
        watch.resume(read_counters(newest).get("sentinel"))
    return watch


def _start_engine(
    config: RunConfig, inputs: Inputs, draft: Eagle3 | None, directory: RunDir, lock: RunLock | None, *, plain: bool
) -> RolloutEngine | None:
    """The engine on rank 0, None on the others, which fail with it. It is built last: what is built must be closed."""
    engines: list[RolloutEngine] = []

    def start() -> None:
        if plain:
            to_come = trainer_need(inputs.folder, config, None)  # a draft out of service is not trained
            engines.append(_plain_engine(config, inputs, directory, to_come))
            return
        engine = build_engine(
            inputs.folder,
            config.rollout,
            draft,
            inputs.tokenizer,
            directory.engine,
            speculation=config.speculation,
            trainer=trainer_need(inputs.folder, config, draft),
        )
        engines.append(engine)

    try:
        from_rank_zero(start)
    except (ValueError, RuntimeError, OSError, KeyboardInterrupt):  # a server takes a minute to start
        if lock is not None:
            clear_unless_resumed(config, directory)
            lock.release()
        raise
    return engines[0] if engines else None


def _plain_engine(config: RunConfig, inputs: Inputs, directory: RunDir, trainer: TrainerNeed) -> RolloutEngine:
    """What takes the engine's place after an alarm of the sentinel. The log of a server before it stays."""
    return build_engine(
        inputs.folder,
        plain_rollout(config.rollout),
        None,
        inputs.tokenizer,
        directory.engine / "without_speculation",
        trainer=trainer,
    )


def _make_learner(config: RunConfig, draft: Eagle3, group: dist.ProcessGroup) -> DraftLearner:
    rollout = config.rollout
    settings = DraftSettings(
        VerifyRule(rollout.verify_rule),
        depth=rollout.speculative_num_steps,
        min_effect=config.speculation.sentinel_min_effect,
    )
    return DraftLearner(draft, config.draft, settings, group)


def train(config: RunConfig) -> int:
    """Train, write the report, return the exit status."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS has no other way; read at its first use
        torch.use_deterministic_algorithms(True)
    run = build_run(config)
    try:
        with deferred_interrupts():
            if config.resume:
                run.restore()
            if rank() == 0:
                return _train_on_first_rank(config, run)
            loop.train(run)
            return 0
    except (ValueError, RuntimeError):
        # A run that finished no step (a reward that fails at once, say) leaves nothing in the way of the next try.
        if rank() == 0 and run.next_step == 0:
            clear_unless_resumed(config, run.directory)
        raise
    finally:
        run.close()


def _train_on_first_rank(config: RunConfig, run: Run) -> int:
    from trainer.report import write_report  # matplotlib, which only this rank needs, and none who only imports

    done = read_metrics(run.directory.metrics_file) if run.next_step else []
    resumed_at = run.next_step if config.resume else None
    print(
        f"slipstream: the policy trains in {config.policy.dtype}, attention by {run.policy.attention}", file=sys.stderr
    )
    with Progress(config.num_rollout, str(run.directory.path), lines=done) as progress:
        run.progress, run.writer = progress, MetricsWriter(run.directory.path, resumed_at)
        if run.watch.stopped:
            run.tell("speculation stays stopped after the sentinel's alarm (--speculation.sentinel false starts it)")
        loop.train(run)
        run.writer.close()
    progress.print_summary()
    print(f"report: {write_report(run.directory.path)}")
    return 0
