"""What the recorded runs say: pure functions from records to figures, each with the n that it rests on.

A run is one arm with one seed. Of each of its steps there is the metrics line (see `trainer.metrics`) and what was
noted beside it of every response: when it finished, its tokens, the target forwards it took after its prefill, and its
reward. Ratios between arms are paired by seed and step, where both had the same prompts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.common import Ratio, half_width_95, paired_ratio
from trainer.metrics import Surprise, total_surprise

BUCKETS = ((1, 1), (2, 8), (9, 32), (33, 128), (129, 1 << 30))  # live requests, both ends included
PLAIN = "none"
NOT_A_STEP = ("time_warm_up_s", "time_eval_s", "time_checkpoint_s", "time_probe_s")  # phases beside the RL step


@dataclass(frozen=True, slots=True)
class Response:
    """One response of one step. `forwards`: target forwards after the prefill, which gave the first token."""

    prompt_id: int
    finish_s: float  # since the rollout's start, when all requests were submitted
    tokens: int
    forwards: int
    reward: float


@dataclass(frozen=True, slots=True)
class StepRecord:
    metrics: Mapping[str, Any]
    responses: tuple[Response, ...]
    sampled_prob: float  # mean p(x) of the sampled tokens, an estimate of E[sum p^2]
    max_prob: float | None = None  # E[max p]; None where the run captured no logits

    @property
    def rollout_s(self) -> float:
        return float(self.metrics["time_rollout_s"])

    @property
    def tokens(self) -> int:
        return sum(r.tokens for r in self.responses)

    @property
    def phases_s(self) -> dict[str, float]:
        """Seconds by `time_<phase>_s`, of all phases."""
        return {key: float(v) for key, v in self.metrics.items() if key.startswith("time_") and key.endswith("_s")}

    @property
    def step_s(self) -> float:
        """The RL step: its phases without evaluation, probe, checkpoint, and the engine's warm-up before the first."""
        return math.fsum(seconds for key, seconds in self.phases_s.items() if key not in NOT_A_STEP)


@dataclass(frozen=True, slots=True)
class RunRecord:
    arm: str
    seed: int
    steps: tuple[StepRecord, ...]
    about: Mapping[str, Any]  # seconds, device copy, settings


# ---- speed by live batch ----


@dataclass(frozen=True, slots=True)
class Stretch:
    """Part of a rollout during which the same `live` requests ran."""

    live: int
    seconds: float
    forwards: int
    tokens: float

    @property
    def request_forwards(self) -> int:
        return self.live * self.forwards


def stretches(responses: Sequence[Response]) -> list[Stretch]:
    """The rollout cut at every finish, in order. All requests must have run from the start (slots >= requests).

    A batch decodes in lockstep: every live request takes part in every forward, so a request that took F forwards was
    there in the first F. Its tokens are spread evenly over them. The prefill's time is in the first stretch, and
    its tokens likewise. Seconds and tokens add up to the rollout's.
    """
    order = sorted(responses, key=lambda r: (r.finish_s, r.forwards))
    found, time_s, done = [], 0.0, 0
    ends = []  # forwards that the batch had made when the request finished
    for response in order:
        ends.append(max(ends[-1] if ends else 0, response.forwards))
    rates = [response.tokens / max(1, end) for response, end in zip(order, ends, strict=True)]
    live_rate = math.fsum(rates)
    for i, (response, end, rate) in enumerate(zip(order, ends, rates, strict=True)):
        lost = response.tokens if end == 0 else 0  # finished by its prefill: no forward to spread its tokens over
        tokens = live_rate * (end - done) + lost
        found.append(Stretch(len(order) - i, response.finish_s - time_s, end - done, tokens))
        time_s, done, live_rate = response.finish_s, end, live_rate - rate
    return found


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over stretches."""

    seconds: float = 0.0
    forwards: int = 0
    request_forwards: int = 0  # a forward counts once for every live request
    tokens: float = 0.0

    def __add__(self, other: Stretch | Totals) -> Totals:
        return Totals(
            self.seconds + other.seconds,
            self.forwards + other.forwards,
            self.request_forwards + other.request_forwards,
            self.tokens + other.tokens,
        )


def by_bucket(parts: Iterable[Stretch]) -> dict[tuple[int, int], Totals]:
    """Sums over the buckets in which forwards were made."""
    sums = dict.fromkeys(BUCKETS, Totals())
    for part in parts:
        bucket = next(b for b in BUCKETS if b[0] <= part.live <= b[1])
        sums[bucket] += part
    return {bucket: total for bucket, total in sums.items() if total.forwards and total.seconds > 0}


@dataclass(frozen=True, slots=True)
class BucketSpeed:
    """An arm against plain decoding at the same number of live requests."""

    bucket: tuple[int, int]
    num_pairs: int  # steps of all seeds in which both arms had so many live
    speedup: Ratio  # of tokens per second
    share_of_time: float  # of the arm's rollout seconds
    forward_ms: float  # one step: plain a decode, otherwise draft and verify
    plain_forward_ms: float
    tokens_per_forward: float  # and request
    needed: float  # tokens per forward and request at which the arm would be as fast as plain decoding


def bucket_speeds(runs: Sequence[RunRecord], plain: Sequence[RunRecord]) -> list[BucketSpeed]:
    """One row a bucket that both arms met in the same step. `runs` and `plain`: the same seeds and steps, in order."""
    ours, theirs = ([_buckets(step) for run in arm for step in run.steps] for arm in (runs, plain))
    total_s = math.fsum(part.seconds for parts in ours for part in parts.values())
    rows = []
    for bucket in BUCKETS:
        pairs = [(a[bucket], b[bucket]) for a, b in zip(ours, theirs, strict=True) if bucket in a and bucket in b]
        if not pairs:
            continue
        mine, base = (_sum(parts) for parts in zip(*pairs, strict=True))
        speed = paired_ratio([a.tokens / a.seconds for a, _ in pairs], [b.tokens / b.seconds for _, b in pairs])
        forward_s, plain_s = mine.seconds / mine.forwards, base.seconds / base.forwards
        needed = base.tokens / base.request_forwards * forward_s / plain_s
        emitted, share = mine.tokens / mine.request_forwards, mine.seconds / total_s
        rows.append(BucketSpeed(bucket, len(pairs), speed, share, forward_s * 1e3, plain_s * 1e3, emitted, needed))
    return rows


def _buckets(step: StepRecord) -> dict[tuple[int, int], Totals]:
    return by_bucket(stretches(step.responses))


def _sum(parts: Iterable[Totals]) -> Totals:
    total = Totals()
    for part in parts:
        total += part
    return total


# ---- whole runs ----


def tokens_per_s(run: RunRecord) -> float:
    return sum(step.tokens for step in run.steps) / sum(step.rollout_s for step in run.steps)


def makespan_s(run: RunRecord) -> float:
    """Mean seconds of a rollout, from its start to its last response."""
    return statistics.fmean(step.rollout_s for step in run.steps)


def matched(runs: Sequence[RunRecord], arm: str, other: str) -> tuple[list[RunRecord], list[RunRecord]]:
    """The seeds that both arms ran, in order, cut to the steps that both have."""
    by_key = {(run.arm, run.seed): run for run in runs}
    seeds = sorted({seed for name, seed in by_key if name == arm} & {seed for name, seed in by_key if name == other})
    pairs = [(by_key[arm, seed], by_key[other, seed]) for seed in seeds]
    return [_cut(a, len(b.steps)) for a, b in pairs], [_cut(b, len(a.steps)) for a, b in pairs]


def _cut(run: RunRecord, num_steps: int) -> RunRecord:
    return replace(run, steps=run.steps[:num_steps])


@dataclass(frozen=True, slots=True)
class Speedup:
    """Against plain decoding over the same steps; ratios above 1 are in the arm's favour."""

    arm: str
    num_seeds: int
    num_pairs: int  # steps of all seeds
    tokens_per_s: Ratio
    tokens_per_s_by_seed: tuple[float, ...]  # of a seed's whole run
    makespan: Ratio
    step: Ratio  # of the seconds of RL steps, end to end


def speedup(runs: Sequence[RunRecord], arm: str) -> Speedup | None:
    """None without a seed that both arms ran."""
    ours, plain = matched(runs, arm, PLAIN)
    if not ours:
        return None
    pairs = [pair for a, b in zip(ours, plain, strict=True) for pair in zip(a.steps, b.steps, strict=True)]
    throughput = paired_ratio([a.tokens / a.rollout_s for a, _ in pairs], [b.tokens / b.rollout_s for _, b in pairs])
    makespan = paired_ratio([b.rollout_s for _, b in pairs], [a.rollout_s for a, _ in pairs])
    step = paired_ratio([b.step_s for _, b in pairs], [a.step_s for a, _ in pairs])
    by_seed = tuple(tokens_per_s(a) / tokens_per_s(b) for a, b in zip(ours, plain, strict=True))
    return Speedup(arm, len(ours), len(pairs), throughput, by_seed, makespan, step)


def without_first(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs without their first steps, which hold what is paid once: kernels are tuned, memory is first taken."""
    return [replace(run, steps=run.steps[1:]) for run in runs if len(run.steps) > 1]


def phase_medians_s(runs: Sequence[RunRecord]) -> dict[str, float]:
    """Median seconds of each phase over the steps of all runs."""
    lines = [step.phases_s for run in runs for step in run.steps]
    names = dict.fromkeys(key for line in lines for key in line)
    return {
        name.removeprefix("time_").removesuffix("_s"): statistics.median(line.get(name, 0.0) for line in lines)
        for name in names
    }


def draft_share(runs: Sequence[RunRecord]) -> float:
    """The draft update's part of the seconds of all RL steps."""
    steps = [step for run in runs for step in run.steps]
    total = math.fsum(step.step_s for step in steps)
    return math.fsum(step.phases_s.get("time_draft_s", 0.0) for step in steps) / total if total else 0.0


# ---- acceptance ----


def accept_lengths(run: RunRecord, key: str = "accept_length") -> list[float]:
    return [float(step.metrics[key]) for step in run.steps if key in step.metrics]


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """Mean over runs, step by step, as far as all of them go."""
    return [statistics.fmean(values) for values in zip(*curves, strict=False)]


CATCH_UP_STEPS = 10  # RL steps in which a random draft is to catch up


@dataclass(frozen=True, slots=True)
class CatchUp:
    """The online draft's accept length (mean over seeds) against the frozen one's, at the same steps."""

    first_step: int | None  # from 0; the first at 90 % of the frozen draft's; None: never
    steps_below_after: int  # later steps at which it is below the frozen draft's
    steps_after: int
    below_from: int  # of the steps from CATCH_UP_STEPS on, those at which it is below the frozen draft's
    steps_from: int
    final_ratio: float
    num_seeds: int


def catch_up(runs: Sequence[RunRecord], online: str, frozen: str, share: float = 0.9) -> CatchUp | None:
    ours, theirs = matched(runs, online, frozen)
    a, b = (mean_curve([accept_lengths(run) for run in arm]) for arm in (ours, theirs))
    if not a or not b:
        return None
    first = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x >= share * y), None)
    later = [] if first is None else list(zip(a, b, strict=True))[first + 1 :]
    late = list(zip(a, b, strict=True))[CATCH_UP_STEPS:]
    below, below_late = (sum(x < y for x, y in pairs) for pairs in (later, late))
    return CatchUp(first, below, len(later), below_late, len(late), a[-1] / b[-1], len(ours))


# ---- rewards ----


def mean_reward(step: StepRecord) -> tuple[float, float]:
    """The step's mean reward, and the variance of that mean from sampling the responses of its given prompts."""
    groups: dict[int, list[float]] = {}
    for response in step.responses:
        groups.setdefault(response.prompt_id, []).append(response.reward)
    total = len(step.responses)
    mean = math.fsum(r.reward for r in step.responses) / total
    variances = [len(g) ** 2 * statistics.variance(g) / len(g) for g in groups.values() if len(g) > 1]
    return mean, math.fsum(variances) / total**2


@dataclass(frozen=True, slots=True)
class RewardTest:
    """Whether an arm's reward curve is plain decoding's, step by step on the same prompts.

    z = (reward - plain reward) / its standard deviation under equal policies, sampling noise alone. At step 0 the
    policies are equal, so |z| > 1.96 in 5 % of cases; later each run has learned from samples of its own, which widens
    z. `mean_difference` is over all steps, its spread over seeds. `seed_spread` is the root mean square difference of
    two seeds of plain decoding at the same step (other prompts, too), to see the difference against.
    """

    arm: str
    num_seeds: int
    num_steps: int
    z_first_steps: tuple[float | None, ...]  # one a seed
    num_z: int  # steps of all seeds; a step on which every response of a prompt was rewarded alike has no z
    rms_z: float | None
    num_outside: int  # |z| > 1.96
    mean_difference: float
    difference_by_seed: tuple[float, ...]
    half_width_95: float | None  # of the mean difference, over seeds; None from one seed
    rms_difference: float
    seed_spread: float | None


def reward_test(runs: Sequence[RunRecord], arm: str) -> RewardTest | None:
    """None without a seed that both arms ran."""
    ours, plain = matched(runs, arm, PLAIN)
    if not ours:
        return None
    zs, differences = [], []
    for a, b in zip(ours, plain, strict=True):
        pairs = [(mean_reward(x), mean_reward(y)) for x, y in zip(a.steps, b.steps, strict=True)]
        differences.append([x - y for (x, _), (y, _) in pairs])
        zs.append([(x - y) / math.sqrt(vx + vy) if vx + vy > 0 else None for (x, vx), (y, vy) in pairs])
    every_z = [z for row in zs for z in row if z is not None]
    every = [d for row in differences for d in row]
    by_seed = tuple(statistics.fmean(row) for row in differences)
    return RewardTest(
        arm,
        len(ours),
        min(len(row) for row in differences),
        tuple(row[0] for row in zs),
        len(every_z),
        _rms(every_z) if every_z else None,
        sum(abs(z) > 1.96 for z in every_z),
        statistics.fmean(every),
        by_seed,
        half_width_95(by_seed),
        _rms(every),
        _seed_spread(plain),
    )


def _seed_spread(plain: Sequence[RunRecord]) -> float | None:
    curves = [[mean_reward(step)[0] for step in run.steps] for run in plain]
    gaps = [
        x - y
        for i, first in enumerate(curves)
        for second in curves[i + 1 :]
        for x, y in zip(first, second, strict=False)
    ]
    return _rms(gaps) if gaps else None


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(statistics.fmean(v * v for v in values))


# ---- sync ----


@dataclass(frozen=True, slots=True)
class SyncSpeed:
    """Syncs behind the first step of each run, beside a plain device copy of the same bytes.

    `median_ms` is of `publish`: cast, checksums, the way there, the engine's pause, its checks and its answer.
    `phase_ms` is of the whole phase, the export of policy and draft from the trainer included.
    """

    num_syncs: int
    num_bytes: int
    median_ms: float
    phase_ms: float
    gb_per_s: float
    copy_ms: float

    @property
    def over_copy(self) -> float:
        return self.median_ms / self.copy_ms


def sync_speed(runs: Sequence[RunRecord]) -> SyncSpeed | None:
    """None without a step behind the first."""
    lines = [step.metrics for run in runs for step in run.steps[1:]]
    times = [float(line["sync_time_s"]) for line in lines]
    if not times:
        return None
    num_bytes, median_s = int(runs[0].steps[0].metrics["sync_bytes"]), statistics.median(times)
    copy_s = statistics.median(float(run.about["device_copy_s"]) for run in runs)
    phase_s = statistics.median(float(line["time_sync_s"]) for line in lines)
    return SyncSpeed(len(times), num_bytes, median_s * 1e3, phase_s * 1e3, num_bytes / median_s / 1e9, copy_s * 1e3)


def surprise(runs: Sequence[RunRecord]) -> Surprise | None:
    """Over all steps of `runs`; None where a step does not tell."""
    lines = [step.metrics for run in runs for step in run.steps]
    return total_surprise(lines) if all("surprise_gap_z" in line for line in lines) else None
