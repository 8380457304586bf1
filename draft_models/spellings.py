"""The spellings in which EAGLE-3 drafts are published, as maps of names and settings. No file is touched here.

All three hold the same network and the same offsets `d2t` (target id - draft id). They differ in this:

| | sglang | specforge | speculators |
|---|---|---|---|
| architectures | LlamaForCausalLMEagle3 | the same | Eagle3Speculator, Eagle3DraftModel |
| sizes of the layer | top level | top level | `transformer_layer_config` |
| the layer's tensors | midlayer.* | midlayer.* | layers.0.* |
| d2t and t2d | only with a reduced vocabulary | always | only with a reduced vocabulary |
| `tie_word_embeddings` | false | often true, though the draft has a head of its own | false |
| captured layers | `eagle_config` | `eagle_config`, or absent: SGLang's default | top level |
| layer id k means | the OUTPUT of layer k | the same | the INPUT of layer k: one more |
| token embedding | absent: the target's | absent | often there: a copy of the target's |

Sources: SGLang 0.5.20 srt/models/llama_eagle3.py and srt/models/qwen3.py (`set_eagle3_layers_to_capture`); SpecForge
specforge/modeling/draft/llama3_eagle.py and configs/*-eagle3.json; speculators src/speculators/models/eagle3/config.py,
core.py and model.py (`DraftVocabMixin`); vLLM transformers_utils/configs/speculators/algos.py (`update_eagle3`) and
model_executor/models/llama.py, which appends `hidden_states + residual` BEFORE layer k for id k.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from draft_models.eagle3 import DraftError, Eagle3Config, default_aux_layer_ids

ARCHITECTURE = "LlamaForCausalLMEagle3"  # SGLang's and SpecForge's
_SPECULATORS_ARCHITECTURES = ("Eagle3Speculator", "Eagle3DraftModel")
_OURS, _THEIRS = "midlayer.", "layers.0."
_NOT_OF_THE_DRAFT = frozenset({"embed_tokens.weight", "verifier_norm.weight", "verifier_lm_head.weight"})
# Settings that change the computation; where all are false it is this project's network, and SGLang's default.
_PLAIN_SPECULATORS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "embed_requires_grad")


class Spelling(StrEnum):
    SGLANG = "sglang"
    SPECFORGE = "specforge"
    SPECULATORS = "speculators"


@dataclass(frozen=True, slots=True)
class SpelledDraft:
    """The two files of a draft: config.json and the tensors by name."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Target:
    """What a conversion may need to know of the target."""

    name: str  # folder or hub name
    config: Mapping[str, Any]  # its config.json


def spelling_of(config: Mapping[str, Any], names: Collection[str] = ()) -> Spelling | None:
    """Whose spelling a draft's files are; None when they are none of the three.

    SpecForge's differs from SGLang's in tensors only (`names`), and where it leaves out the captured layers.
    """
    architectures = config.get("architectures") or []
    if config.get("speculators_model_type") == "eagle3" or any(a in _SPECULATORS_ARCHITECTURES for a in architectures):
        return Spelling.SPECULATORS
    if ARCHITECTURE not in architectures:
        return None
    is_reduced = (config.get("draft_vocab_size") or config.get("vocab_size")) != config.get("vocab_size")
    has_surplus = "d2t" in names and not is_reduced
    is_theirs = has_surplus or config.get("tie_word_embeddings") or not _own_layer_ids(config)
    return Spelling.SPECFORGE if is_theirs else Spelling.SGLANG


def to_sglang(draft: SpelledDraft, target: Target) -> SpelledDraft:
    """The same draft as SGLang spells it. Raises DraftError for a network that is not this one, and for no spelling."""
    spelling = spelling_of(draft.config, draft.tensors)
    if spelling is None:
        raise DraftError(
            f"architectures {draft.config.get('architectures')} is no EAGLE-3 draft as {', '.join(Spelling)} spell it"
        )
    read = _read_speculators if spelling is Spelling.SPECULATORS else _read_specforge
    config, tensors = read(draft, target)
    if not config.is_reduced:
        tensors = _without_whole_vocabulary(tensors)
    elif "d2t" in tensors and "t2d" not in tensors:
        tensors |= {"t2d": _mask(tensors["d2t"], config.vocab_size)}
    dtype = _dtype_name(tensors)
    return SpelledDraft(config.to_hf() | {"dtype": dtype, "torch_dtype": dtype}, tensors)


def from_sglang(draft: SpelledDraft, spelling: Spelling, target: Target) -> SpelledDraft:
    """A draft in SGLang's spelling, as this project saves it, in another one."""
    if spelling is Spelling.SGLANG:
        return draft
    if spelling is Spelling.SPECFORGE:
        return SpelledDraft(draft.config, _with_vocabulary(draft))
    tensors = {_renamed(name, _OURS, _THEIRS): tensor for name, tensor in draft.tensors.items()}
    return SpelledDraft(_speculators_config(draft.config, target), tensors)


# ---------------------------------------------------------------- SpecForge (and SGLang, whose names it has)


def _read_specforge(draft: SpelledDraft, target: Target) -> tuple[Eagle3Config, dict[str, Tensor]]:
    raw = dict(draft.config)
    if not _own_layer_ids(raw):
        raw["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": list(_default_layers(target))}
    tensors = {name: tensor for name, tensor in draft.tensors.items() if name not in _NOT_OF_THE_DRAFT}
    return _sizes(raw), tensors


def _own_layer_ids(config: Mapping[str, Any]) -> list[int]:
    inner = config.get("eagle_config")
    ids = inner.get("eagle_aux_hidden_state_layer_ids") if isinstance(inner, Mapping) else inner
    return ids or []


def _default_layers(target: Target) -> tuple[int, int, int]:
    """Where both SGLang and vLLM capture when a draft does not say; below 7 layers their ids are not distinct."""
    num_layers = int(target.config["num_hidden_layers"])
    if num_layers < 7:
        raise DraftError(
            f"the draft does not name its captured layers (eagle_aux_hidden_state_layer_ids), and the engines' default "
            f"of a target of {num_layers} layers holds one layer twice: add them to its config.json"
        )
    return default_aux_layer_ids(num_layers)


def _with_vocabulary(draft: SpelledDraft) -> dict[str, Tensor]:
    size, target_size = int(draft.config["draft_vocab_size"]), int(draft.config["vocab_size"])
    if size != target_size:
        return dict(draft.tensors)
    offsets = torch.zeros(size, dtype=torch.int64)
    return {**draft.tensors, "d2t": offsets, "t2d": torch.ones(target_size, dtype=torch.bool)}


def _without_whole_vocabulary(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """SGLang's rejection sampling refuses a draft with d2t, even one that changes nothing."""
    offsets = tensors.pop("d2t", None)
    tensors.pop("t2d", None)
    if offsets is not None and bool(offsets.any()):
        raise DraftError("tensor d2t renames tokens, though draft_vocab_size says that the draft has all of them")
    return tensors


def _mask(offsets: Tensor, vocab_size: int) -> Tensor:
    ids = offsets + torch.arange(len(offsets))
    in_draft = torch.zeros(vocab_size, dtype=torch.bool)
    in_draft[ids[(ids >= 0) & (ids < vocab_size)]] = True  # ids beyond are named when the draft is loaded
    return in_draft


# ---------------------------------------------------------------- speculators


def _read_speculators(draft: SpelledDraft, target: Target) -> tuple[Eagle3Config, dict[str, Tensor]]:
    raw = draft.config
    if raw.get("norm_before_residual") is None:
        raise DraftError(
            "norm_before_residual is absent, which vLLM reads as true: only false, written out, is supported"
        )
    for key in _PLAIN_SPECULATORS:
        if raw.get(key):
            raise DraftError(f"{key} is {str(raw[key]).lower()}: only false is supported")
    layer = raw.get("transformer_layer_config") or {}
    if not isinstance(layer, Mapping):
        raise DraftError(f"transformer_layer_config is {layer!r}, expected the settings of a layer")
    if layer.get("model_type", "llama") != "llama":
        raise DraftError(f"transformer_layer_config.model_type is {layer['model_type']!r}: only 'llama' is supported")
    ids = raw.get("eagle_aux_hidden_state_layer_ids")
    if ids and (not isinstance(ids, list) or any(type(k) is not int for k in ids)):
        raise DraftError(
            f"eagle_aux_hidden_state_layer_ids is {ids!r}, expected three layers of the target, as [2, 4, 5]"
        )
    ids = [k - 1 for k in ids] if ids else list(_default_layers(target))
    if min(ids) < 0:
        raise DraftError("eagle_aux_hidden_state_layer_ids has 0, the token embedding, which SGLang cannot capture")
    flat = {key: value for key, value in raw.items() if key in ("draft_vocab_size", "target_hidden_size")}
    config = _sizes({**layer, **flat, "eagle_config": {"eagle_aux_hidden_state_layer_ids": ids}})
    tensors = {name: tensor for name, tensor in draft.tensors.items() if name not in _NOT_OF_THE_DRAFT}
    return config, {_renamed(name, _THEIRS, _OURS): tensor for name, tensor in tensors.items()}


def _speculators_config(config: Mapping[str, Any], target: Target) -> dict[str, Any]:
    outer = ("architectures", "draft_vocab_size", "target_hidden_size", "eagle_config", "dtype", "torch_dtype")
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": 3,
                    "accept_tolerance": 0.0,
                    "verifier_accept_k": 1,
                }
            ],
            "verifier": {"name_or_path": target.name, "architectures": target.config.get("architectures") or []},
        },
        "transformer_layer_config": {key: value for key, value in config.items() if key not in outer},
        "draft_vocab_size": config["draft_vocab_size"],
        "target_hidden_size": None,  # the draft's own
        "eagle_aux_hidden_state_layer_ids": [k + 1 for k in _own_layer_ids(config)],
        "norm_before_residual": False,  # written out, because vLLM takes its absence for true
        "tie_word_embeddings": False,
        "dtype": config["dtype"],
        "torch_dtype": config["torch_dtype"],
    }


def _sizes(raw: Mapping[str, Any]) -> Eagle3Config:
    for key in ("fc_norm", "norm_output", "norm_before_fc", "attention_bias", "use_aux_norm", "bias"):
        if raw.get(key):
            raise DraftError(f"{key} is {raw[key]}: only false is supported")
    if (raw.get("num_hidden_layers") or 1) != 1:
        raise DraftError(f"num_hidden_layers is {raw['num_hidden_layers']}: only 1 is supported")
    if (raw.get("target_hidden_size") or raw.get("hidden_size")) != raw.get("hidden_size"):
        raise DraftError(
            f"target_hidden_size is {raw.get('target_hidden_size')}, hidden_size {raw.get('hidden_size')}: a draft of "
            "another width than its target is not supported"
        )
    try:
        return Eagle3Config.from_hf(raw)
    except KeyError as error:
        raise DraftError(f"key {error} is missing") from None


def _renamed(name: str, before: str, after: str) -> str:
    return after + name.removeprefix(before) if name.startswith(before) else name


def _dtype_name(tensors: Mapping[str, Tensor]) -> str:
    if "fc.weight" not in tensors:
        raise DraftError("tensor fc.weight is missing")
    return str(tensors["fc.weight"].dtype).removeprefix("torch.")
