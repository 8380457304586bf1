"""Hugging Face folders without Transformers: config.json and safetensors, read by hand.

`CheckpointError` is one line: which file or tensor, what was expected, how to mend it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be served."""


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """What the compact decoder needs to know of a dense Qwen3, Qwen2 or Llama model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_eps: float
    tied: bool
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


_ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM")


def decoder_config(config: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """From a Hugging Face config dictionary, of Transformers 4 or 5. Raises CheckpointError naming the key."""
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in _ARCHITECTURES:
        raise CheckpointError(
            f"{where}: architecture {architecture} is not supported; known: {', '.join(_ARCHITECTURES)}"
        )
    _refuse_unsupported(config, where)
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    attention_bias = bool(config.get("attention_bias", False))

    def size(key: str) -> int:
        if config.get(key) is None:
            raise CheckpointError(f"{where}: key {key} is missing")
        return int(config[key])

    heads = size("num_attention_heads")
    return DecoderConfig(
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or size("hidden_size") // heads,
        max_positions=size("max_position_embeddings"),
        rms_eps=float(config.get("rms_norm_eps", 1e-6)),
        tied=bool(config.get("tie_word_embeddings", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        qkv_bias=architecture == "Qwen2ForCausalLM" or attention_bias,
        o_bias=architecture != "Qwen2ForCausalLM" and attention_bias,
        rope_theta=float(rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0),
        rope_scaling=rope,
    )


def _refuse_unsupported(config: Mapping[str, Any], where: str) -> None:
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise CheckpointError(f"{where}: sliding-window attention is not supported; set use_sliding_window to false")
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{where}: hidden_act {config['hidden_act']!r} is not supported, only 'silu'")
    if config.get("mlp_bias"):
        raise CheckpointError(f"{where}: mlp_bias is not supported")
    if config.get("quantization_config"):
        raise CheckpointError(f"{where}: quantized checkpoints are not supported; save the model unquantized")


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder as a dictionary. Raises CheckpointError."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such folder; expected a Hugging Face checkpoint")
    return _read_json(directory / "config.json")


def load_tensors(directory: Path, destinations: Mapping[str, torch.Tensor], ignored: frozenset[str]) -> None:
    """Copy every tensor of the folder into the destination of its name.

    Raises CheckpointError for a missing or corrupt file and a missing, extra or wrong-shape tensor;
    names in `ignored`, and old Llama rotary buffers, may be present.
    """
    found: set[str] = set()
    for path in _files(directory):
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, but listed in {INDEX_NAME}; copy the checkpoint again")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dictionary)
                    if name not in ignored and not name.endswith("rotary_emb.inv_freq"):
                        _copy(name, file.get_tensor(name), destinations, path)
                        found.add(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error}); copy it again") from error
    missing = sorted(destinations.keys() - found)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{directory}: tensor {missing[0]}{more} is missing from the checkpoint")


def _copy(name: str, source: torch.Tensor, destinations: Mapping[str, torch.Tensor], path: Path) -> None:
    destination = destinations.get(name)
    if destination is None:
        raise CheckpointError(f"{path}: tensor {name} does not belong to the model that config.json describes")
    if source.shape != destination.shape:
        raise CheckpointError(
            f"{path}: tensor {name} has shape {list(source.shape)}, config.json asks for {list(destination.shape)}"
        )
    destination.copy_(source)


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX_NAME
    if index.is_file():
        return [directory / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    single = directory / SINGLE_NAME
    if not single.is_file():
        raise CheckpointError(f"{directory}: neither {SINGLE_NAME} nor {INDEX_NAME}; save the model as safetensors")
    return [single]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; expected a Hugging Face checkpoint") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
