"""Where an interrupted response from SGLang ends, and which tokens end one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from rollout_engine.request_pool import Piece, Progress
from rollout_engine.sglang_ends import end_token_ids, ended
from rollout_engine.types import EngineError, FinishReason, RolloutRequest, SamplingParams, SpecStats

EOS = frozenset({2})
STATS = SpecStats(num_decode_steps=3, num_verify_steps=3, accepted_histogram=(1, 2))
ABORT, LENGTH, STOP = FinishReason.ABORT, FinishReason.LENGTH, FinishReason.STOP


def text(token_ids: Sequence[int]) -> str:
    return "".join(chr(token_id) for token_id in token_ids)


def piece(token_ids: Sequence[int], reason: FinishReason = ABORT) -> Piece:
    return Piece(tuple(token_ids), tuple(-float(i) for i in range(len(token_ids))), reason, STATS)


def progress(limit: int = 5, before: Sequence[int] = (), **sampling: tuple[int, ...] | tuple[str, ...]) -> Progress:
    work = Progress(RolloutRequest(0, 0, (1,), SamplingParams(**sampling)), limit)  # type: ignore[arg-type]
    if before:
        work.add(piece(before), 0)
    return work


@pytest.mark.parametrize(
    ("token_ids", "reason", "kept", "becomes"),
    [
        ((7, 8, 2), ABORT, 3, STOP),
        ((7, 2, 8, 2), ABORT, 2, STOP),
        ((7, 9, 8), ABORT, 2, STOP),  # the request's own stop id
        ((7, 8, 8, 8, 2), ABORT, 5, STOP),
        ((7, 8, 8, 8, 8), ABORT, 5, LENGTH),
        ((7, 8, 8, 8, 8, 8), ABORT, 5, LENGTH),
        ((7, 8, 8, 8, 8, 2), ABORT, 5, LENGTH),
        ((7, 8), ABORT, 2, ABORT),
        ((), ABORT, 0, ABORT),
        ((7, 8, 2, 8, 8), LENGTH, 3, STOP),  # SGLang 0.5.15 looks at the length first
        ((7, 8, 8, 8, 8), LENGTH, 5, LENGTH),
        ((7, 8, 2), STOP, 3, STOP),
        ((7, 8), STOP, 2, STOP),  # at a stop string
    ],
)
def test_the_end_of_a_piece(token_ids: tuple[int, ...], reason: FinishReason, kept: int, becomes: FinishReason) -> None:
    found = ended(piece(token_ids, reason), progress(stop_token_ids=(9,)), EOS, None)
    assert (found.token_ids, found.finish_reason) == (token_ids[:kept], becomes)
    assert found.logprobs == tuple(-float(i) for i in range(kept))
    assert found.spec == STATS, "forwards that ran are counted"


def test_the_limit_is_that_of_the_whole_response() -> None:
    found = ended(piece((7, 7, 7)), progress(limit=5, before=(7, 7, 7)), EOS, None)
    assert (found.token_ids, found.finish_reason) == ((7, 7), LENGTH)


@pytest.mark.parametrize("reason", [ABORT, LENGTH])
def test_a_stop_string_of_the_last_step(reason: FinishReason) -> None:
    work = progress(stop=("zz", "bc"))
    found = ended(piece(tuple(map(ord, "abcd")), reason), work, EOS, text)
    assert (text(found.token_ids), found.finish_reason) == ("abc", STOP)


def test_a_stop_string_across_two_versions() -> None:
    work = progress(limit=10, before=tuple(map(ord, "ab")), stop=("bcd",))
    found = ended(piece(tuple(map(ord, "cdef")), STOP), work, EOS, text)
    assert (text(found.token_ids), found.finish_reason) == ("cd", STOP)


def test_an_interrupted_one_with_stop_strings_needs_text() -> None:
    work = progress(stop=("bc",))
    with pytest.raises(EngineError, match=r"stop strings and was interrupted.*use stop_token_ids"):
        ended(piece((7, 8)), work, EOS, None)
    work.is_aborted = True
    assert ended(piece((7, 8)), work, EOS, None).finish_reason is ABORT


def test_the_end_tokens_of_the_files(tmp_path: Path) -> None:
    assert end_token_ids(tmp_path) == frozenset()
    files = {
        "config.json": {"eos_token_id": 3},
        "generation_config.json": {"eos_token_id": [3, 4]},
        "tokenizer.json": {"added_tokens": [{"id": 5, "content": "<end>"}, {"id": 6, "content": "<pad>"}]},
        "tokenizer_config.json": {
            "eos_token": {"content": "<end>"},
            "added_tokens_decoder": {"7": {"content": "<|eom_id|>"}},
        },
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert end_token_ids(tmp_path) == {3, 4, 5, 7}
