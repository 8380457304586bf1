"""A policy under measurement: decoder, Transformers model and prompts; and a draft trained on its text.

Axes: T tokens of a sequence, V vocabulary, A three hidden sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config
from draft_models.randomness import request_seed
from draft_models.training import draft_loss, make_batch
from draft_models.types import DraftSample
from rollout_engine.capture import capture_samples
from rollout_engine.config import RolloutConfig
from rollout_engine.decoder import Decoder
from rollout_engine.torch_engine import TorchEngine
from rollout_engine.types import RolloutRequest, Sample, SamplingParams
from trainer.config import DataConfig
from trainer.data import load_prompts
from trainer.hf_files import read_config
from trainer.serving import eos_token_ids, load_tokenizer


@dataclass(frozen=True, slots=True)
class BenchPolicy:
    """One checkpoint, loaded for the engine and for Transformers in the same dtype on the same device."""

    hf_config: dict[str, Any]
    decoder: Decoder
    hf_model: Any  # transformers' PreTrainedModel, in eval mode
    prompts: tuple[tuple[int, ...], ...]
    eos_token_ids: tuple[int, ...]
    pad_token_id: int

    @property
    def note(self) -> str:
        """What kind of policy this is, as its own config says; synthetic ones are labelled."""
        made = self.hf_config.get("slipstream", {})
        size = f"{sum(p.numel() for p in self.hf_model.parameters()) / 1e6:.1f}M {self.decoder.dtype}"
        if not made.get("synthetic"):
            return size
        return f"{size}, SYNTHETIC (random weights, residual branches above layer 1 x {made['eps_residual']})"


def load_policy(
    directory: Path,
    prompt_file: Path | None,
    data: DataConfig,
    dtype: str,
    device: str,
    *,
    prompts: Sequence[tuple[int, ...]] | None = None,
) -> BenchPolicy:
    """Prompts: as given, or of `prompt_file`, or of the policy's train.jsonl. ConfigError for what is not there."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would stand among the tables
    hf_config = read_config(directory)
    tokenizer = load_tokenizer(directory)
    if prompts is None:
        longest = int(hf_config["max_position_embeddings"]) - 1
        file = prompt_file or directory / "train.jsonl"
        rows = load_prompts(file, data, tokenizer, max_prompt_len=longest, seed=0).first()
        prompts = [row.token_ids for row in rows]
    torch_dtype = getattr(torch, dtype)
    eos = eos_token_ids(directory, tokenizer)
    return BenchPolicy(
        hf_config,
        Decoder.from_hf(directory, torch_dtype, device),
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch_dtype).to(device).eval(),
        tuple(prompts),
        eos,
        eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )


def requests(policy: BenchPolicy, count: int, seed: int, sampling: SamplingParams) -> list[RolloutRequest]:
    """`count` requests: which prompts and which random numbers follow from `seed` alone."""
    rows = Random(seed).choices(range(len(policy.prompts)), k=count)
    return [
        RolloutRequest(row, i, policy.prompts[row], replace(sampling, seed=request_seed(seed, 0, row, i)))
        for i, row in enumerate(rows)
    ]


def make_engine(policy: BenchPolicy, config: RolloutConfig, draft: Eagle3 | None = None) -> TorchEngine:
    return TorchEngine(policy.decoder, config, draft=draft, eos_token_ids=policy.eos_token_ids)


def capture(policy: BenchPolicy, samples: Sequence[Sample], aux_layer_ids: Sequence[int]) -> list[DraftSample]:
    """Hidden states of each sample, from one more pass of the engine's decoder over the text."""
    return capture_samples(policy.decoder, samples, aux_layer_ids)


def target_statistics(captured: Sequence[DraftSample]) -> dict[str, float]:
    """Entropy (nats) and E[max p] of the target's law at the response tokens, at the rollout's temperature."""
    entropies, maxima = [], []
    for sample in captured:
        logits_RV = sample.target_logits[sample.prompt_len - 1 : -1].double() / (sample.temperature or 1.0)
        logp_RV = logits_RV.log_softmax(-1)
        entropies.append(-(logp_RV.exp() * logp_RV).sum(-1))
        maxima.append(logp_RV.amax(-1).exp())
    return {"target_entropy": torch.cat(entropies).mean().item(), "target_max_prob": torch.cat(maxima).mean().item()}


def train_draft(policy: BenchPolicy, captured: Sequence[DraftSample], config: DraftConfig, num_steps: int) -> Eagle3:
    """A draft trained from random weights on recorded text: `num_steps` of AdamW, learning rate to zero by cosine."""
    draft = Eagle3(Eagle3Config.from_target(policy.hf_config, config)).to(policy.decoder.dtype)
    draft = draft.to(policy.decoder.device)
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(draft.parameters(), config.lr, betas, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    order = Random(0)
    for _ in range(num_steps):
        batch = make_batch(_draw(captured, config.max_tokens_per_update, order))
        if batch is None:
            raise SystemExit("the policy's responses are all shorter than two tokens: a draft has nothing to learn")
        loss = draft_loss(draft, batch, config.unroll, config.step_decay)
        optimizer.zero_grad()
        (loss.loss_sum / loss.token_count).backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), config.clip_grad)
        optimizer.step()
        schedule.step()
    return draft.requires_grad_(False)


def _draw(captured: Sequence[DraftSample], max_tokens: int, order: Random) -> list[DraftSample]:
    """Random samples, at least one, of at most `max_tokens` tokens together."""
    drawn: list[DraftSample] = []
    total = 0
    for sample in order.sample(captured, len(captured)):
        total += len(sample.token_ids)
        if drawn and total > max_tokens:
            break
        drawn.append(sample)
    return drawn
