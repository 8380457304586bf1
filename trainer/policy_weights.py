"""Moves a Megatron model's weights: Hugging Face tensors onto the ranks, and back to rank 0. Imports no Megatron."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from trainer import distributed, megatron_names
from trainer.config import ConfigError
from trainer.hf_files import HFWeights
from trainer.policy_layout import RankLayout, all_gather_list


@dataclass(frozen=True, slots=True)
class WeightMap:
    """How this rank's parameters correspond to Hugging Face tensors."""

    heads: megatron_names.Heads
    layer_offset: int  # global number of this pipeline stage's first layer
    tied: bool
    layout: RankLayout

    def rule(self, name: str) -> megatron_names.Rule:
        return megatron_names.rule_for(name, self.layer_offset, tied=self.tied)


def load_weights(model: nn.Module, folder: Path, weight_map: WeightMap) -> None:
    """Fills `model` from a checkpoint folder. Raises ConfigError on every rank when one of them cannot."""
    message = None
    try:
        _read_weights(model, folder, weight_map)
    except ConfigError as error:
        message = str(error)
    if message := distributed.first_message(message):
        raise ConfigError(message)


@torch.no_grad()
def _read_weights(model: nn.Module, folder: Path, weight_map: WeightMap) -> None:
    weights, tp = HFWeights(folder), weight_map.layout.tp
    for name, param in model.named_parameters():
        rule = weight_map.rule(name)
        full = [weights[hf_name] for hf_name in rule.hf_names]
        part = megatron_names.shard(rule, full, weight_map.heads, tp.rank, tp.size)
        if part.shape != param.shape:
            raise ConfigError(
                f"{folder}: {', '.join(rule.hf_names)} gives {tuple(part.shape)} on this rank, "
                f"but config.json asks for {tuple(param.shape)}"
            )
        param.copy_(part)


def collect(
    model: nn.Module, weight_map: WeightMap, value_of: Callable[[nn.Parameter], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A tensor of every parameter (its value, its gradient) in Hugging Face form on global rank 0; empty elsewhere.

    Collective. Without tensor parallelism most of the tensors share memory with what `value_of` returned.
    """
    layout = weight_map.layout
    if layout.dp.rank != 0:
        return {}
    stage: dict[str, torch.Tensor] = {}
    for name, param in model.named_parameters():
        if weight_map.tied and name == "output_layer.weight":
            continue  # the last stage's copy of the first stage's embedding
        rule, part = weight_map.rule(name), value_of(param)
        whole = layout.tp.size == 1 or rule.layout is megatron_names.Layout.COPY
        parts = [part] if whole else all_gather_list(part, layout.tp.group)
        stage |= megatron_names.merge(rule, parts, weight_map.heads)
    if layout.pp.size > 1 and layout.tp.rank == 0:
        stage = _send_to_first_stage(stage, layout)
    return stage if layout.tp.rank == 0 and layout.is_first_stage else {}


def _send_to_first_stage(stage: dict[str, torch.Tensor], layout: RankLayout) -> dict[str, torch.Tensor]:
    group = layout.pp.group
    described: list[list[tuple[str, torch.Size, torch.dtype]]] = [[] for _ in range(layout.pp.size)]
    dist.all_gather_object(described, [(name, t.shape, t.dtype) for name, t in stage.items()], group=group)
    if not layout.is_first_stage:
        for tensor in stage.values():
            dist.send(tensor.contiguous(), group=group, group_dst=0)
        return {}
    for source in range(1, layout.pp.size):
        for name, shape, dtype in described[source]:
            stage[name] = torch.empty(shape, dtype=dtype, device=layout.device)
            dist.recv(stage[name], group=group, group_src=source)
    return stage
