"""Causal attention of draft chains to the text, in a form that can be merged with further keys.

`forward` gives output and log-sum-exp. `backward` takes the output and log-sum-exp of the WHOLE softmax, keys that
stand elsewhere included: with P = exp(scores - lse) and delta = grad . out, the text's part of the gradient is then
exact, and no score has to be kept (FlashAttention's backward, used as ring attention uses it).

Axes: S key rows and Q chains, end to end over B samples; T key rows and C chains of one sample, padded; N query heads,
G KV heads, g = N / G, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from draft_models.chain_batch import DraftBatch, SampleSpan

Gradients = tuple[Tensor, Tensor, Tensor]
_SCORE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}  # of one block; bounds memory whatever the text's length


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
    """Plain products on rows padded to the longest of each span of like length, a bounded block of scores at a time."""

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
class _Block:
    """Chains `chains` of every sample of a span, and how many of its keys they can see at most."""

    chains: slice
    num_keys: int


@dataclass(frozen=True, slots=True)
class _PaddedSpan:
    span: SampleSpan
    scale: float
    chain_slot: Tensor  # of each chain, in [B, C] flattened
    key_slot: Tensor  # of each key row, in [B, T] flattened
    start_B1: Tensor  # the key row where a sample's first chain starts
    last_start: int  # the greatest of them
    chain_shape: tuple[int, int]
    key_shape: tuple[int, int]

    @classmethod
    def of(cls, batch: DraftBatch, span: SampleSpan, scale: float) -> _PaddedSpan:
        num_keys, num_chains = batch.num_keys[span.samples], batch.num_chains[span.samples]
        key_shape, chain_shape = (len(num_keys), max(num_keys)), (len(num_keys), max(num_chains))
        key_slot = torch.arange(max(num_keys)) < torch.tensor(num_keys)[:, None]
        chain_slot = torch.arange(max(num_chains)) < torch.tensor(num_chains)[:, None]
        starts = [k - c for k, c in zip(num_keys, num_chains, strict=True)]
        device = batch.chain_key_Q.device
        return cls(
            span=span,
            scale=scale,
            chain_slot=chain_slot.flatten().nonzero()[:, 0].to(device, non_blocking=True),
            key_slot=key_slot.flatten().nonzero()[:, 0].to(device, non_blocking=True),
            start_B1=torch.tensor(starts)[:, None].to(device, non_blocking=True),
            last_start=max(starts),
            chain_shape=chain_shape,
            key_shape=key_shape,
        )

    def forward(self, q_nND: Tensor, k_sGD: Tensor, v_sGD: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self._queries(q_nND, k_sGD.shape[1]), self._keys(k_sGD), self._keys(v_sGD)
        outs, lses = [], []
        for block in self._blocks(q_nND.shape[1]):
            scores = self._scores(block, q, k)
            lse = scores.logsumexp(-1, keepdim=True)
            outs.append((scores - lse).exp_().to(v.dtype) @ v[:, :, : block.num_keys])
            lses.append(lse)
        return self._rows(torch.cat(outs, dim=2)), self._rows(torch.cat(lses, dim=2))[..., 0]

    def backward(
        self, grad_nND: Tensor, q_nND: Tensor, k_sGD: Tensor, v_sGD: Tensor, delta_nN: Tensor, lse_nN: Tensor
    ) -> Gradients:
        num_groups = k_sGD.shape[1]
        q, grad = self._queries(q_nND, num_groups), self._queries(grad_nND, num_groups)
        k, v = self._keys(k_sGD), self._keys(v_sGD)
        lse = self._queries(lse_nN[..., None], num_groups, fill=math.inf)  # no weight in slots without a chain
        delta = self._queries(delta_nN[..., None], num_groups)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block in self._blocks(q_nND.shape[1]):
            rows, keys = self._rows_of(block, q), slice(block.num_keys)
            weights = (self._scores(block, q, k) - lse[:, :, rows]).exp_()
            grad_scores = (grad[:, :, rows] @ v[:, :, keys].transpose(2, 3)).to(weights.dtype).sub_(delta[:, :, rows])
            grad_scores = grad_scores.mul_(weights).mul_(self.scale).to(k.dtype)
            dq[:, :, rows] = grad_scores @ k[:, :, keys]
            dk[:, :, keys] += grad_scores.transpose(2, 3) @ q[:, :, rows]
            dv[:, :, keys] += weights.to(v.dtype).transpose(2, 3) @ grad[:, :, rows]
        return self._rows(dq), self._key_rows(dk), self._key_rows(dv)

    def _blocks(self, num_heads: int) -> Iterator[_Block]:
        """Chains in blocks whose scores stay within `_SCORE_ELEMENTS`, or of one chain; keys that none sees are left
        out, about half of the products of a long text."""
        (num_samples, num_chains), longest = self.chain_shape, self.key_shape[1]
        size = max(1, _SCORE_ELEMENTS[self.chain_slot.device.type] // (num_samples * num_heads * longest))
        for first in range(0, num_chains, size):
            end = min(first + size, num_chains)
            yield _Block(slice(first, end), min(longest, self.last_start + end))

    def _scores(self, block: _Block, q: Tensor, k: Tensor) -> Tensor:
        """[B, G, c * g, t] of a block, at least float32, -inf where a key is not seen."""
        scores = q[:, :, self._rows_of(block, q)] @ k[:, :, : block.num_keys].transpose(2, 3)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(self.scale)
        chain_c = torch.arange(block.chains.start, block.chains.stop, device=q.device)
        last_seen_Bc = self.start_B1 + chain_c
        hidden_Bct = torch.arange(block.num_keys, device=q.device) > last_seen_Bc[..., None]
        scores.unflatten(2, (len(chain_c), -1)).masked_fill_(hidden_Bct[:, None, :, None], -math.inf)
        return scores

    def _rows_of(self, block: _Block, q: Tensor) -> slice:
        """Of a block's queries, in the axis of chains and heads of a group."""
        group = q.shape[2] // self.chain_shape[1]
        return slice(block.chains.start * group, block.chains.stop * group)

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
