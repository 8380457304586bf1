"""Live progress of `slipstream finetune-draft`: a panel that redraws itself on a terminal, plain lines elsewhere."""

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

from trainer.progress import number, sparkline

LENGTH, RATES = "held_out_accept_length", "held_out_accept_rate_by_position"
COLUMNS = (  # metrics key, heading, format
    ("step", "step", "d"),
    ("draft_loss", "loss", ".4f"),
    ("predicted_accept_length", "accept len (seen)", ".2f"),
    (LENGTH, "accept len (held out)", ".3f"),
    ("draft_tokens", "tokens", "d"),
    ("lr", "lr", ".1e"),
)
_NUM_ROWS = 6


class FinetuneProgress:
    """`with FinetuneProgress(title) as progress:`, then `answered` while answers come, `judged` once before the first
    step, and `step` after each. Metrics lines are those of `metrics.jsonl`."""

    def __init__(self, title: str, *, console: Console | None = None) -> None:
        self._title, self._console = title, console or Console()
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._lines: list[Mapping[str, Any]] = []
        self._before: Mapping[str, Any] = {}
        self._done, self._total, self._status = 0, 1, "starting"

    def __enter__(self) -> FinetuneProgress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def answered(self, done: int, total: int) -> None:
        """So many of the target's answers are written."""
        self._show(done, total, "answers of the target", f"answers {done}/{total}")

    def judged(self, line: Mapping[str, Any], total_steps: int, lines: Sequence[Mapping[str, Any]] = ()) -> None:
        """The draft's worth before the first step, and the lines of an earlier life of the run."""
        self._before, self._lines = line, list(lines)
        self._show(len(self._lines), total_steps, "training", f"before training: {_worth(line)}")

    def step(self, line: Mapping[str, Any], total_steps: int) -> None:
        """A finished optimizer step."""
        self._lines.append(line)
        parts = [f"{title} {number(line, key, spec)}" for key, title, spec in COLUMNS[1:] if key in line]
        rates = f"by position {_percent(line[RATES])}" if RATES in line else ""
        text = " | ".join([f"step {line['step'] + 1}/{total_steps}", *parts, *([rates] if rates else [])])
        self._show(line["step"] + 1, total_steps, "training", text)

    def print(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def print_summary(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Held-out acceptance by position, before and after."""
        table = Table(title="on held-out text", title_justify="left", header_style="dim")
        for title in ("", "accept length", *(f"token {j + 1}" for j in range(len(after[RATES])))):
            table.add_column(title, justify="right" if title else "left")
        for name, line in (("before", before), ("after", after)):
            table.add_row(name, f"{line[LENGTH]:.3f}", *(f"{rate:.1%}" for rate in line[RATES]))
        self._console.print(table)

    def _show(self, done: int, total: int, status: str, text: str) -> None:
        self._done, self._total, self._status = done, total, status
        if self._live:
            self._live.update(self._panel(), refresh=True)
        else:
            self.print(text)

    def _panel(self) -> Panel:
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(self._total, self._done, width=40)
        head.add_row(bar, f"{self._done}/{self._total}", Text(self._status, style="dim"))
        blocks: list[RenderableType] = [head]
        if self._lines:
            blocks += ["", _steps(self._lines)]
        judged = [line for line in (self._before, *self._lines) if LENGTH in line]
        if judged:
            curve = Text(sparkline([line[LENGTH] for line in judged], 48), style="cyan")
            row = Table.grid(padding=(0, 2))
            row.add_row(
                "accept length", curve, Text(f"{judged[0][LENGTH]:.2f} → {judged[-1][LENGTH]:.2f}", style="dim")
            )
            blocks += ["", row, "", _positions(judged[0], judged[-1])]
        return Panel(Group(*blocks), title=f"[bold]{self._title}[/bold]", title_align="left", border_style="dim")


def _steps(lines: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for _, title, _ in COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    for line in lines[-_NUM_ROWS:]:
        table.add_row(*(number(line, key, spec) for key, _, spec in COLUMNS), style="bold" if line is lines[-1] else "")
    return table


def _positions(first: Mapping[str, Any], last: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    for j, (was, rate) in enumerate(zip(first[RATES], last[RATES], strict=True)):
        bar = Bar(1.0, 0.0, rate, width=24, color="cyan")
        table.add_row(f"draft token {j + 1}", bar, f"{rate:4.0%}", Text(f"was {was:4.0%}", style="dim"))
    return table


def _worth(line: Mapping[str, Any]) -> str:
    return f"accept length {line[LENGTH]:.3f} on held-out text, by position {_percent(line[RATES])}"


def _percent(rates: Sequence[float]) -> str:
    return " ".join(f"{rate:.1%}" for rate in rates)
