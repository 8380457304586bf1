"""One training step of the EAGLE-3 draft on rolled-out sequences, on tensors alone.

The draft is unrolled as the engine runs it (EAGLE-3's "training-time test"): a chain that starts at row t reads the
target's hidden states once and then its own states. Its step j takes the token x_{t+1+j}, has RoPE position t + j, sees
the step-0 keys of rows 0..t and its own keys of steps 1..j, and predicts x_{t+2+j}.

Every chain runs for all steps, also beyond the end of its text (a few rows of each sample), so that all shapes are
known and nothing waits for the device; what lies beyond is not counted and has no gradient.

Axes: S key rows (every row that a chain may see), Q chains, K unroll steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from draft_models.chain_attention import ChainAttention
from draft_models.chain_batch import DraftBatch, make_batch, split_by_tokens
from draft_models.eagle3 import Eagle3
from draft_models.head_loss import HeadTask, accept_rows, head_loss
from draft_models.layers import FAST, MixedNumerics, Numerics
from draft_models.losses import LossKind
from draft_models.types import VerifyRule

__all__ = ["DraftBatch", "DraftLoss", "accept_posteriors", "draft_loss", "make_batch", "split_by_tokens", "unroll"]


def unroll(draft: Eagle3, batch: DraftBatch, depth: int, numerics: Numerics = FAST) -> Iterator[Tensor]:
    """The pre-norm states [Q, H] of each of `depth` steps; differentiable in the draft's weights.

    They mean something for chains with steps_left_Q > step, and are finite for the others.
    """
    dtype = draft.lm_head.weight.dtype
    embeds_SH = batch.key_embeds_SH.to(dtype)
    hidden_SH = draft.fuse(batch.key_aux_SA.to(dtype), numerics).to(dtype)  # the residual stream is not rounded
    x_S2H = draft.attention_input(embeds_SH, hidden_SH, numerics)
    attention = ChainAttention(draft, batch, x_S2H, numerics)
    hidden_QH, x_Q2H = (rows.index_select(0, batch.chain_key_Q) for rows in (hidden_SH, x_S2H))
    for step in range(depth):
        state_QH = draft.finish(attention.run(step, x_Q2H), hidden_QH, numerics)
        yield state_QH
        if step + 1 == depth:
            return
        hidden_QH = state_QH
        next_row_Q = batch.chain_key_Q + batch.ahead(step + 1)
        x_Q2H = draft.attention_input(embeds_SH.index_select(0, next_row_Q), hidden_QH, numerics)


@dataclass(frozen=True, slots=True)
class DraftLoss:
    """Sums, so that data-parallel ranks can divide by the global count. Those by step are float64 [K], no gradient."""

    loss_sum: Tensor  # scalar with gradient: sum over steps j of step_decay**j * loss, by the batch's weights
    counts: tuple[int, ...]  # chains inside their text, by step
    kl_K: Tensor
    overlap_K: Tensor  # see `losses.Comparison`
    top1_K: Tensor
    agree_K: Tensor
    accept_K: Tensor | None  # the rule's own acceptance, see `losses.acceptance`; None when not asked for
    posterior_QK: Tensor | None  # see `accept_posteriors`; None when not asked for

    @property
    def token_count(self) -> int:
        """Chains, i.e. rows of step 0: what `loss_sum` is to be divided by where the batch has no weights."""
        return self.counts[0]


def draft_loss(
    draft: Eagle3,
    batch: DraftBatch,
    depth: int,
    step_decay: float,
    rule: VerifyRule | None = None,
    *,
    loss: LossKind | None = LossKind.FORWARD_KL,
    posteriors: bool = True,
    product_dtype: torch.dtype | None = None,
) -> DraftLoss:
    """`loss` of `depth` unrolled steps against the target at the rollout's temperature.

    Greedy samples are compared at temperature 1. With `rule` the same forward also gives `accept_K` (of a large batch
    under the coupled rule estimated from some of its rows: it sorts the vocabulary), and, unless `posteriors` is off,
    `posterior_QK`, what the acceptance forecast needs. With `loss` None that alone is computed: the sums are zero.
    `product_dtype` (bfloat16, say) is that of the matrix products' operands; None is the weights' own. Weights, norms,
    residual stream, softmax and loss keep the weights' dtype.
    """
    dtype = draft.lm_head.weight.dtype
    product_dtype = product_dtype or dtype
    numerics = FAST if product_dtype == dtype else MixedNumerics(product_dtype)
    # Step j of a chain meets target row chain + j: rolled by j, all steps of a row stand together.
    states = [state_QH.roll(step, 0) for step, state_QH in enumerate(unroll(draft, batch, depth, numerics))]
    inside_KQ = batch.chain_rank_Q >= torch.arange(depth, device=batch.chain_rank_Q.device)[:, None]
    decay_K1 = torch.tensor([[step_decay**step] for step in range(depth)], dtype=dtype)
    weight_KQ = decay_K1.to(inside_KQ.device, non_blocking=True) * inside_KQ
    if batch.weight_Q is not None:  # a row's steps stand together and predict the same token
        weight_KQ = weight_KQ * batch.weight_Q.to(dtype)
    wants_posterior = rule is not None and posteriors
    accept_at, accept_factors = accept_rows(rule, batch, depth)
    task = HeadTask(batch, draft.target_ids, loss, weight_KQ, rule, accept_at, wants_posterior, product_dtype)
    normed_KQH = draft.final_norm(torch.stack(states))
    loss_sum, figures, posterior_KQ = head_loss(normed_KQH, draft.lm_head.weight, task)
    _, kl_K, overlap_K, top1_K, agree_K, accept_K = torch.where(inside_KQ, figures, 0.0).sum(-1, dtype=torch.float64)
    accept_K = accept_K * torch.tensor(accept_factors, dtype=torch.float64).to(accept_K.device, non_blocking=True)
    posterior_KQ = torch.where(inside_KQ, posterior_KQ, 0.0)
    by_chain = torch.stack([row_Q.roll(-step, 0) for step, row_Q in enumerate(posterior_KQ)], dim=1)
    return DraftLoss(
        loss_sum=loss_sum,
        counts=batch.counts(depth),
        kl_K=kl_K,
        overlap_K=overlap_K,
        top1_K=top1_K,
        agree_K=agree_K,
        accept_K=accept_K if rule is not None and loss is not None else None,
        posterior_QK=by_chain if wants_posterior else None,
    )


@torch.no_grad()
def accept_posteriors(
    draft: Eagle3, batch: DraftBatch, depth: int, rule: VerifyRule, *, product_dtype: torch.dtype | None = None
) -> Tensor:
    """Chance [Q, K] that x_{t+2+j} came from an accepted draft, had a chain started at t and stood until step j.

    For the text as it is, under `rule` and the temperature, without top-p or top-k. 0 beyond the end of the text.
    """
    forecast = draft_loss(draft, batch, depth, 1.0, rule, loss=None, product_dtype=product_dtype)
    posterior_QK = forecast.posterior_QK
    assert posterior_QK is not None
    return posterior_QK
