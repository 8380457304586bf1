"""Causal attention over packed sequences: which kernel runs, and how each is called. Imports no Megatron.

In order of preference: the flash_attn package, torch's own variable-length attention (torch >= 2.10, FlashAttention-2
kernels), padded scaled-dot-product attention. The first two need CUDA and half precision. Transformer Engine is neither
needed nor used.

Axes: T packed tokens, D head size.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, lru_cache
from typing import Any

import torch
from torch import nn


class Kernel(StrEnum):
    FLASH_ATTN = "flash_attn"
    TORCH_VARLEN = "torch_varlen"
    PADDED_SDPA = "padded_sdpa"


_LONG_NAMES = {
    Kernel.FLASH_ATTN: "flash_attn package, packed",
    Kernel.TORCH_VARLEN: "torch variable-length attention (FlashAttention-2), packed",
    Kernel.PADDED_SDPA: "torch scaled-dot-product attention, padded",
}


def choose_kernel(
    dtype: torch.dtype, capability: tuple[int, int] | None, head_dim: int, installed: Collection[Kernel]
) -> Kernel:
    """The best kernel for these heads. `capability` is the GPU's; None on the CPU. Pure."""
    flash_runs = capability is not None and capability >= (8, 0) and dtype in (torch.bfloat16, torch.float16)
    if flash_runs and head_dim % 8 == 0 and head_dim <= 256:
        for kernel in (Kernel.FLASH_ATTN, Kernel.TORCH_VARLEN):
            if kernel in installed:
                return kernel
    return Kernel.PADDED_SDPA


@cache
def installed_kernels() -> frozenset[Kernel]:
    """What this Python has, whether or not the machine can run it."""
    found = {Kernel.PADDED_SDPA}
    if _has_flash_attn():
        found.add(Kernel.FLASH_ATTN)
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        found.add(Kernel.TORCH_VARLEN)
    return frozenset(found)


def _has_flash_attn() -> bool:
    """Whether FlashAttention-2's functions are there. The module is asked for, not the package: flash-attn-4, which
    SGLang brings, puts another library into a namespace package of the same name."""
    try:
        return importlib.util.find_spec("flash_attn.flash_attn_interface") is not None
    except ImportError:  # no such package, or one that was built for another torch and does not load
        return False


def kernel_for(dtype: torch.dtype, device: torch.device, head_dim: int) -> Kernel:
    """`choose_kernel` for this machine."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return choose_kernel(dtype, capability, head_dim, installed_kernels())


def attention_name(dtype: torch.dtype, device: torch.device, head_dim: int = 128) -> str:
    """For people: the kernel that a policy of this dtype trains with on this device."""
    return _LONG_NAMES[kernel_for(dtype, device, head_dim)]


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where sequences lie among the packed tokens, and the rotation of each token. The same for every layer."""

    lengths: tuple[int, ...]
    ends: torch.Tensor  # int32 [n + 1] on the device: 0, then one past each sequence
    cos_T1D: torch.Tensor
    sin_T1D: torch.Tensor  # signed, see `draft_models.layers.RopeTable`

    @property
    def longest(self) -> int:
        return max(self.lengths)


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PackedLayout, float | None], torch.Tensor]


def attention_function(kernel: Kernel) -> Attention:
    """(query [T, heads, D], key and value [T, groups, D], layout, scale or None for 1 / sqrt(D)) -> [T, heads, D]."""
    return {
        Kernel.FLASH_ATTN: _flash_attn,
        Kernel.TORCH_VARLEN: _torch_varlen,
        Kernel.PADDED_SDPA: _padded_sdpa,
    }[kernel]


def _flash_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, scale: float | None
) -> torch.Tensor:
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    out: torch.Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        layout.ends,
        layout.ends,
        layout.longest,
        layout.longest,
        softmax_scale=scale,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out


@cache
def _varlen_options() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _torch_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, scale: float | None
) -> torch.Tensor:
    """The op reads torch's deterministic mode itself. Its keywords have changed between releases of torch."""
    from torch.nn.attention.varlen import varlen_attn

    known = _varlen_options()
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    elif query.shape[1] != key.shape[1]:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    if scale is not None and "scale" in known:
        options["scale"] = scale
    elif scale is not None:
        query = query * (scale * math.sqrt(query.shape[-1]))
    out: torch.Tensor = varlen_attn(
        query, key, value, layout.ends, layout.ends, layout.longest, layout.longest, **options
    )
    return out


def _padded_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, scale: float | None
) -> torch.Tensor:
    """Padded to [n, heads, L, D] on the right, so that the causal mask alone keeps padding out of every real row."""
    to_padded, to_packed = _pad_indices(layout.lengths, query.device)
    q, k, v = (
        _Pad.apply(x, to_padded, to_packed).unflatten(0, (len(layout.lengths), -1)).transpose(1, 2)
        for x in (query, key, value)
    )
    out = nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return _TakeRows.apply(out.transpose(1, 2).flatten(0, 1), to_packed)


class _TakeRows(torch.autograd.Function):
    """`index_select` of distinct rows. Autograd's own backward cannot know that and adds element by element."""

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = source.shape[0]
        return source.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rows,) = ctx.saved_tensors
        grad_source = grads[0].new_zeros(ctx.num_rows, *grads[0].shape[1:])
        return grad_source.index_copy_(0, rows, grads[0]), None


class _Pad(torch.autograd.Function):
    """Packed rows [T, ...] to padded positions [n * L, ...]; no gradient comes from the padding."""

    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor, to_padded: torch.Tensor, to_packed: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(to_packed)
        return packed.index_select(0, to_padded)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


@lru_cache(maxsize=64)
def _pad_indices(lengths: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed row of each padded position [n * L], and padded position of each packed row [T].

    Padded positions repeat their sequence's last row: finite values that no real query sees and no gradient reaches.
    """
    longest = max(lengths)
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    steps = torch.arange(longest)
    lasts = torch.tensor(lengths) - 1
    to_padded = (starts[:, None] + torch.minimum(steps[None], lasts[:, None])).flatten()
    to_packed = (steps[None] <= lasts[:, None]).flatten().nonzero()[:, 0]
    return to_padded.to(device), to_packed.to(device)
