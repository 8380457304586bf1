"""What the draft that served a rollout should have shown on its texts, over all ranks: as metrics, and held against
what the engine did show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from draft_models.eagle3 import Eagle3
from draft_models.forecast import AcceptForecast, forecast_acceptance
from draft_models.sentinel import Look, is_of_text, look_at_counts, look_at_traces
from draft_models.training import DraftBatch, accept_posteriors
from draft_models.types import VerifyRule
from rollout_engine.types import FinishReason, Sample

Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class DraftSettings:
    """What of the run's other settings the draft's training depends on."""

    rule: VerifyRule
    depth: int  # k of the engine, for the forecast
    min_effect: float = 0.0  # of the sentinel


class DraftForecast:
    """Forecasts for this rank's share of the samples, summed over `group`; None without torch.distributed.

    Asked to `watch` samples, the next forecast of the served draft is also held against what the engine showed on them.
    """

    def __init__(
        self, settings: DraftSettings, product_dtype: torch.dtype | None, group: dist.ProcessGroup | None
    ) -> None:
        self._settings, self._product_dtype, self._group = settings, product_dtype, group
        self._watched: dict[Key, Sample] | None = None
        self._look: Look | None = None

    def watch(self, samples: Iterable[Sample]) -> None:
        """Before a forecast. Its look is then in `take_look`, the same on every rank of the group."""
        self._look, self._watched = None, {sample.request.key: sample for sample in samples}

    def of_served(
        self, draft: Eagle3, batches: Sequence[DraftBatch], posteriors: Sequence[torch.Tensor] = ()
    ) -> dict[str, Any]:
        """`metrics` named "predicted", of the weights that served. Collective."""
        depth = self._settings.depth
        missing = [self.posteriors(draft, batch) for batch in batches[len(posteriors) :]]
        posteriors = [*posteriors, *missing]
        if self._watched is not None:
            look = Look.nothing(depth)
            for batch, posteriors_QK in zip(batches, posteriors, strict=True):
                look = look + look_at_batch(posteriors_QK[:, :depth], batch, self._watched, self._settings.min_effect)
            sums = look.flat().to(next(draft.parameters()).device)
            all_reduce(sums, self._group)
            self._look, self._watched = Look.from_flat(sums.cpu(), depth), None
        return self.metrics("predicted", draft, batches, posteriors)

    def take_look(self) -> Look | None:
        """What the watched samples showed; None when nothing was forecast since the last call."""
        look, self._look = self._look, None
        return look

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


def look_at_batch(
    posteriors_QK: torch.Tensor, batch: DraftBatch, shown: Mapping[Key, Sample], min_effect: float
) -> Look:
    """What the batch's samples showed beside what they should have; K is the engine's depth.

    Left out are samples of several versions, which no one draft served, those that tell nothing, aborted ones, whose
    end is that of a step and so tells how it was decoded, those whose forecast is no number (a draft or policy that is
    not finite says nothing about the engine), and those whose histogram lacks tokens, as after a new prefill.
    """
    depth = posteriors_QK.shape[1]
    look = Look.nothing(depth)
    parts = zip(batch.sample_keys, batch.num_chains, posteriors_QK.cpu().split(batch.num_chains), strict=True)
    traced, counted = [], []
    for key, num_chains, part_CK in parts:
        sample = shown.get(key)
        if sample is None or len(sample.policy_versions) != 1 or sample.finish_reason is FinishReason.ABORT:
            continue
        if not bool(part_CK.isfinite().all()):
            continue
        if sample.trace:
            traced.append((part_CK, num_chains, sample.trace))
        elif len(histogram := sample.spec.accepted_histogram) == depth + 1 and is_of_text(histogram, num_chains):
            counted.append((part_CK, num_chains, histogram))
    if traced:
        chances, lengths, traces = zip(*traced, strict=True)
        look = look + look_at_traces(torch.cat(chances), lengths, traces, min_effect)
    if counted:
        chances, lengths, histograms = zip(*counted, strict=True)
        look = look + look_at_counts(torch.cat(chances), lengths, histograms, min_effect)
    return look


def all_reduce(sums: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Sum over the group, in place; nothing on one rank."""
    if group is not None and group.size() > 1:
        dist.all_reduce(sums, group=group)
