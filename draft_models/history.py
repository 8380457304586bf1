"""What was written before, as a drafter: an index over texts that share a prompt, and a store of finished ones.

A policy that answers one prompt many times repeats itself: in a group's siblings, finished or not, and in the same
prompt's earlier epochs. What followed the same words there is a proposal without any forward, and how often it followed
is a first hint of whether it will stand. Prompt-lookup decoding (Saxena 2023) and SuffixDecoding (Oliaro et al. 2025)
look things up in a text and in a cache of outputs; here the matches are weighed by measured acceptance (see
`rollout_engine.history_plan`). A proposal is a point mass: verified exactly by every rule.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

_MAX_CANDIDATES = 8  # places looked at for one proposal, the latest first: what bounds a look-up's time
_POSITION_BITS = 32  # of a place: its text's number stands above them
_POSITION_MASK = (1 << _POSITION_BITS) - 1
_LEVELS_OF_A_CHAIN = 2
_SUPPORTS = 5

# What CPython takes, measured: an index at its worst, just after its dictionaries have grown, and a store.
_INDEXED_TOKEN_BYTES = 5
_CHAINED_TOKEN_BYTES = 150  # by chain
_INDEXED_TEXT_BYTES = 500
_STORED_TOKEN_BYTES = 4
_STORED_TEXT_BYTES = 320
_PROMPT_TOKEN_BYTES = 40
_PROMPT_BYTES = 1400


class Match(NamedTuple):  # no frozen dataclass: a look-up makes one for every row, and those take longer to make
    """What followed the longest match of a text's end, and what kind of match that was."""

    tokens: tuple[int, ...]  # the proposal; at least one token
    kind: int  # 0 .. HistoryIndex.num_kinds - 1: places that agreed as long, and on the next token, as much


class HistoryIndex:
    """The texts of one prompt, growing or finished; each is looked up in all of them, itself included.

    Places where the same `min_match` tokens stood are chained from the latest to the first, as LZ77 compressors do it
    (Deutsch 1996), and so are those where four times as many did, so that a long match is found behind many short
    ones. Adding a token is two dictionary entries and a look-up is at most `_MAX_CANDIDATES` comparisons, whatever the
    texts' lengths.
    """

    def __init__(self, min_match: int, max_match: int) -> None:
        if not 1 <= min_match <= max_match:
            raise ValueError(
                f"history match lengths must be 1 <= min <= max, found min {min_match} and max {max_match}"
            )
        levels = match_levels(min_match, max_match)
        self._chains = tuple(
            _Chain(first, levels[first : first + _LEVELS_OF_A_CHAIN])
            for first in reversed(range(0, len(levels), _LEVELS_OF_A_CHAIN))
        )
        self._longest_match = levels[-1]
        self._texts: list[array[int]] = []
        self._token_bytes = indexed_token_bytes(min_match, max_match)
        self.num_bytes = 0  # about what it takes, and seldom more than it does

    def add(self, text: Sequence[int], start: int = 0) -> int:
        """A text's number. What follows before `start` is never proposed.

        The first `start` tokens are a prompt that another text has brought already.
        """
        number = len(self._texts)
        self._texts.append(array("i", text[:start]))
        for chain in self._chains:
            chain.older.append(array("q"))
            chain.starts.append(start)
        self.num_bytes += _INDEXED_TEXT_BYTES
        self.extend(number, text)
        return number

    def extend(self, number: int, grown: Sequence[int]) -> None:
        """Take in what a text has grown by, given the whole of it."""
        text = self._texts[number]
        first, end, place = len(text), len(grown), number << _POSITION_BITS
        text.extend(array("i", grown[first:]))
        for chain in self._chains:
            length, latest, older = chain.length, chain.latest, chain.older[number]
            for position in range(first, end):
                if position < length:
                    older.append(-1)
                    continue
                key = hash(text[position - length : position].tobytes())
                older.append(latest.get(key, -1))
                latest[key] = place + position
        self.num_bytes += (end - first) * self._token_bytes

    def length(self, number: int) -> int:
        """Tokens of a text that were taken in."""
        return len(self._texts[number])

    def look_up(self, number: int, num_tokens: int, grown: Sequence[int] | None = None) -> Match | None:
        """Up to `num_tokens` that may follow text `number` now; None when its end was never seen before.

        `extend` comes first; where it did not, `grown` is the whole of the text. Of the places that agree longest, the
        follower that most of them have wins, the latest of equals.
        """
        text = self._texts[number]
        if grown is not None and len(grown) > len(text):
            text = array("i", grown[-self._longest_match :])
        end = len(text)
        for chain in self._chains:
            if chain.length > end:
                continue
            place = chain.latest.get(hash(text[end - chain.length :].tobytes()), -1)
            if place >= 0:
                level, found = self._longest(chain, place, text)
                return self._match(text, level, found, num_tokens)
        return None

    def _longest(self, chain: _Chain, place: int, text: array[int]) -> tuple[int, list[tuple[array[int], int]]]:
        """The level of the longest agreement among the latest places of a chain, and those of them that reach it."""
        texts, older, starts, end = self._texts, chain.older, chain.starts, len(text)
        length = chain.longer if chain.longer <= end else 0
        tail = text[end - length :]
        # Most places fail at the first token before those that the chain is of: a look at it is cheaper than a slice.
        first_back = chain.length + 1
        first = text[-first_back] if length else -1
        shorter: list[tuple[array[int], int]] = []
        longer: list[tuple[array[int], int]] = []
        for _ in range(_MAX_CANDIDATES):
            number, position = place >> _POSITION_BITS, place & _POSITION_MASK
            candidate = texts[number]
            if (
                length
                and position >= length
                and candidate[position - first_back] == first
                and candidate[position - length : position] == tail
            ):
                longer.append((candidate, position))
            elif not longer:
                shorter.append((candidate, position))
            place = older[number][position - starts[number]]
            if place < 0:
                break
        return (chain.level + 1, longer) if longer else (chain.level, shorter)

    def _match(self, text: array[int], level: int, found: list[tuple[array[int], int]], num_tokens: int) -> Match:
        followers = [candidate[position] for candidate, position in found]
        token = followers[0]
        agreeing = followers.count(token)
        if 2 * agreeing <= len(followers):  # the latest has no majority: the most frequent, of equals the latest
            token = max(dict.fromkeys(followers), key=followers.count)
            agreeing = followers.count(token)
        candidate, position = found[followers.index(token)]
        tokens = list(candidate[position : position + num_tokens])
        if candidate is text:
            # A match that runs into the end of this very text is a loop: read on in what was just proposed.
            period = len(text) - position
            while len(tokens) < num_tokens:
                tokens.append(tokens[-period])
        return Match(tuple(tokens), level * _SUPPORTS + _support(agreeing, len(found)))


class _Chain:
    """Places by their last `length` tokens: the latest of each, and for every place the one before it, or -1."""

    __slots__ = ("latest", "length", "level", "longer", "older", "starts")  # longer: 0 where there is no level above

    def __init__(self, level: int, lengths: tuple[int, ...]) -> None:
        """`lengths`: of match level `level`, of which the chain is, and of the one above it, if there is one."""
        self.level = level
        self.length, self.longer = lengths if len(lengths) > 1 else (*lengths, 0)
        self.latest: dict[int, int] = {}  # hash of the tokens -> place; a collision makes a useless proposal, no more
        self.older: list[array[int]] = []  # by text and position, from that text's start on
        self.starts: list[int] = []


def match_levels(min_match: int, max_match: int) -> tuple[int, ...]:
    """Match lengths that are told apart: min_match, doubled while it is at most max_match."""
    levels = [min_match]
    while 2 * levels[-1] <= max_match:
        levels.append(2 * levels[-1])
    return tuple(levels)


def indexed_token_bytes(min_match: int, max_match: int) -> int:
    """Memory that an index takes for a token, at its worst."""
    num_chains = -(-len(match_levels(min_match, max_match)) // _LEVELS_OF_A_CHAIN)
    return _INDEXED_TOKEN_BYTES + num_chains * _CHAINED_TOKEN_BYTES


def num_kinds(num_levels: int) -> int:
    """How many kinds of match there are to tell apart by: by level, and by how many places agreed."""
    return num_levels * _SUPPORTS


def _support(agreeing: int, total: int) -> int:
    """How far the places agree on what follows: less than half, contested, one place, two or three, or more of them."""
    if agreeing < total:
        return int(2 * agreeing >= total)
    return 2 if total == 1 else 3 if total <= 3 else 4


@dataclass(frozen=True, slots=True)
class _Finished:
    prompt: tuple[int, ...]
    response: array[int]


class HistoryStore:
    """Finished responses by what their prompt says, in at most `max_bytes`; those that finished first go first.

    A prompt is its token ids: other numbers that a run gives it change from epoch to epoch.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._by_age: deque[_Finished] = deque()
        self._by_prompt: dict[tuple[int, ...], deque[_Finished]] = {}
        self.num_bytes = 0  # about what is held

    def add(self, prompt: tuple[int, ...], response: Sequence[int]) -> None:
        text = _Finished(prompt, array("i", response))
        if prompt not in self._by_prompt:
            self._by_prompt[prompt] = deque()
            self.num_bytes += _prompt_bytes(prompt)
        self._by_age.append(text)
        self._by_prompt[prompt].append(text)
        self.num_bytes += _text_bytes(text)
        while self.num_bytes > self._max_bytes:
            self._forget_oldest()

    def responses(self, prompt: tuple[int, ...], max_tokens: int) -> list[array[int]]:
        """The prompt's latest responses that have at most `max_tokens` together, the oldest of them first."""
        found: list[array[int]] = []
        for text in reversed(self._by_prompt.get(prompt, ())):
            max_tokens -= len(text.response)
            if max_tokens < 0:
                break
            found.append(text.response)
        return found[::-1]

    def state(self) -> dict[str, Any]:
        """For a checkpoint: a few flat tensors, a copy. int32 tokens."""
        prompts = {prompt: number for number, prompt in enumerate(self._by_prompt)}
        return {
            "prompt_tokens": torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int32),
            "prompt_lengths": torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64),
            "tokens": _joined([text.response for text in self._by_age]),
            "lengths": torch.tensor([len(text.response) for text in self._by_age], dtype=torch.int64),
            "prompts": torch.tensor([prompts[text.prompt] for text in self._by_age], dtype=torch.int64),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Replaces what is held; of more than `max_bytes` the oldest are left out."""
        self._by_age.clear()
        self._by_prompt.clear()
        self.num_bytes = 0
        prompts = [tuple(part.tolist()) for part in state["prompt_tokens"].split(state["prompt_lengths"].tolist())]
        responses = state["tokens"].split(state["lengths"].tolist())
        for response, prompt in zip(responses, state["prompts"].tolist(), strict=True):
            self.add(prompts[prompt], response.tolist())

    def _forget_oldest(self) -> None:
        text = self._by_age.popleft()
        same_prompt = self._by_prompt[text.prompt]
        same_prompt.popleft()
        self.num_bytes -= _text_bytes(text)
        if not same_prompt:
            del self._by_prompt[text.prompt]
            self.num_bytes -= _prompt_bytes(text.prompt)


def _text_bytes(text: _Finished) -> int:
    return _STORED_TEXT_BYTES + _STORED_TOKEN_BYTES * len(text.response)


def _prompt_bytes(prompt: Sequence[int]) -> int:
    return _PROMPT_BYTES + _PROMPT_TOKEN_BYTES * len(prompt)


def _joined(parts: Sequence[array[int]]) -> torch.Tensor:
    joined = array("i")
    for part in parts:
        joined.extend(part)
    return torch.frombuffer(joined, dtype=torch.int32).clone() if joined else torch.zeros(0, dtype=torch.int32)
