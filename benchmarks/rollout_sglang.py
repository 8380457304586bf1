"""The arms of `benchmarks.rollout --engine sglang`: rollouts through Slipstream's engine, and SGLang driven directly.

One server for each kind of speculation, all kept up on one GPU; one is measured at a time. A wave is one `generate` of
as many requests as the batch size says, from their submission to the last one's end. Before each run of an arm SGLang's
prefix cache is emptied, and with it the n-gram trie, so that no arm profits from what another arm or an earlier seed
computed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.common import data_config, interleaved, paired_ratio
from benchmarks.rollout_anchor import DirectEngine, DirectHttp, setting_differences
from benchmarks.rollout_runs import ArmRun, arm_row, joined
from draft_models.randomness import request_seed
from rollout_engine.config import RolloutConfig
from rollout_engine.sglang_checks import lossy_settings
from rollout_engine.sglang_engine import SGLangEngine
from rollout_engine.types import RolloutEngine, RolloutRequest, SamplingParams, SpecStats
from trainer.config_load import load_config, parse_flags
from trainer.data import load_prompts
from trainer.hf_files import read_config
from trainer.serving import eos_token_ids, load_tokenizer

ARMS = ("none", "eagle3", "ngram")
ANCHORS = ("engine", "http")  # SGLang's offline engine; one POST to the server that Slipstream's engine drives
OURS = "slipstream"
# What a server is told, or decides by itself, that an engine beside it must be told too; and every flag of the user
DIRECT_SETTINGS = (
    "model_path",
    "skip_tokenizer_init",
    "device",
    "dtype",
    "context_length",
    "max_running_requests",
    "max_total_tokens",
    "mem_fraction_static",
    "attention_backend",
    "sampling_backend",
    "grammar_backend",
    "page_size",
    "chunked_prefill_size",
    "disable_radix_cache",
    "disable_overlap_schedule",
    "disable_cuda_graph",
    "enable_memory_saver",
    "decode_log_interval",
    "cuda_graph_max_bs_decode",
    "disable_prefill_cuda_graph",
    "stream_interval",
    "speculative_algorithm",
    "speculative_draft_model_path",
    "speculative_num_steps",
    "speculative_eagle_topk",
    "speculative_num_draft_tokens",
    "base_gpu_id",
    "speculative_ngram_min_bfs_breadth",
    "speculative_ngram_max_bfs_breadth",
    "speculative_ngram_max_trie_depth",
    "speculative_use_rejection_sampling",
    "speculative_attention_mode",
    "speculative_draft_attention_backend",
)
# Of a GPU, unless a flag says otherwise. Servers start side by side, and each takes the KV that its places need: the
# share is a limit that none of them reaches.
MEM_FRACTION_STATIC = 0.7


@dataclass(frozen=True, slots=True)
class PromptSet:
    prompts: tuple[tuple[int, ...], ...]
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to roll out, with one kind of speculation."""

    spec: str  # of ARMS
    driver: str  # OURS, or of ANCHORS
    run: Callable[[Sequence[RolloutRequest]], ArmRun]
    flush: Callable[[], None]
    about: Mapping[str, Any] = field(default_factory=dict)  # its SGLang, for the row

    @property
    def name(self) -> str:
        return f"{self.spec}/{self.driver}"


def load_prompt_set(args: argparse.Namespace) -> PromptSet:
    """Prompts of --prompts or the policy's train.jsonl, weights left alone. ConfigError for what is not there."""
    tokenizer = load_tokenizer(args.policy)
    context = args.engine_settings.context_length or int(read_config(args.policy)["max_position_embeddings"])
    path = args.prompts or args.policy / "train.jsonl"
    longest = context - args.max_new_tokens  # every response may become as long as any other
    data = load_prompts(path, data_config(args), tokenizer, max_prompt_len=longest, seed=0)
    prompts = tuple(prompt.token_ids for prompt in data.first())
    return PromptSet(prompts, eos_token_ids(args.policy, tokenizer))


def waves_of(prompts: PromptSet, sampling: SamplingParams, batch_size: int, count: int, seed: int) -> list[list]:
    """`count` waves of `batch_size` requests. A prompt comes once in a seed as long as there are enough of them."""
    total, rows = batch_size * count, range(len(prompts.prompts))
    order = Random(seed)
    drawn = order.sample(rows, total) if total <= len(rows) else order.choices(rows, k=total)
    requests = [
        RolloutRequest(row, i, prompts.prompts[row], replace(sampling, seed=request_seed(seed, 0, row, i)))
        for i, row in enumerate(drawn)
    ]
    return [requests[i : i + batch_size] for i in range(0, total, batch_size)]


def engine_config(args: argparse.Namespace, spec: str, prompts: PromptSet) -> RolloutConfig:
    """Settings of one server: places (and graphs) for the largest batch at its longest."""
    flags: dict[str, Any] = {"sleep_on_idle": True}  # a scheduler without work would else poll, on a core of its own
    if args.device != "cpu":
        flags |= {"mem_fraction_static": MEM_FRACTION_STATIC}
    flags |= args.engine_settings.sglang
    return replace(
        args.engine_settings,
        engine="sglang",
        max_running_requests=max(args.batch_sizes),
        context_length=args.engine_settings.context_length or max(map(len, prompts.prompts)) + args.max_new_tokens,
        dtype=args.dtype,
        device=args.device,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        max_response_len=args.max_new_tokens,
        speculative_algorithm=spec.upper(),
        speculative_num_steps=args.k,
        verify_rule=args.rule,
        controller="fixed",
        allow_lossy=args.engine_settings.allow_lossy or spec == "ngram",  # its rows say so
        sglang=flags,
    )


def run_wave(engine: RolloutEngine, work: Sequence[RolloutRequest]) -> ArmRun:
    """One wave through Slipstream's engine. Nothing runs on this process's device, so there is nothing to wait for."""
    start_s = time.perf_counter()
    finished = [(time.perf_counter() - start_s, sample) for sample in engine.generate(work)]
    elapsed_s = time.perf_counter() - start_s
    samples = tuple(sample for _, sample in finished)
    spec = sum((sample.spec for sample in samples), SpecStats())
    return ArmRun(elapsed_s, tuple(len(s.token_ids) for s in samples), tuple(t for t, _ in finished), spec, samples)


def run_arm(arm: Arm, waves: Callable[[int], list[list[RolloutRequest]]], seed: int) -> ArmRun:
    """The waves of one seed, one after another, from an empty prefix cache."""
    arm.flush()
    return joined([arm.run(wave) for wave in waves(seed)])


def measure(args: argparse.Namespace, arms: Sequence[Arm], prompts: PromptSet) -> Iterator[list[dict[str, Any]]]:
    """The rows of one batch size after another. A seed that is not measured warms each arm up at each batch size."""
    sampling = SamplingParams(args.temperature, args.top_p, args.top_k, args.max_new_tokens)
    for batch_size in args.batch_sizes:
        count = max(args.waves, -(-args.min_requests // batch_size))
        waves = partial(waves_of, prompts, sampling, batch_size, count)
        callables = {arm.name: partial(run_arm, arm, waves) for arm in arms}
        for call in callables.values():
            call(args.first_seed - 1)
        runs = interleaved(callables, range(args.first_seed, args.first_seed + args.seeds))
        yield [{"batch_size": batch_size, **row} for row in rows_of(arms, runs)]


def rows_of(arms: Sequence[Arm], runs: Mapping[str, Sequence[ArmRun]]) -> list[dict[str, Any]]:
    """A row an arm: its speed against plain decoding by the same driver, and of ours also against the other drivers."""
    rows = []
    for arm in arms:
        mine = runs[arm.name]
        row = arm_row(arm.spec, mine, runs.get(f"none/{arm.driver}")) | {"driver": arm.driver, **arm.about}
        if arm.driver == OURS:
            row |= {"sampled_entropy": sampled_entropy(mine)}
        for anchor in ANCHORS:
            direct = runs.get(f"{arm.spec}/{anchor}")
            if arm.driver == OURS and direct:
                row |= against(mine, direct, anchor)
        rows.append(row)
    return rows


def against(ours: Sequence[ArmRun], direct: Sequence[ArmRun], anchor: str) -> dict[str, Any]:
    """Ours over direct. Only where both emitted the same lengths, as greedy decoding does, is the work the same too."""
    same = all(sorted(a.lengths) == sorted(b.lengths) for a, b in zip(ours, direct, strict=True))
    ratio = paired_ratio([run.tokens_per_s for run in ours], [run.tokens_per_s for run in direct])
    return {f"speed_vs_{anchor}": ratio, f"same_lengths_as_{anchor}": same}


def sampled_entropy(runs: Sequence[ArmRun]) -> float:
    """-mean log-prob of the emitted tokens, nats: at T = 1 an unbiased estimate of the policy's entropy."""
    logprobs = [logprob for run in runs for sample in run.samples for logprob in sample.logprobs]
    return -sum(logprobs) / len(logprobs)


def show(out: Console, rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    rule = "greedy" if args.temperature == 0 else args.rule
    table = Table(title=f"rollout in SGLang: rule {rule} (n-gram: target_only), k = {args.k}, T = {args.temperature}")
    heads = ("batch", "arm", "driver", "tok/s", "S [95 %]", "tau", "vs engine", "vs http", "p50/p90/p99 s", "makespan")
    for head in heads:
        table.add_column(head, justify="left" if head in ("arm", "driver") else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["batch_size"]),
            row["arm"],
            row["driver"],
            f"{row['tokens_per_s']:.0f}",
            escape(str(row.get("speed_vs_plain", ""))),
            f"{row['tau']:.2f}" if "tau" in row else "",
            *(escape(str(row.get(f"speed_vs_{anchor}", ""))) for anchor in ANCHORS),
            "/".join(f"{row[f'finish_s_p{p}']:.2f}" for p in (50, 90, 99)),
            f"{row['makespan_s']:.2f} s",
        )
    out.print(table)
    out.print(f"{args.seeds} seeds, real EOS, at most {args.max_new_tokens} new tokens, log-probs on in every arm")
    for different in {str(row["setting_differences"]) for row in rows if row.get("setting_differences")}:
        out.print(f"NOT SET ALIKE, [server, offline engine]: {different}", markup=False)
    for reason in {reason for row in rows for reason in row.get("lossy", ())}:
        out.print(f"NOT EXACT: {reason}", markup=False)


def start_servers(
    args: argparse.Namespace, prompts: PromptSet, work_dir: Path, stack: ExitStack
) -> dict[str, SGLangEngine]:
    """One for each kind of speculation, side by side. Raises EngineError when one does not start; `stack` closes all
    that did."""

    def start(spec: str) -> SGLangEngine:
        folder = work_dir / spec
        folder.mkdir(parents=True, exist_ok=True)
        engine = SGLangEngine(
            args.policy.resolve(),
            engine_config(args, spec, prompts),
            draft=args.draft.resolve() if spec == "eagle3" else None,
            eos_token_ids=prompts.eos_token_ids,
            work_dir=folder,
            serves_files=True,
        )
        stack.callback(engine.close)
        return engine

    with ThreadPoolExecutor(len(args.spec)) as pool:
        starting = {spec: pool.submit(start, spec) for spec in args.spec}
    return {spec: started.result() for spec, started in starting.items()}


def start_arms(args: argparse.Namespace, prompts: PromptSet, work_dir: Path, stack: ExitStack) -> list[Arm]:
    """Servers and anchors. The offline engines start when all servers are up, one after another."""
    arms = []
    for spec, engine in start_servers(args, prompts, work_dir, stack).items():
        config = engine_config(args, spec, prompts)
        http = DirectHttp(engine.address, prompts.eos_token_ids)
        about = about_server(http.settings()) | {"lossy": lossy_settings(config), "reproducible": False}
        arms.append(Arm(spec, OURS, partial(run_wave, engine), http.flush, about))
        if spec not in args.direct_spec:
            continue
        if "http" in args.direct:
            arms.append(Arm(spec, "http", http.run, http.flush, about))
        if "engine" in args.direct:
            arms.append(start_direct(spec, config, http, work_dir / spec, stack))
    return arms


def start_direct(spec: str, config: RolloutConfig, http: DirectHttp, folder: Path, stack: ExitStack) -> Arm:
    """SGLang's offline engine with the settings of the server behind `http`; the rows say what differs all the same."""
    settings = http.settings()
    given = {name: settings[name] for name in (*DIRECT_SETTINGS, *config.sglang) if settings.get(name) is not None}
    python = config.sglang_python or sys.executable
    # As Slipstream starts its servers: a draft's context may be shorter than the policy's
    environment = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    if config.device == "cpu":
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
    direct = DirectEngine(python, given, http.eos_token_ids, folder / "direct.log", environment)
    stack.callback(direct.close)
    about = about_server(direct.settings()) | {"lossy": lossy_settings(config), "reproducible": False}
    about |= {"setting_differences": setting_differences(settings, direct.settings())}
    return Arm(spec, "engine", direct.run, direct.flush, about)


def about_server(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Version and backends, without which a figure says little."""
    return {f"sglang_{name}": settings.get(name) for name in ("version", "attention_backend", "sampling_backend")}


def measure_all(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Start everything, yield the rows of each batch size as they come, stop everything. Raises EngineError for what
    does not start or dies."""
    prompts = load_prompt_set(args)
    with ExitStack() as stack:
        work_dir = args.work_dir or Path(stack.enter_context(TemporaryDirectory(prefix="slipstream-bench-")))
        yield from measure(args, start_arms(args, prompts, work_dir, stack), prompts)


def settings_from(rest: Sequence[str]) -> RolloutConfig:
    """Flags that the benchmark itself does not know, as `slipstream train` reads them; ConfigError if it does not."""
    positional, overrides = parse_flags(rest)
    if positional:
        raise SystemExit(f"slipstream: error: unknown argument {positional[0]}")
    return load_config(None, overrides).rollout
