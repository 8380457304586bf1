"""The two layers that Megatron's local spec lacks, in plain torch: the same code on CPU and CUDA."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn


class RMSNorm(nn.RMSNorm):
    """Megatron's torch norm refuses sequence parallelism; this one marks its weight for the gradient all-reduce."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # read by finalize_model_grads


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


def take_rows(source: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """source[rows] for DISTINCT rows [R] -> [R, ...], with a quick and deterministic gradient."""
    return _TakeRows.apply(source, rows)


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


class PackedCausalAttention(nn.Module):
    """Core attention over packed sequences: padded to [n, heads, L, d], one causal SDPA, packed again.

    Padding is on the right, so the causal mask alone keeps it out of every real row.
    """

    def __init__(self, config: Any, *_: Any, softmax_scale: float | None = None, **__: Any):
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: Any,
        **_: Any,
    ) -> torch.Tensor:
        """query [T, heads, d], key and value [T, groups, d], already rotated -> [T, heads * d]."""
        lengths = tuple(packed_seq_params.cu_seqlens_q.diff().tolist())
        to_padded, to_packed = _pad_indices(lengths, query.device)
        q, k, v = (
            _Pad.apply(x, to_padded, to_packed).unflatten(0, (len(lengths), -1)).transpose(1, 2)
            for x in (query, key, value)
        )
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return take_rows(out.transpose(1, 2).flatten(2).flatten(0, 1), to_packed)
