"""Log-probabilities and entropy from logits whose vocabulary is cut over tensor-parallel ranks.

Megatron's own cross-entropy overwrites fp32 logits in place and gives no entropy; this one leaves its input alone. It
goes over a few rows at a time, forward and again backward, so that no fp32 copy of the logits ever exists whole and
nothing of their size is kept but the logits themselves.

Axes: T rows of the logits, R chosen rows, r the rows of one piece, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

_PIECE_ELEMENTS = 1 << 24  # logits in fp32 at once


class _LogProbsAndEntropy(torch.autograd.Function):
    """d logp / d z_j = ([j = target] - p_j) / T;  d H / d z_j = -p_j (log p_j + H) / T  for logits z, temperature T."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: torch.Tensor,
        rows_R: torch.Tensor,
        targets_R: torch.Tensor,
        temperature_R: torch.Tensor,
        group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width, num_rows = logits_TV.shape[-1], len(rows_R)
        top_R = _over_temperature(logits_TV.amax(dim=-1).index_select(0, rows_R), temperature_R)
        if group is not None:
            dist.all_reduce(top_R, op=dist.ReduceOp.MAX, group=group)
        local_R = targets_R - (0 if group is None else group.rank() * width)
        mine_R = (local_R >= 0) & (local_R < width)
        local_R = local_R.clamp(0, width - 1)

        sums_3R = top_R.new_empty(3, num_rows)  # exp(z), z exp(z), z at the target, all less the top
        for piece in _pieces(num_rows, width):
            shifted_rV = _shifted(logits_TV, rows_R[piece], temperature_R[piece], top_R[piece])
            sums_3R[2, piece] = shifted_rV.gather(-1, local_R[piece, None])[:, 0]
            exp_rV = shifted_rV.exp()
            sums_3R[0, piece] = exp_rV.sum(dim=-1)
            sums_3R[1, piece] = exp_rV.mul_(shifted_rV).sum(dim=-1)
        sums_3R[2] *= mine_R
        if group is not None:
            dist.all_reduce(sums_3R, group=group)
        log_z_R = sums_3R[0].log()
        entropy_R = log_z_R - sums_3R[1] / sums_3R[0]
        ctx.save_for_backward(logits_TV, rows_R, temperature_R, top_R + log_z_R, entropy_R, local_R, mine_R)
        ctx.set_materialize_grads(False)
        return sums_3R[2] - log_z_R, entropy_R

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor, None, None, None, None]:
        grad_logp_R, grad_entropy_R = grads
        logits_TV, rows_R, temperature_R, log_norm_R, entropy_R, local_R, mine_R = ctx.saved_tensors
        if grad_logp_R is None:
            grad_logp_R = torch.zeros_like(entropy_R)
        grad_TV = torch.zeros_like(logits_TV)
        for piece in _pieces(len(rows_R), logits_TV.shape[-1]):
            log_p_rV = _shifted(logits_TV, rows_R[piece], temperature_R[piece], log_norm_R[piece])
            pull_r1 = grad_logp_R[piece, None]
            if grad_entropy_R is None:
                grad_rV = log_p_rV.exp_().mul_(-pull_r1)
            else:
                pull_rV = (log_p_rV + entropy_R[piece, None]).mul_(grad_entropy_R[piece, None]).add_(pull_r1)
                grad_rV = pull_rV.mul_(log_p_rV.exp_()).neg_()
            at_target = (torch.arange(len(grad_rV), device=grad_rV.device), local_R[piece])
            grad_rV[at_target] += pull_r1[:, 0] * mine_R[piece]
            grad_TV.index_copy_(0, rows_R[piece], _over_temperature(grad_rV, temperature_R[piece]).to(grad_TV.dtype))
        return grad_TV, None, None, None, None


def _pieces(num_rows: int, width: int) -> Iterator[slice]:
    size = max(1, _PIECE_ELEMENTS // width)
    return (slice(start, start + size) for start in range(0, num_rows, size))


def _shifted(
    logits_TV: torch.Tensor, rows_r: torch.Tensor, temperature_r: torch.Tensor, shift_r: torch.Tensor
) -> torch.Tensor:
    """float32 [r, V], a new tensor: the caller's logits stay as they are."""
    scaled_rV = _over_temperature(logits_TV.index_select(0, rows_r), temperature_r)
    return scaled_rV.sub_(shift_r[:, None])


def _over_temperature(values: torch.Tensor, temperature_r: torch.Tensor) -> torch.Tensor:
    return values.float() / temperature_r.view(-1, *(1,) * (values.dim() - 1))


def log_probs_and_entropy(
    logits_TV: torch.Tensor,
    rows_R: torch.Tensor,
    targets_R: torch.Tensor,
    temperature_R: torch.Tensor,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(logits / temperature) at `targets_R`, and that distribution's entropy in nats.

    Args:
        logits_TV: [T, V / ranks], this rank's slice of the vocabulary in rank order; not modified.
        rows_R: [R] int64, the rows of `logits_TV` to look at, distinct; the others get no gradient.
        targets_R: [R] int64, ids of the whole vocabulary.
        temperature_R: [R] float32, above 0.
        group: the tensor-parallel group; None when the vocabulary is whole. Every rank must call.

    Returns:
        Two float32 tensors [R], the same on all ranks of the group, differentiable in the logits. The gradient takes
        each rank's incoming gradient as the whole one (as Megatron does), since all ranks compute the same loss.
    """
    return _LogProbsAndEntropy.apply(logits_TV, rows_R, targets_R, temperature_R, group)
