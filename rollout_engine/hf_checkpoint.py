"""Hugging Face folders without Transformers: config.json and safetensors, read by hand and one tensor at a time.

The only reader of policies: what the trainer loads, the engine loads too.
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

from draft_models.layers import rope_parameters

_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"


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
    rope = rope_parameters(config)
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
        rope_theta=rope.pop("rope_theta"),
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


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this model holds; a tied one has no lm_head of its own."""
    hidden, q_size, kv_size = config.hidden_size, config.q_size, config.kv_size
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_size, hidden),
        "self_attn.k_proj.weight": (kv_size, hidden),
        "self_attn.v_proj.weight": (kv_size, hidden),
        "self_attn.o_proj.weight": (hidden, q_size),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (config.intermediate_size, hidden),
        "mlp.up_proj.weight": (config.intermediate_size, hidden),
        "mlp.down_proj.weight": (hidden, config.intermediate_size),
    }
    if config.qk_norm:
        layer |= {f"self_attn.{name}_norm.weight": (config.head_dim,) for name in "qk"}
    if config.qkv_bias:
        layer |= {f"self_attn.{name}_proj.bias": layer[f"self_attn.{name}_proj.weight"][:1] for name in "qkv"}
    if config.o_bias:
        layer["self_attn.o_proj.bias"] = (hidden,)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder as a dictionary. Raises CheckpointError."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such folder; expected a Hugging Face checkpoint")
    return _read_json(directory / "config.json")


class CheckpointReader:
    """The tensors of a folder by name. Opening reads the files' headers; `read` maps in one tensor."""

    def __init__(self, directory: Path) -> None:
        """Raises CheckpointError when weights are missing or a file is corrupt."""
        self._directory = directory
        self._file_of: dict[str, tuple[Path, Any]] = {}
        for path in _weight_files(directory):
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: not a readable safetensors file ({error}); copy it again") from error
            self._file_of |= dict.fromkeys(file.keys(), (path, file))

    def read(self, name: str) -> torch.Tensor:
        """Raises CheckpointError when the folder lacks the tensor."""
        if name not in self._file_of:
            raise CheckpointError(f"{self._directory}: tensor {name} is missing from the checkpoint")
        tensor: torch.Tensor = self._file_of[name][1].get_tensor(name)
        return tensor

    def check(self, shapes: Mapping[str, tuple[int, ...]], ignored: frozenset[str] = frozenset()) -> None:
        """Raises CheckpointError unless the folder holds exactly these tensors.

        Names in `ignored`, and old Llama rotary buffers, may be present. Any other tensor would be left out of the
        computation without a word: a bias that config.json does not announce, for one.
        """
        for name, (path, file) in self._file_of.items():
            if name in shapes:
                found = file.get_slice(name).get_shape()
                if tuple(found) != shapes[name]:
                    raise CheckpointError(
                        f"{path}: tensor {name} has shape {found}, config.json asks for {list(shapes[name])}"
                    )
            elif name not in ignored and not name.endswith("rotary_emb.inv_freq"):
                raise CheckpointError(f"{path}: tensor {name} does not belong to the model that config.json describes")
        missing = sorted(shapes.keys() - self._file_of.keys())
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(f"{self._directory}: tensor {missing[0]}{more} is missing from the checkpoint")


def open_policy(directory: Path) -> CheckpointReader:
    """A reader of a folder whose tensors are those that its config.json describes. Raises CheckpointError."""
    config = decoder_config(read_config(directory), str(directory / "config.json"))
    reader = CheckpointReader(directory)
    reader.check(tensor_shapes(config), frozenset({"lm_head.weight"} if config.tied else ()))
    return reader


def load_tensors(directory: Path, destinations: Mapping[str, torch.Tensor], ignored: frozenset[str]) -> None:
    """Copy every tensor of the folder into the destination of its name, after a check of all of them.

    Raises CheckpointError for a missing or corrupt file and a missing, extra or wrong-shape tensor;
    names in `ignored`, and old Llama rotary buffers, may be present.
    """
    reader = CheckpointReader(directory)
    reader.check({name: tuple(tensor.shape) for name, tensor in destinations.items()}, ignored)
    for name, destination in destinations.items():
        destination.copy_(reader.read(name))


def _weight_files(directory: Path) -> list[Path]:
    index = directory / _INDEX_NAME
    if index.is_file():
        try:
            files = [directory / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
        except (LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not an index of safetensors files ({error!r})") from error
        for path in files:
            if not path.is_file():
                raise CheckpointError(f"{path}: missing, but listed in {_INDEX_NAME}; copy the checkpoint again")
        return files
    single = directory / _SINGLE_NAME
    if not single.is_file():
        raise CheckpointError(f"{directory}: neither {_SINGLE_NAME} nor {_INDEX_NAME}; save the model as safetensors")
    return [single]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; expected a Hugging Face checkpoint") from error
    except ValueError as error:  # not JSON, or not even text
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected a JSON object")
    return content
