"""What the draft saves and what it costs, in seconds: pure functions of a step's timings, and the account of a run.

What a rollout would have taken without speculation follows from one number, the cost of a step that verifies drafts
relative to a plain one:

    plain / speculative = tokens per forward / (1 + share of forwards that verify * (cost - 1))

The cost is measured by a plain probe of the same prompts, or stands in the engine's table of step costs, or is given.
Where there is none, a cost of 1 gives the most that can have been saved. Prefill counts as decoding, which favours
neither.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from draft_models.config import DraftConfig
from rollout_engine.speculation import CostTable
from rollout_engine.types import Sample, SpecStats
from trainer.draft_learner import num_tokens
from trainer.draft_schedule import Decision, Reason
from trainer.metrics import running_by_time
from trainer.rollouts import Generated, Rollout

KEPT = 5  # latest timings of each kind; their median forgets a slow first step
MIN_VERIFIED = 0.2  # of a probed rollout's forwards: with fewer, its time says little about verifying


class Basis(StrEnum):
    """Where the cost of verifying comes from: `draft_saved_basis` of the metrics."""

    PROBE = "probe"
    TABLE = "table"
    GIVEN = "given"  # draft.verify_cost
    BOUND = "bound"  # not known: what is saved is an upper bound


@dataclass(frozen=True, slots=True)
class Ledger:
    """The account of a run up to now. Seconds of the learner's phase are kept apart by what it did."""

    trained: tuple[tuple[float, float], ...] = ()  # (seconds, budgets' worth of tokens) of steps with whole budgets
    scored_s: tuple[float, ...] = ()  # of steps without training
    probed_cost: float | None = None  # of a step that verifies, in plain ones, at the last probe
    saved_s: float = 0.0
    spent_s: float = 0.0

    @property
    def train_s(self) -> float:
        """What training on one budget's tokens adds to a step; 0 before it was ever timed."""
        scored_s = statistics.median(self.scored_s) if self.scored_s else 0.0
        budgets = [max(0.0, seconds - scored_s) / budgets for seconds, budgets in self.trained]
        return statistics.median(budgets) if budgets else 0.0


def from_dict(data: Mapping[str, Any]) -> Ledger:
    """What `asdict` and JSON made of one."""
    return Ledger(**{**data, "trained": tuple(map(tuple, data["trained"])), "scored_s": tuple(data["scored_s"])})


def with_draft_time(ledger: Ledger, seconds: float, decision: Decision, at_hand: float) -> Ledger:
    """After a step whose learner worked for so long on a rollout of `at_hand` budgets' worth of tokens.

    Training on a part of the budget says little of the whole.
    """
    budgets = min(decision.share, at_hand)
    if decision.share >= 1.0 and budgets > 0:
        return replace(ledger, trained=(*ledger.trained, (seconds, budgets))[-KEPT:])
    if decision.share == 0.0 and decision.reason not in (Reason.NO_SAMPLES, Reason.STOPPED):
        return replace(ledger, scored_s=(*ledger.scored_s, seconds)[-KEPT:])
    return ledger


def verified_share(spec: SpecStats) -> float:
    """Share of the decode forwards that verified drafts."""
    return spec.num_verify_steps / spec.num_decode_steps if spec.num_decode_steps else 0.0


def probed_cost(rollout: Rollout) -> float | None:
    """Cost of a step that verifies, in plain ones, from a rollout and its plain probe; None where neither tells.

    Rates are compared, because the two differ in length by chance.
    """
    fast, plain = rollout.speculative, rollout.plain
    spec = spec_of(fast)
    verified = verified_share(spec)
    if plain is None or verified < MIN_VERIFIED:
        return None
    speedup = _tokens(fast) / fast.time_s / (_tokens(plain) / plain.time_s)
    cost = 1.0 + (spec.tokens_per_forward / speedup - 1.0) / verified
    return cost if cost > 0 else None


def table_cost(table: CostTable | None, rollout: Generated) -> float | None:
    """The same from the engine's table of step costs, at the rollout's mean batch and depth; None without a table."""
    spec = spec_of(rollout)
    if table is None or not spec.num_verify_steps:
        return None
    batch = max(1, round(running_by_time(rollout.running, rollout.time_s, 1)[0]))
    depth = min(table.max_depth, max(1, round(spec.num_proposed / spec.num_verify_steps)))
    return table.seconds(batch, depth) / table.seconds(batch, 0)


def plain_seconds(rollout: Generated, cost: float) -> float:
    """The rollout's time without speculation, when a step that verifies costs `cost` plain ones."""
    spec = spec_of(rollout)
    return rollout.time_s * spec.tokens_per_forward / (1.0 + verified_share(spec) * (cost - 1.0))


def budgets_at_hand(samples: Sequence[Sample], config: DraftConfig) -> float:
    """Tokens of prompts and responses, in budgets. Samples without signal count too, though none learns from them."""
    return num_tokens(samples) / (config.updates_per_step * config.max_tokens_per_update)


def spec_of(rollout: Generated) -> SpecStats:
    return sum((sample.spec for sample in rollout.samples), SpecStats())


def _tokens(rollout: Generated) -> int:
    return sum(len(sample.token_ids) for sample in rollout.samples)
