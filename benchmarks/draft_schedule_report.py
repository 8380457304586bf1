"""The tables of `draft_schedule` from its result lines, of one process or of several.

python -m benchmarks.draft_schedule_report                 # benchmarks/results/draft_schedule.jsonl
python -m benchmarks.draft_schedule_report A.jsonl B.jsonl  # as if they were one file; of equal runs the last counts
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import RESULTS, Parser, console, half_width_95, paired_ratio, run
from trainer.config import ConfigError

MODULE = "benchmarks.draft_schedule_report"

Row = Mapping[str, Any]

COLUMNS = {  # key -> heading, format
    "accept_length": ("accept length", ".3f"),
    "token_share": ("tokens", ".0%"),
    "steps_trained": ("steps trained", ".1f"),
    "draft_share": ("draft's time", ".1%"),
    "spent_s": ("spent s", ".1f"),
    "seconds": ("whole run s", ".1f"),
}
OF_KIND = {
    "rl": {"steps_to_90": ("steps to 90 %", ".1f")},
    "shock": {
        "plateau": ("plateau", ".3f"),
        "lowest": ("lowest", ".3f"),
        "recovered_90": ("to 90 %", ".1f"),
        "recovered_100": ("to 100 %", ".1f"),
    },
    "curve": {},
    "history": {"history_share": ("verify steps of history", ".0%")},
}


def mean_of(values: Sequence[float | None], spec: str) -> str:
    """Mean and half of its 95 % interval; how many of the runs have none, where some do not."""
    found = [value for value in values if value is not None]
    if not found:
        return "never" if values else ""
    half = half_width_95(found)
    text = format(statistics.fmean(found), spec) + (f" ± {format(half, spec.lstrip('+'))}" if half is not None else "")
    return text + (f" ({len(values) - len(found)} never)" if len(found) < len(values) else "")


def show(out: Console, rows: Sequence[Row], kind: str) -> None:
    """One table of a kind's arms, over the seeds that are done."""
    columns = {**COLUMNS, **OF_KIND[kind]}
    table = Table(title=f"{kind}: mean over seeds ± half of the 95 % interval")
    table.add_column("arm")
    for heading, _ in columns.values():
        table.add_column(heading, justify="right")
    for name in dict.fromkeys(row["name"] for row in rows if row["kind"] == kind):
        of_arm = [row for row in rows if row["name"] == name]
        cells = ([row[key] for row in of_arm if key in row] for key in columns)
        texts = [mean_of(values, spec) for values, (_, spec) in zip(cells, columns.values(), strict=True)]
        table.add_row(f"{name} ({len(of_arm)})", *texts)
    if table.row_count:
        out.print(table)


def loss_of_acceptance(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """(share of the tokens trained on, share of the accept length lost against all tokens), paired by seed."""
    curve = [row for row in rows if row["kind"] == "curve"]
    whole = {row["seed"]: row["accept_length"] for row in curve if row["share"] == 1.0}
    points = []
    for share in sorted({row["share"] for row in curve} - {1.0}):
        lost = [1 - r["accept_length"] / whole[r["seed"]] for r in curve if r["share"] == share and r["seed"] in whole]
        if lost:
            points.append((share, statistics.fmean(lost)))
    return points


def point_used(rows: Sequence[Row]) -> str:
    """Where "pays" lies beside "always", from the same draft, paired by seed; empty before both are done."""
    pairs = pairs_of(rows, "pays", "always")
    if not pairs:
        return ""

    def mean(key: str) -> float:
        return statistics.fmean(pays[key] for pays, _ in pairs)

    lost = statistics.fmean(1 - pays["accept_length"] / always["accept_length"] for pays, always in pairs)
    return (
        f"point used by pays: {mean('token_share'):.1%} of the tokens, {mean('draft_share'):.1%} of the time, accept "
        f"length {lost:+.1%} lost against training on {statistics.fmean(a['token_share'] for _, a in pairs):.0%} "
        "in every step"
    )


def pairs_of(rows: Sequence[Row], name: str, other: str) -> list[tuple[Row, Row]]:
    """The lines of two arms, of the seeds that both have done."""
    ours, theirs = ({row["seed"]: row for row in rows if row["name"] == n} for n in (name, other))
    return [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


# ---- history beside the same arm without ----


def history_gains(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """By epoch of the prompts, with history against without: paired by seed and step.

    Tokens per verify and per forward are differences, a mean of each seed's steps; tokens per second is a ratio of each
    step to the same step. Steps of one run are alike, so that the ratio's interval is if anything too narrow.
    """
    pairs = pairs_of(rows, "online+history", "online")
    gains = []
    for epoch in sorted({e for ours, _ in pairs for e in ours["epoch_by_step"]}):
        by_seed = [
            (row_pair, [i for i, e in enumerate(row_pair[0]["epoch_by_step"]) if e == epoch]) for row_pair in pairs
        ]
        found: dict[str, Any] = {"epoch": epoch}
        for name in ("accept_length", "tokens_per_forward"):
            key = f"{name}_by_step"
            found[name] = [statistics.fmean(a[key][i] - b[key][i] for i in steps) for (a, b), steps in by_seed]
        found["history_share"] = [
            statistics.fmean(a["history_share_by_step"][i] for i in steps) for (a, _), steps in by_seed
        ]
        ours, theirs = (
            [pair[arm]["tokens_per_s_by_step"][i] for pair, steps in by_seed for i in steps] for arm in (0, 1)
        )
        gains.append(found | {"tokens_per_s": paired_ratio(ours, theirs)})
    return gains


def show_history(out: Console, rows: Sequence[Row]) -> None:
    gains = history_gains(rows)
    if not gains:
        return
    table = Table(title="online+history against online, paired by seed and step")
    heads = ("tokens per verify", "tokens per forward", "rollout tokens/s, ratio", "verify steps of history")
    for head in ("epoch of the prompts", *heads):
        table.add_column(head, justify="right")
    for gain in gains:
        differences = [mean_of(gain[name], "+.3f") for name in ("accept_length", "tokens_per_forward")]
        share = mean_of(gain["history_share"], ".0%")
        table.add_row(str(gain["epoch"] + 1), *differences, str(gain["tokens_per_s"]), share)
    out.print(table)


# ---- all of it ----


def show_all(out: Console, rows: Sequence[Row]) -> None:
    for kind in OF_KIND:
        show(out, rows, kind)
    show_history(out, rows)
    for share, lost in loss_of_acceptance(rows):
        out.print(f"trained on {share:.0%} of the tokens: accept length {lost:+.1%} lost against all of them")
    if point := point_used(rows):
        out.print(point)
    out.print("On a CPU, fixed depth, no plain probe: seconds are this machine's, and what is saved is a bound.")


def read_rows(files: Iterable[Path]) -> list[Row]:
    """Of equal runs, an arm with a seed, the last line. ConfigError for lines of other sizes, which do not compare."""
    rows = list(_lines(files))
    if len({json.dumps(row["plan"], sort_keys=True) for row in rows}) > 1:
        raise ConfigError('these lines are of runs of several sizes ("plan" of a line); give those of one size')
    return list({(row["name"], row["seed"]): row for row in rows}.values())


def _lines(files: Iterable[Path]) -> Iterator[Row]:
    for file in files:
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                yield json.loads(text)
            except ValueError:
                raise ConfigError(f"{file} line {number}: no JSON; it was cut off, remove it") from None


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="*", help="default: draft_schedule.jsonl of benchmarks/results")
    args = parser.parse_args(argv)
    show_all(console(), read_rows(args.files or [RESULTS / "draft_schedule.jsonl"]))


if __name__ == "__main__":
    run(main)
