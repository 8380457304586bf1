"""Requests on their way through a server: at most N at a time, held back, interrupted, resumed. Knows no server.

An interrupted request is sent again with its prompt and the tokens so far, so that it goes on under the next version
of the weights: its sample then has two version spans, and no request is ever lost.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from queue import SimpleQueue
from typing import Any, TypeVar

from rollout_engine.types import EngineError, FinishReason, RolloutRequest, Sample, SpecStats, VersionSpan

T = TypeVar("T")

_STOP_AGAIN_S = 0.1  # a stop overtakes a request that is still on its way, so it is repeated
_DROP_TIMEOUT_S = 10.0
HOLD_TIMEOUT_S = 300.0  # a server ends a stopped request at its next step, which may be one that compiles for minutes


@dataclass(frozen=True, slots=True)
class Piece:
    """What the server answered to one request: all of the response, or the part before an interruption."""

    token_ids: tuple[int, ...]  # [R]
    logprobs: tuple[float, ...]  # [R]
    finish_reason: FinishReason  # ABORT: interrupted
    spec: SpecStats


@dataclass(slots=True)
class Progress:
    """One request and what came back of it so far."""

    request: RolloutRequest
    limit: int  # most response tokens
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)
    spec: SpecStats = field(default_factory=SpecStats)
    is_aborted: bool = False

    @property
    def prompt_ids(self) -> list[int]:
        """What the server has to go on from."""
        return [*self.request.prompt_ids, *self.token_ids]

    @property
    def num_left(self) -> int:
        return self.limit - len(self.token_ids)

    def add(self, piece: Piece, version: int) -> None:
        start = len(self.token_ids)
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.spec += piece.spec
        if not piece.token_ids:
            return
        if self.spans and self.spans[-1].version == version:
            start = self.spans.pop().start
        self.spans.append(VersionSpan(start, len(self.token_ids), version))

    def sample(self, reason: FinishReason) -> Sample:
        return Sample(
            request=self.request,
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            policy_versions=tuple(self.spans),
            finish_reason=reason,
            spec=self.spec,
        )


Serve = Callable[[str, Progress], Awaitable[Piece]]  # raises EngineError or BadRequest naming the request
Stop = Callable[[str | None], Awaitable[None]]  # one request by its id, all with None; EngineError when unreachable


class RequestPool:
    """Everything but the construction runs in one event loop. Finished samples, or what went wrong, go to `results`."""

    def __init__(self, serve: Serve, stop: Stop, max_running: int, *, hold_timeout_s: float = HOLD_TIMEOUT_S) -> None:
        self._serve, self._stop, self._max_running = serve, stop, max_running
        self._hold_timeout_s = hold_timeout_s
        self._pending: deque[Progress] = deque()
        self._running: dict[str, Progress] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._version: int | None = None  # None: held back
        # Of one width and never used twice, because servers match requests to stop by the beginning of their ids; two
        # pools at one server do not share any either.
        name = uuid.uuid4().hex[:12]
        self._ids = (f"slipstream-{name}-{number:010d}" for number in count())
        self.results: SimpleQueue[Sample | Exception] = SimpleQueue()

    async def submit(self, work: Iterable[Progress]) -> None:
        """Take up new requests, after those that wait already."""
        self.results = SimpleQueue()
        self._pending.extend(work)
        self._fill()

    async def open(self, version: int) -> None:
        """Let requests go; what they bring is sampled under `version`."""
        self._version = version
        self._fill()

    async def hold(self) -> None:
        """Let no more requests go, interrupt all that the server has, and return when none of ours runs any more.

        Stops what others sent, too, even where nothing of ours runs: new weights wait for all of them.
        Raises EngineError when the server cannot be reached, or does not let go of them in `hold_timeout_s`.
        """
        self._version = None
        if not self._running:
            await self._stop(None)
        if not await self._interrupt(self._hold_timeout_s):
            raise EngineError(
                f"{len(self._running)} requests still run {self._hold_timeout_s:.0f} s after they were stopped: the "
                "server hangs; start it again"
            )

    async def abort(self, keys: Collection[tuple[int, int]] | None) -> None:
        """End these requests (None: all) with what they have; returns at once, their samples come as they end."""
        for progress in [p for p in self._pending if keys is None or p.request.key in keys]:
            self._pending.remove(progress)
            self.results.put(progress.sample(FinishReason.ABORT))
        for rid, progress in self._running.items():
            if not progress.is_aborted and (keys is None or progress.request.key in keys):
                progress.is_aborted = True
                self._start(self._stop_until_gone(rid))

    async def alone(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which waits for all requests: those that others send meanwhile are stopped, too."""
        task = asyncio.create_task(work)
        try:
            while not (await asyncio.wait({task}, timeout=_STOP_AGAIN_S))[0]:
                with suppress(EngineError):  # `work` itself tells that the server is gone
                    await self._stop(None)
            return task.result()
        finally:
            task.cancel()

    async def drop(self) -> None:
        """Forget all requests and stop what runs.

        Returns when the server has let go of it, or does not: whoever serves a request is cancelled then.
        """
        self._pending.clear()
        for progress in self._running.values():
            progress.is_aborted = True
        with suppress(EngineError):  # it is gone, and with it all that ran
            await self._interrupt(_DROP_TIMEOUT_S)
        for task in self._tasks:
            task.cancel()

    async def _interrupt(self, timeout_s: float) -> bool:
        """Stop what runs, again and again; True when nothing is left, False when something is after `timeout_s`."""
        now_s = asyncio.get_running_loop().time
        deadline_s = now_s() + timeout_s
        while self._running:
            if now_s() >= deadline_s:
                return False
            await self._stop(None)
            await self._wait(_STOP_AGAIN_S)
        return True

    def _fill(self) -> None:
        while self._version is not None and self._pending and len(self._running) < self._max_running:
            rid, progress = next(self._ids), self._pending.popleft()
            self._running[rid] = progress
            self._start(self._run(rid, progress, self._version))

    async def _run(self, rid: str, progress: Progress, version: int) -> None:
        try:
            piece = await self._serve(rid, progress)
        except (EngineError, ValueError) as error:
            self.results.put(error)
            return
        finally:
            del self._running[rid]
        progress.add(piece, version)
        self._settle(progress, piece.finish_reason)
        self._fill()

    def _settle(self, progress: Progress, reason: FinishReason) -> None:
        if reason is FinishReason.ABORT and progress.num_left <= 0:
            reason = FinishReason.LENGTH  # interrupted in its last step: there is nothing to go on with
        if reason is FinishReason.ABORT and not progress.is_aborted:
            if self._version is None:
                self._pending.appendleft(progress)  # interrupted for a sync: first in line afterwards
                return
            prompt_id, sample_id = progress.request.key
            self.results.put(
                EngineError(f"request (prompt {prompt_id}, sample {sample_id}): the server stopped it, unasked")
            )
            return
        self.results.put(progress.sample(reason))

    async def _stop_until_gone(self, rid: str) -> None:
        try:
            while rid in self._running:
                await self._stop(rid)
                await asyncio.sleep(_STOP_AGAIN_S)
        except EngineError:
            return  # the request itself reports that the server is gone

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        """A mistake in the program, too, must reach whoever waits for results."""
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self.results.put(error)

    async def _wait(self, timeout_s: float) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
