"""A checkpoint is whole or absent: whatever point the run dies at, the one before still loads."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sync import atomic
from tests.checkpoint_helpers import (
    Learner,
    disk_full,
    load_whole,
    loaded,
    run_on,
    run_to,
    save_load_and_fail_as_rank,
    save_step_2_with_little_room,
    save_step_3_and_die,
    weights_bits,
)
from tests.crash_helpers import KILLED, die_at, exit_code, start
from trainer import checkpoint
from trainer.checkpoint import (
    CheckpointError,
    Part,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    rng_part,
    save_checkpoint,
)

# --- round trip -----------------------------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    unbroken = Learner()
    run_to(unbroken, 1, 6, None)
    broken = Learner()
    run_to(broken, 1, 3, tmp_path)
    run_to(broken, 4, 5, None)  # lost
    resumed, step = loaded(tmp_path)
    assert step == 3
    run_to(resumed, 4, 6, None)
    assert weights_bits(resumed) == weights_bits(unbroken)


@pytest.mark.parametrize("left_out", ["draft", "rng"])
def test_without_any_one_part_it_does_not(tmp_path: Path, left_out: str) -> None:
    """Negative control: the comparison above depends on optimizer and generator state."""
    unbroken = Learner()
    run_to(unbroken, 1, 4, None)
    run_to(Learner(), 1, 3, tmp_path)
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    resumed = Learner()
    load_checkpoint(newest, [part for part in resumed.parts() if part.name != left_out])
    run_to(resumed, 4, 4, None)
    assert weights_bits(resumed) != weights_bits(unbroken)


def test_every_generator_continues(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.random(), np.random.rand(), float(np.random.randn()), torch.rand(()).item()

    draw()  # leaves numpy with a cached gaussian
    save_checkpoint(tmp_path, 1, [rng_part()], {})
    expected = draw()
    draw()
    load_checkpoint(tmp_path / "step_000001", [rng_part()])
    assert draw() == expected


def test_only_the_last_ones_stay_and_a_step_can_be_saved_again(tmp_path: Path) -> None:
    learner = Learner()
    run_to(learner, 1, 4, tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000003", "step_000004"]
    save_checkpoint(tmp_path, 4, learner.parts(), {"data_position": 40})
    assert loaded(tmp_path)[1] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000003", "step_000004"], "nothing left aside"


def test_steps_are_ordered_by_number(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 2):
        save_checkpoint(tmp_path, step, [], {}, keep_last=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000002", "step_999999", "step_1000000"]
    assert latest_checkpoint(tmp_path / "nowhere") is None


# --- dying ----------------------------------------------------------------------------------------------------------


def _kills_until_it_survives(directory: Path, in_place: bool) -> list[int]:
    """Save step 3 over and over, dying one call later each time; the step that loads after each death."""
    steps: list[int] = []
    for call in range(200):
        code = exit_code(save_step_3_and_die, directory, call, in_place)
        steps.append([load_whole(folder)[1] for folder in list_checkpoints(directory)][-1])
        if code == 0:
            return steps
        assert code == KILLED
        if steps[-1] == 3:  # renamed already: begin again from before it
            shutil.rmtree(directory / "step_000003")
            run_to(Learner(), 1, 2, directory)
    raise AssertionError("never survived")


def test_kill_at_every_step_of_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    run_to(Learner(), 1, 2, tmp_path)
    steps = _kills_until_it_survives(tmp_path, in_place=False)
    assert set(steps) == {2, 3} and len(steps) > 15, steps
    assert steps == sorted(steps), "once step 3 is there it stays"


def test_without_the_rename_a_kill_would_leave_a_partial_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the same deaths, the folder written in place and believed when it is there."""
    run_to(Learner(), 1, 2, tmp_path)
    monkeypatch.setattr(checkpoint, "_is_complete", lambda folder: folder.name.startswith("step_"))
    with pytest.raises(CheckpointError, match="step_000003 cannot be loaded"):
        _kills_until_it_survives(tmp_path, in_place=True)


def test_kill_at_random_times(tmp_path: Path) -> None:
    run_to(Learner(), 1, 1, tmp_path)
    generator = random.Random(0)
    reached = 1
    for _ in range(6):
        process = start(run_on, tmp_path)
        time.sleep(generator.uniform(0.05, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == KILLED
        resumed, step = loaded(tmp_path)
        assert step >= reached
        reached = step
    unbroken = Learner()
    run_to(unbroken, 1, reached, None)
    assert weights_bits(resumed) == weights_bits(unbroken), "six deaths and resumes later"


# --- full disk and damage -------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_previous_one_and_says_so_in_one_line(tmp_path: Path) -> None:
    learner = Learner()
    run_to(learner, 1, 2, tmp_path)
    parts = [*learner.parts(), Part("controller", disk_full, disk_full)]
    with pytest.raises(CheckpointError) as error:
        save_checkpoint(tmp_path, 3, parts, {})
    message = str(error.value)
    assert "step_000003 not written (controller): " in message and "No space left on device" in message
    assert "step_000002 stays valid" in message and "--resume" in message and "\n" not in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000002"], "its room is given back"
    assert loaded(tmp_path)[1] == 2


def test_a_file_that_may_not_grow_is_such_a_failure_too(tmp_path: Path) -> None:
    """torch.save meeting a real refusal of the operating system, in the middle of a file."""
    run_to(Learner(), 1, 1, tmp_path)
    message = tmp_path / "message"
    assert exit_code(save_step_2_with_little_room, tmp_path, message) == 0
    assert "step_000002 not written (draft): " in message.read_text() and "\n" not in message.read_text()
    assert loaded(tmp_path)[1] == 1


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="step_000001 not written"):
        save_checkpoint(tmp_path / "checkpoints", 1, [], {})


def test_damage_is_found_before_any_state_is_set(tmp_path: Path) -> None:
    learner = Learner()
    run_to(learner, 1, 1, tmp_path)
    folder = tmp_path / "step_000001"
    before = weights_bits(learner)
    learner.step()
    after = weights_bits(learner)
    state = folder / "draft" / "state.pt"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"draft/state\.pt should have \d+ bytes, found \d+; remove the folder"):
        load_checkpoint(folder, learner.parts())
    assert weights_bits(learner) == after != before and learner.policy == "xx"
    state.unlink()
    with pytest.raises(CheckpointError, match=r"draft/state\.pt should have \d+ bytes, found no file"):
        load_checkpoint(folder, learner.parts())
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="step_000001 cannot be loaded"):
        load_checkpoint(folder, learner.parts())


def test_a_part_that_was_not_saved_is_named(tmp_path: Path) -> None:
    learner = Learner()
    save_checkpoint(tmp_path, 1, learner.parts()[:1], {})
    with pytest.raises(CheckpointError, match=r"it holds no draft \(only policy\)"):
        load_checkpoint(tmp_path / "step_000001", learner.parts())


def test_a_state_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    run_to(Learner(), 1, 1, tmp_path)
    other = Learner()
    other.model = torch.nn.Linear(64, 32)
    with pytest.raises(CheckpointError, match=r"cannot be loaded \(draft\): .*size mismatch") as error:
        load_checkpoint(tmp_path / "step_000001", other.parts())
    assert "\n" not in str(error.value)


# --- several ranks --------------------------------------------------------------------------------------------------


def test_two_ranks_save_load_and_fail_together(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    ranks = [start(save_load_and_fail_as_rank, rank, tmp_path / "store", directory) for rank in range(2)]
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    names = sorted(path.name for path in directory.iterdir())
    assert names == ["rank_0_error", "rank_1_error", "step_000001"], "neither waited for the other"
    messages = {(directory / f"rank_{rank}_error").read_text() for rank in range(2)}
    assert len(messages) == 1 and "No space left on device" in messages.pop()
    with pytest.raises(CheckpointError, match="2 ranks wrote it, 1 are running"):
        load_checkpoint(directory / "step_000001", [])


# --- files ----------------------------------------------------------------------------------------------------------


def _replace_and_die(path: Path, call: int) -> None:
    die_at(call)
    atomic.write_file(path, "new")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic.write_file(path, "old")
    for call, content in enumerate(("old", "old", "new")):  # at fsync, at replace, at the folder's fsync
        assert exit_code(_replace_and_die, path, call) == KILLED
        assert path.read_text() == content
    assert exit_code(_replace_and_die, path, 3) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
