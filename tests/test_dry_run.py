"""`--dry-run` refuses what a run would refuse, of its server too, says what it did not check, and starts nothing."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from draft_models.checkpoint import save_draft
from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config
from rollout_engine import memory, sglang_launch
from rollout_engine.server_process import free_port
from tests.sglang_package import install_without_gpu
from tests.sglang_server_helpers import ScriptedServer
from trainer.cli import main
from trainer.hf_files import read_config
from trainer.make_model import MakeModelConfig, make_model

GIB = 1024**3
FIELDS = 'class ServerArgs:\n    port: A[int, "of HTTP"] = 30000\n    mem_fraction_static: A[float, "share"] = 0.9\n'
Said = tuple[int, str]
DryRun = Callable[..., Said]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dry_run") / "model"
    return make_model(MakeModelConfig(out=out, num_train_prompts=4, num_eval_prompts=4))


@pytest.fixture
def dry_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> DryRun:
    """Status and output of one over an SGLang that is found and never imported, on a machine without a GPU."""
    install_without_gpu(tmp_path, monkeypatch, FIELDS)

    def run(*arguments: str, engine: str = "sglang") -> Said:
        inputs = (f"--hf-checkpoint={model}", f"--prompt-data={model}/train.jsonl", f"--run-dir={tmp_path / 'runs'}")
        plain = () if any("speculative-algorithm" in each for each in arguments) else ("--speculative-algorithm=NONE",)
        status = main(["train", "--dry-run", *inputs, f"--engine={engine}", *plain, *arguments])
        said = capsys.readouterr()
        assert "everything checked" not in said.out and not (tmp_path / "runs").exists()
        return status, said.out if status == 0 else said.err

    return run


@pytest.fixture
def server(model: Path) -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        server.info |= {"model_path": str(model), "context_length": 256, "attention_backend": "triton"}
        yield server


def test_what_was_not_checked_is_its_last_line(dry_run: DryRun) -> None:
    status, said = dry_run(engine="torch")
    assert status == 0
    last = said.splitlines()[-1]
    assert last == "not checked: whether the memory suffices; what the reward says to a response"
    status, said = dry_run(f"--sglang-port={free_port()}")
    assert status == 0
    assert said.splitlines()[-1].startswith("not checked: whether the SGLang server comes up; whether the memory")


def test_a_port_that_is_taken_is_refused(dry_run: DryRun) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        status, said = dry_run(f"--sglang-port={port}")
    assert status == 2 and f"rollout.sglang.port = {port} is taken: name another" in said


def test_an_address_where_nobody_answers_is_refused(dry_run: DryRun, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    status, said = dry_run(f"--rollout-external-engine-addrs={address}", f"--update-weight-disk-dir={tmp_path}")
    assert status == 2 and f"rollout.sglang_address = 'http://{address}': no SGLang server answers" in said


def test_a_server_at_an_address_is_asked_and_left_alone(
    dry_run: DryRun, server: ScriptedServer, tmp_path: Path
) -> None:
    attached = (f"--rollout-external-engine-addrs={server.address}", f"--update-weight-disk-dir={tmp_path / 'sync'}")
    status, said = dry_run(*attached, "--sglang-attention-backend=triton")
    assert status == 0
    assert said.splitlines()[-1].startswith("not checked: whether the server takes the run's weights; ")
    status, said = dry_run(*attached, "--sglang-attention-backend=flashinfer", "--sglang-no-such-flag=3")
    assert status == 2 and "attention_backend = 'triton', the run asks for 'flashinfer'" in said
    assert f"rollout.sglang_address = '{server.address}': it " in said and "it names no flag no_such_flag" in said
    server.info["dtype"] = "bfloat16"
    assert "dtype = 'bfloat16', the run asks for 'float32'" in dry_run(*attached)[1]
    assert not (server.num_calls or server.num_flushes or server.update_calls or server.memory_calls)
    assert not (tmp_path / "sync").exists()


@pytest.fixture
def gpu(dry_run: DryRun, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets how many GiB are free."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    free_gib = [80.0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gib[0] * GIB), 80 * GIB))
    return lambda gib: free_gib.__setitem__(0, gib)


@pytest.mark.parametrize(("algorithm", "draft"), [("NONE", "0 B"), ("EAGLE3", r"[1-9]\d+ B")])
def test_of_a_gpu_that_is_missing_is_said_what_it_would_hold(
    dry_run: DryRun, monkeypatch: pytest.MonkeyPatch, algorithm: str, draft: str
) -> None:
    monkeypatch.setattr(memory, "gib", lambda num_bytes: f"{num_bytes} B")  # the models are small
    status, said = dry_run(
        "--rollout.device=cuda", f"--speculative-algorithm={algorithm}", "--rollout.controller=fixed"
    )
    line = said.splitlines()[-1]  # after the warnings
    assert status == 2 and "torch finds 0 GPUs on this machine (slipstream doctor" in line
    assert re.search(
        rf"; the engine needs policy [1-9]\d+ B, draft {draft}, KV [1-9]\d+ B for \d+ requests of 256", line
    )


def test_the_memory_is_counted_where_there_is_a_gpu(dry_run: DryRun, gpu: Callable[[float], None]) -> None:
    on_gpu = ("--rollout.device=cuda", "--speculative-algorithm=EAGLE3", "--rollout.controller=fixed")
    status, said = dry_run(*on_gpu, "--draft.capture-max-bytes=1000000")
    assert status == 0, said
    assert "# memory      weights and KV of the engine take 10% of what the trainer leaves free" in said
    assert "whether the memory suffices for the policy's activations" in said.splitlines()[-1]
    gpu(0.08)  # enough, but for the policy
    status, said = dry_run(*on_gpu, "--draft.capture-max-bytes=1000000")
    assert status == 2 and "0.06 GiB are free" in said and "are counted as no longer free" in said


def test_a_draft_counts_the_same_in_its_folder_and_before_it_is_written(model: Path, tmp_path: Path) -> None:
    for asked in (DraftConfig(), DraftConfig(draft_vocab_size=16)):
        sizes = Eagle3Config.from_target(read_config(model), asked)
        target_ids = torch.arange(16) if sizes.is_reduced else None
        save_draft(Eagle3(sizes, target_ids=target_ids), tmp_path)
        in_folder, before = sglang_launch._sizes(tmp_path), sglang_launch._sizes(sizes)
        assert in_folder[1] == before[1] > 0
        assert before[0] is not None and before[0].items() <= (in_folder[0] or {}).items()
    assert sglang_launch._sizes(None) == (None, 0)
