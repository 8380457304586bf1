"""The ablation's tables in Markdown, from its raw records; by default written into docs/drafters.md.

    python -m benchmarks.draft_ablation_report              # every folder of benchmarks/results/draft_ablation
    python -m benchmarks.draft_ablation_report OUT --print  # one folder, on the terminal

A cell is the mean over seeds and half of its 95 % interval (Student's t). A cell without a run stays empty, and below
the tables stands why.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, Parser, half_width_95, run
from benchmarks.draft_ablation import ABOUT, read_runs, run_name
from benchmarks.draft_ablation_arms import BASE, Arm, Plan, arms_of
from benchmarks.draft_ablation_texts import HELD_OUT
from benchmarks.draft_scores import RANK_EDGES, slope
from benchmarks.plateau import most_of
from draft_models.types import VerifyRule
from sync.atomic import write_file
from trainer.config import ConfigError

MODULE = "benchmarks.draft_ablation_report"
DOCUMENT = ROOT / "docs" / "drafters.md"
FOLDER = RESULTS / "draft_ablation"
BEGIN, END = f"<!-- {MODULE} -->", f"<!-- end of {MODULE} -->"

Record = dict[str, Any]
REJECTION, TARGET_ONLY, COUPLED = VerifyRule.REJECTION, VerifyRule.TARGET_ONLY, VerifyRule.COUPLED


@dataclass(frozen=True, slots=True)
class Ablation:
    """One folder of results."""

    about: Record
    plan: Plan
    records: tuple[Record, ...]

    @classmethod
    def read(cls, folder: Path) -> Ablation:
        """ConfigError for a folder without results."""
        if not (folder / ABOUT).exists():
            raise ConfigError(f"{folder}: no {ABOUT}; give a folder that benchmarks.draft_ablation wrote")
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        plan = Plan(**{key: tuple(v) if isinstance(v, list) else v for key, v in about["plan"].items()})
        return cls(about, plan, tuple(read_runs(folder)))

    @property
    def depth(self) -> int:
        return max(self.plan.depths)

    def of(self, arm: Arm) -> list[Record]:
        """The arm's finished runs, by seed."""
        mine = [r for r in self.records if r["arm"]["name"] == arm.name and "failed" not in r]
        return sorted(mine, key=lambda r: r["seed"])

    def whys(self, arms: Iterable[Arm]) -> list[str]:
        """Why runs of these arms are missing, one line each."""
        asked, left_out = self.about["asked"], self.about["left_out"]
        lines = []
        for arm in arms:
            runs = {r["seed"]: r.get("failed") for r in self.records if r["arm"]["name"] == arm.name}
            reasons = {}
            for seed in asked["seeds"]:
                if seed not in runs and arm.name in asked["arms"]:
                    reasons[seed] = left_out.get(run_name(arm, seed), "the call ended before it")
                elif runs.get(seed):
                    reasons[seed] = runs[seed]
            if arm.name not in asked["arms"] and not runs:
                lines.append(f"* {arm.name}: not asked for.")
            for reason in dict.fromkeys(reasons.values()):
                seeds = ", ".join(str(seed) for seed, why in reasons.items() if why == reason)
                lines.append(f"* {arm.name}, seed {seeds}: {reason}.")
        return lines


# ---- figures of one run ----


def row_of(record: Record, temperature: float, rule: VerifyRule, k: int) -> Record:
    wanted = (temperature, rule.value, k)
    return next(r for r in record["acceptance"] if (r["temperature"], r["rule"], r["k"]) == wanted)


def accept_length(record: Record, temperature: float, rule: VerifyRule, k: int) -> float:
    return row_of(record, temperature, rule, k)["accept_length"]


def updates_to_plateau(record: Record) -> float:
    """Updates until the accepted drafts per verify reach 90 % of the run's last; between scored updates by a line."""
    points = [(0, 1.0), *((p["update"], p["accept_length"]) for p in record["curve"])]
    goal = most_of(points[-1][1])
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 >= goal:
            return x0 if y0 >= goal else x0 + (x1 - x0) * (goal - y0) / (y1 - y0)
    raise AssertionError("the last point reaches the goal")


def slope_per_nat(record: Record, rule: VerifyRule, k: int, entropies: dict[float, float]) -> float:
    return slope(list(entropies.values()), [accept_length(record, t, rule, k) for t in entropies])


def cell(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and half of its interval where there are several."""
    if not values:
        return ""
    half = half_width_95(values)
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if half is None else f"{mean} ± {half:.{digits}f}"


# ---- tables ----


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def label(arm: Arm) -> str:
    return f"{arm.name}: {arm.loss.value}" if arm.name == BASE else arm.name


def text_table(ablation: Ablation) -> str:
    heads = ["T", "responses", "tokens", "p50, longest", "entropy, nats", "E[max p]", "E[sum p^2]"]
    rows = []
    for text in ablation.about["texts"]:
        if text["split"] != HELD_OUT:
            continue
        lengths = f"{text['length_p50']}, {text['length_max']}"
        law = [f"{text[key]:.3f}" for key in ("target_entropy", "target_max_prob", "target_sum_p2")]
        ngram = [f"{text['ngram_accept_rate_1']:.1%}", f"{text['ngram_tokens_per_verify']:.2f}"]
        rows.append(
            [f"{text['temperature']:g}", str(text["samples"]), f"{text['response_tokens']:,}", lengths, *law, *ngram]
        )
    return table([*heads, "n-gram: first token", "n-gram: tokens per verify"], rows)


def length_table(ablation: Ablation, arms: Sequence[Arm]) -> str:
    """Every arm on held-out text of the temperature that it was trained at."""
    depths, deepest = ablation.plan.depths, ablation.depth
    heads = ["axis", "arm", *(f"rejection, k = {k}" for k in depths), f"against {BASE}, paired"]
    heads += [f"target-only, k = {deepest}", f"coupled, k = {deepest}", "1 - TV", "updates to 90 %"]
    on_gpu = bool(ablation.about["origin"]["hardware"]["gpu"])  # a CPU is shared, and its times say little
    heads += ["ms / update"] if on_gpu else []
    base = {record["seed"]: record for record in ablation.of(arms[0])}
    rows = []
    for arm in arms:
        found, t = ablation.of(arm), arm.temperature
        gains = [
            accept_length(r, t, REJECTION, deepest) - accept_length(base[r["seed"]], t, REJECTION, deepest)
            for r in found
            if r["seed"] in base and arm.name != BASE
        ]
        row = [
            arm.axis,
            label(arm),
            *(cell([accept_length(r, t, REJECTION, k) for r in found]) for k in depths),
            cell(gains),
            *(cell([accept_length(r, t, rule, deepest) for r in found]) for rule in (TARGET_ONLY, COUPLED)),
            cell([_steps(r, t)["overlap"][0] for r in found], 3),
            cell([updates_to_plateau(r) for r in found], 0),
        ]
        rows.append(row + [cell([1e3 * r["train_s"] / arm.updates for r in found[1:] or found], 1)] * on_gpu)
    return table(heads, rows)


def _steps(record: Record, temperature: float) -> Record:
    return next(steps for steps in record["steps"] if steps["temperature"] == temperature)


def position_table(ablation: Ablation, arms: Sequence[Arm]) -> str:
    """Acceptance of each position when all before it stood."""

    def rates(record: Record, arm: Arm) -> list[float]:
        return row_of(record, arm.temperature, REJECTION, ablation.depth)["chain_rate_by_position"]

    rows = []
    for arm in arms:
        found = [rates(record, arm) for record in ablation.of(arm)]
        by_position = [[rate[j] for rate in found if j < len(rate)] for j in range(ablation.depth)]
        rows.append([label(arm), *(cell(values, 3) for values in by_position)])
    return table(["arm", *(str(j + 1) for j in range(ablation.depth))], rows)


def temperature_table(ablation: Ablation, arms: Sequence[Arm]) -> str:
    """Every draft on the text of every temperature, and how its accept length changes with the text's entropy."""
    entropies = {
        text["temperature"]: text["target_entropy"] for text in ablation.about["texts"] if text["split"] == HELD_OUT
    }
    k = ablation.depth
    rows = []
    for arm in arms:
        found = ablation.of(arm)
        lengths = [cell([accept_length(r, t, REJECTION, k) for r in found]) for t in entropies]
        by_rule = [
            cell([slope_per_nat(r, rule, k, entropies) for r in found]) for rule in (REJECTION, COUPLED, TARGET_ONLY)
        ]
        rows.append([label(arm), f"{arm.temperature:g}", *lengths, *by_rule])
    heads = [f"T {t:g} ({entropy:.2f} nats)" for t, entropy in entropies.items()]
    return table(["arm", "trained at T", *heads, "per nat: rejection", "coupled", "target-only"], rows)


def place_table(ablation: Ablation, arms: Sequence[Arm]) -> str:
    """Tokens per verification by where in the response it starts."""
    edges = [0, *RANK_EDGES]
    heads = [f"{a} to {b - 1}" for a, b in itertools.pairwise(edges)] + [f"from {edges[-1]}"]

    def places(record: Record, arm: Arm) -> list[float | None]:
        return row_of(record, arm.temperature, REJECTION, ablation.depth)["accept_length_by_rank"]

    rows = []
    for arm in arms:
        found = [places(record, arm) for record in ablation.of(arm)]
        columns = ([place[i] for place in found if place[i] is not None] for i in range(len(heads)))
        rows.append([label(arm), *(cell(values) for values in columns)])
    return table(["arm", *heads], rows)


def growth_table(ablation: Ablation, arms: Sequence[Arm]) -> str:
    """Accept length on a part of the held-out text after so many updates: whether more training would help."""
    updates = sorted({*ablation.plan.curve_at, *(arm.updates for arm in arms)})
    rows = []
    for arm in arms:
        curves = [{point["update"]: point["accept_length"] for point in r["curve"]} for r in ablation.of(arm)]
        rows.append([label(arm), *(cell([curve[n] for curve in curves if n in curve]) for n in updates)])
    return table(["arm", *map(str, updates)], rows)


# ---- the section ----


def section(ablation: Ablation) -> str:
    about, plan, arms = ablation.about, ablation.plan, arms_of(ablation.plan)
    origin, target = about["origin"], about["target"]
    hardware = origin["hardware"]
    device = hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads"
    train = [text for text in about["texts"] if text["split"] != HELD_OUT]
    tokens = ", ".join(f"{text['response_tokens']:,} tokens at T {text['temperature']:g}" for text in train)
    cut = sum(text["cut_off"] for text in about["texts"])
    parts = [
        f"### {plan.label[0].upper()}{plan.label[1:]}",
        f"`{origin['command']}`; {device}; torch {hardware['torch']}; commit {origin['commit']}; {origin['date'][:10]}."
        f" Target: {target['num_parameters'] / 1e6:.0f}M parameters ({plan.size}), task {plan.task}, warm start of "
        f"{target.get('warm_start_steps', 0)} steps. Recorded for training: {tokens}; {cut} texts of all were cut off. "
        f"An arm has {plan.updates} updates of {plan.batch_tokens:,} tokens unless its name says otherwise; "
        f"{len(ablation.records)} runs.",
        "Held-out text:",
        text_table(ablation),
        _table("Accept length, and how fast it is reached:", ablation, arms, length_table),
        _table(
            f"Acceptance by position when all before it stood, rejection, k = {ablation.depth}:",
            ablation,
            arms,
            position_table,
        ),
        _table(
            f"Accept length at k = {ablation.depth} under rejection on text of each temperature, and its slope against "
            "the target's entropy:",
            ablation,
            [arm for arm in arms if arm.axis in ("loss", "temperature", "length")],
            temperature_table,
        ),
        _table(
            f"Tokens per verification at k = {ablation.depth} by the response token where it starts:",
            ablation,
            [arm for arm in arms if arm.name == BASE or arm.axis in ("window", "length")],
            place_table,
        ),
        _table(
            f"Accept length at k = {ablation.depth} under rejection, on {plan.curve_tokens:,} tokens of the held-out "
            "text, after so many updates:",
            ablation,
            [arm for arm in arms if arm.name == BASE or arm.axis == "length"],
            growth_table,
        ),
    ]
    whys = ablation.whys(arms)
    if whys:
        parts.append("Empty cells:\n\n" + "\n".join(whys))
    return "\n\n".join(parts)


def _table(title: str, ablation: Ablation, arms: Sequence[Arm], make: Callable[[Ablation, Sequence[Arm]], str]) -> str:
    return f"{title}\n\n{make(ablation, arms)}"


def fill(document: str, text: str) -> str:
    """`document` with `text` between the two marks. ConfigError when it has none."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{DOCUMENT}: the marks {BEGIN} and {END} are missing, between which the tables go")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", help=f"default: every folder of {FOLDER.relative_to(ROOT)}")
    parser.add_argument("--print", action="store_true", help="on the terminal instead of into docs/drafters.md")
    args = parser.parse_args(argv)
    folders = args.folders or sorted((path.parent for path in FOLDER.glob(f"*/{ABOUT}")), reverse=True)
    text = "\n\n".join(section(Ablation.read(folder)) for folder in folders) or "No results yet."
    if args.print:
        print(text)
    else:
        write_file(DOCUMENT, fill(DOCUMENT.read_text(encoding="utf-8"), text))


if __name__ == "__main__":
    run(main)
