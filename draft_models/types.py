"""The types that drafters, their training and their verification share.

Axes: B rows, K draft depth, T tokens of one sequence, V target vocabulary, D draft vocabulary, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch


class VerifyRule(StrEnum):
    """How a proposed token is accepted. Every rule is exact; they differ in acceptance and in randomness.

    * GREEDY: the target's argmax, accepted when equal (temperature 0).
    * TARGET_ONLY: a point-mass proposal, accepted with p(x) (SGLang's default at temperature > 0).
    * REJECTION: x drawn from q, accepted with min(1, p/q) (Leviathan et al. 2023, Chen et al. 2023).
    * COUPLED: both sides take argmax(log prob + shared Gumbel noise); the tokens are those of plain decoding.
    """

    GREEDY = "greedy"
    TARGET_ONLY = "target_only"
    REJECTION = "rejection"
    COUPLED = "coupled"


@dataclass(frozen=True, slots=True)
class DraftSample:
    """One rolled-out sequence as the draft learns from it, all taken from ONE target forward (same weights).

    Row t of `aux_hidden` and `target_hidden` comes from the target at position t, so `target_logits[t]` is
    the (temperature-free, unfiltered) logits of x_{t+1}. Nothing here carries a gradient.

    Instead of the logits, which would be most of the bytes, it holds what the target's output layer read, and that
    layer as it was, one tensor that all samples of a forward share.
    """

    prompt_id: int
    sample_id: int
    token_ids: torch.Tensor  # [T] int64: prompt and response
    embeds: torch.Tensor  # [T, H] rows of the policy's embedding for token_ids
    aux_hidden: torch.Tensor  # [T, 3H] outputs of the three captured layers, concatenated in layer order
    target_hidden: torch.Tensor  # [T, H] after the final norm
    target_head: torch.Tensor  # [V, H]
    prompt_len: int  # positions below it are prompt; the first response token is x[prompt_len]
    temperature: float  # of the rollout; 0 means greedy
    seed: int  # the request's seed, for the coupled rule's shared noise
    policy_version: int
    token_weights: torch.Tensor | None = None  # [R] of each response token in the draft's loss; None = all 1

    @property
    def target_logits(self) -> torch.Tensor:
        """[T, V], computed anew in the dtype of the capture."""
        return torch.nn.functional.linear(self.target_hidden, self.target_head)

    @property
    def num_bytes(self) -> int:
        """Bytes held by its own four tensors; the shared `target_head` comes on top once."""
        tensors = (self.token_ids, self.embeds, self.aux_hidden, self.target_hidden)
        return sum(t.numel() * t.element_size() for t in tensors)
