"""The depth controller: against brute force, and that it finds its way from wrong beliefs."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from rollout_engine.speculation import (
    AcceptanceTracker,
    CostTable,
    DepthController,
    SpecPlan,
    choose_depth,
    expected_tokens,
)
from rollout_engine.types import EngineConfigError

# A step costs a constant and something per token: cheap drafts at batch 1, dear ones at batch 32.
TABLE = CostTable((1, 8, 32), tuple(tuple(1.0 + 0.02 * b * (1 + d) + 0.1 * d for d in range(4)) for b in (1, 8, 32)))


def brute_force_tokens(acceptance: list[float], depth: int) -> float:
    """Sum over every accept/reject pattern of its probability times the tokens it emits."""
    total = 0.0
    for pattern in itertools.product((True, False), repeat=depth):
        probability, accepted, is_open = 1.0, 0, True
        for position, stands in enumerate(pattern):
            probability *= acceptance[position] if stands else 1 - acceptance[position]
            is_open = is_open and stands
            accepted += is_open
        total += probability * (accepted + 1)
    return total


def test_choose_depth_equals_brute_force() -> None:
    rng = random.Random(0)
    for _ in range(200):
        batches = tuple(sorted(rng.sample(range(1, 65), 4)))
        table = CostTable(batches, tuple(tuple(rng.uniform(0.5, 3.0) for _ in range(5)) for _ in batches))
        acceptance = [rng.random() for _ in range(4)]
        index = rng.randrange(4)
        speeds = [brute_force_tokens(acceptance, d) / table.step_s[index][d] for d in range(5)]
        assert choose_depth(table, batches[index], acceptance, 4) == max(range(5), key=lambda d: speeds[d])
        chosen = choose_depth(table, batches[index], acceptance, 4, min_gain=1.2)
        assert chosen == (max(range(5), key=lambda d: speeds[d]) if max(speeds) > 1.2 * speeds[0] else 0)
        assert expected_tokens(acceptance, 4) == pytest.approx(brute_force_tokens(acceptance, 4))


def test_depth_falls_with_batch_and_rises_with_acceptance() -> None:
    def depths(rate: float) -> list[int]:
        return [choose_depth(TABLE, batch, [rate] * 3, 3) for batch in (1, 4, 8, 16, 32, 64)]

    assert depths(0.0) == [0] * 6
    assert depths(0.9)[0] == 3 and depths(0.9)[-1] < 3
    assert depths(0.6) == sorted(depths(0.6), reverse=True)
    assert all(low <= high for low, high in zip(depths(0.3), depths(0.7), strict=True))


def test_cost_between_and_beyond_measured_batches() -> None:
    assert TABLE.seconds(8, 2) == TABLE.step_s[1][2]
    assert TABLE.seconds(20, 1) == pytest.approx((TABLE.step_s[1][1] + TABLE.step_s[2][1]) / 2)
    assert TABLE.seconds(56, 0) == pytest.approx(1.0 + 0.02 * 56)
    assert CostTable((4,), ((1.0, 2.0),)).seconds(9, 1) == 2.0


def test_cost_table_file(tmp_path: Path) -> None:
    TABLE.save(tmp_path / "costs.json")
    assert CostTable.load(tmp_path / "costs.json") == TABLE
    (tmp_path / "bad.json").write_text('{"batches": [1]}')
    (tmp_path / "ragged.json").write_text('{"batches": [1, 2], "step_s": [[1.0, 1.0], [1.0]]}')
    (tmp_path / "cut.json").write_text('{"batches": [1, 2')
    for name in ("bad", "ragged", "cut"):
        with pytest.raises(EngineConfigError, match=rf"{name}\.json: not a cost table"):
            CostTable.load(tmp_path / f"{name}.json")
    with pytest.raises(EngineConfigError, match=r"absent\.json: no such cost table"):
        CostTable.load(tmp_path / "absent.json")


def test_tracker_learns_conditional_acceptance() -> None:
    rng = random.Random(1)
    tracker = AcceptanceTracker(3)
    true_rates = (0.8, 0.5, 0.2)
    for _ in range(400):
        accepted = []
        for _ in range(8):
            stood = 0
            while stood < 3 and rng.random() < true_rates[stood]:
                stood += 1
            accepted.append(stood)
        tracker.observe(3, accepted)
    assert tracker.rates() == pytest.approx(true_rates, abs=0.12)


def simulate(controller: DepthController, rate: float, batch: int, num_steps: int, rng: random.Random) -> list[int]:
    """Depths that the controller plans while every draft stands with `rate`."""
    depths = []
    for _ in range(num_steps):
        plan = controller.plan(batch)
        depths.append(plan.depth)
        if plan.depth:
            accepted = []
            for _ in range(plan.num_rows):
                stood = 0
                while stood < plan.depth and rng.random() < rate:
                    stood += 1
                accepted.append(stood)
            controller.observe(plan, accepted)
    return depths


def test_controller_gives_up_a_bad_draft_and_notices_a_good_one() -> None:
    rng = random.Random(2)
    controller = DepthController(3, TABLE)
    bad = simulate(controller, 0.02, 8, 600, rng)
    assert bad[0] > 0  # optimistic start
    assert sum(depth > 0 for depth in bad[30:]) <= 5 and max(bad[30:]) <= 1  # rare, shallow probes
    assert any(bad[30:])
    controller.new_weights()
    controller.new_weights()
    good = simulate(controller, 0.95, 8, 1500, rng)
    assert sum(depth == 3 for depth in good[-100:]) > 90


def test_controller_state_resumes() -> None:
    first, second = DepthController(3, TABLE), DepthController(3, None)
    simulate(first, 0.1, 8, 77, random.Random(3))
    second.load_state(first.state())
    assert simulate(first, 0.1, 8, 200, random.Random(4)) == simulate(second, 0.1, 8, 200, random.Random(4))


def test_controller_state_of_another_depth_is_refused() -> None:
    state = DepthController(3, TABLE).state()
    with pytest.raises(EngineConfigError, match=r"speculative_num_steps = 3, now it is 2 .*; resume with the same"):
        DepthController(2, None).load_state(state)
    with pytest.raises(EngineConfigError, match="speculative_num_steps = 3, now it is 5"):
        DepthController(5, None).load_state(state)
    DepthController(0, None).load_state(state)


def test_fixed_controller_always_drafts() -> None:
    controller = DepthController(3, None)
    controller.observe(SpecPlan(3, 2), [0, 0])
    assert controller.plan(100) == SpecPlan(3, 100)


def test_costs_of_a_rollout_are_learnt_when_the_table_was_measured() -> None:
    """The table promises a gain that real steps do not keep: drafting stops, and is tried again much later."""
    flat = CostTable((1, 32), ((1.0, 1.1, 1.2, 1.3),) * 2)
    learning, trusting = DepthController(3, flat, learns_costs=True), DepthController(3, flat)
    plans = []
    for _ in range(400):
        for controller in (learning, trusting):
            plan = controller.plan(8)
            controller.observe(plan, [min(plan.depth, 2)] * plan.num_rows)
            controller.observe_seconds(plan, 8, 1.0 if plan.depth == 0 else 4.0)
        plans.append(plan.depth)
    assert learning.plan(8).depth == 0
    assert min(plans) > 0  # a given table is taken at its word
    restored = DepthController(3, None, learns_costs=True)
    restored.load_state(learning.state())
    assert restored.plan(8) == learning.plan(8)
