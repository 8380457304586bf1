"""What is found out about an installed SGLang without importing it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rollout_engine.sglang_install import canonical, find_sglang, known_flags, read_version, update_protocol
from rollout_engine.sglang_launch import _environment
from rollout_engine.types import EngineConfigError


def write_package(folder: Path, layout: str) -> Path:
    """A package that declares flags as SGLang 0.5.15 ("old") or later versions ("new") do."""
    fields = """
from typing import Annotated as A
class Fields:
    model_path: A[str, Arg(help="path", aliases=["--model"])]
    tp_size: A[int, Arg(help="GPUs", cli_name="--tensor-parallel-size", aliases=["--tp-size"])] = 1
    mem_fraction_static: A[float, "share"] = 0.9
"""
    manual = """
class ServerArgs:
    def add_cli_args(parser):
        parser.add_argument("--reasoning-parser", type=str, help="not --a-flag")
"""
    arguments = folder / "srt" / "server_args.py"
    arguments.parent.mkdir(parents=True)
    if layout == "old":
        arguments.write_text(fields + manual)
    else:
        arguments.write_text(manual)
        (folder / "srt" / "arg_groups" / "fields").mkdir(parents=True)
        (folder / "srt" / "arg_groups" / "fields" / "model.py").write_text(fields)
    return folder


@pytest.mark.parametrize("layout", ["old", "new"])
def test_known_flags_are_read_without_importing(tmp_path: Path, layout: str) -> None:
    known = known_flags(write_package(tmp_path / "sglang", layout))
    assert known["model"] == known["model_path"] == "model_path"
    assert known["tensor_parallel_size"] == known["tp_size"] == "tp_size"
    assert known["reasoning_parser"] == "reasoning_parser" and "a_flag" not in known


def test_flags_get_the_names_of_their_fields(tmp_path: Path) -> None:
    known = known_flags(write_package(tmp_path / "sglang", "old"))
    assert canonical({"tensor-parallel-size": 1, "model": "m"}, known, "0.5.15") == {"tp_size": 1, "model_path": "m"}
    with pytest.raises(EngineConfigError, match=r"mem_fraction_statik: .*has no such flag, did you mean mem_fr"):
        canonical({"mem_fraction_statik": 0.3}, known, "0.5.15")
    with pytest.raises(EngineConfigError, match="given twice"):
        canonical({"tp_size": 1, "tensor_parallel_size": 1}, known, "0.5.15")


@pytest.mark.parametrize(
    ("version", "begin_end"),
    [("0.5.15.post1", False), ("0.5.20", False), ("0.5.22", False), ("0.5.23", True), ("0.5.23.post2", True)],
)
def test_the_update_protocol_goes_by_the_version(version: str, begin_end: bool) -> None:
    assert update_protocol(version) is begin_end


def test_the_routes_that_a_server_names_say_more_than_its_version() -> None:
    begins = {"/generate", "/begin_weight_update", "/end_weight_update"}
    assert update_protocol("0.5.22", begins) is True and update_protocol("0.5.23", {"/generate"}) is False


@pytest.mark.parametrize("version", ["0.5.14", "0.5.24", "0.6.0", "1.0", "unknown"])
def test_unknown_versions_are_refused(version: str) -> None:
    with pytest.raises(EngineConfigError, match=f"SGLang {version} is not known"):
        update_protocol(version)


def test_the_version_is_the_packages_own(tmp_path: Path) -> None:
    (tmp_path / "_version.py").write_text("__version__ = version = '0.5.15.post1'\n")
    assert read_version(tmp_path) == "0.5.15.post1"
    (tmp_path / "_version.py").write_text("")
    with pytest.raises(EngineConfigError, match="no version"):
        read_version(tmp_path)


def test_sglang_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(EngineConfigError, match=r"pip install '\.\[sglang\]'.*rollout\.sglang_python"):
        find_sglang(sys.executable)
    with pytest.raises(EngineConfigError, match="cannot be run"):
        find_sglang(str(tmp_path / "python"))


def test_an_interpreter_is_found_from_any_folder_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is started in a folder of its own; a link must stay one, or its environment is lost."""
    package = tmp_path / "sglang"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_version.py").write_text("__version__ = version = '0.5.20'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("python").symlink_to(sys.executable)
    assert find_sglang("./python").python == str(tmp_path / "python")


def test_a_server_is_no_rank_of_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torchrun's variables SGLang would wait for a store that torchrun's agent keeps for the trainer's ranks."""
    of_torchrun = (
        *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
        *("ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"),
    )
    for name in (*of_torchrun, "LOCAL_DATA"):
        monkeypatch.setenv(name, "1")
    found = _environment("cpu", tmp_path)
    assert not found.keys() & set(of_torchrun) and found["LOCAL_DATA"] == "1"


def test_a_server_reports_log_probs_at_the_rollouts_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
    assert "SGLANG_RETURN_ORIGINAL_LOGPROB" not in _environment("cpu", tmp_path)


@pytest.mark.parametrize("inherited", ["", "lib"])
def test_a_server_finds_the_loader_from_a_folder_that_was_named_relative_to_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inherited: str
) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "of_the_user.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", inherited)
    work_dir = Path("runs") / "engine"
    work_dir.mkdir(parents=True)
    modules = ["sync.loader", *(["of_the_user"] if inherited else [])]
    finds = f"import importlib.util as u; print([u.find_spec(name) is not None for name in {modules}])"
    command = [sys.executable, "-S", "-c", finds]  # -S: without the packages installed here, this project's among them
    done = subprocess.run(command, env=_environment("cpu", work_dir), cwd=work_dir, capture_output=True, text=True)
    assert done.stdout.strip() == str([True] * len(modules)), done.stderr
