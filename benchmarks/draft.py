"""Accept length by rule, temperature, depth and position of given drafts, on the same text of the target.

No speculation runs: given the text, each rule's expected acceptance follows exactly from the draft's and the target's
probabilities, so drafts are compared on the same tokens and without sampling noise of their own.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    numbers,
    positive,
    positives,
    provenance,
    run,
    words,
)
from benchmarks.draft_scores import DraftScores, accept_rates, chain_rates, law_statistics, score, slope
from benchmarks.draft_texts import draw_prompts, group_requests, ngram_statistics
from benchmarks.policy import BenchPolicy, capture, load_policy, make_engine
from draft_models.checkpoint import load_draft
from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config
from draft_models.types import DraftSample, VerifyRule
from rollout_engine.config import RolloutConfig
from rollout_engine.types import FinishReason, RolloutRequest, Sample, SamplingParams
from trainer.config import ConfigError
from trainer.finetune_data import RowLimits, TextRow, TextRows, load_texts
from trainer.hf_files import read_config
from trainer.serving import eos_token_ids, load_tokenizer

Rows = list[dict[str, Any]]
SLOPE_TEMPERATURES, SLOPE_SPAN_NATS = 5, 1.0  # what a slope against entropy should rest on; with less it says so


@dataclass(frozen=True, slots=True)
class Text:
    """What the target wrote, or is taken to have written, at one temperature."""

    temperature: float
    samples: list[Sample]

    def about(self, captured: Sequence[DraftSample], k: int) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "samples": len(self.samples),
            "response_tokens": sum(len(sample.token_ids) for sample in self.samples),
            **law_statistics(captured),
            **ngram_statistics(self.samples, k),
        }


def read_data(args: argparse.Namespace) -> TextRows:
    """The rows of --data. ConfigError with file and line for a bad one."""
    tokenizer, hf_config = load_tokenizer(args.policy), read_config(args.policy)
    context = int(hf_config["max_position_embeddings"])
    limits = RowLimits(context - 1, context, int(hf_config["vocab_size"]), eos_token_ids(args.policy, tokenizer))
    return load_texts(args.data, data_config(args), args.response_key, tokenizer, limits)


def given_text(rows: Sequence[TextRow], temperature: float) -> Text:
    """Finished rollouts as they are, sampled at `temperature`."""
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(row.prompt_ids for row in rows))}
    sampling = SamplingParams(temperature=temperature)
    samples = [
        Sample(
            RolloutRequest(prompts[row.prompt_ids], i, row.prompt_ids, sampling),
            row.response_ids or (),
            (),
            (),
            FinishReason.STOP,
        )
        for i, row in enumerate(rows)
    ]
    return Text(temperature, samples)


def roll_out(args: argparse.Namespace, policy: BenchPolicy) -> list[Text]:
    """Plain decoding's responses to the same prompts at each temperature."""
    # The coupled rule's noise: text drawn with it follows the target's law like any other, and serves every rule.
    config = RolloutConfig(
        max_running_requests=args.batch_size, speculative_algorithm="NONE", verify_rule="coupled", dtype=args.dtype
    )
    engine = make_engine(policy, config)
    prompts = draw_prompts(policy.prompts, max(1, args.samples // args.samples_per_prompt), args.seed)
    texts = []
    for stream, temperature in enumerate(args.temperatures):
        sampling = SamplingParams(temperature=temperature, max_new_tokens=args.max_new_tokens)
        first = stream * len(prompts)
        requests = group_requests(prompts, args.samples_per_prompt, args.seed, sampling, first_prompt_id=first)
        texts.append(Text(temperature, sorted(engine.generate(requests), key=lambda sample: sample.request.key)))
    engine.close()
    return texts


def rows_of(scores: DraftScores, shared: Mapping[str, Any]) -> Rows:
    """One row for each rule and depth."""
    rows = []
    for (rule, k), forecast in scores.forecasts.items():
        row = {
            "kind": "acceptance",
            "rule": rule.value,
            "k": k,
            "accept_length": forecast.accept_length,
            "accept_rate_by_position": accept_rates(forecast),
            "chain_rate_by_position": chain_rates(forecast),
            "overlap_by_step": scores.steps.overlap[:k],
            "top1_by_step": scores.steps.top1[:k],
            "kl_by_step": scores.steps.kl[:k],
        }
        rows.append(row | dict(shared))
    return rows


def slopes(rows: Rows) -> Rows:
    """Slope of accept length against the target's entropy, for each draft, rule and depth with several temperatures."""
    found = []
    groups: dict[tuple[str, str, int], Rows] = {}
    for row in rows:
        groups.setdefault((row["draft"], row["rule"], row["k"]), []).append(row)
    for (draft, rule, k), members in groups.items():
        entropies = [row["target_entropy"] for row in members]
        if len(set(entropies)) < 2:
            continue
        found.append(
            {
                "kind": "slope",
                "draft": draft,
                "rule": rule,
                "k": k,
                "accept_length_per_nat": slope(entropies, [row["accept_length"] for row in members]),
                "temperatures": [row["temperature"] for row in members],
                "entropy_span": max(entropies) - min(entropies),
            }
        )
    return found


def asked(temperature: float, rules: Sequence[VerifyRule], depths: Sequence[int]) -> list[tuple[VerifyRule, int]]:
    """At temperature 0 every rule is the greedy one, and elsewhere that one does not apply."""
    fitting = [rule for rule in rules if (rule is VerifyRule.GREEDY) == (temperature == 0)]
    return [(rule, k) for rule in fitting for k in depths]


# ---- tables ----


def show(out: Console, texts: Rows, rows: Rows, slope_rows: Rows, note: str) -> None:
    table = Table(title=f"the target's text; {note}")
    for head in ("T", "tokens", "entropy, nats", "E\\[max p]", "E\\[sum p^2]", "n-gram: token 1", "tokens/verify"):
        table.add_column(head, justify="right")
    for text in texts:
        figures = [f"{text[key]:.3f}" for key in ("target_entropy", "target_max_prob", "target_sum_p2")]
        ngram = [f"{text['ngram_accept_rate_1']:.1%}", f"{text['ngram_tokens_per_verify']:.2f}"]
        table.add_row(f"{text['temperature']:g}", f"{text['response_tokens']:,}", *figures, *ngram)
    out.print(table)
    _show_acceptance(out, rows)
    if slope_rows:
        _show_slopes(out, slope_rows)


def _show_acceptance(out: Console, rows: Rows) -> None:
    """Accept length by depth; share of verify steps by position, and 1 - TV on the text's own rows, at the deepest."""
    depths = sorted({row["k"] for row in rows})
    by_depth = {(row["draft"], row["temperature"], row["rule"], row["k"]): row for row in rows}
    table = Table(title=f"expected accept length, and acceptance at k = {depths[-1]}")
    for head in ("draft", "T", "rule"):
        table.add_column(head, no_wrap=True)
    for head in (*(f"k = {k}" for k in depths), "1 - TV", *map(str, range(1, depths[-1] + 1))):
        table.add_column(head, justify="right")
    for draft, temperature, rule in dict.fromkeys(key[:3] for key in by_depth):
        found = [by_depth[draft, temperature, rule, k] for k in depths]
        lengths = [f"{row['accept_length']:.2f}" for row in found]
        rates = [f"{rate:.0%}" for rate in (found[-1]["overlap_by_step"][0], *found[-1]["accept_rate_by_position"])]
        table.add_row(draft, f"{temperature:g}", rule, *lengths, *rates)
    out.print(table)


def _show_slopes(out: Console, rows: Rows) -> None:
    table = Table(title="accept length against the target's entropy")
    for head in ("draft", "rule", "k", "per nat", "temperatures", "span, nats"):
        table.add_column(head, justify="left" if head in ("draft", "rule") else "right")
    for row in rows:
        figures = (f"{row['accept_length_per_nat']:+.2f}", str(len(row["temperatures"])), f"{row['entropy_span']:.2f}")
        table.add_row(row["draft"], row["rule"], str(row["k"]), *figures)
    out.print(table)
    thin = rows[0]
    if len(thin["temperatures"]) < SLOPE_TEMPERATURES or thin["entropy_span"] < SLOPE_SPAN_NATS:
        out.print(
            f"a slope should rest on {SLOPE_TEMPERATURES} temperatures that span {SLOPE_SPAN_NATS:g} nat: "
            "give other --temperatures"
        )


# ---- command ----


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments("benchmarks.draft", __doc__.splitlines()[0])
    add_policy_options(parser)
    add = parser.add_argument
    add("--draft", type=Path, nargs="+", action="extend", default=[], help="draft folders; a random draft is added")
    add("--data", type=Path, help="JSONL of prompts, or of finished rollouts, which are scored as they are")
    add("--response-key", default="response", help="of --data's finished rollouts")
    add("--rules", type=words, default=("greedy", "target_only", "rejection", "coupled"))
    add("--k", type=positives, default=(3, 5, 7), help="draft depths")
    add(
        "--temperatures",
        "--temperature",
        type=numbers,
        default=(0, 0.4, 0.6, 0.8, 1, 1.2),
        help="of the text; with finished rollouts: the one that they were sampled at",
    )
    add("--samples", type=positive, default=64, help="responses rolled out at each temperature")
    add("--samples-per-prompt", type=positive, default=4, help="siblings, in which an n-gram looks things up")
    add("--batch-size", type=positive, default=32, help="responses rolled out side by side")
    add("--seed", type=int, default=1)
    add("--max-new-tokens", type=positive, default=128)
    args = parser.parse_args(argv)
    known = [rule.value for rule in VerifyRule]
    for rule in args.rules:
        if rule not in known:
            parser.error(f"unknown rule {rule!r}; use some of {', '.join(known)}")
    if min(args.temperatures) < 0 or min(args.k) < 1:
        parser.error("--temperatures must not be negative, and --k at least 1")
    rules = [VerifyRule(rule) for rule in args.rules]
    if not any(asked(temperature, rules, args.k) for temperature in args.temperatures):
        parser.error(
            "the greedy rule is for temperature 0 alone, the others for temperatures above it: nothing is left"
        )
    return args


def measure(
    args: argparse.Namespace, policy: BenchPolicy, drafts: Mapping[str, Eagle3], texts: Sequence[Text]
) -> tuple[Rows, Rows]:
    """What each text is like, and a row for every draft, rule and depth on it."""
    rules = [VerifyRule(rule) for rule in args.rules]
    about_rows, rows = [], []
    for text in texts:
        if all(len(sample.token_ids) < 2 for sample in text.samples):
            raise ConfigError("the responses are all shorter than two tokens: there is nothing to draft")
        captured = {
            layers: capture(policy, text.samples, layers)
            for layers in dict.fromkeys(draft.config.aux_layer_ids for draft in drafts.values())
        }
        about_rows.append(text.about(next(iter(captured.values())), max(args.k)))
        wanted = asked(text.temperature, rules, args.k)
        if not wanted:
            continue
        for name, draft in drafts.items():
            found = score(draft, captured[draft.config.aux_layer_ids], wanted)
            rows += rows_of(found, {"draft": name, **about_rows[-1]})
    return about_rows, rows


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    given = None if args.data is None else read_data(args)
    if given is not None and not given.are_prompts and len(args.temperatures) != 1:
        raise ConfigError(
            f"{args.data} holds finished rollouts, whose acceptance is known at the temperature that they were sampled "
            "at alone: give it as --temperatures T"
        )
    prompts = None if given is None else [row.prompt_ids for row in given.rows]
    policy = load_policy(args.policy, args.prompts, data_config(args), args.dtype, args.device, prompts=prompts)
    if given is None or given.are_prompts:
        texts = roll_out(args, policy)
    else:
        texts = [given_text(given.rows[: args.samples], args.temperatures[0])]
    drafts = {str(path): load_draft(path, policy.hf_config) for path in args.draft}
    drafts["random"] = Eagle3(Eagle3Config.from_target(policy.hf_config, DraftConfig()))
    placed = {name: draft.to(policy.decoder.dtype).to(policy.decoder.device) for name, draft in drafts.items()}
    about_rows, rows = measure(args, policy, placed, texts)
    slope_rows = slopes(rows)
    show(console(), about_rows, rows, slope_rows, policy.note)
    shared = {"policy": str(args.policy), "policy_note": policy.note, "seed": args.seed}
    append_results(args.results, [shared | row for row in rows + slope_rows], provenance("benchmarks.draft"))


if __name__ == "__main__":
    run(main)
