"""Ctrl-C waits for a safe moment, is not lost where Python drops exceptions, and leaves no rank behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from sync.publish import publish
from tests import loop_helpers as helpers
from tests.policy_helpers import run_ranks
from trainer import loop
from trainer.collective import RemoteError, from_rank_zero
from trainer.interrupt import deferred_interrupts


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """A shell starts what runs in the background with Ctrl-C ignored, and tests may be run like that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def after(action: Callable[[], None], done: list[str]) -> None:
    action()
    done.append("went on")


def test_it_waits_for_the_first_rank_to_act_alone() -> None:
    done: list[str] = []
    with deferred_interrupts():
        after(ctrl_c, done)
        with pytest.raises(KeyboardInterrupt):
            from_rank_zero(lambda: done.append("acted"))
    assert done == ["went on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    from_rank_zero(lambda: done.append("acted"))  # a run after it in the same process
    assert done == ["went on", "acted"]


def test_waiting_for_samples_ends_at_once() -> None:
    done: list[str] = []
    with deferred_interrupts(), pytest.raises(KeyboardInterrupt):
        from_rank_zero(lambda: after(ctrl_c, done))
    assert not done


def test_the_second_one_is_raised_at_once() -> None:
    done: list[str] = []
    with deferred_interrupts():
        after(ctrl_c, done)
        with pytest.raises(KeyboardInterrupt):
            after(ctrl_c, done)
    assert done == ["went on"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_dropped_by_a_callback_of_a_fork_is_not_lost() -> None:
    forks = [ctrl_c]
    os.register_at_fork(before=lambda: forks.pop()() if forks else None)
    with deferred_interrupts():
        child = from_rank_zero(os.fork)  # the callback is interrupted while rank 0 acts alone
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        assert not forks
        with pytest.raises(KeyboardInterrupt):
            from_rank_zero(lambda: None)


def test_a_handler_of_the_callers_stays() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with deferred_interrupts():
            ctrl_c()
        assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_finishes_the_policys_update_and_syncs_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = helpers.make_tiny_model(tmp_path / "tiny")
    done: list[str] = []
    update = loop.update_policy

    def interrupted(*arguments: object) -> object:
        ctrl_c()
        found = update(*arguments)
        done.append("updated")
        return found

    monkeypatch.setattr(loop, "update_policy", interrupted)
    monkeypatch.setattr(loop, "publish", lambda *arguments: (done.append("synced"), publish(*arguments))[1])
    with pytest.raises(KeyboardInterrupt):
        helpers.run(helpers.tiny_config(model, tmp_path / "runs", "interrupted", num_rollout=1))
    assert done == ["synced", "updated"]


def check_ranks() -> None:
    with deferred_interrupts():
        if dist.get_rank() == 0:
            ctrl_c()
        dist.barrier()
        with pytest.raises(KeyboardInterrupt if dist.get_rank() == 0 else RemoteError, match="stopped by Ctrl-C"):
            from_rank_zero(lambda: None)


def test_no_rank_waits_for_an_interrupted_one() -> None:
    run_ranks(2, check_ranks)
