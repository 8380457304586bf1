"""From a checkpoint folder to an engine: what is wrong with folder or machine is one line; stop strings stop."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from draft_models.checkpoint import load_draft
from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config
from rollout_engine import sglang_engine, sglang_launch
from rollout_engine.config import RolloutConfig
from rollout_engine.memory import TrainerNeed, count_parameters
from rollout_engine.speculation import CostTable
from rollout_engine.torch_engine import TorchEngine
from rollout_engine.types import FinishReason, RolloutRequest, Sample, SamplingParams
from trainer.cli import main
from trainer.config import ConfigError, PolicyConfig, RunConfig
from trainer.hf_files import read_config
from trainer.make_model import MakeModelConfig, make_model
from trainer.serving import (
    build_engine,
    check_server,
    context_length,
    device_of,
    eos_token_ids,
    load_tokenizer,
    trainer_need,
)

PLAIN = RolloutConfig(speculative_algorithm="NONE", device="cpu")


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("serving") / "policy"
    return make_model(MakeModelConfig(out=out, num_train_prompts=4, num_eval_prompts=4))


@pytest.fixture
def broken(policy_dir: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(policy_dir, tmp_path / "policy"))


@pytest.mark.parametrize("device", ["foo", "mps", "cuda:x", ""])
def test_an_unknown_device_is_named(device: str) -> None:
    with pytest.raises(ConfigError, match=rf"rollout\.device = '{device}' is unknown; use auto, cpu"):
        device_of(RolloutConfig(device=device))


@pytest.mark.parametrize("device", ["cuda", "cuda:2"])
def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=rf"'{device}': this machine has 0 CUDA devices"):
        device_of(RolloutConfig(device=device))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert device_of(RolloutConfig(device=device)) == torch.device(device)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "expected a JSON object, found list"), ('{"eos_token_id": "x"}', "eos_token_id = 'x'")],
)
def test_a_corrupt_generation_config_is_named(broken: Path, text: str, message: str) -> None:
    (broken / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {message}"):
        eos_token_ids(broken, load_tokenizer(broken))


def test_end_of_sequence_comes_from_the_first_that_names_it(broken: Path) -> None:
    tokenizer = load_tokenizer(broken)
    (broken / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert eos_token_ids(broken, tokenizer) == (3, 5)
    (broken / "generation_config.json").write_text("{}")
    assert eos_token_ids(broken, tokenizer) == (json.loads((broken / "config.json").read_text())["eos_token_id"],)


def test_a_config_without_positions_is_one_line(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((broken / "config.json").read_text())
    del config["max_position_embeddings"]
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"config\.json: key max_position_embeddings"):
        context_length(broken, PLAIN)
    assert main(["generate", "--policy", str(broken), "--prompt", "1"]) == 2
    said = capsys.readouterr().err
    assert "max_position_embeddings" in said and said.count("\n") == 1


def test_what_the_engine_refuses_is_one_line(
    policy_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CostTable((1,), ((1.0, 1.0),)).save(tmp_path / "t.json")
    arguments = ["--speculative-algorithm", "NGRAM", "--rollout.cost-table", str(tmp_path / "t.json")]
    assert main(["generate", "--policy", str(policy_dir), "--prompt", "1", *arguments, "--rollout.device", "cpu"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "t.json: measured up to 1 draft tokens" in said[-1] and said[-1].startswith("slipstream: error: ")


class Started:
    """Stands where SGLangEngine does and keeps what it was asked for."""

    def __init__(self, policy: Path, config: RolloutConfig, **arguments: Any) -> None:
        self.policy, self.config, self.arguments = policy, config, arguments


def test_the_engine_is_the_one_that_the_settings_name(
    policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_engine, "SGLangEngine", Started)
    tokenizer = load_tokenizer(policy_dir)
    assert isinstance(build_engine(policy_dir, PLAIN, None, tokenizer, tmp_path / "engine"), TorchEngine)
    assert not (tmp_path / "engine").exists()  # the embedded engine leaves nothing behind
    settings = replace(PLAIN, engine="sglang")
    started = build_engine(policy_dir, settings, None, tokenizer, tmp_path / "engine", serves_files=True)
    assert isinstance(started, Started) and (started.policy, started.config) == (policy_dir, settings)
    detokenize = started.arguments.pop("detokenize")
    special = tokenizer.eos_token_id
    assert detokenize((special,)) == tokenizer.convert_ids_to_tokens(special), "special tokens have text"
    assert started.arguments == {
        "draft": None,
        "eos_token_ids": eos_token_ids(policy_dir, tokenizer),
        "work_dir": tmp_path / "engine",
        "serves_files": True,
        "trainer": TrainerNeed(),
    }


def test_a_server_gets_a_random_draft_as_a_folder_and_a_trained_one_where_it_lies(
    policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_engine, "SGLangEngine", Started)
    settings = RolloutConfig(engine="sglang")
    draft = Eagle3(Eagle3Config.from_target(read_config(policy_dir), DraftConfig()), seed=3)
    started = build_engine(policy_dir, settings, draft, load_tokenizer(policy_dir), tmp_path)
    assert isinstance(started, Started) and started.arguments["draft"] == tmp_path / "draft"
    saved = load_draft(tmp_path / "draft", read_config(policy_dir)).named_tensors()
    assert all(torch.equal(saved[name], tensor) for name, tensor in draft.named_tensors().items())
    assert started.arguments["serves_files"] is False
    trained = replace(settings, speculative_draft_model_path=str(tmp_path / "draft"))
    started = build_engine(policy_dir, trained, draft, load_tokenizer(policy_dir), tmp_path / "second")
    assert isinstance(started, Started) and started.arguments["draft"] == tmp_path / "draft"
    assert not (tmp_path / "second").exists()


def test_a_server_leaves_what_the_trainer_is_yet_to_take(
    policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_engine, "SGLangEngine", Started)
    sizes = read_config(policy_dir)
    draft = Eagle3(Eagle3Config.from_target(sizes, DraftConfig()), seed=3)
    num_policy, num_draft = count_parameters(policy_dir), sum(weight.numel() for weight in draft.parameters())
    config = RunConfig(rollout=RolloutConfig(engine="sglang", dtype="bfloat16"))
    need = trainer_need(policy_dir, config, draft)
    captured = (2 << 30) + 4 * sizes["vocab_size"] * sizes["hidden_size"]  # and the output layer, in float32
    assert need == TrainerNeed(8 * num_policy, 12 * num_draft, 2 * (num_policy + num_draft), captured)
    frozen = replace(config, draft=DraftConfig(train=False))
    assert trainer_need(policy_dir, frozen, draft) == replace(need, draft_bytes=0)
    assert trainer_need(policy_dir, config, None) == TrainerNeed(8 * num_policy, 0, 2 * num_policy, 0)
    halves = replace(config, policy=PolicyConfig(tensor_model_parallel_size=2))
    halved = replace(need, policy_bytes=4 * num_policy, sync_bytes=2 * (2 * num_policy + num_draft))
    assert trainer_need(policy_dir, halves, draft) == halved
    staged = replace(config, policy=PolicyConfig(pipeline_model_parallel_size=2))
    assert trainer_need(policy_dir, staged, draft) == replace(halved, draft_bytes=0, capture_bytes=0), (
        "on the last rank"
    )
    tokenizer = load_tokenizer(policy_dir)
    started = build_engine(policy_dir, config.rollout, draft, tokenizer, tmp_path, trainer=need)
    assert isinstance(started, Started) and started.arguments["trainer"] == need


def test_a_dry_run_counts_what_the_trainer_takes_first(policy_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: dict[str, Any] = {}
    monkeypatch.setattr(sglang_launch, "check_launch", lambda *args, **kwargs: counted.update(kwargs))
    draft = Eagle3(Eagle3Config.from_target(read_config(policy_dir), DraftConfig()), seed=3)
    num_policy, num_draft = count_parameters(policy_dir), sum(weight.numel() for weight in draft.parameters())
    config = RunConfig(rollout=RolloutConfig(engine="sglang", device="cuda"))

    def held(config: RunConfig, num_ranks: int = 1) -> int:
        check_server(policy_dir, config, draft, num_ranks)
        assert counted["trainer"] == trainer_need(policy_dir, config, draft, num_ranks)
        return counted["held_bytes"]

    assert held(config) == 8 * num_policy + 4 * num_draft, "weights and gradients"
    in_bfloat16 = replace(config, policy=PolicyConfig(dtype="bfloat16"))
    assert held(in_bfloat16) == 10 * num_policy + 4 * num_draft, "and master copies"
    spread = replace(config, policy=PolicyConfig(dtype="bfloat16", use_distributed_optimizer=True))
    assert held(spread, num_ranks=4) == 6 * num_policy + 4 * (num_policy // 4) + 4 * num_draft
    assert counted["trainer"].policy_bytes == 8 * (num_policy // 4), "ranks that have not come together yet"
    staged = replace(config, policy=PolicyConfig(pipeline_model_parallel_size=2))
    assert held(staged, num_ranks=2) == 8 * (num_policy // 2), "the draft is on the last rank"
    elsewhere = replace(config, rollout=replace(config.rollout, device="cuda:1"))
    assert held(elsewhere) == 0


def sampled(policy_dir: Path, tokenizer: object, stop: tuple[str, ...]) -> Sample:
    engine = build_engine(policy_dir, PLAIN, None, tokenizer, Path("unused"))  # type: ignore[arg-type]
    sampling = SamplingParams(temperature=1.0, max_new_tokens=24, seed=3, stop=stop)
    (sample,) = engine.generate([RolloutRequest(0, 0, (1, 2, 3), sampling)])
    return sample


def test_a_special_token_may_be_a_stop_string(policy_dir: Path) -> None:
    tokenizer = load_tokenizer(policy_dir)
    free = sampled(policy_dir, tokenizer, ())
    texts = [tokenizer.convert_ids_to_tokens(token_id) for token_id in free.token_ids]
    text = next(text for text in texts[1:] if text and text.isascii())  # the rows of padding have none
    tokenizer.add_special_tokens({"additional_special_tokens": [text]})
    stopped = sampled(policy_dir, tokenizer, (text,))
    assert stopped.token_ids == free.token_ids[: texts.index(text) + 1]
    assert stopped.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("text", ["[]", "{"])
def test_a_corrupt_config_is_named_before_the_tokenizer_is_read(broken: Path, text: str) -> None:
    (broken / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: (not JSON|holds list)"):
        load_tokenizer(broken)


def test_generate_names_a_size_that_is_missing(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = read_config(broken)
    (broken / "config.json").write_text(json.dumps({key: sizes[key] for key in sizes if key != "vocab_size"}))
    assert main(["generate", "--policy", str(broken), "--prompt", "2 + 2 ="]) == 2
    assert "config.json: key vocab_size is missing or not a number; add the rows" in capsys.readouterr().err
