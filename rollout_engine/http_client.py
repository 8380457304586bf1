"""JSON over HTTP to one server, from an event loop in a thread of its own, over a new connection for each request."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp

T = TypeVar("T")


class ServerUnreachable(ConnectionError):
    """No answer: the server is not there, went away in the middle, or took longer than allowed."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server answered, whatever its status."""

    status: int
    body: bytes

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    def json(self) -> Any:
        """Raises ValueError when the body is not JSON."""
        return json.loads(self.body)

    def text(self, limit: int | None = 500) -> str:
        """Its first `limit` characters; None = all."""
        return self.body.decode(errors="replace").strip()[:limit]


class BadStatus(RuntimeError):
    """The answer is an error where a stream was expected."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.text())
        self.reply = reply


class HttpClient:
    """One client per server. Coroutines given to `run` share its loop: between two awaits nothing interferes."""

    def __init__(self, address: str) -> None:
        """`address` is http://HOST:PORT."""
        self.address = address.rstrip("/")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http-client", daemon=True)
        self._thread.start()
        self._session = self.run(self._open())
        self._is_closed = False

    async def request(self, method: str, path: str, payload: Any = None, *, timeout_s: float | None = None) -> Reply:
        """The server's answer, whatever its status. Raises ServerUnreachable when there is none in `timeout_s`."""
        async with self._asked(method, path, payload, timeout_s) as response:
            return Reply(response.status, await response.read())

    async def events(self, method: str, path: str, payload: Any) -> AsyncIterator[bytes]:
        """The data of the server-sent events that the answer consists of, however long they are.

        Raises ServerUnreachable when the connection breaks, BadStatus when the answer is an error.
        """
        async with self._asked(method, path, payload, None) as response:
            if not 200 <= response.status < 300:
                raise BadStatus(Reply(response.status, await response.read()))
            unfinished: list[bytes] = []
            async for piece in response.content.iter_any():
                first, *more = piece.split(b"\n")
                unfinished.append(first)
                for start in more:
                    line = b"".join(unfinished)
                    unfinished = [start]
                    if line.startswith(b"data:"):
                        yield line.removeprefix(b"data:").strip()

    @asynccontextmanager
    async def _asked(
        self, method: str, path: str, payload: Any, timeout_s: float | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        body = None if payload is None else json.dumps(payload, separators=(",", ":")).encode()
        try:
            async with self._session.request(
                method,
                self.address + path,
                data=body,
                headers={"Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=10.0),
            ) as response:
                yield response
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            what = str(error) or type(error).__name__
            raise ServerUnreachable(f"{method} {self.address}{path}: {what}") from error

    def call(self, method: str, path: str, payload: Any = None, *, timeout_s: float | None = None) -> Reply:
        """`request`, from any other thread."""
        return self.run(self.request(method, path, payload, timeout_s=timeout_s))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run in the loop and wait for the result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """Cancel what runs, close the connections, end the thread. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self.run(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> aiohttp.ClientSession:
        # A server closes a connection that was idle for long, SGLang's after 5 s (SGLANG_TIMEOUT_KEEP_ALIVE). A request
        # sent at that moment is lost, and whether it ran nobody knows, so that it could not be sent again. A connection
        # that is used once is never idle; opening one costs far less than any request here takes.
        # No limit on connections: how many requests run at once is decided by the caller.
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))

    async def _shut(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()
