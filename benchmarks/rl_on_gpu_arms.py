"""The arms of the experiment: their settings, and one run with what the analysis needs noted beside its metrics."""

from __future__ import annotations

import gc
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import copy_published_draft, seconds
from benchmarks.rl_on_gpu_analysis import Response, RunRecord, StepRecord
from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3Config
from draft_models.types import DraftSample
from rollout_engine.capture import capture_samples
from rollout_engine.config import RolloutConfig
from rollout_engine.decoder import Decoder
from rollout_engine.types import RolloutRequest, Sample
from sync.atomic import whole_folder, write_file
from trainer import loop
from trainer.config import AlgorithmConfig, DataConfig, PolicyConfig, RunConfig
from trainer.hf_files import read_config
from trainer.make_model import MakeModelConfig
from trainer.metrics import METRICS_FILE, MetricsWriter, read_metrics
from trainer.progress import Progress
from trainer.run import build_run
from trainer.run_dir import RunDir
from trainer.tasks import get_task

MAX_PROB_TOKENS = 8192  # of a step, on which E[max p] is computed
MAX_PROB_SAMPLES = 64  # of a run's last step, among which they are
START_TIMEOUT_S = 500.0  # of a server: the first on a machine compiles, longer beside other work
OFFLINE_SEED = 1_000_003  # no arm's: the offline draft must not have seen an arm's prompts in an arm's order
RECORDS_FILE, ABOUT_FILE = "responses.jsonl", "about.json"

# Graphs are captured for the same batch sizes whether an engine speculates or not.
_GRAPH_SIZES = (*range(1, 9), *range(10, 17, 2), *range(20, 33, 4), *range(40, 65, 8), *range(80, 129, 16))
SERVER_FLAGS = {
    "cuda_graph_bs_decode": [*_GRAPH_SIZES, *range(160, 513, 32)],
    # Several servers start side by side. Each takes the KV that its slots need, whatever share of the memory is free.
    "mem_fraction_static": 0.7,
}


@dataclass(frozen=True, slots=True)
class Arm:
    """What distinguishes the runs of one arm. Arms with the same `server` share one, one after another."""

    name: str
    server: str  # plain | rejection | target_only
    draft: str  # "" none | random | offline: the trained one | reduced: random, over part of the vocabulary
    trains_draft: bool = False
    trains_policy: bool = True
    train_when: str = "always"  # of a draft that is trained


OFFLINE = Arm("offline", "rejection", "random", trains_draft=True, trains_policy=False)
ARMS = {
    arm.name: arm
    for arm in (
        Arm("none", "plain", ""),
        Arm("frozen", "rejection", "offline"),
        Arm("online", "rejection", "random", trains_draft=True),
        Arm("pays", "rejection", "random", trains_draft=True, train_when="pays"),
        Arm("target_only", "target_only", "reduced", trains_draft=True),
    )
}
MAIN_ARMS = ("none", "frozen", "online", "pays")


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of the whole experiment; the defaults are for one H200."""

    engine: str = "sglang"
    dtype: str = "bfloat16"
    task: str = "ledger"
    size: str = "100m-deep"
    vocab_size: int = 4096
    context_length: int = 1280
    model_seed: int = 0
    warm_start_s: float = 110.0
    warm_start_steps: int = 0  # instead of seconds
    warm_start_lr: float = 1e-3
    warm_start_tokens: int = 10_240  # of a batch: steps, more than tokens, are what the warm start is short of
    steps: int = 15
    short_steps: int = 8  # of the arm that is there for comparison only
    prompts: int = 32
    samples: int = 8
    max_response_len: int = 1024
    num_steps: int = 3  # k, tokens drafted
    lr: float = 5e-5
    max_tokens_per_gpu: int = 16_384
    draft_lr: float = 1e-3
    draft_updates: int = 12  # 16 took 10.8 % of a step, 8 were too few to catch up within ten
    draft_tokens: int = 8192  # of one update
    offline_steps: int = 8  # rollouts of the start policy that the offline draft learns from
    offline_updates: int = 16  # on each of them
    reduced_vocab: int = 1024
    sglang_python: str = ""  # interpreter of SGLang's environment; "" = this one
    allow_lossy: bool = False  # SGLang on a CPU verifies greedily: for rehearsals there, never for figures
    sglang: dict[str, Any] = field(default_factory=dict)  # further server flags

    @property
    def requests(self) -> int:
        """All of a rollout's, in flight at once: a long tail then shows as a shrinking batch."""
        return self.prompts * self.samples


REHEARSAL = Plan(
    engine="torch",
    dtype="float32",
    task="repeat",
    size="3m",
    vocab_size=320,
    context_length=256,
    warm_start_s=0.0,
    warm_start_steps=60,
    warm_start_lr=3e-3,
    warm_start_tokens=1024,
    steps=3,
    short_steps=2,
    prompts=6,
    samples=4,
    max_response_len=48,
    lr=5e-4,
    max_tokens_per_gpu=4096,
    draft_lr=2e-3,
    draft_updates=2,
    draft_tokens=512,
    offline_steps=2,
    offline_updates=4,
    reduced_vocab=128,
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where things lie. `work` is the state on this machine; a finished run is one folder under `done`."""

    work: Path

    @property
    def policy(self) -> Path:
        return self.work / "policy"

    @property
    def runs(self) -> Path:
        return self.work / "runs"

    @property
    def done(self) -> Path:
        return self.work / "done"

    def finished(self, arm: Arm, seed: int) -> Path:
        return self.done / f"{arm.name}-{seed}"

    def draft(self, name: str) -> Path:
        return self.work / "drafts" / name


def num_steps(plan: Plan, arm: Arm) -> int:
    if arm == OFFLINE:
        return plan.offline_steps
    return plan.steps if arm.name in MAIN_ARMS else plan.short_steps


def model_config(plan: Plan, out: Path, *, trained: bool = True) -> MakeModelConfig:
    """The policy that all arms start from; untrained: the same shape and tokenizer, for a server to start with."""
    return MakeModelConfig(
        out=out,
        size=plan.size,
        task=plan.task,
        seed=plan.model_seed,
        context_length=plan.context_length,
        vocab_size=plan.vocab_size,
        warm_start_steps=plan.warm_start_steps if trained else 0,
        warm_start_s=plan.warm_start_s if trained else 0.0,
        batch_size=256,
        batch_tokens=plan.warm_start_tokens,
        lr=plan.warm_start_lr,
    )


def rollout_config(plan: Plan, arm: Arm, draft: Path | None, address: str = "", sync_dir: str = "") -> RolloutConfig:
    """The engine's settings. `draft`: the folder that it starts from; None: no speculation, or a random one."""
    return RolloutConfig(
        engine=plan.engine,
        max_running_requests=plan.requests,
        dtype=plan.dtype,
        max_response_len=plan.max_response_len,
        speculative_algorithm="EAGLE3" if arm.draft else "NONE",
        speculative_num_steps=plan.num_steps,
        speculative_draft_model_path="" if draft is None else str(draft),
        verify_rule="target_only" if arm.server == "target_only" else "rejection",
        controller="fixed",
        sglang_address=address,
        sync_dir=sync_dir,
        sglang_python=plan.sglang_python,
        allow_lossy=plan.allow_lossy,
    )


def server_config(plan: Plan, arm: Arm, draft: Path | None) -> RolloutConfig:
    """What the server of that arm is started with; runs are attached to it."""
    sizes = SERVER_FLAGS["cuda_graph_bs_decode"]
    graphs = {**SERVER_FLAGS, "cuda_graph_bs_decode": [size for size in sizes if size <= plan.requests]}
    # A scheduler without work would else poll, on a core of its own: a server waits while another arm is measured.
    flags = {"sleep_on_idle": True} | (graphs if torch.cuda.is_available() else {}) | plan.sglang
    return replace(rollout_config(plan, arm, draft), sglang=flags, sglang_start_timeout_s=START_TIMEOUT_S)


def run_config(plan: Plan, place: Place, arm: Arm, seed: int, address: str = "") -> RunConfig:
    """The run of one arm with one seed: prompts, their order and all random numbers follow from the seed."""
    draft = place.draft(arm.draft) if arm.draft in ("offline", "reduced") else None
    offline = arm == OFFLINE
    return RunConfig(
        name=f"{arm.name}-{seed}",
        run_dir=str(place.runs),
        seed=seed,
        num_rollout=num_steps(plan, arm),
        policy=PolicyConfig(
            hf_checkpoint=str(place.policy),
            dtype=plan.dtype,
            lr=plan.lr if arm.trains_policy else 0.0,
            max_tokens_per_gpu=plan.max_tokens_per_gpu,
        ),
        algorithm=AlgorithmConfig(),
        draft=DraftConfig(
            train=arm.trains_draft,
            train_when=arm.train_when,
            draft_vocab_size=plan.reduced_vocab if arm.draft == "reduced" else 0,
            unroll=plan.num_steps,
            lr=plan.draft_lr,
            updates_per_step=plan.offline_updates if offline else plan.draft_updates,
            max_tokens_per_update=plan.draft_tokens,
            compute_dtype=plan.dtype,
        ),
        rollout=rollout_config(plan, arm, draft, address, str(place.work / "sync") if address else ""),
        data=DataConfig(
            prompt_data=str(place.policy / "train.jsonl"),
            rollout_batch_size=plan.prompts,
            n_samples_per_prompt=plan.samples,
            reward=get_task(plan.task).reward,
        ),
    )


# ---- one run ----


class WatchedEngine:
    """The run's engine; notes when each response of the latest rollout finished."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.finish_s: dict[tuple[int, int], float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, requests: Iterable[RolloutRequest]) -> Iterator[Sample]:
        self.finish_s = {}
        start_s = time.perf_counter()
        for sample in self._engine.generate(requests):
            self.finish_s[sample.request.key] = time.perf_counter() - start_s
            yield sample


class WatchedPolicy:
    """The run's policy; keeps what its latest update saw, until `note` appends it as one JSON line.

    Apart, because an update runs inside the clock of its phase, and what the notes cost differs between arms.
    """

    def __init__(self, policy: Any, engine: WatchedEngine, path: Path, *, keep_tokens: bool) -> None:
        self._policy, self._engine, self._path, self._keep_tokens = policy, engine, path, keep_tokens
        self._latest: tuple[Sequence[Sample], Sequence[DraftSample], dict[tuple[int, int], float]] | None = None
        self.noted: Sequence[Sample] = ()  # the latest rollout that has its line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def update(self, samples: Sequence[Sample], capture: Any) -> Any:
        update = self._policy.update(samples, capture)
        self._latest = (samples, update.draft_samples, self._engine.finish_s)
        return update

    def note(self) -> None:
        """Write the latest update's line. To be called outside every phase."""
        if self._latest is None:
            return
        samples, captured, finish_s = self._latest
        self._latest, self.noted = None, samples  # what was captured is large
        line: dict[str, Any] = {
            "responses": [_response(sample, finish_s[sample.request.key]) for sample in samples],
            "sampled_prob": statistics.fmean(math.exp(logp) for s in samples for logp in s.logprobs),
            "max_prob": mean_max_prob(captured),
        }
        if self._keep_tokens:
            line["token_ids"] = [list(s.token_ids) for s in samples]
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


def _response(sample: Sample, finish_s: float) -> list[float]:
    forwards = sample.spec.num_decode_steps
    return [sample.request.prompt_id, round(finish_s, 5), len(sample.token_ids), forwards, sample.reward or 0.0]


class NotingWriter:
    """The run's metrics writer; a step's line, written outside every phase, brings the policy's note with it."""

    def __init__(self, writer: MetricsWriter, policy: WatchedPolicy) -> None:
        self._writer, self._policy = writer, policy

    def write(self, line: Mapping[str, Any]) -> None:
        self._policy.note()
        self._writer.write(line)

    def close(self) -> None:
        self._writer.close()


@torch.no_grad()
def mean_max_prob(captured: Sequence[DraftSample]) -> float | None:
    """E[max p] at the response tokens of the first samples, up to about MAX_PROB_TOKENS; None without any."""
    maxima: list[torch.Tensor] = []
    for sample in captured:
        logits_RV = sample.target_logits[sample.prompt_len - 1 : -1].float() / (sample.temperature or 1.0)
        maxima.append(logits_RV.softmax(-1).amax(-1))
        if sum(map(len, maxima)) >= MAX_PROB_TOKENS:
            break
    return torch.cat(maxima).mean().item() if maxima else None


def exported_max_prob(folder: Path, samples: Sequence[Sample], dtype: str) -> float | None:
    """E[max p] of a run's final policy on its last texts: known for arms whose updates capture no logits, too."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = Decoder.from_hf(folder, getattr(torch, dtype), device)
    layers = Eagle3Config.from_target(read_config(folder), DraftConfig()).aux_layer_ids
    return mean_max_prob(capture_samples(decoder, samples[:MAX_PROB_SAMPLES], layers))


def run_arm(plan: Plan, place: Place, arm: Arm, seed: int, address: str = "") -> None:
    """Run, and keep metrics, responses and the trained draft under `place.done`, whole or not at all."""
    config = run_config(plan, place, arm, seed, address)
    folder = place.runs / config.name
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off: an arm starts again
    print(f"{config.name}: {config.num_rollout} steps", flush=True)
    start_s = time.perf_counter()
    last = _train(config, folder, keep_tokens=arm == OFFLINE)
    _give_memory_back()
    about = {
        "max_prob_last": exported_max_prob(folder / "policy", last, plan.dtype),
        "arm": arm.name,
        "seed": seed,
        "seconds": time.perf_counter() - start_s,
        "device_copy_s": device_copy_s(int(read_metrics(folder / METRICS_FILE)[0]["sync_bytes"])),
        "settings": asdict(config),
    }
    if arm == OFFLINE:
        place.draft("offline").parent.mkdir(parents=True, exist_ok=True)
        copy_published_draft(RunDir(folder), place.draft("offline"))
    place.done.mkdir(parents=True, exist_ok=True)
    with whole_folder(place.finished(arm, seed)) as done:
        for name in (METRICS_FILE, RECORDS_FILE):
            shutil.copy(folder / name, done / name)
        write_file(done / ABOUT_FILE, json.dumps(about))
    shutil.rmtree(folder)


def _train(config: RunConfig, folder: Path, *, keep_tokens: bool) -> Sequence[Sample]:
    """What `trainer.run.train` does, with engine and policy watched; the last rollout."""
    run = build_run(config)
    try:
        engine = WatchedEngine(run.engine)
        policy = WatchedPolicy(run.policy, engine, folder / RECORDS_FILE, keep_tokens=keep_tokens)
        run.engine, run.policy = engine, policy
        with Progress(config.num_rollout, str(folder)) as progress:
            run.progress, run.writer = progress, NotingWriter(MetricsWriter(folder), policy)
            loop.train(run)
            run.writer.close()
    finally:
        run.close()
    return policy.noted


def _give_memory_back() -> None:
    """What the run's models held, before the next run builds its own; they refer to each other in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_copy_s(num_bytes: int, repeats: int = 9) -> float:
    """Median seconds of a plain copy of so many bytes on the device that the policy trains on."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source, target = (torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    return statistics.median(seconds(lambda: target.copy_(source)) for _ in range(repeats + 2))


def is_done(place: Place, arm: Arm, seed: int) -> bool:
    return place.finished(arm, seed).is_dir()


def read_record(folder: Path) -> RunRecord:
    """A finished run's records."""
    about = json.loads((folder / ABOUT_FILE).read_text())
    noted = [json.loads(line) for line in (folder / RECORDS_FILE).read_text().splitlines()]
    steps = [
        StepRecord(line, tuple(Response(*r) for r in beside["responses"]), beside["sampled_prob"], beside["max_prob"])
        for line, beside in zip(read_metrics(folder / METRICS_FILE), noted, strict=True)
    ]
    return RunRecord(about["arm"], about["seed"], tuple(steps), about)
