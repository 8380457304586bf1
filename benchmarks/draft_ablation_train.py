"""One arm of the ablation with one seed: a draft trained from random weights on the recorded text, and scored."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from random import Random
from typing import Any

import torch

from benchmarks.common import synchronize
from benchmarks.draft_ablation_arms import Arm, Plan
from benchmarks.draft_ablation_texts import Texts
from benchmarks.draft_scores import RULES, accept_rates, chain_rates, score
from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config, choose_draft_vocab
from draft_models.training import draft_loss, make_batch
from draft_models.types import DraftSample, VerifyRule
from trainer.draft_learner import product_dtype

_CURVE_RULE = VerifyRule.REJECTION


def first_tokens(sample: DraftSample, count: int) -> DraftSample:
    """The text cut after `count` tokens, prompt included; 0 leaves it whole."""
    if not count or len(sample.token_ids) <= count:
        return sample
    return replace(
        sample,
        token_ids=sample.token_ids[:count],
        embeds=sample.embeds[:count],
        aux_hidden=sample.aux_hidden[:count],
        target_hidden=sample.target_hidden[:count],
    )


def batches(lengths: Sequence[int], max_tokens: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of texts by index: epochs in orders of the seed, each batch up to `max_tokens`, at least one.

    A text that no longer fits begins the next batch, so that every text comes equally often.
    """
    rng, members, left = Random(seed), [], max_tokens
    while True:
        order = list(range(len(lengths)))
        rng.shuffle(order)
        for index in order:
            if members and lengths[index] > left:
                yield members
                members, left = [], max_tokens
            members.append(index)
            left -= lengths[index]


def beginning(samples: Sequence[DraftSample], max_tokens: int) -> list[DraftSample]:
    """The first texts of together at most `max_tokens` response tokens, at least one."""
    found: list[DraftSample] = []
    for sample in samples:
        max_tokens -= len(sample.token_ids) - sample.prompt_len
        if found and max_tokens < 0:
            break
        found.append(sample)
    return found


@dataclass(slots=True)
class _Training:
    """A draft in training, its optimizer, and the average of its weights where the arm keeps one."""

    draft: Eagle3
    optimizer: torch.optim.Optimizer
    config: DraftConfig
    half: torch.dtype | None
    average: Eagle3 | None
    loss_sum: torch.Tensor = field(default_factory=lambda: torch.zeros(()))  # since it was last read, per chain
    num_losses: int = 0

    @classmethod
    def begin(cls, arm: Arm, seed: int, texts: Texts, half: torch.dtype | None, device: str) -> _Training:
        config = DraftConfig(lr=arm.lr, unroll=arm.unroll, step_decay=arm.step_decay, draft_vocab_size=arm.draft_vocab)
        sizes = Eagle3Config.from_target(texts.hf_config, config)
        target_ids = _frequent_tokens(texts.train[arm.temperature], sizes) if sizes.is_reduced else None
        draft = Eagle3(sizes, seed=seed, target_ids=target_ids).to(device)
        betas = (config.adam_beta1, config.adam_beta2)
        optimizer = torch.optim.AdamW(
            draft.parameters(), config.lr, betas, weight_decay=config.weight_decay, fused=device == "cuda"
        )
        average = copy.deepcopy(draft).requires_grad_(False) if arm.ema else None
        return cls(draft, optimizer, config, half, average)

    @property
    def scored(self) -> Eagle3:
        return self.draft if self.average is None else self.average

    def update(self, arm: Arm, samples: Sequence[DraftSample]) -> int:
        """One optimizer step; the chains that it was taken over."""
        batch = make_batch(samples, window=arm.window)
        if batch is None:
            return 0
        loss = draft_loss(self.draft, batch, arm.unroll, arm.step_decay, loss=arm.loss, product_dtype=self.half)
        mean = loss.loss_sum / loss.token_count
        self.optimizer.zero_grad()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(self.draft.parameters(), self.config.clip_grad)
        self.optimizer.step()
        if self.average is not None:
            with torch.no_grad():
                for kept, weight in zip(self.average.parameters(), self.draft.parameters(), strict=True):
                    kept.lerp_(weight, 1 - arm.ema)
        self.loss_sum = self.loss_sum.to(mean.device) + mean.detach()
        self.num_losses += 1
        return loss.token_count

    def read_loss(self) -> float:
        """Mean of the updates since it was last read; waits for the device."""
        mean = self.loss_sum.item() / max(self.num_losses, 1)
        self.loss_sum, self.num_losses = torch.zeros(()), 0
        return mean


def _frequent_tokens(samples: Sequence[DraftSample], sizes: Eagle3Config) -> torch.Tensor:
    """The tokens that the target's recorded responses are made of, the most frequent ones."""
    ids = torch.cat([sample.token_ids[sample.prompt_len :] for sample in samples]).cpu()
    return choose_draft_vocab(torch.bincount(ids, minlength=sizes.vocab_size), sizes.draft_vocab_size)


def train_arm(arm: Arm, seed: int, texts: Texts, plan: Plan, device: str) -> dict[str, Any]:
    """The arm's record. A loss that is not finite ends it, and the record says so under `failed`."""
    half = product_dtype(plan.dtype)
    samples = [first_tokens(sample, arm.first_tokens) for sample in texts.train[arm.temperature]]
    plan_of_batches = batches([len(sample.token_ids) for sample in samples], arm.batch_tokens, seed)
    curve_text = beginning(texts.held_out[arm.temperature], plan.curve_tokens)
    training = _Training.begin(arm, seed, texts, half, device)
    record: dict[str, Any] = {"arm": asdict(arm), "seed": seed}
    curve: list[dict[str, Any]] = []
    chains, train_s, score_s = 0, 0.0, 0.0
    mark_s = _now()
    for number in range(1, arm.updates + 1):
        chains += training.update(arm, [samples[i] for i in next(plan_of_batches)])
        if number not in plan.curve_at and number != arm.updates:
            continue
        loss = training.read_loss()
        now_s = _now()
        train_s, mark_s = train_s + now_s - mark_s, now_s
        if not math.isfinite(loss):
            record["failed"] = f"loss not finite within {number} updates"
            break
        curve.append(
            {"update": number, "chains": chains, "loss": loss, **_point(training.scored, curve_text, plan, half)}
        )
        now_s = _now()
        score_s, mark_s = score_s + now_s - mark_s, now_s
    if "failed" not in record:
        record |= {"curve": curve, **_final(training.scored, arm, texts, plan, half)}
        score_s += _now() - mark_s
    return record | {"chains": chains, "train_s": train_s, "score_s": score_s}


def _now() -> float:
    synchronize()
    return time.perf_counter()


def _point(draft: Eagle3, samples: Sequence[DraftSample], plan: Plan, half: torch.dtype | None) -> dict[str, Any]:
    depth = max(plan.depths)
    found = score(draft, samples, [(_CURVE_RULE, depth)], product_dtype=half)
    return {"accept_length": found.forecasts[_CURVE_RULE, depth].accept_length, "overlap_1": found.steps.overlap[0]}


def _final(draft: Eagle3, arm: Arm, texts: Texts, plan: Plan, half: torch.dtype | None) -> dict[str, Any]:
    """Acceptance on every held-out text: all depths at the arm's own temperature, elsewhere the deepest."""
    acceptance, steps = [], []
    for temperature, samples in texts.held_out.items():
        depths = plan.depths if temperature == arm.temperature else (max(plan.depths),)
        found = score(draft, samples, [(rule, k) for rule in RULES for k in depths], product_dtype=half)
        steps.append({"temperature": temperature, **asdict(found.steps)})
        for (rule, k), forecast in found.forecasts.items():
            row = {
                "temperature": temperature,
                "rule": rule.value,
                "k": k,
                "accept_length": forecast.accept_length,
                "accept_rate_by_position": accept_rates(forecast),
                "chain_rate_by_position": chain_rates(forecast),
            }
            if k == max(plan.depths):
                row["accept_length_by_rank"] = found.accept_length_by_rank[rule]
            acceptance.append(row)
    return {"acceptance": acceptance, "steps": steps}
