"""Which tokens a draft of reduced vocabulary can say: those that the policy really emits, counted once, then fixed.

A prompt's words say little about what the answers are made of, so a run lets the policy answer its first prompts once,
without speculation, before the draft is made. From then on the vocabulary stays: SGLang takes d2t when its server
starts and never again. A resumed run has that of its checkpoint.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from draft_models.eagle3 import Eagle3Config, choose_draft_vocab
from draft_models.randomness import ReservedStep
from rollout_engine.types import Sample
from trainer.checkpoint import read_part
from trainer.collective import from_rank_zero
from trainer.config import RunConfig
from trainer.data import DataPosition
from trainer.rollouts import generate, make_requests, sampling_params
from trainer.sentinel_watch import plain_rollout
from trainer.serving import build_engine

if TYPE_CHECKING:
    from trainer.run import Inputs


def answers_vocabulary(sizes: Eagle3Config, samples: Sequence[Sample], eos: Sequence[int]) -> Tensor:
    """int64 [R], ascending: the tokens most frequent in what the policy really said, and those that end a response.

    Where that has fewer than R different tokens, the prompts' come next: they are what answers tend to repeat.
    """
    said_V, asked_V = (torch.zeros(sizes.vocab_size, dtype=torch.int64) for _ in range(2))
    for sample in samples:
        said_V += torch.bincount(torch.tensor(sample.token_ids, dtype=torch.int64), minlength=sizes.vocab_size)
        asked_V += torch.bincount(torch.tensor(sample.request.prompt_ids), minlength=sizes.vocab_size)
    said_V[[i for i in eos if i < sizes.vocab_size]] = said_V.max() + 1
    return choose_draft_vocab(said_V * (asked_V.max() + 1) + asked_V, sizes.draft_vocab_size)


def run_vocabulary(config: RunConfig, inputs: Inputs, sizes: Eagle3Config, checkpoint: Path | None) -> Tensor:
    """The vocabulary of a run's random draft, the same on every rank; `checkpoint` is the one to resume. Collective."""

    def choose() -> list[int]:
        if checkpoint is not None:
            offsets_R = read_part(checkpoint, "draft")["draft"]["d2t"]
            return (offsets_R + torch.arange(len(offsets_R))).tolist()
        return answers_vocabulary(sizes, first_answers(config, inputs), inputs.eos_token_ids).tolist()

    return torch.tensor(from_rank_zero(choose))


def first_answers(config: RunConfig, inputs: Inputs) -> tuple[Sample, ...]:
    """Answers to the first rollout's prompts, other ones than the rollout's, decoded plainly by an engine of their own
    (rank 0)."""
    data, rollout = config.data, plain_rollout(config.rollout)
    print(
        f"slipstream: answering {data.rollout_batch_size} prompts once without speculation, to choose the "
        f"{config.draft.draft_vocab_size} tokens of the draft's vocabulary",
        file=sys.stderr,
    )
    prompts, _ = inputs.prompts.take(DataPosition(), data.rollout_batch_size)
    sampling, step = sampling_params(rollout), ReservedStep.VOCABULARY
    requests = make_requests(prompts, sampling, data.n_samples_per_prompt, config.seed, step)
    with tempfile.TemporaryDirectory() as folder:
        engine = build_engine(inputs.folder, rollout, None, inputs.tokenizer, Path(folder), serves_files=True)
        try:
            engine.warm_up()
            return generate(engine, requests, rollout.max_running_requests).samples
        finally:
            engine.close()
