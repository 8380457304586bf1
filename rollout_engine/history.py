"""History drafts as the engine drives them: which texts each running row can look things up in."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from draft_models.history import HistoryIndex, HistoryStore, Match, indexed_token_bytes
from rollout_engine.config import SpeculationConfig
from rollout_engine.history_plan import SourcePlanner
from rollout_engine.rows import Row
from rollout_engine.speculation import DepthController, SpecPlan

_INDEXED_TOKENS = 1 << 16  # of a prompt's earlier responses: what its first request waits for, about 0.6 us a token
_SHARE_OF_FREE = 8  # of the memory left for indices, a new one takes an eighth: those after it need room too


class HistoryDrafter:
    """An index for every prompt that has requests running, over its earlier responses and all its siblings.

    An index is made with the first of a prompt's requests and dropped with the last. Finished texts take half of
    `history_max_bytes`, the indices the other half: earlier texts get a part of what is left, and what is written is
    taken in while there is room. After that a row still finds what its index has; nothing new is found there until
    other prompts are done. So the half holds but for each running text's first entry, about 500 bytes and its prompt.

    What a row finds depends on how far its siblings are, hence on scheduling: under TARGET_ONLY and REJECTION so do
    the tokens, though not their law; under GREEDY and COUPLED nothing does.

    That law needs a seed of its own for every request, in later epochs too. A text that was drawn with the very numbers
    which verify it now tells what they will be: under TARGET_ONLY and REJECTION its tokens are no fair proposal.
    """

    def __init__(self, config: SpeculationConfig, controller: DepthController, max_depth: int) -> None:
        """`controller` plans the draft model's chains of up to `max_depth` tokens; history stands beside it."""
        self._planner = SourcePlanner(controller, config, max_depth)
        self._match_lengths = (config.history_min_match, config.history_max_match)
        self._token_bytes = indexed_token_bytes(*self._match_lengths)
        self._max_bytes = config.history_max_bytes // 2  # of the store, and of the indices
        self._store = HistoryStore(self._max_bytes)
        self.reset()

    def reset(self) -> None:
        """Drop the running texts; finished ones and what was measured stay."""
        self._matches: list[Match | None] = []
        self._expected: Counter[tuple[int, ...]] = Counter()
        self._indices: dict[tuple[int, ...], HistoryIndex] = {}
        self._running: dict[tuple[int, int], tuple[HistoryIndex, int]] = {}  # by request: index, number of its text
        self._free_bytes = self._max_bytes  # of the indices' half; below 0 when there are very many running texts

    def expect(self, prompts: Iterable[tuple[int, ...]]) -> None:
        """One prompt for every request to come."""
        self._expected.update(prompts)

    @property
    def max_tokens(self) -> int:
        """Of one draft."""
        return self._planner.max_width

    def plan(self, rows: Sequence[Row]) -> SpecPlan:
        """For the next step of these rows: how much the draft model drafts, and what history does instead."""
        self._matches = self.look_up(rows, self.max_tokens)
        return self._planner.plan(self._matches)

    def observe(self, plan: SpecPlan, emitted: Sequence[Sequence[int]], accepted: Sequence[int]) -> None:
        """What became of the step that was planned last: `emitted` tokens by row, the first `accepted` being drafts."""
        self._planner.observe(plan, self._matches, emitted, accepted)

    def new_weights(self) -> None:
        """Policy and draft have changed: what was measured says less."""
        self._planner.new_weights()

    def look_up(self, rows: Sequence[Row], num_tokens: int) -> list[Match | None]:
        """What may follow each row, at most `num_tokens`; None where nothing matches or no draft would be kept."""
        running = [self._running.get(row.request.key) or self._admit(row) for row in rows]
        for row, (index, number) in zip(rows, running, strict=True):
            self._take_in(index, number, row.tokens)
        found: list[Match | None] = []
        for row, (index, number) in zip(rows, running, strict=True):
            most = min(num_tokens, row.limit - len(row.tokens) - 1)
            found.append(index.look_up(number, most, row.tokens) if most > 0 else None)
        return found

    def finish(self, row: Row) -> None:
        """The row has ended: its siblings and later epochs may look it up."""
        if len(row.tokens) > row.prompt_len:
            self._store.add(row.request.prompt_ids, row.tokens[row.prompt_len :])
        running = self._running.pop(row.request.key, None)
        if running is not None:
            index, number = running
            self._take_in(index, number, row.tokens)
        self.release(row.request.prompt_ids)

    def release(self, prompt: tuple[int, ...]) -> None:
        """A request for this prompt is over, or will never run."""
        self._expected[prompt] -= 1
        if self._expected[prompt] <= 0:
            del self._expected[prompt]
            index = self._indices.pop(prompt, None)
            self._free_bytes += 0 if index is None else index.num_bytes

    def state(self) -> dict[str, Any]:
        """For a checkpoint: the finished texts and how history drafts fared."""
        return {"texts": self._store.state(), "planner": self._planner.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises EngineConfigError when it was saved under other settings."""
        self._planner.load_state(state["planner"])
        self._store.load_state(state["texts"])

    def _admit(self, row: Row) -> tuple[HistoryIndex, int]:
        prompt = row.request.prompt_ids
        index = self._indices.get(prompt)
        if index is None:
            earlier = self._store.responses(prompt, self._indexed_tokens())
            index = self._indices[prompt] = HistoryIndex(*self._match_lengths)
            self._take_in(index, self._add(index, ()), prompt)
            for response in earlier:
                self._take_in(index, self._add(index, prompt), array("i", prompt) + response)
        running = self._running[row.request.key] = (index, self._add(index, prompt))
        return running

    def _add(self, index: HistoryIndex, prompt: tuple[int, ...]) -> int:
        """A new text that has yet to be taken in behind its prompt."""
        before = index.num_bytes
        number = index.add(prompt, start=len(prompt))
        self._free_bytes -= index.num_bytes - before
        return number

    def _take_in(self, index: HistoryIndex, number: int, text: Sequence[int]) -> None:
        """What a text has grown by, if there is room for all of it."""
        num_bytes = (len(text) - index.length(number)) * self._token_bytes
        if num_bytes <= self._free_bytes:
            index.extend(number, text)
            self._free_bytes -= num_bytes

    def _indexed_tokens(self) -> int:
        """How much of its prompt's earlier responses a new index takes in."""
        return min(_INDEXED_TOKENS, max(self._free_bytes, 0) // (_SHARE_OF_FREE * self._token_bytes))
