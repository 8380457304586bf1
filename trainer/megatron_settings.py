"""Megatron-core's settings from a Hugging Face config.json and the `[policy]` table. Pure; imports no Megatron."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

import torch

from draft_models.layers import RopeTable, inverse_frequencies, rope_parameters, rope_table
from trainer.config import ConfigError, PolicyConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SUPPORTED_MODEL_TYPES = ("qwen3", "qwen2", "llama")


def check_layout(config: PolicyConfig, vocab_size: int, world_size: int) -> None:
    """Raises ConfigError for a dtype or a cut over ranks that cannot be."""
    tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    if config.dtype not in DTYPES:
        raise ConfigError(f"policy.dtype {config.dtype!r} is not supported; use one of {', '.join(DTYPES)}")
    if world_size % (tp * pp):
        raise ConfigError(
            f"policy: {world_size} ranks cannot be cut into tensor_model_parallel_size = {tp} x "
            f"pipeline_model_parallel_size = {pp}; start a multiple of {tp * pp} ranks"
        )
    if vocab_size % tp:
        raise ConfigError(f"policy.tensor_model_parallel_size = {tp} does not divide the vocabulary of {vocab_size}")


def config_fields(config: PolicyConfig, hf_config: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """TransformerConfig's fields: from the checkpoint, from `[policy]` and, on top, `[policy.megatron]` verbatim.

    `known` are TransformerConfig's own fields. Raises ConfigError for a key of `[policy.megatron]` that is not
    among them, or that the checkpoint or `[policy]` decides.
    """
    dtype = DTYPES[config.dtype]
    owned = transformer_settings(hf_config) | {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "tensor_model_parallel_size": config.tensor_model_parallel_size,
        "pipeline_model_parallel_size": config.pipeline_model_parallel_size,
        "sequence_parallel": config.sequence_parallel and config.tensor_model_parallel_size > 1,
        "calculate_per_token_loss": True,  # the loss is a sum; finalize_model_grads divides by the global token count
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "rotary_interleaved": False,  # the rotary embedding is ours, with the checkpoint's settings
        "apply_rope_fusion": False,
        "variable_seq_lengths": config.pipeline_model_parallel_size > 1,  # packed micro-batches differ in length
    }
    _check_keys(config.megatron, owned, known)
    defaults = {
        "use_cpu_initialization": not torch.cuda.is_available(),
        # though every parameter is read from the checkpoint: the initialisation also marks tensor-parallel parameters,
        # without which the gradient norm leaves out the other ranks' parts
        "perform_initialization": True,
        "batch_p2p_comm": False,
        "cuda_graph_scope": [],  # Megatron's own default is deprecated and warns
        "masked_softmax_fusion": False,  # the fusions need Apex or CUDA extensions
        "gradient_accumulation_fusion": False,
        "moe_token_dispatcher_type": "alltoall",  # demanded with variable_seq_lengths, of dense models too
    }
    if config.recompute:
        defaults |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return owned | defaults | config.megatron


def _check_keys(given: Mapping[str, Any], owned: Mapping[str, Any], known: Collection[str]) -> None:
    for key in given:
        if key in owned:
            raise ConfigError(f"policy.megatron.{key} is decided by the checkpoint or by [policy]; remove it")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"policy.megatron.{key} is not a field of Megatron's TransformerConfig{hint}")


def optimizer_fields(config: PolicyConfig) -> dict[str, Any]:
    """OptimizerConfig's fields. `min_lr` and `lr` also end in its parameter groups, where the scheduler reads them."""
    dtype = DTYPES[config.dtype]
    return {
        "optimizer": "adam",
        "lr": config.lr,
        "min_lr": config.min_lr,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "adam_eps": config.adam_eps,
        "clip_grad": config.clip_grad,
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
        "use_distributed_optimizer": config.use_distributed_optimizer,
    }


def scheduler_fields(config: PolicyConfig, train_iters: int) -> dict[str, Any]:
    """OptimizerParamScheduler's arguments; `train_iters` is the decay length where the recipe gives none."""
    decay_steps = config.lr_decay_iters or train_iters
    if config.lr_warmup_iters >= decay_steps:
        raise ConfigError(
            f"policy.lr_warmup_iters = {config.lr_warmup_iters} must be below the {decay_steps} optimizer "
            "steps of the run (policy.lr_decay_iters, or num_rollout x num_steps_per_rollout)"
        )
    return {
        "init_lr": 0.0,
        "max_lr": config.lr,
        "min_lr": config.min_lr,
        "lr_warmup_steps": config.lr_warmup_iters,
        "lr_decay_steps": decay_steps,
        "lr_decay_style": config.lr_decay_style,
        "start_wd": config.weight_decay,
        "end_wd": config.weight_decay,
        "wd_incr_steps": decay_steps,
        "wd_incr_style": "constant",
    }


def rope_frequencies(hf_config: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """The rotary embedding's inverse frequencies, float32 [head_dim / 2]. Raises ConfigError for an unknown scaling."""
    rope = rope_parameters(hf_config)
    try:
        return inverse_frequencies(rope["rope_theta"], head_dim, rope)
    except ValueError as error:
        raise ConfigError(f"config.json: {error}") from error
    except KeyError as error:
        raise ConfigError(f"config.json: rope settings of type {rope['rope_type']} lack {error}") from error


def rope_of(hf_config: Mapping[str, Any], head_dim: int, dtype: torch.dtype, device: torch.device) -> RopeTable:
    """cos and sin of every position that the checkpoint knows."""
    return rope_table(hf_config["max_position_embeddings"], rope_frequencies(hf_config, head_dim), dtype, device)


def transformer_settings(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """TransformerConfig's architecture fields from a Hugging Face config.json.

    Raises ConfigError for an architecture other than dense Qwen3, Qwen2 or Llama.
    """
    model_type = hf_config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        known = ", ".join(SUPPORTED_MODEL_TYPES)
        raise ConfigError(f"config.json: model_type {model_type!r} is not supported; use one of {known}")
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if hf_config.get(key):
            raise ConfigError(f"config.json: {key} = true is not supported for {model_type}")
    if hf_config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"config.json: hidden_act {hf_config['hidden_act']!r} is not supported; only silu is")
    num_heads = hf_config["num_attention_heads"]
    return {
        "num_layers": hf_config["num_hidden_layers"],
        "hidden_size": hf_config["hidden_size"],
        "ffn_hidden_size": hf_config["intermediate_size"],
        "num_attention_heads": num_heads,
        "num_query_groups": hf_config.get("num_key_value_heads") or num_heads,
        "kv_channels": hf_config.get("head_dim") or hf_config["hidden_size"] // num_heads,
        "layernorm_epsilon": hf_config.get("rms_norm_eps", 1e-6),
        "qk_layernorm": model_type == "qwen3",
        "add_qkv_bias": model_type == "qwen2",
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
    }
