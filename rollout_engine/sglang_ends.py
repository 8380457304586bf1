"""Where a response from SGLang ends, when SGLang itself did not look. Pure but for reading the policy's files.

SGLang tests whether a request is being aborted before it looks for an end, so the last step of an aborted one may hold
an end token with others behind it, or more tokens than were asked for. With several tokens a step 0.5.15 also takes
the length before an end token that came earlier.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rollout_engine.request_pool import Piece, Progress
from rollout_engine.sglang_preflight import read_json
from rollout_engine.stopping import Detokenize, kept_before_stop
from rollout_engine.types import EngineError, FinishReason


def ended(piece: Piece, progress: Progress, eos: frozenset[int], detokenize: Detokenize | None) -> Piece:
    """`piece`, which goes on from `progress`, cut to where its request ends, and with the reason for that.

    Behind the first end token, stop id or completed stop string it is STOP; with as many tokens as are left, LENGTH;
    otherwise what it was. Its statistics stay, since the forwards behind an end did run. EngineError for an
    interrupted request with stop strings when there is nothing to turn tokens into text.
    """
    room = progress.num_left
    num_kept = _num_kept(piece, progress, eos, detokenize)
    if num_kept is not None and num_kept <= room:
        return _cut(piece, num_kept, FinishReason.STOP)
    if piece.finish_reason is not FinishReason.ABORT:
        return piece
    if len(piece.token_ids) >= room:
        return _cut(piece, room, FinishReason.LENGTH)
    if progress.request.sampling.stop and detokenize is None and not progress.is_aborted:
        raise EngineError(
            "it has stop strings and was interrupted for new weights, across which they cannot be looked for without "
            "a tokenizer: use stop_token_ids, or publish when nothing runs"
        )
    return piece


def _num_kept(piece: Piece, progress: Progress, eos: frozenset[int], detokenize: Detokenize | None) -> int | None:
    """Tokens of `piece` up to the first end in it; None when there is none."""
    sampling = progress.request.sampling
    stop_ids = eos.union(sampling.stop_token_ids) if sampling.stop_token_ids else eos
    response = [*progress.token_ids, *piece.token_ids]
    # SGLang looks for stop strings itself, but not in an aborted step, nor across the pieces of a response.
    is_checked = piece.finish_reason is FinishReason.STOP and not progress.token_ids
    strings = () if is_checked or detokenize is None else sampling.stop
    if strings and detokenize is not None:
        text = detokenize(response)
        strings = tuple(string for string in strings if string in text)
    if not strings and stop_ids.isdisjoint(piece.token_ids):
        return None
    return kept_before_stop(response, len(piece.token_ids), stop_ids, strings, detokenize)


def _cut(piece: Piece, num_tokens: int, reason: FinishReason) -> Piece:
    return replace(
        piece, token_ids=piece.token_ids[:num_tokens], logprobs=piece.logprobs[:num_tokens], finish_reason=reason
    )


def end_token_ids(policy: Path) -> frozenset[int]:
    """The tokens at which SGLang ends a response because the policy's files say so, whatever it is asked for."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        ids = _read(policy / name).get("eos_token_id")
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    eos = _read(policy / "tokenizer_config.json").get("eos_token")
    names = {eos.get("content") if isinstance(eos, dict) else eos, "<|eom_id|>"}
    return frozenset(found | {token_id for token_id, text in _added_tokens(policy) if text in names})


def _added_tokens(policy: Path) -> Iterator[tuple[int, str]]:
    for token in _read(policy / "tokenizer.json").get("added_tokens") or ():
        yield token["id"], token["content"]
    for token_id, token in (_read(policy / "tokenizer_config.json").get("added_tokens_decoder") or {}).items():
        yield int(token_id), token["content"]


def _read(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.exists() else {}
