"""Which of the experiment's goals are met, and what a speed-up would have taken where there was none: as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import rl_on_gpu_analysis as analysis
from benchmarks.rl_on_gpu_analysis import PLAIN, BucketSpeed, RunRecord
from trainer.metrics import MAX_SURPRISE_Z

CATCH_UP_SHARE = 0.9
MAX_DRAFT_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Goal:
    """`met` is None where the runs cannot decide; `found` says what they showed, with its n."""

    goal: str
    met: bool | None
    found: str


def goals(runs: Sequence[RunRecord], arms: Sequence[str]) -> list[Goal]:
    """Those that the finished runs say anything about."""
    found = [exactness_goal(name, [record for record in runs if record.arm == name]) for name in arms]
    found += catch_up_goals(runs) + draft_share_goals(runs)
    return found + [reward_goal(test) for name in arms if name != PLAIN and (test := analysis.reward_test(runs, name))]


def exactness_goal(arm: str, runs: Sequence[RunRecord]) -> Goal:
    what = f"rollouts of {arm} are drawn from the policy's own law"
    seen = analysis.surprise(runs)
    if seen is None:
        return Goal(what, None, "not recorded by these runs")
    gap = f"surprise - entropy {seen.mean:+.4f} nats, z {seen.z:+.1f} (n {seen.num_tokens:,} tokens)"
    return Goal(what, abs(seen.z) < MAX_SURPRISE_Z, gap)


def catch_up_goals(runs: Sequence[RunRecord]) -> list[Goal]:
    caught = analysis.catch_up(runs, "online", "frozen", CATCH_UP_SHARE)
    if caught is None:
        return []
    first, seeds = caught.first_step, f"mean of {caught.num_seeds} seeds"
    num_steps = len(analysis.matched(runs, "online", "frozen")[0][0].steps)
    never = False if num_steps >= analysis.CATCH_UP_STEPS else None  # shorter runs have not had their chance
    in_time = first < analysis.CATCH_UP_STEPS if first is not None else never
    when = "in no step" if first is None else f"first in step {first + 1}"
    below = f"below in {caught.below_from} of {caught.steps_from} steps"
    sooner = f"after the first step at {CATCH_UP_SHARE:.0%}: in {caught.steps_below_after} of {caught.steps_after}"
    return [
        Goal(
            f"online accept length >= {CATCH_UP_SHARE:.0%} of the offline-trained draft's "
            f"within {analysis.CATCH_UP_STEPS} steps",
            in_time,
            f"{when} of {num_steps}; last step {caught.final_ratio:.0%} ({seeds})",
        ),
        Goal(
            f"online accept length not below the frozen draft's from step {analysis.CATCH_UP_STEPS + 1} on",
            caught.below_from == 0 if caught.steps_from else None,
            f"{below}; {sooner} ({seeds})",
        ),
    ]


def draft_share_goals(runs: Sequence[RunRecord]) -> list[Goal]:
    online = analysis.without_first([record for record in runs if record.arm == "online"])
    if not online:
        return []
    share, num_steps = analysis.draft_share(online), sum(len(record.steps) for record in online)
    what = f"draft training <= {MAX_DRAFT_SHARE:.0%} of the step (online)"
    return [Goal(what, share <= MAX_DRAFT_SHARE, f"{share:.1%} (n {num_steps} steps, each run's first left out)")]


def reward_goal(test: analysis.RewardTest) -> Goal:
    """Within noise: the mean difference's interval over seeds holds 0, and an arm differs from plain decoding at the
    same step no more than two seeds of plain decoding do from each other. One seed cannot decide,
    nor can rewards that are all alike."""
    met = None
    if test.half_width_95 is not None and test.seed_spread is not None and test.num_z:
        met = abs(test.mean_difference) <= test.half_width_95 and test.rms_difference <= test.seed_spread
    half = "" if test.half_width_95 is None else f" +- {test.half_width_95:.4f} (95 %, Student's t over seeds)"
    spread = "" if test.seed_spread is None else f", between seeds of none {test.seed_spread:.3f}"
    first = ", ".join("-" if z is None else f"{z:+.2f}" for z in test.z_first_steps)
    return Goal(
        f"reward curve of {test.arm} within noise of none's",
        met,
        f"mean difference {test.mean_difference:+.4f}{half}; rms difference of a step "
        f"{test.rms_difference:.3f}{spread}; z at the first step {first}; "
        f"{test.num_outside} of {test.num_z} steps with abs(z) > 1.96 "
        f"(n {test.num_seeds} seeds x {test.num_steps} steps)",
    )


def shortfall(arm: str, rows: Sequence[BucketSpeed]) -> list[str]:
    """One sentence a bucket in which the arm is slower than plain decoding: why, and what accept length it takes."""
    return [
        f"{arm}, {bucket_name(row.bucket)} live: S = {row.speedup}. A plain step takes {row.plain_forward_ms:.2f} ms, "
        f"draft and verify {row.forward_ms:.2f} ms ({row.forward_ms / row.plain_forward_ms:.2f} times as long), "
        f"so S = 1 takes {row.needed:.2f} tokens per forward and request; it had {row.tokens_per_forward:.2f}."
        for row in rows
        if row.speedup.mean < 1
    ]


def bucket_name(bucket: tuple[int, int]) -> str:
    low, high = bucket
    return f"{low}" if low == high else f"> {low - 1}" if high >= 1 << 30 else f"{low}-{high}"
