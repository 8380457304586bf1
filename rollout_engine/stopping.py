"""Where a response ends. Pure functions over host tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Detokenize = Callable[[Sequence[int]], str]

_SPARE_TOKENS = 16  # tokens without text of their own (special ones) that a stop string may span


def kept_before_stop(
    response: Sequence[int],
    num_new: int,
    stop_ids: frozenset[int],
    stop_strings: tuple[str, ...],
    detokenize: Detokenize | None,
) -> int | None:
    """How many of the last `num_new` tokens stay when the response stops within them; None when it runs on.

    The token that is a stop id, or that completes a stop string, is kept.
    """
    before = len(response) - num_new
    for end in range(before + 1, len(response) + 1):
        if response[end - 1] in stop_ids:
            return end - before
        if detokenize is not None and stop_strings and _ends_text(response[:end], stop_strings, detokenize):
            return end - before
    return None


def _ends_text(response: Sequence[int], stop_strings: tuple[str, ...], detokenize: Detokenize) -> bool:
    """A token carries at least one byte of text, so a tail that long covers every stop string it may complete."""
    tail = max(len(stop.encode()) for stop in stop_strings) + _SPARE_TOKENS
    text = detokenize(response[-tail:])
    return any(stop in text for stop in stop_strings)
