"""Rollouts with and without speculation, and without Slipstream: same weights, prompts, sampling and real EOS.

With `--engine sglang` servers do the work (`benchmarks.rollout_sglang`); with the embedded engine all arms run in this
process. Either way one arm runs at a time, one after another within each seed, the first place rotating. A seed chooses
prompts and random numbers; ratios are of tokens per second, paired by seed. Of an arm with k draft tokens and rule R:
tau, the tokens emitted per verify, counts the bonus token; S is the speed against plain decoding; S/tau is what of tau
turned into speed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import rollout_sglang
from benchmarks.common import (
    add_policy_options,
    append_results,
    arguments,
    console,
    data_config,
    interleaved,
    positive,
    positives,
    provenance,
    run,
    synchronize,
    words,
)
from benchmarks.policy import BenchPolicy, capture, load_policy, make_engine, requests, target_statistics, train_draft
from benchmarks.rollout_runs import ArmRun, arm_row, running_profile
from draft_models.checkpoint import load_draft, save_draft
from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, default_aux_layer_ids
from rollout_engine.config import RolloutConfig
from rollout_engine.torch_engine import TorchEngine
from rollout_engine.types import RolloutRequest, SamplingParams, SpecStats

ARMS = ("none", "eagle3", "ngram", "hf")
SPECULATIVE_ARMS = ("eagle3", "ngram")
COST_TABLE_BUDGET_S = 5.0  # of measuring a cost table that is kept
MEASURED_SAMPLES = 32  # responses whose entropy and E[max p] are computed


def run_engine(engine: TorchEngine, work: Sequence[RolloutRequest]) -> ArmRun:
    synchronize()
    start_s = time.perf_counter()
    finished = [(time.perf_counter() - start_s, sample) for sample in engine.generate(work)]
    synchronize()
    elapsed_s = time.perf_counter() - start_s
    samples = tuple(sample for _, sample in finished)
    spec = sum((sample.spec for sample in samples), SpecStats())
    return ArmRun(elapsed_s, tuple(len(s.token_ids) for s in samples), tuple(t for t, _ in finished), spec, samples)


def run_hf(policy: BenchPolicy, work: Sequence[RolloutRequest], batch_size: int) -> ArmRun:
    """transformers.generate with its KV cache, left-padded, `batch_size` requests at a time."""
    sampling = work[0].sampling
    torch.manual_seed(sampling.seed % 2**32)
    how = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        how |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    lengths: list[int] = []
    finish_s: list[float] = []
    synchronize()
    start_s = time.perf_counter()
    for i in range(0, len(work), batch_size):
        batch = work[i : i + batch_size]
        width = max(len(r.prompt_ids) for r in batch)
        ids = [[policy.pad_token_id] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in batch]
        mask = [[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in batch]
        out = policy.hf_model.generate(
            torch.tensor(ids, device=policy.decoder.device),
            attention_mask=torch.tensor(mask, device=policy.decoder.device),
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=list(policy.eos_token_ids),
            pad_token_id=policy.pad_token_id,
            use_cache=True,
            **how,
        )
        lengths += [response_length(row, policy.eos_token_ids) for row in out[:, width:].tolist()]
        finish_s += [time.perf_counter() - start_s] * len(batch)
    synchronize()
    return ArmRun(time.perf_counter() - start_s, tuple(lengths), tuple(finish_s))


def response_length(row: Sequence[int], eos_token_ids: Sequence[int]) -> int:
    """Tokens up to the first end of sequence, itself included; what follows is padding."""
    ends = [i for i, token in enumerate(row) if token in eos_token_ids]
    return ends[0] + 1 if ends else len(row)


def arm_engine(
    args: argparse.Namespace, policy: BenchPolicy, draft: Eagle3 | None, name: str, batch_size: int
) -> TorchEngine:
    config = RolloutConfig(
        max_running_requests=batch_size,
        dtype=args.dtype,
        device=args.device,
        speculative_algorithm=name.upper(),
        speculative_num_steps=args.k,
        verify_rule=args.rule,
        controller=args.controller,
    )
    return make_engine(policy, config, draft if name == "eagle3" else None)


def save_cost_table(args: argparse.Namespace, policy: BenchPolicy, draft: Eagle3 | None) -> None:
    """Measure decode steps up to the largest batch size and `args.k` drafts, for `rollout.cost_table`."""
    name = next(name for name in SPECULATIVE_ARMS if name in args.spec)
    engine = arm_engine(args, policy, draft, name, max(args.batch_sizes))
    args.save_cost_table.parent.mkdir(parents=True, exist_ok=True)
    engine.measure_costs(COST_TABLE_BUDGET_S).save(args.save_cost_table)
    engine.close()


def make_arms(
    args: argparse.Namespace, policy: BenchPolicy, draft: Eagle3 | None, batch_size: int
) -> dict[str, Callable[[int], ArmRun]]:
    work = partial(work_of, args, policy, batch_size)
    arms: dict[str, Callable[[int], ArmRun]] = {}
    for name in args.spec:
        if name == "hf":
            arms[name] = lambda seed: run_hf(policy, work(seed), batch_size)
        else:
            arms[name] = engine_arm(arm_engine(args, policy, draft, name, batch_size), work)
    return arms


def engine_arm(engine: TorchEngine, work: Callable[[int], list[RolloutRequest]]) -> Callable[[int], ArmRun]:
    return lambda seed: run_engine(engine, work(seed))


def work_of(args: argparse.Namespace, policy: BenchPolicy, batch_size: int, seed: int) -> list[RolloutRequest]:
    sampling = SamplingParams(args.temperature, args.top_p, args.top_k, args.max_new_tokens)
    return requests(policy, max(args.min_requests, batch_size * args.waves), seed, sampling)


def trained_draft(args: argparse.Namespace, policy: BenchPolicy) -> Eagle3:
    """A draft for this policy from its own plain rollouts; with seeds that no measured rollout uses."""
    engine = make_engine(policy, RolloutConfig(max_running_requests=32, speculative_algorithm="NONE", dtype=args.dtype))
    sampling = SamplingParams(args.temperature, args.top_p, args.top_k, args.max_new_tokens)
    samples = list(engine.generate(requests(policy, args.train_draft_samples, 1_000_003, sampling)))
    engine.close()
    config = DraftConfig(unroll=args.k, lr=args.train_draft_lr)
    layers = default_aux_layer_ids(int(policy.hf_config["num_hidden_layers"]))
    return train_draft(policy, capture(policy, samples, layers), config, args.train_draft_steps)


def measure(args: argparse.Namespace, policy: BenchPolicy, draft: Eagle3 | None, batch_size: int) -> list[dict]:
    arms = make_arms(args, policy, draft, batch_size)
    for arm in arms.values():
        arm(args.first_seed - 1)  # warm-up of every arm alike, with a seed that is not measured
    runs = interleaved(arms, range(args.first_seed, args.first_seed + args.seeds))
    rows = []
    for name, arm_runs in runs.items():
        row = {"batch_size": batch_size, **arm_row(name, arm_runs, runs.get("none"))}
        if name != "hf":
            row |= {"running_batch": running_profile(arm_runs, batch_size)}
        rows.append(row)
    reference = next((r for r in runs.get("none", []) if r.samples), None)
    if reference is not None:
        seen = capture(policy, reference.samples[:MEASURED_SAMPLES], (1,))
        rows = [row | target_statistics(seen) for row in rows]
    return rows


def show(out: Console, rows: Sequence[dict[str, Any]], args: argparse.Namespace, policy: BenchPolicy) -> None:
    rule = "greedy" if args.temperature == 0 else args.rule
    table = Table(title=f"rollout: rule {rule}, k = {args.k}, {args.controller} controller, T = {args.temperature}")
    heads = ("batch", "arm", "tok/s", "S [95 %]", "tau", "S/tau", "makespan", "mean len", "max")
    for head in heads:
        table.add_column(head, justify="left" if head == "arm" else "right", no_wrap=True)
    for row in rows:
        optional = [
            f"{row['tau']:.2f}" if "tau" in row else "",
            f"{row['speed_over_tau']:.2f}" if "speed_over_tau" in row else "",
        ]
        table.add_row(
            str(row["batch_size"]),
            row["arm"],
            f"{row['tokens_per_s']:.0f}",
            escape(str(row.get("speed_vs_plain", ""))),
            *optional,
            f"{row['makespan_s']:.2f} s",
            f"{row['response_len_mean']:.1f}",
            str(row["response_len_max"]),
        )
    out.print(table)
    out.print(
        f"policy: {policy.note}; {args.seeds} seeds, real EOS, at most {args.max_new_tokens} new tokens", markup=False
    )
    for row in rows:
        if row["arm"] == "none" and "target_entropy" in row:
            running = " ".join(f"{n:.0f}" for n in row["running_batch"])
            out.print(
                f"batch {row['batch_size']}: target entropy {row['target_entropy']:.2f} nats, "
                f"E[max p] {row['target_max_prob']:.2f}; running over time: {running}",
                markup=False,
            )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments("benchmarks.rollout", __doc__.splitlines()[0])
    parser.epilog = (
        "With --engine sglang further flags go to the engine, as those of slipstream train: --sglang-NAME VALUE"
    )
    parser.add_argument("--engine", default="torch", choices=("torch", "sglang"))
    add_policy_options(parser)
    _add_work_options(parser)
    _add_torch_options(parser)
    _add_sglang_options(parser)
    args, rest = parser.parse_known_args(argv)
    known = rollout_sglang.ARMS if args.engine == "sglang" else ARMS
    args.spec = args.spec or known
    unknown = [name for name in args.spec if name not in known]
    if unknown:
        parser.error(f"--spec: unknown arm {unknown[0]!r}; arms: {', '.join(known)}")
    if args.engine == "sglang":
        args.engine_settings = rollout_sglang.settings_from(rest)
        _check_sglang(parser, args)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.save_cost_table and not set(SPECULATIVE_ARMS) & set(args.spec):
        parser.error("--save-cost-table needs the arm eagle3 or ngram in --spec")
    return args


def _add_work_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draft", type=Path, help="folder of an EAGLE-3 draft")
    parser.add_argument("--spec", type=words, help=f"arms: any of {','.join(ARMS)}; all that the engine has by default")
    parser.add_argument("--batch-sizes", type=positives, default=(1, 8, 32))
    parser.add_argument("--seeds", type=positive, default=5, help="paired repetitions")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--waves", type=positive, default=2, help="requests per place in the batch")
    parser.add_argument("--min-requests", type=positive, default=4)
    parser.add_argument("--k", type=positive, default=3, help="draft tokens of a verify step")
    parser.add_argument("--rule", default="rejection", choices=("rejection", "target_only", "coupled"))
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=positive, default=128)


def _add_torch_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("embedded engine")
    group.add_argument("--save-draft", type=Path, help="keep the draft trained here in this folder")
    group.add_argument(
        "--save-cost-table", type=Path, help="measure and keep a rollout.cost_table, of eagle3 or else of ngram"
    )
    group.add_argument("--train-draft-steps", type=int, default=200, help="without --draft: train one so long")
    group.add_argument("--train-draft-samples", type=positive, default=256, help="rollouts that it is trained on")
    group.add_argument("--train-draft-lr", type=float, default=2e-3)
    group.add_argument("--controller", default="fixed", choices=("fixed", "adaptive"))


def _add_sglang_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine sglang")
    group.add_argument(
        "--direct",
        type=words,
        default=rollout_sglang.ANCHORS,
        help="SGLang driven directly, any of engine,http; or none",
    )
    group.add_argument("--direct-spec", type=words, default=("none", "eagle3"), help="arms for which it is")
    group.add_argument("--work-dir", type=Path, help="keep the servers' logs here")


def _check_sglang(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    args.direct = () if args.direct == ("none",) else args.direct
    unknown = [name for name in args.direct if name not in rollout_sglang.ANCHORS]
    if unknown:
        parser.error(f"--direct: unknown driver {unknown[0]!r}; drivers: {', '.join(rollout_sglang.ANCHORS)}")
    if "eagle3" in args.spec and args.draft is None:
        parser.error("--engine sglang: the arm eagle3 needs --draft DIR, an EAGLE-3 draft in SGLang's form")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    shared = {
        "policy": str(args.policy),
        "rule": "greedy" if args.temperature == 0 else args.rule,
        "k": args.k,
        "temperature": args.temperature,
        "max_new_tokens": args.max_new_tokens,
        "seeds": args.seeds,
    }
    origin = provenance("benchmarks.rollout")
    for rows in sglang_rows(args) if args.engine == "sglang" else torch_rows(args):
        append_results(args.results, [shared | row for row in rows], origin)  # whatever happens to those to come
        print(f"batch size {rows[0]['batch_size']}: measured", flush=True)


def torch_rows(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The rows of one batch size after another; all of them are shown at the end."""
    policy = load_policy(args.policy, args.prompts, data_config(args), args.dtype, args.device)
    draft = None
    if "eagle3" in args.spec:
        draft = load_draft(args.draft, policy.hf_config) if args.draft else trained_draft(args, policy)
        draft = draft.to(policy.decoder.dtype).to(policy.decoder.device)
        if args.save_draft:
            save_draft(draft, args.save_draft)
    if args.save_cost_table:
        save_cost_table(args, policy, draft)
    all_rows = []
    for batch_size in args.batch_sizes:
        all_rows += (rows := measure(args, policy, draft, batch_size))
        yield [{"policy_note": policy.note, "controller": args.controller} | row for row in rows]
    show(console(), all_rows, args, policy)


def sglang_rows(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The rows of one batch size after another; all of them are shown at the end."""
    all_rows = []
    for rows in rollout_sglang.measure_all(args):
        all_rows += rows
        yield [{"engine": "sglang"} | row for row in rows]
    rollout_sglang.show(console(150), all_rows, args)


if __name__ == "__main__":
    run(main)
