"""A drafter without weights: what followed the last time this text, or a sibling of it, stood at the same words.

Prompt-lookup decoding (Saxena 2023) with the longest match first, over all texts of one prompt. Its proposals are
point masses, so they are verified by the target-only rule (or by greedy or coupled agreement).
"""

from __future__ import annotations

from collections.abc import Sequence


class NgramDrafter:
    """Texts by (prompt id, sample id). Texts with the same prompt id look things up in each other.

    Each n-gram of `min_match` to `max_match` tokens remembers the place behind its latest occurrence, in whichever
    sibling that was: constant time per added token and per proposal.
    """

    def __init__(self, min_match: int, max_match: int) -> None:
        if not 1 <= min_match <= max_match:
            raise ValueError(f"n-gram match lengths must be 1 <= min <= max, found min {min_match} and max {max_match}")
        self._lengths = range(max_match, min_match - 1, -1)
        self._groups: dict[int, _Group] = {}

    def extend(self, key: tuple[int, int], tokens: Sequence[int]) -> None:
        """Append tokens to a text (its prompt first, then the response as it grows)."""
        prompt_id, sample_id = key
        self._groups.setdefault(prompt_id, _Group(self._lengths)).extend(sample_id, tokens)

    def propose(self, key: tuple[int, int], k: int) -> list[int]:
        """Up to k tokens that may follow the text now; empty when nothing matches."""
        prompt_id, sample_id = key
        return self._groups[prompt_id].propose(sample_id, k)


class _Group:
    """The texts of one prompt and the index over them."""

    def __init__(self, lengths: range) -> None:
        self._lengths = lengths
        self._texts: dict[int, list[int]] = {}
        self._latest: dict[tuple[int, ...], tuple[list[int], int]] = {}  # n-gram -> text, index of what followed

    def extend(self, sample_id: int, tokens: Sequence[int]) -> None:
        text = self._texts.setdefault(sample_id, [])
        for token in tokens:
            # An n-gram enters the index when something follows it, so that a text never matches its own end.
            end = len(text)
            for length in self._lengths:
                if length <= end:
                    self._latest[tuple(text[end - length :])] = (text, end)
            text.append(token)

    def propose(self, sample_id: int, k: int) -> list[int]:
        own = self._texts[sample_id]
        for length in self._lengths:
            found = self._latest.get(tuple(own[-length:])) if length <= len(own) else None
            if found is not None:
                text, start = found
                proposal = text[start : start + k]
                # A match that runs into the end of this very text is a loop: read on in what was just proposed.
                while text is own and len(proposal) < k:
                    proposal.append(proposal[start + len(proposal) - len(own)])
                return proposal
        return []
