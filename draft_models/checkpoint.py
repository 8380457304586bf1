"""The draft on disk, in the Hugging Face form (LlamaForCausalLMEagle3) that SGLang and vLLM load.

DIR/config.json and DIR/model.safetensors. A reduced vocabulary adds d2t (int64 offsets, target id - draft id) and t2d
(bool mask over the target's vocabulary); with the whole vocabulary both are left out, which SGLang's rejection
sampling asks for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from draft_models.eagle3 import DraftError, Eagle3, Eagle3Config, default_aux_layer_ids
from draft_models.spellings import ARCHITECTURE, Spelling, spelling_of

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
_OPTIONAL = frozenset({"embed_tokens.weight", "t2d"})  # the policy's embedding is used; t2d follows from d2t


def save_draft(draft: Eagle3, directory: Path) -> None:
    """Write the draft's two files into `directory`, which is made when it is missing. Raises OSError: a full disk.

    Files are written in place: give a folder that is renamed afterwards where a broken write must not be seen.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in draft.named_tensors().items()}
    try:
        save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    except SafetensorError as error:  # safetensors reports a full disk in its own type
        raise OSError(f"{directory}: the draft cannot be saved ({error})") from error
    dtype = str(draft.fc.weight.dtype).removeprefix("torch.")
    config = draft.config.to_hf() | {"dtype": dtype, "torch_dtype": dtype}
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_draft(directory: Path, target_config: Mapping[str, Any] | None = None) -> Eagle3:
    """The draft in `directory`, in the dtype of its file, on the CPU.

    Every tensor's name, shape and type is checked, and with `target_config` (the target's config.json) also that draft
    and target fit. Raises DraftError: which file, which tensor or size, what was expected and what was found.
    """
    config = _config_of(_read_json(directory / CONFIG_NAME), directory, target_config)
    return _draft_of(config, _read_tensors(directory / WEIGHTS_NAME, config), directory / WEIGHTS_NAME)


def make_draft(
    config_json: Any, tensors: Mapping[str, Tensor], directory: Path, target_config: Mapping[str, Any] | None = None
) -> Eagle3:
    """The same of two files that are in memory; errors name those of `directory`, where they came from."""
    config, path = _config_of(config_json, directory, target_config), directory / WEIGHTS_NAME
    _check_names(path, tensors.keys(), config)
    return _draft_of(config, tensors, path)


def _draft_of(config: Eagle3Config, tensors: Mapping[str, Tensor], path: Path) -> Eagle3:
    expected = config.tensor_shapes()
    for name in expected.keys() & tensors.keys():
        _check_tensor(path, name, tensors[name], expected[name], tensors["fc.weight"].dtype)
    target_ids = None
    if config.is_reduced:
        target_ids = tensors["d2t"] + torch.arange(config.draft_vocab_size)
        _check_target_ids(target_ids, config, path)
    draft = Eagle3(config, target_ids=target_ids).to(tensors["fc.weight"].dtype)
    with torch.no_grad():
        for name, weight in draft.named_parameters():
            weight.copy_(tensors[name])
    return draft


def check_fit(config: Eagle3Config, target_config: Mapping[str, Any], directory: Path) -> None:
    """Raises DraftError naming the first size in which a draft and its target differ."""
    num_layers = int(target_config["num_hidden_layers"])
    for key, found in (("hidden_size", config.hidden_size), ("vocab_size", config.vocab_size)):
        if found != int(target_config[key]):
            raise DraftError(
                f"{directory / CONFIG_NAME}: {key} is {found}, the target has {target_config[key]}; "
                "this draft was made for another target"
            )
    context, target_context = config.max_position_embeddings, int(target_config["max_position_embeddings"])
    if context < target_context:
        raise DraftError(
            f"{directory / CONFIG_NAME}: max_position_embeddings is {context}, the target has {target_context}; "
            "SGLang refuses such a draft: raise the value there"
        )
    if max(config.aux_layer_ids) > num_layers - 2 or min(config.aux_layer_ids) < 0:
        raise DraftError(
            f"{directory / CONFIG_NAME}: eagle_aux_hidden_state_layer_ids are {list(config.aux_layer_ids)}, "
            f"the target has layers 0 to {num_layers - 1}, of which SGLang cannot capture the last"
        )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise DraftError(f"{path}: no such file; expected the config.json of an EAGLE-3 draft") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DraftError(f"{path}: cannot be read as JSON: {error}") from None


def _config_of(raw: Any, directory: Path, target_config: Mapping[str, Any] | None) -> Eagle3Config:
    path = directory / CONFIG_NAME
    if isinstance(raw, dict) and spelling_of(raw) is Spelling.SPECULATORS:
        raise _other_spelling(path, Spelling.SPECULATORS)
    if not isinstance(raw, dict) or ARCHITECTURE not in (raw.get("architectures") or []):
        found = raw.get("architectures") if isinstance(raw, dict) else type(raw).__name__
        raise DraftError(f"{path}: expected architectures [{ARCHITECTURE!r}], found {found}")
    if raw.get("tie_word_embeddings"):  # SGLang would draft with the target's embedding instead of the draft's own head
        raise _other_spelling(path, Spelling.SPECFORGE)
    for key, plain in (("num_hidden_layers", 1), ("norm_output", False), ("fc_norm", False), ("attention_bias", False)):
        if (raw.get(key) or plain) != plain:
            raise DraftError(f"{path}: {key} is {raw[key]}, only {plain} is supported")
    if target_config is not None and not raw.get("eagle_config"):
        # Older drafts leave the layers to SGLang's default, which depends on the target.
        ids = default_aux_layer_ids(int(target_config["num_hidden_layers"]))
        raw = raw | {"eagle_config": {"eagle_aux_hidden_state_layer_ids": ids}}
    try:
        config = Eagle3Config.from_hf(raw)
    except KeyError as error:
        raise DraftError(f"{path}: key {error} is missing") from None
    except DraftError as error:
        raise DraftError(f"{path}: {error}") from None
    if (raw.get("target_hidden_size") or config.hidden_size) != config.hidden_size:
        raise DraftError(
            f"{path}: target_hidden_size is {raw['target_hidden_size']}, hidden_size {config.hidden_size}; "
            "a draft of another width than its target is not supported"
        )
    if target_config is not None:
        check_fit(config, target_config, directory)
    return config


def _read_tensors(path: Path, config: Eagle3Config) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            _check_names(path, names, config)
            return {name: file.get_tensor(name) for name in config.tensor_shapes() if name in names}
    except FileNotFoundError:
        raise DraftError(f"{path}: no such file; expected the draft's weights") from None
    except (OSError, SafetensorError) as error:
        raise DraftError(f"{path}: cannot be read as safetensors: {error}") from None


def _check_names(path: Path, names: Set[str], config: Eagle3Config) -> None:
    expected = config.tensor_shapes()
    missing, extra = sorted(expected.keys() - names - _OPTIONAL), sorted(names - expected.keys() - _OPTIONAL)
    if "d2t" in extra:
        raise _other_spelling(path, Spelling.SPECFORGE)
    if missing:
        raise DraftError(f"{path}: tensor {missing[0]} is missing (expected shape {expected[missing[0]]})")
    if extra:
        raise DraftError(f"{path}: tensor {extra[0]} does not belong to an EAGLE-3 draft of this config.json")


def _other_spelling(path: Path, spelling: Spelling) -> DraftError:
    return DraftError(
        f"{path}: a draft in the spelling of {spelling}; convert it into SGLang's: "
        f"slipstream finetune-draft --import {path.parent} --target HF_DIR --out NEW_DIR"
    )


def _check_tensor(path: Path, name: str, tensor: Tensor, shape: tuple[int, ...], weight_dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape:
        raise DraftError(f"{path}: tensor {name} has shape {tuple(tensor.shape)}, expected {shape} by its config.json")
    dtype = {"d2t": torch.int64, "t2d": torch.bool}.get(name, weight_dtype)
    if tensor.dtype != dtype or not (dtype.is_floating_point or name in ("d2t", "t2d")):
        raise DraftError(f"{path}: tensor {name} has type {tensor.dtype}, expected {dtype}")
    if dtype.is_floating_point and not bool(tensor.isfinite().all()):
        raise DraftError(f"{path}: tensor {name} holds values that are not finite; take another copy of the draft")


def _check_target_ids(target_ids: Tensor, config: Eagle3Config, path: Path) -> None:
    ascending = bool((target_ids[1:] > target_ids[:-1]).all())
    if not ascending or int(target_ids[0]) < 0 or int(target_ids[-1]) >= config.vocab_size:
        raise DraftError(
            f"{path}: tensor d2t does not hold offsets (target id - draft id) of ascending target ids "
            f"below {config.vocab_size}"
        )
