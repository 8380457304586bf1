"""Decides in every step whether the draft learns, and keeps the account of what it saves and costs.

It lives on rank 0, beside the engine; the other ranks are told its decision.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from draft_models.types import VerifyRule
from rollout_engine.types import RolloutEngine
from sync.plan import SyncPlan
from sync.publish import SyncReport
from trainer import draft_ledger, draft_schedule
from trainer.config import RunConfig
from trainer.draft_ledger import Basis, Ledger
from trainer.draft_schedule import MIN_CLIMB, PATIENCE, Decision, Judgement, Money, Reason, Seen, State
from trainer.rollouts import Rollout
from trainer.schedule_record import Schedule, append_decision, cut_schedule

FORECAST_ERROR = 0.05  # standard error of a forecast accept length, tokens: the prompts' part of the noise
SLOPES = {VerifyRule.TARGET_ONLY: -1.0}  # tokens per nat to expect beforehand; 0 where the proposal is sampled from q
FIXED = {"always": Decision(1.0, Reason.ALWAYS), "never": Decision(0.0, Reason.NEVER)}


class DraftPacer:
    """`given`: decisions to take again instead of deciding. `record`: the file that decisions are written to."""

    def __init__(self, config: RunConfig, given: Schedule, record: Path) -> None:
        rollout = config.rollout
        self._config, self._given, self._record = config, given, record
        self._state = State(
            slope_prior=SLOPES.get(VerifyRule(rollout.verify_rule), 0.0),
            patience=MIN_CLIMB if rollout.speculative_draft_model_path else PATIENCE,
        )
        self._ledger = Ledger()
        self._entropy: float | None = None  # of the last rollout decided on,
        self._at_hand = 0.0  # and the budgets' worth of its tokens
        self._forecast: Seen | None = None  # of the rollout before, with that rollout's entropy

    def decide(
        self, step: int, rollout: Rollout, entropy: float | None, engine: RolloutEngine
    ) -> tuple[Decision, dict[str, Any]]:
        """The step's decision and its metrics. `entropy`: nats per token; None when there is nothing to learn from."""
        cost, basis = self._verify_cost(rollout, engine)
        metrics = self._note_saving(rollout, cost, basis)
        self._entropy = entropy
        self._at_hand = draft_ledger.budgets_at_hand(rollout.speculative.samples, self._config.draft)
        idle = None
        if entropy is None:
            idle = Decision(0.0, Reason.NO_SAMPLES)
        elif not engine.transport.plan.has_draft:
            idle = Decision(0.0, Reason.STOPPED)
        when = self._config.draft.when
        if when in FIXED:
            return idle or FIXED[when], metrics
        seen = None if entropy is None else self._see(rollout, entropy)
        judgement = draft_schedule.judge(self._state, seen)
        decision = self._given.get(step) or idle
        if decision is None:
            decision = draft_schedule.decide(self._state, judgement, self._money(step, rollout, judgement, cost))
        append_decision(self._record, step, decision)
        self._state = draft_schedule.advance(self._state, judgement, decision)
        return decision, metrics | _judged(judgement) | {"draft_decision": decision.reason.value}

    def settle(
        self, decision: Decision, draft_s: float, report: SyncReport, plan: SyncPlan, forecast: float | None
    ) -> dict[str, Any]:
        """The step's spending: `draft_s` of the learner's phase, and of the sync the share that the draft's bytes had.

        `forecast`: accept length at the full depth, of the draft that served. What capturing its data adds to the
        policy's update is not in it.
        """
        known = forecast is not None and self._entropy is not None
        self._forecast = Seen(self._entropy, forecast, FORECAST_ERROR) if known else None
        draft_bytes = sum(spec.num_bytes for spec in plan.tensors if spec.model == "draft")
        spent_s = draft_s + report.time_s * draft_bytes / plan.num_bytes
        ledger = draft_ledger.with_draft_time(self._ledger, draft_s, decision, self._at_hand)
        self._ledger = replace(ledger, spent_s=ledger.spent_s + spent_s)
        return {"draft_spent_time_s": spent_s, "draft_balance_time_s": self._ledger.saved_s - self._ledger.spent_s}

    def state(self) -> dict[str, Any]:
        """For a checkpoint's counters: JSON."""
        ledger = asdict(self._ledger)
        forecast = None if self._forecast is None else [self._forecast.entropy, self._forecast.accept_length]
        return {"schedule": draft_schedule.as_dict(self._state), "ledger": ledger, "forecast": forecast}

    def resume(self, state: dict[str, Any] | None, next_step: int) -> None:
        """Go on before `next_step`; `state` is None from the start, or from a checkpoint made before there was one.

        Under `deterministic` what an earlier life of the run decided after its last checkpoint is decided again.
        """
        if state is not None:
            self._state = draft_schedule.from_dict(self._state, state["schedule"])
            self._ledger = draft_ledger.from_dict(state["ledger"])
            self._forecast = None if state["forecast"] is None else Seen(*state["forecast"], FORECAST_ERROR)
        later = cut_schedule(self._record, next_step)
        if self._config.deterministic:
            self._given = {**later, **self._given}

    def _verify_cost(self, rollout: Rollout, engine: RolloutEngine) -> tuple[float | None, Basis]:
        """Cost of a step that verifies, in plain ones, and where it is from; the last probe knows best."""
        probed = draft_ledger.probed_cost(rollout)
        if probed is not None:
            self._ledger = replace(self._ledger, probed_cost=probed)
        if self._ledger.probed_cost is not None:
            return self._ledger.probed_cost, Basis.PROBE
        cost = draft_ledger.table_cost(engine.step_costs(), rollout.speculative)
        if cost is not None:
            return cost, Basis.TABLE
        given = self._config.draft.verify_cost
        return (given, Basis.GIVEN) if given else (None, Basis.BOUND)

    def _note_saving(self, rollout: Rollout, cost: float | None, basis: Basis) -> dict[str, Any]:
        fast = rollout.speculative
        saved_s = draft_ledger.plain_seconds(fast, 1.0 if cost is None else cost) - fast.time_s
        self._ledger = replace(self._ledger, saved_s=self._ledger.saved_s + saved_s)
        return {"draft_saved_time_s": saved_s, "draft_saved_time_basis": basis.value}

    def _see(self, rollout: Rollout, entropy: float) -> Seen | None:
        """What the engine showed; where it hardly drafted, or another drafter's tokens are among it, the forecast.

        A forecast is made after its step was decided on: it is of the rollout before, and of the draft that served it.
        """
        seen = None
        if not self._config.speculation.history:
            spec = draft_ledger.spec_of(rollout.speculative)
            seen = draft_schedule.see(spec, self._config.rollout.speculative_num_steps, entropy)
        return self._forecast if seen is None else seen

    def _money(self, step: int, rollout: Rollout, judgement: Judgement, cost: float | None) -> Money:
        fast, spec = rollout.speculative, draft_ledger.spec_of(rollout.speculative)
        length = spec.accept_length if judgement.seen is None else judgement.seen.accept_length
        return Money(
            rollout_s=fast.time_s,
            train_s=self._ledger.train_s,
            steps_left=self._config.num_rollout - step - 1,
            accept_length=length,
            verified=draft_ledger.verified_share(spec),
            plain_s=None if cost is None else draft_ledger.plain_seconds(fast, cost),
            # At the depths that were drafted: a controller drafts less than the full depth where that is too dear.
            verify_cost=None if cost is None else cost * length / spec.accept_length,
            longest=self._config.rollout.speculative_num_steps + 1.0,
            max_burst=self._config.draft.burst,
            at_hand=self._at_hand,
            can_stop=self._config.rollout.controller == "adaptive" and self._config.rollout.engine == "torch",
        )


def _judged(judgement: Judgement) -> dict[str, Any]:
    if judgement.expected is None:
        return {}
    return {"draft_accept_residual": judgement.residual, "draft_accept_residual_z": judgement.z}
