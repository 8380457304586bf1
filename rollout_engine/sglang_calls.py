"""/generate calls: requests that are let go together travel together, so that the server begins them together.

A call for each request keeps the server's front end busy for most of a millisecond a request: a batch of a hundred then
trickles in, a prefill for every few of them, while the first ones decode already. So those that are ready in one turn
of the event loop share a call, whose answer is a stream with an event for each response as it ends. A lone request has
a plain call: the same answer without the stream. A call whose members nobody waits for any more is broken off, which
the server takes for the end of the requests in it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from rollout_engine.http_client import BadStatus, HttpClient, Reply, ServerUnreachable
from rollout_engine.sglang_wire import Refused, error_text, joint_body, streamed_answer

MOST_TOGETHER = 64  # the server looks at all members of a stream whenever one of them has something to say
_PATH = "/generate"

Answer = Mapping[str, Any]


class GenerateCalls:
    """Lives in the client's event loop."""

    def __init__(self, client: HttpClient, most_together: int = MOST_TOGETHER) -> None:
        self._client = client
        self._most_together = most_together
        self._ready: list[tuple[dict[str, Any], asyncio.Future[Answer]]] = []
        self._calls: set[asyncio.Task[None]] = set()  # the loop itself keeps no task alive

    async def __call__(self, body: dict[str, Any]) -> Answer:
        """The server's answer to one request (`sglang_wire.generate_body`).

        Raises ServerUnreachable, Refused with what the server says, ValueError when that is no answer.
        """
        loop = asyncio.get_running_loop()
        if not self._ready:
            loop.call_soon(self._send)  # after all that this turn of the loop still has to say
        answer: asyncio.Future[Answer] = loop.create_future()
        self._ready.append((body, answer))
        return await answer

    def _send(self) -> None:
        ready, self._ready = [(body, answer) for body, answer in self._ready if not answer.done()], []
        for start in range(0, len(ready), self._most_together):
            self._begin(ready[start : start + self._most_together])

    def _begin(self, group: Sequence[tuple[dict[str, Any], asyncio.Future[Answer]]]) -> None:
        work = self._alone(*group[0]) if len(group) == 1 else self._together(group)
        answers = [answer for _, answer in group]
        call = asyncio.create_task(_answered(work, answers))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        call.add_done_callback(lambda _: work.close())  # one that was broken off before it began

        def break_off(gone: asyncio.Future[Answer]) -> None:
            if gone.cancelled() and all(answer.done() for answer in answers):
                call.cancel()

        for answer in answers:
            answer.add_done_callback(break_off)

    async def _alone(self, body: dict[str, Any], answer: asyncio.Future[Answer]) -> None:
        reply = await self._client.request("POST", _PATH, body)
        if not reply.ok:
            raise _refusal(reply)
        _tell(answer, reply.json())

    async def _together(self, group: Sequence[tuple[dict[str, Any], asyncio.Future[Answer]]]) -> None:
        waiting = {body["rid"]: answer for body, answer in group}
        async for data in self._client.events("POST", _PATH, joint_body([body for body, _ in group])):
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                raise Refused(error_text(event["error"].get("code", 400), data.decode(errors="replace")))
            answer = waiting[event["meta_info"]["id"]]
            try:
                whole = streamed_answer(event)
            except (Refused, ValueError) as error:  # of this request, not of its companions
                if not answer.done():
                    answer.set_exception(error)
                continue
            if whole is not None:
                _tell(answer, whole)


async def _answered(work: Coroutine[Any, Any, None], answers: Sequence[asyncio.Future[Answer]]) -> None:
    """Do the call; whoever still waits afterwards is told why."""
    error: Exception = ValueError("the server's stream ended without an answer to this request")
    try:
        await work
    except BadStatus as found:
        error = _refusal(found.reply)
    except (ServerUnreachable, Refused, ValueError) as found:
        error = found
    except (KeyError, TypeError, AttributeError) as found:
        error = ValueError(f"the server's stream lacks or garbles a field ({type(found).__name__}: {found})")
    finally:
        unanswered = [answer for answer in answers if not answer.done()]
        if isinstance(error, Refused) and len(unanswered) > 1:
            error = Refused(f"{error}; SGLang does not say which of {len(unanswered)} requests in one call it means")
        for answer in unanswered:
            answer.set_exception(error)


def _refusal(reply: Reply) -> Refused:
    return Refused(error_text(reply.status, reply.text()))


def _tell(answer: asyncio.Future[Answer], value: Answer) -> None:
    if not answer.done():  # whoever asked may have gone
        answer.set_result(value)
