"""The ledger: a long trace with free choices whose consequences must be worked out, as in step-by-step reasoning.

The prompt gives four accounts and a number of steps. A response counts the steps down; in each it may remark something,
in words of a small random language, then chooses an amount and an account, and writes that account's new value modulo
10:

    steps 3 a 02 b 04 c 07 d 03
     3 tofu renu seven a 09 2 two a 01 1 kola nine c 06

Remarks, amounts and accounts are the writer's choice, so many different responses are right; what uncertainty there
is, is that of the choice. A new value follows from the same account's last one, which may stand far back. The number of
steps is long-tailed, for 20 to 1000 tokens, and the prompt sets it: a policy cannot shorten its way to a reward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, takewhile
from random import Random

from trainer.tasks.base import Problem, long_tailed

ACCOUNTS = ("a", "b", "c", "d")
AMOUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MAX_STEPS = 180
_MODULUS = 10

# The writer's habits: what is usual in real text is likely, and the rest is not negligible.
_AMOUNT_WEIGHTS = tuple(accumulate(0.45**i for i in range(len(AMOUNTS))))
_SAME_ACCOUNT = 0.75  # chance that a step stays with the last step's account; otherwise it draws any
_REMARK, _GO_ON = 0.35, 0.7  # chance that a step has a remark, and that a remark goes on after a word
_NUM_WORDS = 1500
_OPENING_WEIGHTS = tuple(accumulate(0.6**i for i in range(8)))
_SUCCESSOR_WEIGHTS = tuple(accumulate((0.72, 0.14, 0.07, 0.04, 0.03)))


def _make_words() -> tuple[str, ...]:
    """Different pronounceable words, none of which means anything to the ledger."""
    rng, words = Random("ledger words"), dict.fromkeys(AMOUNTS)
    while len(words) < len(AMOUNTS) + _NUM_WORDS:
        syllables = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))
        words["".join(syllables)] = None
    return tuple(words)[len(AMOUNTS) :]


WORDS = _make_words()
_SUCCESSORS = tuple(tuple(Random(f"after {word}").choices(range(_NUM_WORDS), k=5)) for word in WORDS)


def draw_ledger(rng: Random) -> Problem:
    """Accounts and a number of steps -> one right response of the many."""
    values = {account: rng.randrange(_MODULUS) for account in ACCOUNTS}
    steps = long_tailed(rng, 18.0, 1.0, 5, MAX_STEPS)
    opening = " ".join(f"{account} {value:02d}" for account, value in values.items())
    answer: list[str] = []
    account = rng.choice(ACCOUNTS)
    for count in range(steps, 0, -1):
        if rng.random() >= _SAME_ACCOUNT:
            account = rng.choice(ACCOUNTS)
        amount = rng.choices(range(1, 10), cum_weights=_AMOUNT_WEIGHTS)[0]
        values[account] = (values[account] + amount) % _MODULUS
        answer += (f"{count}", *_remark(rng), AMOUNTS[amount - 1], account, f"{values[account]:02d}")
    return Problem(f"steps {steps} {opening}\n", tuple(answer))


def _remark(rng: Random) -> Iterator[str]:
    if rng.random() >= _REMARK:
        return
    word = rng.choices(range(len(_OPENING_WEIGHTS)), cum_weights=_OPENING_WEIGHTS)[0]
    yield WORDS[word]
    while rng.random() < _GO_ON:
        word = rng.choices(_SUCCESSORS[word], cum_weights=_SUCCESSOR_WEIGHTS)[0]
        yield WORDS[word]


def with_slips(rng: Random, words: Sequence[str], rate: float) -> tuple[str, ...]:
    """Each new value is, with chance `rate`, one too high; the steps after it go on from what was written."""
    out, too_high = list(words), dict.fromkeys(ACCOUNTS, 0)
    for i, word in enumerate(words):
        if word in too_high:
            too_high[word] += rng.random() < rate
            out[i + 1] = f"{(int(words[i + 1]) + too_high[word]) % _MODULUS:02d}"
    return tuple(out)


def ledger_reward(prompt: str, response: str, label: str) -> float:
    """The share of the steps that are right, each with all before it; the whole 1 only when nothing follows the last.

    A step is right when it has the next number of the count-down and the right new value.

    `label` is one right response, and others are as right. Raises ValueError for a prompt that is not a ledger's.
    """
    kind, steps, *opening = prompt.split()
    if kind != "steps" or len(opening) != 2 * len(ACCOUNTS):
        raise ValueError(f"not a ledger's prompt: {prompt!r}")
    values = {account: int(value) for account, value in zip(opening[::2], opening[1::2], strict=True)}
    rest = iter(response.split())
    num_steps = int(steps)
    right = sum(takewhile(bool, (_is_right_step(rest, count, values) for count in range(num_steps, 0, -1))))
    too_long = right == num_steps and next(rest, None) is not None
    return (right - too_long) / num_steps


def _is_right_step(rest: Iterator[str], count: int, values: dict[str, int]) -> bool:
    """Read one step from `rest`, writing its value; False as soon as a word is not what it has to be."""
    if next(rest, None) != f"{count}":
        return False
    for word in rest:
        if word in AMOUNTS:
            account, written = next(rest, ""), next(rest, "")
            if account not in values:
                return False
            values[account] = (values[account] + AMOUNTS.index(word) + 1) % _MODULUS
            return written == f"{values[account]:02d}"
        if not word.isalpha() or word in values:
            return False
    return False
