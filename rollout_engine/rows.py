"""One running request as the engine's host side keeps it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from rollout_engine.types import FinishReason, RolloutRequest, Sample, SpecStats, VersionSpan


@dataclass(slots=True)
class Row:
    """`tokens` is prompt and response; the target's KV is valid for all of them but the last."""

    request: RolloutRequest
    limit: int  # no token beyond this length
    tokens: list[int]
    logprobs: list[float] = field(default_factory=list)
    version_starts: list[tuple[int, int]] = field(default_factory=list)  # (response index, version)
    counts: SpecCounts = field(default_factory=lambda: SpecCounts())

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_new(self) -> int:
        return len(self.logprobs)

    def add(self, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        self.tokens.extend(tokens)
        self.logprobs.extend(logprobs)

    def cut(self, num_tokens: int) -> None:
        """Take back the last tokens."""
        if num_tokens:
            del self.tokens[-num_tokens:], self.logprobs[-num_tokens:]

    def set_version(self, version: int) -> None:
        """Tokens from here on are sampled under `version`."""
        if self.version_starts and self.version_starts[-1][0] == self.num_new:
            self.version_starts.pop()
        self.version_starts.append((self.num_new, version))

    def sample(self, reason: FinishReason) -> Sample:
        ends = [start for start, _ in self.version_starts[1:]] + [self.num_new]
        spans = zip(self.version_starts, ends, strict=True)
        return Sample(
            request=self.request,
            token_ids=tuple(self.tokens[self.prompt_len :]),
            logprobs=tuple(self.logprobs),
            policy_versions=tuple(VersionSpan(start, end, version) for (start, version), end in spans if start < end),
            finish_reason=reason,
            spec=self.counts.stats(),
            trace=self.counts.trace.tobytes(),
        )


@dataclass(slots=True)
class SpecCounts:
    """The sums of `SpecStats`, growing."""

    num_decode_steps: int = 0
    num_verify_steps: int = 0
    histogram: list[int] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    history: SpecCounts | None = None  # of the steps whose drafts came from history
    trace: array[int] = field(default_factory=lambda: array("h"))  # see `Sample.trace`

    def add_step(self, num_drafts: int, num_accepted: int, num_kept: int, *, from_history: bool = False) -> None:
        """Of `num_drafts` proposals `num_accepted` stood, and `num_kept` tokens remained where a response ends.

        Accepted drafts behind the end do not count; proposals do. Where the end is an accepted draft, no bonus token
        follows it, but `SpecStats.accept_length` adds one for every verify step.
        """
        self.num_decode_steps += 1
        num_accepted = min(num_accepted, num_kept)
        self.trace.extend((0 if from_history else num_drafts, num_accepted, num_kept))
        if num_drafts == 0:
            return
        self.num_verify_steps += 1
        while len(self.proposed) < num_drafts:
            self.proposed.append(0)
            self.accepted.append(0)
        self.histogram.extend([0] * (num_drafts + 1 - len(self.histogram)))
        self.histogram[num_accepted] += 1
        for position in range(num_drafts):
            self.proposed[position] += 1
            self.accepted[position] += position < num_accepted
        if from_history:
            if self.history is None:
                self.history = SpecCounts()
            self.history.add_step(num_drafts, num_accepted, num_kept)

    def stats(self) -> SpecStats:
        return SpecStats(
            self.num_decode_steps,
            self.num_verify_steps,
            tuple(self.histogram),
            tuple(self.proposed),
            tuple(self.accepted),
            None if self.history is None else self.history.stats(),
        )
