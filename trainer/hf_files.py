"""Hugging Face folders for the trainer: the engine's reader with the trainer's error, and the writer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rollout_engine import hf_checkpoint
from sync.atomic import whole_folder
from trainer.config import ConfigError

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".index.json", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


@contextmanager
def _as_config_error() -> Iterator[None]:
    try:
        yield
    except hf_checkpoint.CheckpointError as error:
        raise ConfigError(str(error)) from error


@_as_config_error()
def read_config(directory: Path) -> dict[str, Any]:
    """config.json as a dict. Raises ConfigError when it is missing or not JSON."""
    return hf_checkpoint.read_config(directory)


class HFWeights:
    """The tensors of a checkpoint folder by name, read one at a time, so that a rank holds only what it needs."""

    @_as_config_error()
    def __init__(self, directory: Path):
        """Raises ConfigError for a bad file, and for a missing, extra or misshapen tensor, on whatever rank it goes."""
        self._reader = hf_checkpoint.open_policy(directory)

    @_as_config_error()
    def __getitem__(self, name: str) -> torch.Tensor:
        """Raises ConfigError naming the tensor when the checkpoint lacks it."""
        return self._reader.read(name)


def write_checkpoint(directory: Path, tensors: Mapping[str, torch.Tensor], source: Path, dtype: str) -> None:
    """Writes a folder that `AutoModelForCausalLM` loads, whole or not at all; an existing one is replaced.

    Everything that is not a weight file (tokenizer, generation config, chat template) is copied from `source`;
    config.json takes `dtype`, because Transformers loads in the dtype that it names. Above 5 GB it is sharded.
    Raises OSError, and leaves no partial folder, when it cannot be written.
    """
    try:
        with whole_folder(directory) as aside:
            _fill(aside, tensors, source, dtype)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in its own type
        raise OSError(f"{directory}: the policy cannot be saved ({error})") from error


def _fill(directory: Path, tensors: Mapping[str, torch.Tensor], source: Path, dtype: str) -> None:
    from huggingface_hub import save_torch_state_dict  # only rank 0 needs it

    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(path, directory / path.name)
    config = {key: value for key, value in read_config(source).items() if key != "torch_dtype"}
    (directory / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")
    # copies, since safetensors refuses tensors that share memory, as views of Megatron's fused parameters do
    copies = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
    save_torch_state_dict(copies, directory, max_shard_size="5GB", metadata={"format": "pt"})
