"""The n-gram drafter proposes what followed the longest match, and finds it as brute force does."""

from __future__ import annotations

import random

import pytest

from draft_models.ngram import NgramDrafter

A, B, OTHER_PROMPT = (0, 0), (0, 1), (1, 0)


def test_longest_match_wins_over_a_later_one() -> None:
    drafter = NgramDrafter(1, 4)
    drafter.extend(A, [1, 2, 3, 7, 8, 9, 3, 5, 5, 1, 2, 3])
    assert drafter.propose(A, 3) == [7, 8, 9]  # after 1 2 3, not after the later lone 3
    assert drafter.propose(A, 1) == [7]


def test_nothing_below_the_shortest_match() -> None:
    drafter = NgramDrafter(2, 4)
    drafter.extend(A, [1, 9, 2, 3, 9])
    assert drafter.propose(A, 3) == []
    drafter.extend(A, [2])
    assert drafter.propose(A, 2) == [3, 9]


def test_a_loop_is_read_on() -> None:
    drafter = NgramDrafter(2, 8)
    drafter.extend(A, [4, 1, 2, 3, 1, 2, 3, 1])
    assert drafter.propose(A, 7) == [2, 3, 1, 2, 3, 1, 2]


def test_siblings_share_and_other_prompts_do_not() -> None:
    drafter = NgramDrafter(2, 4)
    drafter.extend(A, [1, 2, 3, 4, 5])
    drafter.extend(B, [9, 2, 3])
    drafter.extend(OTHER_PROMPT, [9, 2, 3])
    assert drafter.propose(B, 4) == [4, 5]  # to the end of the sibling's text
    drafter.extend(A, [6])
    assert drafter.propose(B, 4) == [4, 5, 6]
    assert drafter.propose(OTHER_PROMPT, 4) == []


def brute_force(text: list[int], lengths: range, k: int) -> list[int]:
    for length in lengths:
        starts = [
            i for i in range(len(text) - length) if length <= len(text) and text[i : i + length] == text[-length:]
        ]
        if starts:
            looped = list(text)
            for _ in range(k):
                looped.append(looped[starts[-1] + length + len(looped) - len(text)])
            return looped[len(text) :]
    return []


def test_equals_brute_force_whatever_the_pieces() -> None:
    chooser = random.Random(0)
    for _ in range(200):
        drafter, text = NgramDrafter(2, 5), []
        for _ in range(12):
            piece = [chooser.randrange(3) for _ in range(chooser.randrange(1, 5))]
            drafter.extend(A, piece)
            text += piece
            assert drafter.propose(A, 4) == brute_force(text, range(5, 1, -1), 4)


def test_impossible_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="1 <= min <= max, found min 3 and max 2"):
        NgramDrafter(3, 2)
