"""When the draft learns, and from how much (`draft.train_when = "pays"`): pure functions of what was seen.

    judgement = judge(state, seen)                 what the rollout's acceptance says
    decision  = decide(state, judgement, money)    the only one that looks at seconds
    state     = advance(state, judgement, decision)

Because `advance` sees no seconds, a run that takes recorded decisions again goes through the same states bit for bit.

Acceptance follows the policy's entropy by itself (Bebop, arXiv 2606.12370), which no training mends. So a line of
accept length over entropy is fitted to the steps at which the draft was as good as it gets, and only a fall below that
line, beyond the noise, starts training again (SpecRoll, arXiv 2608.04962, trains after a sustained drift too). The fall
is found by Page's cumulative sum (Biometrika 1954): one bad step or several poor ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import accumulate
from typing import Any

from rollout_engine.types import SpecStats

MIN_VERIFIES = 32  # fewer say nothing of a rollout's acceptance
CLUSTERING = 1.5  # verify steps of one text are alike: their mean scatters this much more than independent ones'
WINDOW = 24  # steps that the line is fitted to, at most
MIN_REFERENCE = 3  # fewer are no line: their mean, and the slope and noise to expect beforehand
MIN_RISE = 2  # steps of training before their rise is read
MIN_CLIMB = 5  # steps of training before a rise may be found to be over
MAX_CLIMB = 8  # latest rollouts that a rise is read from,
LATE = 3  # and those that tell whether it goes on just now
RECOVERY = 4  # steps of training that a fall is given, and the rollouts that its recovery is read from
PATIENCE = 20  # of a draft that began with random weights, while its acceptance has not risen at all
RISEN = 3.0  # times the noise: acceptance that is so much above where it began has risen
PRIOR_STEPS = 4  # steps that the noise to expect beforehand counts for
MAX_SLOPE = 3.0  # tokens per nat: the literature's steepest is 1.7
SLACK, ALARM = 0.5, 4.0  # of the cumulative sum, in units of the noise
AHEAD = 8  # budgets for which a rise is carried on
LASTING = 16  # steps for which what was learned is taken to last
MIN_SHARE = 1 / 8  # of a step's tokens: less is not worth an optimizer step
CALM_STEPS = 12  # without a fall before the share is halved


class Reason(StrEnum):
    """Why a step trained the draft or did not: `draft_decision` of the metrics."""

    ALWAYS = "always"
    NEVER = "never"
    NO_SAMPLES = "no_samples"  # every group was dropped: there is nothing to learn from
    STOPPED = "stopped"  # the engine serves no draft any more
    START = "start"  # too little was seen: a draft that is new learns
    RISING = "rising"  # its acceptance still rises by more than the training costs
    DROP = "drop"  # acceptance fell below what the entropy explains
    RECOVER = "recover"  # and is not back yet
    KEEP = "keep"  # a part of the tokens: as much as the falls of the last cycle called for
    REST = "rest"
    LOSING = "losing"  # the draft costs more than it saves, and learning would not change that in time


@dataclass(frozen=True, slots=True)
class Decision:
    """`share` of the step's token budget to train on; 0 = score the draft only, above 1 = a burst."""

    share: float
    reason: Reason


@dataclass(frozen=True, slots=True)
class Seen:
    """One rollout: the policy's mean entropy, and tokens per verify step at the full depth with its standard error."""

    entropy: float  # nats per token
    accept_length: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class Money:
    """What a step's seconds say about training. `plain_s` and `verify_cost` are None when they are not known."""

    rollout_s: float
    train_s: float  # of a training on one budget's tokens, beyond mere scoring
    steps_left: int  # rollouts that will still be made
    accept_length: float  # at the full depth, at which the rollout took so long
    verified: float  # share of its forwards that verified drafts
    plain_s: float | None  # the same rollout without speculation
    verify_cost: float | None  # accept length below which drafting loses
    can_stop: bool  # the engine drafts nothing where drafting loses
    max_burst: int = 1  # budgets that a step may train on where that pays
    longest: float = math.inf  # accept length that no draft exceeds
    at_hand: float = math.inf  # budgets' worth of tokens in a rollout

    def training_s(self, budgets: float) -> float:
        """One step's training: further budgets of a rollout that has no more tokens are smaller steps on the same."""
        return self.train_s * min(budgets, self.at_hand)

    @property
    def is_losing(self) -> bool:
        return self.verify_cost is not None and self.accept_length < self.verify_cost

    def seconds_at(self, accept_length: float) -> float:
        """The same rollout with a draft of another accept length."""
        if self.plain_s is None or self.verify_cost is None:
            return self.rollout_s * self.accept_length / accept_length
        drafting_s = self.plain_s * self.verify_cost / accept_length
        return min(self.plain_s, drafting_s) if self.can_stop else drafting_s


class Phase(StrEnum):
    """What the draft is at, which says how its acceptance is read."""

    LEARNING = "learning"
    RESTING = "resting"
    RECOVERING = "recovering"


@dataclass(frozen=True, slots=True)
class State:
    """What is remembered from step to step. `reference` is what the line is fitted to; `climb` are the steps of
    training since it last began, none while the draft rests, and `budgets` what each of them trained on."""

    slope_prior: float = 0.0  # tokens per nat, at most 0
    patience: int = MIN_CLIMB
    phase: Phase = Phase.LEARNING
    reference: tuple[Seen, ...] = ()
    climb: tuple[Seen, ...] = ()
    budgets: tuple[float, ...] = ()
    share: float = 0.0  # of the tokens, between falls
    need: float = 0.0  # what the last cycle of rest and recovery came to, as a share
    rested: int = 0  # steps since the last fall, or since the learning ended
    fall: float = 0.0  # the cumulative sum,
    falling: int = 0  # and the steps since it was 0, which are the latest of the reference


@dataclass(frozen=True, slots=True)
class Judgement:
    """A rollout beside the line. `rise` is the gain of accept length per budget of the training so far, `late_rise`
    that of its last two steps: a burst that has taken the draft to its plateau is seen there first."""

    seen: Seen | None
    expected: float | None = None  # accept length at this entropy; None without a line
    residual: float = 0.0
    z: float = 0.0
    fall: float = 0.0
    rise: float = 0.0
    late_rise: float = 0.0
    has_risen: bool = False  # since the training began

    @property
    def has_fallen(self) -> bool:
        return self.fall > ALARM

    @property
    def is_back(self) -> bool:
        return self.expected is None or self.z > -1.0


def see(spec: SpecStats, depth: int, entropy: float) -> Seen | None:
    """A rollout's acceptance at the full depth; None when hardly anything was verified.

    Depths that a controller rarely drafted go on falling as those before them do.
    """
    if spec.num_verify_steps < MIN_VERIFIES:
        return None
    rates: list[float] = []
    counts = zip(spec.proposed_by_position[:depth], spec.accepted_by_position[:depth], strict=True)
    for proposed, accepted in counts:
        if proposed < MIN_VERIFIES:
            break
        rates.append(min(accepted / proposed, rates[-1] if rates else 1.0))
    while rates and len(rates) < depth:
        before = rates[-2] if len(rates) > 1 else 1.0
        rates.append(rates[-1] * (rates[-1] / before if before else 0.0))
    mean = spec.num_accepted / spec.num_verify_steps
    square = sum(n * n * count for n, count in enumerate(spec.accepted_histogram)) / spec.num_verify_steps
    error = math.sqrt(max(square - mean * mean, 1.0 / spec.num_verify_steps) / spec.num_verify_steps)
    return Seen(entropy, 1.0 + sum(rates), CLUSTERING * error)


def judge(state: State, seen: Seen | None) -> Judgement:
    """`seen` beside the line through the reference, which it is not part of yet."""
    if seen is None:
        return Judgement(None, fall=state.fall)
    slope, noise = fit(state, seen.standard_error)
    spans = (RECOVERY if state.phase is Phase.RECOVERING else MAX_CLIMB, LATE)
    rise, late_rise = (rise_per_budget([*state.climb, seen][-n:], state.budgets[1 - n :], slope) for n in spans)
    has_risen = bool(state.climb) and seen.accept_length - state.climb[0].accept_length > RISEN * noise
    if not state.reference:
        return Judgement(seen, rise=rise, late_rise=late_rise, has_risen=has_risen)
    expected = _mean([p.accept_length for p in state.reference])
    expected += slope * (seen.entropy - _mean([p.entropy for p in state.reference]))
    residual = seen.accept_length - expected
    return Judgement(
        seen,
        expected,
        residual,
        residual / noise,
        _fall(state, seen, residual, slope, noise),
        rise,
        late_rise,
        has_risen,
    )


def _fall(state: State, seen: Seen, residual: float, slope: float, noise: float) -> float:
    """The cumulative sum below the line while the draft rests; what one step took while it recovers; else 0."""
    if state.phase is Phase.RESTING:
        return max(0.0, state.fall - residual / noise - SLACK)
    if state.phase is Phase.RECOVERING:
        before = state.climb[-1]
        return max(0.0, before.accept_length + slope * (seen.entropy - before.entropy) - seen.accept_length) / noise
    return 0.0


def fit(state: State, standard_error: float) -> tuple[float, float]:
    """(slope, noise) of accept length over entropy in the reference: a ridge towards the rule's prior slope.

    The slope is kept in [-MAX_SLOPE, 0]: a policy that grows surer makes no draft worse, so that a fall which comes
    with a falling entropy is never explained away. The noise is that of counting, widened by the residuals' scatter.
    """
    points = state.reference
    prior = 2.0 * standard_error  # prompts differ from step to step
    if len(points) < MIN_REFERENCE:
        return state.slope_prior, prior * math.sqrt(1.0 + 1.0 / max(1, len(points)))
    x = _centred([p.entropy for p in points])
    y = _centred([p.accept_length for p in points])
    strength = prior * prior  # a prior of one token per nat
    xy, xx = sum(a * b for a, b in zip(x, y, strict=True)), sum(a * a for a in x)
    slope = (xy + strength * state.slope_prior) / (xx + strength)
    slope = min(0.0, max(-MAX_SLOPE, slope))
    scatter = sum((b - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return slope, math.sqrt((PRIOR_STEPS * prior * prior + scatter) / (PRIOR_STEPS + len(points) - 1))


def rise_per_budget(climb: Sequence[Seen], budgets: Sequence[float], slope: float) -> float:
    """Accept length gained per budget, entropy taken out: the slope of a line over the budgets trained on between."""
    if len(climb) < 2:
        return 0.0
    t = _centred([*accumulate(budgets, initial=0.0)])
    y = _centred([p.accept_length - slope * p.entropy for p in climb])
    spread = sum(a * a for a in t)
    return sum(a * b for a, b in zip(t, y, strict=True)) / spread if spread else 0.0  # 0: a record changed by hand


def decide(state: State, judgement: Judgement, money: Money) -> Decision:
    """Train when what it is likely to win in the steps left is more than it costs."""
    seen = judgement.seen
    if seen is None:  # the engine drafted nothing, and no forecast says what it would have accepted
        return Decision(1.0, Reason.START) if state.phase is Phase.LEARNING else _quiet(state, judgement, money)
    told = state.phase is Phase.RECOVERING or len(state.climb) >= MIN_RISE
    burst = _climbing_burst(judgement, money) if told else 0.0
    if state.phase is Phase.LEARNING:
        patience = MIN_CLIMB if judgement.has_risen else state.patience
        if len(state.climb) < patience - 1:
            return Decision(max(1.0, burst), Reason.START)
        return Decision(burst, Reason.RISING) if burst else _quiet(state, judgement, money)
    returning = _returning_burst(judgement, money) if judgement.has_fallen else 0.0
    if returning:  # also in mid-recovery: it begins again from there
        return Decision(returning, Reason.DROP)
    if state.phase is Phase.RESTING:
        return _quiet(state, judgement, money)
    if not judgement.is_back and len(state.climb) < RECOVERY:  # later, only a rise says that it may come back
        burst = max(burst, 1.0, _returning_burst(judgement, money) if len(state.climb) < MIN_RISE else 0.0)
    return Decision(burst, Reason.RECOVER) if burst and money.steps_left else _quiet(state, judgement, money)


def _quiet(state: State, judgement: Judgement, money: Money) -> Decision:
    share, _ = _share_to_keep(state)
    if money.is_losing or (judgement.seen is None and money.can_stop and money.verified == 0.0):
        return Decision(0.0, Reason.LOSING)
    return Decision(share, Reason.KEEP) if share and money.steps_left else Decision(0.0, Reason.REST)


def _rise_pays(judgement: Judgement, money: Money) -> bool:
    """Whether further budgets would win more than they cost: half of the gain while it rises, then all of it.

    The rise is taken as it is, not at its best: where noise hides it, going on would be training always.
    """
    budgets, lasting = min(AHEAD, money.max_burst * money.steps_left), min(LASTING, money.steps_left)
    gain_s = _gain_s(judgement, money, judgement.rise, (0, budgets))
    steps = budgets / money.max_burst
    return gain_s * (lasting - steps / 2) > money.training_s(money.max_burst) * steps


def _climbing_burst(judgement: Judgement, money: Money) -> float:
    """Budgets to train on while acceptance rises: 1, doubled as long as the further ones pay too; 0 when none does."""
    if not _rise_pays(judgement, money):
        return 0.0
    burst, lasting = 1, min(LASTING, money.steps_left)
    rise = min(judgement.rise, judgement.late_rise)
    while 2 * burst <= money.max_burst and (
        _gain_s(judgement, money, rise, (burst, 2 * burst)) * lasting
        > money.training_s(2 * burst) - money.training_s(burst)
    ):
        burst *= 2
    return float(burst)


def _gain_s(judgement: Judgement, money: Money, rise: float, budgets: tuple[int, int]) -> float:
    """Seconds that a rollout after the second number of budgets would save against one after the first.

    A rise is carried on to the line where there is one: a draft that is back there has what the fall had cost it.
    """
    assert judgement.seen is not None
    now = judgement.seen.accept_length
    longest = money.longest if judgement.expected is None else min(money.longest, judgement.expected)
    before_s, after_s = (money.seconds_at(max(now, min(longest, now + rise * n))) for n in budgets)
    return before_s - after_s


def _returning_burst(judgement: Judgement, money: Money) -> float:
    """Budgets to train on so that acceptance returns to its line: the most of 1, 2, 4 .. of which two steps cost less
    than the return wins while it lasts; 0 when even one budget costs more."""
    if judgement.seen is None or judgement.expected is None:
        return 0.0
    lost_s = money.seconds_at(judgement.seen.accept_length) - money.seconds_at(judgement.expected)
    gain_s = lost_s * min(LASTING, money.steps_left)
    burst = 0
    while max(1, 2 * burst) <= money.max_burst and gain_s > 2 * money.training_s(max(1, 2 * burst)):
        burst = max(1, 2 * burst)
    return float(burst)


def _share_to_keep(state: State) -> tuple[float, float]:
    """(share to train on between falls, need): what the last two cycles of rest and recovery both came to.

    One fall is a shock, two in a row are a drift. A fall in spite of a share doubles it, a long calm halves both. Below
    MIN_SHARE short trainings after a fall are cheaper than a little in every step.
    """
    share, need = state.share, state.need
    if state.phase is Phase.RECOVERING:
        steps = state.rested + len(state.climb)
        need = (state.share * state.rested + len(state.climb)) / steps
        share = min(1.0, max(min(need, state.need), 2 * state.share))
    elif state.phase is Phase.RESTING and state.rested and state.rested % CALM_STEPS == 0:
        share, need = share / 2, need / 2
    return (share if share >= MIN_SHARE else 0.0), need


_TRAINING = {
    Reason.START: Phase.LEARNING,
    Reason.RISING: Phase.LEARNING,
    Reason.DROP: Phase.RECOVERING,
    Reason.RECOVER: Phase.RECOVERING,
}


def advance(state: State, judgement: Judgement, decision: Decision) -> State:
    """The state after a decision, whoever took it. Seconds play no part."""
    seen = judgement.seen
    if seen is None:
        return state
    if decision.reason in _TRAINING:
        phase = _TRAINING[decision.reason]
        upright = len(state.reference) - state.falling  # what already sagged is no measure of how good it can be
        climb, budgets = ((), ()) if decision.reason is Reason.DROP else (state.climb, state.budgets)
        return replace(
            state,
            phase=phase,
            reference=state.reference[:upright],
            climb=(*climb, seen)[-WINDOW:],
            budgets=(*budgets, decision.share)[-WINDOW:],
            fall=0.0,
            falling=0,
        )
    share, need = _share_to_keep(state)
    if state.phase is Phase.RESTING and not judgement.has_fallen:
        falling = state.falling + 1 if judgement.fall > 0 else 0
        return replace(
            state,
            reference=(*state.reference, seen)[-WINDOW:],
            share=share,
            need=need,
            rested=state.rested + 1,
            fall=judgement.fall,
            falling=min(falling, WINDOW),
        )
    is_new_level = state.phase is Phase.LEARNING or not judgement.is_back
    sagged = state.reference[len(state.reference) - state.falling :]  # a fall that was not worth training
    at_level = (state.climb[1 - RECOVERY :] or sagged) if is_new_level else state.reference
    reference = (*at_level, seen)[-WINDOW:]
    rest = State(state.slope_prior, state.patience, Phase.RESTING, reference)
    return replace(rest, share=share, need=need, rested=1)


def as_dict(state: State) -> dict[str, Any]:
    """For a checkpoint; JSON gives it back bit for bit."""

    def points(seen: Sequence[Seen]) -> list[list[float]]:
        return [[p.entropy, p.accept_length, p.standard_error] for p in seen]

    return {
        "phase": state.phase.value,
        "reference": points(state.reference),
        "climb": points(state.climb),
        "budgets": list(state.budgets),
        "share": state.share,
        "need": state.need,
        "rested": state.rested,
        "fall": state.fall,
        "falling": state.falling,
    }


def from_dict(start: State, data: dict[str, Any]) -> State:
    """What `as_dict` gave; `start` brings what follows from the settings."""
    return replace(
        start,
        phase=Phase(data["phase"]),
        reference=tuple(Seen(*point) for point in data["reference"]),
        climb=tuple(Seen(*point) for point in data["climb"]),
        budgets=tuple(data["budgets"]),
        share=data["share"],
        need=data["need"],
        rested=data["rested"],
        fall=data["fall"],
        falling=data["falling"],
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _centred(values: Sequence[float]) -> list[float]:
    mean = _mean(values)
    return [value - mean for value in values]
