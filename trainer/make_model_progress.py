"""make-model with a live progress line."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from trainer.make_model import MakeModelConfig, WarmStartProgress, check, make_model


def make_model_with_progress(config: MakeModelConfig) -> Path:
    """`make_model`, showing loss and progress of the warm start; prints where the model lies."""
    check(config)  # before anything is drawn
    columns = (
        TextColumn("warm start on [bold]{task.description}[/]"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
    )
    console = Console()
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(
            config.task, total=config.warm_start_s or config.warm_start_steps or 1, loss=float("nan")
        )

        def show(state: WarmStartProgress) -> None:
            done = state.elapsed_s if config.warm_start_s else state.step
            progress.update(bar, completed=done, loss=state.loss)

        out = make_model(config, show)
    console.print(f"made [bold]{out}[/]: {config.size} {config.model_type}, task {config.task}, seed {config.seed}")
    return out
