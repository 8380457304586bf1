"""What history drafts add to EAGLE-3 on the embedded engine, in a prompt's first rollout and in its later epochs.

Both arms answer the same requests in one process, interleaved by seed, each on its own engine, whose history begins
empty. Beside them stand the text's own limits: a token that a sibling drew from the same law matches with E[sum p^2] on
average, and no point mass with more than E[max p].
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import (
    add_policy_options,
    append_results,
    arguments,
    console,
    data_config,
    half_width_95,
    integers,
    interleaved,
    paired_ratio,
    positive,
    positives,
    provenance,
    run,
    seconds,
)
from benchmarks.draft_scores import law_statistics
from benchmarks.draft_texts import draw_prompts, group_requests, ngram_statistics
from benchmarks.policy import BenchPolicy, capture, load_policy, make_engine, train_draft
from draft_models.checkpoint import load_draft
from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config
from draft_models.history import HistoryIndex
from rollout_engine.config import RolloutConfig, SpeculationConfig
from rollout_engine.history_plan import num_agreeing
from rollout_engine.torch_engine import TorchEngine
from rollout_engine.types import RolloutRequest, Sample, SamplingParams, SpecStats

_WALK_TOKENS, _LOOK_UPS = 1000, 10_000  # of an index that is timed alone
_TRAINING_SEED = 1 << 20  # of the draft's own prompts and texts, which no measured request has


@dataclass(frozen=True, slots=True)
class Epoch:
    """One arm's rollout of all prompts."""

    samples: list[Sample]
    time_s: float

    @property
    def spec(self) -> SpecStats:
        return sum((sample.spec for sample in self.samples), SpecStats())

    @property
    def tokens_per_s(self) -> float:
        return sum(len(sample.token_ids) for sample in self.samples) / self.time_s


def requests_of(args: argparse.Namespace, policy: BenchPolicy, seed: int) -> list[list[RolloutRequest]]:
    """By epoch: the same prompts under other ids, hence with other random numbers."""
    prompts = draw_prompts(policy.prompts, args.prompts_per_seed, seed)
    sampling = SamplingParams(temperature=args.temperature, max_new_tokens=args.max_new_tokens)
    return [
        group_requests(prompts, args.group, seed, sampling, first_prompt_id=epoch * len(prompts))
        for epoch in range(args.epochs)
    ]


def roll_out(args: argparse.Namespace, policy: BenchPolicy, draft: Eagle3, seed: int, *, history: bool) -> list[Epoch]:
    """Every epoch in turn on one engine, costs measured before the first."""
    config = RolloutConfig(
        max_running_requests=args.batch_size,
        dtype=args.dtype,
        speculative_num_steps=args.k,
        verify_rule=args.rule,
        controller=args.controller,
    )
    engine = TorchEngine(
        policy.decoder, config, draft=draft, eos_token_ids=policy.eos_token_ids, speculation=speculation(args, history)
    )
    engine.warm_up()
    epochs = []
    for requests in requests_of(args, policy, seed):
        samples: list[Sample] = []
        time_s = seconds(lambda requests=requests, samples=samples: samples.extend(engine.generate(requests)))
        epochs.append(Epoch(samples, time_s))
    engine.close()
    return epochs


def speculation(args: argparse.Namespace, history: bool) -> SpeculationConfig:
    return SpeculationConfig(
        history=history,
        history_num_steps=args.history_num_steps,
        history_min_match=args.min_match,
        history_max_match=args.max_match,
        history_min_confidence=args.min_confidence,
    )


# ---- the index alone ----


def replay(args: argparse.Namespace, epochs: Sequence[Sequence[Sample]]) -> list[dict[str, float]]:
    """By epoch: what history alone would have won on these texts, as target-only verification would have it, and times.

    Siblings grow in turns, a verify step each, as rows of a batch do; each finds the others and all earlier epochs.
    """
    found, indices = [], {}
    for samples in epochs:
        counts = _Replay()
        groups: dict[tuple[int, ...], list[Sample]] = {}
        for sample in samples:
            groups.setdefault(sample.request.prompt_ids, []).append(sample)
        for prompt, group in groups.items():
            index = indices.setdefault(prompt, HistoryIndex(args.min_match, args.max_match))
            counts.roll_out(index, group, args.history_num_steps or args.k)
        found.append(counts.figures())
    return found


class _Replay:
    def __init__(self) -> None:
        self.steps = self.verifies = self.accepted = self.first = self.tokens = 0
        self.look_up_s: list[float] = []
        self.extend_s = 0.0

    def roll_out(self, index: HistoryIndex, group: Sequence[Sample], num_tokens: int) -> None:
        texts = [[*sample.request.prompt_ids, *sample.token_ids[:1]] for sample in group]
        ends = [[*sample.request.prompt_ids, *sample.token_ids] for sample in group]
        numbers = [index.add(text) for text in texts]
        while any(len(text) < len(end) for text, end in zip(texts, ends, strict=True)):
            for text, end, number in zip(texts, ends, numbers, strict=True):
                if len(text) < len(end):
                    self._step(index, number, text, end, num_tokens)

    def _step(self, index: HistoryIndex, number: int, text: list[int], end: list[int], num_tokens: int) -> None:
        start_s = time.perf_counter()
        match = index.look_up(number, num_tokens)
        self.look_up_s.append(time.perf_counter() - start_s)
        rest = end[len(text) :]
        stood = 0 if match is None else num_agreeing(match.tokens, rest)
        self.steps, self.verifies = self.steps + 1, self.verifies + (match is not None)
        self.accepted, self.first = self.accepted + stood, self.first + (stood > 0)
        text += rest[: stood + 1]
        self.tokens += len(rest[: stood + 1])
        start_s = time.perf_counter()
        index.extend(number, text)
        self.extend_s += time.perf_counter() - start_s

    def figures(self) -> dict[str, float]:
        return {
            "history_alone_proposes": self.verifies / max(self.steps, 1),
            "history_alone_accept_rate_1": self.first / max(self.verifies, 1),
            "history_alone_tokens_per_verify": 1 + self.accepted / max(self.verifies, 1),
            "history_alone_tokens_per_forward": 1 + self.accepted / max(self.steps, 1),
            **look_up_figures(self.look_up_s),
            "extend_us_per_token": 1e6 * self.extend_s / max(self.tokens, 1),
        }


def look_up_figures(times_s: Sequence[float]) -> dict[str, float]:
    times_us = torch.tensor(times_s, dtype=torch.float64) * 1e6
    return {
        "look_ups": len(times_s),
        "look_up_p50_us": times_us.quantile(0.5).item(),
        "look_up_p99_us": times_us.quantile(0.99).item(),
        "look_up_max_us": times_us.max().item(),
    }


def big_index(args: argparse.Namespace, num_tokens: int) -> dict[str, Any]:
    """Look-ups in random walks of `num_tokens` together, where every word is followed by one of four.

    Each two words stand five times, so that nearly every look-up finds something, and several places to compare.
    """
    walks = max(1, num_tokens // _WALK_TOKENS)
    tokens = walks * _WALK_TOKENS
    rng, words = random.Random(0), tokens // 20
    texts = [_walk(rng, words, _WALK_TOKENS) for _ in range(walks)]
    index = HistoryIndex(args.min_match, args.max_match)
    build_s = seconds(lambda: [index.add(text) for text in texts])
    num_bytes = index.num_bytes
    running = [_walk(rng, words, args.max_match) for _ in range(args.batch_size)]
    numbers = [index.add(text) for text in running]
    times_s, num_found = [], 0
    for _ in range(_LOOK_UPS // args.batch_size):
        for number, text in zip(numbers, running, strict=True):
            start_s = time.perf_counter()
            match = index.look_up(number, args.history_num_steps or args.k)
            times_s.append(time.perf_counter() - start_s)
            num_found += match is not None
            text.append(_step(rng, words, text[-1]))
            index.extend(number, text)
    found = {"kind": "index", "indexed_tokens": tokens, "found": num_found / len(times_s)}
    found |= look_up_figures(times_s)
    return found | {"extend_us_per_token": 1e6 * build_s / tokens, "bytes_per_token": num_bytes / tokens}


def _walk(rng: random.Random, words: int, num_tokens: int) -> list[int]:
    text = [rng.randrange(words)]
    while len(text) < num_tokens:
        text.append(_step(rng, words, text[-1]))
    return text


def _step(rng: random.Random, words: int, token: int) -> int:
    return (4 * token + rng.randrange(4)) % words


# ---- rows ----


def rows_of(
    args: argparse.Namespace, policy: BenchPolicy, draft: Eagle3, arms: Mapping[str, Sequence[Sequence[Epoch]]]
) -> list[dict[str, Any]]:
    """A row for each epoch: both arms over all seeds, and what the text allows."""
    rows = []
    replays = [replay(args, [epoch.samples for epoch in epochs]) for epochs in arms["eagle3"]]
    for number in range(args.epochs):
        plain, both = ([epochs[number] for epochs in arms[name]] for name in ("eagle3", "eagle3+history"))
        text = [sample for epoch in plain for sample in epoch.samples]
        gains = [b.spec.tokens_per_forward - a.spec.tokens_per_forward for a, b in zip(plain, both, strict=True)]
        verify_gains = [b.spec.accept_length - a.spec.accept_length for a, b in zip(plain, both, strict=True)]
        speed = paired_ratio([epoch.tokens_per_s for epoch in both], [epoch.tokens_per_s for epoch in plain])
        ngram = [ngram_statistics(epoch.samples, args.k) for epoch in plain]
        row: dict[str, Any] = {"kind": "epoch", "epoch": number + 1, "num_seeds": len(plain)}
        row |= {"response_tokens": sum(len(sample.token_ids) for sample in text)}
        row |= law_statistics(capture(policy, text, draft.config.aux_layer_ids))
        row |= {key: _mean([found[key] for found in ngram]) for key in ngram[0]}
        row |= {key: _mean([found[number][key] for found in replays]) for key in replays[0][number]}
        row |= arm_figures("eagle3", plain) | arm_figures("both", both)
        row |= {
            "tokens_per_verify_gain": _mean(verify_gains),
            "tokens_per_verify_gain_half_width_95": half_width_95(verify_gains),
            "tokens_per_forward_gain": _mean(gains),
            "tokens_per_forward_gain_half_width_95": half_width_95(gains),
            "tokens_per_s_ratio": speed,
        }
        rows.append(row)
    return rows


def arm_figures(name: str, epochs: Sequence[Epoch]) -> dict[str, Any]:
    spec = sum((epoch.spec for epoch in epochs), SpecStats())
    found = {
        f"{name}_tokens_per_verify": spec.accept_length,
        f"{name}_tokens_per_forward": spec.tokens_per_forward,
        f"{name}_tokens_per_s": [epoch.tokens_per_s for epoch in epochs],
    }
    if name == "both":
        history = spec.history or SpecStats()
        found |= {
            "history_share": history.num_verify_steps / max(spec.num_verify_steps, 1),
            "history_tokens_per_verify": history.accept_length,
            "draft_tokens_per_verify": spec.by_draft_model.accept_length,
        }
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def show(out: Console, rows: Sequence[Mapping[str, Any]], note: str) -> None:
    table = Table(title=f"history beside EAGLE-3; {note}")
    names = [f"epoch {row['epoch']}" for row in rows]
    for head in ("", *names):
        table.add_column(head, justify="left" if head == "" else "right")

    def line(name: str, figure: Callable[[Mapping[str, Any]], str]) -> None:
        table.add_row(name, *(figure(row) for row in rows))

    line("E\\[max p], the most a point mass can", lambda row: f"{row['target_max_prob']:.3f}")
    line("E\\[sum p^2], a sibling's token", lambda row: f"{row['target_sum_p2']:.3f}")
    line("n-gram alone, tokens per verify / forward", _of("ngram"))
    line("history alone, tokens per verify / forward", _of("history_alone"))
    line("EAGLE-3, tokens per verify / forward", _of("eagle3"))
    line("EAGLE-3 + history, tokens per verify / forward", _of("both"))
    line("gain, tokens per verify", lambda row: _interval(row, "tokens_per_verify_gain"))
    line("gain, tokens per forward", lambda row: _interval(row, "tokens_per_forward_gain"))
    line("verify steps of history", lambda row: f"{row['history_share']:.0%}")
    line(
        "their tokens / the draft model's",
        lambda row: f"{row['history_tokens_per_verify']:.2f} / {row['draft_tokens_per_verify']:.2f}",
    )
    line("speed, tokens/s, ratio", lambda row: str(row["tokens_per_s_ratio"]))
    line("look-up p50 / p99, us", lambda row: f"{row['look_up_p50_us']:.1f} / {row['look_up_p99_us']:.1f}")
    line("taking in a token, us", lambda row: f"{row['extend_us_per_token']:.2f}")
    out.print(table)


def show_index(out: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title="look-ups in an index of random walks")
    for head in ("tokens", "found", "p50, us", "p99, us", "longest, us", "taking in a token, us", "bytes a token"):
        table.add_column(head, justify="right")
    for row in rows:
        times = [f"{row[f'look_up_{name}_us']:.1f}" for name in ("p50", "p99", "max")]
        extend = f"{row['extend_us_per_token']:.2f}"
        table.add_row(
            f"{row['indexed_tokens']:,}", f"{row['found']:.0%}", *times, extend, f"{row['bytes_per_token']:.0f}"
        )
    out.print(table)


def _of(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: f"{row[f'{name}_tokens_per_verify']:.2f} / {row[f'{name}_tokens_per_forward']:.2f}"


def _interval(row: Mapping[str, Any], key: str) -> str:
    half = row[f"{key}_half_width_95"]
    return f"{row[key]:+.2f}" + ("" if half is None else f" ± {half:.2f}")


# ---- command ----


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments("benchmarks.history", __doc__.splitlines()[0])
    add_policy_options(parser)
    add = parser.add_argument
    add("--draft", type=Path, help="EAGLE-3 folder; default: one is trained on the policy's own text")
    add("--train-draft-steps", type=int, default=300)
    add("--train-draft-samples", type=positive, default=128)
    add("--prompts-per-seed", type=positive, default=4)
    add("--group", type=positive, default=8, help="siblings of each prompt")
    add("--epochs", type=positive, default=2, help="times that the same prompts are answered")
    add("--seeds", type=integers, default=(0, 1, 2))
    add("--batch-size", type=positive, default=8, help="responses decoded side by side")
    add("--max-new-tokens", type=positive, default=128)
    add("--temperature", type=float, default=1.0)
    add("--rule", choices=("rejection", "target_only", "coupled"), default="rejection")
    add("--controller", choices=("adaptive", "fixed"), default="adaptive")
    add("--k", type=positive, default=3, help="depth of the draft model's chain")
    defaults = SpeculationConfig()
    add("--history-num-steps", type=int, default=defaults.history_num_steps, help="0 = --k")
    add("--min-match", type=positive, default=defaults.history_min_match)
    add("--max-match", type=positive, default=defaults.history_max_match)
    add("--min-confidence", type=float, default=defaults.history_min_confidence)
    add("--index-tokens", type=positives, default=(100_000, 1_000_000), help="sizes at which look-ups are timed alone")
    return parser.parse_args(argv)


def the_draft(args: argparse.Namespace, policy: BenchPolicy) -> Eagle3:
    """As given, or trained on plain decoding's answers to prompts in an order of their own."""
    if args.draft is not None:
        draft = load_draft(args.draft, policy.hf_config)
        return draft.to(device=policy.decoder.device, dtype=policy.decoder.dtype)
    config = DraftConfig()
    aux_layer_ids = Eagle3Config.from_target(policy.hf_config, config).aux_layer_ids
    engine = make_engine(policy, RolloutConfig(speculative_algorithm="NONE", dtype=args.dtype))
    sampling = SamplingParams(temperature=args.temperature, max_new_tokens=args.max_new_tokens)
    prompts = draw_prompts(policy.prompts, args.train_draft_samples, _TRAINING_SEED)
    texts = list(engine.generate(group_requests(prompts, 1, _TRAINING_SEED, sampling)))
    engine.close()
    captured = capture(policy, texts, aux_layer_ids)
    return train_draft(policy, captured, replace(config, lr=2e-3, max_tokens_per_update=2000), args.train_draft_steps)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    policy = load_policy(args.policy, args.prompts, data_config(args), args.dtype, args.device)
    draft = the_draft(args, policy)
    arms = {
        "eagle3": lambda seed: roll_out(args, policy, draft, seed, history=False),
        "eagle3+history": lambda seed: roll_out(args, policy, draft, seed, history=True),
    }
    rows = rows_of(args, policy, draft, interleaved(arms, args.seeds))
    indices = [big_index(args, num_tokens) for num_tokens in args.index_tokens]
    show(console(), rows, policy.note)
    show_index(console(), indices)
    about = ("temperature", "rule", "controller", "k", "history_num_steps", "batch_size", "group", "prompts_per_seed")
    shared = {"policy": str(args.policy), "policy_note": policy.note} | {key: getattr(args, key) for key in about}
    append_results(args.results, [shared | row for row in (*rows, *indices)], provenance("benchmarks.history"))


if __name__ == "__main__":
    run(main)
