"""Hugging Face <-> Megatron-core: parameter names and tensor-parallel layouts. Pure; imports no Megatron.

Dense Qwen3, Qwen2 (bias on q, k, v) and Llama. Megatron fuses q, k, v per query group ([q..., k, v] of group 0, then of
group 1, ...) and gate with up ([gate; up] on every rank); with pipeline parallelism layer numbers are local to a stage.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import torch


class Layout(Enum):
    """How a Megatron parameter is cut over tensor-parallel ranks."""

    COPY = auto()  # the same on every rank
    COLUMN = auto()  # rows of the weight (outputs)
    ROW = auto()  # columns of the weight (inputs)
    GATED = auto()  # [gate; up], each cut by rows
    QKV = auto()  # [q..., k, v] per query group, cut by rows


@dataclass(frozen=True, slots=True)
class Rule:
    layout: Layout
    hf_names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Heads:
    """What the fused q, k, v layout depends on."""

    num_query_groups: int
    kv_channels: int


_TOP_RULES = {
    "embedding.word_embeddings.weight": Rule(Layout.COLUMN, ("model.embed_tokens.weight",)),
    "decoder.final_layernorm.weight": Rule(Layout.COPY, ("model.norm.weight",)),
    "output_layer.weight": Rule(Layout.COLUMN, ("lm_head.weight",)),
}
_LAYER_RULES = {
    "self_attention.linear_qkv.weight": Rule(Layout.QKV, tuple(f"self_attn.{x}_proj.weight" for x in "qkv")),
    "self_attention.linear_qkv.bias": Rule(Layout.QKV, tuple(f"self_attn.{x}_proj.bias" for x in "qkv")),
    "self_attention.linear_proj.weight": Rule(Layout.ROW, ("self_attn.o_proj.weight",)),
    "self_attention.q_layernorm.weight": Rule(Layout.COPY, ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": Rule(Layout.COPY, ("self_attn.k_norm.weight",)),
    "input_layernorm.weight": Rule(Layout.COPY, ("input_layernorm.weight",)),
    "pre_mlp_layernorm.weight": Rule(Layout.COPY, ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.weight": Rule(Layout.GATED, ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": Rule(Layout.ROW, ("mlp.down_proj.weight",)),
}


def rule_for(megatron_name: str, layer_offset: int = 0, *, tied: bool = False) -> Rule:
    """The Hugging Face tensors behind one Megatron parameter and how they are cut.

    `layer_offset` is the global number of this stage's layer 0. With `tied` embeddings the output layer (a
    parameter of its own on the last pipeline stage) is the embedding. Raises KeyError for an unknown name.
    """
    if tied and megatron_name == "output_layer.weight":
        return _TOP_RULES["embedding.word_embeddings.weight"]
    if megatron_name in _TOP_RULES:
        return _TOP_RULES[megatron_name]
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", megatron_name)
    if match is None:
        raise KeyError(megatron_name)
    rule = _LAYER_RULES[match[2]]
    layer = int(match[1]) + layer_offset
    return Rule(rule.layout, tuple(f"model.layers.{layer}.{name}" for name in rule.hf_names))


def fuse_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: Heads) -> torch.Tensor:
    """Rows of q, k, v (weights [rows, in] or biases [rows]) in Megatron's order: per query group [q..., k, v]."""
    groups = [x.reshape(heads.num_query_groups, -1, *x.shape[1:]) for x in (q, k, v)]
    return torch.cat(groups, dim=1).flatten(0, 1)


def split_qkv(fused: torch.Tensor, heads: Heads) -> tuple[torch.Tensor, ...]:
    """Inverse of `fuse_qkv`."""
    grouped = fused.reshape(heads.num_query_groups, -1, *fused.shape[1:])
    hd = heads.kv_channels
    return tuple(x.flatten(0, 1).contiguous() for x in grouped.split([grouped.shape[1] - 2 * hd, hd, hd], dim=1))


def shard(rule: Rule, tensors: Sequence[torch.Tensor], heads: Heads, tp_rank: int, tp_size: int) -> torch.Tensor:
    """This rank's part of a Megatron parameter from its full Hugging Face tensors (in the order of `rule.hf_names`)."""
    match rule.layout:
        case Layout.COPY:
            return tensors[0]
        case Layout.COLUMN:
            return tensors[0].chunk(tp_size, dim=0)[tp_rank]
        case Layout.ROW:
            return tensors[0].chunk(tp_size, dim=1)[tp_rank]
        case Layout.GATED:
            return torch.cat([x.chunk(tp_size, dim=0)[tp_rank] for x in tensors])
        case Layout.QKV:
            return fuse_qkv(*tensors, heads).chunk(tp_size, dim=0)[tp_rank]


def merge(rule: Rule, shards: Sequence[torch.Tensor], heads: Heads) -> dict[str, torch.Tensor]:
    """Full Hugging Face tensors from the parts of all tensor-parallel ranks, in rank order."""
    match rule.layout:
        case Layout.COPY:
            full: tuple[torch.Tensor, ...] = (shards[0],)
        case Layout.COLUMN:
            full = (_cat(shards, dim=0),)
        case Layout.ROW:
            full = (_cat(shards, dim=1),)
        case Layout.GATED:
            halves = [x.chunk(2, dim=0) for x in shards]
            full = tuple(_cat([half[i] for half in halves], dim=0) for i in range(2))
        case Layout.QKV:
            full = split_qkv(_cat(shards, dim=0), heads)
    return dict(zip(rule.hf_names, full, strict=True))


def _cat(shards: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=dim)
