"""Live progress of a run: a table that redraws itself on a terminal, one plain line a step elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

SPARKS = "▁▂▃▄▅▆▇█"
NUM_ROWS = 8  # latest steps shown
COLUMNS = (  # metrics key, heading, format
    ("step", "step", "d"),
    ("reward", "reward", ".3f"),
    ("accept_length", "accept len", ".2f"),
    ("expected_accept_length", "expected", ".2f"),
    ("tokens_per_s", "tok/s", ".0f"),
    ("speedup_vs_plain", "vs plain", ".2f"),
    ("response_len_mean", "resp len", ".0f"),
    ("logp_diff_max", "max Δlogp", ".1e"),
)


def number(line: Mapping[str, Any], key: str, spec: str) -> str:
    """The formatted metric, or a dot where the step does not have it."""
    return format(line[key], spec) if key in line else "·"


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values as block characters, scaled to their own range."""
    tail = values[-width:]
    if not tail:
        return ""
    low, span = min(tail), (max(tail) - min(tail)) or 1.0
    return "".join(SPARKS[round((v - low) / span * (len(SPARKS) - 1))] for v in tail)


def phase_seconds(line: Mapping[str, Any]) -> dict[str, float]:
    """Phase name -> seconds, longest first."""
    phases = {k.removeprefix("time_").removesuffix("_s"): v for k, v in line.items() if _is_phase(k)}
    return dict(sorted(phases.items(), key=lambda item: -item[1]))


def _is_phase(key: str) -> bool:
    return key.startswith("time_") and key.endswith("_s")


def plain_line(line: Mapping[str, Any], total_steps: int) -> str:
    """One step as one line of text, for logs and pipes."""
    parts = [f"step {line['step'] + 1}/{total_steps}"]
    parts += [f"{title} {number(line, key, spec)}" for key, title, spec in COLUMNS[1:] if key in line]
    if "draft_decision" in line:
        parts.append(f"draft {line['draft_decision']}")
    phases = " ".join(f"{name} {seconds:.2f}s" for name, seconds in phase_seconds(line).items())
    return " | ".join([*parts, phases] if phases else parts)


def steps_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for _, title, _ in COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    for line in lines[-NUM_ROWS:]:
        style = "bold" if line is lines[-1] else ""
        table.add_row(*(number(line, key, spec) for key, _, spec in COLUMNS), style=style)
    return table


def curves(lines: Sequence[Mapping[str, Any]], width: int = 48) -> Table:
    """Reward and accept length since the start as sparklines."""
    table = Table.grid(padding=(0, 2))
    for key, title, colour in (("reward", "reward", "green"), ("accept_length", "accept length", "cyan")):
        values = [line[key] for line in lines if key in line]
        if values:
            ends = f"{values[0]:.2f} → {values[-1]:.2f}"
            table.add_row(title, Text(sparkline(values, width), style=colour), Text(ends, style="dim"))
    return table


def acceptance(line: Mapping[str, Any]) -> Table:
    """Observed acceptance by draft position as bars, and the forecast beside each."""
    table = Table.grid(padding=(0, 2))
    predicted = line.get("predicted_accept_rate_by_position", [])
    for j, rate in enumerate(line.get("accept_rate_by_position", [])):
        forecast = f"predicted {predicted[j]:4.0%}" if j < len(predicted) else ""
        table.add_row(f"draft token {j + 1}", Bar(1.0, 0.0, rate, width=24, color="cyan"), f"{rate:4.0%}", forecast)
    if "draft_balance_time_s" in line:
        balance = f"{line['draft_balance_time_s']:+.1f} s saved less spent"
        table.add_row("draft", Text(f"{line.get('draft_decision', '')} {balance}".strip(), style="dim"))
    return table


def phases(line: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    times = phase_seconds(line)
    total = sum(times.values())
    for name, seconds in times.items():
        bar = Bar(total, 0.0, seconds, width=24, color="yellow")
        table.add_row(name, bar, f"{seconds:.2f} s", f"{seconds / total:4.0%}" if total else "")
    return table


def summary_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """First step against last step, and the best; with the total of every phase's time below."""
    table = Table(title="summary", title_justify="left", header_style="dim")
    for title in ("metric", "first", "last", "min", "max"):
        table.add_column(title, justify="left" if title == "metric" else "right")
    shown = ((k, t, s) for k, t, s in (("eval_reward", "eval reward", ".3f"), *COLUMNS[1:]))
    for key, title, spec in shown:
        values = [line[key] for line in lines if key in line]
        if values:
            table.add_row(title, *(format(v, spec) for v in (values[0], values[-1], min(values), max(values))))
    totals: dict[str, float] = {}
    for line in lines:
        for name, seconds in phase_seconds(line).items():
            totals[name] = totals.get(name, 0.0) + seconds
    table.add_section()
    for name, seconds in sorted(totals.items(), key=lambda item: -item[1]):
        table.add_row(f"time {name}", "", f"{seconds:.1f} s", "", f"{seconds / sum(totals.values()):.0%}")
    return table


class Progress:
    """`with Progress(total_steps, title) as progress: progress.status("rolling out"); progress.step(line)`.

    Resumed runs pass the lines they already have, so that curves and summary span the whole run.
    """

    def __init__(
        self,
        total_steps: int,
        title: str,
        *,
        lines: Sequence[Mapping[str, Any]] = (),
        console: Console | None = None,
    ):
        self._total = total_steps
        self._title = title
        self._lines = list(lines)
        self._status = "starting"
        self._console = console or Console()
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
            self._redraw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def status(self, text: str) -> None:
        """What is going on now; shown on a terminal only."""
        self._status = text
        self._redraw()

    def step(self, line: Mapping[str, Any]) -> None:
        """Show a finished step."""
        self._lines.append(line)
        if self._live:
            self._redraw()
        else:
            self._console.print(plain_line(line, self._total), soft_wrap=True, highlight=False, markup=False)

    def note(self, text: str) -> None:
        """A line that must not be missed, and stays."""
        self._console.print(text, style="bold red", soft_wrap=True, highlight=False, markup=False)

    def print_summary(self) -> None:
        if self._lines:
            self._console.print(summary_table(self._lines))

    def _redraw(self) -> None:
        if self._live:
            self._live.update(self._panel(), refresh=True)

    def _panel(self) -> Panel:
        done = self._lines[-1]["step"] + 1 if self._lines else 0
        head = Table.grid(padding=(0, 2))
        head.add_row(ProgressBar(self._total, done, width=40), f"{done}/{self._total}", Text(self._status, style="dim"))
        blocks: list[RenderableType] = [head]
        if self._lines:
            last = self._lines[-1]
            blocks += ["", steps_table(self._lines), "", curves(self._lines)]
            blocks += ["", acceptance(last), "", phases(last)]
        return Panel(Group(*blocks), title=f"[bold]{self._title}[/bold]", title_align="left", border_style="dim")
