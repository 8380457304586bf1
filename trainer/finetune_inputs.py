"""What `slipstream finetune-draft` is given, read and checked before anything heavy is built or written."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draft_models.eagle3 import DraftError, Eagle3, Eagle3Config
from draft_models.randomness import ReservedStep
from draft_models.spellings import Target
from draft_models.types import VerifyRule
from rollout_engine.types import Sample
from trainer.config import ConfigError
from trainer.convert_draft import read_any_draft
from trainer.draft_forecast import DraftSettings
from trainer.draft_vocab import answers_vocabulary
from trainer.finetune_config import FinetuneConfig
from trainer.finetune_data import ONE_PROMPT, RowLimits, TextRows, load_texts
from trainer.hf_files import HFWeights, read_config
from trainer.serving import check_asked, check_engine, context_length, eos_token_ids, load_tokenizer, read_draft


@dataclass(frozen=True, slots=True)
class Inputs:
    """`source` is the draft to start from; None for random weights."""

    target: Target
    tokenizer: Any
    texts: TextRows
    eos_token_ids: tuple[int, ...]
    source: Eagle3 | None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must find again besides its settings."""
        digest = hashlib.sha256(repr(self.texts.rows).encode()).hexdigest()
        found: dict[str, Any] = {"data (its rows)": digest}
        if self.texts.are_prompts:  # answers begun with numbers of a training run are not gone on with
            found["data (random numbers of its answers)"] = ReservedStep.ANSWERS.name.lower()
        return found


def read_inputs(config: FinetuneConfig) -> Inputs:
    """ConfigError or EngineConfigError for anything missing, unreadable or unfit; writes nothing."""
    folder, rollout = Path(config.target), config.run.rollout
    target = read_target(config)
    check_engine(rollout)
    HFWeights(folder)
    tokenizer = load_tokenizer(folder)
    eos = eos_token_ids(folder, tokenizer)
    positions = context_length(folder, rollout)
    limits = RowLimits(positions - 1, positions, int(target.config["vocab_size"]), eos)
    texts = load_texts(Path(config.data), config.run.data, config.response_key, tokenizer, limits)
    if len({row.prompt_ids for row in texts.rows}) < 2:
        raise ConfigError(f"{config.data}: {ONE_PROMPT}")
    if texts.are_prompts and rollout.max_response_len >= positions:
        raise ConfigError(
            f"rollout.max_response_len = {rollout.max_response_len} leaves no room for a prompt in the {positions} "
            f"positions of {folder}"
        )
    if not texts.are_prompts and rollout.verify_rule == "coupled" and rollout.temperature > 0:
        raise ConfigError(
            "rollout.verify_rule = 'coupled': whether it accepts depends on the noise that chose each token, which "
            "finished responses do not tell; give prompts, or --rollout.verify-rule rejection, which trains the same"
        )
    return Inputs(target, tokenizer, texts, eos, read_source(config, target))


def read_target(config: FinetuneConfig) -> Target:
    """The target's name and config.json. Raises ConfigError."""
    folder = Path(config.target)
    return Target(config.target, read_config(folder))


def read_source(config: FinetuneConfig, target: Target) -> Eagle3 | None:
    """The draft to start from, in float32. ConfigError when it does not fit the target or the settings of [draft]."""
    if not config.source:
        _random_sizes(config, target)
        return None
    folder = Path(config.source)
    draft = read_any_draft(folder, target) if config.import_ else read_draft(folder, Path(target.name))
    check_asked(config.run.draft, draft, folder)
    return draft.float()


def new_draft(config: FinetuneConfig, inputs: Inputs, samples: Sequence[Sample]) -> Eagle3:
    """Random weights from the run's seed; a reduced vocabulary is that of the responses in `samples`."""
    sizes = _random_sizes(config, inputs.target)
    ids = answers_vocabulary(sizes, samples, inputs.eos_token_ids) if sizes.is_reduced else None
    return Eagle3(sizes, seed=config.run.seed, target_ids=ids)


def _random_sizes(config: FinetuneConfig, target: Target) -> Eagle3Config:
    try:
        return Eagle3Config.from_target(target.config, config.run.draft)
    except DraftError as error:
        raise ConfigError(str(error)) from error


def draft_settings(config: FinetuneConfig) -> DraftSettings:
    """The engine's rule and depth, under which the draft is trained and judged; greedy at temperature 0."""
    rollout = config.run.rollout
    rule = VerifyRule.GREEDY if rollout.temperature == 0 else VerifyRule(rollout.verify_rule)
    return DraftSettings(rule, rollout.speculative_num_steps)
