"""What the draft that served a rollout should have shown on its texts: the forecast, as metrics over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from draft_models.eagle3 import Eagle3
from draft_models.forecast import AcceptForecast, forecast_acceptance
from draft_models.training import DraftBatch, accept_posteriors
from draft_models.types import VerifyRule


@dataclass(frozen=True, slots=True)
class DraftSettings:
    """What of the run's other settings the draft's training depends on."""

    rule: VerifyRule
    depth: int  # k of the engine, for the forecast


class DraftForecast:
    """Forecasts for this rank's share of the samples, summed over `group`; None without torch.distributed."""

    def __init__(
        self, settings: DraftSettings, product_dtype: torch.dtype | None, group: dist.ProcessGroup | None
    ) -> None:
        self._settings, self._product_dtype, self._group = settings, product_dtype, group

    def metrics(
        self,
        name: str,
        draft: Eagle3,
        batches: Sequence[DraftBatch],
        posteriors: Sequence[torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """`<name>_accept_length` and `<name>_accept_rate_by_position`, the same on every rank. Collective.

        `posteriors` ([Q, K] of each batch), where forwards of `draft` gave them already, spare one. Without any chain
        on any rank: {}.
        """
        depth = self._settings.depth
        sums = torch.zeros(3 * depth + 1, dtype=torch.float64)
        for number, batch in enumerate(batches):
            posteriors_QK = self.posteriors(draft, batch) if posteriors is None else posteriors[number]
            expected = forecast_acceptance(posteriors_QK, batch.num_chains, depth)
            counts = (*expected.histogram, *expected.proposed_by_position, *expected.accepted_by_position)
            sums += torch.tensor(counts, dtype=torch.float64)
        sums = sums.to(next(draft.parameters()).device)
        all_reduce(sums, self._group)
        histogram, proposed, accepted = (part.tolist() for part in sums.split([depth + 1, depth, depth]))
        forecast = AcceptForecast(tuple(histogram), tuple(proposed), tuple(accepted))
        if forecast.num_verify_steps == 0:
            return {}
        rates = [a / p for a, p in zip(accepted, proposed, strict=True) if p > 0]
        return {f"{name}_accept_length": forecast.accept_length, f"{name}_accept_rate_by_position": rates}

    def posteriors(self, draft: Eagle3, batch: DraftBatch) -> torch.Tensor:
        """See `draft_models.training.accept_posteriors`, at the engine's depth and under its rule."""
        settings = self._settings
        return accept_posteriors(draft, batch, settings.depth, settings.rule, product_dtype=self._product_dtype)


def all_reduce(sums: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Sum over the group, in place; nothing on one rank."""
    if group is not None and group.size() > 1:
        dist.all_reduce(sums, group=group)
