"""A learner whose state is a function of its step, and the processes that save it and die."""

from __future__ import annotations

import errno
import os
import resource
import signal
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from tests.crash_helpers import die_at
from trainer import checkpoint
from trainer.checkpoint import (
    CheckpointError,
    Part,
    latest_checkpoint,
    load_checkpoint,
    per_rank_part,
    rng_part,
    save_checkpoint,
    shared_part,
)


@dataclass
class Learner:
    """A model, its optimizer, and a policy that writes its own files: everything is a function of the step."""

    seed: int = 0
    model: torch.nn.Linear = field(init=False)
    policy: str = ""

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.model = torch.nn.Linear(64, 64)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 64)).square().mean().backward()
        self.optimizer.step()
        self.policy += "x"

    def state(self) -> dict[str, object]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def set_state(self, state: dict[str, object]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def save_policy(self, folder: Path) -> None:
        (folder / "shard_0.txt").write_text(self.policy)
        (folder / "shard_1.txt").write_text(self.policy)

    def load_policy(self, folder: Path) -> None:
        self.policy = (folder / "shard_0.txt").read_text()
        assert self.policy == (folder / "shard_1.txt").read_text()

    def parts(self) -> list[Part]:
        draft = shared_part("draft", self.state, self.set_state, writes=True)
        return [Part("policy", self.save_policy, self.load_policy), draft, rng_part()]


def run_to(learner: Learner, first: int, last: int, directory: Path | None) -> None:
    """Steps first..last, each saved."""
    for step in range(first, last + 1):
        learner.step()
        if directory:
            save_checkpoint(directory, step, learner.parts(), {"data_position": 10 * step})


def weights_bits(learner: Learner) -> bytes:
    return learner.model.weight.detach().numpy().tobytes()


def load_whole(folder: Path) -> tuple[Learner, int]:
    """A fresh learner from one checkpoint, which must be whole and of one step."""
    learner = Learner(seed=99)
    step, counters = load_checkpoint(folder, learner.parts())
    assert folder.name == f"step_{step:06d}" and counters == {"data_position": 10 * step}
    assert learner.policy == "x" * step
    return learner, step


def loaded(directory: Path) -> tuple[Learner, int]:
    newest = latest_checkpoint(directory)
    assert newest is not None
    return load_whole(newest)


def disk_full(folder: Path) -> None:
    (folder / "half").write_text("x")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def save_in_place(step_folder: Path) -> Path:
    """What `begin_folder` would be without writing aside."""
    step_folder.mkdir()
    return step_folder


# --- what the child processes run -----------------------------------------------------------------------------------


def save_step_3_and_die(directory: Path, call: int, in_place: bool) -> None:
    learner, step = loaded(directory)
    if in_place:
        checkpoint.ASIDE = ""
        checkpoint.begin_folder = save_in_place
        checkpoint.finish_folder = lambda aside, final: None
    die_at(call)
    run_to(learner, step + 1, 3, directory)


def run_on(directory: Path) -> None:
    learner, step = loaded(directory)
    run_to(learner, step + 1, step + 100_000, directory)


def save_step_2_with_little_room(directory: Path, message: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    learner, _ = loaded(directory)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        save_checkpoint(directory, 2, learner.parts(), {})
    except CheckpointError as error:
        message.write_text(str(error))


def save_load_and_fail_as_rank(rank: int, store: Path, directory: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2)
    own = {"value": torch.tensor(rank)}
    parts = [
        per_rank_part("own", lambda: own, own.update),
        shared_part("shared", lambda: {"from": rank}, own.update, writes=rank == 1, reads=rank == 0),
    ]
    folder = save_checkpoint(directory, 1, parts, {})
    own["value"] = torch.tensor(-1)
    load_checkpoint(folder, parts)
    assert own["value"].item() == rank
    assert own.get("from") == (1 if rank == 0 else None)

    def full_on_rank_1(folder: Path) -> None:
        if rank == 1:
            disk_full(folder)

    try:
        save_checkpoint(directory, 2, [Part("controller", full_on_rank_1, full_on_rank_1)], {})
    except CheckpointError as error:
        (directory / f"rank_{rank}_error").write_text(str(error))
    dist.destroy_process_group()
