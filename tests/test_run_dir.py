"""A run's folder: refused when it exists, its settings readable again, its metrics cut on resume."""

from __future__ import annotations

import fcntl
import json
import math
import multiprocessing
import os
import time
import tomllib
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from tests.crash_helpers import start
from trainer import serve as serve_module
from trainer.config import ConfigError, DataConfig, PolicyConfig, RunConfig
from trainer.run_dir import check_run_dir, cut_metrics, make_run_dir
from trainer.run_lock import RunLock, refuse_in_use
from trainer.toml_writer import to_toml


def config_in(tmp_path: Path, **changes: object) -> RunConfig:
    return replace(RunConfig(name="first", run_dir=str(tmp_path / "runs")), **changes)


def test_the_resolved_settings_read_back(tmp_path: Path) -> None:
    policy = PolicyConfig(lr=1e-6, megatron={"fp8": "e4m3", "moe": {"aux loss": 0.1}, "layers": (1, 2)})
    config = config_in(tmp_path, policy=policy, data=DataConfig(prompt_data='a "quoted" \\ path\n\u00e9\U0001f680'))
    run, _ = make_run_dir(config)
    read = tomllib.loads(run.config_file.read_text(encoding="utf-8"))
    assert read == json.loads(json.dumps(asdict(config))), "tuples read back as lists"


def test_toml_values_and_keys() -> None:
    values = {
        "text": 'tab\t quote" slash\\ nul\x00 del\x7f line\u2028 rocket\U0001f680',
        "floats": [0.1, 1e-300, 1e16, -0.0, float("inf"), float("-inf")],
        "bools": [True, False],
        "big": 2**62,
        "empty": [],
        "rows": [{"a": 1, "b c": [2]}, {}],
        "dotted.key": 1,
        "": 2,
        "nested": {"empty": {}, "deep er": {"x": 1}},
    }
    assert tomllib.loads(to_toml(values)) == values
    assert math.isnan(tomllib.loads(to_toml({"x": float("nan")}))["x"])
    with pytest.raises(TypeError, match=r"a\.b: TOML cannot hold a NoneType"):
        to_toml({"a": {"b": None}})


def test_an_existing_run_is_refused_unless_resumed(tmp_path: Path) -> None:
    run, lock = make_run_dir(config_in(tmp_path))
    lock.release()
    with pytest.raises(ConfigError, match=r"runs/first exists already: .*--resume.*--name") as error:
        make_run_dir(config_in(tmp_path, seed=1))
    assert "\n" not in str(error.value)
    first_settings = run.config_file.read_text()
    make_run_dir(config_in(tmp_path, seed=1, resume=True))
    assert run.config_file.read_text() == first_settings
    assert tomllib.loads((run.path / "config.resumed.toml").read_text())["seed"] == 1
    make_run_dir(config_in(tmp_path, name="second"))


def test_a_run_in_use_is_refused_also_to_resume(tmp_path: Path) -> None:
    run, lock = make_run_dir(config_in(tmp_path))
    in_use = rf"run first is in use by process {os.getpid()} \(.*runs/first/lock\); wait for it or stop it"
    for resume in (True, False):
        for refuses in (check_run_dir, make_run_dir):
            with pytest.raises(ConfigError, match=in_use):
                refuses(config_in(tmp_path, resume=resume))
    lock.release()
    assert not run.lock_file.exists()
    check_run_dir(config_in(tmp_path, resume=True))


def hold(config: RunConfig, held: Connection) -> None:
    """As a run does while it writes a checkpoint: with a child, forked, that outlives it."""
    make_run_dir(config)
    if os.fork() == 0:
        time.sleep(5)
        os._exit(0)
    held.send("held")
    time.sleep(3600)


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    receiving, sending = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = start(hold, config_in(tmp_path), sending)
    try:
        assert receiving.poll(60) and receiving.recv() == "held"
        with pytest.raises(ConfigError, match=rf"in use by process {process.pid} "):
            make_run_dir(config_in(tmp_path, resume=True))
    finally:
        process.kill()
        process.join()
    run, _lock = make_run_dir(config_in(tmp_path, resume=True))
    assert run.lock_file.read_text() == f"{os.getpid()}\n"


def make_and_say(config: RunConfig, results: Queue[str], end: Event) -> None:
    try:
        make_run_dir(config)
        results.put("made")
    except ConfigError as error:
        results.put(str(error))
    end.wait(60)


def test_of_several_starts_at_one_moment_one_goes_on(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    results, end = context.Queue(), context.Event()
    processes = [start(make_and_say, config_in(tmp_path), results, end) for _ in range(4)]
    said = [results.get(timeout=60) for _ in processes]
    end.set()
    for process in processes:
        process.join()
    assert said.count("made") == 1, said
    assert all("in use by" in line or "exists already" in line for line in said if line != "made"), said


def test_a_lock_file_that_was_removed_meanwhile_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed by the one before after this one has opened it: a lock on a file without a name would keep nobody out."""
    path, flock, calls = tmp_path / "lock", fcntl.flock, []

    def late(file: object, kind: int) -> None:
        if not calls:
            path.unlink()
        calls.append(kind)
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    lock = RunLock(path)
    with pytest.raises(ConfigError, match="in use by"):
        refuse_in_use(path)
    lock.release()


def test_a_second_server_in_one_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would write its log over that of the first."""
    for name in ("_settings", "load_tokenizer", "context_length", "start_sglang"):
        monkeypatch.setattr(serve_module, name, lambda *args, **settings: None)
    monkeypatch.setattr(serve_module.signal, "signal", lambda *args: None)  # this process is no server
    lock = RunLock(tmp_path / "lock")
    with pytest.raises(ConfigError, match=r"is in use by process \d+ .* or choose another --work-dir"):
        serve_module.serve(tmp_path, None, tmp_path, [])
    lock.release()


def test_nothing_to_resume_is_said_and_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runs/first holds no run to resume"):
        make_run_dir(config_in(tmp_path, resume=True))
    check_run_dir(config_in(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ConfigError, match=r"cannot be used as run folder: Not a directory; choose another --run-dir"):
        make_run_dir(config_in(tmp_path))


def test_a_place_that_cannot_be_written_is_one_line_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir(mode=0o500)
    access = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and path != tmp_path / "runs")
    for config in (config_in(tmp_path), config_in(tmp_path, run_dir=str(tmp_path / "runs" / "deep" / "er"))):
        with pytest.raises(
            ConfigError, match=r"run folder: \S*/runs is not writable; choose another --run-dir"
        ) as error:
            check_run_dir(config)
        assert "\n" not in str(error.value)
    assert list((tmp_path / "runs").iterdir()) == []


def test_metrics_are_cut_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": step, "reward": 0.5}) + "\n" for step in range(5)]
    path.write_text("".join(whole) + '{"step": 5, "rew')  # killed while writing
    cut_metrics(path, after_step=2)
    assert path.read_text() == "".join(whole[:3])
    cut_metrics(path, after_step=-1)
    assert path.read_text() == ""
    cut_metrics(tmp_path / "absent.jsonl", after_step=0)


def test_a_broken_line_inside_is_not_dropped_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl line 2 is not a metrics record"):
        cut_metrics(path, after_step=2)
    assert path.read_text().count("\n") == 3
