"""Resuming Megatron's distributed optimizer when its inner optimizer is torch's AdamW (no Transformer Engine or Apex).

Megatron-core 0.16.1 expects Transformer Engine's FusedAdam, which keeps one `step` per parameter group; torch's AdamW
keeps one per parameter, which breaks `state_dict` on a fresh optimizer and the copy of the loaded state. Works on the
objects; imports no Megatron.
"""

from __future__ import annotations

from typing import Any

import torch


def create_adamw_state(distributed_optimizer: Any) -> None:
    """Gives a fresh optimizer the state that asking for its `state_dict` assumes."""
    inner = distributed_optimizer.optimizer
    for group in inner.param_groups:
        for param in group["params"]:
            inner.state[param] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }


@torch.no_grad()
def load_adamw_state(distributed_optimizer: Any, state: dict[str, Any]) -> None:
    """`load_state_dict`, with `step` kept out of the copy of the sharded state, and one `step` tensor per parameter.

    Megatron would look `step` up among the sharded tensors (KeyError), and shares a single tensor between parameters,
    which AdamW then increments once for each.
    """
    param_state, kind = state.pop("param_state"), state.pop("param_state_sharding_type")
    distributed_optimizer.load_state_dict(state)  # groups and step
    per_param = distributed_optimizer.optimizer.state.values()
    steps = [entry.pop("step").clone() for entry in per_param]
    getattr(distributed_optimizer, f"load_parameter_state_from_{kind}")(param_state)
    for entry, step in zip(per_param, steps, strict=True):
        entry["step"] = step
