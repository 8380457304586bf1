"""How much memory an engine needs. Pure functions of sizes; one that reads them off a checkpoint's headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rollout_engine.types import EngineConfigError

_GIB = 1024**3
_MARGIN = 1.1  # allocator rounding and what is not counted: rope tables, block tables
_LEAST_FRACTION = 0.1
_STATIC_SHARE = 0.85  # of the free memory, at most, for weights and KV: the server's context and graphs need the rest
_TRAINER_SHARE = 0.5  # at most, for an engine that keeps its memory while the policy trains: activations need as much


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


@dataclass(frozen=True, slots=True)
class TrainerNeed:
    """Memory of the engine's GPU that a trainer takes only after the engine has taken its own."""

    policy_bytes: int = 0  # Adam, from the first update on
    draft_bytes: int = 0  # gradients and Adam, likewise
    sync_bytes: int = 0
    capture_bytes: int = 0  # during an update alone

    def beside_engine_bytes(self, *, offload: bool) -> int:
        """At the worst moment that the engine's KV is there too; with `offload` it is not there during updates."""
        lasting = self.policy_bytes + self.draft_bytes + self.sync_bytes
        return lasting if offload else lasting + self.capture_bytes

    def __str__(self) -> str:
        return (
            f"Adam of the policy {gib(self.policy_bytes)}, gradients and Adam of the draft {gib(self.draft_bytes)}, "
            f"a sync {gib(self.sync_bytes)}, captured states {gib(self.capture_bytes)}"
        )


def trainer_needed(
    *,
    policy_params: int,
    adam_params: int,
    draft_params: int,
    trains_draft: bool,
    itemsize: int,
    gathers: bool,
    capture_bytes: int,
) -> TrainerNeed:
    """What will come. Weights, gradients and float32 master copies of the policy and weights of the draft are there
    before an engine starts.

    Adam keeps two float32 moments, 8 bytes, of each of the `adam_params` that this rank steps. The draft's gradients
    are float32, 4 bytes more. A sync holds at `itemsize` bytes a number the buckets of both models, which stay, and
    where it `gathers` the policy from several ranks a whole copy of it. `capture_bytes` are those of the draft's data.
    """
    return TrainerNeed(
        policy_bytes=8 * adam_params,
        draft_bytes=12 * draft_params if trains_draft else 0,
        sync_bytes=itemsize * (policy_params + draft_params + (policy_params if gathers else 0)),
        capture_bytes=capture_bytes,
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


def most_share(free_bytes: int, trainer: TrainerNeed | None, *, offload: bool) -> float:
    """The largest share of the free memory that weights and KV may have, beside a trainer that is yet to grow."""
    if trainer is None:
        return _STATIC_SHARE
    left = max(0.0, _STATIC_SHARE - trainer.beside_engine_bytes(offload=offload) / free_bytes)
    return left if offload else min(_TRAINER_SHARE, left)


class NoRoom(EngineConfigError):
    """A GPU too small, or a share of it."""


def static_fraction(
    need: MemoryNeed,
    free_bytes: int,
    most: float,
    trainer: TrainerNeed | None = None,
    *,
    offload: bool = False,
    is_given: bool = False,
) -> float:
    """The share of the free memory for weights and KV: what all slots need, and no more than `most`.

    `most` is the user's own word where it `is_given`, `most_share` otherwise. Raises NoRoom, with what to
    change, when it does not hold the weights and one request.
    """
    least = need.least_bytes * _MARGIN / free_bytes
    if least > most:
        what, advice = "the GPU is too small", ""
        own = most_share(free_bytes, trainer, offload=offload) if is_given else most
        if own > most:
            what = f"rollout.sglang.mem_fraction_static = {most} is too small"
            advice = f"raise it to at least {ceil(1000 * least) / 1000}, or leave it out"
        if own < least:
            ways = _ways_to_fit(need, free_bytes, max(most, own), trainer, offload=offload)
            # Offload and the like change what we would give, not what the user has said.
            advice = ("leave it out, and " if is_given else "") + ", or ".join(ways)
        beside = "" if trainer is None else f", and the trainer will take {trainer}"
        raise NoRoom(
            f"{what}: {gib(free_bytes)} are free, of which the engine may take {most:.0%} "
            f"(rollout.sglang.mem_fraction_static); it needs {need}, at the least {gib(need.least_bytes * _MARGIN)} "
            f"for the models, one request and a margin{beside}; {advice}"
        )
    return round(min(most, max(_LEAST_FRACTION, need.total_bytes * _MARGIN / free_bytes)), 3)


def _ways_to_fit(
    need: MemoryNeed, free_bytes: int, most: float, trainer: TrainerNeed | None, *, offload: bool
) -> list[str]:
    """What to change, each enough by itself, so that `most` of the free memory holds the weights and one request."""
    least = need.least_bytes * _MARGIN / free_bytes
    ways = []
    if trainer is not None:
        if not offload and least <= most_share(free_bytes, trainer, offload=True):
            ways.append("set rollout.offload = true")
        if least <= most_share(free_bytes, replace(trainer, capture_bytes=0), offload=offload):
            ways.append("lower draft.capture_max_bytes")
        if least <= most_share(free_bytes, replace(trainer, policy_bytes=0), offload=offload):
            ways.append(
                "spread Adam over more GPUs (policy.use_distributed_optimizer = true, or a larger "
                "policy.tensor_model_parallel_size)"
            )
    left_bytes = free_bytes * most / _MARGIN - need.policy_bytes - need.draft_bytes
    if (num_tokens := int(left_bytes // need.kv_bytes_per_token)) > 0:
        ways.append(f"lower rollout.context_length to {num_tokens} or less")
    return [*ways, "take a smaller model or a GPU with more free memory"]


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
