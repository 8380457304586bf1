"""A draft survives the disk bit for bit, in the form that SGLang loads; what does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from draft_models import checkpoint
from draft_models.checkpoint import load_draft, save_draft
from draft_models.eagle3 import DraftError
from tests.draft_helpers import TARGET_CONFIG, small_draft


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("draft_vocab_size", [0, 11])
def test_round_trip_is_bitwise(tmp_path: Path, dtype: torch.dtype, draft_vocab_size: int) -> None:
    draft = small_draft(draft_vocab_size=draft_vocab_size).to(dtype)
    save_draft(draft, tmp_path / "draft")
    back = load_draft(tmp_path / "draft", TARGET_CONFIG)
    assert back.config == draft.config
    expected, found = draft.named_tensors(), back.named_tensors()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_files_are_what_sglang_reads(tmp_path: Path) -> None:
    draft = small_draft(draft_vocab_size=11)
    save_draft(draft, tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"] is False
    assert config["draft_vocab_size"] == 11
    assert config["target_hidden_size"] == config["hidden_size"] == 32
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["eagle_config"] == {
        "use_aux_hidden_state": True,
        "eagle_aux_hidden_state_layer_ids": [1, 3, 4],
    }
    tensors = load_file(tmp_path / "draft" / "model.safetensors")
    assert tensors["fc.weight"].shape == (32, 96)
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (32, 64)
    assert tensors["lm_head.weight"].shape == (11, 32)
    assert tensors["d2t"].dtype == torch.int64
    # SGLang adds arange to the offsets; t2d marks the same tokens.
    assert torch.equal(tensors["d2t"] + torch.arange(11), tensors["t2d"].nonzero()[:, 0])


def test_old_spelling_of_rope_is_read(tmp_path: Path) -> None:
    save_draft(small_draft(), tmp_path / "draft")
    path = tmp_path / "draft" / "config.json"
    raw = json.loads(path.read_text())
    del raw["rope_parameters"]
    raw["rope_theta"] = 5e5
    path.write_text(json.dumps(raw))
    assert load_draft(tmp_path / "draft").config.rope["rope_theta"] == 5e5


def test_a_draft_without_layer_ids_gets_the_default_of_sglang(tmp_path: Path) -> None:
    save_draft(small_draft(), tmp_path / "draft")
    edit_config(tmp_path / "draft", eagle_config=None)
    assert load_draft(tmp_path / "draft", TARGET_CONFIG).config.aux_layer_ids == (1, 3, 4)
    with pytest.raises(DraftError, match="eagle_aux_hidden_state_layer_ids' is missing"):
        load_draft(tmp_path / "draft")


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def set_to(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda directory: edit_tensors(directory, lambda tensors: tensors.update({name: tensor}))


def cut_file(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: no such file"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors: no such file"),
    "not json": (lambda d: (d / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
    "cut file": (cut_file, "model.safetensors: cannot be read as safetensors"),
    "other class": (
        lambda d: edit_config(d, architectures=["Qwen3ForCausalLM"]),
        r"expected architectures \['LlamaForCausalLMEagle3'\], found \['Qwen3ForCausalLM'\]",
    ),
    "other output": (lambda d: edit_config(d, norm_output=True), "norm_output is True, only False"),
    "no ids": (lambda d: edit_config(d, eagle_config={"x": 1}), "eagle_aux_hidden_state_layer_ids' is missing"),
    "other target": (lambda d: edit_config(d, vocab_size=41), "vocab_size is 41, the target has 40"),
    "short context": (lambda d: edit_config(d, max_position_embeddings=63), "is 63, the target has 64"),
    "deep layers": (
        lambda d: edit_config(d, eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 3, 9]}),
        "the target has layers 0 to 7",
    ),
    "layers as text": (
        lambda d: edit_config(d, eagle_config={"eagle_aux_hidden_state_layer_ids": "abc"}),
        "eagle_aux_hidden_state_layer_ids is 'abc', expected three ascending layers",
    ),
    "bare layers": (
        lambda d: edit_config(d, eagle_config=[1, 3]),
        r"layer_ids is \[1, 3\], expected three ascending layers",
    ),
    "size as text": (lambda d: edit_config(d, num_attention_heads="six"), "heads is 'six', expected a whole number"),
    "negative size": (lambda d: edit_config(d, intermediate_size=-3), "size is -3, expected a whole number above 0"),
    "not finite": (set_to("norm.weight", torch.full((32,), torch.nan)), "norm.weight holds values that are not finite"),
    "missing tensor": (lambda d: edit_tensors(d, lambda t: t.pop("fc.weight")), "tensor fc.weight is missing"),
    "extra tensor": (set_to("layers.0.x", torch.zeros(1)), "tensor layers.0.x does not belong"),
    "wrong shape": (set_to("norm.weight", torch.zeros(5)), r"norm.weight has shape \(5,\), expected \(32,\)"),
    "wrong type": (set_to("norm.weight", torch.zeros(32, dtype=torch.int64)), "norm.weight has type torch.int64"),
    "absolute d2t": (set_to("d2t", torch.arange(11) + 35), "tensor d2t does not hold offsets"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_draft_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    save_draft(small_draft(draft_vocab_size=11), tmp_path / "draft")
    fault, message = FAULTS[name]
    fault(tmp_path / "draft")
    with pytest.raises(DraftError, match=message) as caught:
        load_draft(tmp_path / "draft", TARGET_CONFIG)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_save_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full_disk)
        with pytest.raises(OSError, match=r"draft: the draft cannot be saved \(No space left"):
            save_draft(small_draft(), tmp_path / "draft")
    save_draft(small_draft(), tmp_path / "draft")
    assert torch.equal(load_draft(tmp_path / "draft").fc.weight, small_draft().fc.weight)
