"""Reads and writes the weights of a Hugging Face checkpoint folder (safetensors, single or sharded)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trainer.config import ConfigError

_INDEX = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".index.json", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as a dict. Raises ConfigError when it is missing or not JSON."""
    path = directory / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found; give a Hugging Face checkpoint folder") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None


class HFWeights:
    """The tensors of a checkpoint folder by name, read one at a time, so that a rank holds only what it needs."""

    def __init__(self, directory: Path):
        """Raises ConfigError when there are no safetensors files or one is missing or corrupt."""
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for path in _weight_files(directory):
            try:
                handle = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{path}: cannot be read as safetensors ({error})") from None
            self._open[path] = handle
            self._file_of |= dict.fromkeys(handle.keys(), path)
        self._directory = directory

    def __getitem__(self, name: str) -> torch.Tensor:
        """Raises ConfigError naming the tensor when the checkpoint lacks it."""
        if name not in self._file_of:
            raise ConfigError(f"{self._directory}: tensor {name} is missing; the weights do not fit config.json")
        return self._open[self._file_of[name]].get_tensor(name)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if index.exists():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{index}: not an index of safetensors files ({error!r})") from None
        return [directory / name for name in sorted(names)]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{directory}: no .safetensors weights found; save the checkpoint as safetensors")
    return files


def write_checkpoint(directory: Path, tensors: Mapping[str, torch.Tensor], source: Path, dtype: str) -> None:
    """Writes a folder that `AutoModelForCausalLM` loads, aside and then renamed; an existing one is replaced.

    Everything that is not a weight file (tokenizer, generation config, chat template) is copied from `source`;
    config.json takes `dtype`, because Transformers loads in the dtype that it names. Above 5 GB it is sharded.
    Raises OSError, and leaves no partial folder, when it cannot be written.
    """
    aside = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _fill(aside, tensors, source, dtype)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in its own type
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"{directory}: the policy cannot be saved ({error})") from error
    _replace(aside, directory)


def _fill(directory: Path, tensors: Mapping[str, torch.Tensor], source: Path, dtype: str) -> None:
    from huggingface_hub import save_torch_state_dict  # only rank 0 needs it

    directory.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(path, directory / path.name)
    config = {key: value for key, value in read_config(source).items() if key != "torch_dtype"}
    (directory / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")
    # copies, since safetensors refuses tensors that share memory, as views of Megatron's fused parameters do
    copies = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
    save_torch_state_dict(copies, directory, max_shard_size="5GB", metadata={"format": "pt"})


def _replace(aside: Path, directory: Path) -> None:
    """Puts `aside` where `directory` is; os.replace cannot overwrite a folder that has files."""
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    if directory.exists():
        os.replace(directory, old)
    os.replace(aside, directory)
    shutil.rmtree(old, ignore_errors=True)
