"""What is refused before a server is started, by a dry run too."""

from __future__ import annotations

import errno
import json
import re
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rollout_engine import server_process
from rollout_engine.config import RolloutConfig
from rollout_engine.sglang_preflight import check_files, check_folder, check_policy, check_start
from rollout_engine.types import EngineConfigError
from tests.sglang_package import install_without_gpu
from trainer.cli import main
from trainer.make_model import MakeModelConfig, make_model
from trainer.serving import check_engine

PLAIN = RolloutConfig(engine="sglang", speculative_algorithm="NONE", device="cpu")
NGRAM = replace(PLAIN, speculative_algorithm="NGRAM", speculative_num_steps=1)
FIELDS = """
class ServerArgs:
    host: A[str, "of HTTP"] = "127.0.0.1"
    port: A[int, "of HTTP"] = 30000
    grpc_port: A[Optional[int], "of gRPC"] = None
    nccl_port: A[Optional[int], "of NCCL"] = None
    max_total_tokens: A[Optional[int], Arg(help="such as 16k", type_parser=human_readable_int)] = None
    schedule_conservativeness: A[float, "more is more"] = 1.0
    disable_radix_cache: A[bool, Arg(help="off", resolvable=True)] = False
    cuda_graph_bs_decode: A[Optional[List[int]], "sizes"] = None
    tp_size: A[int, Arg(help="GPUs", aliases=["--tensor-parallel-size", "--tp"])] = 1
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An SGLang that is found and never imported, and no GPU."""
    install_without_gpu(tmp_path, monkeypatch, FIELDS)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 50, "max_position_embeddings": 40}))
    save_file({"weight": torch.zeros(64)}, folder / "model.safetensors")
    return folder


def with_flags(flags: dict[str, Any]) -> RolloutConfig:
    return replace(PLAIN, sglang=flags)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (with_flags({"nccl_port": "abc"}), r"nccl_port = 'abc': SGLang 0\.5\.20 takes a whole number"),
        (with_flags({"nccl_port": 1.5}), "nccl_port = 1.5: .* takes a whole number"),
        (with_flags({"nccl_port": True}), "nccl_port = True: .* takes a whole number"),
        (with_flags({"nccl_port": [1]}), "nccl_port = .*takes a whole number"),
        (with_flags({"schedule_conservativeness": "much"}), "schedule_conservativeness = 'much': .* takes a number"),
        (with_flags({"disable_radix_cache": "maybe"}), "disable_radix_cache = 'maybe': .* takes true or false"),
        (with_flags({"tp": 2}), "tp_?s?i?z?e? = 2: an engine over several GPUs"),
        (with_flags({"prot": 1}), "no such flag, did you mean port"),
        (
            replace(PLAIN, device="cuda"),
            r"device = 'cuda': torch finds 0 GPUs .*slipstream doctor.*more, or set rollout\.device = 'cpu' where",
        ),
        (replace(PLAIN, offload=True), "rollout.offload = true gives GPU memory back: leave it out on a CPU$"),
        (replace(PLAIN, speculative_algorithm="EAGLE3"), r"temperature = 1\.0 .*'EAGLE3' on a CPU.*verifies greedily"),
        (replace(NGRAM, device="auto"), r"temperature = 1\.0 .*'NGRAM' on a CPU \(.*found no GPU"),
        (replace(PLAIN, offload=True, device="auto"), "leave it out on a CPU .*device = 'auto' found no GPU"),
        (with_flags({"host": "192.0.2.1"}), r"sglang\.host = '192\.0\.2\.1' cannot be listened on"),
        (with_flags({"host": "::1"}), r"sglang\.host = '::1' cannot be listened on .*an IPv4 address of this machine"),
        (with_flags({"host": "no such..name"}), r"sglang\.host = 'no such\.\.name' cannot be listened on"),
    ],
)
def test_what_no_server_could_do_is_refused(config: RolloutConfig, message: str) -> None:
    with pytest.raises(EngineConfigError, match=message):
        check_start(config)


def test_a_gpu_beyond_the_last_one_is_refused_with_the_last_ones_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(EngineConfigError, match=r"'cuda:2': torch finds 2 GPUs .*name one up to cuda:1, or set "):
        check_start(replace(PLAIN, device="cuda:2"))
    assert check_start(replace(PLAIN, device="cuda:1")).device == "cuda:1"


def test_a_port_whose_second_one_is_none_is_refused_where_sglang_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SGLANG_GRPC_PORT", raising=False)
    monkeypatch.setattr(server_process, "_bind_errno", lambda port, host: 0)
    too_high = with_flags({"port": 55536})
    assert check_start(too_high).flags["port"] == 55536, "0.5.20 counts none above it"
    package = tmp_path / "packages" / "sglang"
    (package / "_version.py").write_text("__version__ = version = '0.5.15.post1'\n")
    without = re.sub(r".*grpc_port.*\n", "", FIELDS)
    (package / "srt" / "server_args.py").write_text(without)
    told = r"port = 55536: SGLang 0\.5\.15\.post1 counts 65536 \(10000 above\).*up to 55535, or leave it out"
    with pytest.raises(EngineConfigError, match=told):
        check_start(too_high)
    check_start(with_flags({"port": 55535}))
    monkeypatch.setenv("SGLANG_GRPC_PORT", "4000")
    check_start(too_high)


def test_a_port_that_the_user_may_not_have_is_not_called_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bind answers an ordinary user."""
    bind = socket.socket.bind

    def refuse(probe: socket.socket, address: tuple[str, int]) -> None:
        if 0 < address[1] < 1024:
            raise PermissionError(errno.EACCES, "Permission denied")
        bind(probe, address)

    monkeypatch.setattr(server_process.socket, "socket", type("Probe", (socket.socket,), {"bind": refuse}))
    with pytest.raises(EngineConfigError, match=r"port = 80: this user may not listen there; name one above 1023, or "):
        check_start(with_flags({"port": 80}))


def test_what_a_server_can_do_is_let_through() -> None:
    flags = {
        "nccl-port": 7,
        "schedule_conservativeness": 1,
        "disable_radix_cache": True,
        "max_total_tokens": "16k",
        "cuda_graph_bs_decode": [1, 8, 32],
        "tensor_parallel_size": 1,
    }
    ready = check_start(with_flags(flags))
    assert ready.device == "cpu" and ready.installation.version == "0.5.20" and ready.host == "127.0.0.1"
    assert check_start(with_flags({"host": "0.0.0.0"})).host == "0.0.0.0"
    assert ready.flags["tp_size"] == 1 and ready.spellings["tp_size"] == "tensor_parallel_size"
    assert check_start(replace(PLAIN, speculative_algorithm="EAGLE3", temperature=0.0)).device == "cpu"
    assert check_start(replace(PLAIN, speculative_algorithm="EAGLE3", allow_lossy=True)).device == "cpu"


def test_simulated_acceptance_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_SIMULATE_ACC_LEN", "3")
    speculating = replace(PLAIN, speculative_algorithm="EAGLE3", temperature=0.0)
    with pytest.raises(EngineConfigError, match="SGLANG_SIMULATE_ACC_LEN is set: drafts would be accepted by decree"):
        check_start(speculating)
    assert check_start(PLAIN) and check_start(replace(speculating, allow_lossy=True))


def test_a_flag_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "packages" / "sglang" / "srt" / "server_args.py").unlink()
    with pytest.raises(EngineConfigError, match=r"server_args\.py cannot be read.*install SGLang again"):
        check_start(PLAIN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "config.json: expected a JSON object, found list"),
        ("{", "config.json cannot be read"),
        ('{"max_position_embeddings": 40}', "config.json: key vocab_size is missing"),
        ('{"vocab_size": "50", "max_position_embeddings": 40}', "key vocab_size is missing or not a whole number"),
        ('{"vocab_size": 50}', "key max_position_embeddings is missing"),
        ('{"vocab_size": 50, "max_position_embeddings": 8}', "context_length = 40 is above the 8 positions"),
    ],
)
def test_a_policy_whose_sizes_are_not_told_is_named(policy: Path, text: str, message: str) -> None:
    (policy / "config.json").write_text(text)
    with pytest.raises(EngineConfigError, match=message):
        check_policy(replace(PLAIN, context_length=40), policy)


def cut(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"model\.safetensors: not a readable safetensors file"),
        (Path.unlink, "neither model.safetensors nor"),
    ],
)
def test_weights_that_no_server_could_load_are_named(
    policy: Path, damage: Callable[[Path], None], message: str
) -> None:
    check_files(PLAIN, policy, None)
    damage(policy / "model.safetensors")
    with pytest.raises(EngineConfigError, match=message):
        check_files(PLAIN, policy, None)


@pytest.mark.parametrize("name", ["file", "file/below", "link", "/proc/below"])
def test_a_folder_that_cannot_be_written_to_is_named_with_its_setting(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    folder = tmp_path / name
    with pytest.raises(EngineConfigError, match=rf"rollout\.sync_dir = '{folder}' cannot be written to"):
        check_folder("rollout.sync_dir", folder)
    config = RolloutConfig(engine="sglang", sglang_address="http://127.0.0.1:1", sync_dir=str(folder))
    with pytest.raises(EngineConfigError, match=r"rollout\.sync_dir = "):
        check_engine(config)


def test_a_folder_that_can_be_made_is_let_through_and_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = list(tmp_path.iterdir())
    check_folder("rollout.sync_dir", Path("new") / "below")
    check_folder("rollout.sync_dir", tmp_path)
    assert list(tmp_path.iterdir()) == before


def test_serve_names_a_folder_that_it_cannot_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    out = make_model(MakeModelConfig(out=tmp_path / "model", num_train_prompts=4, num_eval_prompts=4))
    assert main(["serve", "--policy", str(out), "--work-dir", str(tmp_path / "file")]) == 2
    assert f"--work-dir = '{tmp_path / 'file'}' cannot be written to" in capsys.readouterr().err
