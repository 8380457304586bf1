"""How much memory an engine needs. Pure functions of sizes; one that reads them off a checkpoint's headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rollout_engine.types import EngineConfigError

_GIB = 1024**3
_MARGIN = 1.1  # allocator rounding and what is not counted: rope tables, block tables
_LEAST_FRACTION = 0.1


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Accelerator memory that an engine needs for its models and the KV of all its slots."""

    policy_bytes: int
    draft_bytes: int
    kv_bytes_per_token: int  # of policy and draft together
    num_slots: int  # requests at once
    tokens_per_slot: int

    @property
    def one_slot_bytes(self) -> int:
        return self.kv_bytes_per_token * self.tokens_per_slot

    @property
    def kv_bytes(self) -> int:
        """For every slot filled to its last position."""
        return self.one_slot_bytes * self.num_slots

    @property
    def least_bytes(self) -> int:
        """Below this not even one request of full length can be served."""
        return self.policy_bytes + self.draft_bytes + self.one_slot_bytes

    @property
    def total_bytes(self) -> int:
        return self.policy_bytes + self.draft_bytes + self.kv_bytes

    def __str__(self) -> str:
        return (
            f"policy {gib(self.policy_bytes)}, draft {gib(self.draft_bytes)}, KV {gib(self.kv_bytes)} for "
            f"{self.num_slots} requests of {self.tokens_per_slot} tokens ({gib(self.one_slot_bytes)} each)"
        )


def gib(num_bytes: float) -> str:
    """As text, in GiB."""
    return f"{num_bytes / _GIB:.2f} GiB"


def memory_needed(
    policy: Mapping[str, Any],
    draft: Mapping[str, Any] | None,
    *,
    policy_params: int,
    draft_params: int,
    itemsize: int,
    num_slots: int,
    tokens_per_slot: int,
) -> MemoryNeed:
    """From the two config.json (`draft` None without one), parameter counts and bytes per number of weights and KV."""
    per_token = _kv_numbers_per_token(policy) + (0 if draft is None else _kv_numbers_per_token(draft))
    return MemoryNeed(
        policy_bytes=policy_params * itemsize,
        draft_bytes=draft_params * itemsize,
        kv_bytes_per_token=per_token * itemsize,
        num_slots=num_slots,
        tokens_per_slot=tokens_per_slot,
    )


def _kv_numbers_per_token(config: Mapping[str, Any]) -> int:
    num_heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or num_heads
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    return int(2 * config.get("num_hidden_layers", 1) * kv_heads * head_dim)


def static_fraction(need: MemoryNeed, free_bytes: int, most: float) -> float:
    """The share of the free memory for weights and KV: what all slots need, and no more than `most`.

    Raises EngineConfigError when `most` does not hold the weights and one request.
    """
    if need.least_bytes * _MARGIN > free_bytes * most:
        raise EngineConfigError(
            f"the GPU is too small: {gib(free_bytes)} are free, of which the engine may take {most:.0%} "
            f"(rollout.sglang.mem_fraction_static); it needs {need}; lower rollout.max_running_requests or "
            "rollout.context_length, or take a smaller model"
        )
    return round(min(most, max(_LEAST_FRACTION, need.total_bytes * _MARGIN / free_bytes)), 3)


def count_parameters(folder: Path) -> int:
    """Numbers in the safetensors files of `folder`, read from their headers. EngineConfigError when there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise EngineConfigError(f"{folder}: no safetensors file; give a Hugging Face checkpoint folder")
    total = 0
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                total += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise EngineConfigError(f"{path} cannot be read ({error})") from error
    return total
