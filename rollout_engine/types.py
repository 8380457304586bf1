"""What goes into an engine and what comes out. Frozen; changed only by `dataclasses.replace`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rollout_engine.speculation import CostTable
    from sync.publish import Transport


class EngineError(RuntimeError):
    """The engine cannot serve this: one line saying what, where and how to mend it."""


class EngineConfigError(ValueError):
    """Settings, or a file that they name, from which no engine can be made or resumed. One line, as above."""


class BadRequest(ValueError):
    """A request that cannot be served. One line, as above."""


class FinishReason(StrEnum):
    """Why a response ended."""

    STOP = "stop"  # a stop id or a stop string
    LENGTH = "length"  # max_new_tokens or the context is used up
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled. `temperature == 0` is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    max_new_tokens: int = 128
    seed: int = 0  # 63-bit; with the position it determines every random number of the request
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()  # stop strings; the tokens that complete one are kept


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One response to be sampled; (prompt_id, sample_id) is its key in a rollout."""

    prompt_id: int
    sample_id: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)

    @property
    def key(self) -> tuple[int, int]:
        return (self.prompt_id, self.sample_id)


@dataclass(frozen=True, slots=True)
class SpecStats:
    """Sums over decode forwards, so that means are token-weighted. The token sampled from the prefill is not in it.

    `accepted_histogram[n]` counts verify steps with n accepted drafts; a forward without a proposal is in
    `num_decode_steps` only. Position j of the tuples is the j-th draft token of a verify step. Steps whose drafts came
    from history are in all of these, and once more in `history`; a step's drafts are all of one source.
    """

    num_decode_steps: int = 0  # target forwards after the prefill, with or without a proposal
    num_verify_steps: int = 0  # those with at least one proposed token
    accepted_histogram: tuple[int, ...] = ()
    proposed_by_position: tuple[int, ...] = ()
    accepted_by_position: tuple[int, ...] = ()
    history: SpecStats | None = None  # the part that history drafts have in the sums; None when they had none

    @property
    def by_draft_model(self) -> SpecStats:
        """Without the steps whose drafts came from history: what says something about the draft model."""
        part = self.history
        if part is None:
            return self
        proposed = _minus(self.proposed_by_position, part.proposed_by_position)
        depth = sum(count > 0 for count in proposed)  # a step that proposes position j proposes those before it
        return SpecStats(
            self.num_decode_steps - part.num_decode_steps,
            self.num_verify_steps - part.num_verify_steps,
            _minus(self.accepted_histogram, part.accepted_histogram)[: depth + 1 if depth else 0],
            proposed[:depth],
            _minus(self.accepted_by_position, part.accepted_by_position)[:depth],
        )

    @property
    def num_proposed(self) -> int:
        return sum(self.proposed_by_position)

    @property
    def num_accepted(self) -> int:
        return sum(self.accepted_by_position)

    @property
    def accept_length(self) -> float:
        """Tokens per verify step, bonus token included; 1.0 when nothing was ever proposed.

        A response that ends inside accepted drafts never emits the bonus token of its last step, which is counted all
        the same: at most one token per response too many.
        """
        if self.num_verify_steps == 0:
            return 1.0
        return (self.num_accepted + self.num_verify_steps) / self.num_verify_steps

    @property
    def tokens_per_forward(self) -> float:
        """Tokens per target decode forward, steps without a proposal included; 1.0 without any forward.

        Counts the bonus token as `accept_length` does.
        """
        if self.num_decode_steps == 0:
            return 1.0
        return (self.num_accepted + self.num_decode_steps) / self.num_decode_steps

    def __add__(self, other: SpecStats) -> SpecStats:
        return SpecStats(
            self.num_decode_steps + other.num_decode_steps,
            self.num_verify_steps + other.num_verify_steps,
            _add(self.accepted_histogram, other.accepted_histogram),
            _add(self.proposed_by_position, other.proposed_by_position),
            _add(self.accepted_by_position, other.accepted_by_position),
            other.history if self.history is None else self.history + (other.history or SpecStats()),
        )


def _minus(whole: tuple[int, ...], part: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x - y for x, y in zip(whole, part + (0,) * (len(whole) - len(part)), strict=True))


def _add(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    short, long = sorted((a, b), key=len)
    return tuple(x + y for x, y in zip(short, long, strict=False)) + long[len(short) :]


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Response tokens [start, end) were sampled under policy (and draft) `version`."""

    start: int
    end: int
    version: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished (or aborted) request.

    `logprobs[i]` is log_softmax(policy logits / T) of `token_ids[i]` at the rollout's T, before top-k/top-p
    (T = 1 for greedy): SGLang's definition, and what the policy loss differentiates.
    """

    request: RolloutRequest
    token_ids: tuple[int, ...]  # [R] response, stop token included
    logprobs: tuple[float, ...]  # [R]
    policy_versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    spec: SpecStats = field(default_factory=SpecStats)
    trace: bytes = b""  # int16 [decode steps, 3]: proposals of the draft model, drafts accepted, tokens kept; or untold
    reward: float | None = None
    advantage: float | None = None


class RolloutEngine(Protocol):
    """Requests in, samples out as they finish. One `generate` at a time."""

    @property
    def transport(self) -> Transport:
        """The way for new weights of policy and draft into this engine: what `sync.publish` sends through."""

    def generate(self, requests: Iterable[RolloutRequest]) -> Iterator[Sample]:
        """Samples as they finish, in no fixed order. BadRequest before any work; EngineError when it cannot serve."""

    def abort(self, keys: Iterable[tuple[int, int]] | None = None) -> None:
        """Finish requests early, all of them by default: each still yields what it has so far."""

    def warm_up(self) -> None:
        """Do now what the first requests would otherwise wait for (measurements, compilation)."""

    def step_costs(self) -> CostTable | None:
        """What a step takes by batch and depth, as last seen; None where that is not known."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold of the engine (its depth controller); {} when there is nothing."""

    def load_state(self, state: dict[str, Any]) -> None: ...

    def leaving_no_trace(self) -> AbstractContextManager[None]:
        """What is generated inside changes nothing that the engine has learnt; afterwards it is as it was before."""

    def without_speculation(self) -> RolloutEngine:
        """An engine over the same weights that decodes plainly; the caller closes it after use."""

    def offload(self) -> None:
        """Give accelerator memory back while the policy trains; nothing is served until `onload` and a sync."""

    def onload(self) -> None: ...

    def close(self) -> None: ...
