"""The report's figures: metrics lines in, inline SVG out.

Colours are CSS variables, so that one figure serves a light and a dark page: matplotlib draws with marker colours, and
`to_svg` replaces each by its variable. Text stays text. Each figure returns None when the run has nothing to show.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from trainer.progress import phase_seconds

Lines = Sequence[Mapping[str, Any]]

# Marker colour -> CSS variable. Each must be unlike any colour that matplotlib chooses by itself.
INK, MUTED, GRID = "#111213", "#717273", "#d1d2d3"
SERIES = ("#2a6f01", "#2a6f02", "#2a6f03", "#2a6f04", "#2a6f05", "#2a6f06", "#2a6f07", "#2a6f08")
CSS_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {c: f"--c{i + 1}" for i, c in enumerate(SERIES)}

LEGEND_CHARACTERS = 88  # of one row, the space of each entry's mark (9) included
STYLE = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}

SMOOTHED_STEPS = 5  # of the reward's mean


def series(lines: Lines, key: str) -> tuple[list[int], list[Any]]:
    """Steps that have the metric, and its values there."""
    found = [line for line in lines if key in line]
    return [line["step"] for line in found], [line[key] for line in found]


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element for a page: no fixed size, no address of another resource, ids of its own."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r' id="[a-z0-9]+_\d+"', "", svg)  # figure_1, axes_1, ...: the same in every figure
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"( viewBox="[^"]*") version="1.1"', r'<svg role="img"\1', svg)
    for colour, variable in CSS_VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def new_axes(ylabel: str, *, xlabel: str = "step", height: float = 2.9) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.2, height), layout="constrained")
        axes = figure.subplots()
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(axis="x", visible=False)
    return figure, axes


def legend(axes: Axes) -> None:
    """Above the axes, in as many rows as keep it inside the figure: a wider one would squeeze the axes."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return  # matplotlib warns of a legend without entries
    num_rows = math.ceil(sum(len(label) + 9 for label in labels) / LEGEND_CHARACTERS)
    with matplotlib.rc_context(STYLE):
        axes.figure.legend(
            handles, labels, loc="outside upper left", ncols=math.ceil(len(labels) / num_rows), handlelength=1.4
        )


def line(axes: Axes, xy: tuple[Sequence[float], Sequence[float]], label: str, colour: str, **style: Any) -> bool:
    """Draw one series; few points get marks, a single one would else be invisible. False when it is empty."""
    xs, ys = xy
    if not xs:
        return False
    marker = {"marker": "o", "markersize": 3.5} if len(xs) <= 12 else {}
    axes.plot(xs, ys, label=label, color=colour, **{**marker, **style})
    return True


def trailing_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values at each place, of fewer at the start: prompts differ in difficulty."""
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def reward(lines: Lines) -> Figure | None:
    figure, axes = new_axes("reward")
    steps, rewards = series(lines, "reward")
    drawn = line(axes, (steps, rewards), "mean reward of the step's samples", SERIES[0], linewidth=1.0, alpha=0.45)
    line(axes, (steps, trailing_mean(rewards, SMOOTHED_STEPS)), f"mean of {SMOOTHED_STEPS} steps", SERIES[0])
    drawn |= line(axes, series(lines, "eval_reward"), "evaluation (greedy)", SERIES[1], marker="o", linestyle="--")
    legend(axes)
    return figure if drawn else None


def accept_length(lines: Lines) -> Figure | None:
    figure, axes = new_axes("tokens per verify step")
    drawn = line(axes, series(lines, "accept_length"), "observed", SERIES[0], linewidth=2.4)
    line(axes, series(lines, "expected_accept_length"), "expected by the learner", SERIES[1], linestyle=(0, (4, 2)))
    if any("frozen_accept_length" in row for row in lines):
        line(axes, series(lines, "predicted_accept_length"), "trained draft, full depth", SERIES[2], linewidth=1.2)
    line(axes, series(lines, "frozen_accept_length"), "frozen draft, full depth", MUTED)
    line(axes, series(lines, "history_accept_length"), "of history", SERIES[3], linewidth=1.2)
    line(axes, series(lines, "draft_accept_length"), "of the model", SERIES[4], linewidth=1.2)
    if not drawn:
        return None
    axes.set_ylim(bottom=1.0)
    legend(axes)
    return figure


def acceptance_by_position(lines: Lines) -> Figure | None:
    figure, axes = new_axes("accepted / proposed")
    steps, rates = series(lines, "accept_rate_by_position")
    predicted_steps, predicted = series(lines, "predicted_accept_rate_by_position")
    for j in range(max(map(len, rates), default=0)):
        colour = SERIES[j % len(SERIES)]
        line(axes, at(steps, rates, j), f"draft token {j + 1}", colour)
        line(axes, at(predicted_steps, predicted, j), "", colour, linestyle=":", linewidth=1.2)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    legend(axes)
    return figure if any(rates) else None


def at(steps: Sequence[int], rows: Sequence[Sequence[float]], j: int) -> tuple[list[int], list[float]]:
    """Column j of ragged rows, with the steps that have it."""
    kept = [(step, row[j]) for step, row in zip(steps, rows, strict=True) if j < len(row)]
    return [step for step, _ in kept], [value for _, value in kept]


def logp_gap(lines: Lines) -> Figure | None:
    figure, axes = new_axes("nats (log axis)")
    drawn: list[float] = []
    for key, label, colour in (("logp_diff_max", "maximum", SERIES[3]), ("logp_diff_mean", "mean", SERIES[0])):
        steps, values = series(lines, key)
        shown = [(s, v) for s, v in zip(steps, values, strict=True) if v > 0]  # a log axis has no zero
        line(axes, ([s for s, _ in shown], [v for _, v in shown]), label, colour)
        drawn += [v for _, v in shown]
    if not drawn:
        return None
    axes.set_yscale("log")
    axes.set_ylim(10 ** math.floor(math.log10(min(drawn))), 10 ** (math.floor(math.log10(max(drawn))) + 1))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
    axes.yaxis.set_minor_locator(NullLocator())
    legend(axes)
    return figure


def speed_vs_plain(lines: Lines) -> Figure | None:
    steps, speeds = series(lines, "speedup_vs_plain")
    if not steps:
        return None
    figure, axes = new_axes("times plain decoding")
    axes.axhline(1.0, color=MUTED, linewidth=1.0, linestyle=(0, (4, 2)))
    line(axes, (steps, speeds), "measured speed", SERIES[0], marker="o")
    line(axes, series(lines, "tokens_per_forward"), "tokens per forward", SERIES[2])
    axes.set_ylim(bottom=0)
    legend(axes)
    return figure


def throughput(lines: Lines) -> Figure | None:
    figure, axes = new_axes("tokens per second")
    drawn = line(axes, series(lines, "tokens_per_s"), "rollout", SERIES[0])
    line(axes, series(lines, "plain_tokens_per_s"), "plain decoding, same prompts", MUTED, marker="o", linestyle="--")
    axes.set_ylim(bottom=0)
    legend(axes)
    return figure if drawn else None


def step_anatomy(lines: Lines) -> Figure | None:
    totals: dict[str, float] = {}
    for row in lines:
        for name, seconds in phase_seconds(row).items():
            totals[name] = totals.get(name, 0.0) + seconds
    if not totals:
        return None
    figure, axes = new_axes("seconds")
    steps = [row["step"] for row in lines]
    bottom = [0.0] * len(lines)
    for i, name in enumerate(sorted(totals, key=lambda n: -totals[n])):
        heights = [row.get(f"time_{name}_s", 0.0) for row in lines]
        axes.bar(steps, heights, 0.86, bottom, label=name, color=SERIES[i % len(SERIES)], linewidth=0)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    legend(axes)
    return figure


def response_length(lines: Lines) -> Figure | None:
    figure, axes = new_axes("response tokens")
    curves = (("max", MUTED, 1.2), ("p99", SERIES[3], 1.4), ("p90", SERIES[1], 1.6), ("p50", SERIES[0], 2.2))
    drawn = [line(axes, series(lines, f"response_len_{k}"), k, c, linewidth=w) for k, c, w in curves]
    axes.set_ylim(bottom=0)
    legend(axes)
    return figure if any(drawn) else None


def length_histogram(lines: Lines) -> Figure | None:
    steps, histograms = series(lines, "response_len_histogram")
    if not steps:
        return None
    figure, axes = new_axes("share of samples", xlabel="response tokens")
    ends = [(0, MUTED)] if len(steps) == 1 else [(0, MUTED), (-1, SERIES[0])]
    width = 0.8 / len(ends)
    for i, (end, colour) in enumerate(ends):
        counts = histograms[end]
        xs = [b + (i - (len(ends) - 1) / 2) * width for b in range(len(counts))]
        shares = [c / sum(counts) for c in counts]
        axes.bar(xs, shares, width * 0.94, color=colour, label=f"step {steps[end]}", linewidth=0)
    num_bins = max(len(histograms[end]) for end, _ in ends)
    axes.set_xticks(range(num_bins), [bin_name(b) for b in range(num_bins)])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    legend(axes)
    return figure


def bin_name(b: int) -> str:
    return "1" if b == 0 else f"{2**b} to {2 ** (b + 1) - 1}"


def running_batch(lines: Lines) -> Figure | None:
    steps, profiles = series(lines, "running_batch")
    if not steps:
        return None
    figure, axes = new_axes("running requests", xlabel="share of the rollout's time")
    ends = [(0, MUTED)] if len(steps) == 1 else [(0, MUTED), (-1, SERIES[0])]
    for end, colour in ends:
        profile = profiles[end]
        edges = [i / len(profile) for i in range(len(profile) + 1)]
        if end == -1:
            axes.stairs(profile, edges, fill=True, color=colour, alpha=0.18)
        axes.stairs(profile, edges, color=colour, linewidth=1.8, label=f"step {steps[end]}")
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    legend(axes)
    return figure


def draft_acceptance(lines: Lines) -> Figure | None:
    """What the verify rule would accept of the draft in training, by unroll step."""
    figure, axes = new_axes("chance of acceptance")
    steps, rates = series(lines, "draft_accept_by_step")
    for j in range(max(map(len, rates), default=0)):
        line(axes, at(steps, rates, j), f"unroll step {j + 1}", SERIES[j % len(SERIES)])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    legend(axes)
    return figure if any(rates) else None


def draft_loss(lines: Lines) -> Figure | None:
    figure, axes = new_axes("loss per token")
    drawn = line(axes, series(lines, "draft_loss"), "draft loss", SERIES[0])
    axes.set_ylim(bottom=0)
    return figure if drawn else None


def draft_account(lines: Lines) -> Figure | None:
    """Seconds since the start that speculation saved and the draft's training cost, and the steps that trained."""
    figure, axes = new_axes("seconds since the start")
    drawn = False
    for key, label, colour in (("saved", saved_label(lines), SERIES[0]), ("spent", "spent on the draft", SERIES[3])):
        steps, seconds = series(lines, f"draft_{key}_time_s")
        drawn |= line(axes, (steps, list(itertools.accumulate(seconds))), label, colour)
    trained = [row["step"] for row in lines if row.get("draft_token_share")]
    if trained and len(trained) < len(lines):
        axes.plot(trained, [0.0] * len(trained), "|", color=SERIES[1], markersize=9, label="trained in this step")
    legend(axes)
    return figure if drawn else None


def saved_label(lines: Lines) -> str:
    is_bound = any(row.get("draft_saved_time_basis") == "bound" for row in lines)
    return "saved by speculation" + (" at most" if is_bound else "")


def entropy(lines: Lines) -> Figure | None:
    figure, axes = new_axes("nats per token")
    drawn = line(axes, series(lines, "entropy"), "entropy of the policy", SERIES[1])
    axes.set_ylim(bottom=0)
    return figure if drawn else None
