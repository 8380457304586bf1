"""When the draft learns: simulated drafts that learn, drift and are shocked, under a policy whose entropy moves."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from rollout_engine.types import SpecStats
from trainer import draft_schedule as schedule
from trainer.draft_schedule import Decision, Judgement, Money, Phase, Reason, Seen, State

NOISE = 0.02
CHEAP = Money(10.0, 0.2, 1000, 2.0, 1.0, None, None, False)  # training takes a fiftieth of a rollout


@dataclass
class World:
    """A draft whose accept length goes a part of the way to its plateau with every whole training, and down by `drift`
    without one; `slope` tokens per nat of entropy come on top."""

    level: float = 1.05
    plateau: float = 2.5
    speed: float = 0.4
    drift: float = 0.0
    slope: float = 0.0
    entropy: float = 1.0
    money: Money = CHEAP
    state: State = field(default_factory=lambda: State(patience=schedule.PATIENCE))
    random: random.Random = field(default_factory=lambda: random.Random(0))
    decisions: list[Decision] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)

    def step(self) -> Decision:
        length = max(1.0, self.level + self.slope * (self.entropy - 1.0) + self.random.gauss(0.0, NOISE))
        seen = Seen(self.entropy, length, NOISE)
        judgement = schedule.judge(self.state, seen)
        decision = schedule.decide(self.state, judgement, replace(self.money, accept_length=length))
        self.state = schedule.advance(self.state, judgement, decision)
        self.level += (1 - (1 - self.speed) ** decision.share) * (self.plateau - self.level) - self.drift
        self.decisions.append(decision)
        self.lengths.append(length)
        return decision

    def run(self, steps: int) -> list[Decision]:
        return [self.step() for _ in range(steps)]

    @property
    def rests(self) -> bool:
        return self.state.phase is Phase.RESTING


def settled(**changes: Any) -> World:
    """A world whose draft has learned what it can, and rests."""
    world = World(**changes)
    world.run(25)
    assert world.rests and world.level > 2.3
    return world


def test_a_new_draft_learns_until_its_rise_no_longer_pays() -> None:
    world = World()
    reasons = [decision.reason for decision in world.run(25)]
    assert reasons[:4] == [Reason.START] * 4 and Reason.RISING in reasons and reasons[-1] is Reason.REST
    assert world.level > 2.45
    trained = sum(decision.share for decision in world.decisions)
    assert 6 <= trained <= 18


def test_dear_training_stops_earlier() -> None:
    dear, cheap = World(money=replace(CHEAP, train_s=1.5)), World()
    for world in (dear, cheap):
        world.run(25)
    assert sum(d.share for d in dear.decisions) < sum(d.share for d in cheap.decisions)


def test_a_random_draft_that_has_not_begun_to_rise_is_given_time_and_a_trained_one_is_not() -> None:
    flat = {"level": 1.2, "plateau": 1.2}
    given, new = World(**flat, state=State()), World(**flat)
    for world in (given, new):
        world.run(30)
    assert sum(d.share for d in given.decisions) <= 8
    assert schedule.PATIENCE - 1 <= sum(d.share for d in new.decisions) <= schedule.PATIENCE + 4


@pytest.mark.parametrize("seed", range(5))
def test_no_training_in_a_hundred_quiet_steps(seed: int) -> None:
    world = settled()
    world.random.seed(seed)
    assert all(decision.share == 0 for decision in world.run(100))


def test_what_the_entropy_explains_does_not_train() -> None:
    """Accept length falls by as much, once with the entropy that explains it and once at a constant one."""
    worlds = []
    for _ in range(2):
        worlds.append(World(slope=-1.2, state=State(slope_prior=-1.0)))
        for step in range(45):
            worlds[-1].entropy = 1.0 + 0.05 * (step % 5)
            worlds[-1].step()
        assert worlds[-1].rests
    explained, unexplained = worlds
    explained.entropy, unexplained.level = 1.5, unexplained.level - 0.5 * 1.2
    assert all(decision.share == 0 for decision in explained.run(5))
    assert unexplained.run(1)[0].reason is Reason.DROP
    assert explained.lengths[-1] == pytest.approx(unexplained.lengths[-1], abs=0.3)


def test_an_entropy_that_falls_explains_no_loss() -> None:
    """The slope is never positive: a policy that grows surer makes no draft worse."""
    world = settled()
    for _ in range(20):
        world.level -= 0.02
        world.entropy -= 0.02
        world.step()
    assert Reason.DROP in [decision.reason for decision in world.decisions]


def test_a_shock_is_answered_at_once_and_the_draft_comes_back() -> None:
    world = settled()
    before = world.level
    world.level -= 0.8
    found = world.run(12)
    assert found[0] == Decision(1.0, Reason.DROP) and found[1] == Decision(1.0, Reason.RECOVER)
    assert world.rests and world.level > before - 0.1
    assert found[-1].reason is Reason.REST


def test_a_burst_is_as_large_as_the_loss_is_worth() -> None:
    """A fall from 2.5 to 1.7 costs 4.7 s of 10 in each of the steps that the return lasts for."""
    found = {}
    for train_s, steps_left in ((0.2, 100), (2.5, 100), (9.0, 100), (20.0, 100), (9.0, 2)):
        world = settled()
        world.level -= 0.8
        world.money = replace(CHEAP, train_s=train_s, steps_left=steps_left, max_burst=6)
        found[train_s, steps_left] = world.step().share
    assert list(found.values()) == [4.0, 4.0, 2.0, 1.0, 0.0]


def test_a_burst_costs_no_more_than_the_rollouts_tokens() -> None:
    """Training on all of a rollout's two and a half budgets costs less than the return wins, on eight more."""
    world = settled()
    world.level -= 0.8
    world.money = replace(CHEAP, train_s=9.0, max_burst=8, at_hand=2.5)
    assert world.step().share == 8.0
    assert (world.money.training_s(2), world.money.training_s(8)) == (18.0, 22.5)


def test_a_slow_new_draft_is_trained_in_bursts_and_is_there_sooner() -> None:
    slow = {"speed": 0.03, "money": replace(CHEAP, longest=4.0)}
    single, bursts = World(**slow), World(**slow)
    bursts.money = replace(bursts.money, max_burst=8)
    for world in (single, bursts):
        world.run(60)
    first = {id(world): next(i for i, length in enumerate(world.lengths) if length > 2.2) for world in (single, bursts)}
    assert first[id(bursts)] <= 12 and first[id(single)] >= 30
    assert [d.share for d in bursts.decisions[:2]] == [1.0, 1.0] and bursts.decisions[4].share == 8.0
    assert bursts.decisions[-1].share == 0.0


def test_a_burst_ends_when_acceptance_is_back() -> None:
    world = settled(money=replace(CHEAP, max_burst=4))
    world.level -= 0.8
    world.speed = 0.15
    shares = [decision.share for decision in world.run(20)]
    assert shares[:2] == [4.0, 4.0] and set(shares[10:]) == {0.0}


@pytest.mark.parametrize("seed", range(5))
def test_a_return_is_not_taken_for_a_rise_that_goes_on(seed: int) -> None:
    """One burst brings the draft back; how steep that was says nothing about what lies above the line."""
    world = settled(money=replace(CHEAP, longest=8.0, max_burst=8))
    world.random.seed(seed)
    world.level -= 0.8
    shares = [decision.share for decision in world.run(15)]
    assert shares[0] == 8.0 and sum(shares[1:]) <= 4 and world.level > 2.4


def test_a_level_that_cannot_be_regained_becomes_the_new_one() -> None:
    world = settled()
    world.level = world.plateau = 2.0
    world.run(30)
    assert world.rests and sum(d.share for d in world.decisions[25:]) < 12
    assert all(decision.share == 0 for decision in world.run(30))


def test_a_fall_in_mid_recovery_is_answered_as_the_first_one() -> None:
    """Else the steps that a recovery is given would be over before the second fall is mended."""
    world = settled(speed=0.3)
    world.level = 2.0
    assert [decision.reason for decision in world.run(3)] == [Reason.DROP, Reason.RECOVER, Reason.RECOVER]
    world.level = 1.3
    assert [decision.reason for decision in world.run(3)] == [Reason.DROP, Reason.RECOVER, Reason.RECOVER]
    world.run(8)
    assert world.level > 2.3


@pytest.mark.parametrize("quiet_steps", range(3))
def test_a_fall_right_after_one_that_was_not_worth_training_is_seen_at_once(quiet_steps: int) -> None:
    """A sag that costs less than training starts a new level, from which the next fall is seen without delay."""
    world = settled(money=replace(CHEAP, train_s=9.0))
    while world.state.rested > 1 or world.level > 2.4:
        world.level -= 0.015
        assert world.step().share == 0 and world.level > 1.5
    assert world.state.reference[-1].accept_length < 2.45
    world.run(quiet_steps)
    world.level, world.money = 1.4, CHEAP
    assert world.step().reason is Reason.DROP


@pytest.mark.parametrize(("drift", "most"), [(0.01, 0.6), (0.1, 1.0)])
def test_a_draft_that_drifts_is_kept_up_with_as_many_tokens_as_it_needs(drift: float, most: float) -> None:
    world = settled()
    world.drift = drift
    world.run(60)
    shares = [decision.share for decision in world.run(80)]
    always = world.plateau - drift / world.speed  # where training on everything in every step would hold it
    assert sum(world.lengths[-80:]) / 80 > always - 0.05
    assert 0.2 < sum(shares) / len(shares) < most
    assert any(0 < share < 1 for share in shares)


def test_the_share_falls_again_when_the_drift_ends() -> None:
    world = settled()
    world.drift = 0.1
    world.run(60)
    world.drift = 0.0
    world.run(80)
    assert all(decision.share == 0 for decision in world.run(10))


def test_nothing_is_learned_for_rollouts_that_will_not_be_made() -> None:
    world = settled(money=replace(CHEAP, steps_left=100))
    world.level -= 0.8
    world.money = replace(CHEAP, steps_left=0)
    assert world.step().share == 0
    rising = World()
    rising.run(6)
    rising.money = world.money
    assert rising.step().share == 0


LOSING = Money(10.0, 0.5, 1000, 1.3, 1.0, 8.0, 1.6, False)  # a verification costs 1.6 plain steps


def test_a_draft_worse_than_none_is_called_so() -> None:
    world = World(level=1.3, plateau=1.3, money=LOSING, state=State())
    assert world.run(12)[-1] == Decision(0.0, Reason.LOSING)


def test_a_draft_that_loses_but_will_soon_win_goes_on_learning() -> None:
    stopping = replace(LOSING, can_stop=True)  # the engine would decode plainly: only what is above 1.6 counts
    climbing = Judgement(Seen(1.0, 1.4, NOISE), rise=0.1, late_rise=0.1, has_risen=True)
    hopeless = replace(climbing, rise=0.0)
    state = State(climb=(Seen(1.0, 1.2, NOISE),) * 6)
    assert schedule.decide(state, climbing, replace(stopping, accept_length=1.4)).reason is Reason.RISING
    assert schedule.decide(state, hopeless, replace(stopping, accept_length=1.4)).reason is Reason.LOSING


def test_nothing_is_hoped_for_beyond_the_depth() -> None:
    rising = Judgement(Seen(1.0, 2.95, NOISE), rise=0.2, late_rise=0.2, has_risen=True)
    state = State(climb=(Seen(1.0, 2.0, NOISE),) * 6)
    money = replace(CHEAP, accept_length=2.95, train_s=1.0)
    assert schedule.decide(state, rising, money).reason is Reason.RISING
    assert schedule.decide(state, rising, replace(money, longest=3.0)).reason is Reason.REST


def test_seconds_follow_accept_length_down_to_plain_decoding() -> None:
    money = replace(LOSING, plain_s=8.0, verify_cost=1.6, rollout_s=8.0 * 1.6 / 1.3)
    assert money.seconds_at(1.3) == pytest.approx(money.rollout_s)
    assert money.seconds_at(3.2) == pytest.approx(4.0)
    assert replace(money, can_stop=True).seconds_at(1.3) == 8.0
    assert replace(CHEAP, accept_length=2.0).seconds_at(4.0) == 5.0


def test_decisions_taken_again_lead_through_the_same_states_whatever_things_cost() -> None:
    first, again = World(drift=0.05), World(drift=0.05, money=replace(CHEAP, train_s=50.0))
    for _ in range(60):
        decision = first.step()
        seen = Seen(1.0, first.lengths[-1], NOISE)
        judgement = schedule.judge(again.state, seen)
        again.state = schedule.advance(again.state, judgement, decision)
        assert again.state == first.state
    reread = json.loads(json.dumps(schedule.as_dict(first.state)))
    assert schedule.from_dict(State(patience=schedule.PATIENCE), reread) == first.state


def test_acceptance_at_depths_that_were_rarely_drafted_falls_on_as_before() -> None:
    spec = SpecStats(200, 100, (40, 60, 0), (100, 0), (60, 0))
    seen = schedule.see(spec, 2, 1.0)
    assert seen is not None and seen.accept_length == pytest.approx(1 + 0.6 + 0.36)
    whole = SpecStats(200, 100, (40, 20, 40), (100, 100), (60, 40))
    seen = schedule.see(whole, 2, 1.0)
    assert seen is not None and seen.accept_length == pytest.approx(whole.accept_length) == pytest.approx(2.0)
    assert 0.05 < seen.standard_error < 0.2
    assert schedule.see(replace(whole, num_verify_steps=3), 2, 1.0) is None


def test_an_engine_that_drafts_nothing_loses_and_a_new_draft_learns_all_the_same() -> None:
    nothing = Judgement(None)
    money = replace(LOSING, verified=0.0, can_stop=True, verify_cost=None, plain_s=None)
    assert schedule.decide(State(), nothing, money).reason is Reason.START
    assert schedule.decide(State(phase=Phase.RESTING), nothing, money) == Decision(0.0, Reason.LOSING)


def test_a_record_whose_shares_were_set_to_zero_by_hand_is_taken_as_it_is() -> None:
    """Its reasons still say that the draft trained: nothing was gained, by no budget."""
    state = State()
    for _ in range(schedule.MIN_CLIMB):
        judgement = schedule.judge(state, Seen(1.0, 2.0, 0.1))
        assert judgement.rise == judgement.late_rise == 0.0
        state = schedule.advance(state, judgement, Decision(0.0, Reason.START))
