"""A server is started at a port that nobody has, and again at another one when somebody took it meanwhile."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rollout_engine import server_process, sglang_launch
from rollout_engine.config import RolloutConfig
from rollout_engine.server_process import free_port, port_is_taken
from rollout_engine.types import EngineConfigError, EngineError
from tests.sglang_package import install

PLAIN = RolloutConfig(engine="sglang", speculative_algorithm="NONE", device="cpu", max_running_requests=2)

# The first `takes` starts find their port taken, as a server does whose port became a connection's after our look.
LAUNCH_SERVER = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

port = sys.argv[sys.argv.index("--port") + 1]
starts = Path(os.environ["STARTS"])
with starts.open("a") as file:
    file.write(port + " ")
if len(starts.read_text().split()) <= int(os.environ["TAKES"]):
    taken = "ERROR: [Errno 98] error while attempting to bind on address: address already in use"
    sys.exit(os.environ.get("SAYS", taken))
HTTPServer((sys.argv[sys.argv.index("--host") + 1], int(port)), Healthy).serve_forever()
"""


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A policy's folder, and an SGLang that is a script."""
    fields = (
        'class ServerArgs:\n    host: A[str, "of HTTP"] = "127.0.0.1"\n    port: A[int, "of HTTP"] = 30000\n'
        '    nccl_port: A[int | None, "of NCCL"] = None\n    grpc_port: A[int | None, "of gRPC"] = None\n'
    )
    (install(tmp_path, monkeypatch, fields) / "launch_server.py").write_text(LAUNCH_SERVER)
    monkeypatch.setenv("STARTS", str(tmp_path / "starts"))
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 50, "max_position_embeddings": 40}))
    save_file({"weight": torch.zeros(64)}, folder / "model.safetensors")
    return folder


def ports_tried(policy: Path) -> list[str]:
    return (policy.parent / "starts").read_text().split()


def start(config: RolloutConfig, policy: Path) -> sglang_launch.Server:
    return sglang_launch.start(config, policy, None, 32, policy.parent, trainer=None)


def test_a_port_that_was_taken_meanwhile_is_not_the_end(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAKES", "2")
    server = start(PLAIN, policy)
    try:
        tried = ports_tried(policy)
        assert len(set(tried)) == 3 and port_is_taken(int(tried[-1]))
        assert server.client.call("GET", "/health", timeout_s=10).ok
    finally:
        server.client.close()
        assert server.process is not None
        server.process.close()


def test_a_port_that_is_always_taken_is_said(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAKES", "99")
    with pytest.raises(EngineConfigError, match=r"its port \d+, or one .*already in use\): start again, or") as raised:
        start(PLAIN, policy)
    tried = ports_tried(policy)
    assert len(tried) == 3 and f"its port {tried[-1]}, or one that it takes beside it, is taken" in str(raised.value)


def test_a_port_that_the_user_gave_is_tried_once(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAKES", "99")
    port = free_port()
    told = (
        rf"rollout\.sglang\.port = {port}, or one .*already in use\): name another, or leave it out to have a free one"
    )
    with pytest.raises(EngineConfigError, match=told):
        start(replace(PLAIN, sglang={"port": port}), policy)
    assert ports_tried(policy) == [str(port)]


@pytest.mark.parametrize(
    ("flags", "says", "cause"),
    [
        ({}, "Address already in use\ntorch.OutOfMemoryError: CUDA out of memory", "memory ran out"),
        (
            {"nccl_port": 29511},
            "RuntimeError: failed to listen. port: 29511, code: -98, name: EADDRINUSE, message: address already in use",
            "rollout.sglang.nccl_port = 29511 is taken: name another, or leave it out",
        ),
    ],
)
def test_an_end_that_another_port_would_not_mend_is_said_at_once(
    policy: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, int], says: str, cause: str
) -> None:
    monkeypatch.setenv("TAKES", "99")
    monkeypatch.setenv("SAYS", says)
    with pytest.raises(EngineConfigError, match=cause):
        start(replace(PLAIN, sglang=flags), policy)
    assert len(ports_tried(policy)) == 1


def test_a_port_that_a_server_says_is_taken_is_named_as_the_user_gave_it() -> None:
    line = "ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 34939): address already in use"
    mend = "name another, or leave it out to have a free one chosen"
    cause = sglang_launch._cause_of_taken
    assert cause(line, 34939, {"port": 34939}) == f"rollout.sglang.port = 34939 is taken: {mend}"
    assert cause(line, 34939, {}) == (
        f"its port 34939 is taken ({line}): start again, or name a free one as rollout.sglang.port"
    )
    of_nccl = "DistNetworkError: failed to listen. port: 29511, code: -98, name: EADDRINUSE, address already in use"
    assert cause(of_nccl, 34939, {"port": 34939}) == (
        f"rollout.sglang.port = 34939, or one that it takes beside it, is taken ({of_nccl}): {mend}"
    )


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()


@contextmanager
def another_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a healthy server that is not ours, and came there after our look."""
    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        first_look = iter([False])
        monkeypatch.setattr(
            sglang_launch, "port_is_taken", lambda port, host: next(first_look, port_is_taken(port, host))
        )
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_another_server_at_the_port_is_not_taken_for_ours(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAKES", "0")
    with (
        another_server(monkeypatch) as port,
        pytest.raises(EngineConfigError, match=rf"rollout\.sglang\.port = {port}.* is taken"),
    ):
        start(replace(PLAIN, sglang={"port": port}), policy)
    assert ports_tried(policy) == [str(port)]


def test_another_server_at_the_port_is_said_when_ours_never_comes(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (policy.parent / "packages" / "sglang" / "launch_server.py").write_text("import time\ntime.sleep(600)\n")
    config = replace(PLAIN, sglang_start_timeout_s=1.0)
    with another_server(monkeypatch) as port, pytest.raises(EngineError, match=f"another process .* port {port}"):
        start(replace(config, sglang={"port": port}), policy)


@pytest.mark.parametrize(("host", "reached_at"), [("127.0.0.2", "127.0.0.2"), ("0.0.0.0", "127.0.0.1")])
def test_a_server_is_reached_at_the_host_that_the_user_gave(
    policy: Path, monkeypatch: pytest.MonkeyPatch, host: str, reached_at: str
) -> None:
    try:
        socket.create_server((host, 0)).close()
    except OSError:
        pytest.skip(f"this system does not listen on {host}")
    monkeypatch.setenv("TAKES", "0")
    server = start(replace(PLAIN, sglang={"host": host}), policy)
    try:
        assert server.client.address.startswith(f"http://{reached_at}:")
    finally:
        server.client.close()
        assert server.process is not None
        server.process.close()


def test_a_port_that_is_taken_at_the_host_that_the_user_gave_is_said(policy: Path) -> None:
    try:
        listener = socket.create_server(("127.0.0.2", 0))
    except OSError:
        pytest.skip("this system does not listen on 127.0.0.2")
    with listener, pytest.raises(EngineConfigError, match="is taken: name another"):
        start(replace(PLAIN, sglang={"host": "127.0.0.2", "port": listener.getsockname()[1]}), policy)


@pytest.mark.skipif(not server_process._EPHEMERAL_PORTS.exists(), reason="needs Linux")
def test_no_connection_gets_the_port_that_a_server_is_about_to_bind() -> None:
    first, last = map(int, server_process._EPHEMERAL_PORTS.read_text().split())
    if first < 24576:
        pytest.skip(f"this system hands out ports from {first} on")
    for _ in range(50):
        assert not {free_port(), free_port(neighbour=10000) + 10000} & set(range(first, last + 1))


def test_a_port_is_not_free_when_its_neighbour_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        above = listener.getsockname()[1]
        ports = iter([above - 10000, above - 10001])
        monkeypatch.setattr(server_process.random.SystemRandom, "randint", lambda *_: next(ports))
        if port_is_taken(above - 10001) or port_is_taken(above - 1):
            pytest.skip("the next port is taken too")
        assert free_port(neighbour=10000) == above - 10001
