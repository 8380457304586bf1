"""The arms of `benchmarks.sync --engine sglang`: one sync into a running server, and a plain copy of the same bytes.

What is sent are random values of the engine's own plan, from the trainer's device, a new version each time: named,
checksummed, packed, judged by the loader, copied, read back and compared. No request is running meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from benchmarks.common import interleaved, seconds, synchronize
from draft_models.checkpoint import load_draft, save_draft
from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config
from rollout_engine.config import RolloutConfig
from rollout_engine.hf_checkpoint import decoder_config, tensor_shapes
from rollout_engine.sglang_engine import SGLangEngine
from sync.plan import SyncPlan
from sync.publish import publish
from trainer.hf_files import read_config

WARM_UP = 2  # syncs that map memory and compile kernels
# The request's parts are hold, update and flush, and the loader's seconds are part of the update's.
PHASES = ("checksum", "pack", "request", "hold", "update", "loader", "flush")
# Qwen3-0.6B's sizes
SHAPES: dict[str, dict[str, Any]] = {
    "0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
}
Weights = dict[str, torch.Tensor]


def measure_all(args: argparse.Namespace, settings: RolloutConfig) -> list[dict[str, Any]]:
    """Start a server, measure, stop it. Raises EngineError for one that does not start or dies, SyncError."""
    with TemporaryDirectory(dir=args.folder, prefix="slipstream-bench-") as temporary:
        folder = Path(temporary)
        dtype = getattr(torch, args.dtype)
        policy = args.policy or make_policy(folder / "policy", SHAPES[args.shape], dtype)
        hf_config = read_config(policy)
        draft = args.draft or make_draft(folder / "draft", hf_config, dtype)
        is_reduced = load_draft(draft, hf_config).config.is_reduced
        config = replace(
            settings,
            engine="sglang",
            dtype=args.dtype,
            device=args.device,
            sync_transport=args.transport,
            speculative_algorithm="EAGLE3",
            verify_rule="target_only" if is_reduced else "rejection",
            allow_lossy=True,  # nothing is sampled here
        )
        engine = SGLangEngine(
            policy.resolve(), config, draft=draft.resolve(), eos_token_ids=(0,), work_dir=folder / "engine"
        )
        try:
            return measure(engine, load_draft(draft, hf_config), args)
        finally:
            engine.close()


def measure(engine: SGLangEngine, draft: Eagle3, args: argparse.Namespace) -> list[dict[str, Any]]:
    transport = engine.transport
    plan = transport.plan
    policy_source, draft_source = make_sources(plan, draft, torch.device(args.device))
    source = torch.zeros(plan.num_bytes, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    versions = itertools.count(1)

    def sync(_: int) -> dict[str, float]:
        synchronize()
        total_s = publish(policy_source, draft_source, transport, next(versions)).time_s
        phases = dict(transport.phases_s)
        return {"total": total_s, "checksum": total_s - phases["pack"] - phases["request"], **phases}

    arms = {
        "plain copy": lambda _: {"total": seconds(lambda: target.copy_(source))},
        args.transport: sync,
    }
    interleaved(arms, range(WARM_UP))
    measured = interleaved(arms, range(args.repeats))
    return [row_of(arm, runs, measured["plain copy"], plan) for arm, runs in measured.items()]


def row_of(
    arm: str, runs: Sequence[Mapping[str, float]], copies: Sequence[Mapping[str, float]], plan: SyncPlan
) -> dict[str, Any]:
    times_s = [run["total"] for run in runs]
    median_s = statistics.median(times_s)
    return {
        "arm": arm,
        "median_s": median_s,
        "times_s": times_s,
        "over_copy": median_s / statistics.median(run["total"] for run in copies),
        "gib_per_s": plan.num_bytes / median_s / 2**30,
        "num_bytes": plan.num_bytes,
        "num_tensors": len(plan.tensors),
        "phases_s": {phase: statistics.median(run[phase] for run in runs) for phase in PHASES if phase in runs[0]},
    }


def show(out: Console, rows: Sequence[dict[str, Any]]) -> None:
    size = f"{rows[0]['num_bytes'] / 2**20:.1f} MiB in {rows[0]['num_tensors']} tensors"
    table = Table(title=f"sync of policy and draft into SGLang: {size}")
    for head in ("transport", "median ms", "GiB/s", "x plain copy", *(f"{phase} ms" for phase in PHASES)):
        table.add_column(head, justify="left" if head == "transport" else "right")
    for row in rows:
        phases = (f"{row['phases_s'][phase] * 1e3:.2f}" if phase in row["phases_s"] else "" for phase in PHASES)
        figures = (f"{row['median_s'] * 1e3:.2f}", f"{row['gib_per_s']:.2f}", f"{row['over_copy']:.1f}")
        table.add_row(row["arm"], *figures, *phases)
    out.print(table)
    out.print("a request holds running work, updates (the loader's part is in it) and flushes the prefix cache")


def make_sources(plan: SyncPlan, draft: Eagle3, device: torch.device) -> tuple[Weights, Weights]:
    """Random policy and draft of the plan's shapes; the draft's vocabulary map is its own, which may not change."""
    maps = {name: tensor for name, tensor in draft.named_tensors().items() if not tensor.is_floating_point()}
    sources: dict[str, Weights] = {"policy": {}, "draft": {}}
    generator = torch.Generator(device).manual_seed(0)
    for spec in plan.tensors:
        made = maps[spec.name].to(device) if spec.model == "draft" and spec.name in maps else None
        if made is None:
            made = torch.randn(spec.shape, generator=generator, device=device).mul_(0.02).to(spec.dtype)
        sources[spec.model][spec.name] = made
    return sources["policy"], sources["draft"]


def make_policy(folder: Path, config: Mapping[str, Any], dtype: torch.dtype) -> Path:
    """A Hugging Face folder of that shape whose weights are zero: the first sync brings others."""
    folder.mkdir(parents=True)
    name = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": name}, indent=2), encoding="utf-8")
    shapes = tensor_shapes(decoder_config(config))
    weights = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_draft(folder: Path, hf_config: Mapping[str, Any], dtype: torch.dtype) -> Path:
    save_draft(Eagle3(Eagle3Config.from_target(hf_config, DraftConfig())).to(dtype), folder)
    return folder
