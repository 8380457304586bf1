"""The draft's learner: one rollout's captured samples in, a better draft out, and what the served draft was worth.

It owns the draft, its optimizer and its own gradient clip. The data comes detached from the policy's forward, so
nothing here can reach the policy. Learners live on the last pipeline stage; gradients are summed over `group`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3
from draft_models.losses import resolve_loss
from draft_models.randomness import request_seed
from draft_models.training import DraftBatch, DraftLoss, draft_loss, make_batch, split_by_tokens
from draft_models.types import DraftSample
from rollout_engine.types import Sample
from trainer.config import ConfigError
from trainer.draft_forecast import DraftForecast, DraftSettings, Key, all_reduce

COMPUTE_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


class DraftUpdateError(RuntimeError):
    """A draft step was refused (loss or gradient not finite); draft and optimizer are as before it."""


def product_dtype(compute_dtype: str) -> torch.dtype | None:
    """`draft.compute_dtype` as torch has it; None is the weights' own. Raises ConfigError for another one."""
    if compute_dtype not in COMPUTE_DTYPES:
        known = ", ".join(COMPUTE_DTYPES)
        raise ConfigError(f"draft.compute_dtype {compute_dtype!r} is not supported; use one of {known}")
    return COMPUTE_DTYPES[compute_dtype]


def plan_updates(
    samples: Sequence[Sample], config: DraftConfig, seed: int, step: int, share: float = 1.0
) -> list[frozenset[Key]]:
    """Which samples each of this rollout's optimizer steps learns from: disjoint, random, within the token budget.

    `share` above 0 is that of the tokens which a whole plan would take: fewer optimizer steps first, then smaller ones;
    above 1 it is more optimizer steps, which take more of the samples while there are any.

    A pure function of what every rank knows, so that ranks agree whoever holds a sample. Samples are taken in a
    shuffled order and dealt round-robin. A part ends at the first one that would go beyond `max_tokens_per_update`
    (but has always one): going on to those that still fit would fill its end with short ones.
    """
    order = _shuffled(samples, seed, step)
    parts: list[list[Key]] = [[] for _ in range(math.ceil(share * config.updates_per_step))]
    hands = max(len(parts), config.updates_per_step)
    for number, part in enumerate(parts):
        dealt = order[number::hands]
        left = min(config.max_tokens_per_update, num_tokens(dealt))
        left = math.ceil(left * share * config.updates_per_step / len(parts))
        for sample in dealt:
            left -= num_tokens([sample])
            if part and left < 0:
                break
            part.append(sample.request.key)
    return [frozenset(part) for part in parts if part]


def _shuffled(samples: Sequence[Sample], seed: int, step: int) -> list[Sample]:
    return sorted(samples, key=lambda s: (request_seed(seed, step, *s.request.key), s.request.key))


def choose_look(
    samples: Sequence[Sample], plan: Sequence[frozenset[Key]], most_tokens: int, seed: int, step: int
) -> frozenset[Key]:
    """Samples to forecast beside those of the plan's first part, so that both have `most_tokens` or a little less.

    Taken in the plan's shuffled order; a pure function of what every rank knows.
    """
    first = plan[0] if plan else frozenset[Key]()
    left = most_tokens - num_tokens(s for s in samples if s.request.key in first)
    chosen: list[Key] = []
    for sample in _shuffled(samples, seed, step):
        if sample.request.key in first:
            continue
        left -= num_tokens([sample])
        if left < 0:
            break
        chosen.append(sample.request.key)
    return frozenset(chosen)


def num_tokens(samples: Iterable[Sample]) -> int:
    """Of prompts and responses: what the draft's forward runs over."""
    return sum(len(sample.request.prompt_ids) + len(sample.token_ids) for sample in samples)


def planned_share(samples: Sequence[Sample], plan: Sequence[frozenset[Key]]) -> float:
    """Share of the samples' tokens that the plan's parts take."""
    taken = frozenset[Key]().union(*plan)
    return num_tokens(s for s in samples if s.request.key in taken) / num_tokens(samples)


class DraftLearner:
    """Trains one EAGLE-3 draft. `group` holds the ranks whose samples differ; None without torch.distributed."""

    def __init__(
        self, draft: Eagle3, config: DraftConfig, settings: DraftSettings, group: dist.ProcessGroup | None = None
    ) -> None:
        self.draft, self.config, self.settings = draft, config, settings
        self._product_dtype = product_dtype(config.compute_dtype)
        self._group = group
        self.forecast = DraftForecast(settings, self._product_dtype, group)
        self._loss_kind = resolve_loss(config.loss, settings.rule)
        self._device = next(draft.parameters()).device
        self._frozen: Eagle3 | None = None
        self._average = copy.deepcopy(draft).requires_grad_(False) if config.ema else None
        self._optimizer = torch.optim.AdamW(
            draft.parameters(),
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=all(p.is_cuda for p in draft.parameters()),  # one kernel a step instead of a few for each tensor
        )

    @property
    def served(self) -> Eagle3:
        """What is published, exported and forecast with: the draft, or with `draft.ema` the average of its past."""
        return self.draft if self._average is None else self._average

    def set_lr(self, lr: float) -> None:
        """Learning rate from the next update on; at first it is `draft.lr`."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def freeze_copy(self) -> None:
        """Keep the draft as it serves now, to be scored beside the trained one from the next update on."""
        self._frozen = copy.deepcopy(self.served).requires_grad_(False)

    def update(
        self, captured: Sequence[DraftSample], plan: Sequence[frozenset[Key]], also: frozenset[Key] = frozenset()
    ) -> dict[str, Any]:
        """One optimizer step for each part of `plan`; returns metrics, the same on every rank of the group.

        `captured` is this rank's share. The forecast is made on the first part, and on `also` by a forward of its own,
        with the weights that served them.
        Raises DraftUpdateError on every rank when loss or gradient is not finite.
        """
        metrics: dict[str, Any] = {"draft_loss_kind": str(self._loss_kind)} if plan else {}
        steps = []
        # The forecast rides on the training forward when that runs the served weights as deep as the engine drafts.
        rides = self._average is None and self.config.unroll >= self.settings.depth
        for number, part in enumerate(plan):
            batches = self._batches(captured, part)
            sums, posteriors = self._backward(batches, posteriors=rides and number == 0)
            if number == 0:
                metrics |= self._forecasts([*batches, *self._batches(captured, also)], posteriors)
            steps.append(self._step(sums, batches))
        return metrics | _mean_metrics(steps)

    def score(
        self, captured: Sequence[DraftSample], plan: Sequence[frozenset[Key]], also: frozenset[Key] = frozenset()
    ) -> dict[str, Any]:
        """The forecast alone, for a draft that is not trained."""
        return self.forecast.of_served(self.served, self._batches(captured, also.union(*plan[:1])))

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a sync sends: the served draft's tensors under their checkpoint names."""
        return self.served.named_tensors()

    def state_dict(self) -> dict[str, Any]:
        frozen, average = (None if copied is None else copied.state_dict() for copied in (self._frozen, self._average))
        return {
            "draft": self.draft.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "frozen": frozen,
            "average": average,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.draft.load_state_dict(state["draft"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        if state["frozen"] is not None:
            self.freeze_copy()
            assert self._frozen is not None
            self._frozen.load_state_dict(state["frozen"])

    # ---- one optimizer step ----

    def _batches(self, captured: Sequence[DraftSample], part: frozenset[Key]) -> list[DraftBatch]:
        """This rank's samples of a part, in as many batches as `max_tokens_per_forward` asks for."""
        mine = [s for s in captured if (s.prompt_id, s.sample_id) in part]
        runs = split_by_tokens(mine, self.config.max_tokens_per_forward)
        return [batch for run in runs if (batch := make_batch(run)) is not None]

    def _backward(self, batches: Sequence[DraftBatch], *, posteriors: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Gradient of the mean over the group's chains, as far as it comes from this rank: one forward a batch.

        The mean is by weight, so that learning rate and clipping mean the same however a part's tokens are weighted.
        Returns sums over the group, and the forecast's posteriors of each batch when they are asked for.
        """
        weight = self._global_weight(batches)
        self._optimizer.zero_grad()
        sums = torch.zeros(1 + self.config.unroll, 5, dtype=torch.float64, device=self._device)
        found = []
        for batch in batches:
            loss = self._loss(batch, posteriors=posteriors)
            (loss.loss_sum / weight).backward()
            sums += self._sums(loss, batch)
            if loss.posterior_QK is not None:
                found.append(loss.posterior_QK)
        all_reduce(sums, self._group)
        return sums, found

    def _loss(self, batch: DraftBatch, *, posteriors: bool) -> DraftLoss:
        return draft_loss(
            self.draft,
            batch,
            self.config.unroll,
            self.config.step_decay,
            self.settings.rule,
            loss=self._loss_kind,
            posteriors=posteriors,
            product_dtype=self._product_dtype,
        )

    def _global_weight(self, batches: Sequence[DraftBatch]) -> float:
        """Of the whole group's chains: their number, unless `draft.token_weighting` tells them apart."""
        mine = sum(batch.total_weight for batch in batches)
        if self._group is None or self._group.size() == 1:
            return mine  # nothing to wait for
        weight = torch.tensor(mine, dtype=torch.float64, device=self._device)
        all_reduce(weight, self._group)
        return float(weight)

    def _sums(self, loss: DraftLoss, batch: DraftBatch) -> torch.Tensor:
        """Float64 [1 + unroll, 5]: (loss, chains, their weight, tokens of the text that the draft can say, 0), then
        (chains, KL, overlap, top1, acceptance) by step."""
        assert loss.accept_K is not None
        counts = torch.tensor([loss.token_count, batch.total_weight, *loss.counts], dtype=torch.float64)
        counts = counts.to(self._device, non_blocking=True)
        sums = torch.zeros(1 + self.config.unroll, 5, dtype=torch.float64, device=self._device)
        sums[0, 0], sums[0, 1:3], sums[1:, 0] = loss.loss_sum.detach(), counts[:2], counts[2:]
        if self.draft.config.is_reduced:
            sums[0, 3] = self.draft.get_buffer("t2d")[batch.next_token_Q].sum()
        sums[1:, 1:] = torch.stack((loss.kl_K, loss.overlap_K, loss.top1_K, loss.accept_K), dim=1)
        return sums

    def _step(self, sums: torch.Tensor, batches: Sequence[DraftBatch]) -> dict[str, float]:
        """Reduce over the group, clip, step. A rank without samples adds zero; without any on any rank: {}."""
        grad_norm = self._reduce_and_clip()
        (loss_sum, count, weight, sayable, _), *by_step = sums.tolist()
        if count == 0:
            return {}
        if not (math.isfinite(loss_sum) and math.isfinite(grad_norm)):
            raise DraftUpdateError(
                f"draft update refused: loss {loss_sum / weight}, gradient norm {grad_norm}; draft and optimizer are "
                f"as before; {why_not_finite(self.draft, batches)}"
            )
        self._take_step()
        result = {"loss": loss_sum / weight, "grad_norm": grad_norm, "tokens": count}
        if self.draft.config.is_reduced:
            result["vocab_coverage"] = sayable / count
        for j, (chains, *totals) in enumerate(by_step):
            if chains > 0:
                names = ("kl", "overlap", "top1", "accept")
                result |= {f"{name}_{j}": total / chains for name, total in zip(names, totals, strict=True)}
        return result

    def _take_step(self) -> None:
        self._optimizer.step()
        if self._average is not None:
            mine, theirs = list(self._average.parameters()), list(self.draft.parameters())
            with torch.no_grad():
                torch._foreach_lerp_(mine, theirs, 1 - self.config.ema)

    def _reduce_and_clip(self) -> float:
        gradients = []
        for parameter in self.draft.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        if self._group is not None and self._group.size() > 1:
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat, group=self._group)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        largest = self.config.clip_grad or math.inf  # 0 = no clipping, as for the policy
        return float(torch.nn.utils.clip_grad_norm_(self.draft.parameters(), largest))

    def _forecasts(self, batches: Sequence[DraftBatch], posteriors: Sequence[torch.Tensor]) -> dict[str, Any]:
        metrics = self.forecast.of_served(self.served, batches, posteriors)
        if self._frozen is not None:
            metrics |= self.forecast.metrics("frozen", self._frozen, batches)
        return metrics


def why_not_finite(draft: Eagle3, batches: Sequence[DraftBatch]) -> str:
    """What to look at when loss or gradient is not finite: the first of the draft's tensors, or of the captured ones,
    that is not finite itself, else the step's size."""
    for name, weight in draft.named_parameters():
        if not bool(weight.isfinite().all()):
            return f"the draft's own {name} is not finite: start from a whole checkpoint"
    for batch in batches:
        captured = {
            "embeddings": batch.key_embeds_SH,
            "hidden states of the captured layers": batch.key_aux_SA,
            "final hidden states": batch.target_hidden_QW,
            "output layer": batch.target_head_VW,
        }
        for name, tensor in captured.items():
            if not bool(tensor.isfinite().all()):
                return f"the policy's {name} are not finite: look at logp_diff_max and at the policy's own loss"
    return "weights and captured states are finite: lower draft.lr or draft.clip_grad"


def _mean_metrics(steps: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Loss, gradient norm and per-step figures averaged over the optimizer steps that had tokens; tokens summed."""
    steps = [step for step in steps if step]
    if not steps:
        return {"draft_tokens": 0}

    def mean(key: str) -> float:
        values = [step[key] for step in steps if key in step]
        return sum(values) / len(values)

    depth = sum(key.startswith("kl_") for key in steps[0])
    reduced = {"draft_vocab_coverage": mean("vocab_coverage")} if "vocab_coverage" in steps[0] else {}
    return reduced | {
        "draft_tokens": int(sum(step["tokens"] for step in steps)),
        "draft_updates": len(steps),
        "draft_loss": mean("loss"),
        "draft_grad_norm": mean("grad_norm"),
        "draft_kl_by_step": [mean(f"kl_{j}") for j in range(depth)],
        "draft_overlap_by_step": [mean(f"overlap_{j}") for j in range(depth)],
        "draft_top1_by_step": [mean(f"top1_{j}") for j in range(depth)],
        "draft_accept_by_step": [mean(f"accept_{j}") for j in range(depth)],
    }
