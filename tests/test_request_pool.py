"""Requests are neither lost nor counted twice, whatever interrupts them; at most N are with the server at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from rollout_engine.request_pool import Piece, Progress, RequestPool
from rollout_engine.types import (
    EngineError,
    FinishReason,
    RolloutRequest,
    Sample,
    SamplingParams,
    SpecStats,
    VersionSpan,
)


class Server:
    """Decodes token 100 + position of the whole sequence, one each time that `step` is called."""

    def __init__(self) -> None:
        self.running: dict[str, asyncio.Event] = {}
        self.allowed: dict[str, int] = {}
        self.stopped: set[str] = set()
        self.seen: list[tuple[int, ...]] = []  # prompts in order of arrival
        self.most_at_once = 0
        self.fails: Exception | None = None

    async def serve(self, rid: str, progress: Progress) -> Piece:
        self.seen.append(tuple(progress.prompt_ids))
        self.running[rid], self.allowed[rid] = asyncio.Event(), 0
        self.most_at_once = max(self.most_at_once, len(self.running))
        num_left, start = progress.num_left, len(progress.prompt_ids)
        try:
            while self.allowed[rid] < num_left and rid not in self.stopped:
                await self.running[rid].wait()
                self.running[rid].clear()
                if self.fails is not None:
                    raise self.fails
        finally:
            del self.running[rid]
        done = min(self.allowed[rid], num_left)
        reason = FinishReason.LENGTH if done == num_left else FinishReason.ABORT
        return Piece(tuple(range(100 + start, 100 + start + done)), (-0.5,) * done, reason, SpecStats(done))

    async def stop(self, rid: str | None) -> None:
        for key in list(self.running) if rid is None else [rid]:
            self.stopped.add(key)
            if key in self.running:
                self.running[key].set()

    async def step(self, num_tokens: int) -> None:
        """Let every request that is running now decode this much further."""
        await settle()
        for rid, event in self.running.items():
            self.allowed[rid] += num_tokens
            event.set()
        await settle()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def work(num_requests: int, limit: int = 4) -> list[Progress]:
    requests = [RolloutRequest(0, i, (i, i), SamplingParams(max_new_tokens=limit)) for i in range(num_requests)]
    return [Progress(request, limit) for request in requests]


def taken(pool: RequestPool) -> dict[int, Sample]:
    samples = {}
    while not pool.results.empty():
        found = pool.results.get()
        assert isinstance(found, Sample)
        assert found.request.sample_id not in samples, "came twice"
        samples[found.request.sample_id] = found
    return samples


def run(case: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(case, timeout=60))


def test_at_most_n_at_once_and_first_come_first_served() -> None:
    async def case() -> None:
        server = Server()
        pool = RequestPool(server.serve, server.stop, 2)
        await pool.open(0)
        await pool.submit(work(5))
        for _ in range(3):
            await server.step(4)
        assert server.most_at_once == 2
        assert server.seen == [(i, i) for i in range(5)]
        samples = taken(pool)
        assert samples.keys() == set(range(5))
        assert samples[3].token_ids == (102, 103, 104, 105)
        assert samples[3].finish_reason is FinishReason.LENGTH
        assert samples[3].policy_versions == (VersionSpan(0, 4, 0),)

    run(case())


def test_nothing_goes_before_the_gate_is_open() -> None:
    async def case() -> None:
        server = Server()
        pool = RequestPool(server.serve, server.stop, 2)
        await pool.submit(work(1))
        await server.step(4)
        assert server.seen == []
        await pool.open(3)
        await server.step(4)
        assert taken(pool)[0].policy_versions == (VersionSpan(0, 4, 3),)

    run(case())


def test_interrupted_requests_go_on_under_the_next_version() -> None:
    async def case() -> None:
        server = Server()
        pool = RequestPool(server.serve, server.stop, 2)
        await pool.open(0)
        await pool.submit(work(3, limit=5))
        await server.step(2)
        await pool.hold()
        assert not server.running and pool.results.empty()
        await pool.open(1)
        await server.step(5)
        await server.step(5)
        samples = taken(pool)
        assert samples.keys() == {0, 1, 2}
        for sample_id, spans in (
            (0, (VersionSpan(0, 2, 0), VersionSpan(2, 5, 1))),
            (1, (VersionSpan(0, 2, 0), VersionSpan(2, 5, 1))),
            (2, (VersionSpan(0, 5, 1),)),
        ):
            sample = samples[sample_id]
            assert sample.policy_versions == spans
            assert sample.token_ids == (102, 103, 104, 105, 106) and len(sample.logprobs) == 5
            assert sample.spec.num_decode_steps == 5
        # The two that had begun went on first, each from its own tokens.
        assert sorted(server.seen[2:4]) == [(0, 0, 102, 103), (1, 1, 102, 103)]
        assert server.seen[4] == (2, 2)

    run(case())


def test_a_refused_update_leaves_one_span() -> None:
    async def case() -> None:
        server = Server()
        pool = RequestPool(server.serve, server.stop, 1)
        await pool.open(0)
        await pool.submit(work(1))
        await server.step(1)
        await pool.hold()
        await pool.open(0)
        await server.step(4)
        assert taken(pool)[0].policy_versions == (VersionSpan(0, 4, 0),)

    run(case())


def test_one_without_tokens_left_is_not_sent_again() -> None:
    async def case() -> None:
        sent = asyncio.Event()
        num_sent = 0

        async def serve(rid: str, progress: Progress) -> Piece:
            nonlocal num_sent
            num_sent += 1
            await sent.wait()
            return Piece((7, 8), (-0.5, -0.5), FinishReason.ABORT, SpecStats())

        async def stop(rid: str | None) -> None:
            sent.set()

        pool = RequestPool(serve, stop, 1)
        await pool.open(0)
        await pool.submit(work(1, limit=2))
        await settle()
        await pool.hold()
        await pool.open(1)
        await settle()
        assert taken(pool)[0].finish_reason is FinishReason.LENGTH and num_sent == 1

    run(case())


def test_abort_yields_what_there_is() -> None:
    async def case() -> None:
        server = Server()
        pool = RequestPool(server.serve, server.stop, 2)
        await pool.open(0)
        await pool.submit(work(4))
        await server.step(1)
        await pool.abort({(0, 0), (0, 3)})
        await settle()
        samples = taken(pool)
        assert {key: len(sample.token_ids) for key, sample in samples.items()} == {0: 1, 3: 0}
        assert {sample.finish_reason for sample in samples.values()} == {FinishReason.ABORT}
        await server.step(4)
        await server.step(4)
        assert {key: len(sample.token_ids) for key, sample in taken(pool).items()} == {1: 4, 2: 4}

    run(case())


def test_abort_of_all_while_held_back() -> None:
    async def case() -> None:
        server = Server()
        pool = RequestPool(server.serve, server.stop, 1)
        await pool.open(0)
        await pool.submit(work(2))
        await server.step(1)
        await pool.hold()
        await pool.abort(None)
        assert {key: len(sample.token_ids) for key, sample in taken(pool).items()} == {0: 1, 1: 0}

    run(case())


def test_a_stop_that_nobody_asked_for_is_an_error() -> None:
    async def case() -> None:
        server = Server()
        pool = RequestPool(server.serve, server.stop, 1)
        await pool.open(0)
        await pool.submit(work(1))
        await server.step(1)
        await server.stop(None)
        await settle()
        found = pool.results.get_nowait()
        assert isinstance(found, EngineError) and "(prompt 0, sample 0)" in str(found)

    run(case())


def test_what_serving_raises_is_handed_over() -> None:
    async def case() -> None:
        server = Server()
        server.fails = EngineError("it broke")
        pool = RequestPool(server.serve, server.stop, 1)
        await pool.open(0)
        await pool.submit(work(1))
        await server.step(1)
        assert pool.results.get_nowait() is server.fails

    run(case())


@pytest.mark.parametrize("where", ["serve", "stop"])
def test_a_mistake_in_the_program_reaches_who_waits(where: str) -> None:
    async def case() -> None:
        server = Server()
        mistake = TypeError("float(None)")

        async def stop(rid: str | None) -> None:
            raise mistake

        pool = RequestPool(server.serve, stop, 1)
        await pool.open(0)
        await pool.submit(work(1))
        if where == "serve":
            server.fails = mistake
            await server.step(1)
        else:
            await settle()
            await pool.abort(None)
            await settle()
        assert pool.results.get_nowait() is mistake

    run(case())


def test_a_hold_stops_what_others_sent_too() -> None:
    async def case() -> None:
        stopped = []

        async def stop(rid: str | None) -> None:
            stopped.append(rid)

        pool = RequestPool(Server().serve, stop, 1)
        await pool.open(0)
        await pool.hold()
        assert stopped == [None]

    run(case())


def test_a_hold_of_a_server_that_is_gone_says_so() -> None:
    async def case() -> None:
        async def stop(rid: str | None) -> None:
            raise EngineError("gone")

        with pytest.raises(EngineError, match="gone"):
            await RequestPool(Server().serve, stop, 1).hold()

    run(case())


def test_others_are_stopped_until_work_that_waits_for_them_is_done() -> None:
    async def case() -> None:
        is_free = asyncio.Event()

        async def stop(rid: str | None) -> None:
            assert rid is None
            is_free.set()
            raise EngineError("the work itself tells of such things")

        async def work() -> str:
            await is_free.wait()
            return "done"

        async def fails() -> str:
            raise EngineError("refused")

        pool = RequestPool(Server().serve, stop, 1)
        assert await pool.alone(work()) == "done"
        with pytest.raises(EngineError, match="refused"):
            await pool.alone(fails())

    run(case())


@pytest.mark.parametrize("is_reachable", [True, False])
def test_drop_forgets_everything(is_reachable: bool) -> None:
    async def case() -> None:
        server = Server()

        async def stop(rid: str | None) -> None:
            if not is_reachable:
                raise EngineError("gone")
            await server.stop(rid)

        pool = RequestPool(server.serve, stop, 2)
        await pool.open(0)
        await pool.submit(work(4))
        await server.step(1)
        await pool.drop()
        await settle()
        assert not server.running
        await pool.submit(work(1))
        await server.step(4)
        assert taken(pool).keys() == {0}, "only what was asked for afterwards"

    run(case())
