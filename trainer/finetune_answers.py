"""Answers of the target to prompts: what its draft should learn from is what the target itself says.

They are written in groups as they come, in the form that `--data` reads, so that a killed run goes on behind the last
whole group, and so that the same answers can train another draft.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from draft_models.randomness import ReservedStep, request_seed
from rollout_engine.config import RolloutConfig
from rollout_engine.types import FinishReason, RolloutEngine, RolloutRequest, Sample, SamplingParams
from sync.atomic import write_file
from trainer.config import ConfigError
from trainer.finetune_data import TextRow, dump_row, parse_dumped

GROUP = 512  # requests whose answers are written at once


def make_requests(rows: Sequence[TextRow], rollout: RolloutConfig, num_samples: int, seed: int) -> list[RolloutRequest]:
    """`num_samples` requests a row, siblings next to each other; request n is sample n % num_samples of its row.

    Their seeds are none of a run's, whose rows and seed may well be the same.
    """
    step = ReservedStep.ANSWERS
    return [
        RolloutRequest(row, sample, text.prompt_ids, _sampling(rollout, request_seed(seed, step, row, sample)))
        for row, text in enumerate(rows)
        for sample in range(num_samples)
    ]


def as_samples(requests: Sequence[RolloutRequest], responses: Sequence[Sequence[int]]) -> list[Sample]:
    """What the draft's training and its forecast take: requests with the tokens that answered them."""
    return [
        Sample(request, tuple(response), (), (), FinishReason.STOP)
        for request, response in zip(requests, responses, strict=True)
    ]


def generate_answers(
    engine: RolloutEngine, requests: Sequence[RolloutRequest], file: Path, report: Callable[[int, int], None]
) -> None:
    """Answer every request and write it to `file`, behind the groups that are there already.

    `report(done, total)` is called after each group. Raises what the engine raises; what is written stays.
    """
    done = _cut_to_whole_groups(file, len(requests))
    report(done, len(requests))
    while done < len(requests):
        group = requests[done : done + GROUP]
        answers = {sample.request.key: sample.token_ids for sample in engine.generate(group)}
        lines = (dump_row(TextRow(request.prompt_ids, answers[request.key])) for request in group)
        _append(file, "".join(f"{line}\n" for line in lines))
        done += len(group)
        report(done, len(requests))


def read_answers(file: Path) -> list[tuple[int, ...]]:
    """The response of every request, in their order. ConfigError for a line that `generate_answers` did not write."""
    return [_answer(file, number, line) for number, line in enumerate(_whole_lines(file), start=1)]


def _answer(file: Path, number: int, line: str) -> tuple[int, ...]:
    try:
        return parse_dumped(line).response_ids or ()
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{file} line {number}: it was changed and is no answer; remove that file") from None


def _sampling(rollout: RolloutConfig, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_new_tokens=rollout.max_response_len,
        seed=seed,
        stop=rollout.stop,
    )


def _cut_to_whole_groups(file: Path, total: int) -> int:
    """Answers kept: of all groups but the one that a kill left unfinished, so that the rest is drawn as it would be."""
    lines = _whole_lines(file)
    kept = total if len(lines) >= total else len(lines) // GROUP * GROUP
    write_file(file, "".join(lines[:kept]))
    return kept


def _whole_lines(file: Path) -> list[str]:
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return lines[:-1] if lines and not lines[-1].endswith("\n") else lines


def _append(file: Path, text: str) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
