"""The built-in tasks. Each draws a problem from a seeded generator; answers run from 2 to about 60 tokens."""

from __future__ import annotations

import string
from random import Random

from trainer.tasks.base import Problem, long_tailed

_WORDS = ("red", "sun", "tree", "moon", "fish", "bird", "stone", "cloud")
_WORDS += ("river", "leaf", "wind", "salt", "gold", "snow", "fire", "rain")


def draw_sort(rng: Random) -> Problem:
    """Different letters in any order -> the same letters in ascending ASCII order, capitals first."""
    letters = rng.sample(string.ascii_letters, long_tailed(rng, 6.0, 0.7, 2, 48))
    return Problem(f"sort {' '.join(letters)}\n", tuple(sorted(letters)))


def draw_reverse(rng: Random) -> Problem:
    """Words -> the same words, last first."""
    words = [rng.choice(_WORDS) for _ in range(long_tailed(rng, 6.0, 0.7, 2, 48))]
    return Problem(f"reverse {' '.join(words)}\n", tuple(reversed(words)))


def draw_repeat(rng: Random) -> Problem:
    """A phrase of one to three words and a count -> the phrase that many times, the turns counted down to 1."""
    phrase = [rng.choice(_WORDS) for _ in range(rng.randint(1, 3))]
    times = long_tailed(rng, 3.0, 0.8, 1, 15)
    answer = [word for turn in range(times, 0, -1) for word in (str(turn), *phrase)]
    return Problem(f"repeat {times} {' '.join(phrase)}\n", tuple(answer))


def draw_count(rng: Random) -> Problem:
    """A start, a step and a number of terms -> the arithmetic progression modulo 100, two digits a term."""
    start, step = rng.randrange(100), rng.randint(1, 9)
    terms = long_tailed(rng, 7.0, 0.7, 2, 56)
    answer = tuple(f"{(start + i * step) % 100:02d}" for i in range(terms))
    return Problem(f"count from {start:02d} by {step} terms {terms}\n", answer)
