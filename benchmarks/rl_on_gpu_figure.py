"""The figure of `benchmarks.rl_on_gpu`: eight panels, one PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks import rl_on_gpu_analysis as analysis
from benchmarks.rl_on_gpu_analysis import PLAIN, RunRecord, StepRecord
from benchmarks.rl_on_gpu_goals import bucket_name
from benchmarks.rl_on_gpu_report import buckets

COLOURS = {"none": "#6b7280", "frozen": "#d97706", "online": "#2563eb", "pays": "#0f766e", "target_only": "#9d5bc0"}
LABELS = {
    "none": "no speculation",
    "frozen": "EAGLE-3, trained before, frozen",
    "online": "EAGLE-3, online from random",
    "pays": "EAGLE-3, online when it pays",
    "target_only": "online, target-only rule, reduced vocabulary",
}
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "font.size": 9}


def draw(runs: Sequence[RunRecord], arms: Sequence[str], path: Path) -> None:
    """Above: reward, acceptance, speed; below: where time goes, and whether the policy is well."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(16, 7), layout="constrained")
        axes = figure.subplots(2, 4)
        _curves(axes[0, 0], runs, arms, lambda step: analysis.mean_reward(step)[0], "mean reward")
        _curves(axes[0, 1], runs, arms, lambda step: step.metrics.get("accept_length"), "accept length (tokens/verify)")
        _positions(axes[0, 2], runs, [name for name in arms if name != PLAIN])
        _speedups(axes[0, 3], runs, arms)
        _curves(axes[1, 0], runs, arms, lambda step: step.tokens / step.rollout_s, "rollout tokens/s")
        _phases(axes[1, 1], runs, arms)
        _curves(
            axes[1, 2], runs, arms, lambda step: step.metrics["logp_diff_mean"], "mean |logp train - rollout|, nats"
        )
        _curves(axes[1, 3], runs, arms, lambda step: step.metrics["entropy"], "entropy, nats (dotted: E[max p])")
        _curves(axes[1, 3], runs, arms, lambda step: step.max_prob, linestyle=":")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(arms), frameon=False)
        figure.savefig(path, dpi=110)


def _positions(axes: Axes, runs: Sequence[RunRecord], arms: Sequence[str]) -> None:
    """Acceptance of each draft token over steps, mean of the seeds: solid the first, fainter the later ones."""
    for name in arms:
        steps = [[step.metrics["accept_rate_by_position"] for step in run.steps] for run in runs if run.arm == name]
        depth = min(len(rates) for curve in steps for rates in curve)
        for position in range(depth):
            mean = analysis.mean_curve([[rates[position] for rates in curve] for curve in steps])
            axes.plot(mean, color=COLOURS[name], alpha=1 - 0.6 * position / max(1, depth - 1))
    axes.set_title("acceptance of draft tokens 1, 2, ... (fainter)")
    axes.set_xlabel("RL step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _curves(
    axes: Axes,
    runs: Sequence[RunRecord],
    arms: Sequence[str],
    value: Callable[[StepRecord], float | None],
    title: str = "",
    linestyle: str = "-",
) -> None:
    """Thin: each seed; thick: the mean of the seeds."""
    for name in arms:
        curves = [[v for v in map(value, record.steps) if v is not None] for record in runs if record.arm == name]
        mean = analysis.mean_curve(curves)
        if not mean:
            continue
        for curve in curves:
            axes.plot(curve, color=COLOURS[name], linewidth=0.7, alpha=0.5, linestyle=linestyle)
        label = LABELS[name] if linestyle == "-" else None
        axes.plot(mean, color=COLOURS[name], linewidth=2, linestyle=linestyle, label=label)
    if title:
        axes.set_title(title)
    axes.set_xlabel("RL step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _speedups(axes: Axes, runs: Sequence[RunRecord], arms: Sequence[str]) -> None:
    speculative = [name for name in arms if name != PLAIN]
    names = [bucket_name(bucket) for bucket in analysis.BUCKETS]
    for i, name in enumerate(speculative):
        for row in buckets(analysis.without_first(runs), name):
            x = names.index(bucket_name(row.bucket)) + (i - (len(speculative) - 1) / 2) * 0.25
            axes.bar(x, row.speedup.mean, width=0.23, color=COLOURS[name])
            axes.text(x, row.speedup.mean, f"{row.speedup.mean:.2f}", ha="center", va="bottom", fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_xlabel("live requests")
    axes.set_title("rollout speed / plain (first steps left out)")


def _phases(axes: Axes, runs: Sequence[RunRecord], arms: Sequence[str]) -> None:
    medians = {
        name: analysis.phase_medians_s(analysis.without_first([r for r in runs if r.arm == name])) for name in arms
    }
    phases = sorted(
        {p for found in medians.values() for p in found}, key=lambda p: -max(m.get(p, 0) for m in medians.values())
    )
    left = [0.0] * len(arms)
    for phase in phases:
        widths = [medians[name].get(phase, 0.0) for name in arms]
        axes.barh(arms, widths, left=left, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_title("seconds of a step, median without the first")
    axes.legend(fontsize=7, frameon=False)
