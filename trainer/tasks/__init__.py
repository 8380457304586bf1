"""Verifiable synthetic tasks, for `slipstream make-model`, the demo and the tests."""

from __future__ import annotations

from trainer.config import ConfigError
from trainer.suggest import nearest
from trainer.tasks.base import EVAL_START, TRAIN_START, WARM_START_START, Problem, Task, response_text
from trainer.tasks.ledger import draw_ledger, with_slips
from trainer.tasks.synthetic import draw_count, draw_repeat, draw_reverse, draw_sort

__all__ = ["EVAL_START", "TASKS", "TRAIN_START", "WARM_START_START", "Problem", "Task", "get_task", "response_text"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sort", "sort letters in ascending order", draw_sort),
        Task("reverse", "say a list of words backwards", draw_reverse),
        Task("repeat", "say a phrase n times, counting down", draw_repeat),
        Task("count", "count upwards in steps, modulo 100", draw_count),
        Task(
            "ledger",
            "keep four accounts through many steps of one's own choice",
            draw_ledger,
            mistake_rate=0.03,
            add_mistakes=with_slips,
            reward="trainer.tasks.ledger:ledger_reward",
            min_context=1280,
        ),
    )
}


def get_task(name: str) -> Task:
    """The task of that name; `ConfigError` names the nearest known one."""
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}{nearest(name, TASKS)}; known: {', '.join(TASKS)}")
    return TASKS[name]
