"""What acceptance an engine should have shown on a given text, from the draft and policy that served it.

Two steps. `accept_posterior`: for a token that is known to stand in the text, the chance that it got there as an
accepted draft. `forecast_acceptance`: a renewal recursion over the rows where a verification can start, which turns
those chances into the expected histogram of accepted lengths. No random number is needed: given the text, the
expectation is exact.

Axes: n tokens, R draft vocabulary, Q chains (rows where drafting can start) of all samples end to end, B samples,
C chains of one sample (padded), K draft depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draft_models.types import VerifyRule
from draft_models.verify import accept_probability, sample_draft

_NOISE_ELEMENTS = 1 << 24  # Gumbel noise made at once; bounds memory for large vocabularies


@dataclass(frozen=True, slots=True)
class EmittedTokens:
    """Tokens of a text, each with the target's probability of it at the rollout's temperature."""

    token_n: Tensor  # int64
    p_token_n: Tensor
    seed_n: Tensor  # int64: of the request
    position_n: Tensor  # int64: sequence index


def accept_posterior(
    rule: VerifyRule,
    draft_logits_nR: Tensor,
    temperature_n: Tensor,
    emitted: EmittedTokens,
    target_ids_R: Tensor | None = None,
) -> Tensor:
    """Chance [n] that each token came from an accepted draft, given that it was emitted and that drafting got there.

    Rejection: x is emitted by acceptance with q(x) min(1, p(x)/q(x)) out of p(x), hence min(1, q(x)/p(x)). The other
    rules have one fixed proposal, and a rejected proposal is never emitted, hence 1 or 0: the draft's argmax, or for
    coupled its choice under the shared noise. At temperature 0 every rule is greedy.
    """
    is_greedy_n = temperature_n == 0
    logits_nR = draft_logits_nR / torch.where(is_greedy_n, 1.0, temperature_n).to(draft_logits_nR.dtype)[:, None]
    return posterior_at_temperature(rule, logits_nR, is_greedy_n, emitted, target_ids_R)


def posterior_at_temperature(
    rule: VerifyRule,
    logits_nR: Tensor,
    is_greedy_n: Tensor,
    emitted: EmittedTokens,
    target_ids_R: Tensor | None = None,
) -> Tensor:
    """`accept_posterior` of draft logits that are already divided by the temperature (by anything where greedy)."""
    best_n = _target_id(logits_nR.argmax(-1), target_ids_R)
    is_best_n = (best_n == emitted.token_n).to(logits_nR.dtype)
    if rule is VerifyRule.REJECTION:
        q_token_n = _prob_of_token(logits_nR, emitted.token_n, target_ids_R)
        # What the draft never says is never accepted, also where p has underflowed to 0 and the ratio to NaN.
        value_n = torch.where(q_token_n == 0, 0.0, accept_probability(q_token_n, emitted.p_token_n))
    elif rule is VerifyRule.COUPLED:
        value_n = (_coupled_choice(logits_nR, emitted, target_ids_R) == emitted.token_n).to(is_best_n.dtype)
    else:
        value_n = is_best_n
    return torch.where(is_greedy_n, is_best_n, value_n)


@dataclass(frozen=True, slots=True)
class AcceptForecast:
    """Expected counts, in the units of an engine's own statistics.

    Accepted drafts that fall behind the end of the text do not count; proposals do.
    """

    histogram: tuple[float, ...]  # [n]: verify steps that accept n drafts, 0..K
    proposed_by_position: tuple[float, ...]
    accepted_by_position: tuple[float, ...]

    @property
    def num_verify_steps(self) -> float:
        return sum(self.histogram)

    @property
    def accept_length(self) -> float:
        """Tokens per verify step, the bonus token included; 1.0 without any step."""
        steps = self.num_verify_steps
        return 1.0 + sum(self.accepted_by_position) / steps if steps > 0 else 1.0


def forecast_acceptance(posterior_QK: Tensor, num_chains: Sequence[int], depth: int) -> AcceptForecast:
    """Expected statistics of drafting `depth` tokens at every step of these texts (1 <= depth <= K).

    `posterior_QK`: chances by chain and step, of which the first `depth` are used. The chain of rank c follows
    response token c (0-based), so num_chains[b] = response length - 1. Runs on the CPU, whatever device the
    chances are on: the recursion is as long as the longest response, and small.

    From a start of rank c with n accepted, the next start has rank c + n + 1; hence P(start at c) is a forward
    recursion (a renewal process with n + 1 as the step).
    """
    posterior_QK, num_chains_B = posterior_QK.cpu(), torch.tensor(num_chains)
    num_samples, longest = len(num_chains), max(num_chains)
    rank_C = torch.arange(longest)
    exists_BC = rank_C < num_chains_B[:, None]
    left_BC = num_chains_B[:, None] - rank_C  # tokens of the text that follow the start
    posterior_BCK = posterior_QK.new_zeros(num_samples, longest, depth, dtype=torch.float64)
    posterior_BCK[exists_BC] = posterior_QK[:, :depth].double()
    # reach[j]: the first j drafts stand; a draft behind the end of the text cannot.
    inside_BCK = torch.arange(depth) < left_BC[..., None]
    reach_BCK = torch.where(inside_BCK, posterior_BCK, 0.0).cumprod(-1)
    reach_BCM = torch.nn.functional.pad(reach_BCK, (1, 1), value=0.0)
    reach_BCM[..., 0] = 1.0
    accepted_BCM = reach_BCM[..., :-1] - reach_BCM[..., 1:]  # P(n accepted | start), n = 0..depth

    start_BC = _renewal(accepted_BCM, exists_BC)
    return AcceptForecast(
        histogram=tuple((start_BC[..., None] * accepted_BCM).sum((0, 1)).tolist()),
        proposed_by_position=(start_BC.sum().item(),) * depth,
        accepted_by_position=tuple((start_BC[..., None] * reach_BCK).sum((0, 1)).tolist()),
    )


def _renewal(step_BCM: Tensor, exists_BC: Tensor) -> Tensor:
    """P(a verification starts at rank c): 1 at rank 0, then from rank c on to c + n + 1 with step_BCM[b, c, n]."""
    num_samples, num_chains, num_steps = step_BCM.shape
    start_CB = step_BCM.new_zeros(num_chains + num_steps, num_samples)
    start_CB[0] = 1.0
    # Ranks in front: a rank's steps then lie side by side. And NumPy, whose calls cost a third of torch's: there are a
    # few for every rank of the longest text, on numbers that are quickly added.
    start = start_CB.numpy()
    for rank, step_MB in enumerate(step_BCM.permute(1, 2, 0).contiguous().numpy(), start=1):
        start[rank : rank + num_steps] += start[rank - 1] * step_MB
    return start_CB[:num_chains].t() * exists_BC


def _target_id(draft_id: Tensor, target_ids_R: Tensor | None) -> Tensor:
    return draft_id if target_ids_R is None else target_ids_R[draft_id]


def draft_ids(token_n: Tensor, target_ids_R: Tensor | None) -> tuple[Tensor, Tensor]:
    """The draft's id of each target token, and whether it has one; the id of one without is valid and means nothing."""
    if target_ids_R is None:
        return token_n, torch.ones_like(token_n, dtype=torch.bool)
    index_n = torch.searchsorted(target_ids_R, token_n).clamp(max=len(target_ids_R) - 1)
    return index_n, target_ids_R[index_n] == token_n


def _prob_of_token(logits_nR: Tensor, token_n: Tensor, target_ids_R: Tensor | None) -> Tensor:
    """softmax(logits) at each target token; 0 for tokens outside the draft's vocabulary."""
    index_n, known_n = draft_ids(token_n, target_ids_R)
    log_prob_n = logits_nR.gather(1, index_n[:, None])[:, 0] - logits_nR.logsumexp(-1)
    return torch.where(known_n, log_prob_n.exp(), 0.0)


def _coupled_choice(logits_nR: Tensor, emitted: EmittedTokens, target_ids_R: Tensor | None) -> Tensor:
    rows = max(1, _NOISE_ELEMENTS // logits_nR.shape[1])
    parts = zip(logits_nR.split(rows), emitted.seed_n.split(rows), emitted.position_n.split(rows), strict=True)
    choices = [
        sample_draft(VerifyRule.COUPLED, logits.softmax(-1), seeds, positions, target_ids_R)
        for logits, seeds, positions in parts
    ]
    return torch.cat(choices)
