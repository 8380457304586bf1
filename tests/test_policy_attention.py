"""Which attention kernel is chosen, and that each is called for causal attention within each packed sequence."""

from __future__ import annotations

import sys
from itertools import accumulate, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor

from trainer import policy_attention
from trainer.policy_attention import (
    Kernel,
    PackedLayout,
    attention_function,
    attention_name,
    choose_kernel,
    installed_kernels,
)

LENGTHS, HEADS, GROUPS, HEAD_DIM, SCALE = (3, 1, 7), 4, 2, 8, 0.3
EVERYTHING = frozenset(Kernel)


def test_the_best_kernel_that_can_run_is_chosen() -> None:
    half, hopper = torch.bfloat16, (9, 0)
    assert choose_kernel(half, hopper, 128, EVERYTHING) is Kernel.FLASH_ATTN
    assert choose_kernel(half, hopper, 128, EVERYTHING - {Kernel.FLASH_ATTN}) is Kernel.TORCH_VARLEN
    assert choose_kernel(half, hopper, 128, {Kernel.PADDED_SDPA}) is Kernel.PADDED_SDPA
    cannot = [(torch.float32, hopper, 128), (half, None, 128), (half, (7, 5), 128), (half, hopper, 512)]
    for dtype, capability, head_dim in [*cannot, (half, hopper, 12)]:
        assert choose_kernel(dtype, capability, head_dim, EVERYTHING) is Kernel.PADDED_SDPA


def test_the_name_says_which() -> None:
    assert attention_name(torch.bfloat16, torch.device("cpu")) == "torch scaled-dot-product attention, padded"


@pytest.mark.parametrize(
    ("files", "is_there"),
    [
        ({}, False),
        ({"cute/__init__.py": ""}, False),  # flash-attn-4 alone: a namespace package with another library in it
        ({"__init__.py": "", "flash_attn_interface.py": ""}, True),
        ({"__init__.py": "raise ImportError('undefined symbol')", "flash_attn_interface.py": ""}, False),
    ],
    ids=["absent", "flash-attn-4", "flash-attn", "built for another torch"],
)
def test_flash_attn_is_known_by_the_module_that_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], is_there: bool
) -> None:
    for name, text in files.items():
        path = tmp_path / "flash_attn" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    installed_kernels.cache_clear()
    try:
        assert (Kernel.FLASH_ATTN in installed_kernels()) == is_there
    finally:
        installed_kernels.cache_clear()
        sys.modules.pop("flash_attn", None)


def one_by_one(query: Tensor, key: Tensor, value: Tensor, ends: list[int], scale: float) -> Tensor:
    """Plain causal attention of each sequence, the key heads repeated."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    parts = []
    for start, end in pairwise(ends):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~torch.ones(end - start, end - start).tril().bool(), -1e9)
        parts.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


def fake_flash_attn(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
    ends_q, ends_k, longest_q, longest_k = rest
    assert longest_q == longest_k == max(LENGTHS) and torch.equal(ends_q, ends_k) and ends_q.dtype == torch.int32
    assert options["causal"] and options["deterministic"] == torch.are_deterministic_algorithms_enabled()
    return one_by_one(q, k, v, ends_q.tolist(), options["softmax_scale"])


def new_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    assert longest_q == longest_k == max(LENGTHS) and window_size == (-1, 0) and enable_gqa and scale is not None
    return one_by_one(q, k, v, ends_q.tolist(), scale)


def old_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    longest_q: int,
    longest_k: int,
    is_causal: bool = False,
) -> Tensor:
    """With neither scale nor grouped heads."""
    assert is_causal and q.shape == k.shape
    return one_by_one(q, k, v, ends_q.tolist(), q.shape[-1] ** -0.5)


@pytest.mark.parametrize("kernel", ["padded", "flash_attn", new_varlen, old_varlen])
def test_every_kernel_is_asked_for_the_same_attention(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    """The CUDA kernels are stood in for by plain attention with their signatures: what is tested is the call."""
    chosen = Kernel.PADDED_SDPA
    if kernel == "flash_attn":
        chosen, module = Kernel.FLASH_ATTN, ModuleType("flash_attn.flash_attn_interface")
        monkeypatch.setattr(module, "flash_attn_varlen_func", fake_flash_attn, raising=False)
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", module)
    elif kernel != "padded":
        chosen = Kernel.TORCH_VARLEN
        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
        policy_attention._varlen_options.cache_clear()
    generator, total = torch.Generator().manual_seed(0), sum(LENGTHS)
    shapes = [(total, HEADS, HEAD_DIM), (total, GROUPS, HEAD_DIM), (total, GROUPS, HEAD_DIM)]
    rows = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    ends = [0, *accumulate(LENGTHS)]
    unused = torch.empty(0)
    layout = PackedLayout(LENGTHS, torch.tensor(ends, dtype=torch.int32), unused, unused)
    out = attention_function(chosen)(*rows, layout, SCALE)
    expected = one_by_one(*rows, ends, SCALE)
    torch.testing.assert_close(out, expected)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    for found, due in zip(
        torch.autograd.grad((out * weight).sum(), rows),
        torch.autograd.grad((expected * weight).sum(), rows),
        strict=True,
    ):
        torch.testing.assert_close(found, due)
    policy_attention._varlen_options.cache_clear()
