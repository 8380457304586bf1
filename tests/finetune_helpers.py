"""Whole fine-tunings of a draft for the tiny policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests import loop_helpers
from tests.crash_helpers import die_at
from trainer.config_load import parse_flags
from trainer.finetune_config import FinetuneConfig, make_config, own_fields

SETTINGS = (  # a few optimizer steps that clearly help
    "--rollout-max-response-len=24",
    "--n-samples-per-prompt=2",
    "--draft.max-tokens-per-update=400",
    "--draft.lr=3e-3",
    "--deterministic",
)
OWN = {"epochs": 2, "eval_interval": 2, "save_interval": 2, "warmup_steps": 1, "held_out": 0.25}


def make_tiny_model(folder: Path) -> Path:
    """Its context is long enough for prompts and their answers."""
    return loop_helpers.make_tiny_model(folder)


def config_for(model: Path, out: Path, *flags: str, **own: Any) -> FinetuneConfig:
    """Fields of FinetuneConfig by name, settings shared with train as flags."""
    values = {item.name: item.default for item in own_fields()}
    values |= {"target": str(model), "out": str(out), "data": str(model / "train.jsonl")}
    if own.get("data") == "":  # only converts
        return make_config(values | own, parse_flags(flags)[1])
    return make_config(values | OWN | own, parse_flags([*SETTINGS, *flags])[1])


def run(config: FinetuneConfig) -> Path:
    """To the end in this process; the folder that it wrote."""
    from trainer.finetune import finetune

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert finetune(config) == 0
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    return Path(config.out)


def run_and_die(config: FinetuneConfig, call: int) -> None:
    """In a process of its own: kill -9 at the n-th call that touches the disk."""
    die_at(call)
    run(config)


def run_and_count(config: FinetuneConfig, count_file: Path) -> None:
    """In a process of its own: an unbroken run, and how many calls of it touch the disk."""
    calls = die_at(-1)
    run(config)
    count_file.write_text(str(calls[0]))


def metrics(out: Path) -> list[dict[str, Any]]:
    """The metrics lines without their times."""
    lines = [json.loads(line) for line in Path(f"{out}.finetune", "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time_")} for line in lines]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: metrics (times aside) and draft."""
    assert metrics(a) == metrics(b)
    loop_helpers.assert_same_tensors(weights(a), weights(b))
