"""Settings that contradict each other, found before anything heavy is loaded. Pure functions of the config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draft_models.config import DraftConfig
from draft_models.losses import LossKind
from rollout_engine.checks import check_history
from rollout_engine.config import RolloutConfig, SpeculationConfig
from rollout_engine.sglang_checks import (
    check_draft_vocabulary,
    check_sglang,
    check_sync_folder,
    check_torch,
    lossy_settings,
)
from rollout_engine.types import EngineConfigError
from trainer.config import ConfigError, RunConfig
from trainer.config_load import Override
from trainer.flags import DERIVED
from trainer.suggest import nearest

_CHOICES: dict[str, tuple[str, ...]] = {
    "rollout.engine": ("torch", "sglang"),
    "rollout.dtype": ("float32", "bfloat16", "float64"),
    "rollout.speculative_algorithm": ("EAGLE3", "NGRAM", "NONE"),
    "rollout.verify_rule": ("rejection", "target_only", "coupled"),
    "rollout.controller": ("adaptive", "fixed"),
    "policy.dtype": ("float32", "bfloat16"),
    "draft.compute_dtype": ("float32", "bfloat16"),
    "draft.loss": ("auto", *LossKind),
    "draft.token_weighting": ("uniform", "tail"),
    "draft.train_when": ("always", "never", "pays"),
    "policy.lr_decay_style": ("constant", "linear", "cosine", "inverse-square-root"),
    "algorithm.advantage_estimator": ("grpo",),
    "algorithm.kl_loss_type": ("k1", "k2", "k3", "low_var_kl"),
}

_AT_LEAST_ONE = (
    "num_rollout",
    "data.rollout_batch_size",
    "data.n_samples_per_prompt",
    "algorithm.num_steps_per_rollout",
    "rollout.max_response_len",
    "rollout.max_running_requests",
    "policy.tensor_model_parallel_size",
    "policy.pipeline_model_parallel_size",
    "policy.max_tokens_per_gpu",
    "draft.unroll",
    "draft.updates_per_step",
    "draft.burst",
    "draft.max_tokens_per_update",
    "draft.capture_max_bytes",
    "speculation.history_min_match",
    "speculation.history_max_bytes",
    "speculation.sentinel_tokens",
)

_AT_LEAST_ZERO = (
    "save_interval",
    "eval_interval",
    "plain_probe_interval",
    "frozen_draft_step",
    "policy.lr",
    "policy.min_lr",
    "policy.lr_warmup_iters",
    "policy.lr_decay_iters",
    "policy.weight_decay",
    "policy.adam_eps",
    "policy.clip_grad",
    "algorithm.eps_clip",
    "algorithm.eps_clip_high",
    "algorithm.kl_loss_coef",
    "algorithm.tis_clip",
    "draft.step_decay",
    "draft.lr",
    "draft.weight_decay",
    "draft.clip_grad",
    "draft.draft_vocab_size",
    "draft.verify_cost",
    "draft.max_tokens_per_forward",
    "draft.intermediate_size",
    "data.num_eval_prompts",
    "speculation.history_num_steps",
)

_BELOW_ONE = ("policy.adam_beta1", "policy.adam_beta2", "draft.adam_beta1", "draft.adam_beta2", "draft.ema")

_TRAINING = ("policy.", "algorithm.", "draft.", "speculation.sentinel")
_OF_THE_ENGINE = ("rollout.", "external_engine_addrs")
_DERIVED_OF_TRAINING = DERIVED.keys() - {"external_engine_addrs"}


def refuse_training(overrides: Sequence[Override], command: str) -> None:
    """ConfigError for the first setting given to `command` that only training has."""
    for override in overrides:
        if override.key.startswith(_TRAINING) or override.key in _DERIVED_OF_TRAINING:
            raise ConfigError(f"{override.flag} is a setting of training, and {command} trains nothing: leave it out")


def refuse_all_but_engine(overrides: Sequence[Override], command: str) -> None:
    """ConfigError for the first setting given to `command` that is not the engine's: of training, data or a run."""
    refuse_training(overrides, command)
    for override in overrides:
        if not override.key.startswith(_OF_THE_ENGINE):
            raise ConfigError(
                f"{override.flag} is a setting of a run, and {command} only starts an engine: leave it out"
            )


def validate(config: RunConfig, *, world_size: int = 1) -> list[str]:
    """Warnings, one line each. `ConfigError` for settings that no run can have."""
    _check_choices(config, _CHOICES)
    _check_ranges(config)
    _check_schedule(config)
    _check_draft_schedule(config.draft)
    _check_sources(config)
    _check_batch(config, world_size)
    warnings = check_rollout(config.rollout, config.deterministic)
    check_speculation(config.speculation, config.rollout)
    if config.rollout.engine == "sglang":
        _check_sglang_run(config)
    return [*warnings, *_training_warnings(config)]


def check_draft_training(config: RunConfig) -> None:
    """What `validate` says about the values of `[draft]`: `slipstream finetune-draft` trains nothing else."""
    _check_choices(config, {key: known for key, known in _CHOICES.items() if key.startswith("draft.")})
    _check_ranges(config)


def check_rollout(rollout: RolloutConfig, deterministic: bool = False) -> list[str]:
    """What `validate` says about the engine alone: `slipstream generate` has no other settings."""
    _check_choices(rollout, {key: known for key, known in _CHOICES.items() if key.startswith("rollout.")}, "rollout.")
    if rollout.temperature < 0:
        raise ConfigError(f"rollout.temperature = {rollout.temperature}: it must be 0 (greedy) or more")
    if not 0 < rollout.top_p <= 1:
        raise ConfigError(f"rollout.top_p = {rollout.top_p}: it must be above 0 and at most 1 (off)")
    if rollout.top_k < 0:
        raise ConfigError(f"rollout.top_k = {rollout.top_k}: it must be 0 (off) or more")
    if rollout.context_length < 0:
        raise ConfigError(f"rollout.context_length = {rollout.context_length}: it must be 0 (the checkpoint's) or more")
    if rollout.cost_table and not Path(rollout.cost_table).is_file():
        raise ConfigError(
            f"rollout.cost_table = {rollout.cost_table!r}: no such file; leave it out to measure costs at the start"
        )
    if rollout.context_length and rollout.max_response_len >= rollout.context_length:
        raise ConfigError(
            f"rollout.max_response_len = {rollout.max_response_len} leaves no room for a prompt in "
            f"rollout.context_length = {rollout.context_length}"
        )
    warnings = _check_engine(rollout)
    if rollout.speculative_algorithm == "NONE":
        return warnings
    _check_speculation(rollout, deterministic)
    if rollout.speculative_algorithm == "NGRAM" and rollout.verify_rule == "rejection":
        warnings.append(
            "n-gram drafts are point masses, for which rollout.verify_rule 'rejection' and 'target_only' are one rule: "
            "a draft x is accepted with p(x)"
        )
    return warnings


def check_speculation(speculation: SpeculationConfig, rollout: RolloutConfig) -> None:
    """ConfigError for a history drafter that the engine does not have."""
    try:
        check_history(speculation, rollout)
    except EngineConfigError as error:
        raise ConfigError(str(error)) from None


def _check_engine(rollout: RolloutConfig) -> list[str]:
    """What the chosen engine cannot do, in its own module's words."""
    try:
        if rollout.engine == "torch":
            check_torch(rollout)
            return []
        if rollout.sglang_python and not Path(rollout.sglang_python).is_file():
            raise EngineConfigError(
                f"rollout.sglang_python = {rollout.sglang_python!r}: no such file; give the Python of the environment "
                "that holds SGLang, or leave it out for this one"
            )
        return check_sglang(rollout)
    except EngineConfigError as error:
        raise ConfigError(str(error)) from None


def _check_sglang_run(config: RunConfig) -> None:
    """What a whole run asks of its engine and SGLang cannot give."""
    rollout = config.rollout
    if config.plain_probe_interval:
        raise ConfigError(
            f"plain_probe_interval = {config.plain_probe_interval}: an SGLang server cannot stop speculating for a "
            "probe; set it to 0 and measure with slipstream bench rollout --engine sglang --spec none,eagle3"
        )
    if config.deterministic:
        raise ConfigError(
            "deterministic = true: SGLang ignores seeds while verifying, so no run on it repeats; leave it out, or use "
            "rollout.engine = 'torch'"
        )
    try:
        check_sync_folder(rollout)
        # A draft that is read from its folder is checked when its sizes are known.
        is_reduced = not rollout.speculative_draft_model_path and config.draft.draft_vocab_size > 0
        check_draft_vocabulary(rollout, is_reduced)
    except EngineConfigError as error:
        raise ConfigError(str(error)) from None
    if is_reduced and rollout.sglang_address:
        raise ConfigError(
            f"draft.draft_vocab_size = {config.draft.draft_vocab_size} with rollout.sglang_address: that server has "
            "the tokens of its draft already and keeps them; give the draft's folder: --speculative-draft-model-path"
        )


def _check_speculation(rollout: RolloutConfig, deterministic: bool) -> None:
    k = rollout.speculative_num_steps
    if k < 1:
        raise ConfigError(
            f"rollout.speculative_num_steps = {k} with {rollout.speculative_algorithm}: "
            "it must be at least 1, or set rollout.speculative_algorithm = 'NONE'"
        )
    if rollout.speculative_eagle_topk != 1:
        raise ConfigError(
            f"rollout.speculative_eagle_topk = {rollout.speculative_eagle_topk}: only 1, a chain, is supported"
        )
    if rollout.speculative_num_draft_tokens not in (0, k + 1):
        raise ConfigError(
            f"rollout.speculative_num_draft_tokens = {rollout.speculative_num_draft_tokens}: with topk 1 and "
            f"num_steps = {k} it must be {k + 1} (or 0, which means that)"
        )
    if not 1 <= rollout.ngram_min_match <= rollout.ngram_max_match:
        raise ConfigError(
            f"rollout.ngram_min_match = {rollout.ngram_min_match} and ngram_max_match = {rollout.ngram_max_match}: "
            "they must be at least 1 and in this order"
        )
    if deterministic and rollout.engine == "torch" and rollout.controller == "adaptive" and not rollout.cost_table:
        raise ConfigError(
            "deterministic = true with rollout.controller = 'adaptive' would let timings choose the draft depth: set "
            "rollout.controller = 'fixed', or give a measured rollout.cost_table"
        )


def _check_ranges(config: RunConfig) -> None:
    for keys, least in ((_AT_LEAST_ONE, 1), (_AT_LEAST_ZERO, 0)):
        for key in keys:
            if not _get(config, key) >= least:  # so written, not a number is refused too
                raise ConfigError(f"{key} = {_get(config, key)}: it must be at least {least}")
    for key in _BELOW_ONE:
        if not 0 <= _get(config, key) < 1:
            raise ConfigError(f"{key} = {_get(config, key)}: it must be at least 0 and below 1")
    if not 0 < config.speculation.sentinel_alpha < 1:
        raise ConfigError(
            f"speculation.sentinel_alpha = {config.speculation.sentinel_alpha}: it must be between 0 and 1"
        )
    if not 0 <= config.speculation.sentinel_min_effect < 0.5:
        raise ConfigError(
            f"speculation.sentinel_min_effect = {config.speculation.sentinel_min_effect}: it must be at least 0 and "
            "below 0.5, a difference of two chances"
        )


def _check_schedule(config: RunConfig) -> None:
    policy = config.policy
    if policy.min_lr > policy.lr:
        raise ConfigError(f"policy.min_lr = {policy.min_lr} is above policy.lr = {policy.lr}")
    steps = policy.lr_decay_iters or config.num_rollout * config.algorithm.num_steps_per_rollout
    if policy.lr_warmup_iters >= steps:
        raise ConfigError(
            f"policy.lr_warmup_iters = {policy.lr_warmup_iters} must be below the {steps} optimizer steps of the run "
            "(policy.lr_decay_iters, or num_rollout x num_steps_per_rollout)"
        )


def _check_draft_schedule(draft: DraftConfig) -> None:
    if not draft.train and draft.train_when == "pays":
        raise ConfigError(
            "draft.train = false and draft.train_when = 'pays' contradict each other: leave one of them out"
        )
    if draft.schedule and draft.when != "pays":
        raise ConfigError(
            f"draft.schedule = {draft.schedule!r} has no effect with draft.train_when = {draft.when!r}: set it to "
            "'pays', or leave the schedule out"
        )
    if draft.schedule and not Path(draft.schedule).is_file():
        raise ConfigError(
            f"draft.schedule = {draft.schedule!r}: no such file; give the draft_schedule.jsonl of an earlier run, or "
            "leave it out to decide anew"
        )


def _check_sources(config: RunConfig) -> None:
    if not config.name or config.name in (".", "..") or "/" in config.name:
        raise ConfigError(f"name = {config.name!r}: it must be one folder's name; run_dir says where that folder lies")
    if not config.policy.hf_checkpoint:
        raise ConfigError("policy.hf_checkpoint is not set: give --hf-checkpoint DIR")
    if not config.data.prompt_data:
        raise ConfigError("data.prompt_data is not set: give --prompt-data FILE.jsonl")
    if config.eval_interval and not config.data.eval_prompt_data:
        raise ConfigError("eval_interval is set but data.eval_prompt_data is not: give --eval-prompt-data FILE.jsonl")


def _check_batch(config: RunConfig, world_size: int) -> None:
    data, algorithm = config.data, config.algorithm
    if data.n_samples_per_prompt == 1:
        raise ConfigError(
            "data.n_samples_per_prompt = 1: grpo compares the samples of one prompt, a group of 1 has no advantage; "
            "give 2 or more"
        )
    if config.rollout.temperature == 0:
        raise ConfigError(
            "rollout.temperature = 0: the samples of a group would all be equal and teach nothing; give a temperature"
        )
    samples, steps = data.rollout_batch_size * data.n_samples_per_prompt, algorithm.num_steps_per_rollout
    rollout_is = f"{data.rollout_batch_size} prompts x {data.n_samples_per_prompt} samples = {samples}"
    if samples % steps:
        raise ConfigError(f"{rollout_is} do not divide into algorithm.num_steps_per_rollout = {steps} equal parts")
    model_parallel = config.policy.tensor_model_parallel_size * config.policy.pipeline_model_parallel_size
    if world_size % model_parallel:
        raise ConfigError(
            f"{world_size} rank(s) cannot hold tensor_model_parallel_size x pipeline_model_parallel_size = "
            f"{model_parallel}; start a multiple of {model_parallel} with torchrun --nproc-per-node"
        )
    data_parallel = world_size // model_parallel
    if samples // steps % data_parallel:
        raise ConfigError(
            f"{rollout_is}, in {steps} optimizer step(s), do not divide over {data_parallel} data-parallel ranks"
        )


def seeds_warning(rollout: RolloutConfig) -> list[str]:
    """For whoever gives a seed and looks for the same samples again."""
    if rollout.engine != "sglang":
        return []
    note = "SGLang ignores seeds while verifying, so none are sent: two equal runs differ, and the metrics of one say "
    return [note + "reproducible = false"]


def _training_warnings(config: RunConfig) -> list[str]:
    rollout, warnings = config.rollout, seeds_warning(config.rollout)
    if (why := _why_never_frozen(config)) is not None:
        warnings.append(
            f"frozen_draft_step = {config.frozen_draft_step} has no effect, {why}: no frozen_accept_length is recorded"
        )
    if rollout.speculative_algorithm == "EAGLE3" and config.draft.when != "never":
        warnings += unroll_warning(config.draft, rollout)
    if config.draft.when == "pays" and rollout.speculative_algorithm != "EAGLE3":
        warnings.append(
            f"draft.train_when = 'pays' has no effect: rollout.speculative_algorithm = "
            f"{rollout.speculative_algorithm!r} has no draft that learns"
        )
    elif config.deterministic and config.draft.when == "pays" and not config.draft.schedule:
        warnings.append(
            "deterministic = true with draft.train_when = 'pays': timings decide when the draft learns; the run's "
            "draft_schedule.jsonl records it, and draft.schedule = FILE takes the same decisions again"
        )
    if rollout.dtype != config.policy.dtype:
        warnings.append(
            f"policy.dtype = {config.policy.dtype!r} trains, rollout.dtype = {rollout.dtype!r} samples: their "
            "log-probs differ by rounding; --bf16 sets the first, --dtype the second"
        )
    filters = [
        f"{name} = {value}"
        for name, value, off in (
            ("top_p", rollout.top_p, 1.0),
            ("top_k", rollout.top_k, 0),
            ("min_p", rollout.min_p, 0.0),
        )
        if value != off
    ]
    if filters:
        warnings.append(
            f"rollout.{' and '.join(filters)} in training: samples come from the filtered policy, the gradient is the "
            "unfiltered one's"
        )
    if config.speculation.sentinel and (why := why_unwatched(config)):
        warnings.append(f"the sentinel watches nothing: {why} (speculation.sentinel = false says so too)")
    return warnings


def unroll_warning(draft: DraftConfig, rollout: RolloutConfig) -> list[str]:
    """A line when the engine drafts deeper than the draft is trained."""
    depth = rollout.speculative_num_steps
    if draft.unroll >= depth:
        return []
    return [
        f"draft.unroll = {draft.unroll} is below rollout.speculative_num_steps = {depth}: a chain's drafts beyond "
        f"the first {draft.unroll} are never trained, and few will stand; --draft.unroll {depth} trains them too"
    ]


def why_unwatched(config: RunConfig) -> str:
    """Why the acceptance of a run that speculates with EAGLE-3 cannot be forecast for the sentinel; '' when it can."""
    rollout = config.rollout
    if rollout.speculative_algorithm != "EAGLE3":
        return ""
    if rollout.temperature > 0 and (rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0):
        return "the forecast knows the policy's law before top_p, top_k and min_p only"
    if rollout.engine == "sglang" and rollout.sglang.get("speculative_adaptive"):
        return "with speculative_adaptive SGLang does not say how many tokens it proposed"
    if rollout.engine == "sglang" and (lossy := lossy_settings(rollout)):
        return f"the engine accepts by another rule ({lossy[0]})"
    return ""


def _why_never_frozen(config: RunConfig) -> str | None:
    """Why the copy of the draft that the settings ask for will never be scored; None when it will be."""
    if not config.frozen_draft_step:
        return None
    if config.rollout.speculative_algorithm != "EAGLE3":
        return f"speculative_algorithm = {config.rollout.speculative_algorithm!r} has no draft to freeze"
    if config.draft.when == "never":
        return "with draft.train = false or train_when = 'never' the draft itself is frozen"
    if config.frozen_draft_step >= config.num_rollout:
        return f"num_rollout = {config.num_rollout} ends before"
    return None


def _check_choices(config: Any, choices: dict[str, Sequence[str]], prefix: str = "") -> None:
    for key, known in choices.items():
        value = _get(config, key.removeprefix(prefix))
        if key == "rollout.verify_rule" and value == "greedy":
            raise ConfigError(
                "rollout.verify_rule = 'greedy' is what temperature 0 uses by itself; choose the rule for others"
            )
        if value not in known:
            raise ConfigError(f"{key} = {value!r} is unknown{nearest(value, known)}; use one of {', '.join(known)}")


def _get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config
