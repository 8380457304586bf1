"""What a draft is worth on held-out text: the accept length that an engine would show, and whether that pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from draft_models.eagle3 import Eagle3
from draft_models.forecast import AcceptForecast, forecast_acceptance
from draft_models.training import accept_posteriors, make_batch
from rollout_engine.capture import capture_samples
from rollout_engine.decoder import Decoder
from rollout_engine.speculation import CostTable
from rollout_engine.types import Sample
from trainer.draft_forecast import DraftSettings, all_reduce
from trainer.finetune_data import pack_in_order

LEAST_GAIN = 1e-3  # tokens a verification; what moves an accept length by less is rounding


class HeldOut:
    """Texts that are never trained on. Each rank of `group` judges its share; None without torch.distributed."""

    def __init__(
        self,
        samples: Sequence[Sample],
        decoder: Decoder,
        settings: DraftSettings,
        max_tokens: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """`max_tokens` bounds what one forward of target and draft holds at once."""
        self._decoder, self._settings, self._group = decoder, settings, group
        lengths = [len(s.request.prompt_ids) + len(s.token_ids) for s in samples]
        batches = pack_in_order(sorted(range(len(samples)), key=lambda i: (lengths[i], i)), lengths, max_tokens)
        first, step = (0, 1) if group is None else (group.rank(), group.size())
        self._batches = [[samples[i] for i in batch] for batch in batches[first::step]]

    def judge(self, draft: Eagle3, product_dtype: torch.dtype | None = None) -> AcceptForecast:
        """The exact expectation under the engine's rule and temperature, over the texts of all ranks. Collective."""
        depth = self._settings.depth
        sums = torch.zeros(3 * depth + 1, dtype=torch.float64)
        for samples in self._batches:
            sums += torch.tensor(self._expected(samples, draft, product_dtype), dtype=torch.float64)
        sums = sums.to(self._decoder.device)
        all_reduce(sums, self._group)
        return forecast_of(sums.tolist(), depth)

    def _expected(self, samples: Sequence[Sample], draft: Eagle3, product_dtype: torch.dtype | None) -> list[float]:
        """Flat, of one batch, whose states are gone when this returns."""
        depth, rule = self._settings.depth, self._settings.rule
        batch = make_batch(capture_samples(self._decoder, samples, draft.config.aux_layer_ids))
        if batch is None:
            return [0.0] * (3 * depth + 1)
        posteriors_QK = accept_posteriors(draft, batch, depth, rule, product_dtype=product_dtype)
        return flat(forecast_acceptance(posteriors_QK, batch.num_chains, depth))


def forecast_of(sums: Sequence[float], depth: int) -> AcceptForecast:
    """From the flat list that ranks add up and checkpoints hold: histogram, proposals, acceptances."""
    histogram, proposed, accepted = sums[: depth + 1], sums[depth + 1 : 2 * depth + 1], sums[2 * depth + 1 :]
    return AcceptForecast(tuple(histogram), tuple(proposed), tuple(accepted))


def flat(forecast: AcceptForecast) -> list[float]:
    """`forecast_of` backwards."""
    return [*forecast.histogram, *forecast.proposed_by_position, *forecast.accepted_by_position]


def rates(forecast: AcceptForecast) -> list[float]:
    """Accepted per proposed token, by position of the chain."""
    pairs = zip(forecast.accepted_by_position, forecast.proposed_by_position, strict=True)
    return [accepted / proposed for accepted, proposed in pairs if proposed > 0]


@dataclass(frozen=True, slots=True)
class ReadCost:
    """Parameters that a step of each model reads. At batch 1, where speculation wins most, decoding waits for these."""

    draft: int
    target: int

    @classmethod
    def of(cls, draft: Eagle3, decoder: Decoder) -> ReadCost:
        """The target's embedding is looked up, not read, unless it is the output layer too."""
        of_target = sum(tensor.numel() for tensor in decoder.named_tensors().values())
        looked_up = 0 if decoder.config.tied else decoder.embed.numel()
        return cls(sum(weight.numel() for weight in draft.parameters()), of_target - looked_up)

    def best_speedup(self, forecast: AcceptForecast) -> float:
        """The largest over depths d of tokens a verification / (1 + d drafts' reads), chains cut to d tokens.

        An upper bound of what speculation can win: a verification is counted as dear as a plain step.
        """
        depths = range(1, 1 + len(forecast.accepted_by_position))
        return max(tokens_at(forecast, depth) / (1.0 + depth * self.draft / self.target) for depth in depths)


def tokens_at(forecast: AcceptForecast, depth: int) -> float:
    """A verification's, of chains cut to `depth` drafts."""
    return 1.0 + sum(forecast.accepted_by_position[:depth]) / forecast.num_verify_steps


@dataclass(frozen=True, slots=True)
class Measured:
    """What speculation wins by measured step costs, where it wins most."""

    speedup: float  # over plain decoding
    batch: int
    depth: int

    @classmethod
    def best(cls, table: CostTable, forecast: AcceptForecast) -> Measured:
        """Over the batches that were measured, and all depths."""
        return max(
            (
                cls(tokens_at(forecast, depth) * step_s[0] / step_s[depth], batch, depth)
                for batch, step_s in zip(table.batches, table.step_s, strict=True)
                for depth in range(1, 1 + min(len(forecast.accepted_by_position), table.max_depth))
            ),
            key=lambda found: found.speedup,
        )

    def __str__(self) -> str:
        return f"{self.speedup:.2f} times as fast as plain decoding (batch {self.batch}, {self.depth} drafts a step)"


def why_worthless(
    after: AcceptForecast, before: AcceptForecast, cost: ReadCost, table: CostTable | None, started_from: str
) -> str | None:
    """Why a fine-tuned draft should not be served, in words; None when nothing speaks against it. A pure function.

    `started_from` names the draft whose forecast is `before`. With measured costs, `table`, these decide whether
    speculation pays; without, all that can be told is where it cannot.
    """
    reached, was = after.accept_length, before.accept_length
    if reached < was + LEAST_GAIN:
        return f"its accept length on held-out text is {reached:.3f}, that of {started_from} {was:.3f}"
    if table is not None:
        measured = Measured.best(table, after)
        if measured.speedup <= 1.0:
            return (
                f"speculation with it does not pay: at accept length {reached:.3f} it is, by rollout.cost_table, at "
                f"best {measured}"
            )
        return None
    bound = cost.best_speedup(after)
    if bound <= 1.0:
        return (
            f"speculation with it cannot pay: at accept length {reached:.3f} its own weights, "
            f"{cost.draft / cost.target:.2f} of the target's, take more to read than the tokens it wins "
            f"(at best {bound:.2f} of plain decoding)"
        )
    return None
