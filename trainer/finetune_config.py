"""Settings of `slipstream finetune-draft`: its own flags, and which of train's it shares. Loads nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from trainer.config import ConfigError, RunConfig
from trainer.config_load import Override, load_config, offered_flags
from trainer.suggest import nearest

SPELLINGS = ("sglang", "specforge", "speculators")  # draft_models.spellings.Spelling, which loads torch
DECAYS = ("cosine", "constant")

# Settings of train that mean the same here.
_SHARED = ("draft.", "rollout.", "external_engine_addrs", "seed", "deterministic")
_SHARED_DATA = ("data.input_key", "data.apply_chat_template", "data.n_samples_per_prompt", "data.skip_bad_rows")
_ONLINE = (
    *("draft.train", "draft.train_when", "draft.burst", "draft.schedule", "draft.token_weighting"),
    *("draft.verify_cost", "draft.updates_per_step", "draft.capture_max_bytes"),
)
_CONVERSION = ("target", "out", "import_", "export")  # of the fields below, those that --import alone has
_DRAFTS_TWICE = "rollout.speculative_draft_model_path"
_OF_A_SYNC = ("rollout.offload", "rollout.sync_")
_LEAST = {"held_out_tokens": 1, "epochs": 1, "eval_interval": 1, "save_interval": 1, "patience": 0, "warmup_steps": 0}
_MEANT = {  # flags of the policy's optimizer, and the draft's that was probably meant
    "policy.lr": "--draft.lr",
    "policy.weight_decay": "--draft.weight-decay",
    "policy.clip_grad": "--draft.clip-grad",
    "policy.adam_beta1": "--draft.adam-beta1",
    "policy.adam_beta2": "--draft.adam-beta2",
    "policy.lr_decay_style": "--lr-decay",
    "policy.lr_warmup_iters": "--warmup-steps",
}


def _setting(default: Any, text: str, metavar: str = "", choices: Sequence[str] = ()) -> Any:
    return field(default=default, metadata={"help": text, "metavar": metavar, "choices": tuple(choices)})


@dataclass(frozen=True, slots=True)
class FinetuneConfig:
    """What to fine-tune, on what, and for how long. Flags and help are made from these fields, in this order.

    The draft's own training (loss, unroll, learning rate, tokens of a step) is `run.draft`; the engine's rule, depth
    and temperature, under which the draft is judged, are `run.rollout`.
    """

    target: str = _setting("", "Hugging Face folder of the policy that the draft serves", "HF_DIR")
    out: str = _setting("", "folder to write, in SGLang's spelling unless --export says otherwise", "DIR")
    data: str = _setting("", "JSONL: prompts, prompts with responses, or chats with an assistant's turn", "FILE")
    init: str = _setting("", "draft to start from (none: random weights)", "DIR")
    import_: str = _setting("", "the same for a draft of any spelling; without --data it is only converted", "DIR")
    export: str = _setting("sglang", f"spelling of the result: {', '.join(SPELLINGS)}", "SPELLING", SPELLINGS)
    response_key: str = _setting("response", "key of a row's response, a text or token ids", "KEY")
    held_out: float = _setting(0.1, "share of the prompts that is never trained on, and judges the draft", "SHARE")
    held_out_tokens: int = _setting(32768, "of them at most, so that judging stays cheap; the rest is trained on", "N")
    epochs: int = _setting(4, "passes over the data at most", "N")
    eval_interval: int = _setting(50, "optimizer steps between judgements", "N")
    save_interval: int = _setting(200, "optimizer steps between checkpoints, which --resume continues from", "N")
    patience: int = _setting(5, "judgements without a better accept length until it stops; 0 = never", "N")
    warmup_steps: int = _setting(10, "optimizer steps of linear warm-up", "N")
    lr_decay: str = _setting("cosine", f"of draft.lr over all epochs: {', '.join(DECAYS)}", "STYLE", DECAYS)
    resume: bool = _setting(False, "go on after a kill, from the newest checkpoint")
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def source(self) -> str:
        """The draft that it starts from, "" for random weights."""
        return self.init or self.import_


def own_fields() -> list[Any]:
    """The dataclass fields that are flags of this command alone."""
    return [item for item in fields(FinetuneConfig) if item.name != "run"]


def flag_of(name: str) -> str:
    """A field's flag; `import_` only avoids Python's keyword."""
    return "--" + name.rstrip("_").replace("_", "-")


def flags() -> list[str]:
    """All that the command has: its own, then those shared with train."""
    return [*(flag_of(item.name) for item in own_fields()), *offered_flags(is_shared)]


def make_config(own: dict[str, Any], overrides: Sequence[Override]) -> FinetuneConfig:
    """Own flags by field name, and those shared with train. ConfigError for what contradicts itself."""
    for override in overrides:
        _refuse_foreign(override)
    config = FinetuneConfig(**own, run=shared_config(overrides))
    _check(config)
    if not config.data:
        _refuse_training(config, overrides)
    return config


def warnings_of(config: FinetuneConfig) -> list[str]:
    """One line each: what is done and may not be what was meant."""
    from trainer.config_check import check_rollout, unroll_warning  # loads torch, which help does without

    rollout, warnings = config.run.rollout, check_rollout(config.run.rollout, config.run.deterministic)
    if config.data:
        warnings += unroll_warning(config.run.draft, rollout)
    pairs = (("top_p", rollout.top_p, 1.0), ("top_k", rollout.top_k, 0))
    filters = [f"{name} = {value}" for name, value, off in pairs if value != off]
    if filters:
        warnings.append(
            f"rollout.{' and '.join(filters)}: answers follow the filtered law, but the draft is trained and judged on "
            "the whole one"
        )
    return warnings


def shared_config(overrides: Sequence[Override] = ()) -> RunConfig:
    """Settings shared with train; of two the defaults are others here: one answer a prompt, by plain decoding, since
    the draft that is to come cannot help yet."""
    plain = Override("", "rollout.speculative_algorithm", "NONE")
    one_each = Override("", "data.n_samples_per_prompt", "1")
    return load_config(None, [plain, one_each, *overrides])


def is_shared(key: str) -> bool:
    """Whether a dotted key of train is one of this command's too."""
    if key in (*_ONLINE, _DRAFTS_TWICE) or key.startswith(_OF_A_SYNC):
        return False
    return key.startswith(_SHARED) or key in _SHARED_DATA


def _refuse_foreign(override: Override) -> None:
    key = override.key
    if key == _DRAFTS_TWICE:
        raise ConfigError(f"{override.flag}: give finetune-draft the draft to start from as --init DIR")
    if not is_shared(key):
        meant = f"; did you mean {_MEANT[key]}?" if key in _MEANT else ""
        raise ConfigError(
            f"{override.flag} is a setting of train that finetune-draft does not have: leave it out{meant}"
        )


def _refuse_training(config: FinetuneConfig, overrides: Sequence[Override]) -> None:
    """ConfigError for the first setting given to a conversion that only training has."""
    ours = [item for item in own_fields() if item.name not in _CONVERSION]
    changed = [flag_of(item.name) for item in ours if getattr(config, item.name) != item.default]
    for flag in (*changed, *(override.flag for override in overrides)):
        raise ConfigError(f"{flag}: --import without --data only converts, and has no use for it; leave it out")


def _check(config: FinetuneConfig) -> None:
    from trainer.config_check import check_draft_training, check_rollout  # as above

    for name in ("target", "out"):
        if not getattr(config, name):
            raise ConfigError(f"{flag_of(name)} is not set; see slipstream finetune-draft --help")
    if config.init and config.import_:
        raise ConfigError("--init and --import are both given: a draft starts from one of them")
    if not config.data and not config.import_:
        raise ConfigError("--data is not set: give a JSONL file, or --import DIR alone to convert a draft")
    for name, known in (("export", SPELLINGS), ("lr_decay", DECAYS)):
        value = getattr(config, name)
        if value not in known:
            raise ConfigError(
                f"{flag_of(name)} {value!r} is unknown{nearest(value, known)}; use one of {', '.join(known)}"
            )
    if not 0 < config.held_out < 1:
        raise ConfigError(f"--held-out {config.held_out}: it must be above 0 and below 1")
    for name, least in _LEAST.items():
        if getattr(config, name) < least:
            raise ConfigError(f"{flag_of(name)} {getattr(config, name)}: it must be at least {least}")
    check_rollout(config.run.rollout, config.run.deterministic)
    if config.run.rollout.speculative_algorithm == "EAGLE3":
        raise ConfigError(
            "--speculative-algorithm EAGLE3: answers are generated before there is a draft; NONE or NGRAM"
        )
    if config.run.rollout.speculative_num_steps < 1:
        raise ConfigError("--speculative-num-steps 0: a draft is judged by the tokens it proposes; give the engine's k")
    check_draft_training(config.run)
