"""Requests that share a call: the answers that each gets alone, when it ends, each fault to whom it belongs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from aiohttp import web

from rollout_engine.http_client import HttpClient, ServerUnreachable
from rollout_engine.server_process import free_port
from rollout_engine.sglang_calls import GenerateCalls
from rollout_engine.sglang_wire import Refused, joint_body, streamed_answer
from tests.sglang_server_helpers import ScriptedServer


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def client(server: ScriptedServer) -> Iterator[HttpClient]:
    client = HttpClient(server.address)
    yield client
    client.close()


def bodies(count: int) -> list[dict[str, Any]]:
    return [
        {
            "rid": f"r-{i:04d}",
            "input_ids": [1, 2, i],
            "sampling_params": {"max_new_tokens": 3 + i},
            "return_logprob": True,
        }
        for i in range(count)
    ]


async def ask(calls: GenerateCalls, work: list[dict[str, Any]]) -> list[Any]:
    return await asyncio.gather(*(calls(body) for body in work), return_exceptions=True)


def tokens(answers: list[Any]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


def test_requests_of_one_moment_share_a_call_and_get_what_they_get_alone(
    server: ScriptedServer, client: HttpClient
) -> None:
    work = bodies(10)
    together = client.run(ask(GenerateCalls(client, most_together=4), work))
    assert server.num_calls == 3 and server.num_generate == 10
    alone = [client.run(ask(GenerateCalls(client), [body]))[0] for body in work]
    assert server.num_calls == 13
    assert tokens(together) == tokens(alone)
    assert [len(ids) for ids in tokens(together)] == [3 + i for i in range(10)]


def test_a_response_comes_when_it_ends_not_when_all_have(server: ScriptedServer, client: HttpClient) -> None:
    server.pause_after, server.finishes_first = 1, 1

    async def first_of_two() -> dict[str, Any]:
        calls = GenerateCalls(client)
        ready = [asyncio.ensure_future(calls(body)) for body in bodies(2)]
        done, waiting = await asyncio.wait(ready, return_when=asyncio.FIRST_COMPLETED, timeout=20)
        assert len(done) == 1 and len(waiting) == 1
        await client.request("POST", "/abort_request", {"abort_all": True})
        stopped = await waiting.pop()
        assert stopped["meta_info"]["finish_reason"]["type"] == "abort"
        return done.pop().result()

    assert client.run(first_of_two())["meta_info"]["finish_reason"]["type"] == "length"
    assert server.num_calls == 1


def test_a_call_that_nobody_waits_for_is_broken_off(server: ScriptedServer, client: HttpClient) -> None:
    server.pause_after = 1

    async def go_away() -> None:
        calls = GenerateCalls(client)
        ready = [asyncio.ensure_future(calls(body)) for body in bodies(3)]
        while server.num_paused < 3:
            await asyncio.sleep(0.01)
        ready[0].cancel()
        await client.request("GET", "/health")
        assert server.num_running == 3, "two still wait"
        for task in ready:
            task.cancel()

    client.run(go_away())
    server.wait_until_idle()


def test_what_nobody_waits_for_any_more_is_not_sent(server: ScriptedServer, client: HttpClient) -> None:
    async def go_away() -> Any:
        calls = GenerateCalls(client)
        gone, stays = (asyncio.ensure_future(calls(body)) for body in bodies(2))
        await asyncio.sleep(0)  # both are ready, and sent next
        gone.cancel()
        return await stays

    assert client.run(go_away())["output_ids"]
    assert [body["rid"] for body in server.bodies] == ["r-0001"]


def test_a_refused_call_is_told_to_all_its_members(server: ScriptedServer, client: HttpClient) -> None:
    server.fails_with = (400, {"error": {"message": "no room"}})
    answers = client.run(ask(GenerateCalls(client), bodies(3)))
    assert all(isinstance(answer, Refused) and str(answer).startswith("HTTP 400: no room; ") for answer in answers)
    assert all("does not say which of 3 requests" in str(answer) for answer in answers), "none is accused alone"
    (alone,) = client.run(ask(GenerateCalls(client), bodies(1)))
    assert str(alone) == "HTTP 400: no room"


def test_a_server_that_dies_is_told_to_those_who_wait(server: ScriptedServer, client: HttpClient) -> None:
    server.pause_after, server.finishes_first = 1, 2

    async def ask_and_die() -> list[Any]:
        calls = GenerateCalls(client)
        ready = [asyncio.ensure_future(calls(body)) for body in bodies(4)]
        while sum(task.done() for task in ready) < 2 or server.num_paused < 2:
            await asyncio.sleep(0.01)
        await asyncio.get_running_loop().run_in_executor(None, server.close)
        return await asyncio.gather(*ready, return_exceptions=True)

    answers = client.run(ask_and_die())
    assert sum(isinstance(answer, dict) for answer in answers) == 2
    assert sum(isinstance(answer, ServerUnreachable) for answer in answers) == 2


Say = Callable[[web.StreamResponse], Awaitable[None]]


def ask_a_stream(say: Say, count: int) -> list[Any]:
    """`count` requests in one call to a server whose answer `say` writes."""

    async def generate(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await say(response)
        return response

    async def everything(port: int, client: HttpClient) -> list[Any]:
        app = web.Application()
        app.router.add_post("/generate", generate)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        try:
            return await ask(GenerateCalls(client), bodies(count))
        finally:
            await runner.cleanup()

    port = free_port()
    client = HttpClient(f"http://127.0.0.1:{port}")
    try:
        return client.run(everything(port, client))
    finally:
        client.close()


def event(rid: str, ids: list[int], reason: dict[str, Any] | None = None, **changes: Any) -> bytes:
    meta = {
        "id": rid,
        "finish_reason": reason or {"type": "stop"},
        "completion_tokens": len(ids),
        "output_token_logprobs": [[-0.5, token, None] for token in ids],
    }
    return b"data: " + json.dumps({"output_ids": ids, "meta_info": meta | changes}).encode() + b"\n\n"


def test_one_that_never_ran_is_refused_and_its_companions_are_served() -> None:
    async def say(response: web.StreamResponse) -> None:
        reason = {"type": "abort", "status_code": 503, "message": "queue is full"}
        await response.write(event("r-0000", [], reason) + event("r-0001", [5, 6]) + b"data: [DONE]\n\n")

    refused, served = ask_a_stream(say, 2)
    assert isinstance(refused, Refused) and str(refused) == "HTTP 503: queue is full"
    assert served["output_ids"] == [5, 6]


def test_an_event_may_be_far_longer_than_a_line_buffer() -> None:
    ids = list(range(60_000))

    async def say(response: web.StreamResponse) -> None:
        await response.write(event("r-0000", [1]) + event("r-0001", ids))

    assert ask_a_stream(say, 2)[1]["output_ids"] == ids


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b'data: {"error": {"message": "bad input", "code": 400}}\n\n', "HTTP 400: bad input"),
        (b"data: [DONE]\n\n", "ended without an answer"),
        (b"data: {nonsense\n\n", "Expecting property name"),
        (b'data: {"output_ids": [1]}\n\n', "garbles a field"),
        (event("somebody else", [1]), "garbles a field"),
    ],
)
def test_a_stream_that_is_none_is_an_error_for_those_who_wait(data: bytes, told: str) -> None:
    async def say(response: web.StreamResponse) -> None:
        await response.write(event("r-0000", [7]) + data)

    served, *others = ask_a_stream(say, 3)
    assert served["output_ids"] == [7]
    assert len(others) == 2 and all(told in str(error) for error in others)


def test_what_a_stopped_stream_leaves_out_is_read_from_its_log_probs() -> None:
    found = json.loads(event("r", [4, 5, 6], {"type": "abort"}).removeprefix(b"data:"))
    found["output_ids"] = [6]
    assert streamed_answer(found) == found | {"output_ids": [4, 5, 6]}
    found["meta_info"]["output_token_logprobs"] = found["meta_info"]["output_token_logprobs"][-1:]
    with pytest.raises(ValueError, match=r"brought 1 of 3 tokens: .* without incremental_streaming_output"):
        streamed_answer(found)


def test_a_response_that_goes_on_is_no_answer() -> None:
    assert streamed_answer({"output_ids": [1], "meta_info": {"finish_reason": None}}) is None


def test_a_shared_call_says_of_each_request_what_its_own_would() -> None:
    work = bodies(2)
    joint = joint_body(work)
    assert joint["rid"] == ["r-0000", "r-0001"] and joint["input_ids"] == [[1, 2, 0], [1, 2, 1]]
    assert [params["max_new_tokens"] for params in joint["sampling_params"]] == [3, 4]
    assert joint["return_logprob"] and joint["stream"]
    assert "stream_interval" not in work[0]["sampling_params"], "a request that is sent again is as it was"
