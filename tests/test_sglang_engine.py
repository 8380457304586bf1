"""The engine over a server that follows a script; the real one is driven in tests/sglang (CPU) and tests/gpu."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollout_engine import sglang_engine
from rollout_engine.config import RolloutConfig
from rollout_engine.server_process import free_port
from rollout_engine.sglang_engine import SGLangEngine
from rollout_engine.types import (
    BadRequest,
    EngineConfigError,
    EngineError,
    FinishReason,
    RolloutRequest,
    SamplingParams,
    VersionSpan,
)
from sync.plan import SyncError, SyncPlan
from tests.sglang_server_helpers import ScriptedServer

PLAIN = RolloutConfig(engine="sglang", speculative_algorithm="NONE", max_running_requests=128)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"vocab_size": 50, "max_position_embeddings": 40, "eos_token_id": 48})
    )
    return folder


@pytest.fixture
def make_engine(server: ScriptedServer, policy: Path, tmp_path: Path) -> Iterator[Callable[[], SGLangEngine]]:
    config = replace(PLAIN, sglang_address=server.address, sync_dir=str(tmp_path / "sync"), max_running_requests=2)
    server.info["model_path"] = str(policy)
    with ExitStack() as stack:

        def make() -> SGLangEngine:
            engine = SGLangEngine(policy, config, eos_token_ids=(49,), work_dir=tmp_path / "work")
            stack.callback(engine.close)
            return engine

        yield make


@pytest.fixture
def engine(make_engine: Callable[[], SGLangEngine]) -> SGLangEngine:
    return make_engine()


def requests(num_requests: int, **sampling: Any) -> list[RolloutRequest]:
    params = SamplingParams(**({"max_new_tokens": 4} | sampling))
    return [RolloutRequest(0, i, (1, 2, i), params) for i in range(num_requests)]


def test_nothing_is_served_before_the_first_sync(engine: SGLangEngine, server: ScriptedServer) -> None:
    with pytest.raises(EngineError, match="publish a version first"):
        engine.generate(requests(1))
    server.publish(engine, 0)
    (sample,) = engine.generate(requests(1))
    assert sample.token_ids == server.tokens_after((1, 2, 0), 4)
    assert sample.policy_versions == (VersionSpan(0, 4, 0),)


def test_max_new_tokens_is_cut_to_the_context(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 0)
    (sample,) = engine.generate(requests(1, max_new_tokens=1000))
    assert len(sample.token_ids) == 37 and sample.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (RolloutRequest(3, 4, (1, 50)), r"\(prompt 3, sample 4\): a prompt token is outside the vocabulary of 50"),
        (RolloutRequest(3, 4, (-1,)), "outside the vocabulary"),
        (RolloutRequest(3, 4, ()), "the prompt is empty"),
        (RolloutRequest(3, 4, (1,) * 40), "no room in a context of 40"),
        (RolloutRequest(3, 4, (1,), SamplingParams(stop=("x",))), "stop strings need"),
        (RolloutRequest(3, 4, (1,), SamplingParams(0.7, top_k=1)), r"sample 4\): top_k = 1 at temperature 0\.7"),
    ],
)
def test_bad_requests_never_reach_the_server(
    engine: SGLangEngine, server: ScriptedServer, request_: RolloutRequest, message: str
) -> None:
    server.publish(engine, 0)
    with pytest.raises(BadRequest, match=message):
        engine.generate([request_])
    assert server.num_generate == 0


def test_a_sync_in_mid_generate_loses_nothing(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 0)
    server.pause_after = 2  # tokens: a request then runs on until it is interrupted
    server.finishes_first = 1
    samples = engine.generate(requests(5))
    found = [next(samples)]
    server.wait_until_paused()
    server.pause_after = None
    server.publish(engine, 1)
    found += samples
    assert {sample.request.sample_id for sample in found} == set(range(5)) and len(found) == 5
    spans = {sample.policy_versions for sample in found}
    assert spans == {(VersionSpan(0, 4, 0),), (VersionSpan(0, 2, 0), VersionSpan(2, 4, 1)), (VersionSpan(0, 4, 1),)}
    for sample in found:
        assert sample.token_ids == server.tokens_after(sample.request.prompt_ids, 4)
    assert server.running_at_update == 0 and server.flushes_after_update == [True, True]


@pytest.mark.parametrize(
    ("last_step", "kept", "reason"),
    [
        ((49,), (49,), FinishReason.STOP),
        ((48, 49, 7), (48,), FinishReason.STOP),  # a stop id of the policy's files
        ((8, 9), (8, 9), FinishReason.LENGTH),
        ((8, 9, 10, 49), (8, 9), FinishReason.LENGTH),  # a verify step behind the limit, the end token too
    ],
)
@pytest.mark.parametrize("by_abort", [False, True])
def test_one_that_ends_in_the_step_of_its_interruption_has_ended(
    engine: SGLangEngine,
    server: ScriptedServer,
    last_step: tuple[int, ...],
    kept: tuple[int, ...],
    reason: FinishReason,
    by_abort: bool,
) -> None:
    server.publish(engine, 0)
    server.pause_after, server.finishes_first, server.last_step = 2, 1, last_step
    samples = engine.generate(requests(2))
    next(samples)
    server.wait_until_paused(1)
    server.pause_after = None
    if by_abort:
        engine.abort()
    else:
        server.publish(engine, 1)
    (sample,) = samples
    assert sample.token_ids == server.tokens_after(sample.request.prompt_ids, 2) + kept
    assert len(sample.logprobs) == len(sample.token_ids) and sample.finish_reason is reason
    assert sample.policy_versions == (VersionSpan(0, len(sample.token_ids), 0),)
    assert server.num_generate == 2, "not sent again"


@pytest.mark.parametrize("moment", ["before", "update", "flush"])
def test_a_sync_stops_what_others_have_sent(engine: SGLangEngine, server: ScriptedServer, moment: str) -> None:
    """Weights wait for every request, and so does the flush behind them; nothing of ours runs."""
    server.publish(engine, 0)
    if moment == "before":
        server.other_comes()
    server.others_come_at = {moment}
    server.publish(engine, 1)
    assert server.num_running == 0 and server.flushes_after_update == [True, True]
    assert server.running_at_update == 0, "what came before was stopped before"
    (sample,) = engine.generate(requests(1))
    assert sample.policy_versions == (VersionSpan(0, 4, 1),)


def test_a_refused_sync_leaves_the_old_version_serving(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 3)
    server.refuses = "policy.w was changed on the way"
    with pytest.raises(SyncError, match=r"policy\.w was changed"):
        server.publish(engine, 4)
    (sample,) = engine.generate(requests(1))
    assert sample.policy_versions == (VersionSpan(0, 4, 3),)


BEGIN, UPDATE, END = (
    ("/begin_weight_update", "all"),
    ("/update_weights_from_tensor", "all"),
    ("/end_weight_update", None),
)


@pytest.mark.parametrize(
    ("version", "describes_routes", "has_sessions", "calls"),
    [
        ("0.5.20", False, True, [("/update_weights_from_tensor", None)]),
        ("0.5.23", False, True, [BEGIN, UPDATE, END]),
        ("0.5.22", True, True, [BEGIN, UPDATE, END]),
        ("0.5.23", True, False, [("/update_weights_from_tensor", None)]),
    ],
)
def test_an_update_is_begun_and_ended_where_the_server_asks_for_it(
    server: ScriptedServer,
    make_engine: Callable[[], SGLangEngine],
    version: str,
    describes_routes: bool,
    has_sessions: bool,
    calls: list[tuple[str, str | None]],
) -> None:
    server.info["version"], server.describes_routes = version, describes_routes
    if has_sessions:
        server.update_routes += ("begin_weight_update", "end_weight_update")
    engine = make_engine()
    server.publish(engine, 0)
    assert server.update_calls == calls * 2, "to attach, and to apply"


def test_an_update_that_failed_is_ended_too(server: ScriptedServer, make_engine: Callable[[], SGLangEngine]) -> None:
    server.info["version"] = "0.5.23"
    engine = make_engine()
    server.publish(engine, 0)
    server.update_calls.clear()
    server.fails_update = True
    with pytest.raises(SyncError, match="refused /update_weights_from_tensor: HTTP 400: no"):
        server.publish(engine, 1)
    assert server.update_calls == [BEGIN, UPDATE, END]
    server.fails_update = False
    server.publish(engine, 2)
    assert len(list(engine.generate(requests(1)))) == 1


def test_a_broken_sync_stops_serving_until_a_whole_one(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 3)
    server.refuses, server.leaves_dirty = "broke off", True
    with pytest.raises(SyncError, match="broke off"):
        server.publish(engine, 4)
    with pytest.raises(EngineError, match=r"serves nothing.*broke off"):
        engine.generate(requests(1))
    server.refuses, server.leaves_dirty = None, False
    server.publish(engine, 5)
    (sample,) = engine.generate(requests(1))
    assert sample.policy_versions == (VersionSpan(0, 4, 5),)


def test_requests_that_wait_for_broken_weights_are_told(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 0)
    server.pause_after, server.finishes_first = 2, 1
    samples = engine.generate(requests(4))
    next(samples)
    server.wait_until_paused()
    server.refuses, server.leaves_dirty = "broke off", True
    with pytest.raises(SyncError):
        server.publish(engine, 1)
    with pytest.raises(EngineError, match="requests wait"):
        for _ in samples:
            pass


def test_abort_keeps_partial_results(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 0)
    server.pause_after, server.finishes_first = 2, 1
    samples = engine.generate(requests(4))
    found = [next(samples)]
    server.wait_until_paused()
    engine.abort()
    found += samples
    assert sorted(len(sample.token_ids) for sample in found) == [0, 2, 2, 4]
    assert [sample.finish_reason for sample in found].count(FinishReason.ABORT) == 3


def test_an_abandoned_iterator_stops_what_runs(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 0)
    server.pause_after, server.finishes_first = 2, 1
    samples = engine.generate(requests(4))
    next(samples)
    server.wait_until_paused()
    samples.close()
    assert server.num_running == 0
    server.pause_after = None
    assert len(list(engine.generate(requests(2)))) == 2


def test_an_abandoned_iterator_leaves_no_call_open(
    engine: SGLangEngine, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a server that does not stop in time, as one that compiles: the next requests would run beside the old ones."""
    monkeypatch.setattr("rollout_engine.request_pool._DROP_TIMEOUT_S", 0.0)
    server.publish(engine, 0)
    server.pause_after, server.finishes_first, server.ignores_aborts = 2, 1, True
    samples = engine.generate(requests(4))
    next(samples)
    server.wait_until_paused()
    samples.close()
    server.wait_until_idle()


def test_one_generate_at_a_time(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 0)
    samples = engine.generate(requests(2))
    next(samples)
    with pytest.raises(EngineError, match="another generate"):
        engine.generate(requests(1))
    samples.close()


def test_a_request_that_the_server_refuses_is_named(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 0)
    server.fails_with = (400, {"error": {"message": "too odd"}})
    with pytest.raises(EngineError, match=r"request \(prompt 0, sample 0\): .*refused it: HTTP 400: too odd"):
        list(engine.generate(requests(1)))


def test_a_server_that_goes_away_is_told(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 0)
    server.pause_after, server.finishes_first = 2, 1
    samples = engine.generate(requests(3))
    next(samples)
    server.wait_until_paused()
    server.close()
    with pytest.raises(EngineError, match="does not answer"):
        list(samples)
    with pytest.raises(SyncError, match="could not be handed new weights"):
        server.publish(engine, 1)


def test_a_server_that_hangs_is_given_up(
    engine: SGLangEngine, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_engine, "_ASK_AFTER_S", 0.0)
    monkeypatch.setattr(sglang_engine, "_LOST_AFTER_S", 0.2)
    server.publish(engine, 0)
    server.pause_after, server.is_healthy = 2, False
    with pytest.raises(EngineError, match="does not answer: no result and no healthy answer"):
        list(engine.generate(requests(2)))


def test_a_server_that_is_at_work_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s, asked = 0.0, 0
    monkeypatch.setattr(sglang_engine, "monotonic", lambda: clock_s)

    def is_healthy() -> bool:
        nonlocal asked
        asked += 1
        return clock_s < 5000.0

    silence = sglang_engine._Silence()
    while not silence.is_too_long(is_healthy):
        clock_s += 10.0
    assert 5550.0 <= clock_s <= 5610.0, "ten minutes after the last healthy answer"
    assert asked == clock_s // 60.0, "once a minute"


def test_a_sync_into_a_server_that_hangs_fails(
    engine: SGLangEngine, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.publish(engine, 0)
    server.pause_after, server.finishes_first, server.ignores_aborts = 2, 1, True
    samples = engine.generate(requests(3))
    next(samples)
    server.wait_until_paused()
    monkeypatch.setattr(engine._pool, "_hold_timeout_s", 0.3)
    with pytest.raises(SyncError, match=r"2 requests still run .*the server hangs"):
        server.publish(engine, 1)
    server.ignores_aborts = False
    with pytest.raises(EngineError, match="requests wait for an engine that serves nothing"):
        list(samples)


@pytest.mark.parametrize("when", ["handed over", "judged"])
def test_an_interrupted_sync_says_why_nothing_is_served(
    engine: SGLangEngine, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    server.publish(engine, 0)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if when == "handed over":
            patch.setattr(engine, "_control", interrupt)
        else:
            patch.setattr("sync.wire.Verdict.decode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            server.publish(engine, 1)
    with pytest.raises(EngineError, match=r"serves nothing: the last sync was interrupted \(KeyboardInterrupt\)"):
        engine.generate(requests(1))
    server.publish(engine, 2)
    assert len(list(engine.generate(requests(1)))) == 1


def test_the_address_for_a_broadcast_is_passed_on(
    engine: SGLangEngine, server: ScriptedServer, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(engine._config, sync_transport="broadcast", sync_host="10.1.2.3")
    hosts = []

    def carrier(plan: SyncPlan, host: str) -> None:
        hosts.append(host)

    monkeypatch.setattr("sync.remote.BroadcastCarrier", carrier)
    other = SGLangEngine(policy, config, work_dir=policy.parent / "other")
    assert other.transport.plan.by_name.keys() == {"policy.w"} and hosts == ["10.1.2.3"]
    other.close()


def test_two_engines_share_no_request_ids(engine: SGLangEngine, server: ScriptedServer, policy: Path) -> None:
    other = SGLangEngine(policy, engine._config, eos_token_ids=(49,), work_dir=policy.parent / "other")
    for each in (engine, other):
        server.publish(each, 0)
        list(each.generate(requests(2)))
    other.close()
    prefixes = [body["rid"].rpartition("-")[0] for body in server.bodies]
    assert prefixes[0] == prefixes[1] != prefixes[2] == prefixes[3]


def test_warm_up_fills_the_batch_and_forgets_it(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 0)
    num_flushes = server.num_flushes
    engine.warm_up()
    assert server.num_generate == 2 and server.num_flushes > num_flushes


def test_offload_is_remembered_until_a_sync(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 0)
    engine.offload()
    with pytest.raises(EngineError, match="onload"):
        engine.generate(requests(1))
    engine.onload()
    with pytest.raises(EngineError, match="not filled yet"):
        engine.generate(requests(1))
    server.refuses = "refused"
    with pytest.raises(SyncError):
        server.publish(engine, 1)
    with pytest.raises(EngineError, match="serves nothing"):  # the old version is gone with its memory
        engine.generate(requests(1))
    server.refuses = None
    server.publish(engine, 2)
    assert len(list(engine.generate(requests(1)))) == 1
    assert server.memory_calls == [], "without rollout.offload the server keeps its memory"


def test_memory_is_released_and_taken_again_in_order(server: ScriptedServer, policy: Path, tmp_path: Path) -> None:
    config = replace(PLAIN, sglang_address=server.address, sync_dir=str(tmp_path / "sync"), offload=True)
    server.info |= {"model_path": str(policy), "enable_memory_saver": True}
    engine = SGLangEngine(policy, config, eos_token_ids=(49,), work_dir=tmp_path / "work")
    server.publish(engine, 0)
    engine.offload()
    engine.onload()
    server.publish(engine, 1)
    engine.close()
    assert server.memory_calls == [
        ("release", ["kv_cache", "weights"]),
        ("resume", ["weights"]),
        ("update", []),
        ("resume", ["kv_cache"]),
    ]


def test_a_server_elsewhere_is_left_running(engine: SGLangEngine, server: ScriptedServer) -> None:
    engine.close()
    engine.close()
    assert server.is_up


def test_it_cannot_decode_plainly_beside_and_has_no_state(engine: SGLangEngine) -> None:
    with pytest.raises(EngineConfigError, match="plain_probe_interval = 0"):
        engine.without_speculation()
    assert engine.state() == {}


def test_an_address_without_a_server_is_one_line(policy: Path, tmp_path: Path) -> None:
    config = replace(PLAIN, sglang_address=f"http://127.0.0.1:{free_port()}", sync_dir=str(tmp_path))
    with pytest.raises(EngineConfigError, match="no SGLang server answers"):
        SGLangEngine(policy, config, work_dir=tmp_path / "work")


def test_a_working_folder_named_relative_to_here_is_the_same_one_everywhere(
    server: ScriptedServer, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server.info["model_path"] = str(policy)
    config = replace(PLAIN, sglang_address=server.address, max_running_requests=2)
    with closing(SGLangEngine(policy, config, work_dir=Path("runs") / "engine")) as engine:
        monkeypatch.chdir("/")
        server.publish(engine, 0)
    names = {path.name for path in (tmp_path / "runs" / "engine").iterdir()}
    assert "exchange" in names
    assert not names & {"sync", "sglang", "torch"}, "the server runs there: such a folder hides the package"


def test_an_interrupted_end_closes_the_connections_still(engine: SGLangEngine) -> None:
    class Interrupted:
        def close(self) -> None:
            raise KeyboardInterrupt

    engine._process = Interrupted()  # type: ignore[assignment]
    client = engine._client
    with pytest.raises(KeyboardInterrupt):
        engine.close()
    assert client._session.closed
