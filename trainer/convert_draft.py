"""Draft folders of any published spelling, read into the one network and written back: `--import` and `--export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from draft_models.checkpoint import CONFIG_NAME, WEIGHTS_NAME, make_draft, save_draft
from draft_models.eagle3 import DraftError, Eagle3
from draft_models.spellings import SpelledDraft, Spelling, Target, from_sglang, to_sglang
from draft_models.vllm_names import check_vllm
from trainer.config import ConfigError


def read_any_draft(folder: Path, target: Target) -> Eagle3:
    """The draft in `folder`, whichever of the spellings it has. ConfigError naming file, tensor or setting."""
    spelled = _read(folder)
    try:
        ours = to_sglang(spelled, target)
    except DraftError as error:
        raise ConfigError(f"{folder}: {error}") from error
    try:
        return make_draft(ours.config, ours.tensors, folder, target.config)
    except DraftError as error:
        raise ConfigError(str(error)) from error


def save_draft_as(draft: Eagle3, folder: Path, spelling: Spelling, target: Target) -> None:
    """Write the draft's two files into `folder`, as `draft_models.checkpoint.save_draft` does. Raises OSError.

    For speculators, which vLLM loads, DraftError when a tensor has no place there.
    """
    if spelling is Spelling.SGLANG:
        save_draft(draft, folder)
        return
    theirs = from_sglang(_as_sglang(draft), spelling, target)
    if spelling is Spelling.SPECULATORS:
        check_vllm(draft.config, {name: tuple(tensor.shape) for name, tensor in theirs.tensors.items()})
    folder.mkdir(parents=True, exist_ok=True)
    _write(theirs, folder)


def vllm_verdict(draft: Eagle3, spelling: Spelling) -> str:
    """One sentence for the user: whether vLLM's loader would take the draft's tensors as they are spelt."""
    try:
        check_vllm(draft.config, {name: tuple(tensor.shape) for name, tensor in draft.named_tensors().items()})
    except DraftError as error:
        return f"vLLM would not load it: {error}"
    checked = "names and shapes fit vLLM's EAGLE-3 loader (checked, not run)"
    if spelling is Spelling.SPECULATORS:
        return checked
    return f"{checked}, its layer ids do not, which vLLM counts by inputs: for vLLM --export speculators"


def _as_sglang(draft: Eagle3) -> SpelledDraft:
    dtype = str(draft.fc.weight.dtype).removeprefix("torch.")
    return SpelledDraft(draft.config.to_hf() | {"dtype": dtype, "torch_dtype": dtype}, draft.named_tensors())


def _read(folder: Path) -> SpelledDraft:
    config, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    try:
        raw: Any = json.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{config}: {error.strerror}; expected the config.json of an EAGLE-3 draft") from None
    except ValueError as error:
        raise ConfigError(f"{config}: cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{config}: expected a JSON object, found {type(raw).__name__}")
    try:
        with safe_open(weights, framework="pt") as file:
            return SpelledDraft(raw, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except FileNotFoundError:
        raise ConfigError(f"{weights}: no such file; a draft's weights in one safetensors file are expected") from None
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{weights}: cannot be read as safetensors: {error}") from None


def _write(draft: SpelledDraft, folder: Path) -> None:
    tensors = {name: tensor.cpu().contiguous() for name, tensor in draft.tensors.items()}
    try:
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    except SafetensorError as error:  # safetensors reports a full disk in its own type
        raise OSError(f"{folder}: the draft cannot be saved ({error})") from error
    (folder / CONFIG_NAME).write_text(json.dumps(dict(draft.config), indent=2) + "\n", encoding="utf-8")
