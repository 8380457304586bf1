"""From logits to tokens and log-probs for a batch of rows with different sampling settings.

Axes: B rows, M = K + 1 verified positions, V target vocabulary. Filters, temperatures and noise that no row needs
are never computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from draft_models.types import VerifyRule
from draft_models.verify import Verified, draw_noise, expand_draft_vocab, sample_draft, target_probs, verify
from rollout_engine.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Proposal:
    """Draft tokens for the first rows of a batch; row b proposes the first num_drafts[b] of its K."""

    tokens_BK: torch.Tensor  # int64
    probs_BKV: torch.Tensor | None  # the laws they were drawn from; None = point masses
    num_drafts: list[int]

    def padded(self, num_rows: int) -> Proposal:
        """With rows that propose nothing behind, `num_rows` in all."""
        extra = num_rows - len(self.num_drafts)
        if extra == 0:
            return self
        tokens = F.pad(self.tokens_BK, (0, 0, 0, extra))
        probs = None if self.probs_BKV is None else F.pad(self.probs_BKV, (0, 0, 0, 0, 0, extra))
        return Proposal(tokens, probs, self.num_drafts + [0] * extra)

    def with_given(self, given: Sequence[Sequence[int]]) -> Proposal:
        """With other drafts, point masses, in the rows for which `given` has any; one entry for every row.

        Where the other rows' drafts were drawn from laws, a point mass is a law too: one at its token.
        """
        rows = [row for row, tokens in enumerate(given) if tokens]
        width = max(len(given[row]) for row in rows)
        device, extra = self.tokens_BK.device, max(0, width - self.tokens_BK.shape[1])
        tokens_BK = F.pad(self.tokens_BK, (0, extra))
        padding = tokens_BK.shape[1] - width
        given_RK = F.pad(_padded(given, rows, width, device), (0, padding))
        rows_R = torch.tensor(rows, device=device)
        tokens_BK[rows_R] = given_RK
        probs_BKV = self.probs_BKV
        if probs_BKV is not None:
            probs_BKV = F.pad(probs_BKV, (0, 0, 0, extra))
            probs_BKV[rows_R] = torch.zeros_like(probs_BKV[rows_R]).scatter_(2, given_RK[..., None], 1.0)
        num_drafts = [len(tokens) or count for tokens, count in zip(given, self.num_drafts, strict=True)]
        return Proposal(tokens_BK, probs_BKV, num_drafts)

    @classmethod
    def of_given(cls, given: Sequence[Sequence[int]], device: torch.device) -> Proposal:
        """Point masses alone; one entry for every row, of which at least one is not empty."""
        width = max(map(len, given))
        return cls(_padded(given, range(len(given)), width, device), None, [len(tokens) for tokens in given])


def _padded(given: Sequence[Sequence[int]], rows: Sequence[int], width: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([[*given[row], *[0] * (width - len(given[row]))] for row in rows], device=device)


@dataclass(frozen=True, slots=True)
class RowSampling:
    """Sampling settings of B rows as tensors; None where every row has the neutral value."""

    rule: VerifyRule
    seeds_B: torch.Tensor  # int64
    temperature_B: torch.Tensor | None  # float64; 0 = greedy
    top_p_B: torch.Tensor | None
    top_k_B: torch.Tensor | None

    @classmethod
    def of(cls, params: Sequence[SamplingParams], rule: VerifyRule, device: torch.device) -> RowSampling:
        """`rule` serves the rows that sample; a batch of greedy rows alone takes the greedy rule."""
        temperatures = [p.temperature for p in params]

        def column(values: list[float], neutral: float, dtype: torch.dtype) -> torch.Tensor | None:
            is_neutral = all(value == neutral for value in values)
            return None if is_neutral else torch.tensor(values, dtype=dtype, device=device)

        return cls(
            rule=VerifyRule.GREEDY if not any(temperatures) else rule,
            seeds_B=torch.tensor([p.seed for p in params], dtype=torch.int64, device=device),
            temperature_B=column(temperatures, 1.0, torch.float64),
            top_p_B=column([p.top_p for p in params], 1.0, torch.float64),
            top_k_B=column([p.top_k for p in params], 0, torch.int64),
        )

    def first(self, num_rows: int) -> RowSampling:
        """The settings of the first rows."""
        columns = (self.temperature_B, self.top_p_B, self.top_k_B)
        temperature, top_p, top_k = (None if c is None else c[:num_rows] for c in columns)
        return RowSampling(self.rule, self.seeds_B[:num_rows], temperature, top_p, top_k)

    def choose(self, logits_BMV: torch.Tensor, first_position_B: torch.Tensor, proposal: Proposal | None) -> Verified:
        """Emitted tokens, when column 0 of the logits decides sequence index `first_position_B`."""
        num_rows, num_tokens, vocab_size = logits_BMV.shape
        if proposal is None:
            nothing = first_position_B.new_zeros(num_rows, 0)
            proposal = Proposal(nothing, None, [0] * num_rows)
        num_drafts_B = torch.tensor(proposal.num_drafts, device=logits_BMV.device)
        noise = draw_noise(self.rule, self.seeds_B, first_position_B, num_tokens - 1, vocab_size)
        p_BMV = self.probs(logits_BMV)
        return verify(self.rule, p_BMV, proposal.probs_BKV, proposal.tokens_BK, num_drafts_B, noise)

    def probs(self, logits: torch.Tensor) -> torch.Tensor:
        """The law that tokens are drawn from. Greedy rows need an argmax only: logits serve."""
        if self.rule is VerifyRule.GREEDY:
            return logits
        return target_probs(logits, self.temperature_B, self.top_p_B, self.top_k_B)

    def logprobs(self, logits_BMV: torch.Tensor, tokens_BM: torch.Tensor) -> torch.Tensor:
        """log_softmax(logits / T) of the tokens before any filter; T = 1 for greedy rows."""
        logits_BMV = logits_BMV if logits_BMV.dtype == torch.float64 else logits_BMV.float()
        if self.temperature_B is not None and self.rule is not VerifyRule.GREEDY:
            scale_B = torch.where(self.temperature_B == 0, 1.0, self.temperature_B)
            logits_BMV = logits_BMV / scale_B.to(logits_BMV.dtype)[:, None, None]
        return logits_BMV.log_softmax(-1).gather(-1, tokens_BM[..., None])[..., 0]

    def draft(
        self, logits_BD: torch.Tensor, position_B: torch.Tensor, target_ids_D: torch.Tensor | None, vocab_size: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The draft's tokens (target ids) at `position_B` and, where the rule needs it, their law over V."""
        if self.rule in (VerifyRule.GREEDY, VerifyRule.TARGET_ONLY):
            return sample_draft(self.rule, logits_BD, self.seeds_B, position_B, target_ids_D), None
        q_BD = target_probs(logits_BD, self.temperature_B, self.top_p_B, self.top_k_B)
        tokens_B = sample_draft(self.rule, q_BD, self.seeds_B, position_B, target_ids_D)
        if self.rule is VerifyRule.COUPLED:
            return tokens_B, None
        return tokens_B, q_BD if target_ids_D is None else expand_draft_vocab(q_BD, target_ids_D, vocab_size)
