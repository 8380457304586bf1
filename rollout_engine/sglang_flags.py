"""From `[rollout]` to the flags of an SGLang server. Pure: nothing is started and nothing is read here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rollout_engine.config import RolloutConfig
from rollout_engine.types import EngineConfigError
from sync.wire import LOADER

# SGLang ends a response two tokens before its own context is full, and admits none that fills its KV pool to the last
# token; this much more makes rollout.context_length mean what it does in the embedded engine.
_SPARE_POSITIONS = 8
_SPARE_TOKENS = 512

# What [rollout] decides, under the server's names. A different value in [rollout.sglang] would contradict it.
_DECIDED_BY = {
    "model_path": "the policy",
    "custom_weight_loader": "the sync of weights",
    "device": "rollout.device",
    "base_gpu_id": "rollout.device",
    "dtype": "rollout.dtype",
    "context_length": "rollout.context_length",
    "max_running_requests": "rollout.max_running_requests",
    "speculative_algorithm": "rollout.speculative_algorithm",
    "speculative_draft_model_path": "rollout.speculative_draft_model_path",
    "speculative_num_steps": "rollout.speculative_num_steps",
    "speculative_eagle_topk": "rollout.speculative_eagle_topk",
    "speculative_num_draft_tokens": "rollout.speculative_num_draft_tokens",
    "speculative_use_rejection_sampling": "rollout.verify_rule",
    "enable_memory_saver": "rollout.offload",
}
_ONE_OF_EACH = ("tp_size", "dp_size", "pp_size")  # the loader sees whole tensors
_THRESHOLDS = ("speculative_accept_threshold_single", "speculative_accept_threshold_acc")


def server_settings(
    config: RolloutConfig,
    policy: Path,
    draft: Path | None,
    *,
    device: str,
    context_length: int,
    port: int,
    mem_fraction_static: float | None,
    has_flashinfer: bool,
    has_tokenizer: bool,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """All flags by field name; `extra` is [rollout.sglang] under the same names and wins.

    `device` is "cpu", "cuda" or "cuda:N". Raises EngineConfigError for settings that contradict each other.
    """
    on_gpu = device != "cpu"
    settings: dict[str, Any] = {
        "model_path": str(policy),
        "host": "127.0.0.1",
        "port": port,
        "device": device.partition(":")[0],
        "dtype": config.dtype,
        "context_length": context_length + _SPARE_POSITIONS,
        # Never left to SGLang: with speculation it would silently run 48 at once.
        "max_running_requests": config.max_running_requests,
        # KV for every slot at full length and no more: what is left over belongs to training.
        "max_total_tokens": config.max_running_requests * (context_length + _lookahead(config)) + _SPARE_TOKENS,
        "grammar_backend": "none",
        "custom_weight_loader": [LOADER],
        "random_seed": 0,
        "skip_tokenizer_init": not has_tokenizer,
    }
    settings |= _on_gpu(config, device, has_flashinfer) if on_gpu else _on_cpu(config)
    if mem_fraction_static is not None:
        settings["mem_fraction_static"] = mem_fraction_static
    settings |= _speculation(config, draft, on_gpu)
    _check_extra(settings, extra, config)
    settings |= extra
    _check_lossless(config, settings)
    return settings


def command_line(settings: Mapping[str, Any], cli_names: Mapping[str, str] = {}) -> list[str]:
    """Flags as words: true is the bare flag, false none at all, lists several words, tables JSON."""
    words: list[str] = []
    for name, value in settings.items():
        flag = "--" + cli_names.get(name, name).replace("_", "-")
        if value is False or value is None:
            continue
        if value is True:
            words.append(flag)
        elif isinstance(value, (list, tuple)):
            words += [flag, *map(str, value)]
        elif isinstance(value, dict):
            words += [flag, json.dumps(value)]
        else:
            words += [flag, str(value)]
    return words


def _lookahead(config: RolloutConfig) -> int:
    """Positions that verification writes beyond a response, for two steps in flight."""
    return _SPARE_POSITIONS + (0 if config.speculative_algorithm == "NONE" else 4 * (config.speculative_num_steps + 1))


def _on_gpu(config: RolloutConfig, device: str, has_flashinfer: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {
        # Named, because the default on Hopper is FlashAttention-3, which the installed kernels may lack.
        "attention_backend": "flashinfer" if has_flashinfer else "triton",
        "sampling_backend": "flashinfer" if has_flashinfer else "pytorch",
        # A batch that no graph was captured for runs launch by launch, several times slower.
        "cuda_graph_max_bs_decode": config.max_running_requests,
        # Prompts of a rollout come in few large batches: graphs for them cost start-up time and memory.
        "disable_prefill_cuda_graph": True,
    }
    if index := device.partition(":")[2]:
        settings["base_gpu_id"] = int(index)
    if config.offload:
        settings["enable_memory_saver"] = True
        if config.speculative_algorithm == "EAGLE3":
            settings["enable_draft_weights_cpu_backup"] = True  # its rope tables are no part of a sync
    return settings


def _on_cpu(config: RolloutConfig) -> dict[str, Any]:
    # torch_native has no draft backend; intel_amx takes the kernels of whatever sgl_kernel is installed.
    plain = config.speculative_algorithm == "NONE"
    return {"attention_backend": "torch_native" if plain else "intel_amx", "sampling_backend": "pytorch"}


def _speculation(config: RolloutConfig, draft: Path | None, on_gpu: bool) -> dict[str, Any]:
    algorithm, depth = config.speculative_algorithm, config.speculative_num_steps
    if (draft is not None) != (algorithm == "EAGLE3"):
        raise EngineConfigError(
            f"rollout.speculative_algorithm = {algorithm!r} "
            + ("needs a draft folder" if draft is None else "uses no draft, but one is given")
        )
    if algorithm == "NONE":
        return {}
    if config.verify_rule not in ("rejection", "target_only"):
        raise EngineConfigError(
            f"rollout.verify_rule = {config.verify_rule!r}: SGLang verifies by 'rejection' or 'target_only'; the "
            "coupled rule needs rollout.engine = 'torch'"
        )
    if not on_gpu and config.temperature > 0 and not config.allow_lossy:
        raise EngineConfigError(
            f"rollout.temperature = {config.temperature} with rollout.speculative_algorithm = {algorithm!r} on a CPU: "
            "SGLang verifies greedily there; set temperature 0, speculative_algorithm 'NONE', or allow_lossy = true"
        )
    settings: dict[str, Any] = {"speculative_algorithm": algorithm, "speculative_num_draft_tokens": depth + 1}
    if algorithm == "NGRAM":
        # One chain, as EAGLE3's: a match of up to ngram_max_match tokens and the tokens that follow it.
        return settings | {
            "speculative_ngram_min_bfs_breadth": 1,
            "speculative_ngram_max_bfs_breadth": 1,
            "speculative_ngram_max_trie_depth": config.ngram_max_match + depth,
        }
    settings |= {
        "speculative_draft_model_path": str(draft),
        "speculative_num_steps": depth,
        "speculative_eagle_topk": 1,
    }
    if config.verify_rule == "rejection" and on_gpu:
        settings["speculative_use_rejection_sampling"] = True
    return settings


def _check_extra(settings: Mapping[str, Any], extra: Mapping[str, Any], config: RolloutConfig) -> None:
    for name, value in extra.items():
        if name in _DECIDED_BY and value != settings.get(name, False):
            raise EngineConfigError(
                f"rollout.sglang.{name} = {value!r} contradicts {settings.get(name)!r}, which {_DECIDED_BY[name]} "
                "says: leave it out"
            )
        if name in _ONE_OF_EACH and value != 1:
            raise EngineConfigError(f"rollout.sglang.{name} = {value!r}: one engine runs on one GPU; leave it out")
    if extra.get("speculative_adaptive") and config.speculative_algorithm != "EAGLE3":
        raise EngineConfigError("rollout.sglang.speculative_adaptive needs rollout.speculative_algorithm = 'EAGLE3'")


def _check_lossless(config: RolloutConfig, settings: Mapping[str, Any]) -> None:
    """Refuse what would silently change the distribution of the samples."""
    if config.allow_lossy or config.speculative_algorithm == "NONE":
        return
    mend = "leave it out, or accept other samples than the policy's with rollout.allow_lossy = true"
    if config.min_p > 0:
        raise EngineConfigError(f"rollout.min_p = {config.min_p}: SGLang ignores it while verifying; {mend}")
    for name in _THRESHOLDS:
        if settings.get(name, 1.0) < 1.0:
            raise EngineConfigError(f"rollout.sglang.{name} = {settings[name]} accepts too much; {mend}")


def check_draft_fits(policy: Mapping[str, Any], draft: Mapping[str, Any], where: Path, verify_rule: str) -> None:
    """Raise EngineConfigError when the draft's config.json does not fit the policy's, or SGLang's rule."""
    architectures: Sequence[str] = draft.get("architectures") or ()
    if "LlamaForCausalLMEagle3" not in architectures:
        raise EngineConfigError(f"{where}: architectures = {architectures}, SGLang serves LlamaForCausalLMEagle3")
    pairs = {
        "vocab_size": (draft.get("vocab_size"), policy["vocab_size"]),
        "hidden size of the target": (draft.get("target_hidden_size", draft.get("hidden_size")), policy["hidden_size"]),
    }
    for what, (found, expected) in pairs.items():
        if found != expected:
            raise EngineConfigError(f"{where}: the draft does not fit: {what} {found}, the policy has {expected}")
    reduced = draft.get("draft_vocab_size") not in (None, policy["vocab_size"])
    if reduced and verify_rule == "rejection":
        raise EngineConfigError(
            f"{where}: draft_vocab_size = {draft['draft_vocab_size']} of {policy['vocab_size']}: SGLang's rejection "
            "sampling needs the whole vocabulary; make the draft with draft.draft_vocab_size = 0, or set "
            "rollout.verify_rule = 'target_only'"
        )
