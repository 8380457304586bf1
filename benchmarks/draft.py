"""Accept length by rule and by position of given drafts, on text that the policy itself rolled out.

No speculation runs: given the text, each rule's expected acceptance follows exactly from the draft's and the policy's
probabilities, so drafts are compared on the same tokens and without sampling noise of their own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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
    provenance,
    run,
    words,
)
from benchmarks.policy import BenchPolicy, capture, load_policy, make_engine, requests, target_statistics
from draft_models.checkpoint import load_draft
from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config
from draft_models.forecast import forecast_acceptance
from draft_models.training import accept_posteriors, make_batch
from draft_models.types import VerifyRule
from rollout_engine.config import RolloutConfig
from rollout_engine.types import Sample, SamplingParams


def roll_out(args: argparse.Namespace, policy: BenchPolicy) -> list[Sample]:
    """Plain decoding's responses, in order."""
    # Text sampled with the coupled rule's noise follows the policy's law like any other, and serves every rule: whether
    # that rule accepts depends on the very noise that chose the token.
    config = RolloutConfig(
        max_running_requests=32, speculative_algorithm="NONE", verify_rule="coupled", dtype=args.dtype
    )
    engine = make_engine(policy, config)
    sampling = SamplingParams(temperature=args.temperature, max_new_tokens=args.max_new_tokens)
    samples = list(engine.generate(requests(policy, args.samples, args.seed, sampling)))
    engine.close()
    return sorted(samples, key=lambda sample: sample.request.key)


def score(
    draft: Eagle3, policy: BenchPolicy, samples: Sequence[Sample], k: int, rules: Sequence[VerifyRule]
) -> list[dict[str, Any]]:
    """One row a rule: the accept length and the acceptance by position that an engine would show, in expectation."""
    captured = capture(policy, samples, draft.config.aux_layer_ids)
    batch = make_batch(captured)
    if batch is None:
        raise SystemExit("the policy's responses are all shorter than two tokens: there is nothing to draft")
    rows = []
    for rule in rules:
        forecast = forecast_acceptance(accept_posteriors(draft, batch, k, rule), batch.num_chains, k)
        proposed = zip(forecast.accepted_by_position, forecast.proposed_by_position, strict=True)
        rows.append(
            {
                "rule": rule.value,
                "accept_length": forecast.accept_length,
                "accept_rate_by_position": [accepted / count for accepted, count in proposed if count],
                "response_tokens": sum(len(sample.token_ids) for sample in samples),
                **target_statistics(captured),
            }
        )
    return rows


def show(out: Console, rows: Sequence[dict[str, Any]], policy: BenchPolicy, k: int) -> None:
    table = Table(title=f"expected acceptance at k = {k}")
    table.add_column("draft")
    table.add_column("rule")
    for head in ("accept length", *(f"token {j + 1}" for j in range(k))):
        table.add_column(head, justify="right")
    for row in rows:
        rates = [f"{rate:.1%}" for rate in row["accept_rate_by_position"]]
        table.add_row(row["draft"], row["rule"], f"{row['accept_length']:.3f}", *rates)
    out.print(table)
    seen = rows[0]
    out.print(
        f"policy: {policy.note}; {seen['response_tokens']} response tokens, entropy {seen['target_entropy']:.2f} nats, "
        f"E[max p] {seen['target_max_prob']:.2f}",
        markup=False,
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments("benchmarks.draft", __doc__.splitlines()[0])
    add_policy_options(parser)
    parser.add_argument("--draft", type=Path, nargs="*", default=[], help="draft folders; a random draft is added")
    parser.add_argument("--rules", type=words, default=("target_only", "rejection", "coupled"))
    parser.add_argument("--k", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64, help="responses rolled out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    policy = load_policy(args.policy, args.prompts, data_config(args), args.dtype, args.device)
    drafts = {str(path): load_draft(path, policy.hf_config) for path in args.draft}
    drafts["random"] = Eagle3(Eagle3Config.from_target(policy.hf_config, DraftConfig()))
    samples = roll_out(args, policy)
    rules = [VerifyRule(rule) for rule in args.rules]
    rows = []
    for name, draft in drafts.items():
        draft = draft.to(policy.decoder.dtype).to(policy.decoder.device)
        rows += [{"draft": name, **row} for row in score(draft, policy, samples, args.k, rules)]
    show(console(), rows, policy, args.k)
    shared = {
        "policy": str(args.policy),
        "policy_note": policy.note,
        "k": args.k,
        "temperature": args.temperature,
        "samples": args.samples,
        "seed": args.seed,
    }
    append_results(args.results, [shared | row for row in rows], provenance("benchmarks.draft"))


if __name__ == "__main__":
    run(main)
