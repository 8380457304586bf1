"""Exact verification of draft tokens, in plain torch: what every engine calls and every kernel is tested against.

Axes: B rows, K draft depth, M = K + 1 positions (the last one is the bonus token), V target vocabulary, D draft
vocabulary. Every rule leaves the law of the emitted tokens equal to plain sampling from `p` (see `VerifyRule`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draft_models.randomness import Purpose, gumbel, hash_bits, uniforms, unit_interval
from draft_models.types import VerifyRule


@dataclass(frozen=True, slots=True)
class Noise:
    """The random inputs of one verification; column j decides the token at the row's first position + j."""

    accept_BK: Tensor | None = None  # float64 in [0, 1): the draft token is kept when it is below min(1, p/q)
    resample_BM: Tensor | None = None  # float64 in [0, 1): residual or bonus token by inverse CDF
    gumbel_BMV: Tensor | None = None  # float64: the coupled rule's noise, shared with the draft


@dataclass(frozen=True, slots=True)
class Verified:
    """Row b emits `tokens_BM[b, : num_accepted_B[b] + 1]`; what stands behind is meaningless."""

    tokens_BM: Tensor  # int64
    num_accepted_B: Tensor  # int64, 0..K: accepted drafts, the bonus or corrected token not counted


def draw_noise(rule: VerifyRule, seeds_B: Tensor, first_position_B: Tensor, k: int, vocab_size: int) -> Noise:
    """The random numbers that `verify` needs when the first proposed token has sequence index `first_position_B`.

    int64 [B] seeds and positions. A number depends on nothing but its seed, position and purpose; it is thrown away
    unseen when an earlier draft is rejected, so drawing the same one again in the next step is exact.
    """
    if rule is VerifyRule.GREEDY:
        return Noise()
    positions_BM = first_position_B[:, None] + torch.arange(k + 1, device=seeds_B.device)
    if rule is VerifyRule.COUPLED:
        return Noise(gumbel_BMV=gumbel(seeds_B, positions_BM, vocab_size))
    if k == 0:
        return Noise(resample_BM=uniforms(seeds_B, positions_BM, Purpose.RESIDUAL))
    purposes_2 = torch.tensor([Purpose.ACCEPT, Purpose.RESIDUAL], device=seeds_B.device)
    u_B2M = unit_interval(hash_bits(seeds_B[:, None, None], positions_BM[:, None, :], purposes_2[:, None]))
    return Noise(accept_BK=u_B2M[:, 0, :k], resample_BM=u_B2M[:, 1])


def target_probs(
    logits: Tensor, temperature_B: Tensor | None, top_p_B: Tensor | None = None, top_k_B: Tensor | None = None
) -> Tensor:
    """The law that tokens are sampled from: softmax(logits / T), then top-k, then top-p, renormalised.

    logits [B, ..., V]; float64 gives float64 probabilities, anything else float32. T = 0 gives a one-hot of the argmax.
    None means temperature 1 or filter off for all rows; per row `top_k` 0 and `top_p` 1 are off. Sequential filtering
    is SGLang's order in verification; equal probabilities are ranked by token id.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    probs = logits.softmax(-1) if temperature_B is None else _tempered_softmax(logits, _per_row(temperature_B, logits))
    if top_k_B is not None and not bool((top_k_B > 0).any()):
        top_k_B = None
    if top_p_B is not None and not bool((top_p_B < 1).any()):
        top_p_B = None
    if top_k_B is None and top_p_B is None:
        return probs
    return _filter(
        probs,
        None if top_k_B is None else _per_row(top_k_B, probs),
        None if top_p_B is None else _per_row(top_p_B, probs),
    )


def expand_draft_vocab(q: Tensor, target_ids_D: Tensor, vocab_size: int) -> Tensor:
    """Draft probabilities [..., D] laid out over the target's vocabulary [..., V]; other tokens get 0.

    `target_ids_D` holds absolute target ids (d2t offsets + arange).
    """
    full = q.new_zeros(*q.shape[:-1], vocab_size)
    full[..., target_ids_D] = q
    return full


def sample_draft(
    rule: VerifyRule, q_BD: Tensor, seeds_B: Tensor, positions_B: Tensor, target_ids_D: Tensor | None = None
) -> Tensor:
    """The draft's next tokens, int64 [B], as target ids, at sequence index `positions_B`, from its probabilities.

    Argmax for the greedy and target-only rules, a draw from q for rejection, argmax(log q + shared noise) for coupled.
    """
    if rule is VerifyRule.REJECTION:
        index_B = inverse_cdf(q_BD, uniforms(seeds_B, positions_B[:, None], Purpose.DRAFT)[:, 0])
    elif rule is VerifyRule.COUPLED:
        noise_BD = gumbel(seeds_B, positions_B[:, None], q_BD.shape[-1], target_ids_D)[:, 0]
        index_B = (q_BD.log() + noise_BD).argmax(-1)
    else:
        index_B = q_BD.argmax(-1)
    return index_B if target_ids_D is None else target_ids_D[index_B]


def verify(
    rule: VerifyRule, p_BMV: Tensor, q_BKV: Tensor | None, drafts_BK: Tensor, num_drafts_B: Tensor, noise: Noise
) -> Verified:
    """Decide which drafts stand, and the one token that follows them. With K = 0 this is plain sampling.

    p_BMV: the target's sampling law at each position, given the drafts before it. q_BKV: the law that each draft token
    was really drawn from, over the target's vocabulary; None means point masses (argmax drafts, n-grams), and is what
    TARGET_ONLY always uses. drafts_BK: int64 target ids, of which row b proposes the first num_drafts_B[b]; the rest
    may be any valid id. TARGET_ONLY and REJECTION are speculative sampling (Leviathan et al. 2023; Chen et al. 2023).
    """
    k = drafts_BK.shape[1]
    proposed_BK = torch.arange(k, device=drafts_BK.device) < num_drafts_B[:, None]
    if rule is VerifyRule.GREEDY or rule is VerifyRule.COUPLED:
        choice_BM = target_choice(p_BMV, noise.gumbel_BMV)
        agree_BK = (choice_BM[:, :k] == drafts_BK) & proposed_BK
        return Verified(choice_BM, leading_true(agree_BK))
    assert noise.resample_BM is not None
    if k == 0:
        return Verified(inverse_cdf(p_BMV[:, 0], noise.resample_BM[:, 0])[:, None], torch.zeros_like(num_drafts_B))
    assert noise.accept_BK is not None
    q_BKV = None if rule is VerifyRule.TARGET_ONLY else q_BKV

    p_draft_BK = p_BMV[:, :k].gather(-1, drafts_BK[..., None])[..., 0]
    q_draft_BK = None if q_BKV is None else q_BKV.gather(-1, drafts_BK[..., None])[..., 0]
    accept_BK = (noise.accept_BK < accept_probability(p_draft_BK, q_draft_BK)) & proposed_BK
    num_accepted_B = leading_true(accept_BK)

    p_next_BV = take_row(p_BMV, num_accepted_B)
    rejected_B = num_accepted_B < num_drafts_B
    first_rejected_B = num_accepted_B.clamp(max=k - 1)
    if q_BKV is None:
        token_B1 = drafts_BK.gather(1, first_rejected_B[:, None])
        q_next_BV = torch.zeros_like(p_next_BV).scatter_(1, token_B1, 1.0)
    else:
        q_next_BV = take_row(q_BKV, first_rejected_B)
    residual_BV = residual(p_next_BV, q_next_BV)
    # A residual that rounds to nothing means p = q to rounding: the rejection itself was rounding, and p is the law.
    use_residual_B = rejected_B & (residual_BV > 0).any(-1)
    weights_BV = torch.where(use_residual_B[:, None], residual_BV, p_next_BV)
    u_B = noise.resample_BM.gather(1, num_accepted_B[:, None])[:, 0]
    tokens_BM = torch.nn.functional.pad(drafts_BK, (0, 1))
    tokens_BM.scatter_(1, num_accepted_B[:, None], inverse_cdf(weights_BV, u_B)[:, None])
    return Verified(tokens_BM, num_accepted_B)


def target_choice(p: Tensor, gumbel_noise: Tensor | None) -> Tensor:
    """argmax p, or argmax(log p + noise), whose law is p (the Gumbel-max trick); ties go to the lowest id."""
    return p.argmax(-1) if gumbel_noise is None else (p.log() + gumbel_noise).argmax(-1)


def accept_probability(p_draft: Tensor, q_draft: Tensor | None) -> Tensor:
    """min(1, p/q) of the draft token, or p for a point mass. A token with p = q = 0 is never accepted (NaN)."""
    return p_draft if q_draft is None else (p_draft / q_draft).clamp(max=1.0)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """(p - q)+, unnormalised: the law of the token that replaces a rejected draft."""
    return (p - q).clamp_(min=0)


def take_row(x_BMV: Tensor, index_B: Tensor) -> Tensor:
    """x_BMV[b, index_B[b]] as [B, V]."""
    return x_BMV[torch.arange(len(index_B), device=x_BMV.device), index_B]


def leading_true(flags_BK: Tensor) -> Tensor:
    """How many of the row's flags hold before the first that does not, int64 [B]."""
    return flags_BK.long().cumprod(1).sum(1)


def inverse_cdf(weights_BV: Tensor, u_B: Tensor) -> Tensor:
    """The index whose cell of the normalised running sum holds u in [0, 1), int64 [B]; weights need not sum to 1.

    A token of weight 0 is never returned, however close u is to 1 and however the sum rounds: zero-weight entries are
    taken out of the running sum, and the threshold is kept below its last value.
    """
    cdf_BV = weights_BV.cumsum(-1, dtype=torch.float64).masked_fill_(weights_BV <= 0, -1.0)
    total_B = cdf_BV.amax(-1)
    threshold_B = torch.minimum(u_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    # argmax returns the first of equal values, here the first cell that reaches beyond the threshold.
    return (cdf_BV > threshold_B[:, None]).byte().argmax(-1)


def _per_row(values_B: Tensor, like: Tensor) -> Tensor:
    return values_B.reshape(-1, *[1] * (like.dim() - 1))


def _tempered_softmax(logits: Tensor, temperature: Tensor) -> Tensor:
    greedy = temperature == 0
    probs = (logits / torch.where(greedy, 1.0, temperature).to(logits.dtype)).softmax(-1)
    if not bool(greedy.any()):
        return probs
    one_hot = torch.zeros_like(probs).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return torch.where(greedy, one_hot, probs)


def _filter(probs: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    sorted_probs, order = probs.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        rank = torch.arange(probs.shape[-1], device=probs.device)
        sorted_probs = sorted_probs.masked_fill((rank >= top_k) & (top_k > 0), 0.0)
    if top_p is not None:
        cdf = sorted_probs.cumsum(-1, dtype=torch.float64)
        before = cdf - sorted_probs
        # The smallest set whose mass reaches top_p of what top-k left; its first token always stays.
        cut = (before >= top_p * cdf[..., -1:]) & (top_p < 1)
        cut[..., 0] = False
        sorted_probs = sorted_probs.masked_fill(cut, 0.0)
    sorted_probs = sorted_probs / sorted_probs.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, order, sorted_probs)
