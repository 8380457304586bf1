"""`slipstream generate`: texts of a policy, and what speculation did for them."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rollout_engine.types import Sample, SamplingParams, SpecStats
from trainer.config import DataConfig, RunConfig
from trainer.config_check import check_rollout, check_speculation, refuse_training, seeds_warning
from trainer.config_load import Override, load_config
from trainer.data import Prompt, load_prompts, one_prompt
from trainer.rollouts import make_requests
from trainer.serving import build_engine, context_length, load_tokenizer, read_draft, size_of


def generate(
    policy: Path, draft: Path | None, text: str | None, prompt_data: Path | None, overrides: Sequence[Override]
) -> int:
    """Print a text for every sample, in order, then the sums over all. ConfigError for what cannot be loaded."""
    config = _config(draft, overrides)
    tokenizer = load_tokenizer(policy)
    longest = context_length(policy, config.rollout) - 1
    vocab_size = size_of(policy, "vocab_size", "the rows of its embedding")
    prompts = _prompts(text, prompt_data, config.data, tokenizer, longest, vocab_size)
    eagle3 = None if draft is None else read_draft(draft, policy)
    rollout = config.rollout
    sampling = SamplingParams(
        rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_response_len, stop=rollout.stop
    )
    requests = make_requests(prompts, sampling, config.data.n_samples_per_prompt, config.seed, step=0)
    with tempfile.TemporaryDirectory(prefix="slipstream-generate-") as work_dir:
        folder, speculation = Path(work_dir), config.speculation
        engine = build_engine(policy, rollout, eagle3, tokenizer, folder, speculation=speculation, serves_files=True)
        try:
            engine.warm_up()
            start = time.perf_counter()
            samples = sorted(engine.generate(requests), key=lambda sample: sample.request.key)
            elapsed_s = time.perf_counter() - start
        finally:
            engine.close()
    for sample in samples:
        print(tokenizer.decode(list(sample.token_ids), skip_special_tokens=True))
    print(summary(samples, elapsed_s, rollout.speculative_algorithm), file=sys.stderr)
    return 0


def _config(draft: Path | None, overrides: Sequence[Override]) -> RunConfig:
    """One sample a prompt, and EAGLE3 exactly when there is a draft, unless the command line says otherwise."""
    refuse_training(overrides, "generate")
    algorithm = "NONE" if draft is None else "EAGLE3"
    defaults = [
        Override("", "rollout.speculative_algorithm", algorithm),
        Override("", "rollout.speculative_draft_model_path", "" if draft is None else str(draft)),
        Override("", "data.n_samples_per_prompt", "1"),
    ]
    config = load_config(None, [*defaults, *overrides])
    check_speculation(config.speculation, config.rollout)
    for warning in [*check_rollout(config.rollout), *seeds_warning(config.rollout)]:
        print(f"slipstream: warning: {warning}", file=sys.stderr)
    return config


def _prompts(
    text: str | None, prompt_data: Path | None, data: DataConfig, tokenizer: Any, longest: int, vocab_size: int
) -> tuple[Prompt, ...]:
    if prompt_data is None:
        return (one_prompt(text or "", data, tokenizer, max_prompt_len=longest, vocab_size=vocab_size),)
    # Generating needs no label: the prompt's own key stands in, so that files without labels are read too.
    unlabelled = replace(data, label_key=data.input_key)
    return load_prompts(
        prompt_data, unlabelled, tokenizer, max_prompt_len=longest, seed=0, vocab_size=vocab_size
    ).first()


def summary(samples: Sequence[Sample], elapsed_s: float, algorithm: str) -> str:
    """One line: samples, tokens, speed and, with speculation, how it went."""
    num_tokens = sum(len(sample.token_ids) for sample in samples)
    line = f"{len(samples)} samples, {num_tokens} tokens, {num_tokens / elapsed_s:.0f} tokens/s"
    if algorithm == "NONE":
        return line
    spec = sum((sample.spec for sample in samples), SpecStats())
    rates = ", ".join(
        f"{accepted / proposed:.2f}"
        for accepted, proposed in zip(spec.accepted_by_position, spec.proposed_by_position, strict=True)
        if proposed
    )
    line += (
        f"; {algorithm}: {spec.accept_length:.2f} tokens per verify, {spec.tokens_per_forward:.2f} per forward, "
        f"acceptance by position {rates or 'none proposed'}"
    )
    if spec.history is None:
        return line
    share = spec.history.num_verify_steps / spec.num_verify_steps
    return f"{line}; history drafted {share:.0%} of the verify steps, {spec.history.accept_length:.2f} tokens each"
