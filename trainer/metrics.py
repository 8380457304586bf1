"""From samples and updates to the metrics line of a step: pure functions, a clock, and two writers.

A line is flat JSON: numbers, strings, lists by draft position or by time bin, and one dict (`finish_reasons`). A value
that does not exist has no key; a value that is not finite raises. Means over tokens weight every token alike.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout_engine.types import Sample, SpecStats

METRICS_FILE = "metrics.jsonl"
NUM_TIME_BINS = 24  # of `running_batch`


class MetricsError(ValueError):
    """A metric that is not a finite number, two parts that name the same metric, or an unreadable metrics file."""


def rollout_metrics(
    samples: Sequence[Sample], rollout_s: float, running: Sequence[tuple[float, int]] = ()
) -> dict[str, Any]:
    """Everything that one rollout's samples say. `samples` must not be empty.

    `running` lists (seconds since the start, requests running) whenever the number changed, or once a forward.
    """
    num_tokens = sum(len(s.token_ids) for s in samples)
    return {
        **reward_metrics(samples),
        **speculation_metrics(sum((s.spec for s in samples), SpecStats())),
        **length_metrics([len(s.token_ids) for s in samples]),
        "policy_version": max(span.version for s in samples for span in s.policy_versions),
        "finish_reasons": dict(sorted(Counter(s.finish_reason.value for s in samples).items())),
        "num_samples": len(samples),
        "response_tokens": num_tokens,
        "tokens_per_s": num_tokens / rollout_s,
        "running_batch": running_by_time(running, rollout_s, NUM_TIME_BINS) if running else None,
    }


def reward_metrics(samples: Sequence[Sample]) -> dict[str, Any]:
    """Mean reward over samples, and the share of groups (same prompt) whose rewards differ: those carry a gradient."""
    groups: dict[int, list[float]] = {}
    for sample in samples:
        if sample.reward is not None:
            groups.setdefault(sample.request.prompt_id, []).append(sample.reward)
    rewards = [r for group in groups.values() for r in group]
    if not rewards:
        return {}
    with_signal = sum(min(group) != max(group) for group in groups.values())
    return {"reward": math.fsum(rewards) / len(rewards), "groups_with_signal": with_signal / len(groups)}


def speculation_metrics(spec: SpecStats) -> dict[str, Any]:
    """Accept length and acceptance by position from summed statistics; only forwards when nothing was proposed.

    `accept_rate_by_position[j]`: accepted / proposed at draft position j; a draft behind a rejected one counts as
    rejected.
    """
    rates = [a / p for a, p in zip(spec.accepted_by_position, spec.proposed_by_position, strict=True) if p]
    verified = {
        "accept_length": spec.accept_length,
        "accept_rate_by_position": rates,
        "proposed_by_position": list(spec.proposed_by_position),
        "accepted_histogram": list(spec.accepted_histogram),
        "verify_steps": spec.num_verify_steps,
    }
    decoded = {"decode_steps": spec.num_decode_steps, "tokens_per_forward": spec.tokens_per_forward}
    return decoded | (verified if spec.num_verify_steps else {}) | history_metrics(spec)


def history_metrics(spec: SpecStats) -> dict[str, Any]:
    """What either drafter did where history drafted beside the model; {} where it did not.

    Each is sent where it is the better one, so that neither figure is what that drafter would show alone.
    """
    history, model = spec.history, spec.by_draft_model
    if history is None:
        return {}
    found = {
        "history_verify_steps": history.num_verify_steps,
        "history_share": history.num_verify_steps / spec.num_verify_steps,
        "history_accept_length": history.accept_length,
        "history_proposed": history.num_proposed,
        "history_accepted": history.num_accepted,
    }
    return found | ({"draft_accept_length": model.accept_length} if model.num_verify_steps else {})


def length_metrics(lengths: Sequence[int]) -> dict[str, Any]:
    """Response lengths in tokens: mean, maximum, nearest-rank percentiles, and counts by power of two.

    `response_len_histogram[i]` counts lengths in [2**i, 2**(i+1)); a length of 0 counts with 1.
    """
    ordered = sorted(lengths)
    bins = [0] * max(1, ordered[-1]).bit_length()
    for length in ordered:
        bins[max(1, length).bit_length() - 1] += 1
    return {
        "response_len_mean": sum(ordered) / len(ordered),
        "response_len_max": ordered[-1],
        **{f"response_len_p{p}": ordered[math.ceil(p / 100 * len(ordered)) - 1] for p in (50, 90, 99)},
        "response_len_histogram": bins,
    }


def running_from_finishes(finish_s: Sequence[float], num_slots: int) -> list[tuple[float, int]]:
    """Running requests over time, from when each of the requests finished (all submitted at 0).

    An engine that refills a free slot at once runs min(slots, unfinished) requests.
    """
    total = len(finish_s)
    points = [(0.0, min(num_slots, total))]
    return points + [(t, min(num_slots, total - i)) for i, t in enumerate(sorted(finish_s), start=1)]


def running_by_time(points: Sequence[tuple[float, int]], end_s: float, num_bins: int) -> list[float]:
    """Time-weighted mean number of running requests in `num_bins` equal parts of [0, end_s].

    Each point (time_s, running) holds until the next one; before the first point nothing runs.
    """
    width = end_s / num_bins
    area = [0.0] * num_bins
    ends = [t for t, _ in points[1:]] + [end_s]
    for (start, running), end in zip(points, ends, strict=True):
        for i in range(max(0, int(start / width)), num_bins):
            if i * width >= end:
                break
            overlap = min(end, (i + 1) * width) - max(start, i * width)
            area[i] += running * max(0.0, overlap)
    return [a / width for a in area]


def plain_probe_metrics(
    spec: Sequence[Sample], spec_s: float, plain: Sequence[Sample], plain_s: float
) -> dict[str, Any]:
    """Speed of the same prompts with and without speculation, as tokens per second (lengths differ by chance)."""
    rates = [sum(len(s.token_ids) for s in samples) / t for samples, t in ((spec, spec_s), (plain, plain_s))]
    return {"speedup_vs_plain": rates[0] / rates[1], "plain_tokens_per_s": rates[1]}


def step_line(step: int, *parts: Mapping[str, Any]) -> dict[str, Any]:
    """One metrics line from its parts, and what follows from two of them; keys with the value None are left out.

    Raises MetricsError for a key that two parts give, and for a value that is not finite (naming step and key).
    """
    line: dict[str, Any] = {"step": step}
    for part in parts:
        for key, value in part.items():
            if value is None:
                continue
            if key in line:
                raise MetricsError(
                    f"step {step}: metric {key!r} was given twice; one of its two makers must be renamed"
                )
            _check_finite(step, key, value)
            line[key] = value
    return line | expected_accept_length(line)


def expected_accept_length(line: Mapping[str, Any]) -> dict[str, float]:
    """What `accept_length` should have been: the learner's acceptance by position at the depths that were drafted.

    `predicted_accept_length` takes the full depth at every step, which an adaptive controller does not draft. Where
    history drafts too there is none: the model drafts at places that were chosen, and the forecast is of all.
    """
    if "history_verify_steps" in line:
        return {}
    proposed = line.get("proposed_by_position", [])
    rates = line.get("predicted_accept_rate_by_position", [])
    if not proposed or len(rates) < len(proposed):
        return {}
    accepted = sum(rate * count for rate, count in zip(rates, proposed, strict=False))
    return {"expected_accept_length": 1.0 + accepted / line["verify_steps"]}


def _check_finite(step: int, key: str, value: Any) -> None:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
    for number in inner:
        if isinstance(number, float) and not math.isfinite(number):
            raise MetricsError(f"step {step}: metric {key!r} is {number}; nothing of this step was logged")


class PhaseClock:
    """Seconds by phase: `with clock("rollout"): ...`. The time of a phase inside another counts for the inner one only,
    so that the phases of a step add up to at most its wall time."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._close_slice()
        self._open.append(phase)
        try:
            yield
        finally:
            self._close_slice()
            self._open.pop()

    def _close_slice(self) -> None:
        now = time.perf_counter()
        if self._open:
            phase = self._open[-1]
            self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def seconds(self, phase: str) -> float:
        """Seconds of a phase since the last `take`; KeyError if it was not entered."""
        return self._seconds[phase]

    def take(self) -> dict[str, float]:
        """`time_<phase>_s` of every phase entered since the last call, and start anew."""
        taken = {f"time_{phase}_s": seconds for phase, seconds in self._seconds.items()}
        self._seconds = {}
        return taken


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The line as named numbers: lists by index (`accept_rate_by_position/0`), dicts by key; strings left out."""
    flat: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, int | float):
            flat[key] = value
        elif isinstance(value, list | tuple):
            flat |= {f"{key}/{i}": v for i, v in enumerate(value)}
        elif isinstance(value, Mapping):
            flat |= {f"{key}/{k}": v for k, v in value.items()}
    return flat


class MetricsWriter:
    """Appends each line to `metrics.jsonl`, flushed, and the same numbers to TensorBoard event files.

    `resumed_at` hides the events that an earlier life of the run left from that step on; None: it is the first life.
    """

    def __init__(self, run_dir: Path, resumed_at: int | None = None):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only writers need it

        self._file = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_at)

    def write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in scalars(line).items():
            if name != "step":
                self._events.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._file.close()
        self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order. MetricsError names the file and line that is not a metrics line."""
    if not path.is_file():
        raise MetricsError(f"{path}: no metrics file there; give the folder of a run that finished at least one step")
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise MetricsError(
                f"{path}:{number}: not JSON ({error.msg}); delete the line (a killed run can leave one)"
            ) from error
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise MetricsError(
                f"{path}:{number}: not a metrics line (an object with an integer 'step'); delete the line"
            )
        lines.append(line)
    if not lines:
        raise MetricsError(f"{path}: empty; give the folder of a run that finished at least one step")
    return lines


@dataclass(frozen=True, slots=True)
class Surprise:
    """-log p(x) - H(p) over all sampled tokens: 0 on average when they were drawn from the policy's own law p."""

    mean: float  # nats
    z: float  # a standard normal then
    num_tokens: int


MAX_SURPRISE_Z = 4.0  # of an exact sampler once in 16,000 runs


def total_surprise(lines: Sequence[Mapping[str, Any]]) -> Surprise | None:
    """Over the metrics lines that tell it (see `policy_batch.surprise_metrics`); None when none does."""
    keys = {"surprise_gap", "surprise_gap_z", "num_tokens"}
    told = [line for line in lines if keys <= line.keys() and line["surprise_gap_z"]]
    if not told:
        return None
    sums = [line["surprise_gap"] * line["num_tokens"] for line in told]
    squares = sum((total / line["surprise_gap_z"]) ** 2 for total, line in zip(sums, told, strict=True))
    num_tokens = int(sum(line["num_tokens"] for line in told))
    return Surprise(sum(sums) / num_tokens, sum(sums) / math.sqrt(squares), num_tokens)
