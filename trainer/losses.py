"""The policy loss, token by token. Pure functions of log-probabilities; the caller sums and divides by the token count.

Axes: T response tokens.
"""

from __future__ import annotations

import torch

from trainer.config import ConfigError

KL_LOSS_TYPES = ("k1", "k2", "k3", "low_var_kl")


def clipped_policy_loss(
    logp_T: torch.Tensor, old_logp_T: torch.Tensor, advantages_T: torch.Tensor, eps_clip: float, eps_clip_high: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate (Schulman et al. 2017) with DAPO's separate upper bound (clip-higher, Yu et al. 2025).

    With `old_logp_T = logp_T.detach()` the ratio is 1, nothing is clipped and the gradient is that of -A log p.

    Returns:
        loss [T] = max(-A r, -A clip(r, 1 - eps_clip, 1 + eps_clip_high)); r [T] without gradient; and
        [T] bool, where the clipped branch is the larger (the token gives no gradient).
    """
    ratio_T = (logp_T - old_logp_T).exp()
    plain_T = -advantages_T * ratio_T
    clipped_T = -advantages_T * ratio_T.clamp(1.0 - eps_clip, 1.0 + eps_clip_high)
    return torch.maximum(plain_T, clipped_T), ratio_T.detach(), clipped_T.detach() > plain_T.detach()


def check_kl_loss_type(kind: str) -> None:
    """Raises ConfigError for an estimator that `kl_to_reference` does not know."""
    if kind not in KL_LOSS_TYPES:
        raise ConfigError(f"algorithm.kl_loss_type {kind!r} is unknown; use one of {', '.join(KL_LOSS_TYPES)}")


def kl_to_reference(logp_T: torch.Tensor, ref_logp_T: torch.Tensor, kind: str) -> torch.Tensor:
    """Per-token estimates of KL(policy || reference) from the sampled token (Schulman, "Approximating KL divergence").

    With d = logp - ref: `k1` d; `k2` d^2 / 2; `k3` exp(-d) - 1 + d (unbiased, never negative); `low_var_kl` is k3
    held within [-10, 10]. Returns [T], differentiable in `logp_T`. The names are slime's.
    """
    check_kl_loss_type(kind)
    diff_T = logp_T - ref_logp_T
    if kind == "k1":
        return diff_T
    if kind == "k2":
        return diff_T.square() / 2
    k3_T = (-diff_T).exp() - 1 + diff_T
    return k3_T.clamp(-10, 10) if kind == "low_var_kl" else k3_T


def tis_weights(train_logp_T: torch.Tensor, rollout_logp_T: torch.Tensor, clip: float) -> torch.Tensor:
    """Truncated importance sampling: min(p_train / p_rollout, clip), without gradient (Ionides 2008; Yao et al. 2025).

    Corrects for the engine's log-probabilities differing from the trainer's. Returns [T].
    """
    return (train_logp_T - rollout_logp_T).detach().exp().clamp(max=clip)
