"""The draft's learner: one rollout's captured samples in, a better draft out, and what the served draft was worth.

It owns the draft, its optimizer and its own gradient clip. The data comes detached from the policy's forward, so
nothing here can reach the policy. Learners live on the last pipeline stage; gradients are summed over `group`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3
from draft_models.randomness import request_seed
from draft_models.training import DraftBatch, DraftLoss, draft_loss, make_batch
from draft_models.types import DraftSample
from rollout_engine.types import Sample
from trainer.config import ConfigError
from trainer.draft_forecast import DraftForecast, DraftSettings, all_reduce

Key = tuple[int, int]
COMPUTE_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


class DraftUpdateError(RuntimeError):
    """A draft step was refused (loss or gradient not finite); draft and optimizer are as before it."""


def product_dtype(compute_dtype: str) -> torch.dtype | None:
    """`draft.compute_dtype` as torch has it; None is the weights' own. Raises ConfigError for another one."""
    if compute_dtype not in COMPUTE_DTYPES:
        known = ", ".join(COMPUTE_DTYPES)
        raise ConfigError(f"draft.compute_dtype {compute_dtype!r} is not supported; use one of {known}")
    return COMPUTE_DTYPES[compute_dtype]


def plan_updates(samples: Sequence[Sample], config: DraftConfig, seed: int, step: int) -> list[frozenset[Key]]:
    """Which samples each of this rollout's optimizer steps learns from: disjoint, random, within the token budget.

    A pure function of what every rank knows, so that ranks agree whoever holds a sample. Samples are taken in a
    shuffled order and dealt round-robin. A part ends at the first one that would go beyond `max_tokens_per_update`
    (but has always one): going on to those that still fit would fill its end with short ones.
    """
    order = sorted(samples, key=lambda s: (request_seed(seed, step, *s.request.key), s.request.key))
    parts: list[list[Key]] = [[] for _ in range(config.updates_per_step)]
    for number, part in enumerate(parts):
        left = config.max_tokens_per_update
        for sample in order[number :: config.updates_per_step]:
            left -= len(sample.request.prompt_ids) + len(sample.token_ids)
            if part and left < 0:
                break
            part.append(sample.request.key)
    return [frozenset(part) for part in parts if part]


class DraftLearner:
    """Trains one EAGLE-3 draft. `group` holds the ranks whose samples differ; None without torch.distributed."""

    def __init__(
        self, draft: Eagle3, config: DraftConfig, settings: DraftSettings, group: dist.ProcessGroup | None = None
    ) -> None:
        self.draft, self.config, self.settings = draft, config, settings
        self._product_dtype = product_dtype(config.compute_dtype)
        self._group = group
        self._forecast = DraftForecast(settings, self._product_dtype, group)
        self._frozen: Eagle3 | None = None
        self._optimizer = torch.optim.AdamW(
            draft.parameters(),
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=all(p.is_cuda for p in draft.parameters()),  # one kernel a step instead of a few for each tensor
        )

    def freeze_copy(self) -> None:
        """Keep the draft as it is now, to be scored beside the trained one from the next update on."""
        self._frozen = copy.deepcopy(self.draft).requires_grad_(False)

    def update(self, captured: Sequence[DraftSample], plan: Sequence[frozenset[Key]]) -> dict[str, Any]:
        """One optimizer step for each part of `plan`; returns metrics, the same on every rank of the group.

        `captured` is this rank's share. The forecast is made on the first part, with the weights that served it.
        Raises DraftUpdateError on every rank when loss or gradient is not finite.
        """
        metrics: dict[str, Any] = {}
        losses = []
        for number, part in enumerate(plan):
            batch = make_batch([s for s in captured if (s.prompt_id, s.sample_id) in part])
            loss = self._loss(batch, forecast=number == 0)
            if number == 0:
                metrics |= self._forecasts(batch, loss)
            losses.append(self._step(loss))
        return metrics | _mean_metrics(losses)

    def score(self, captured: Sequence[DraftSample], plan: Sequence[frozenset[Key]]) -> dict[str, Any]:
        """The forecast alone, for a draft that is not trained."""
        batch = make_batch([s for s in captured if (s.prompt_id, s.sample_id) in plan[0]]) if plan else None
        return self._forecast.metrics("predicted", self.draft, batch)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a sync sends: the draft's tensors under their checkpoint names."""
        return self.draft.named_tensors()

    def state_dict(self) -> dict[str, Any]:
        frozen = None if self._frozen is None else self._frozen.state_dict()
        return {"draft": self.draft.state_dict(), "optimizer": self._optimizer.state_dict(), "frozen": frozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.draft.load_state_dict(state["draft"])
        self._optimizer.load_state_dict(state["optimizer"])
        if state["frozen"] is not None:
            self.freeze_copy()
            assert self._frozen is not None
            self._frozen.load_state_dict(state["frozen"])

    # ---- one optimizer step ----

    def _loss(self, batch: DraftBatch | None, *, forecast: bool) -> DraftLoss | None:
        if batch is None:
            return None
        # The forecast rides on the training forward when the unroll is as deep as the engine drafts.
        rule = self.settings.rule if forecast and self.config.unroll >= self.settings.depth else None
        return draft_loss(
            self.draft, batch, self.config.unroll, self.config.step_decay, rule, product_dtype=self._product_dtype
        )

    def _step(self, loss: DraftLoss | None) -> dict[str, float]:
        """Gradient of the mean over the group's chains, clip, step. A rank without samples adds zero."""
        sums = self._sums(loss)
        loss_sum, count, *_ = sums[0].tolist()
        if count == 0:
            return {}
        self._optimizer.zero_grad(set_to_none=False)
        if loss is not None:
            (loss.loss_sum / count).backward()
        grad_norm = self._reduce_and_clip()
        if not (math.isfinite(loss_sum) and math.isfinite(grad_norm)):
            raise DraftUpdateError(
                f"draft update refused: loss {loss_sum / count}, gradient norm {grad_norm}; draft and optimizer are as "
                "before; lower draft.lr or draft.clip_grad, or look at the captured samples"
            )
        self._optimizer.step()
        result = {"loss": loss_sum / count, "grad_norm": grad_norm, "tokens": count}
        for j, (chains, kl, overlap, top1) in enumerate(sums[1:].tolist()):
            if chains > 0:
                result |= {f"kl_{j}": kl / chains, f"overlap_{j}": overlap / chains, f"top1_{j}": top1 / chains}
        return result

    def _sums(self, loss: DraftLoss | None) -> torch.Tensor:
        """Over the group, float64 [1 + unroll, 4], on the CPU: (loss, chains), then (chains, KL, overlap, top1)."""
        device = next(self.draft.parameters()).device
        sums = torch.zeros(1 + self.config.unroll, 4, dtype=torch.float64, device=device)
        if loss is not None:
            counts = torch.tensor([loss.token_count, *loss.counts], dtype=torch.float64).to(device, non_blocking=True)
            sums[0, 0], sums[0, 1], sums[1:, 0] = loss.loss_sum.detach(), counts[0], counts[1:]
            sums[1:, 1:] = torch.stack((loss.kl_K, loss.overlap_K, loss.top1_K), dim=1)
        all_reduce(sums, self._group)
        return sums.cpu()

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

    def _forecasts(self, batch: DraftBatch | None, loss: DraftLoss | None) -> dict[str, Any]:
        posteriors_QK = None if loss is None else loss.posterior_QK
        metrics = self._forecast.metrics("predicted", self.draft, batch, posteriors_QK)
        if self._frozen is not None:
            metrics |= self._forecast.metrics("frozen", self._frozen, batch)
        return metrics


def _mean_metrics(steps: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Loss, gradient norm and per-step figures averaged over the optimizer steps that had tokens; tokens summed."""
    steps = [step for step in steps if step]
    if not steps:
        return {"draft_tokens": 0}

    def mean(key: str) -> float:
        values = [step[key] for step in steps if key in step]
        return sum(values) / len(values)

    depth = sum(key.startswith("kl_") for key in steps[0])
    return {
        "draft_tokens": int(sum(step["tokens"] for step in steps)),
        "draft_updates": len(steps),
        "draft_loss": mean("loss"),
        "draft_grad_norm": mean("grad_norm"),
        "draft_kl_by_step": [mean(f"kl_{j}") for j in range(depth)],
        "draft_overlap_by_step": [mean(f"overlap_{j}") for j in range(depth)],
        "draft_top1_by_step": [mean(f"top1_{j}") for j in range(depth)],
    }
