"""What an engine refuses before any work: settings and requests that cannot be served. One line each."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from draft_models.eagle3 import Eagle3
from rollout_engine.config import RolloutConfig, SpeculationConfig
from rollout_engine.hf_checkpoint import DecoderConfig
from rollout_engine.types import BadRequest, EngineConfigError, RolloutRequest

_ALGORITHMS = ("EAGLE3", "NGRAM", "NONE")
_RULES = ("rejection", "target_only", "coupled")


def check_config(
    config: RolloutConfig,
    target: DecoderConfig,
    draft: Eagle3 | None,
    device: torch.device,
    speculation: SpeculationConfig,
) -> None:
    """Raise EngineConfigError for settings that contradict themselves, the target, the draft or the device."""
    if config.batch_invariant and device.type != "cpu":
        raise EngineConfigError(
            "rollout.batch_invariant = true holds on the CPU only: CUDA's products depend on the batch"
        )
    algorithm, depth = config.speculative_algorithm, config.speculative_num_steps
    if algorithm not in _ALGORITHMS:
        raise EngineConfigError(
            f"rollout.speculative_algorithm = {algorithm!r}: expected one of {', '.join(_ALGORITHMS)}"
        )
    if config.verify_rule not in _RULES:
        raise EngineConfigError(f"rollout.verify_rule = {config.verify_rule!r}: expected one of {', '.join(_RULES)}")
    if config.controller not in ("adaptive", "fixed"):
        raise EngineConfigError(f"rollout.controller = {config.controller!r}: expected adaptive or fixed")
    if config.context_length > target.max_positions:
        raise EngineConfigError(
            f"rollout.context_length = {config.context_length} is above the model's {target.max_positions} positions"
        )
    if config.max_running_requests < 1:
        raise EngineConfigError(f"rollout.max_running_requests = {config.max_running_requests}: at least 1 is needed")
    check_history(speculation, config)
    if algorithm == "NONE":
        return
    if depth < 1:
        raise EngineConfigError(
            f"rollout.speculative_num_steps = {depth} with {algorithm}: at least 1, or speculative_algorithm = NONE"
        )
    if config.speculative_eagle_topk != 1:
        raise EngineConfigError(
            f"rollout.speculative_eagle_topk = {config.speculative_eagle_topk}: only chains (1) are built"
        )
    if config.speculative_num_draft_tokens not in (0, depth + 1):
        raise EngineConfigError(
            f"rollout.speculative_num_draft_tokens = {config.speculative_num_draft_tokens}: "
            f"with topk 1 it is speculative_num_steps + 1 = {depth + 1}"
        )
    if algorithm == "EAGLE3":
        _check_draft(target, draft)


def check_history(speculation: SpeculationConfig, config: RolloutConfig) -> None:
    """Raise EngineConfigError where the engine has no history drafter, or its settings contradict each other."""
    shortest, longest = speculation.history_min_match, speculation.history_max_match
    if not 1 <= shortest <= longest:
        raise EngineConfigError(
            f"speculation.history_min_match = {shortest} and history_max_match = {longest}: they must be at least 1 "
            "and in this order"
        )
    if not 0 <= speculation.history_min_confidence <= 1:
        raise EngineConfigError(
            f"speculation.history_min_confidence = {speculation.history_min_confidence}: it must be 0 to 1"
        )
    if not speculation.history:
        return
    if config.engine != "torch":
        raise EngineConfigError(
            "speculation.history = true with rollout.engine = 'sglang': SGLang runs one speculative algorithm, so its "
            "n-gram trie cannot stand beside EAGLE-3, and alone it changes what is sampled; leave it out, or use "
            "rollout.engine = 'torch'"
        )
    if config.speculative_algorithm != "EAGLE3":
        raise EngineConfigError(
            f"speculation.history = true with rollout.speculative_algorithm = {config.speculative_algorithm!r}: "
            "history drafts stand beside EAGLE3's; use that, or leave history out"
        )


def _check_draft(target: DecoderConfig, draft: Eagle3 | None) -> None:
    if draft is None:
        raise EngineConfigError("rollout.speculative_algorithm = EAGLE3 needs a draft model")
    sizes = draft.config
    if (sizes.hidden_size, sizes.vocab_size) != (target.hidden_size, target.vocab_size):
        raise EngineConfigError(
            f"draft and policy do not fit: hidden size {sizes.hidden_size} and vocabulary {sizes.vocab_size} "
            f"against {target.hidden_size} and {target.vocab_size}"
        )
    if max(sizes.aux_layer_ids) >= target.num_layers:
        raise EngineConfigError(
            f"draft and policy do not fit: layer {max(sizes.aux_layer_ids)} is to be captured, "
            f"the policy has layers 0 to {target.num_layers - 1}"
        )


def check_requests(requests: Iterable[RolloutRequest], context_length: int, *, has_detokenizer: bool) -> None:
    """Raise BadRequest naming the first request that cannot be served."""
    seen: set[tuple[int, int]] = set()
    for request in requests:
        fault = _fault(request, context_length, has_detokenizer)
        if request.key in seen:
            fault = "another request has the same ids"
        if fault is not None:
            raise BadRequest(f"request (prompt {request.prompt_id}, sample {request.sample_id}): {fault}")
        seen.add(request.key)


def _fault(request: RolloutRequest, context_length: int, has_detokenizer: bool) -> str | None:
    prompt_len, sampling = len(request.prompt_ids), request.sampling
    if prompt_len == 0:
        return "the prompt is empty"
    if prompt_len >= context_length:
        return f"{prompt_len} prompt tokens leave no room in a context of {context_length}"
    if sampling.max_new_tokens < 1:
        return f"max_new_tokens = {sampling.max_new_tokens}, at least 1 is needed"
    if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
        return "temperature and top_k must not be negative, and top_p lies in (0, 1]"
    if sampling.stop and not has_detokenizer:
        return "stop strings need an engine with a detokenizer; use stop_token_ids"
    return None
