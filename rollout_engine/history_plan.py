"""Who drafts for which row in the next step, the draft model or history: measured odds in, a plan out.

`choose_shape` is pure; `SourcePlanner` keeps what it needs to know. Nothing here sees a draft of the step that is
planned, nor any random number: the choice depends on tokens that stand already, on what siblings wrote and on past
counts. That keeps every rule exact. For each row the proposal is then drawn from a law (of the draft model, or a point
mass) that the text so far determines, and verification is exact for any such law. A choice that looked at the draft
model's token first would change the law that the token comes from, and would not be.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from draft_models.history import Match, match_levels, num_kinds
from rollout_engine.config import SpeculationConfig
from rollout_engine.speculation import AcceptanceTracker, DepthController, SpecPlan
from rollout_engine.types import EngineConfigError

_MIN_GAIN = 1.05  # over plain decoding, as the depth controller asks
_MODEL_EVERY = 16  # of the steps with history drafts one leaves them out, to see what the draft model can do there
_FIRST_GUESS = 0.5  # acceptance of a history draft of a kind that was never seen
_NEW_WEIGHTS_FADE = 0.25


class Gains(NamedTuple):
    """Of one row: drafts expected to stand when 0, 1, 2 .. are proposed by either source; [0] is 0."""

    model: tuple[float, ...]
    history: tuple[float, ...]  # as long as the match is


def expected_drafts(rates: Sequence[float]) -> tuple[float, ...]:
    """Drafts that stand on average of 0, 1, 2 .. proposed; rates[j] is acceptance of draft j, given all before it."""
    total, reached, gains = 0.0, 1.0, [0.0]
    for rate in rates:
        reached *= rate
        total += reached
        gains.append(total)
    return tuple(gains)


def prefers_history(gains: Gains, depth: int, width: int) -> bool:
    """Whether a row's best drafts are history's, at most `width`, rather than the model's `depth`."""
    return gains.history[min(width, len(gains.history) - 1)] > gains.model[depth]


def choose_shape(
    rows: Mapping[Gains, int], max_depth: int, max_width: int, seconds: Callable[[int, int], float]
) -> tuple[int, int]:
    """(depth of the draft model's chains, most tokens of a history draft) with the most expected tokens a second.

    `rows` counts the rows of the batch that have the same gains, `seconds(depth, width)` is what a step takes. Each row
    has the source that is better for it. Plain decoding, (0, 0), unless something promises `_MIN_GAIN` times its speed.
    """
    batch = sum(rows.values())
    best, best_speed = (0, 0), _MIN_GAIN * batch / seconds(0, 0)
    for depth in range(max_depth + 1):
        for width in range(max_width + 1):
            tokens = batch + sum(
                count * max(gains.model[depth], gains.history[min(width, len(gains.history) - 1)])
                for gains, count in rows.items()
            )
            speed = tokens / seconds(depth, width)
            if depth + width > 0 and speed > best_speed:
                best, best_speed = (depth, width), speed
    return best


class SourcePlanner:
    """Plans steps of a draft model with history beside it, upon the depth controller's costs and acceptance.

    Matches are told apart by kind. How often a proposal of a kind stands is measured at every step, whoever drafts:
    emitted tokens follow the policy's law, so that agreeing with them is standing. The draft model's acceptance is
    measured by kind too, since where history is sure the model is better than it is elsewhere; for that, one of
    `_MODEL_EVERY` steps is the model's alone.
    """

    def __init__(self, controller: DepthController, config: SpeculationConfig, max_depth: int) -> None:
        self._controller = controller
        self._max_depth = max_depth
        self.max_width = config.history_num_steps or max_depth
        self._min_confidence = config.history_min_confidence
        kinds = num_kinds(len(match_levels(config.history_min_match, config.history_max_match)))
        self._history = [AcceptanceTracker(self.max_width, optimism=_FIRST_GUESS) for _ in range(kinds)]
        self._model = [AcceptanceTracker(max_depth) for _ in range(kinds + 1)]  # the last: where nothing matches
        self._num_given_steps = 0

    def plan(self, matches: Sequence[Match | None]) -> SpecPlan:
        """For the next step of rows that found `matches`."""
        batch = len(matches)
        plan = self._controller.plan(batch)
        if plan.is_probe or not any(matches):
            return plan
        gains = self._gains(matches)
        depth, width = self._shape(gains)
        given = tuple(
            match.tokens[:width] if match and prefers_history(row, depth, width) else ()
            for match, row in zip(matches, gains, strict=True)
        )
        if not any(given):
            return SpecPlan(depth, batch if depth else 0)
        self._num_given_steps += 1
        if plan.depth and self._num_given_steps % _MODEL_EVERY == 0:
            return plan
        if all(given):
            depth = 0
        return SpecPlan(depth, batch if depth else 0, given)

    def observe(
        self, plan: SpecPlan, matches: Sequence[Match | None], emitted: Sequence[Sequence[int]], accepted: Sequence[int]
    ) -> None:
        """What became of the step: `emitted` tokens by row, of which the first `accepted` and one more stand."""
        by_kind: defaultdict[int, list[int]] = defaultdict(list)
        of_model: list[int] = []
        for row, (match, tokens, stood) in enumerate(zip(matches, emitted, accepted, strict=True)):
            if match is not None:
                num_seen = min(stood + 1, len(match.tokens))
                self._history[match.kind].observe(num_seen, [num_agreeing(match.tokens, tokens[:num_seen])])
            if row < plan.num_rows and not (plan.given and plan.given[row]):
                of_model.append(stood)
                by_kind[-1 if match is None else match.kind].append(stood)
        if plan.depth:
            self._controller.observe(plan, of_model)
            for kind, counts in by_kind.items():
                self._model[kind].observe(plan.depth, counts)

    def new_weights(self) -> None:
        """Policy and draft have changed."""
        for tracker in (*self._history, *self._model):
            tracker.fade(_NEW_WEIGHTS_FADE)

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON-able."""
        return {
            "history": [tracker.state() for tracker in self._history],
            "model": [tracker.state() for tracker in self._model],
            "num_given_steps": self._num_given_steps,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises EngineConfigError when it was saved under other settings."""
        saved = (len(state["history"]), len(state["history"][0]["tried"]))
        if saved != (len(self._history), self.max_width):
            raise EngineConfigError(
                f"the checkpoint was saved with {saved[0]} kinds of history matches and history drafts of {saved[1]} "
                f"tokens, now it is {len(self._history)} and {self.max_width}; resume with the same "
                "speculation.history_min_match, history_max_match and history_num_steps"
            )
        for name, trackers in (("history", self._history), ("model", self._model)):
            for tracker, saved_tracker in zip(trackers, state[name], strict=True):
                tracker.load_state(saved_tracker)
        self._num_given_steps = state["num_given_steps"]

    def _gains(self, matches: Sequence[Match | None]) -> list[Gains]:
        priors = self._controller.rates()
        model: dict[int, tuple[float, ...]] = {}
        history: dict[int, tuple[float, ...]] = {}
        gains: list[Gains] = []
        for match in matches:
            kind = -1 if match is None else match.kind
            if kind not in model:
                model[kind] = expected_drafts(self._model[kind].rates(priors))
            if match is not None and kind not in history:
                rates = self._history[kind].rates()
                history[kind] = expected_drafts(rates) if rates[0] >= self._min_confidence else (0.0,)
            found = (0.0,) if match is None else history[kind][: len(match.tokens) + 1]
            gains.append(Gains(model[kind], found))
        return gains

    def _shape(self, gains: Sequence[Gains]) -> tuple[int, int]:
        controller, batch = self._controller, len(gains)
        if controller.table is None:
            return self._max_depth, self.max_width
        return choose_shape(
            Counter(gains),
            self._max_depth,
            min(self.max_width, max(len(row.history) for row in gains) - 1),
            lambda depth, width: controller.seconds(batch, depth, width),
        )


def num_agreeing(proposed: Sequence[int], emitted: Sequence[int]) -> int:
    """How many of the proposed tokens are those emitted, before the first that is not."""
    for index, (a, b) in enumerate(zip(proposed, emitted, strict=False)):
        if a != b:
            return index
    return min(len(proposed), len(emitted))
