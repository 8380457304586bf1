"""Published spellings of one draft: there and back bit for bit; vLLM has a place for every tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from draft_models.checkpoint import load_draft, save_draft
from draft_models.eagle3 import DraftError, Eagle3
from draft_models.spellings import SpelledDraft, Spelling, Target, from_sglang, spelling_of, to_sglang
from draft_models.vllm_names import check_vllm, vllm_parameters
from tests.draft_helpers import TARGET_CONFIG, small_draft
from trainer.convert_draft import vllm_verdict

TARGET = Target("org/policy", TARGET_CONFIG | {"architectures": ["Qwen3ForCausalLM"]})
SIZES = [0, 11]


def spelled(draft: Eagle3) -> SpelledDraft:
    dtype = {"dtype": "float32", "torch_dtype": "float32"}
    return SpelledDraft(draft.config.to_hf() | dtype, draft.named_tensors())


def assert_same(a: SpelledDraft, b: SpelledDraft) -> None:
    assert a.config == b.config
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert tensor.dtype == b.tensors[name].dtype and torch.equal(tensor, b.tensors[name]), name


@pytest.mark.parametrize("draft_vocab_size", SIZES)
@pytest.mark.parametrize("spelling", Spelling)
def test_there_and_back_is_bitwise(spelling: Spelling, draft_vocab_size: int) -> None:
    ours = spelled(small_draft(draft_vocab_size=draft_vocab_size))
    theirs = from_sglang(ours, spelling, TARGET)
    assert_same(to_sglang(theirs, TARGET), ours)
    assert_same(from_sglang(to_sglang(theirs, TARGET), spelling, TARGET), theirs)


@pytest.mark.parametrize("draft_vocab_size", SIZES)
def test_spellings_are_told_apart(draft_vocab_size: int) -> None:
    ours = spelled(small_draft(draft_vocab_size=draft_vocab_size))
    for spelling in Spelling:
        theirs = from_sglang(ours, spelling, TARGET)
        # with a reduced vocabulary SpecForge's files are SGLang's
        same = spelling is Spelling.SPECFORGE and draft_vocab_size
        assert spelling_of(theirs.config, theirs.tensors) is (Spelling.SGLANG if same else spelling)
    assert spelling_of({"architectures": ["Qwen3ForCausalLM"]}) is None


def test_speculators_counts_layers_by_their_input() -> None:
    """vLLM takes `hidden + residual` before layer k; SGLang the output of layer k."""
    ours = spelled(small_draft())
    theirs = from_sglang(ours, Spelling.SPECULATORS, TARGET)
    assert ours.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
    assert theirs.config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert theirs.config["norm_before_residual"] is False
    assert theirs.config["speculators_config"]["verifier"]["name_or_path"] == "org/policy"
    assert theirs.config["transformer_layer_config"]["hidden_size"] == 32
    assert "layers.0.hidden_norm.weight" in theirs.tensors and "lm_head.weight" in theirs.tensors


def test_what_others_add_is_left_behind() -> None:
    ours = spelled(small_draft(draft_vocab_size=11))
    theirs = from_sglang(ours, Spelling.SPECULATORS, TARGET)
    surplus = {"embed_tokens.weight": torch.zeros(40, 32), "verifier_norm.weight": torch.ones(32)}
    assert_same(to_sglang(SpelledDraft(theirs.config, {**theirs.tensors, **surplus}), TARGET), ours)
    without_mask = {name: tensor for name, tensor in ours.tensors.items() if name != "t2d"}
    assert_same(to_sglang(SpelledDraft(ours.config, without_mask), TARGET), ours)


def test_specforge_without_layers_captures_where_the_engines_do() -> None:
    ours = spelled(small_draft())
    raw = {key: value for key, value in ours.config.items() if key not in ("eagle_config", "target_hidden_size")}
    assert_same(to_sglang(SpelledDraft(raw | {"tie_word_embeddings": True}, ours.tensors), TARGET), ours)
    shallow = Target("p", TARGET_CONFIG | {"num_hidden_layers": 6})
    with pytest.raises(DraftError, match="does not name its captured layers"):
        to_sglang(SpelledDraft(raw, ours.tensors), shallow)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "residual": ({"norm_before_residual": True}, "norm_before_residual is true: only false is supported"),
    "unsaid": ({"norm_before_residual": None}, "norm_before_residual is absent, which vLLM reads as true"),
    "fc norm": ({"norm_before_fc": True}, "norm_before_fc is true"),
    "embedding": ({"embed_requires_grad": True}, "embed_requires_grad is true"),
    "embedding layer": ({"eagle_aux_hidden_state_layer_ids": [0, 4, 5]}, "has 0, the token embedding"),
    "qwen layer": ({"transformer_layer_config": {"model_type": "qwen3"}}, "only 'llama' is supported"),
    "layers as text": ({"eagle_aux_hidden_state_layer_ids": "abc"}, "layer_ids is 'abc', expected three layers"),
    "layers in another order": ({"eagle_aux_hidden_state_layer_ids": [5, 2, 4]}, "expected three ascending layers"),
    "half a layer": ({"eagle_aux_hidden_state_layer_ids": [1, 2.5, 3]}, "expected three layers of the target"),
    "no settings of a layer": ({"transformer_layer_config": [1]}, r"transformer_layer_config is \[1\], expected"),
    "a size as text": ({"draft_vocab_size": "all"}, "draft_vocab_size is 'all', expected a whole number"),
    "no sizes": ({"transformer_layer_config": {"hidden_size": 8}}, "is missing"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_another_network_is_refused(name: str) -> None:
    change, message = FAULTS[name]
    theirs = from_sglang(spelled(small_draft()), Spelling.SPECULATORS, TARGET)
    with pytest.raises(DraftError, match=message):
        to_sglang(SpelledDraft({**theirs.config, **change}, theirs.tensors), TARGET)


def test_a_renaming_d2t_over_the_whole_vocabulary_is_refused() -> None:
    theirs = from_sglang(spelled(small_draft()), Spelling.SPECFORGE, TARGET)
    renaming = {**theirs.tensors, "d2t": torch.ones(40, dtype=torch.int64)}
    with pytest.raises(DraftError, match="d2t renames tokens"):
        to_sglang(SpelledDraft(theirs.config, renaming), TARGET)


@pytest.mark.parametrize("spelling", [Spelling.SPECFORGE, Spelling.SPECULATORS])
def test_a_draft_of_another_spelling_names_it_and_the_flag(tmp_path: Path, spelling: Spelling) -> None:
    theirs = from_sglang(spelled(small_draft()), spelling, TARGET)
    (tmp_path / "config.json").write_text(json.dumps(theirs.config))
    save_file({name: tensor.clone() for name, tensor in theirs.tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(
        DraftError, match=f"in the spelling of {spelling}; .*finetune-draft --import {tmp_path}"
    ) as caught:
        load_draft(tmp_path, TARGET_CONFIG)
    assert "\n" not in str(caught.value)


def test_a_head_that_is_announced_as_tied_names_specforge(tmp_path: Path) -> None:
    """SGLang would draft with the embedding; SpecForge's configs say so, and its drafts have a head of their own."""
    save_draft(small_draft(), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    with pytest.raises(DraftError, match="in the spelling of specforge"):
        load_draft(tmp_path, TARGET_CONFIG)


@pytest.mark.parametrize("draft_vocab_size", SIZES)
@pytest.mark.parametrize("spelling", [Spelling.SGLANG, Spelling.SPECULATORS])
def test_vllm_has_a_place_for_every_tensor(spelling: Spelling, draft_vocab_size: int) -> None:
    draft = small_draft(draft_vocab_size=draft_vocab_size)
    theirs = from_sglang(spelled(draft), spelling, TARGET)
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.tensors.items()}
    check_vllm(draft.config, shapes)
    check_vllm(draft.config, shapes | {"embed_tokens.weight": (40, 32)})
    for name in set(shapes) - {"t2d"}:
        with pytest.raises(DraftError, match="this draft fills"):
            check_vllm(draft.config, {other: shape for other, shape in shapes.items() if other != name})
        with pytest.raises(DraftError, match=r"vLLM's"):
            check_vllm(draft.config, shapes | {name: (*shapes[name][:-1], shapes[name][-1] + 1)})
    with pytest.raises(DraftError, match="no place"):
        check_vllm(draft.config, shapes | {"midlayer.self_attn.q_norm.weight": (8,)})


def test_the_user_is_told_which_spelling_is_for_vllm() -> None:
    draft = small_draft()
    assert vllm_verdict(draft, Spelling.SPECULATORS).endswith("(checked, not run)")
    for spelling in (Spelling.SGLANG, Spelling.SPECFORGE):
        assert vllm_verdict(draft, spelling).endswith("--export speculators")


def test_vllms_fused_parameters_have_the_rows_of_their_parts() -> None:
    parameters = vllm_parameters(small_draft().config)
    assert parameters["model.layers.0.self_attn.qkv_proj.weight"] == (32 + 2 * 16, 64)
    assert parameters["model.layers.0.mlp.gate_up_proj.weight"] == (96, 32)


def test_saving_and_loading_the_result_of_an_import(tmp_path: Path) -> None:
    draft = small_draft(draft_vocab_size=11)
    theirs = from_sglang(spelled(draft), Spelling.SPECULATORS, TARGET)
    ours = to_sglang(theirs, TARGET)
    save_draft(draft, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == ours.config
