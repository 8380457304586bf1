"""The smallest loss of acceptance that the sentinel sees, reckoned and then simulated, and what a look costs.

A draft accepts with the chances of --acceptance at every place, the engine with less. A run is seen when its first
look, of so many verify steps, raises the alarm. The reckoned loss is seen about half the time; beside it stands how
often it was seen in simulated runs, and how often half as much again was; in the last column the loss that is seen as
fast after 100 sound looks.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence

import torch
from rich.table import Table

from benchmarks.common import append_results, arguments, console, numbers, positives, provenance, run
from draft_models.sentinel import Look, Sentinel, look_at_counts, look_at_traces, visible_change

RUNS = 100


def decode(rates: torch.Tensor, num_steps: int, generator: torch.Generator) -> list[int]:
    """Accepted drafts of each verify step."""
    stands_SK = torch.rand(num_steps, len(rates), generator=generator, dtype=torch.float64) < rates
    return stands_SK.long().cumprod(1).sum(1).tolist()


def look(forecast: torch.Tensor, texts: Sequence[Sequence[int]], min_effect: float, *, traced: bool) -> Look:
    """At texts that were decoded so, told step by step or as histograms."""
    depth, lengths = len(forecast), [sum(accepted) + len(accepted) for accepted in texts]
    chances = forecast.expand(sum(lengths), -1)
    if traced:
        told = [array("h", [number for n in accepted for number in (depth, n, n + 1)]).tobytes() for accepted in texts]
        return look_at_traces(chances, lengths, told, min_effect)
    return look_at_counts(chances, lengths, [[t.count(n) for n in range(depth + 1)] for t in texts], min_effect)


def seen(forecast: torch.Tensor, loss: float, num_steps: int, alpha: float, min_effect: float) -> float:
    """Share of simulated runs whose first look raises the alarm."""
    generator = torch.Generator().manual_seed(num_steps)
    rates, alarms = (forecast - loss).clamp(min=0), 0
    for _ in range(RUNS):
        found = look(forecast, [decode(rates, num_steps, generator)], min_effect, traced=True)
        alarms += Sentinel(alpha).take(found, 0) is not None
    return alarms / RUNS


def look_cpu_seconds(forecast: torch.Tensor, num_texts: int, num_tokens: int, *, traced: bool) -> float:
    """Of the statistics alone, at texts of about that length; a draft's forward comes on top where none is there."""
    accepted = decode(forecast, num_tokens // 2, torch.Generator().manual_seed(0))
    start_s = time.process_time()
    look(forecast, [accepted] * num_texts, 0.02, traced=traced)
    return time.process_time() - start_s


def main() -> None:
    parser = arguments("benchmarks.sentinel", __doc__)
    parser.add_argument("--acceptance", type=numbers, default=(0.75, 0.7, 0.65), help="by position, of those reached")
    parser.add_argument(
        "--steps", type=positives, default=(500, 1000, 2000, 5000, 20000), help="verify steps of a look"
    )
    parser.add_argument("--alpha", type=float, default=1e-3)
    parser.add_argument("--min-effect", type=float, default=0.02)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    forecast = torch.tensor(args.acceptance, dtype=torch.float64)
    rows = []
    shown = Table(
        "verify steps", "reckoned loss", "seen", "1.5 x that seen", "after 100 looks", title="acceptance lost"
    )
    for num_steps in args.steps:
        loss = visible_change(args.acceptance, num_steps, alpha=args.alpha, min_effect=args.min_effect)
        late = visible_change(args.acceptance, num_steps, alpha=args.alpha / 100**2, min_effect=args.min_effect)
        shares = [seen(forecast, part * loss, num_steps, args.alpha, args.min_effect) for part in (1.0, 1.5)]
        rows.append({"verify_steps": num_steps, "loss": loss, "seen": shares, "after_100_looks": late})
        shown.add_row(str(num_steps), f"{loss:.4f}", f"{shares[0]:.0%}", f"{shares[1]:.0%}", f"{late:.4f}")
    console().print(shown)
    for texts, tokens in ((64, 64), (16, 1024), (4, 4096)):
        told, counted = (look_cpu_seconds(forecast, texts, tokens, traced=traced) for traced in (True, False))
        rows.append({"texts": texts, "tokens": tokens, "traced_cpu_s": told, "counted_cpu_s": counted})
        kinds = f"{told:.3f} s where the engine tells its steps, {counted:.3f} s from histograms"
        console().print(f"CPU time of a look at {texts} texts of {tokens} tokens: {kinds}")
    append_results(args.results, rows, provenance("benchmarks.sentinel"))


if __name__ == "__main__":
    run(main)
