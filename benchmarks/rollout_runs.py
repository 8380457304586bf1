"""What one arm's rollout was, and what the rows of results/ say of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common import paired_ratio
from rollout_engine.types import Sample, SpecStats
from trainer.metrics import length_metrics, running_by_time, running_from_finishes, speculation_metrics

NUM_TIME_BINS = 12


@dataclass(frozen=True, slots=True)
class ArmRun:
    """One arm's rollout of one seed's requests: in one wave, or in several one after another."""

    seconds: float  # of all waves
    lengths: tuple[int, ...]  # tokens of each response
    finish_s: tuple[float, ...]  # of each response, since its own wave's start
    spec: SpecStats | None = None  # None where the arm does not count it
    samples: tuple[Sample, ...] = ()  # empty where the arm returns no samples
    num_waves: int = 1

    @property
    def tokens_per_s(self) -> float:
        return sum(self.lengths) / self.seconds


def joined(waves: Sequence[ArmRun]) -> ArmRun:
    """Waves that ran one after another, as one run. What is between them was not timed."""
    specs = [wave.spec for wave in waves if wave.spec is not None]
    return ArmRun(
        seconds=sum(wave.seconds for wave in waves),
        lengths=tuple(n for wave in waves for n in wave.lengths),
        finish_s=tuple(t for wave in waves for t in wave.finish_s),
        spec=sum(specs, SpecStats()) if specs else None,
        samples=tuple(sample for wave in waves for sample in wave.samples),
        num_waves=sum(wave.num_waves for wave in waves),
    )


def emitted_per_verify(spec: SpecStats, lengths: Sequence[int]) -> float | None:
    """tau from the tokens really emitted, so without a bonus token behind the end of a text; None without proposals.

    A response's first token comes from its prefill, and every decode step without a proposal emits one.
    """
    if spec.num_verify_steps == 0:
        return None
    decoded = sum(n - 1 for n in lengths if n)
    return (decoded - (spec.num_decode_steps - spec.num_verify_steps)) / spec.num_verify_steps


def arm_row(name: str, runs: Sequence[ArmRun], plain: Sequence[ArmRun] | None) -> dict[str, Any]:
    """One arm at one batch size; ratios are there when plain decoding was measured too."""
    lengths = [n for run in runs for n in run.lengths]
    specs = [run.spec for run in runs if run.spec is not None]
    spec = sum(specs, SpecStats())
    tau = emitted_per_verify(spec, lengths)
    row: dict[str, Any] = {
        "arm": name,
        "tokens_per_s": statistics.fmean(run.tokens_per_s for run in runs),
        "tokens_per_s_by_seed": [run.tokens_per_s for run in runs],
        "makespan_s": sum(run.seconds for run in runs) / sum(run.num_waves for run in runs),
        **finish_metrics([t for run in runs for t in run.finish_s]),
        **length_metrics(lengths),
        **(speculation_metrics(spec) if specs else {}),
        **({"tau": tau} if tau else {}),
    }
    if plain is not None and name != "none":
        ratio = paired_ratio([run.tokens_per_s for run in runs], [run.tokens_per_s for run in plain])
        row |= {"speed_vs_plain": ratio}
        if tau:
            row |= {"speed_over_tau": ratio.mean / tau}
    return row


def finish_metrics(finish_s: Sequence[float]) -> dict[str, float]:
    """Nearest-rank percentiles of the time until a response is finished, counted from the start of its wave."""
    ordered = sorted(finish_s)
    return {f"finish_s_p{p}": ordered[math.ceil(p / 100 * len(ordered)) - 1] for p in (50, 90, 99)}


def running_profile(runs: Sequence[ArmRun], num_slots: int) -> list[float]:
    """Running requests in equal parts of the rollout's time, averaged over seeds."""
    by_run = [
        running_by_time(running_from_finishes(run.finish_s, num_slots), run.seconds, NUM_TIME_BINS) for run in runs
    ]
    return [statistics.fmean(column) for column in zip(*by_run, strict=True)]
