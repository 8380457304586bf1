"""The benchmarks of the updates run and write whole lines; the work that they count is the work that is done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import draft_update, policy_update
from benchmarks.training_shapes import SHAPES, Shape, rollout, write_checkpoint
from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config
from draft_models.training import draft_loss, make_batch
from rollout_engine.hf_checkpoint import read_config

SMALL = ["--shape", "tiny", "--samples", "6", "--prompt-tokens", "5", "--response-tokens", "8", "30", "--repeats", "1"]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_policy_update_writes_a_line(tmp_path: Path) -> None:
    policy_update.main([*SMALL, "--dtype", "float32", "--capture-bytes", "100000", "--out", str(tmp_path / "p.jsonl")])
    (row,) = rows(tmp_path / "p.jsonl")
    assert row["attention"] == "torch scaled-dot-product attention, padded" or torch.cuda.is_available()
    assert row["tokens"] > 6 * 13 and row["tokens_per_s"] > 0
    assert set(row["phases_ms"]) == {"plan", "forward_backward", "optimizer", "rest"}
    assert row["commit"] and row["hardware"]


def test_draft_update_writes_a_line_for_each_dtype(tmp_path: Path) -> None:
    draft_update.main([*SMALL, "--out", str(tmp_path / "d.jsonl")])
    found = rows(tmp_path / "d.jsonl")
    assert [row["compute_dtype"] for row in found] == ["bfloat16", "float32"]
    assert all(row["tokens_per_s"] > 0 and row["counted"]["tflop"] > 0 for row in found)
    assert all(ms >= 0 for row in found for ms in row["phases_ms"].values())  # none counted twice


def test_counted_draft_work_is_what_torch_counts() -> None:
    """Apart from the few rows of each sample that hold no chain."""
    shape = Shape(layers=4, hidden=64, ffn=128, heads=4, kv_heads=2, head_dim=16, vocab=2048)
    args = policy_update.parse(["--samples", "3", "--prompt-tokens", "1", "--response-tokens", "200", "220"])
    samples = rollout(args, shape.vocab)
    draft = Eagle3(Eagle3Config.from_target(shape.hf_config(256), DraftConfig()))
    batch = make_batch(draft_update.captured(samples, shape, torch.float32, "cpu"))
    assert batch is not None
    with FlopCounterMode(display=False) as counter:
        draft_loss(draft, batch, 3, 0.8).loss_sum.backward()
    lengths = [len(s.token_ids) + 1 for s in samples]
    counted = draft_update.count(shape, lengths, unroll=3)["tflop"] * 1e12
    # padded products compute the hidden half of attention's scores too
    counted += 7 * 3 * shape.heads * shape.head_dim * sum(n * n for n in lengths)
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.03)


def test_a_written_policy_has_the_parameters_of_its_shape(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_checkpoint(tmp_path, SHAPES["tiny"], 128, "cpu")
    tensors = load_file(tmp_path / "model.safetensors").values()
    assert sum(t.numel() for t in tensors if t.dim() == 2) == SHAPES["tiny"].num_parameters
    assert read_config(tmp_path)["model_type"] == "qwen3"
