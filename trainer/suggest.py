"""'Did you mean' for every name that a user can misspell."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str:
    """', did you mean X?' with the closest known name, or '' when nothing comes near."""
    matches = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {matches[0]!r}?" if matches else ""
