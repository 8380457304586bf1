"""Hugging Face's tensors as views into the fused and padded parameters of SGLang's models.

SGLang keeps q, k and v in one matrix, gate and up in another, and pads vocabularies; a view of the right rows lets a
checkpoint's tensor be written in place. Nothing here imports SGLang: its models are known by class name, parameter
names and config. Every parameter must be understood, so that none is left behind at an old version.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sync.plan import SyncError

POLICIES = ("Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM")
DRAFTS = ("LlamaForCausalLMEagle3",)
_WHOLE = ("o_proj", "down_proj", "q_norm", "k_norm", "input_layernorm", "post_attention_layernorm", "hidden_norm")


def role_of(model: nn.Module) -> str:
    """ "policy" or "draft". Raises SyncError for a model that cannot be updated."""
    name = type(model).__name__
    if name in POLICIES:
        return "policy"
    if name in DRAFTS:
        return "draft"
    raise SyncError(f"{name} is no model that can be updated (policies: {', '.join(POLICIES)}; drafts: {DRAFTS[0]})")


def policy_views(model: nn.Module) -> dict[str, Tensor]:
    """By Hugging Face name. A tied lm_head is its embedding and, as there, not listed. Raises SyncError."""
    _require_whole(model)
    config: Any = model.config
    views: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        views |= _views_of(name, parameter.detach(), config, config.vocab_size)
    return views


def draft_views(model: nn.Module, policy: nn.Module) -> dict[str, Tensor]:
    """By checkpoint name (fc.weight, midlayer.*, norm.weight, lm_head.weight). Raises SyncError.

    The embedding is the policy's own parameter and arrives with it; the head must be the draft's own.
    """
    _require_whole(model)
    config: Any = model.config
    policys = {parameter.data_ptr() for parameter in policy.parameters()}
    views: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        shared = parameter.data_ptr() in policys
        if name == "model.embed_tokens.weight" and shared:
            continue
        if name == "model.embed_tokens.weight":
            raise SyncError("the draft has an embedding of its own; only drafts that use the policy's can be updated")
        if shared:
            raise SyncError(f"the draft's {name} is the policy's: its config.json must give draft_vocab_size")
        for full, view in _views_of(name, parameter.detach(), config, config.draft_vocab_size).items():
            views[_draft_name(full)] = view
    return views


def draft_maps(model: nn.Module) -> dict[str, Tensor]:
    """d2t and t2d of a reduced vocabulary, from the ids that SGLang keeps; {} without one.

    SGLang copies the ids when it starts, so a draft with another map cannot be taken over.
    """
    config: Any = model.config
    target_ids = getattr(model, "hot_token_id", None)
    if target_ids is None:
        return {}
    target_ids = target_ids.detach().cpu().long()
    in_draft = torch.zeros(config.vocab_size, dtype=torch.bool)
    in_draft[target_ids] = True
    return {"d2t": target_ids - torch.arange(len(target_ids)), "t2d": in_draft}


def _require_whole(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "tp_size", 1) != 1:
            raise SyncError(f"{name} is split over {module.tp_size} GPUs: only tp_size = 1 can be updated")
        if type(module).__name__ == "PPMissingLayer":
            raise SyncError(f"{name} is in another pipeline stage: only pp_size = 1 can be updated")


def _views_of(name: str, parameter: Tensor, config: Any, vocab_size: int) -> Mapping[str, Tensor]:
    """The checkpoint's tensors within one parameter, by full name."""
    module, _, kind = name.rpartition(".")  # model.layers.0.self_attn.qkv_proj . weight
    parent, _, leaf = module.rpartition(".")
    if kind not in ("weight", "bias"):
        raise SyncError(f"{name} is not understood: quantized or adapted models cannot be updated")
    if leaf == "qkv_proj":
        rows = _qkv_rows(config)
    elif leaf == "gate_up_proj":
        rows = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
    elif leaf in ("embed_tokens", "lm_head"):
        if len(parameter) < vocab_size:
            raise SyncError(f"{name} has {len(parameter)} rows, its config.json says {vocab_size}")
        return {name: parameter[:vocab_size]}
    elif leaf in _WHOLE or module in ("model.norm", "model.fc"):
        return {name: parameter}
    else:
        raise SyncError(f"{name} is not understood: this model has parameters that sync cannot name")
    if sum(rows.values()) != len(parameter):
        raise SyncError(f"{name} has {len(parameter)} rows, its config.json says {' + '.join(map(str, rows.values()))}")
    return {f"{parent}.{part}.{kind}": view for part, view in _split(parameter, rows)}


def _qkv_rows(config: Any) -> dict[str, int]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_rows = config.num_key_value_heads * head_dim
    return {"q_proj": config.num_attention_heads * head_dim, "k_proj": kv_rows, "v_proj": kv_rows}


def _split(parameter: Tensor, rows: Mapping[str, int]) -> Iterator[tuple[str, Tensor]]:
    start = 0
    for part, count in rows.items():
        yield part, parameter[start : start + count]
        start += count


def _draft_name(name: str) -> str:
    """model.layers.0.mlp.up_proj.weight -> midlayer.mlp.up_proj.weight: the draft's checkpoint spelling."""
    return name.removeprefix("model.").replace("layers.0.", "midlayer.", 1)
