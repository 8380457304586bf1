"""Attention of draft chains in training: a text's step-0 keys, and each chain's own keys of later steps.

Axes: S key rows and Q chains end to end over the samples; J own keys of every chain; N query heads, G KV heads,
g = N / G, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from draft_models.chain_batch import DraftBatch
from draft_models.eagle3 import Eagle3, Rope
from draft_models.layers import Numerics
from draft_models.text_attention import TextAttention, text_attention


class ChainAttention:
    """Attention of every chain, step by step. No score is kept for the backward pass."""

    def __init__(self, draft: Eagle3, batch: DraftBatch, x_S2H: Tensor, numerics: Numerics) -> None:
        """`x_S2H`: the attention input of every key row at step 0."""
        self._draft, self._batch, self._numerics = draft, batch, numerics
        self._k_SGD, self._v_SGD = self._keys_values(x_S2H, draft.rope(batch.key_position_S[None]))
        self._text = text_attention(batch, self._v_SGD.dtype, draft.config.head_dim, draft.attention_scale)
        self._own_k: list[Tensor] = []  # [Q, G, D] of steps 1, 2, ..
        self._own_v: list[Tensor] = []

    def run(self, step: int, x_Q2H: Tensor) -> Tensor:
        """Attention output [Q, N * D] of step `step`: each step once, in order."""
        rope = self._draft.rope(self._batch.position_at(step)[None])
        q_QND = self._draft.queries(x_Q2H[None], rope, self._numerics)[0].to(self._v_SGD.dtype)
        if step > 0:
            k_QGD, v_QGD = self._keys_values(x_Q2H, rope)
            self._own_k.append(k_QGD)
            self._own_v.append(v_QGD)
        own = (*self._own_k, *self._own_v)
        scale = self._draft.attention_scale
        return _MergedAttention.apply(self._text, scale, q_QND, self._k_SGD, self._v_SGD, *own).flatten(1)

    def _keys_values(self, x_n2H: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        k, v = self._draft.keys_values(x_n2H[None], rope, self._numerics)
        return k[0].to(v.dtype), v[0]


class _MergedAttention(torch.autograd.Function):
    """One softmax over the text's keys and a chain's own. Its output [Q, N, D]; memory is linear in the tokens.

    `own` are the chain's J keys and then its J values, [Q, G, D] each: apart, so that what the steps keep for the
    backward pass is these tensors themselves, not a copy of all of them for every step.
    """

    @staticmethod
    def forward(
        ctx: Any, text: TextAttention, scale: float, q_QND: Tensor, k_SGD: Tensor, v_SGD: Tensor, *own: Tensor
    ) -> Tensor:
        own_k, own_v = own[: len(own) // 2], own[len(own) // 2 :]
        out_QND, text_lse_QN = text.forward(q_QND, k_SGD, v_SGD)
        lse_QN = text_lse_QN
        if own:
            scores_JQN = _own_scores(q_QND, own_k, scale)
            lse_QN = torch.cat([text_lse_QN[None], scores_JQN]).logsumexp(0)
            merged = out_QND * (text_lse_QN - lse_QN).exp_()[..., None]
            weights_JQN = (scores_JQN - lse_QN).exp_()
            for weight_QN, v_QGD in zip(weights_JQN, own_v, strict=True):
                merged.unflatten(1, (v_QGD.shape[1], -1)).add_(_grouped(weight_QN, v_QGD) * v_QGD[:, :, None])
            out_QND = merged.to(q_QND.dtype)
        ctx.text, ctx.scale = text, scale
        ctx.save_for_backward(q_QND, k_SGD, v_SGD, out_QND, lse_QN, *own)
        return out_QND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_QND, k_SGD, v_SGD, out_QND, lse_QN, *own = ctx.saved_tensors
        own_k, own_v = own[: len(own) // 2], own[len(own) // 2 :]
        grad_QND = grads[0]
        dq_QND, dk_SGD, dv_SGD = ctx.text.backward(grad_QND, q_QND, k_SGD, v_SGD, out_QND, lse_QN)
        down_k, down_v = [], []
        if own:
            delta_QN = (grad_QND * out_QND).sum(-1, dtype=lse_QN.dtype)
            weights_JQN = (_own_scores(q_QND, own_k, ctx.scale) - lse_QN).exp_()
            group = (k_SGD.shape[1], -1)
            q_QGgD, grad_QGgD = q_QND.unflatten(1, group), grad_QND.unflatten(1, group)
            dq_QGgD = dq_QND.unflatten(1, group).to(lse_QN.dtype)
            for weights_QN, k_QGD, v_QGD in zip(weights_JQN, own_k, own_v, strict=True):
                weight = _grouped(weights_QN, v_QGD)
                grad_weight = (grad_QGgD * v_QGD[:, :, None]).sum(-1, keepdim=True, dtype=lse_QN.dtype)
                grad_score = weight * (grad_weight - _grouped(delta_QN, v_QGD)) * ctx.scale
                dq_QGgD = dq_QGgD + grad_score * k_QGD[:, :, None]
                down_k.append((grad_score * q_QGgD).sum(2).to(k_QGD.dtype))
                down_v.append((weight * grad_QGgD).sum(2).to(v_QGD.dtype))
            dq_QND = dq_QGgD.flatten(1, 2).to(q_QND.dtype)
        return None, None, dq_QND, dk_SGD, dv_SGD, *down_k, *down_v


def _own_scores(q_QND: Tensor, own_k: Sequence[Tensor], scale: float) -> Tensor:
    """Scaled scores [J, Q, N] of each chain's own keys, at least float32."""
    wide = torch.promote_types(q_QND.dtype, torch.float32)
    q_QGgD = q_QND.unflatten(1, (own_k[0].shape[1], -1))
    rows = [(q_QGgD * k_QGD[:, :, None]).sum(-1, dtype=wide).flatten(1) for k_QGD in own_k]
    return torch.stack(rows).mul_(scale)


def _grouped(values_QN: Tensor, like_QGD: Tensor) -> Tensor:
    """[Q, N] as [Q, G, g, 1]."""
    return values_QN.unflatten(1, (like_QGD.shape[1], -1))[..., None]
