"""Log-probabilities and entropy from logits whose vocabulary is cut over tensor-parallel ranks.

Megatron's own cross-entropy overwrites fp32 logits in place and gives no entropy; this one leaves its input alone, and
its backward pass is written out, so that one [T, V / ranks] fp32 tensor is all that is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _LogProbsAndEntropy(torch.autograd.Function):
    """d logp / d z_j = ([j = target] - p_j) / T;  d H / d z_j = -p_j (log p_j + H) / T  for logits z, temperature T."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: torch.Tensor,
        targets_T: torch.Tensor,
        temperature_T: torch.Tensor,
        group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shifted_TV = logits_TV.float() / temperature_T[:, None]  # a new tensor: the caller's logits stay as they are
        top_T = shifted_TV.amax(dim=-1)
        if group is not None:
            dist.all_reduce(top_T, op=dist.ReduceOp.MAX, group=group)
        shifted_TV -= top_T[:, None]

        width = logits_TV.shape[-1]
        local_T = targets_T - (0 if group is None else group.rank() * width)
        mine_T = (local_T >= 0) & (local_T < width)
        local_T = local_T.clamp(0, width - 1)
        picked_T = shifted_TV.gather(-1, local_T[:, None])[:, 0] * mine_T

        exp_TV = shifted_TV.exp()
        sums_3T = torch.stack([exp_TV.sum(dim=-1), exp_TV.mul_(shifted_TV).sum(dim=-1), picked_T])
        if group is not None:
            dist.all_reduce(sums_3T, group=group)
        log_z_T = sums_3T[0].log()
        entropy_T = log_z_T - sums_3T[1] / sums_3T[0]
        ctx.save_for_backward(shifted_TV.sub_(log_z_T[:, None]), entropy_T, local_T, mine_T, temperature_T)
        ctx.logits_dtype = logits_TV.dtype
        return sums_3T[2] - log_z_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        grad_logp_T, grad_entropy_T = grads
        log_probs_TV, entropy_T, local_T, mine_T, temperature_T = ctx.saved_tensors
        pull_TV = (log_probs_TV + entropy_T[:, None]).mul_(grad_entropy_T[:, None]).add_(grad_logp_T[:, None])
        grad_TV = pull_TV.mul_(log_probs_TV.exp()).neg_()
        grad_TV.scatter_add_(-1, local_T[:, None], (grad_logp_T * mine_T)[:, None])
        return (grad_TV / temperature_T[:, None]).to(ctx.logits_dtype), None, None, None


def log_probs_and_entropy(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    temperature_T: torch.Tensor,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(logits / temperature) at `targets_T`, and that distribution's entropy in nats.

    Args:
        logits_TV: [T, V / ranks], this rank's slice of the vocabulary in rank order; not modified.
        targets_T: [T] int64, ids of the whole vocabulary.
        temperature_T: [T] float32, above 0.
        group: the tensor-parallel group; None when the vocabulary is whole. Every rank must call.

    Returns:
        Two float32 tensors [T], the same on all ranks of the group, differentiable in the logits. The gradient takes
        each rank's incoming gradient as the whole one (as Megatron does), since all ranks compute the same loss.
    """
    return _LogProbsAndEntropy.apply(logits_TV, targets_T, temperature_T, group)
