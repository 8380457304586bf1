"""What an SGLang server cannot do for a run, found from the settings alone. Pure; the trainer and the engine both ask.

Facts about SGLang that the rules rest on: while verifying it ignores seeds and min_p; acceptance thresholds below 1
keep tokens that the policy would have rejected; its rejection rule needs a draft over the whole vocabulary; an n-gram
draft of too few tokens is filled up with token 0, side by side, and each of these is accepted with token 0's whole
probability.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import UnionType
from typing import Any

from rollout_engine.config import RolloutConfig
from rollout_engine.types import EngineConfigError

TRANSPORTS = ("auto", "ipc", "disk", "broadcast")

# Settings that only mean something to an SGLang server.
_SGLANG_ONLY = (
    "min_p",
    "allow_lossy",
    "offload",
    "sglang_address",
    "sglang_python",
    "sglang_start_timeout_s",
    "sync_transport",
    "sync_dir",
    "sync_host",
    "sglang",
)

# Settings that only mean something to the embedded engine, and what does their work in SGLang.
_TORCH_ONLY = {
    "batch_invariant": "give --sglang-enable-deterministic-inference, without speculation",
    "cost_table": "give --sglang-speculative-adaptive and --sglang-speculative-adaptive-config FILE",
    "ngram_min_match": "leave it out, there is no shortest match",
}

# Server flags that the engine sets from a setting with a name of its own.
_OWN_SETTING = {
    **{
        name: f"rollout.{name}"
        for name in (
            "max_running_requests",
            "context_length",
            "dtype",
            "speculative_algorithm",
            "speculative_num_steps",
            "speculative_eagle_topk",
            "speculative_num_draft_tokens",
            "speculative_draft_model_path",
        )
    },
    "device": "rollout.device",
    "base_gpu_id": "rollout.device = 'cuda:N'",
    "speculative_use_rejection_sampling": "rollout.verify_rule",
    "enable_memory_saver": "rollout.offload",
    "model_path": "policy.hf_checkpoint",
}

# Server flags that say over how many GPUs a model is cut, in every spelling.
_PARALLEL = (
    *("tp_size", "tensor_parallel_size", "tp", "dp_size", "data_parallel_size", "dp"),
    *("pp_size", "pipeline_parallel_size", "pp", "ep_size", "expert_parallel_size", "ep", "nnodes"),
)

_HIGHEST_PORT = 65535

PREFERRED = "preferred_sampling_params"
THRESHOLDS = ("speculative_accept_threshold_single", "speculative_accept_threshold_acc")


def check_sglang(config: RolloutConfig) -> list[str]:
    """Warnings, one line each, for settings that are to run in SGLang. Raises EngineConfigError for impossible ones."""
    _check_translation(config)
    _check_server_flags(config.sglang)
    _check_flags_together(config)
    _check_connection(config)
    if config.verify_rule == "coupled":
        raise EngineConfigError(
            "rollout.verify_rule = 'coupled' needs seeds, which SGLang ignores while verifying: use 'rejection' or "
            "'target_only', or rollout.engine = 'torch'"
        )
    if fault := top_k_fault(config.top_k, config.temperature):
        raise EngineConfigError(f"rollout.{fault}")
    lossy = lossy_settings(config)
    if lossy and not config.allow_lossy:
        raise EngineConfigError(
            f"{lossy[0]}; leave it out, or accept samples that do not follow the policy's law with --allow-lossy"
        )
    return _warnings(config)


def check_torch(config: RolloutConfig) -> None:
    """Raises EngineConfigError for a setting that the embedded engine would silently leave aside."""
    default = RolloutConfig()
    for name in _SGLANG_ONLY:
        value = getattr(config, name)
        if value != getattr(default, name):
            shown = f"rollout.{name} = {value!r}" if name != "sglang" else f"[rollout.sglang] {next(iter(value))}"
            raise EngineConfigError(
                f"{shown} is for SGLang alone: add --engine sglang, or leave it out for rollout.engine = 'torch'"
            )


def check_sync_folder(config: RolloutConfig) -> None:
    """Raises EngineConfigError when weights are to be sent to where only a folder that both sides see leads."""
    needs = None
    if config.sync_transport == "disk":
        needs = "rollout.sync_transport = 'disk'"
    elif config.sglang_address:
        needs = f"rollout.sglang_address = {config.sglang_address!r}"
    if needs and not config.sync_dir:
        raise EngineConfigError(
            f"{needs} needs a folder that trainer and engine both see: give --update-weight-disk-dir DIR "
            "(rollout.sync_dir)"
        )


def check_draft_vocabulary(config: RolloutConfig, is_reduced: bool) -> None:
    """Raises EngineConfigError for a draft over part of the vocabulary under SGLang's rejection rule."""
    if config.speculative_algorithm == "EAGLE3" and config.verify_rule == "rejection" and is_reduced:
        raise EngineConfigError(
            "rollout.verify_rule = 'rejection' in SGLang needs a draft over the whole vocabulary, this one has a part "
            "of it (d2t): set draft.draft_vocab_size = 0, or rollout.verify_rule = 'target_only'"
        )


def lossy_settings(config: RolloutConfig) -> list[str]:
    """Settings under which SGLang's samples do not keep the policy's law, each with the reason; [] when none."""
    found = []
    if config.sglang.get(PREFERRED):
        found.append(
            f"rollout.sglang.{PREFERRED}: penalties and the like in every request, of which training knows nothing"
        )
    if config.speculative_algorithm == "NONE":
        return found
    if config.min_p > 0:
        found.append(f"rollout.min_p = {config.min_p} with speculation: SGLang applies it to the first token only")
    if config.speculative_algorithm == "NGRAM" and config.speculative_num_steps > 1 and config.temperature > 0:
        found.append(
            f"rollout.speculative_algorithm = 'NGRAM' at temperature {config.temperature}: SGLang fills up short "
            "drafts with token 0 and says it too often (exact: temperature 0, or speculative_num_steps = 1)"
        )
    for name in THRESHOLDS:
        threshold = config.sglang.get(name, 1.0)
        if below_one(threshold):
            found.append(
                f"rollout.sglang.{name} = {threshold!r} with speculation: below 1.0 SGLang keeps draft tokens that the "
                "policy would reject"
            )
    return found


def top_k_fault(top_k: int, temperature: float) -> str:
    """ "", or why SGLang's log-probs of such samples would depend on what else is in the batch."""
    if top_k != 1 or temperature in (0, 1):
        return ""
    return (
        f"top_k = 1 at temperature {temperature}: in a batch of nothing else SGLang takes it for greedy and reports "
        "log-probs at temperature 1; set the temperature to 0 or 1, the tokens are the same"
    )


def _check_translation(config: RolloutConfig) -> None:
    default = RolloutConfig()
    for name, instead in _TORCH_ONLY.items():
        if getattr(config, name) != getattr(default, name):
            raise EngineConfigError(
                f"rollout.{name} = {getattr(config, name)!r} is for the embedded engine alone; with SGLang: {instead}"
            )
    if config.dtype == "float64":
        raise EngineConfigError("rollout.dtype = 'float64': SGLang has no float64; use 'float32' or 'bfloat16'")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device):
        raise EngineConfigError(f"rollout.device = {config.device!r} is unknown; use auto, cpu, cuda or cuda:N")
    if not 0 <= config.min_p < 1:
        raise EngineConfigError(f"rollout.min_p = {config.min_p}: it must be at least 0 (off) and below 1")


def _check_server_flags(flags: Mapping[str, Any]) -> None:
    for name in flags:
        if name in _OWN_SETTING:
            raise EngineConfigError(f"rollout.sglang.{name} has a setting of its own: use {_OWN_SETTING[name]}")
    for name in _PARALLEL:
        if flags.get(name, 1) != 1:
            raise EngineConfigError(
                f"rollout.sglang.{name} = {flags[name]!r}: an engine over several GPUs is not built yet; leave it "
                "out (1)"
            )
    if flags.get("enable_dp_attention"):
        raise EngineConfigError(
            "rollout.sglang.enable_dp_attention needs an engine over several GPUs, which is not built yet: leave it out"
        )
    if flags.get("incremental_streaming_output"):
        raise EngineConfigError(
            "rollout.sglang.incremental_streaming_output brings answers in pieces, the engine reads whole ones: leave "
            "it out"
        )
    if "custom_weight_loader" in flags:
        raise EngineConfigError("rollout.sglang.custom_weight_loader belongs to the sync of weights: leave it out")
    _check_flag_values(flags)


def _check_flag_values(flags: Mapping[str, Any]) -> None:
    port = flags.get("port", _HIGHEST_PORT)
    if not _is_number(port, int) or not 1 <= port <= _HIGHEST_PORT:
        raise EngineConfigError(
            f"rollout.sglang.port = {port!r}: expected a TCP port, 1 to {_HIGHEST_PORT}; leave it out for a free one"
        )
    share = flags.get("mem_fraction_static", 0.5)
    if not _is_number(share, int | float) or not 0 < share < 1:
        raise EngineConfigError(
            f"rollout.sglang.mem_fraction_static = {share!r}: expected a share of the GPU's memory, above 0 and below 1"
        )


def _check_flags_together(config: RolloutConfig) -> None:
    flags = config.sglang
    if flags.get("speculative_adaptive") and config.speculative_algorithm != "EAGLE3":
        raise EngineConfigError("rollout.sglang.speculative_adaptive needs rollout.speculative_algorithm = 'EAGLE3'")
    if flags.get("skip_tokenizer_init") and config.stop:
        raise EngineConfigError(
            f"rollout.sglang.skip_tokenizer_init with rollout.stop = {list(config.stop)}: SGLang finds stop strings "
            "with its tokenizer; leave one of them out"
        )


def _check_connection(config: RolloutConfig) -> None:
    if config.sync_transport not in TRANSPORTS:
        raise EngineConfigError(
            f"rollout.sync_transport = {config.sync_transport!r} is unknown; use one of {', '.join(TRANSPORTS)}"
        )
    if config.sglang_address:
        found = re.fullmatch(r"https?://[^/\s:]+:(\d{1,5})", config.sglang_address)
        if not found or not 1 <= int(found.group(1)) <= _HIGHEST_PORT:
            raise EngineConfigError(
                f"rollout.sglang_address = {config.sglang_address!r}: expected http://HOST:PORT of one server, as "
                f"slipstream serve prints, with a port from 1 to {_HIGHEST_PORT}"
            )
    if not config.sglang_start_timeout_s > 0:
        raise EngineConfigError(
            f"rollout.sglang_start_timeout_s = {config.sglang_start_timeout_s}: it must be above 0 seconds"
        )


def _warnings(config: RolloutConfig) -> list[str]:
    warnings = [f"{line}: samples do not follow the policy's law (--allow-lossy)" for line in lossy_settings(config)]
    speculates = config.speculative_algorithm != "NONE"
    if speculates and config.controller == "adaptive" and not config.sglang.get("speculative_adaptive"):
        warnings.append(
            f"rollout.controller = 'adaptive': SGLang always drafts {config.speculative_num_steps} tokens (say "
            "--rollout.controller fixed), unless --sglang-speculative-adaptive lets it choose by its own table"
        )
    if str(config.sglang.get("kv_cache_dtype", "")).startswith("fp"):
        warnings.append(
            f"rollout.sglang.kv_cache_dtype = {config.sglang['kv_cache_dtype']!r}: samples and their log-probs are "
            "those of rounded keys and values, which training does not round: watch logp_diff, set algorithm.use_tis"
        )
    if config.sglang.get("load_format") == "dummy":
        warnings.append(
            "rollout.sglang.load_format = 'dummy': the server starts with random weights; a run sends its own before "
            "anything is served, slipstream serve and generate do not"
        )
    return warnings


def below_one(threshold: Any) -> bool:
    """Also of what is no number."""
    return not _is_number(threshold, int | float) or threshold < 1


def _is_number(value: Any, kind: type | UnionType) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
