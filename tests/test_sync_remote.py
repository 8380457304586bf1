"""Into an engine in another process: one version of policy and draft, or the old one, and a verdict either way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sync import collective
from sync.ipc import IpcCarrier
from sync.plan import SyncError, make_plan
from sync.publish import publish
from sync.receiver import Bundle
from sync.remote import KINDS, connect
from tests.sync_engine_helpers import (
    EngineProcess,
    Models,
    assert_engine_holds,
    checkpoint,
    engine_process,
    flip_a_bit_after,
    make_draft,
    make_policy,
    publish_seed,
)

ROLES = ("policy", "draft")


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    with engine_process() as running:
        yield running


@pytest.fixture
def models() -> Models:
    policy = make_policy()
    return policy, make_draft(policy)


@pytest.mark.parametrize("kind", KINDS)
def test_versions_arrive_bitwise_one_after_another(
    kind: str, engine: EngineProcess, models: Models, tmp_path: Path
) -> None:
    transport = connect(kind, engine.deliver, ROLES, tmp_path, host="127.0.0.1")
    assert (transport.version, transport.dirty) == (-1, True)
    mapped = set()
    for version in (1, 2, 5):
        publish_seed(transport, models, seed=version, version=version)
        assert (transport.version, transport.dirty) == (version, False)
        assert_engine_holds(engine, models, version)
        mapped.add(engine.mapped())
    assert len(mapped) == 1, "what was mapped for the first version serves the next"
    transport.close()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [], "nothing is left behind"


@pytest.mark.parametrize("kind", KINDS)
def test_another_attach_forgets_the_version(kind: str, engine: EngineProcess, models: Models, tmp_path: Path) -> None:
    transport = connect(kind, engine.deliver, ROLES, tmp_path, host="127.0.0.1")
    publish_seed(transport, models, seed=7, version=7)
    transport.attach()
    assert (transport.version, transport.dirty) == (-1, True)
    publish_seed(transport, models, seed=8, version=7)
    assert_engine_holds(engine, models, 8)
    transport.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_version_leaves_the_old_one_and_the_next_arrives(
    kind: str, engine: EngineProcess, models: Models, tmp_path: Path
) -> None:
    transport = connect(kind, engine.deliver, ROLES, tmp_path, host="127.0.0.1")
    publish_seed(transport, models, seed=3, version=3)
    policy, draft = checkpoint(models[0], 4), checkpoint(models[1], 1004)
    with pytest.raises(SyncError, match=r"draft\.d2t is not the engine's.*; version 3 serves on"):
        publish(policy, draft | {"d2t": draft["d2t"] + 1}, transport, 4)
    assert (transport.version, transport.dirty) == (3, False)
    assert_engine_holds(engine, models, 3)
    publish_seed(transport, models, seed=5, version=5)
    assert_engine_holds(engine, models, 5)
    transport.close()


@pytest.mark.parametrize("kind", ["ipc", "broadcast"])
def test_bytes_that_change_on_the_way_are_refused_by_name(
    kind: str, engine: EngineProcess, models: Models, tmp_path: Path
) -> None:
    transport = connect(kind, engine.deliver, ROLES, tmp_path, host="127.0.0.1")
    publish_seed(transport, models, seed=3, version=3)
    transport._carrier.put = flip_a_bit_after(transport._carrier.put, lambda: transport._carrier.buckets[0])
    first = transport.plan.tensors[0].full_name
    with pytest.raises(SyncError, match=f"{first} was changed on the way .*; version 3 serves on"):
        publish_seed(transport, models, seed=4, version=4)
    assert_engine_holds(engine, models, 3)
    transport.close()


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_message_that_got_lost_the_next_version_arrives(
    kind: str, engine: EngineProcess, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By broadcast the trainer's bytes may be under way already: whoever reads them next must not take them."""
    monkeypatch.setattr(collective, "_GRACE_S", 0.1)
    transport = connect(kind, engine.deliver, ROLES, tmp_path, host="127.0.0.1")
    transport._carrier._timeout_s = 3.0
    publish_seed(transport, models, seed=3, version=3)
    transport._deliver = lambda payload: None
    with pytest.raises(SyncError, match="gave no verdict"):
        publish_seed(transport, models, seed=4, version=4)
    assert transport.dirty
    transport._deliver = engine.deliver
    publish_seed(transport, models, seed=5, version=5)
    assert_engine_holds(engine, models, 5)
    transport.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_engine_is_an_error_for_whoever_sends(kind: str, models: Models, tmp_path: Path) -> None:
    with engine_process() as mortal:
        transport = connect(kind, mortal.deliver, ROLES, tmp_path, host="127.0.0.1")
        transport._carrier._timeout_s = 2.0  # a broadcast without an engine ends by this
        mortal.kill()
        with pytest.raises(SyncError, match="the engine is dead"):
            publish_seed(transport, models, seed=1, version=1)
        assert transport.dirty
        transport.close()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_unknown_transport_is_named(tmp_path: Path) -> None:
    with pytest.raises(SyncError, match=r"sync_transport is 'pigeon': choose one of ipc, disk, broadcast"):
        connect("pigeon", lambda payload: None, ROLES, tmp_path)


def test_a_gpu_without_room_for_the_buckets_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*size: int, **kwargs: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    carrier = IpcCarrier(make_plan({"policy.w": torch.zeros(2)}))
    monkeypatch.setattr("sync.ipc.common_device", lambda tensors: torch.device("cuda:0"))
    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(SyncError, match=r"cuda:0: no room for the \d+ bytes of a sync"):
        carrier.put(Bundle(0, "", {}, {}))
