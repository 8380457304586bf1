"""The Megatron policy on one GPU: bfloat16, flash attention, distributed optimizer, recompute, bounded capture."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout_engine.types import Sample
from tests.policy_helpers import rollout, save_checkpoint
from trainer.config import AlgorithmConfig, PolicyConfig
from trainer.megatron_policy import MegatronPolicy
from trainer.policy_attention import Kernel, PackedLayout, attention_function, kernel_for
from trainer.policy_capture import CaptureSpec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
GPU = torch.device("cuda")
EXACT = PolicyConfig(lr=1e-2, clip_grad=0.0, max_tokens_per_gpu=64)
PRODUCTION = replace(EXACT, dtype="bfloat16", use_distributed_optimizer=True, recompute=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("qwen3"))


def make_policy(checkpoint: Path, config: PolicyConfig, **algorithm: Any) -> MegatronPolicy:
    return MegatronPolicy(config, AlgorithmConfig(**algorithm), checkpoint, train_iters=10)


def weights(policy: MegatronPolicy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.export_weights().items()}


def relative_errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {name: float((found[name].float() - g.float()).norm() / g.float().norm()) for name, g in expected.items()}


def gradients(policy: MegatronPolicy, samples: list[Sample]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """On one rank the distributed optimizer's share is everything."""
    metrics = policy.update(samples).metrics
    return {name: tensor.clone() for name, tensor in policy.export_gradients().items()}, metrics


def test_bfloat16_runs_in_a_flash_kernel_and_float32_does_not() -> None:
    assert kernel_for(torch.bfloat16, GPU, 64) in (Kernel.FLASH_ATTN, Kernel.TORCH_VARLEN)
    assert kernel_for(torch.float32, GPU, 64) is Kernel.PADDED_SDPA


@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_flash_kernel_equals_padded_attention(head_dim: int) -> None:
    """Output and gradients, grouped heads, sequences of one token and beyond a tile."""
    lengths = (1, 130, 7, 257)
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(GPU)
    unused = torch.empty(0)
    layout = PackedLayout(lengths, ends, unused, unused)
    generator = torch.Generator(GPU).manual_seed(0)
    shapes = [(sum(lengths), heads, head_dim) for heads in (6, 2, 2)]
    rows = [torch.randn(shape, generator=generator, device=GPU).bfloat16() for shape in shapes]
    weight = torch.randn(shapes[0], generator=generator, device=GPU)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [x.to(dtype).requires_grad_() for x in rows]
        out = attention_function(kernel_for(dtype, GPU, head_dim))(*inputs, layout, None)
        found.append((out.float(), *torch.autograd.grad((out * weight).sum(), inputs)))
    for flash, exact in zip(*found, strict=True):
        assert float((flash.float() - exact).norm() / exact.norm()) < 2e-2


def test_production_step_is_near_the_exact_one(checkpoint: Path) -> None:
    samples = rollout()
    exact, exact_metrics = gradients(make_policy(checkpoint, EXACT, entropy_coef=0.01), samples)
    rough, rough_metrics = gradients(make_policy(checkpoint, PRODUCTION, entropy_coef=0.01), samples)
    assert rough_metrics["loss"] == pytest.approx(exact_metrics["loss"], rel=2e-2, abs=2e-2)
    assert rough_metrics["entropy"] == pytest.approx(exact_metrics["entropy"], rel=1e-2)
    assert rough_metrics["grad_norm"] == pytest.approx(exact_metrics["grad_norm"], rel=5e-2)
    errors = relative_errors(rough, exact)
    assert max(errors.values()) < 0.15, errors


def test_recompute_takes_the_same_step(checkpoint: Path, deterministic: None) -> None:
    plain, _ = gradients(make_policy(checkpoint, replace(PRODUCTION, recompute=False)), rollout())
    again, _ = gradients(make_policy(checkpoint, PRODUCTION), rollout())
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_resume_equals_an_unbroken_run(checkpoint: Path, tmp_path: Path, deterministic: None) -> None:
    config = replace(PRODUCTION, clip_grad=1.0, lr_warmup_iters=2, lr_decay_style="cosine", weight_decay=0.1)
    policy = make_policy(checkpoint, config)
    for seed in range(2):
        policy.update(rollout(seed=seed))
    policy.save(tmp_path / "state")
    saved = weights(policy)
    unbroken = [policy.update(rollout(seed=seed)).metrics for seed in (2, 3)]

    resumed = make_policy(checkpoint, config)
    resumed.load(tmp_path / "state")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in resumed.export_weights().items())
    assert [resumed.update(rollout(seed=seed)).metrics for seed in (2, 3)] == unbroken
    final = policy.export_weights()
    assert all(torch.equal(tensor, final[name]) for name, tensor in resumed.export_weights().items())


def test_capture_stays_within_its_bytes(checkpoint: Path) -> None:
    policy, samples = make_policy(checkpoint, PRODUCTION), rollout(16, 8)
    everything = policy.update(samples, CaptureSpec((0, 1, 3), 1 << 30))
    limit = sum(s.num_bytes for s in everything.draft_samples) // 2
    head = everything.draft_samples[0].target_head
    head_bytes = head.numel() * head.element_size()
    del everything, head
    gc.collect()
    before = torch.cuda.memory_allocated()
    update = policy.update(samples, CaptureSpec((0, 1, 3), limit))
    gc.collect()
    held = torch.cuda.memory_allocated() - before
    assert update.metrics["draft_samples_dropped"] > 0
    # the allocator rounds each tensor up to 512 bytes, and a micro-batch holds several
    rounding = 512 * 8 * (len(update.draft_samples) + 1)
    assert 0 < held <= limit + head_bytes + rounding
