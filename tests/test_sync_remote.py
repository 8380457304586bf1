"""Into an engine in another process: one version of policy and draft, or the old one, and a verdict either way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sync.plan import SyncError
from sync.publish import publish
from sync.remote import KINDS, connect
from tests.sync_engine_helpers import (
    EngineProcess,
    assert_holds,
    checkpoint,
    engine_process,
    make_draft,
    make_policy,
)

ROLES = ("policy", "draft")


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    with engine_process() as running:
        yield running


@pytest.fixture
def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    policy = make_policy()
    return policy, make_draft(policy)


def assert_engine_holds(engine: EngineProcess, models: tuple[torch.nn.Module, torch.nn.Module], seed: int) -> None:
    policy, draft = models
    draft_state, policy_state = engine.weights()
    policy.load_state_dict(policy_state)
    draft.load_state_dict(draft_state)
    assert_holds(policy, checkpoint(policy, seed))
    assert_holds(draft, checkpoint(draft, seed + 1000))


def publish_seed(transport: object, models: tuple[torch.nn.Module, torch.nn.Module], seed: int, version: int) -> None:
    policy, draft = models
    publish(checkpoint(policy, seed), checkpoint(draft, seed + 1000), transport, version)


@pytest.mark.parametrize("kind", KINDS)
def test_versions_arrive_bitwise_one_after_another(
    kind: str, engine: EngineProcess, models: tuple[torch.nn.Module, torch.nn.Module], tmp_path: Path
) -> None:
    transport = connect(kind, engine.deliver, ROLES, tmp_path, host="127.0.0.1")
    assert (transport.version, transport.dirty) == (-1, True)
    for version in (1, 2, 5):
        publish_seed(transport, models, seed=version, version=version)
        assert (transport.version, transport.dirty) == (version, False)
        assert_engine_holds(engine, models, version)
    transport.close()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [], "nothing is left behind"


@pytest.mark.parametrize("kind", KINDS)
def test_another_attach_forgets_the_version(
    kind: str, engine: EngineProcess, models: tuple[torch.nn.Module, torch.nn.Module], tmp_path: Path
) -> None:
    transport = connect(kind, engine.deliver, ROLES, tmp_path, host="127.0.0.1")
    publish_seed(transport, models, seed=7, version=7)
    transport.attach()
    assert (transport.version, transport.dirty) == (-1, True)
    publish_seed(transport, models, seed=8, version=7)
    assert_engine_holds(engine, models, 8)
    transport.close()
