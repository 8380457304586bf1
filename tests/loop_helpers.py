"""A tiny real checkpoint with its prompt files, and whole runs on it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from draft_models.config import DraftConfig
from rollout_engine.config import RolloutConfig
from sync.receiver import Bundle, WeightReceiver
from tests.crash_helpers import die_at
from trainer import make_model
from trainer.config import AlgorithmConfig, DataConfig, PolicyConfig, RunConfig

TINY = make_model.Shape(hidden_size=48, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=24, intermediate_size=64)


def make_tiny_model(folder: Path) -> Path:
    """Random weights, real tokenizer; large enough logits that sampling at T = 1 is not uniform."""
    make_model.PRESETS["tiny"] = TINY
    config = make_model.MakeModelConfig(
        out=folder, size="tiny", task="repeat", num_train_prompts=24, num_eval_prompts=4, warm_start_steps=12
    )
    return make_model.make_model(config)


def tiny_config(model: Path, runs: Path, name: str, **changes: Any) -> RunConfig:
    """Three steps of twelve samples with everything on; `changes` replaces fields, TABLE_FIELD inside a table."""
    config = RunConfig(
        name=name,
        run_dir=str(runs),
        num_rollout=3,
        deterministic=True,
        save_interval=1,
        policy=PolicyConfig(hf_checkpoint=str(model), lr=1e-3, max_tokens_per_gpu=256),
        algorithm=AlgorithmConfig(),
        draft=DraftConfig(lr=3e-3, max_tokens_per_update=100_000),
        rollout=RolloutConfig(max_running_requests=5, max_response_len=12, controller="fixed"),
        data=DataConfig(
            prompt_data=str(model / "train.jsonl"),
            eval_prompt_data=str(model / "eval.jsonl"),
            rollout_batch_size=3,
            n_samples_per_prompt=4,
            reward="tests.loop_helpers:graded_reward",
        ),
    )
    tables: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        table, _, field = key.partition("__")
        if field:
            tables.setdefault(table, {})[field] = value
        else:
            config = replace(config, **{key: value})
    for table, fields in tables.items():
        config = replace(config, **{table: replace(getattr(config, table), **fields)})
    return config


def graded_reward(prompt: str, response: str, label: str) -> float:
    """Differs within nearly every group, so that the policy always has a gradient."""
    return len(set(response)) / (1.0 + len(response)) + 0.1 * (response[:2] == label[:2])


def run(config: RunConfig) -> Path:
    """Train to the end in this process and return the run's folder."""
    from trainer.run import train

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert train(config) == 0
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    return Path(config.run_dir) / config.name


def run_and_die(config: RunConfig, call: int) -> None:
    """In a process of its own: kill -9 at the n-th call that touches the disk."""
    make_model.PRESETS["tiny"] = TINY
    die_at(call)
    run(config)


def run_and_count(config: RunConfig, count_file: Path) -> None:
    """In a process of its own: an unbroken run, and how many calls of it touch the disk."""
    make_model.PRESETS["tiny"] = TINY
    calls = die_at(-1)
    run(config)
    count = calls[0]
    count_file.write_text(str(count))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics lines without their times and rates, which differ from run to run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "tokens_per_s", "speedup", "running")
    return [{k: v for k, v in line.items() if not any(word in k for word in timed)} for line in lines]


def weights(folder: Path, model: str) -> dict[str, torch.Tensor]:
    return load_file(folder / model / "model.safetensors")


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: metrics (times aside), policy and draft."""
    assert metrics(a) == metrics(b)
    assert_same_tensors(weights(a, "policy"), weights(b, "policy"))
    (draft,) = (path.name for path in a.glob("draft*") if path.is_dir())  # or draft.not-published
    assert_same_tensors(weights(a, draft), weights(b, draft))


def keep_the_first_draft(receiver: WeightReceiver, bundle: Bundle) -> None:
    """In the place of `WeightReceiver._copy_all`: every policy arrives, and of the drafts only that of version 0."""
    for name, destination in receiver.destinations.items():
        if name.startswith("policy.") or bundle.version == 0:
            destination.copy_(bundle.tensors[name])
