"""Attention of draft chains in training: a text's step-0 keys, and each chain's own keys of later steps.

Axes: B samples, S key rows and n chains end to end; T key rows and C chains of one sample, padded; N query heads, G KV
heads, g = N / G, D head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from draft_models.chain_batch import DraftBatch, SampleSpan
from draft_models.eagle3 import Eagle3, Rope
from draft_models.layers import FAST


class ChainAttention:
    """Attention of every chain, step by step. Projections see all rows at once; padding is per span of like length."""

    def __init__(self, draft: Eagle3, batch: DraftBatch, x_S2H: Tensor) -> None:
        """`x_S2H`: the attention input of every key row at step 0."""
        self._draft = draft
        self._position_Q = batch.chain_position_Q
        k_SGD, v_SGD = self._keys_values(x_S2H, draft.rope(batch.key_position_S[None]))
        self._spans = [_SpanAttention(draft.attention_scale, batch, span, k_SGD, v_SGD) for span in batch.spans]
        self._chain_ends = torch.tensor([span.chains.stop for span in batch.spans], device=x_S2H.device)

    def run(self, step: int, chain_n: Tensor, x_n2H: Tensor) -> Tensor:
        """Attention output [n, N * D] of step `step` (each step once, in order); `chain_n` ascends."""
        rope = self._draft.rope(self._position_Q[None, chain_n] + step)
        ends = torch.searchsorted(chain_n, self._chain_ends).tolist()
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        chains = chain_n.split(sizes)
        queries = self._draft.queries(x_n2H[None], rope)[0].split(sizes)
        if step == 0:
            parts = zip(self._spans, chains, queries, strict=True)
            return torch.cat([span.attend_text(chain, q) for span, chain, q in parts])
        k_nGD, v_nGD = self._keys_values(x_n2H, rope)
        own_parts = zip(self._spans, chains, queries, k_nGD.split(sizes), v_nGD.split(sizes), strict=True)
        return torch.cat([span.attend_chain(chain, q, k, v) for span, chain, q, k, v in own_parts])

    def _keys_values(self, x_n2H: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        k, v = self._draft.keys_values(x_n2H[None], rope)
        return k[0], v[0]


class _SpanAttention:
    """The chains of some samples, on rows padded to the longest of them."""

    def __init__(self, scale: float, batch: DraftBatch, span: SampleSpan, k_SGD: Tensor, v_SGD: Tensor) -> None:
        self._scale, self._first_chain = scale, span.chains.start
        num_samples = span.samples.stop - span.samples.start
        key_sample, key_position = batch.key_sample_S[span.keys] - span.samples.start, batch.key_position_S[span.keys]
        key_shape = (num_samples, int(key_position.max()) + 1)
        key_slot = key_sample * key_shape[1] + key_position
        self._k_BGTD = _pad(k_SGD[span.keys], key_slot, key_shape).transpose(1, 2)
        self._v_BGTD = _pad(v_SGD[span.keys], key_slot, key_shape).transpose(1, 2)
        self._shape = (num_samples, int(batch.num_chains_B[span.samples].max()))
        chain_sample = batch.chain_sample_Q[span.chains] - span.samples.start
        self._slot_Q = chain_sample * self._shape[1] + batch.chain_rank_Q[span.chains]
        # Slots without a chain look at key 0: finite, and never read.
        self._start_BC = _pad(batch.chain_position_Q[span.chains], self._slot_Q, self._shape)
        self._own: list[tuple[Tensor, Tensor]] = []  # keys and values of steps 1, 2, .., each [B, G, C, 1, D]

    def attend_text(self, chain_n: Tensor, q_nND: Tensor) -> Tensor:
        """Step 0: causal attention over the text."""
        slot_n = self._slot_Q[chain_n - self._first_chain]
        q_BCND = _pad(q_nND, slot_n, self._shape)
        out_BCD = FAST.attend(q_BCND, self._k_BGTD, self._v_BGTD, self._start_BC, self._scale)
        return out_BCD.flatten(0, 1)[slot_n]

    def attend_chain(self, chain_n: Tensor, q_nND: Tensor, k_nGD: Tensor, v_nGD: Tensor) -> Tensor:
        """A later step: the text up to the chain's start, then the chain's own keys, these ones last."""
        slot_n = self._slot_Q[chain_n - self._first_chain]
        k_BGCD, v_BGCD = (_pad(x, slot_n, self._shape).transpose(1, 2) for x in (k_nGD, v_nGD))
        self._own.append((k_BGCD.unsqueeze(3), v_BGCD.unsqueeze(3)))
        num_kv_heads, num_keys = self._k_BGTD.shape[1:3]
        q_BCND = _pad(q_nND * self._scale, slot_n, self._shape)
        q_BGCgD = q_BCND.unflatten(2, (num_kv_heads, -1)).transpose(1, 2)
        group_rows = q_BGCgD.shape[2:4]
        scores = (q_BGCgD.flatten(2, 3) @ self._k_BGTD.transpose(2, 3)).unflatten(2, group_rows)
        hidden_BCT = torch.arange(num_keys, device=q_nND.device) > self._start_BC[..., None]
        scores = scores.masked_fill(hidden_BCT[:, None, :, None], -math.inf)
        own_scores = [(q_BGCgD * k).sum(-1, keepdim=True) for k, _ in self._own]
        weights = torch.cat([scores, *own_scores], dim=-1).softmax(-1)
        out = (weights[..., :num_keys].flatten(2, 3) @ self._v_BGTD).unflatten(2, group_rows)
        for index, (_, v) in enumerate(self._own):
            out = out + weights[..., num_keys + index, None] * v
        return out.transpose(1, 2).flatten(2).flatten(0, 1)[slot_n]


def _pad(rows: Tensor, slot: Tensor, shape: tuple[int, int]) -> Tensor:
    """Rows [n, ...] at their flat slots of zeros [B, C, ...]."""
    return rows.new_zeros(shape[0] * shape[1], *rows.shape[1:]).index_copy(0, slot, rows).unflatten(0, shape)
