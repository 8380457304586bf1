"""Who drafts: the choice against trying everything, and what is learnt of simulated drafters by kind of match."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from draft_models.history import Match
from rollout_engine.config import SpeculationConfig
from rollout_engine.history_plan import (
    Gains,
    SourcePlanner,
    choose_shape,
    expected_drafts,
    num_agreeing,
    prefers_history,
)
from rollout_engine.speculation import CostTable, DepthController, SpecPlan

DEPTH = 3
SETTINGS = SpeculationConfig(history=True)


def test_the_shape_is_that_of_trying_every_choice() -> None:
    """All depths, widths and sources by row, with costs at random."""
    rng = random.Random(0)
    plain = 0
    for _ in range(300):
        rows = [
            Gains(
                expected_drafts([rng.random() for _ in range(DEPTH)]),
                expected_drafts([rng.random() for _ in range(rng.randrange(4))]),
            )
            for _ in range(3)
        ]
        cost = {(d, w): 1 + rng.random() * d + 0.3 * rng.random() * w for d in range(DEPTH + 1) for w in range(4)}
        best = 1.05 * len(rows) / cost[0, 0]
        for depth, width, sources in itertools.product(range(DEPTH + 1), range(4), itertools.product((0, 1), repeat=3)):
            stood = [
                row.history[min(width, len(row.history) - 1)] if source else row.model[depth]
                for row, source in zip(rows, sources, strict=True)
            ]
            if depth + width:
                best = max(best, (len(rows) + sum(stood)) / cost[depth, width])
        depth, width = choose_shape(Counter(rows), DEPTH, 3, lambda d, w: cost[d, w])  # noqa: B023
        stood = [
            row.history[min(width, len(row.history) - 1)] if prefers_history(row, depth, width) else row.model[depth]
            for row in rows
        ]
        speed = (len(rows) + sum(stood)) / cost[depth, width] * (1.05 if (depth, width) == (0, 0) else 1)
        assert speed == pytest.approx(best)
        plain += (depth, width) == (0, 0)
    assert 0 < plain < 150


def test_agreement_ends_at_the_first_difference() -> None:
    assert [num_agreeing(a, b) for a, b in (("", "x"), ("ab", "ab"), ("ab", "a"), ("abc", "axc"), ("x", ""))] == [
        *(0, 2, 1, 1, 0)
    ]


class Simulated:
    """Rows of three kinds of matches, with the chance that a draft of history or of the model stands in each."""

    def __init__(self, planner: SourcePlanner, seed: int) -> None:
        self.planner, self.rng = planner, random.Random(seed)
        self.history, self.model = {0: 0.9, 1: 0.1, 2: 0.7}, {0: 0.6, 1: 0.3, 2: 0.95}

    def step(self) -> tuple[SpecPlan, list[int]]:
        kinds = [self.rng.randrange(3) for _ in range(4)]
        matches = [Match((7,) * DEPTH, kind) for kind in kinds]
        plan = self.planner.plan(matches)
        emitted, accepted = [], []
        for row, kind in enumerate(kinds):
            of_history = plan.given and plan.given[row]
            rate = self.history[kind] if of_history else self.model[kind] if plan.depth else 0.0
            most = len(plan.given[row]) if of_history else plan.depth
            stood = 0
            while stood < most and self.rng.random() < rate:
                stood += 1
            accepted.append(stood)
            if of_history:
                emitted.append([7] * stood + [0])
            else:  # the text agrees with history by history's own chance, whoever drafted it
                emitted.append([7 if self.rng.random() < self.history[kind] else 0 for _ in range(stood + 1)])
        self.planner.observe(plan, matches, emitted, accepted)
        return plan, kinds


def planner(settings: SpeculationConfig = SETTINGS, table: CostTable | None = None) -> SourcePlanner:
    return SourcePlanner(DepthController(DEPTH, table), settings, DEPTH)


def shares(simulated: Simulated, num_steps: int) -> dict[int, float]:
    """By kind: how often history drafted."""
    given, seen = Counter[int](), Counter[int]()
    for _ in range(num_steps):
        plan, kinds = simulated.step()
        for row, kind in enumerate(kinds):
            seen[kind] += 1
            given[kind] += bool(plan.given and plan.given[row])
    return {kind: given[kind] / seen[kind] for kind in sorted(seen)}


def test_each_kind_gets_the_drafter_that_is_better_there() -> None:
    """Kind 2: history is good and the model better. By the model's average it would get history."""
    simulated = Simulated(planner(), seed=1)
    shares(simulated, 150)
    found = shares(simulated, 300)
    assert found[0] > 0.85 and found[1] == 0.0 and found[2] < 0.1
    assert found[0] < 0.99  # the model has some of the steps, or nothing would be known of it


def test_history_is_measured_while_the_model_drafts() -> None:
    """With a model that seems perfect history never drafts; what it would have won is known all the same."""
    simulated = Simulated(planner(), seed=2)
    simulated.model = dict.fromkeys(range(3), 0.99)
    assert max(shares(simulated, 200).values()) < 0.05
    rates = [
        tracker["tried"][0] and tracker["accepted"][0] / tracker["tried"][0]
        for tracker in simulated.planner.state()["history"][:3]
    ]
    assert rates == pytest.approx([0.9, 0.1, 0.7], abs=0.12)


def test_below_the_least_confidence_history_is_silent() -> None:
    strict = SpeculationConfig(history=True, history_min_confidence=0.97)
    assert max(shares(Simulated(planner(strict), seed=3), 300).values()) == 0.0


def test_dear_drafting_leaves_the_step_to_history_alone() -> None:
    """A draft model that costs five plain steps rests; rows without a good match decode plainly."""
    table = CostTable((1, 4), ((1.0, 6.0, 6.1, 6.2),) * 2, ((1.0, 1.02, 1.04, 1.06),) * 2)
    simulated = Simulated(planner(table=table), seed=4)
    for _ in range(150):
        simulated.step()
    plans = [simulated.step() for _ in range(100)]
    drafted = [plan for plan, _ in plans if plan.depth]
    assert len(drafted) <= 4  # probes
    for plan, kinds in plans:
        if plan.given and 0 in kinds:
            assert plan.depth == plan.num_rows == 0 and plan.width == DEPTH
            assert all(plan.given[row] for row, kind in enumerate(kinds) if kind == 0)


def test_given_drafts_cost_what_the_table_says() -> None:
    table = CostTable((1, 3), ((1.0, 2.0), (2.0, 4.0)), ((1.0, 1.1, 1.3), (2.0, 2.2, 2.8)))
    assert (table.max_depth, table.max_width) == (1, 2)
    assert table.seconds(1, 0, 2) == pytest.approx(1.3)
    assert table.seconds(2, 0, 1) == pytest.approx(1.65)
    assert table.seconds(3, 1, 1) == 4.0  # the model's chain is as wide
    assert table.seconds(3, 1, 2) == pytest.approx(4.0 + 0.6)
    untold = CostTable(table.batches, table.step_s)
    assert untold.max_width == 1 and untold.seconds(1, 0, 1) == 2.0


def test_costs_of_given_steps_are_learnt_apart() -> None:
    table = CostTable((1,), ((1.0, 2.0),), ((1.0, 1.0),))
    controller = DepthController(1, table, learns_costs=True)
    for _ in range(200):
        controller.observe_seconds(SpecPlan(0, 0, ((5,),)), 1, 3.0)
    assert controller.seconds(1, 0, 1) == pytest.approx(3.0, rel=0.01)
    assert (controller.seconds(1, 0, 0), controller.seconds(1, 1, 0)) == (1.0, 2.0)
    restored = DepthController(1, None, learns_costs=True)
    restored.load_state(controller.state())
    assert restored.seconds(1, 0, 1) == controller.seconds(1, 0, 1)
