"""How many tokens to draft now: measured step costs and observed acceptance in, a depth out.

A rollout starts with a large batch, where verifying more tokens costs more than it wins, and ends in a long tail of a
few rows, where drafts are nearly free. `choose_depth` is pure; `DepthController` keeps what it needs to know.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from rollout_engine.types import EngineConfigError


@dataclass(frozen=True, slots=True)
class SpecPlan:
    """Draft `depth` tokens for each of the first `num_rows` rows; the others decode plainly beside them.

    `given`, when there is any, has one entry for every row of the batch: drafts that are proposed instead of the draft
    model's, or none. With depth 0 they are the only ones, and no draft model runs.
    """

    depth: int
    num_rows: int
    given: tuple[tuple[int, ...], ...] = ()
    is_probe: bool = False  # a look at what the draft model can do now, in a few rows

    @property
    def width(self) -> int:
        """The most drafts that a row of the batch has verified."""
        return max(self.depth, max(map(len, self.given), default=0))


@dataclass(frozen=True, slots=True)
class CostTable:
    """`step_s[i][d]`: seconds of a whole decode step of batches[i] rows with d drafts each, drafting included.

    `given_s[i][w]`: the same with w drafts that no model had to make; () = not measured, then taken for as long.
    """

    batches: tuple[int, ...]  # ascending
    step_s: tuple[tuple[float, ...], ...]
    given_s: tuple[tuple[float, ...], ...] = ()

    @property
    def max_depth(self) -> int:
        return len(self.step_s[0]) - 1

    @property
    def max_width(self) -> int:
        """The most drafts that `seconds` knows of when a model need not make them all."""
        return len((self.given_s or self.step_s)[0]) - 1

    def seconds(self, batch: int, depth: int, width: int = 0) -> float:
        """Of a step whose rows have `depth` drafts of a model, or up to `width` that were given.

        Linear between measured batches and beyond the last two; constant below the first.
        """
        drafted_s = self._at(self.step_s, batch, depth)
        if width <= depth:
            return drafted_s
        given_s = self.given_s or self.step_s
        return drafted_s + self._at(given_s, batch, width) - self._at(given_s, batch, depth)

    def _at(self, seconds: tuple[tuple[float, ...], ...], batch: int, drafts: int) -> float:
        if batch <= self.batches[0] or len(self.batches) == 1:
            return seconds[0][drafts]
        high = min(bisect_left(self.batches, batch), len(self.batches) - 1)
        low_batch, high_batch = self.batches[high - 1], self.batches[high]
        low_s, high_s = seconds[high - 1][drafts], seconds[high][drafts]
        return low_s + (high_s - low_s) * (batch - low_batch) / (high_batch - low_batch)

    def scaled(self, factors: Sequence[float]) -> CostTable:
        """With every depth's seconds multiplied by its factor."""
        rows = tuple(tuple(map(float.__mul__, row, factors)) for row in self.step_s)
        return replace(self, step_s=rows)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> CostTable:
        """Raises EngineConfigError naming the file when it is not a cost table."""
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except FileNotFoundError as error:
            raise EngineConfigError(
                f"{path}: no such cost table; rollout.cost_table = '' measures one at start"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise EngineConfigError(f"{path}: not a cost table with batches and step_s ({error})") from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostTable:
        """Raises EngineConfigError for batches and rows that do not fit each other."""
        step_s, given_s = (tuple(tuple(row) for row in data.get(key, ())) for key in ("step_s", "given_s"))
        table = cls(tuple(data["batches"]), step_s, given_s)
        if not table.batches or not all(table._fits(rows) for rows in (step_s, given_s or step_s)):
            raise EngineConfigError("one row of step_s for each of batches is needed, all of the same length")
        return table

    def _fits(self, rows: tuple[tuple[float, ...], ...]) -> bool:
        return len(rows) == len(self.batches) and len(set(map(len, rows))) == 1


def load_cost_table(path: Path, max_depth: int, max_width: int = 0) -> CostTable:
    """Raises EngineConfigError when the file is not a cost table, or was measured for fewer than `max_depth` drafts, or
    fewer than `max_width` given ones."""
    table = CostTable.load(path)
    if table.max_width < max_width:
        raise EngineConfigError(
            f"{path}: measured up to {table.max_width} given drafts, but speculation.history_num_steps = {max_width}; "
            "measure again with that many, or set rollout.cost_table = ''"
        )
    if table.max_depth < max_depth:
        raise EngineConfigError(
            f"{path}: measured up to {table.max_depth} draft tokens, but rollout.speculative_num_steps = {max_depth}; "
            f"measure again with that many, or set rollout.cost_table = ''"
        )
    return table


def expected_tokens(acceptance: Sequence[float], depth: int) -> float:
    """Tokens that one verify step emits on average; acceptance[j] is that of draft j, given that all before stood."""
    tokens, reached = 1.0, 1.0
    for rate in acceptance[:depth]:
        reached *= rate
        tokens += reached
    return tokens


def choose_depth(
    table: CostTable, batch: int, acceptance: Sequence[float], max_depth: int, min_gain: float = 1.0
) -> int:
    """The depth 0 .. max_depth with the most expected tokens per second; the smallest of equals.

    Any depth above 0 has to promise `min_gain` times the speed of plain decoding.
    """
    speeds = [expected_tokens(acceptance, depth) / table.seconds(batch, depth) for depth in range(max_depth + 1)]
    speeds[0] *= min_gain
    return speeds.index(max(speeds))


def measure_steps(
    step: Callable[[int, int, int], None], max_batch: int, max_depth: int, budget_s: float, max_width: int = 0
) -> CostTable:
    """Time `step(batch, depth, width)` for batches 1, 2, 4 .. max_batch: a warm-up and two rounds, more while time is
    left. Either of the two is 0: `depth` drafts that the step makes, up to `max_depth`, or `width` given ones.

    `step` must have finished its work when it returns. Rounds visit every point, so that a slow moment of the
    machine does not fall on one; the least time counts.
    """
    batches = tuple(sorted({min(1 << i, max_batch) for i in range(max_batch.bit_length() + 1)}))
    shapes = [(depth, 0) for depth in range(max_depth + 1)] + [(0, width) for width in range(1, max_width + 1)]
    points = [(batch, *shape) for batch in batches for shape in shapes]
    for point in points:
        step(*point)
    least = dict.fromkeys(points, float("inf"))
    end, rounds = perf_counter() + budget_s, 0
    while rounds < 2 or perf_counter() < end:
        for point in points:
            start = perf_counter()
            step(*point)
            least[point] = min(least[point], perf_counter() - start)
        rounds += 1
    drafted = tuple(tuple(least[batch, depth, 0] for depth in range(max_depth + 1)) for batch in batches)
    given = tuple(tuple(least[batch, 0, width] for width in range(max_width + 1)) for batch in batches)
    return CostTable(batches, drafted, given if max_width else ())


class AcceptanceTracker:
    """Moving averages of conditional acceptance by draft position, half-forgotten after `half_life` verifications.

    A position that was rarely reached takes after the one before it, and the first one starts optimistic: only what
    is tried can be learnt. So depths left alone for long are tried again by themselves.
    """

    def __init__(self, num_positions: int, half_life: float = 200.0, optimism: float = 0.8) -> None:
        self._tried = [0.0] * num_positions
        self._accepted = [0.0] * num_positions
        self._half_life = half_life
        self._optimism = optimism

    _PRIOR_WEIGHT = 8.0

    def rates(self, priors: Sequence[float] | None = None) -> tuple[float, ...]:
        """`priors` by position take the place of what is said above."""
        rates: list[float] = []
        prior = self._optimism
        for position, (tried, accepted) in enumerate(zip(self._tried, self._accepted, strict=True)):
            if priors is not None:
                prior = priors[position]
            prior = (accepted + self._PRIOR_WEIGHT * prior) / (tried + self._PRIOR_WEIGHT)
            rates.append(prior)
        return tuple(rates)

    def observe(self, depth: int, num_accepted: Sequence[int]) -> None:
        """One verification per element, each of `depth` drafts."""
        self.fade(0.5 ** (len(num_accepted) / self._half_life))
        for position in range(depth):
            self._tried[position] += sum(n >= position for n in num_accepted)
            self._accepted[position] += sum(n > position for n in num_accepted)

    def fade(self, factor: float) -> None:
        """Weaken what was observed so far."""
        self._tried = [factor * tried for tried in self._tried]
        self._accepted = [factor * accepted for accepted in self._accepted]

    def state(self) -> dict[str, list[float]]:
        return {"tried": list(self._tried), "accepted": list(self._accepted)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises EngineConfigError when the state is that of another number of positions."""
        if len(state["tried"]) != len(self._tried):
            raise EngineConfigError(
                f"the checkpoint was saved with rollout.speculative_num_steps = {len(state['tried'])}, "
                f"now it is {len(self._tried)} (0: none, without speculation); resume with the same"
            )
        self._tried, self._accepted = list(state["tried"]), list(state["accepted"])


_FIRST_PROBE = 32  # plain steps before the first probe; the pause doubles with each probe that changes nothing
_LAST_PROBE = 1024
_PROBE_ROWS = 4
_MIN_GAIN = 1.05  # what the table leaves out, and errors of its figures, must not turn a promised gain into a loss
_COST_RATE = 0.05  # weight of one step in the running factor of its depth
_FORGET_RATE = 0.002
_MAX_RATIO = 3.0  # a step that was interrupted says nothing about its depth
_NEW_WEIGHTS_FADE = 0.25  # how much old acceptance says about new weights


class DepthController:
    """Plans each decode step. Without a cost table it always drafts `max_depth` tokens.

    A table measured at the start knows a step alone; what surrounds it in a rollout (commits, cold caches) is learnt
    while decoding, as one factor a depth, when `learns_costs`. A given table is taken at its word: with it, timing
    decides nothing.
    """

    def __init__(self, max_depth: int, table: CostTable | None, *, learns_costs: bool = False) -> None:
        self.table = table
        self._max_depth = max_depth
        self._learns_costs = learns_costs
        self._factors = [1.0] * (max_depth + 1)
        self._given_factor = 1.0  # of steps whose drafts are all given
        self._tracker = AcceptanceTracker(max_depth)
        self._num_plain_steps = 0
        self._probe_after = _FIRST_PROBE

    def plan(self, batch: int) -> SpecPlan:
        """For the next step of `batch` rows."""
        if self.table is None:
            return SpecPlan(self._max_depth, batch)
        table = self.table.scaled(self._factors) if self._learns_costs else self.table
        depth = choose_depth(table, batch, self._tracker.rates(), self._max_depth, _MIN_GAIN)
        if depth > 0:
            self._num_plain_steps, self._probe_after = 0, _FIRST_PROBE
            return SpecPlan(depth, batch)
        self._num_plain_steps += 1
        if self._num_plain_steps < self._probe_after:
            return SpecPlan(0, 0)
        self._num_plain_steps, self._probe_after = 0, min(2 * self._probe_after, _LAST_PROBE)
        return SpecPlan(1, min(batch, _PROBE_ROWS), is_probe=True)

    def step_costs(self) -> CostTable | None:
        """The table with what was learnt of each depth; None without one."""
        return self.table.scaled(self._factors) if self.table is not None else None

    def rates(self) -> tuple[float, ...]:
        """The draft model's acceptance by position, each given that all before it stood."""
        return self._tracker.rates()

    def seconds(self, batch: int, depth: int, width: int) -> float:
        """What a step takes by the table and by what was learnt; see `CostTable.seconds`. There must be a table."""
        assert self.table is not None
        return self.table.seconds(batch, depth, width) * self._factor(depth, width)

    def _factor(self, depth: int, width: int) -> float:
        return self._given_factor if width and not depth else self._factors[depth]

    def observe(self, plan: SpecPlan, num_accepted: Sequence[int]) -> None:
        """Accepted drafts of the planned rows; a row for which nothing could be proposed accepted none."""
        self._tracker.observe(plan.depth, num_accepted)

    def observe_seconds(self, plan: SpecPlan, batch: int, seconds: float) -> None:
        """How long a step of `batch` rows took as a whole."""
        if self._learns_costs and self.table is not None and plan.num_rows in (0, batch):
            depth, width = plan.depth, plan.width
            ratio = min(seconds / self.table.seconds(batch, depth, width), _MAX_RATIO)
            change = _COST_RATE * (ratio - self._factor(depth, width))
            if width and not depth:
                self._given_factor += change
                return
            self._factors[depth] += change
            if depth == 0:  # what is not tried is forgotten: the first steps of a depth are slow and say too much
                plain = self._factors[0]
                self._factors[1:] = [f + _FORGET_RATE * (plain - f) for f in self._factors[1:]]

    def new_weights(self) -> None:
        """Policy and draft have changed, perhaps for the better."""
        self._tracker.fade(_NEW_WEIGHTS_FADE)
        self._probe_after = max(_FIRST_PROBE, self._probe_after // 2)

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON-able."""
        return {
            "table": asdict(self.table) if self.table else None,
            "factors": list(self._factors),
            "given_factor": self._given_factor,
            "tracker": self._tracker.state(),
            "num_plain_steps": self._num_plain_steps,
            "probe_after": self._probe_after,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises EngineConfigError when it was saved with another depth. Without speculation nothing is taken over."""
        if self._max_depth == 0:
            return
        self._tracker.load_state(state["tracker"])
        self.table = CostTable.from_dict(state["table"]) if state["table"] else None
        self._factors = list(state["factors"])
        self._given_factor = state.get("given_factor", 1.0)  # checkpoints made before history drafts have none
        self._num_plain_steps, self._probe_after = state["num_plain_steps"], state["probe_after"]
