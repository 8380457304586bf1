"""A server that speaks SGLang's protocol from a script: deterministic tokens, pauses, refusals. It holds no model.

Answers have the fields of recorded ones (tests/sglang_answers.json). It also plays the loader's part: it writes the
verdict that the script says.
"""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from aiohttp import web

from rollout_engine.server_process import free_port
from rollout_engine.sglang_engine import SGLangEngine
from sync.publish import publish
from sync.wire import Message, Verdict, verdict_path

LIMIT_S = 30.0
TENSOR = ("policy.w", [2], "float32")


class ScriptedServer:
    """Set the attributes before the calls that they are to change."""

    def __init__(self) -> None:
        self.info: dict[str, Any] = {
            "version": "0.5.20",
            "dtype": "float32",
            "speculative_algorithm": None,
            "context_length": 48,
            "custom_weight_loader": ["sync.loader.load"],
        }
        self.pause_after: int | None = None  # tokens after which a request waits to be aborted
        self.last_step: tuple[int, ...] = ()  # what a paused request decodes in the step in which its abort comes
        self.finishes_first = 0  # so many of the first requests do not pause
        self.refuses: str | None = None
        self.leaves_dirty = False
        self.is_healthy = True
        self.num_health = 0
        self.describes_routes = False  # serves /openapi.json
        self.update_routes: tuple[str, ...] = ("update_weights_from_tensor",)
        self.fails_update = False
        self.update_calls: list[tuple[str, str | None]] = []  # route and selector
        self.ignores_aborts = False
        self.others_come_at: set[str] = set()  # "update", "flush": a request of somebody else begins just before it
        self._others: list[asyncio.Task[None]] = []
        self.fails_with: tuple[int, dict[str, Any]] | None = None
        self.num_calls = 0  # of /generate
        self.num_generate = self.num_flushes = self.num_running = self.num_paused = 0
        self.bodies: list[dict[str, Any]] = []  # of /generate, one a request
        self.running_at_update = 0
        self.flushes_after_update: list[bool] = []
        self.memory_calls: list[tuple[str, list[str]]] = []
        self.version = -1
        self._aborts: dict[str, asyncio.Event] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.is_up = False

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        self._run(self._start(port))
        self.is_up = True
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def close(self) -> None:
        """Break every connection, as a server that dies."""
        if self.is_up:
            self.is_up = False
            self._run(self._runner.cleanup())

    def publish(self, engine: SGLangEngine, version: int) -> None:
        publish({"w": torch.full((2,), float(version))}, None, engine.transport, version)

    def wait_until_paused(self, num_requests: int = 2) -> None:
        deadline_s = time.monotonic() + LIMIT_S
        while self.num_paused < num_requests:
            assert time.monotonic() < deadline_s, f"{self.num_paused} of {num_requests} requests wait"
            time.sleep(0.01)

    def wait_until_idle(self) -> None:
        deadline_s = time.monotonic() + LIMIT_S
        while self.num_running:
            assert time.monotonic() < deadline_s, f"{self.num_running} requests run"
            time.sleep(0.01)

    @staticmethod
    def tokens_after(prompt_ids: Sequence[int], num_tokens: int) -> tuple[int, ...]:
        """Each depends on all before it, so that going on from a wrong prefix shows."""
        tokens = list(prompt_ids)
        for _ in range(num_tokens):
            tokens.append((7 * sum(tokens) + len(tokens)) % 48)
        return tuple(tokens[len(prompt_ids) :])

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(LIMIT_S)

    async def _start(self, port: int) -> None:
        app = web.Application()
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get("/health", self._health)
        app.router.add_get("/openapi.json", self._openapi)
        for verb in ("begin", "end"):
            app.router.add_post(f"/{verb}_weight_update", self._session)
        for path in ("generate", "abort_request", "flush_cache", "update_weights_from_tensor"):
            app.router.add_post(f"/{path}", getattr(self, f"_{path}"))
        for verb in ("release", "resume"):
            app.router.add_post(f"/{verb}_memory_occupation", self._memory)
        # A request whose connection breaks is at its end, as in SGLang.
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response(self.info)

    async def _openapi(self, request: web.Request) -> web.Response:
        if not self.describes_routes:
            return web.Response(status=404)
        return web.json_response({"paths": {f"/{route}": {} for route in ("generate", *self.update_routes)}})

    async def _session(self, request: web.Request) -> web.Response:
        self.update_calls.append((request.path, (await request.json()).get("selector")))
        return web.Response()

    async def _health(self, request: web.Request) -> web.Response:
        self.num_health += 1
        return web.Response(status=200 if self.is_healthy else 503)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.num_calls += 1
        if self.fails_with is not None:
            status, answer = self.fails_with
            return web.json_response(answer, status=status)
        if not isinstance(body["rid"], list):
            return web.json_response(await self._answer(body))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        keys = ("rid", "input_ids", "sampling_params")
        bodies = [dict(zip(keys, values, strict=True)) for values in zip(*(body[key] for key in keys), strict=True)]
        for one in bodies:  # SGLang sends an event with a response's first token, too
            await self._event(response, one, {"output_ids": [0], "meta_info": {"finish_reason": None}})
        answers = {asyncio.create_task(self._answer(one)): one for one in bodies}
        try:
            while answers:
                done, _ = await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    await self._event(response, answers.pop(task), task.result())
        finally:
            for task in answers:
                task.cancel()
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _event(self, response: web.StreamResponse, body: dict[str, Any], answer: dict[str, Any]) -> None:
        answer["meta_info"]["id"] = body["rid"]
        data = b"data: " + json.dumps(answer).encode() + b"\n\n"
        half = len(data) // 2  # pieces of a stream end anywhere
        await response.write(data[:half])
        await response.write(data[half:])

    async def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        self.num_generate += 1
        self.bodies.append(body)
        num_tokens, reason, last_step = body["sampling_params"]["max_new_tokens"], "length", ()
        self.num_running += 1
        try:
            if self.pause_after is not None and self.num_generate > self.finishes_first:
                num_tokens, reason, last_step = min(num_tokens, self.pause_after), "abort", self.last_step
                await self._wait_for_abort(body["rid"])
        finally:
            self.num_running -= 1
        tokens = self.tokens_after(body["input_ids"], num_tokens) + last_step
        meta: dict[str, Any] = {
            "finish_reason": {"type": reason},
            "output_token_logprobs": [[-0.5, token, None] for token in tokens],
        }
        meta["completion_tokens"] = len(tokens)
        return {"output_ids": tokens, "meta_info": meta}

    async def _wait_for_abort(self, rid: str) -> None:
        self._aborts[rid] = asyncio.Event()
        self.num_paused += 1
        try:
            await self._aborts[rid].wait()
        finally:
            self.num_paused -= 1
            del self._aborts[rid]

    def other_comes(self) -> None:
        """A request of somebody else begins, which runs until it is stopped."""
        self._run(self._other_comes())

    async def _other_comes(self, moment: str | None = None) -> None:
        if moment is None or moment in self.others_come_at:
            self.others_come_at.discard(str(moment))
            self.num_running += 1
            self._others.append(asyncio.create_task(self._other(f"other-{len(self._others)}")))
            await asyncio.sleep(0)

    async def _other(self, rid: str) -> None:
        try:
            await self._wait_for_abort(rid)
        finally:
            self.num_running -= 1

    async def _abort_request(self, request: web.Request) -> web.Response:
        body = await request.json()
        for rid, event in self._aborts.items():
            if self.ignores_aborts:
                continue
            if body.get("abort_all") or rid.startswith(body["rid"]):
                event.set()
        return web.Response()

    async def _flush_cache(self, request: web.Request) -> web.Response:
        await self._other_comes("flush")
        self.num_flushes += 1
        # Refused at first, as by a server that is still putting a request away.
        if self.num_flushes % 2 or self.num_running:
            return web.Response(status=400, text="Flush cache failed.")
        if self.flushes_after_update:
            self.flushes_after_update[-1] = True
        return web.Response()

    async def _memory(self, request: web.Request) -> web.Response:
        tags = (await request.json())["tags"]
        self.memory_calls.append((request.path.strip("/").partition("_")[0], tags))
        return web.Response()

    async def _update_weights_from_tensor(self, request: web.Request) -> web.Response:
        self.running_at_update += self.num_running
        body = await request.json()
        self.update_calls.append((request.path, body.get("selector")))
        if self.fails_update:
            return web.Response(status=400, text="no")
        await self._other_comes("update")
        while self.num_running:
            await asyncio.sleep(0.001)
        ((_, payload),) = pickle.loads(base64.b64decode(body["serialized_named_tensors"][0]))
        message = Message.decode(bytes(payload.tolist()))
        verdict_path(message).write_bytes(self._judge(message).encode())
        return web.json_response({"success": True})

    def _judge(self, message: Message) -> Verdict:
        if message.kind == "attach":
            return Verdict(message.id, -1, True, tensors=[TENSOR])
        self.flushes_after_update.append(False)
        if self.memory_calls:
            self.memory_calls.append(("update", []))
        if self.refuses is not None:
            return Verdict(message.id, self.version, self.leaves_dirty, error=self.refuses)
        self.version = message.version
        return Verdict(message.id, message.version, False, checksums=message.checksums)
