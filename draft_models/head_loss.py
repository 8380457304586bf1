"""The draft's head, its loss and its acceptance figures, fused over pieces of the target rows.

The logits of a draft are by far its largest tensor, [K, Q, R] for K unroll steps, and the target's [Q, V] come next.
Both are made piece by piece, used for everything that needs them, the gradient included, and dropped.

Axes: K unroll steps, Q target rows (as many as chains), c the rows of a piece, V target vocabulary, R draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from draft_models.chain_batch import DraftBatch
from draft_models.forecast import EmittedTokens, draft_ids, posterior_at_temperature
from draft_models.losses import Comparison, LossKind, SoftTarget, acceptance, compare, loss_and_gradient, soft_target
from draft_models.types import VerifyRule

_PIECE_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}  # of [K, c, R]: within the CPU's cache; large products on a GPU
NUM_FIGURES = 6  # loss, KL, overlap, top1, agree, acceptance
_SORTED_ROWS = 256  # whose coupled acceptance is taken, of a forward: it sorts the vocabulary, and is a figure alone


@dataclass(frozen=True, slots=True)
class HeadTask:
    """What the logits of the chains are compared with."""

    batch: DraftBatch
    target_ids_R: Tensor | None
    loss: LossKind | None  # None: neither loss nor figures, the posteriors alone
    weight_KQ: Tensor  # of each row's loss; 0 where no chain is
    rule: VerifyRule | None  # for its acceptance
    accept_rows: Tensor | None  # int64 on the CPU, ascending: where that is taken, 0 elsewhere; None = everywhere
    wants_posterior: bool  # under that rule
    product_dtype: torch.dtype


def head_loss(normed_KQH: Tensor, head_RH: Tensor, task: HeadTask) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of the loss over steps and rows; differentiable in the normed states and the head.

    Args:
        normed_KQH: what the head reads at step j for target row r, in [j, r]; anything finite where no chain is.
        head_RH: the draft's output layer.

    Returns:
        the loss (scalar), and without gradient: figures [6, K, Q] (loss, KL, overlap, top1, agree, and acceptance under
        the rule, zero without one or where it is not taken) and acceptance posteriors [K, Q] (zero unless wanted), all
        meaningless where no chain is. Loss and figures are zero when the task has no loss.
    """
    wants_grad = torch.is_grad_enabled() and (normed_KQH.requires_grad or head_RH.requires_grad)
    loss, figures, posterior = _HeadLoss.apply(normed_KQH, head_RH, task, wants_grad)
    return loss, figures, posterior


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, normed_KQH: Tensor, head_RH: Tensor, task: HeadTask, wants_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_steps, num_rows, _ = normed_KQH.shape
        temperature_Q1 = _loss_temperature(task.batch, normed_KQH.dtype)
        # Scaling the input scales the logits, and is a pass over H instead of R numbers.
        x_KQH = (normed_KQH / temperature_Q1).to(task.product_dtype)
        head = head_RH.to(task.product_dtype)
        figures = normed_KQH.new_zeros(NUM_FIGURES, num_steps, num_rows)
        posterior = normed_KQH.new_zeros(num_steps, num_rows)
        grad_x = torch.empty_like(x_KQH) if wants_grad else x_KQH.new_empty(0)
        grad_head = torch.zeros_like(head_RH) if wants_grad else head_RH.new_empty(0)
        width = max(len(head), len(task.batch.target_head_VW))
        piece = max(1, _PIECE_ELEMENTS[x_KQH.device.type] // (num_steps * width))
        for start in range(0, num_rows, piece):
            rows = slice(start, start + piece)
            x_KcH = x_KQH[:, rows]
            target_logits_cV = _target_logits(task.batch, rows, temperature_Q1)
            logits_KcR = F.linear(x_KcH, head).to(normed_KQH.dtype)
            if task.rule is not None and task.wants_posterior:
                posterior[:, rows] = _posterior(task, task.rule, rows, logits_KcR, target_logits_cV)
            if task.loss is None:
                continue
            target = soft_target(target_logits_cV, task.target_ids_R, with_log=task.loss is LossKind.REVERSE_KL)
            found = compare(logits_KcR, target)
            accept = _acceptance(task, rows, found, target)
            loss, gradient = loss_and_gradient(task.loss, found, target, _labels(task, rows))
            figures[:, :, rows] = torch.stack((loss, found.kl, found.overlap, found.top1, found.agree, accept))
            if wants_grad:
                grad_logits = gradient.mul_(task.weight_KQ[:, rows, None]).to(task.product_dtype)
                grad_x[:, rows] = grad_logits @ head
                grad_head += grad_logits.flatten(0, 1).t() @ x_KcH.flatten(0, 1)
        ctx.save_for_backward((grad_x.to(normed_KQH.dtype) / temperature_Q1) if wants_grad else grad_x, grad_head)
        ctx.mark_non_differentiable(figures, posterior)
        weighted = torch.where(task.weight_KQ > 0, figures[0] * task.weight_KQ, 0.0)
        return weighted.sum(), figures, posterior

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_normed, grad_head = ctx.saved_tensors
        return grads[0] * grad_normed, grads[0] * grad_head, None, None


def _loss_temperature(batch: DraftBatch, dtype: torch.dtype) -> Tensor:
    """[Q, 1]. Greedy samples are compared at temperature 1, whose soft labels say more than an argmax."""
    temperature_Q1 = batch.temperature_B[batch.chain_sample_Q, None].to(dtype)
    return torch.where(temperature_Q1 == 0, 1.0, temperature_Q1)


def _target_logits(batch: DraftBatch, rows: slice, temperature_Q1: Tensor) -> Tensor:
    """The target's logits [c, V] at the temperature, by the product that the target itself made of them."""
    logits_cV = F.linear(batch.target_hidden_QW[rows], batch.target_head_VW)
    return logits_cV.to(temperature_Q1.dtype).div_(temperature_Q1[rows])


def _acceptance(task: HeadTask, rows: slice, found: Comparison, target: SoftTarget) -> Tensor:
    """[K, c]; zeros without a rule, and in rows where it is not taken."""
    chance_Kc = torch.zeros_like(found.overlap)
    if task.rule is None:
        return chance_Kc
    is_greedy_c = _is_greedy(task.batch, rows)
    if task.accept_rows is None:
        return acceptance(task.rule, found, target, is_greedy_c)
    taken = task.accept_rows[(task.accept_rows >= rows.start) & (task.accept_rows < rows.stop)] - rows.start
    if len(taken):
        taken = taken.to(chance_Kc.device, non_blocking=True)
        part = acceptance(task.rule, found.at(taken), target.at(taken), is_greedy_c[taken])
        chance_Kc.index_copy_(1, taken, part)
    return chance_Kc


def accept_rows(rule: VerifyRule | None, batch: DraftBatch, depth: int) -> tuple[Tensor | None, list[float]]:
    """Rows [n] whose acceptance is taken (see `HeadTask`), and by step what its sum over them is to be multiplied with.

    Under the coupled rule one of every few rows of a large batch, at distances that follow no text's length, and the
    one that most steps reach, so that every step has one.
    """
    rank_Q = torch.cat([torch.arange(number) for number in batch.num_chains])
    if rule is not VerifyRule.COUPLED or len(rank_Q) <= _SORTED_ROWS:
        return None, [1.0] * depth
    every = -(-len(rank_Q) // _SORTED_ROWS)
    first = torch.arange(0, len(rank_Q), every)
    offset = (torch.arange(len(first)) * 2_654_435_769 % (1 << 32)) * every >> 32  # the golden ratio's multiples
    rows = torch.cat((first + offset, rank_Q.argmax()[None])).clamp_(max=len(rank_Q) - 1).unique()
    taken = [int((rank_Q[rows] >= step).sum()) for step in range(depth)]
    return rows, [count / max(1, few) for count, few in zip(batch.counts(depth), taken, strict=True)]


def _is_greedy(batch: DraftBatch, rows: slice) -> Tensor:
    return batch.temperature_B[batch.chain_sample_Q[rows]] == 0


def _labels(task: HeadTask, rows: slice) -> Tensor:
    """Draft id of the token that stands in the text, -1 where it has none."""
    index_c, known_c = draft_ids(task.batch.next_token_Q[rows], task.target_ids_R)
    return index_c.masked_fill(~known_c, -1)


def _posterior(task: HeadTask, rule: VerifyRule, rows: slice, logits_KcR: Tensor, target_logits_cV: Tensor) -> Tensor:
    batch, num_steps = task.batch, len(logits_KcR)
    token_c, sample_c = batch.next_token_Q[rows], batch.chain_sample_Q[rows]
    picked_c = target_logits_cV.gather(1, token_c[:, None])[:, 0]
    emitted = EmittedTokens(
        token_n=token_c.repeat(num_steps),
        p_token_n=(picked_c - target_logits_cV.logsumexp(-1)).exp().repeat(num_steps),
        seed_n=batch.seed_B[sample_c].repeat(num_steps),
        position_n=batch.next_index_Q[rows].repeat(num_steps),
    )
    is_greedy_n = _is_greedy(batch, rows).repeat(num_steps)
    flat = posterior_at_temperature(rule, logits_KcR.flatten(0, 1), is_greedy_n, emitted, task.target_ids_R)
    return flat.unflatten(0, (num_steps, -1))
