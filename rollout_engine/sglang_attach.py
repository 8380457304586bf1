"""Whether a server that runs already is the one that a run's settings describe. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rollout_engine.config import RolloutConfig
from rollout_engine.sglang_checks import PREFERRED, THRESHOLDS, below_one
from sync.wire import LOADER

_KV_DTYPE = "kv_cache_dtype"
_ADAPTIVE = "speculative_adaptive"
_SILENT_CAP = 48  # requests that SGLang runs at once under speculation when it is not told how many


def attach_faults(info: Mapping[str, Any], config: RolloutConfig, policy: Path, context_length: int) -> list[str]:
    """In what a running server, described by its /server_info, is not the one that `config` asks for."""
    if "version" not in info:
        return ["what answers there does not describe itself as SGLang: start one with slipstream serve"]
    flags = {name.replace("-", "_"): value for name, value in config.sglang.items()}
    faults = [
        f"it runs with {name} = {info.get(name)!r}, the run asks for {value!r}"
        for name, value in _wanted(info, config, flags).items()
        if info.get(name) != value
    ]
    kv_dtype, wanted = info.get(_KV_DTYPE), flags.pop(_KV_DTYPE, None)
    if _kv_dtype(kv_dtype, config) != _kv_dtype(wanted, config):
        faults.append(f"it runs with {_KV_DTYPE} = {kv_dtype!r}, the run asks for {wanted or 'auto'!r}")
    faults += _flag_faults(info, flags)
    faults += _size_faults(info, config, context_length)
    if config.speculative_algorithm != "NONE" and not config.allow_lossy:
        faults += [
            f"it runs with {name} = {info[name]!r}: below 1.0 it keeps draft tokens that the policy would reject "
            "(--allow-lossy accepts that)"
            for name in THRESHOLDS
            if name in info and below_one(info[name])
        ]
    if info.get(PREFERRED) and not config.allow_lossy:
        faults.append(f"it changes every request by {PREFERRED} = {info[PREFERRED]!r} (--allow-lossy accepts that)")
    # On another machine the same checkpoint may lie elsewhere; what its sync plan says is checked tensor by tensor.
    if Path(info.get("model_path", "")).name != policy.resolve().name:
        faults.append(f"it serves model_path = {info.get('model_path')!r}, the run's policy is {str(policy)!r}")
    if LOADER not in (info.get("custom_weight_loader") or ()):
        faults.append(f"it was started without --custom-weight-loader {LOADER}, so no weights can be sent to it")
    return faults


def _wanted(info: Mapping[str, Any], config: RolloutConfig, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the server's settings must have, by name."""
    algorithm, depth = config.speculative_algorithm, config.speculative_num_steps
    wanted: dict[str, Any] = {
        "speculative_algorithm": None if algorithm == "NONE" else algorithm,
        "dtype": config.dtype,
        "quantization": None,
    }
    # The loader sees whole tensors only. A server that does not name these has one of each.
    wanted |= {name: 1 for name in ("tp_size", "dp_size", "pp_size", "nnodes") if name in info}
    if "incremental_streaming_output" in info:
        wanted["incremental_streaming_output"] = False  # answers would come in pieces
    if algorithm != "NONE":
        wanted["speculative_num_draft_tokens"] = depth + 1
    if algorithm == "EAGLE3":
        wanted |= {"speculative_num_steps": depth, "speculative_eagle_topk": 1}
        if _ADAPTIVE in info and _ADAPTIVE not in flags:
            wanted[_ADAPTIVE] = False  # the sentinel's forecast is of a fixed depth
        if info.get("device") != "cpu":
            wanted["speculative_use_rejection_sampling"] = config.verify_rule == "rejection"
    if config.offload:
        wanted["enable_memory_saver"] = True
        if algorithm == "EAGLE3":
            wanted["enable_draft_weights_cpu_backup"] = True  # else its rope tables, no part of a sync, are lost
    return wanted


def _flag_faults(info: Mapping[str, Any], flags: Mapping[str, Any]) -> Iterator[str]:
    """In which of [rollout.sglang], which nothing can apply to a running server, it says another thing of itself."""
    for name, asked in flags.items():
        flag = f"--sglang-{name.replace('_', '-')}"
        if name not in info:
            matches = get_close_matches(name, list(info), n=1, cutoff=0.5)
            hint = f" (did you mean {matches[0]}?)" if matches else ""
            yield f"it names no flag {name}{hint}: leave {flag} out"
        elif not _is_same(info[name], asked):
            yield (
                f"it runs with {name} = {info[name]!r}, the run asks for {asked!r}: start the server with it, or "
                f"leave {flag} out where SGLang itself changes it"
            )


def _is_same(found: Any, asked: Any) -> bool:
    """A command line gives false by not naming the flag, and a table as JSON: the server may have either form."""
    if asked is False:
        return found in (False, None)
    return bool(found == asked or (isinstance(asked, dict) and found == json.dumps(asked)))


def _kv_dtype(name: str | None, config: RolloutConfig) -> str:
    """What KV is kept in. A narrower one than the model's changes what it says, hence the law of the samples."""
    return {None: config.dtype, "auto": config.dtype, "bf16": "bfloat16"}.get(name, str(name))


def _size_faults(info: Mapping[str, Any], config: RolloutConfig, context_length: int) -> Iterator[str]:
    if (found := info.get("context_length")) is not None and found < context_length:
        yield f"its context_length = {found} is below the run's {context_length}"
    most = info.get("max_running_requests")
    if most is None and config.speculative_algorithm != "NONE":
        most = _SILENT_CAP
    if most is not None and most < config.max_running_requests:
        yield f"it runs max_running_requests = {most} at once, the run asks for {config.max_running_requests}"
