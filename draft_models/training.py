"""One training step of the EAGLE-3 draft on rolled-out sequences, on tensors alone.

The draft is unrolled as the engine runs it (EAGLE-3's "training-time test"): a chain that starts at row t reads the
target's hidden states once and then its own states. Its step j takes the token x_{t+1+j}, has RoPE position t + j, sees
the step-0 keys of rows 0..t and its own keys of steps 1..j, and predicts x_{t+2+j}.

Samples are laid end to end without padding; only attention works on padded rows.

Axes: B samples, S key rows (every row that a chain may see), Q chains, n the chains still inside their text at one
unroll step, R and T chains and key rows of one sample (padded), K unroll steps, N query heads, G KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draft_models.eagle3 import Eagle3
from draft_models.forecast import EmittedTokens, accept_posterior
from draft_models.layers import FAST
from draft_models.losses import AcceptanceSums, SoftTarget, acceptance_sums, forward_kl, soft_target
from draft_models.types import DraftSample, VerifyRule


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """Samples end to end. Chain c of step j is compared with row c + j of the target rows, while j < steps_left[c].

    A chain starts at every row t whose x_{t+1} is a response token and whose x_{t+2} exists: the rows where an engine
    can start to draft.
    """

    key_embeds_SH: Tensor  # embed(x_{t+1}) of key row t
    key_aux_SA: Tensor  # captured states of key row t, A = 3H
    key_sample_S: Tensor  # int64: the row's sample
    key_position_S: Tensor  # int64: t
    chain_key_Q: Tensor  # int64: the key row where the chain starts
    chain_rank_Q: Tensor  # int64: 0, 1, .. within the sample
    steps_left_Q: Tensor  # int64, at least 1
    next_token_Q: Tensor  # int64: the token that step 0 predicts
    target_logits_QV: Tensor  # the target's raw logits for that token
    temperature_B: Tensor  # float64; 0 = greedy
    seed_B: Tensor  # int64
    num_chains_B: Tensor  # int64, at least 1

    @property
    def chain_sample_Q(self) -> Tensor:
        return self.key_sample_S[self.chain_key_Q]


def make_batch(samples: Sequence[DraftSample]) -> DraftBatch | None:
    """Join samples, in the given order; those too short to hold a chain are left out. None when none is left."""
    samples = [s for s in samples if len(s.token_ids) - s.prompt_len >= 2]
    if not samples:
        return None
    device = samples[0].token_ids.device

    def integers(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    lengths = [len(s.token_ids) for s in samples]
    num_keys_B = integers(lengths) - 2
    prompt_len_B = integers([s.prompt_len for s in samples])
    num_chains_B = integers(lengths) - prompt_len_B - 1
    key_sample_S, key_position_S = _ranks(num_keys_B)
    chain_sample_Q, chain_rank_Q = _ranks(num_chains_B)
    first_key_B = num_keys_B.cumsum(0) - num_keys_B
    return DraftBatch(
        key_embeds_SH=torch.cat([s.embeds[1:-1] for s in samples]),
        key_aux_SA=torch.cat([s.aux_hidden[:-2] for s in samples]),
        key_sample_S=key_sample_S,
        key_position_S=key_position_S,
        chain_key_Q=(first_key_B + prompt_len_B - 1)[chain_sample_Q] + chain_rank_Q,
        chain_rank_Q=chain_rank_Q,
        steps_left_Q=num_chains_B[chain_sample_Q] - chain_rank_Q,
        next_token_Q=torch.cat([s.token_ids[s.prompt_len + 1 :] for s in samples]),
        target_logits_QV=torch.cat([s.target_logits[s.prompt_len : -1] for s in samples]),
        temperature_B=torch.tensor([s.temperature for s in samples], dtype=torch.float64, device=device),
        seed_B=integers([s.seed for s in samples]),
        num_chains_B=num_chains_B,
    )


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
    attention = _ChainAttention(draft, batch, x_S2H)
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
        rows: SoftTarget = target.rows(unrolled.chain_n + unrolled.step)
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


class _ChainAttention:
    """Keys of step 0 for whole sequences, and each chain's own keys of later steps ("the diagonal")."""

    def __init__(self, draft: Eagle3, batch: DraftBatch, x_S2H: Tensor) -> None:
        self._draft = draft
        num_samples, num_keys = len(batch.seed_B), int(batch.key_position_S.max()) + 1
        self._chain_shape = (num_samples, int(batch.num_chains_B.max()))
        self._slot_Q = batch.chain_sample_Q * self._chain_shape[1] + batch.chain_rank_Q
        self._position_Q = batch.key_position_S[batch.chain_key_Q]
        # Slots without a chain look at key 0: finite, and never read.
        self._start_BR = _scatter(self._position_Q, self._slot_Q, self._chain_shape)
        k_SGD, v_SGD = self._keys_values(x_S2H, batch.key_position_S)
        slot_S = batch.key_sample_S * num_keys + batch.key_position_S
        self._k_BGTD = _scatter(k_SGD, slot_S, (num_samples, num_keys)).transpose(1, 2)
        self._v_BGTD = _scatter(v_SGD, slot_S, (num_samples, num_keys)).transpose(1, 2)
        self._own_keys: list[tuple[Tensor, Tensor]] = []  # of steps 1, 2, ..: k and v, each [B, R, G, D]

    def run(self, step: int, chain_n: Tensor, x_n2H: Tensor) -> Tensor:
        """Attention output [n, N * D] of the chains' step."""
        position_n, slot_n = self._position_Q[chain_n] + step, self._slot_Q[chain_n]
        q_nND = self._draft.queries(x_n2H[None], position_n[None])[0]
        q_BRND = _scatter(q_nND, slot_n, self._chain_shape)
        if step == 0:
            scale = self._draft.attention_scale
            out = FAST.attend(q_BRND, self._k_BGTD, self._v_BGTD, self._start_BR, scale)
        else:
            k_nGD, v_nGD = self._keys_values(x_n2H, position_n)
            self._own_keys.append(
                (_scatter(k_nGD, slot_n, self._chain_shape), _scatter(v_nGD, slot_n, self._chain_shape))
            )
            out = self._attend_chain(q_BRND)
        return out.flatten(0, 1)[slot_n]

    def _attend_chain(self, q_BRND: Tensor) -> Tensor:
        num_samples, num_chains, num_heads, head_dim = q_BRND.shape
        num_kv_heads, num_keys = self._k_BGTD.shape[1:3]
        q_BGRgD = q_BRND.unflatten(2, (num_kv_heads, -1)).transpose(1, 2) * self._draft.attention_scale
        scores = (q_BGRgD.flatten(2, 3) @ self._k_BGTD.transpose(2, 3)).unflatten(2, (num_chains, -1))
        hidden_BRT = torch.arange(num_keys, device=q_BRND.device) > self._start_BR[..., None]
        scores = scores.masked_fill(hidden_BRT[:, None, :, None], float("-inf"))
        own_scores = [(q_BGRgD * k.transpose(1, 2).unsqueeze(3)).sum(-1, keepdim=True) for k, _ in self._own_keys]
        weights = torch.cat([scores, *own_scores], dim=-1).softmax(-1)
        out = (weights[..., :num_keys].flatten(2, 3) @ self._v_BGTD).unflatten(2, (num_chains, -1))
        for index, (_, v_BRGD) in enumerate(self._own_keys):
            out = out + weights[..., num_keys + index, None] * v_BRGD.transpose(1, 2).unsqueeze(3)
        return out.transpose(1, 2).reshape(num_samples, num_chains, num_heads * head_dim)

    def _keys_values(self, x_n2H: Tensor, position_n: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._draft.keys_values(x_n2H[None], position_n[None])
        return k[0], v[0]


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


def _ranks(counts_B: Tensor) -> tuple[Tensor, Tensor]:
    """For `counts_B[b]` items of each sample, end to end: the sample of every item, and its rank within it."""
    sample = torch.arange(len(counts_B), device=counts_B.device).repeat_interleave(counts_B)
    first_B = counts_B.cumsum(0) - counts_B
    return sample, torch.arange(len(sample), device=counts_B.device) - first_B[sample]


def _scatter(rows: Tensor, slot: Tensor, shape: tuple[int, int]) -> Tensor:
    """Rows [n, ...] into zeros [B, R, ...] at flat slots."""
    return rows.new_zeros(shape[0] * shape[1], *rows.shape[1:]).index_copy(0, slot, rows).unflatten(0, shape)
