"""90 % of a plateau, in tokens that a draft won: an accept length of 1, the bonus token alone, is no draft at all."""

from __future__ import annotations

SHARE = 0.9


def most_of(accept_length: float) -> float:
    """The accept length at which a draft wins `SHARE` of the tokens that it wins at `accept_length`."""
    return 1.0 + SHARE * (accept_length - 1.0)
