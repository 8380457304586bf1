"""One training step of the EAGLE-3 draft on rolled-out sequences, on tensors alone.

The draft is unrolled as the engine runs it (EAGLE-3's "training-time test"): a chain that starts at row t reads the
target's hidden states once and then its own states. Its step j takes the token x_{t+1+j}, has RoPE position t + j, sees
the step-0 keys of rows 0..t and its own keys of steps 1..j, and predicts x_{t+2+j}.

Axes: S key rows (every row that a chain may see), Q chains, n the chains still inside their text at one unroll step,
R draft vocabulary, K unroll steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from draft_models.chain_attention import ChainAttention
from draft_models.chain_batch import DraftBatch, make_batch
from draft_models.eagle3 import Eagle3
from draft_models.forecast import EmittedTokens, accept_posterior
from draft_models.losses import AcceptanceSums, acceptance_sums, forward_kl, soft_target
from draft_models.types import VerifyRule

__all__ = ["DraftBatch", "DraftLoss", "UnrollStep", "accept_posteriors", "draft_loss", "make_batch", "unroll"]


@dataclass(frozen=True, slots=True)
class UnrollStep:
    """One step of every chain that is still inside its text."""

    step: int
    chain_n: Tensor  # int64: which chains
    logits_nR: Tensor  # draft logits, temperature-free, over the draft vocabulary


def unroll(draft: Eagle3, batch: DraftBatch, depth: int) -> Iterator[UnrollStep]:
    """Run every chain for up to `depth` steps; differentiable in the draft's weights."""
    hidden_SH = draft.fuse(batch.key_aux_SA)
    x_S2H = draft.attention_input(batch.key_embeds_SH, hidden_SH)
    attention = ChainAttention(draft, batch, x_S2H)
    chain_n = torch.arange(len(batch.chain_key_Q), device=hidden_SH.device)
    hidden_nH, x_n2H = hidden_SH[batch.chain_key_Q], x_S2H[batch.chain_key_Q]
    for step in range(depth):
        state_nH = draft.finish(attention.run(step, chain_n, x_n2H), hidden_nH)
        yield UnrollStep(step, chain_n, draft.logits(state_nH))
        goes_on_n = batch.steps_left_Q[chain_n] > step + 1
        chain_n, hidden_nH = chain_n[goes_on_n], state_nH[goes_on_n]
        if step + 1 == depth or len(chain_n) == 0:
            return
        x_n2H = draft.attention_input(batch.key_embeds_SH[batch.chain_key_Q[chain_n] + step + 1], hidden_nH)


@dataclass(frozen=True, slots=True)
class DraftLoss:
    """Sums, so that data-parallel ranks can divide by the global count; lists are by unroll step."""

    loss_sum: Tensor  # scalar with gradient: sum over steps j of step_decay**j * KL, in nats
    token_count: int  # chains, i.e. rows of step 0: what `loss_sum` is to be divided by
    kl_sums: tuple[float, ...]
    counts: tuple[int, ...]
    acceptance: tuple[AcceptanceSums, ...]
    posterior_QK: Tensor | None  # see `accept_posteriors`; None when no rule was given


def draft_loss(
    draft: Eagle3, batch: DraftBatch, depth: int, step_decay: float, rule: VerifyRule | None = None
) -> DraftLoss:
    """Soft-label forward KL of `depth` unrolled steps against the target at the rollout's temperature.

    Greedy samples are compared at temperature 1, whose soft labels say more than an argmax. With `rule` the same
    forward also gives `posterior_QK`, what the acceptance forecast needs.
    """
    temperature_Q1 = _loss_temperature(batch)
    with torch.no_grad():
        target = soft_target(batch.target_logits_QV, temperature_Q1, draft.target_ids)
        p_token_Q = None if rule is None else _token_probs(batch)
        posterior_QK = temperature_Q1.new_zeros(len(temperature_Q1), depth)
    loss_sum = torch.zeros((), dtype=batch.key_embeds_SH.dtype, device=batch.key_embeds_SH.device)
    kl_sums: list[float] = []
    counts: list[int] = []
    sums: list[AcceptanceSums] = []
    for unrolled in unroll(draft, batch, depth):
        rows = target.rows(unrolled.chain_n + unrolled.step)
        logits_nR = unrolled.logits_nR / temperature_Q1[unrolled.chain_n]
        kl = forward_kl(logits_nR, rows).sum()
        loss_sum = loss_sum + step_decay**unrolled.step * kl
        kl_sums.append(float(kl.detach()))
        counts.append(len(unrolled.chain_n))
        sums.append(acceptance_sums(logits_nR, rows))
        if rule is not None and p_token_Q is not None:
            posterior_QK[unrolled.chain_n, unrolled.step] = _token_posterior(draft, batch, unrolled, p_token_Q, rule)
    return DraftLoss(
        loss_sum=loss_sum,
        token_count=len(batch.chain_key_Q),
        kl_sums=tuple(kl_sums),
        counts=tuple(counts),
        acceptance=tuple(sums),
        posterior_QK=None if rule is None else posterior_QK,
    )


@torch.no_grad()
def accept_posteriors(draft: Eagle3, batch: DraftBatch, depth: int, rule: VerifyRule) -> Tensor:
    """Chance [Q, K] that x_{t+2+j} came from an accepted draft, had a chain started at t and stood until step j.

    For the text as it is, under `rule` and the temperature, without top-p or top-k. 0 beyond the end of the text.
    """
    p_token_Q = _token_probs(batch)
    posterior_QK = p_token_Q.new_zeros(len(p_token_Q), depth)
    for unrolled in unroll(draft, batch, depth):
        posterior_QK[unrolled.chain_n, unrolled.step] = _token_posterior(draft, batch, unrolled, p_token_Q, rule)
    return posterior_QK


def _token_posterior(
    draft: Eagle3, batch: DraftBatch, unrolled: UnrollStep, p_token_Q: Tensor, rule: VerifyRule
) -> Tensor:
    chain_n, row_n = unrolled.chain_n, unrolled.chain_n + unrolled.step
    sample_n = batch.chain_sample_Q[chain_n]
    return accept_posterior(
        rule,
        unrolled.logits_nR.detach(),
        batch.temperature_B[sample_n],
        EmittedTokens(
            token_n=batch.next_token_Q[row_n],
            p_token_n=p_token_Q[row_n],
            seed_n=batch.seed_B[sample_n],
            position_n=batch.key_position_S[batch.chain_key_Q[chain_n]] + unrolled.step + 2,
        ),
        draft.target_ids,
    )


def _loss_temperature(batch: DraftBatch) -> Tensor:
    temperature_Q1 = batch.temperature_B[batch.chain_sample_Q, None].to(batch.target_logits_QV.dtype)
    return torch.where(temperature_Q1 == 0, 1.0, temperature_Q1)


def _token_probs(batch: DraftBatch) -> Tensor:
    """The target's probability of each emitted token at the rollout's temperature, [Q]."""
    logits_QV = batch.target_logits_QV / _loss_temperature(batch)
    return (logits_QV.gather(1, batch.next_token_Q[:, None])[:, 0] - logits_QV.logsumexp(-1)).exp()
