"""What becomes of a request when the server closes connections of its own accord."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from rollout_engine.http_client import HttpClient, ServerUnreachable

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
Start = Callable[[bool], "ClosingServer"]


class ClosingServer:
    """Counts the requests that it has read whole. Then it closes the connection, after an answer at the next byte."""

    def __init__(self, *, answers: bool) -> None:
        self.num_requests = 0
        self._answers = answers
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        starting = asyncio.start_server(self._talk, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result()
        self.address = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0] or 0)
        await reader.readexactly(length)
        self.num_requests += 1
        if self._answers:
            writer.write(ANSWER)
            await writer.drain()
            await reader.read(1)  # idle, until the next request begins: that one is never read
        writer.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:

        def make(answers: bool) -> ClosingServer:
            server = ClosingServer(answers=answers)
            stack.callback(server.close)
            return server

        yield make


@pytest.fixture
def connect() -> Iterator[Callable[[str], HttpClient]]:
    with ExitStack() as stack:

        def make(address: str) -> HttpClient:
            client = HttpClient(address)
            stack.callback(client.close)
            return client

        yield make


def test_a_connection_that_is_closed_while_idle_loses_no_request(
    start: Start, connect: Callable[[str], HttpClient]
) -> None:
    server = start(True)
    client = connect(server.address)
    for _ in range(3):
        assert client.call("POST", "/generate", {"rid": "a"}).ok
    assert server.num_requests == 3


def test_a_request_that_a_server_may_have_run_is_not_sent_again(
    start: Start, connect: Callable[[str], HttpClient]
) -> None:
    server = start(False)
    client = connect(server.address)
    with pytest.raises(ServerUnreachable, match=r"POST .*/generate: Server disconnected"):
        client.call("POST", "/generate", {"rid": "a"})
    assert server.num_requests == 1
