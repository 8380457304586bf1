"""Causal attention of draft chains to the text, in a form that can be merged with further keys.

`forward` gives output and log-sum-exp. `backward` takes the output and log-sum-exp of the WHOLE softmax, keys that
stand elsewhere included: with P = exp(scores - lse) and delta = grad . out, the text's part of the gradient is then
exact, and no score has to be kept (FlashAttention's backward, used as ring attention uses it).

Axes: S key rows and Q chains, end to end over B samples; T key rows and C chains of one sample, padded; N query heads,
G KV heads, g = N / G, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from draft_models.chain_batch import DraftBatch, SampleSpan

Gradients = tuple[Tensor, Tensor, Tensor]


class TextAttention(Protocol):
    """Chain c, the i-th last of its sample, sees all key rows of that sample but the i last (i from 0)."""

    def forward(self, q_QND: Tensor, k_SGD: Tensor, v_SGD: Tensor) -> tuple[Tensor, Tensor]:
        """Output [Q, N, D] and log-sum-exp of the scaled scores [Q, N] (float32 or wider)."""

    def backward(
        self, grad_QND: Tensor, q_QND: Tensor, k_SGD: Tensor, v_SGD: Tensor, out_QND: Tensor, lse_QN: Tensor
    ) -> Gradients:
        """Gradients of q, k and v through the text's part of a softmax with this output and log-sum-exp."""


def text_attention(batch: DraftBatch, dtype: torch.dtype, head_dim: int, scale: float) -> TextAttention:
    """FlashAttention where torch has it for these tensors, else padded products, for any dtype and device."""
    if flash_can_run(dtype, batch.chain_key_Q.device, head_dim):
        return FlashText(batch, scale)
    return PaddedText(batch, scale)


def flash_can_run(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
    """Whether torch's own FlashAttention-2 kernels take such queries."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return head_dim % 8 == 0 and head_dim <= 256 and torch.cuda.get_device_capability(device) >= (8, 0)


class FlashText:
    """Torch's FlashAttention-2 on packed rows: nothing is padded, no score is stored. CUDA, half precision."""

    def __init__(self, batch: DraftBatch, scale: float) -> None:
        self._scale = scale
        device = batch.chain_key_Q.device
        self._ends = tuple(
            torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
            for counts in (batch.num_chains, batch.num_keys)
        )
        self._longest = (max(batch.num_chains), max(batch.num_keys))
        self._random_state = torch.zeros(2, dtype=torch.uint64, device=device)  # read only with dropout
        self._unused = torch.empty(0, device=device)

    def forward(self, q_QND: Tensor, k_SGD: Tensor, v_SGD: Tensor) -> tuple[Tensor, Tensor]:
        # With fewer queries than keys the kernel's causal mask lets the last query see every key, as chains need it.
        out_QND, lse_NQ, *_ = torch.ops.aten._flash_attention_forward(
            q_QND, k_SGD, v_SGD, *self._ends, *self._longest, 0.0, True, False, scale=self._scale
        )
        return out_QND, lse_NQ.t()

    def backward(
        self, grad_QND: Tensor, q_QND: Tensor, k_SGD: Tensor, v_SGD: Tensor, out_QND: Tensor, lse_QN: Tensor
    ) -> Gradients:
        grads: Gradients = torch.ops.aten._flash_attention_backward(
            grad_QND.contiguous(),
            q_QND,
            k_SGD,
            v_SGD,
            out_QND,
            lse_QN.t().contiguous(),
            *self._ends,
            *self._longest,
            0.0,
            True,
            self._random_state,
            self._unused,
            scale=self._scale,
        )
        return grads


class PaddedText:
    """Plain products on rows padded to the longest of each span of like length; one span's scores exist at a time."""

    def __init__(self, batch: DraftBatch, scale: float) -> None:
        self._spans = [_PaddedSpan.of(batch, span, scale) for span in batch.spans]

    def forward(self, q_QND: Tensor, k_SGD: Tensor, v_SGD: Tensor) -> tuple[Tensor, Tensor]:
        parts = [
            span.forward(q_QND[span.span.chains], k_SGD[span.span.keys], v_SGD[span.span.keys]) for span in self._spans
        ]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])

    def backward(
        self, grad_QND: Tensor, q_QND: Tensor, k_SGD: Tensor, v_SGD: Tensor, out_QND: Tensor, lse_QN: Tensor
    ) -> Gradients:
        delta_QN = (grad_QND * out_QND).sum(-1, dtype=lse_QN.dtype)
        parts = []
        for padded in self._spans:
            chains, keys = padded.span.chains, padded.span.keys
            rows = (grad_QND[chains], q_QND[chains], k_SGD[keys], v_SGD[keys])
            parts.append(padded.backward(*rows, delta_QN[chains], lse_QN[chains]))
        dq, dk, dv = (torch.cat(grads) for grads in zip(*parts, strict=True))
        return dq, dk, dv


@dataclass(frozen=True, slots=True)
class _PaddedSpan:
    span: SampleSpan
    scale: float
    num_samples: int
    chain_slot: Tensor  # of each chain, in [B, C] flattened
    key_slot: Tensor  # of each key row, in [B, T] flattened
    hidden_BCT: Tensor  # keys behind the chain's start
    chain_shape: tuple[int, int]
    key_shape: tuple[int, int]

    @classmethod
    def of(cls, batch: DraftBatch, span: SampleSpan, scale: float) -> _PaddedSpan:
        num_keys, num_chains = batch.num_keys[span.samples], batch.num_chains[span.samples]
        key_shape, chain_shape = (len(num_keys), max(num_keys)), (len(num_keys), max(num_chains))
        key_slot = torch.arange(max(num_keys)) < torch.tensor(num_keys)[:, None]
        chain_slot = torch.arange(max(num_chains)) < torch.tensor(num_chains)[:, None]
        start_BC = torch.tensor([k - c for k, c in zip(num_keys, num_chains, strict=True)])[:, None]
        start_BC = start_BC + torch.arange(max(num_chains))
        hidden_BCT = torch.arange(max(num_keys)) > start_BC[..., None]
        device = batch.chain_key_Q.device
        return cls(
            span=span,
            scale=scale,
            num_samples=len(num_keys),
            chain_slot=chain_slot.flatten().nonzero()[:, 0].to(device, non_blocking=True),
            key_slot=key_slot.flatten().nonzero()[:, 0].to(device, non_blocking=True),
            hidden_BCT=hidden_BCT.to(device, non_blocking=True),
            chain_shape=chain_shape,
            key_shape=key_shape,
        )

    def forward(self, q_nND: Tensor, k_sGD: Tensor, v_sGD: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self._queries(q_nND, k_sGD.shape[1]), self._keys(k_sGD), self._keys(v_sGD)
        scores = self._scores(q, k)
        lse = scores.logsumexp(-1, keepdim=True)
        out = (scores - lse).exp_().to(v.dtype) @ v
        return self._rows(out), self._rows(lse)[..., 0]

    def backward(
        self, grad_nND: Tensor, q_nND: Tensor, k_sGD: Tensor, v_sGD: Tensor, delta_nN: Tensor, lse_nN: Tensor
    ) -> Gradients:
        num_groups = k_sGD.shape[1]
        q, grad = self._queries(q_nND, num_groups), self._queries(grad_nND, num_groups)
        k, v = self._keys(k_sGD), self._keys(v_sGD)
        lse = self._queries(lse_nN[..., None], num_groups, fill=math.inf)  # no weight in slots without a chain
        weights = (self._scores(q, k) - lse).exp_()
        grad_scores = (grad @ v.transpose(2, 3)).to(weights.dtype) - self._queries(delta_nN[..., None], num_groups)
        grad_scores = grad_scores.mul_(weights).mul_(self.scale).to(k.dtype)
        dq = self._rows(grad_scores @ k)
        dk = self._key_rows(grad_scores.transpose(2, 3) @ q)
        dv = self._key_rows(weights.to(v.dtype).transpose(2, 3) @ grad)
        return dq, dk, dv

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, G, C * g, T], at least float32, -inf where a key is not seen."""
        scores = q @ k.transpose(2, 3)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(self.scale)
        scores.unflatten(2, (self.chain_shape[1], -1)).masked_fill_(self.hidden_BCT[:, None, :, None], -math.inf)
        return scores

    def _queries(self, rows_nNX: Tensor, num_groups: int, fill: float = 0.0) -> Tensor:
        """[n, N, X] to [B, G, C * g, X]."""
        padded = _pad(rows_nNX, self.chain_slot, self.chain_shape, fill)
        return padded.unflatten(2, (num_groups, -1)).transpose(1, 2).flatten(2, 3)

    def _keys(self, rows_sGD: Tensor) -> Tensor:
        """[s, G, D] to [B, G, T, D]."""
        return _pad(rows_sGD, self.key_slot, self.key_shape, 0.0).transpose(1, 2)

    def _rows(self, padded: Tensor) -> Tensor:
        """[B, G, C * g, X] to [n, N, X]."""
        grouped = padded.unflatten(2, (self.chain_shape[1], -1)).transpose(1, 2).flatten(2, 3)
        return grouped.flatten(0, 1).index_select(0, self.chain_slot)

    def _key_rows(self, padded: Tensor) -> Tensor:
        return padded.transpose(1, 2).flatten(0, 1).index_select(0, self.key_slot)


def _pad(rows: Tensor, slot: Tensor, shape: tuple[int, int], fill: float) -> Tensor:
    """Rows [n, ...] at their flat slots of [B, C, ...]."""
    padded = rows.new_full((shape[0] * shape[1], *rows.shape[1:]), fill)
    return padded.index_copy_(0, slot, rows).unflatten(0, shape)
