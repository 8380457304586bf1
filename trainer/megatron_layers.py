"""The two layers that Megatron's local spec lacks, in plain torch: the same code on CPU and CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from draft_models.layers import apply_rope
from trainer.policy_attention import PackedLayout, attention_function, kernel_for


class RMSNorm(nn.RMSNorm):
    """Megatron's torch norm refuses sequence parallelism; this one marks its weight for the gradient all-reduce."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # read by finalize_model_grads


class PackedCausalAttention(nn.Module):
    """Core attention over packed sequences, and their rotary embedding.

    The rotation is done here, on all packed tokens at once: Megatron's own takes the sequences one by one, in every
    layer, and reads their lengths back from the device for it.
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
        """query [T, heads, d], key and value [T, groups, d], not rotated yet -> [T, heads * d]."""
        layout: PackedLayout = packed_seq_params.layout
        query, key = (apply_rope(x, layout.cos_T1D, layout.sin_T1D) for x in (query, key))
        attend = attention_function(kernel_for(query.dtype, query.device, query.shape[-1]))
        return attend(query, key, value, layout, self.scale).flatten(1)
