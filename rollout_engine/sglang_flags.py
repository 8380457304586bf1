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


def server_settings(
    config: RolloutConfig,
    policy: Path,
    draft: Path | None,
    *,
    device: str,
    context_length: int,
    mem_fraction_static: float | None,
    has_flashinfer: bool,
    has_tokenizer: bool,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """All flags but the port, by field name; `extra` is [rollout.sglang] under the same names and wins.

    `device` is "cpu", "cuda" or "cuda:N". Raises EngineConfigError for settings that contradict each other.
    """
    on_gpu = device != "cpu"
    settings: dict[str, Any] = {
        "model_path": str(policy),
        "host": "127.0.0.1",
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
        # Waits for the next message where it would poll with a whole core; under load it never waits.
        "sleep_on_idle": True,
    }
    settings |= _on_gpu(config, device, has_flashinfer) if on_gpu else _on_cpu(config)
    if mem_fraction_static is not None:
        settings["mem_fraction_static"] = mem_fraction_static
    settings |= _speculation(config, draft, on_gpu)
    return settings | dict(extra)


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
    settings: dict[str, Any] = {"speculative_algorithm": algorithm, "speculative_num_draft_tokens": depth + 1}
    if algorithm == "NGRAM":
        # One follower for each match length, of up to ngram_max_match tokens: a chain, or a few with one root.
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


def check_draft_fits(policy: Mapping[str, Any], draft: Mapping[str, Any], where: Path) -> None:
    """Raise EngineConfigError when the draft's config.json does not fit the policy's."""
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
