"""Rewards: a function of the texts (prompt, response, label) gives a finite number, or the run stops."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from rollout_engine.types import Sample
from trainer.config import ConfigError
from trainer.data import Prompt, Tokenizer
from trainer.suggest import nearest

TextReward = Callable[[str, str, str], float]  # (prompt, response, label) -> reward: what a user writes
RewardFunction = Callable[[Prompt, Sample], float]  # what the loop calls

_SHOWN_CHARS = 400  # of each text in an error


class RewardError(RuntimeError):
    """A reward function failed on a sample; the message is one line and shows the sample."""


def exact_match(prompt: str, response: str, label: str) -> float:
    """1 when the whole response equals the label, both stripped of surrounding white space; else 0."""
    return float(response.strip() == label.strip())


def math_match(prompt: str, response: str, label: str) -> float:
    """1 when math-verify finds the response's final answer (\\boxed{} first) equal to the label's value; else 0.

    A label that holds no mathematics is the data's fault and raises ValueError.
    """
    from math_verify import parse, verify

    # The timeouts of math-verify need the main thread's signals; texts here are bounded by max_response_len.
    gold = parse(label if "$" in label or "\\boxed" in label else f"${label}$", parsing_timeout=None)
    if not gold:
        raise ValueError(f"math-verify finds no answer in the label {label!r}")
    return float(verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None))


BUILT_IN: dict[str, TextReward] = {"exact": exact_match, "math": math_match}


@dataclass(frozen=True, slots=True)
class Reward:
    """A named reward on texts, with the tokenizer that makes a sample's text. Its results are checked."""

    name: str
    function: TextReward
    tokenizer: Tokenizer

    def __call__(self, prompt: Prompt, sample: Sample) -> float:
        """The finite reward of one sample; special tokens are left out of the response's text."""
        response = self.tokenizer.decode(list(sample.token_ids), skip_special_tokens=True)
        return self.score(prompt.text, response, prompt.label)

    def score(self, prompt: str, response: str, label: str) -> float:
        """The finite reward of one response. `RewardError` when the function raises or gives anything else."""
        try:
            value = self.function(prompt, response, label)
        except (Exception, SystemExit) as error:
            sample = _show(prompt, response, label)
            raise RewardError(f"reward {self.name} raised {type(error).__name__}: {error}; {sample}") from error
        if not isinstance(value, Real) or not math.isfinite(value):
            sample = _show(prompt, response, label)
            raise RewardError(f"reward {self.name} returned {value!r}, expected a finite number; {sample}")
        return float(value)


def load_reward(name: str, tokenizer: Tokenizer) -> Reward:
    """The reward of that name, found and imported now so that a misspelling stops the run early.

    `exact`, `math`, or `MODULE:FUNCTION`, a function (prompt, response, label) -> float of three texts. The module may
    lie in the current folder.
    """
    if name in BUILT_IN:
        if name == "math" and importlib.util.find_spec("math_verify") is None:
            raise ConfigError("data.reward = 'math' needs math-verify: pip install math-verify==0.9.0")
        return Reward(name, BUILT_IN[name], tokenizer)
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        known = ", ".join(BUILT_IN)
        raise ConfigError(f"data.reward {name!r} is unknown{nearest(name, BUILT_IN)}; give {known} or MODULE:FUNCTION")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # an installed script's path has its own folder instead
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's own code runs here
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"data.reward {name!r}: cannot import {module_name!r} ({why})") from error
    function = getattr(module, function_name, None)
    if function is not None and not callable(function):
        raise ConfigError(
            f"data.reward {name!r}: {function_name!r} is not callable; expected a function of three texts"
        )
    if function is None:
        suggestion = nearest(function_name, vars(module))
        raise ConfigError(f"data.reward {name!r}: {module_name} has no function {function_name!r}{suggestion}")
    return Reward(name, function, tokenizer)


def _show(prompt: str, response: str, label: str) -> str:
    texts = {"prompt": prompt, "response": response, "label": label}
    return ", ".join(f"{key} {_cut(text)!r}" for key, text in texts.items())


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."
