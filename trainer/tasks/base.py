"""What a synthetic task is: pure functions of (seed, index), so that a prompt file can be made again anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

# Rows of the three streams never meet: a task is asked for row `STREAM_START[stream] + i`.
TRAIN_START = 0
EVAL_START = 1 << 40
WARM_START_START = 1 << 41


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt, ending in a newline, and the words of its right answer (of one of them, where there are many)."""

    prompt: str
    answer: tuple[str, ...]

    @property
    def label(self) -> str:
        """What the reward gets beside the response: for exact match, what the stripped response has to be."""
        return " ".join(self.answer)


@dataclass(frozen=True, slots=True)
class Task:
    """A verifiable task with long-tailed answer lengths.

    `mistake_rate` is the chance, word by word, that a demonstration of the warm start goes wrong there, and
    `add_mistakes` is how. A policy that imitates such demonstrations is uncertain everywhere, as a real pretrained
    model is, and reinforcement learning has something to remove.
    """

    name: str
    summary: str
    draw: Callable[[Random], Problem]
    mistake_rate: float = 0.08
    add_mistakes: Callable[[Random, Sequence[str], float], tuple[str, ...]] | None = None  # None: `with_mistakes`
    reward: str = "exact"  # `data.reward` of a run on this task
    min_context: int = 128  # positions that hold its longest prompt and answer

    def problem(self, seed: int, index: int) -> Problem:
        """The problem of row `index`; the same for ever."""
        return self.draw(Random(f"{self.name}/{seed}/{index}"))

    def demonstration(self, seed: int, index: int) -> tuple[str, str]:
        """(prompt, response) to imitate: the right answer, or one with mistakes, each word led by a space."""
        problem = self.problem(seed, index)
        add_mistakes = self.add_mistakes or with_mistakes
        words = add_mistakes(Random(f"{self.name}/{seed}/{index}/mistakes"), problem.answer, self.mistake_rate)
        return problem.prompt, response_text(words)


def response_text(words: Sequence[str]) -> str:
    """Every word led by a space, so that a word is the same token wherever it stands."""
    return "".join(f" {word}" for word in words)


def long_tailed(rng: Random, median: float, sigma: float, low: int, high: int) -> int:
    """A log-normal length, rounded and clipped to [low, high]: most are short, a few very long."""
    return min(high, max(low, round(median * math.exp(rng.gauss(0.0, sigma)))))


def with_mistakes(rng: Random, words: Sequence[str], rate: float) -> tuple[str, ...]:
    """Each word is, with chance `rate`, left out, said twice, or exchanged with the next one."""
    out: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        kind = rng.choice(("omit", "twice", "exchange")) if rng.random() < rate else "right"
        if kind == "exchange" and rest:
            out.append(rest.pop(0))
        out.extend({"omit": [], "twice": [word, word]}.get(kind, [word]))
    return tuple(out)
