"""Results of `benchmarks.rl_on_gpu`: raw records, one JSON line a finding, a Markdown summary, and a figure.

    python -m benchmarks.rl_on_gpu_report OUT/records.json.gz

makes the last three again from the first, on any machine.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import rl_on_gpu_analysis as analysis
from benchmarks.common import Parser, append_results, run
from benchmarks.rl_on_gpu_analysis import PLAIN, BucketSpeed, Response, RunRecord, StepRecord
from benchmarks.rl_on_gpu_arms import ABOUT_FILE, ARMS, OFFLINE, Place, read_record
from benchmarks.rl_on_gpu_goals import Goal, bucket_name, goals, shortfall
from sync.atomic import write_file

RECORDS, RESULTS, SUMMARY, FIGURE = "records.json.gz", "results.jsonl", "summary.md", "figure.png"

ALL_STEPS, WITHOUT_FIRST = "all", "without first"
FIRST_STEP = (
    "A run's first step also pays what is paid once, such as kernels that are tuned and memory that is first taken."
)

Rows = list[dict[str, Any]]


def write_results(place: Place, out: Path, start: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    """All files of `out` anew, from every finished run."""
    folders = sorted(path.parent for path in place.done.glob(f"*/{ABOUT_FILE}"))
    runs = [record for record in map(read_record, folders) if record.arm != OFFLINE.name]
    out.mkdir(parents=True, exist_ok=True)
    records = {"start": start, "origin": origin, "runs": [asdict(record) for record in runs]}
    aside = out / f".{RECORDS}"
    with gzip.open(aside, "wt", encoding="utf-8") as file:
        json.dump(records, file)
    shutil.move(aside, out / RECORDS)
    write_findings(out, start, origin, runs)


def read_records(path: Path) -> tuple[dict[str, Any], dict[str, Any], list[RunRecord]]:
    """Start, origin and runs, as `write_results` kept them."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        records = json.load(file)
    runs = [RunRecord(r["arm"], r["seed"], tuple(map(_step, r["steps"])), r["about"]) for r in records["runs"]]
    return records["start"], records["origin"], runs


def _step(step: Mapping[str, Any]) -> StepRecord:
    responses = tuple(Response(**response) for response in step["responses"])
    return StepRecord(step["metrics"], responses, step["sampled_prob"], step["max_prob"])


def write_findings(out: Path, start: Mapping[str, Any], origin: Mapping[str, Any], runs: Sequence[RunRecord]) -> None:
    """Result lines, summary, and the figure where matplotlib is installed."""
    arms = [name for name in ARMS if any(record.arm == name for record in runs)]
    rows = [{"kind": "start", **start}, *run_rows(runs), *finding_rows(runs, arms)]
    (out / RESULTS).unlink(missing_ok=True)
    append_results(out / RESULTS, rows, origin)
    write_file(out / SUMMARY, summary(start, origin, runs, arms))
    if not runs:
        return
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no figure: matplotlib is not installed here; elsewhere: python -m {__spec__.name} {out / RECORDS}")
        return
    from benchmarks.rl_on_gpu_figure import draw

    draw(runs, arms, out / FIGURE)


# ---- rows ----


def run_rows(runs: Sequence[RunRecord]) -> Rows:
    """One row a run: its curves over steps, and its totals."""
    return [
        {
            "kind": "run",
            "arm": record.arm,
            "seed": record.seed,
            "steps": len(record.steps),
            "seconds": record.about["seconds"],
            "device_copy_s": record.about["device_copy_s"],
            "tokens_per_s": analysis.tokens_per_s(record),
            "makespan_s": analysis.makespan_s(record),
            "reward_by_step": [analysis.mean_reward(step)[0] for step in record.steps],
            "sampled_prob_by_step": [step.sampled_prob for step in record.steps],
            "max_prob_last": record.about.get("max_prob_last"),
            "max_prob_by_step": [step.max_prob for step in record.steps if step.max_prob is not None],
            **{f"{key}_by_step": analysis.accept_lengths(record, key) for key in CURVES},
            "accept_rate_by_position_by_step": [
                step.metrics["accept_rate_by_position"]
                for step in record.steps
                if "accept_rate_by_position" in step.metrics
            ],
        }
        for record in runs
    ]


CURVES = (
    "accept_length",
    "expected_accept_length",
    "tokens_per_s",
    "response_len_mean",
    "response_len_p50",
    "response_len_p99",
    "entropy",
    "logp_diff_mean",
    "logp_diff_max",
    "time_rollout_s",
    "time_policy_s",
    "time_draft_s",
    "sync_time_s",
)


def finding_rows(runs: Sequence[RunRecord], arms: Sequence[str]) -> Rows:
    """Speed-ups, buckets, phases, reward tests, syncs, the catching up and the goals, as far as the runs allow."""
    rows = [{"steps": steps, **row} for steps, some in both(runs) for row in speed_rows(some, arms)]
    for name in arms:
        sync = analysis.sync_speed([record for record in runs if record.arm == name])
        if sync:
            rows.append({"kind": "sync", "arm": name, **asdict(sync), "over_copy": sync.over_copy})
        found = analysis.reward_test(runs, name) if name != PLAIN else None
        if found:
            rows.append({"kind": "reward_test", **asdict(found)})
    caught = analysis.catch_up(runs, "online", "frozen")
    rows += [{"kind": "catch_up", **asdict(caught)}] if caught else []
    return rows + [{"kind": "goal", **asdict(goal)} for goal in goals(runs, arms)]


def both(runs: Sequence[RunRecord]) -> tuple[tuple[str, Sequence[RunRecord]], ...]:
    """Over all steps, and without each run's first, by name."""
    return (ALL_STEPS, runs), (WITHOUT_FIRST, analysis.without_first(runs))


def speed_rows(runs: Sequence[RunRecord], arms: Sequence[str]) -> Rows:
    rows: Rows = []
    for name in arms:
        ours = [record for record in runs if record.arm == name]
        if not ours:
            continue
        phases = analysis.phase_medians_s(ours)
        rows.append({"kind": "phases", "arm": name, "median_s": phases, "draft_share": analysis.draft_share(ours)})
        found = analysis.speedup(runs, name) if name != PLAIN else None
        if found:
            rows.append({"kind": "speedup", **asdict(found)})
            rows += [{"kind": "bucket", "arm": name, **asdict(row)} for row in buckets(runs, name)]
    return rows


def buckets(runs: Sequence[RunRecord], arm: str) -> list[BucketSpeed]:
    ours, plain = analysis.matched(runs, arm, PLAIN)
    return analysis.bucket_speeds(ours, plain) if ours else []


# ---- summary ----


def summary(start: Mapping[str, Any], origin: Mapping[str, Any], runs: Sequence[RunRecord], arms: Sequence[str]) -> str:
    """The findings as Markdown, every table with its n."""
    hardware = origin["hardware"]
    parts = [
        "# RL with and without speculative rollouts",
        f"`{origin['command']}`; {hardware['gpu'] or hardware['cpu']}; commit {origin['commit']}; {origin['date']}",
        _start_text(start, origin["plan"]),
    ]
    if runs:
        parts += [_goal_table(goals(runs, arms))]
        parts += [_speed_table(runs, arms), _bucket_table(runs, arms), _phase_table(runs, arms)]
        parts += [_accept_table(runs, arms), _reward_table(runs, arms), _agreement_table(runs, arms)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _start_text(start: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    return (
        f"Start policy: {start['num_parameters'] / 1e6:.0f}M parameters ({plan['size']}), task {plan['task']}, warm "
        f"start {start['warm_start_s']:.0f} s ({start['warm_start_steps']} steps, {start['warm_start_tokens']:,} "
        f"tokens). On {start['num_responses']} responses at T = 1: reward {start['reward']:.3f}, E[max p] "
        f"{start['max_prob']:.3f}, entropy {start['entropy']:.3f} nats, E[sum p^2] {start['sampled_prob']:.3f}; length "
        f"mean {start['mean']:.0f}, p50 {start['p50']}, p90 {start['p90']}, p99 {start['p99']}, "
        f"{start['truncated']:.1%} cut off; an n-gram guesses {start['ngram_hits_siblings']:.1%} of tokens from "
        f"siblings, {start['ngram_hits_all']:.1%} from all earlier responses. The offline draft learned from "
        f"{start['draft_tokens']:,} tokens in {start['draft_updates']} updates ({start['draft_s']:.1f} s of training); "
        f"its accept length went from {start['accept_length_first']:.2f} to {start['accept_length_last']:.2f}."
    )


def _goal_table(found: Sequence[Goal]) -> str:
    verdicts = {True: "met", False: "not met", None: "not decided"}
    rows = [[goal.goal, verdicts[goal.met], goal.found] for goal in found]
    return "## Goals\n\n" + _table(["goal", "", "found"], rows) if rows else ""


def _speed_table(runs: Sequence[RunRecord], arms: Sequence[str]) -> str:
    rows = []
    for name, steps, some in ((name, steps, some) for name in arms for steps, some in both(runs)):
        ours = [record for record in some if record.arm == name]
        if not ours:
            continue
        found = analysis.speedup(some, name) if name != PLAIN else None
        rows.append(
            [
                name,
                steps,
                f"{len(ours)} x {min(len(record.steps) for record in ours)}",
                f"{_mean([analysis.tokens_per_s(record) for record in ours]):,.0f}",
                f"{_mean([analysis.makespan_s(record) for record in ours]):.2f}",
                f"{found.tokens_per_s} (n {found.num_pairs})" if found else "",
                ", ".join(f"{ratio:.2f}" for ratio in found.tokens_per_s_by_seed) if found else "",
                str(found.makespan) if found else "",
                str(found.step) if found else "",
            ]
        )
    head = [
        "arm",
        "steps",
        "seeds x steps",
        "rollout tokens/s",
        "makespan s",
        "S (tokens/s)",
        "whole run, by seed",
        "S (makespan)",
        "whole RL step, none / arm",
    ]
    told = (
        "Ratios against `none`, paired by seed and step: geometric mean [95 %, Student's t; steps of one seed are not "
        "quite independent]. The whole RL step is the sum of its phases, without evaluation and checkpoint. "
        + FIRST_STEP
    )
    return f"## Rollout speed\n\n{told}\n\n{_table(head, rows)}"


def _bucket_table(runs: Sequence[RunRecord], arms: Sequence[str]) -> str:
    by_arm = {name: buckets(analysis.without_first(runs), name) for name in arms if name != PLAIN}
    rows = [
        [
            name,
            bucket_name(row.bucket),
            f"{row.share_of_time:.0%}",
            f"{row.speedup} (n {row.num_pairs})",
            f"{row.plain_forward_ms:.2f}",
            f"{row.forward_ms:.2f}",
            f"{row.tokens_per_forward:.2f}",
            f"{row.needed:.2f}",
        ]
        for name, found in by_arm.items()
        for row in found
    ]
    if not rows:
        return ""
    head = ["arm", "live", "of its time", "S", "decode ms", "draft + verify ms", "tokens/forward", "needed for S = 1"]
    told = (
        "Each run's first step left out. The prefill of all prompts falls into each rollout's largest bucket, in both "
        "arms: its step times and its S hold it."
    )
    slower = [line for name, found in by_arm.items() for line in shortfall(name, found)]
    why = (
        "\n\nWhere S < 1 (the mean of the steps' ratios; times and tokens are of all steps together, so that noise can "
    )
    why += "part the two):\n\n" + "\n".join(f"* {line}" for line in slower)
    return f"## By live requests\n\n{_table(head, rows)}\n\n{told}{why if slower else ''}"


def _phase_table(runs: Sequence[RunRecord], arms: Sequence[str]) -> str:
    groups = {(name, steps): [r for r in some if r.arm == name] for name in arms for steps, some in both(runs)}
    medians = {key: analysis.phase_medians_s(some) for key, some in groups.items() if some}
    phases = sorted({phase for found in medians.values() for phase in found})
    rows = [
        [
            *key,
            *(f"{found.get(phase, 0.0):.3f}" for phase in phases),
            f"{sum(found.values()):.2f}",
            f"{analysis.draft_share(groups[key]):.1%}",
        ]
        for key, found in medians.items()
    ]
    head = ["arm", "steps", *phases, "sum", "draft update (frozen: scoring only), of the RL step"]
    return f"## Seconds of a step\n\nMedian by phase. {FIRST_STEP}\n\n{_table(head, rows)}"


def _accept_table(runs: Sequence[RunRecord], arms: Sequence[str]) -> str:
    rows = []
    for name in arms:
        curves = [analysis.accept_lengths(record) for record in runs if record.arm == name]
        curve = analysis.mean_curve(curves)
        if not curve:
            continue
        expected = analysis.mean_curve(
            [analysis.accept_lengths(record, "expected_accept_length") for record in runs if record.arm == name]
        )
        last = [record.steps[-1].metrics["accept_rate_by_position"] for record in runs if record.arm == name]
        rates = ", ".join(f"{rate:.2f}" for rate in analysis.mean_curve(last))
        gap = max((abs(a - b) for a, b in zip(curve, expected, strict=False)), default=0.0)
        rows.append([name, f"{curve[0]:.2f}", f"{_mean(curve):.2f}", f"{curve[-1]:.2f}", rates, f"{gap:.3f}"])
    if not rows:
        return ""
    head = ["arm", "first step", "mean", "last step", "by position, last step", "largest gap to the forecast"]
    text = "## Accept length\n\nTokens per verify, the bonus token included; means over seeds.\n\n" + _table(head, rows)
    caught = analysis.catch_up(runs, "online", "frozen")
    if caught is None:
        return text
    when = "at no step" if caught.first_step is None else f"first at step {caught.first_step} (from 0)"
    return text + (
        f"\n\nThe online draft is at 90 % of the frozen one {when}; after that it is below the frozen one in "
        f"{caught.steps_below_after} of {caught.steps_after} steps; at the end it is at {caught.final_ratio:.0%} (mean "
        f"of {caught.num_seeds} seeds)."
    )


def _reward_table(runs: Sequence[RunRecord], arms: Sequence[str]) -> str:
    rows = []
    for name in arms:
        if name == PLAIN or (found := analysis.reward_test(runs, name)) is None:
            continue
        first = ", ".join("-" if z is None else f"{z:+.2f}" for z in found.z_first_steps)
        rows.append(
            [
                name,
                f"{found.num_seeds} x {found.num_steps}",
                first,
                "-" if found.rms_z is None else f"{found.rms_z:.2f}",
                f"{found.num_outside} of {found.num_z}",
                f"{found.mean_difference:+.4f}",
                ", ".join(f"{d:+.4f}" for d in found.difference_by_seed),
                f"{found.rms_difference:.3f}",
                "-" if found.seed_spread is None else f"{found.seed_spread:.3f}",
            ]
        )
    if not rows:
        return ""
    head = ["arm", "seeds x steps", "z at step 0", "rms z", "abs(z) > 1.96", "mean difference", "by seed"]
    head += ["rms difference", "rms between seeds of none"]
    return (
        "## Reward against plain decoding\n\nSame prompts at the same step; z counts sampling noise alone, so 1 is "
        "expected at step 0, and more later, when each run has learned from samples of its own.\n\n"
        + _table(head, rows)
    )


def _agreement_table(runs: Sequence[RunRecord], arms: Sequence[str]) -> str:
    rows = []
    for name in arms:
        ours = [record for record in runs if record.arm == name]
        sync = analysis.sync_speed(ours)
        lines = [step.metrics for record in ours for step in record.steps]
        first = [record.steps[0].max_prob for record in ours if record.steps[0].max_prob is not None]
        last = [record.about["max_prob_last"] for record in ours if record.about.get("max_prob_last") is not None]
        rows.append(
            [
                name,
                f"{_mean([line['reward'] for line in (r.steps[0].metrics for r in ours)]):.3f}",
                f"{_mean([line['reward'] for line in (r.steps[-1].metrics for r in ours)]):.3f}",
                f"{_mean([r.steps[0].metrics['entropy'] for r in ours]):.3f}",
                f"{_mean([r.steps[-1].metrics['entropy'] for r in ours]):.3f}",
                f"{f'{_mean(first):.3f}' if first else '-'}, {f'{_mean(last):.3f}' if last else '-'}",
                f"{_mean([line['logp_diff_mean'] for line in lines]):.2e}",
                f"{max(line['logp_diff_max'] for line in lines):.2e}",
                "-" if sync is None else f"{sync.median_ms:.1f} ({sync.gb_per_s:.1f} GB/s, n {sync.num_syncs})",
                "-" if sync is None else f"{sync.phase_ms:.1f}",
                "-" if sync is None else f"{sync.copy_ms:.2f}",
            ]
        )
    head = ["arm", "reward first", "last", "entropy first", "last", "E[max p] first, last", "mean dlogp", "max dlogp"]
    head += ["sync ms", "sync phase ms", "plain device copy ms"]
    told = (
        "dlogp = abs(logp_train - logp_rollout), nats. E[max p], first: in the update, where a draft captures the "
        "policy's logits (`none` begins with the same policy); last: of the exported policy on the last rollout's "
        "texts. Sync ms: casting, checksums, the way to the engine, its pause, its checks of both models and its "
        "answer; the phase also exports the weights from the trainer."
    )
    return f"## Policy and sync\n\n{told}\n\n{_table(head, rows)}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks.rl_on_gpu_report", description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, help="records.json.gz of a run")
    path = parser.parse_args(argv).records
    start, origin, runs = read_records(path)
    write_findings(path.parent, start, origin, runs)


if __name__ == "__main__":
    run(main)
