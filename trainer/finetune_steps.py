"""The optimizer steps of `slipstream finetune-draft`: target forward, draft update, judgement, checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from draft_models.eagle3 import Eagle3
from draft_models.forecast import AcceptForecast
from rollout_engine.capture import capture_samples
from rollout_engine.decoder import Decoder
from rollout_engine.types import Sample
from trainer.checkpoint import Part, latest_checkpoint, load_checkpoint, save_checkpoint, shared_part
from trainer.distributed import rank, world_size
from trainer.draft_learner import DraftLearner, product_dtype
from trainer.finetune_config import FinetuneConfig
from trainer.finetune_data import epoch_steps, share_of_rank
from trainer.finetune_inputs import draft_settings
from trainer.finetune_progress import LENGTH, RATES
from trainer.finetune_score import LEAST_GAIN, HeldOut, flat, forecast_of, rates

Record = Callable[[dict[str, Any]], None]


@dataclass
class Best:
    """The draft that was judged best so far. `since`: judgements after it that found none better."""

    forecast: AcceptForecast
    tensors: dict[str, torch.Tensor]
    since: int = 0


class Tuning:
    """One rank's part in fine-tuning `draft` on `train`, judged on `held_out`. All methods are collective."""

    def __init__(
        self,
        config: FinetuneConfig,
        draft: Eagle3,
        decoder: Decoder,
        train: Sequence[Sample],
        held_out: Sequence[Sample],
    ) -> None:
        settings, run, group = draft_settings(config), config.run, dist.group.WORLD
        self.config, self._decoder, self._train = config, decoder, train
        self._learner = DraftLearner(draft, run.draft, settings, group)
        max_tokens = run.draft.max_tokens_per_forward or run.draft.max_tokens_per_update
        self._held_out = HeldOut(held_out, decoder, settings, max_tokens, group)
        self._product_dtype = product_dtype(run.draft.compute_dtype)
        self._depth = settings.depth
        self._lengths = [len(s.request.prompt_ids) + len(s.token_ids) for s in train]
        self._schedule = [
            (epoch, step)
            for epoch in range(config.epochs)
            for step in epoch_steps(self._lengths, epoch, run.seed, run.draft.max_tokens_per_update)
        ]
        self.next_step = 0
        self.before: AcceptForecast  # both are there after `begin`
        self.best: Best

    @property
    def total_steps(self) -> int:
        return len(self._schedule)

    @property
    def is_over(self) -> bool:
        """Every epoch is done, or the last judgements found nothing better."""
        patience = self.config.patience
        return self.next_step >= self.total_steps or 0 < patience <= self.best.since

    def begin(self, checkpoints: Path) -> None:
        """Judge the draft as it is, or go on from the newest whole checkpoint when there is one."""
        folder = latest_checkpoint(checkpoints)
        if folder is not None:
            self.next_step, _ = load_checkpoint(folder, self._parts())
        else:
            self.before = self._judge()
            self.best = Best(self.before, _copied(self._learner.served))

    def run(self, checkpoints: Path, record: Record) -> None:
        """Every step that is left. `record` gets each step's metrics line, before the checkpoint that holds the step.

        Raises DraftUpdateError for a loss or gradient that is not finite; the last checkpoint stays.
        """
        while not self.is_over:
            line = self._step()
            if self._is_due(self.config.eval_interval):
                line |= self._note(self._judge())
            record(line)
            if self._is_due(self.config.save_interval):
                save_checkpoint(checkpoints, self.next_step, self._parts(), {})

    def _is_due(self, interval: int) -> bool:
        return self.next_step % interval == 0 or self.next_step == self.total_steps

    def best_draft(self) -> Eagle3:
        """The best draft of all judged, the one that it started from included."""
        draft = self._learner.served
        draft.load_state_dict(self.best.tensors)
        return draft

    def _step(self) -> dict[str, Any]:
        """One optimizer step of the whole group: the target's states of this rank's texts live as long as it takes."""
        start_s = time.perf_counter()
        step = self.next_step
        epoch, indices = self._schedule[step]
        lr = self.config.run.draft.lr * lr_factor(self.config, step, self.total_steps)
        self._learner.set_lr(lr)
        mine = share_of_rank(indices, self._lengths, rank(), world_size())
        captured = capture_samples(
            self._decoder, [self._train[i] for i in mine], self._learner.draft.config.aux_layer_ids
        )
        captured_s = time.perf_counter()
        metrics = self._learner.update(captured, [frozenset(self._train[i].request.key for i in indices)])
        self.next_step += 1
        times = {"time_target_s": captured_s - start_s, "time_draft_s": time.perf_counter() - captured_s}
        return {"step": step, "epoch": epoch, "lr": lr, **metrics, **times}

    def _judge(self) -> AcceptForecast:
        return self._held_out.judge(self._learner.served, self._product_dtype)

    def _note(self, forecast: AcceptForecast) -> dict[str, Any]:
        if forecast.accept_length >= self.best.forecast.accept_length + LEAST_GAIN:
            self.best = Best(forecast, _copied(self._learner.served))
        else:
            self.best.since += 1
        return judged_line(forecast)

    def _parts(self) -> list[Part]:
        learner, writes = self._learner, rank() == 0
        return [
            shared_part("draft", learner.state_dict, learner.load_state_dict, writes=writes),
            shared_part("judged", self._judged_state, self._load_judged, writes=writes),
        ]

    def _judged_state(self) -> dict[str, Any]:
        best = self.best
        return {"best": flat(best.forecast), "tensors": best.tensors, "since": best.since, "before": flat(self.before)}

    def _load_judged(self, state: dict[str, Any]) -> None:
        self.before = forecast_of(state["before"], self._depth)
        self.best = Best(forecast_of(state["best"], self._depth), state["tensors"], state["since"])


def judged_line(forecast: AcceptForecast) -> dict[str, Any]:
    """A judgement as metrics."""
    return {LENGTH: forecast.accept_length, RATES: rates(forecast)}


def lr_factor(config: FinetuneConfig, step: int, total_steps: int) -> float:
    """Share of draft.lr at a step: linear warm-up, then constant, or a cosine from 1 down to 0. A pure function."""
    warmup = min(config.warmup_steps, total_steps - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.lr_decay == "constant":
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (total_steps - warmup))


def _copied(draft: Eagle3) -> dict[str, torch.Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in draft.named_tensors().items()}
