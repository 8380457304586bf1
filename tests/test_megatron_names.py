"""Names and tensor-parallel layouts, and settings from config.json. No Megatron needed."""

import pytest
import torch

from tests.policy_helpers import hf_model
from trainer.config import ConfigError, PolicyConfig
from trainer.megatron_names import Heads, Layout, fuse_qkv, merge, rule_for, shard, split_qkv
from trainer.megatron_settings import (
    check_layout,
    config_fields,
    rope_frequencies,
    scheduler_fields,
    transformer_settings,
)

HEADS = Heads(num_query_groups=2, kv_channels=8)
LAYER_PARAMS = (
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias",
    "self_attention.linear_proj.weight",
    "input_layernorm.weight",
    "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)
TOP_PARAMS = ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight")


def test_qkv_is_fused_per_query_group():
    q, k, v = torch.arange(4.0), torch.arange(10.0, 12.0), torch.arange(20.0, 22.0)
    heads = Heads(num_query_groups=2, kv_channels=1)
    assert fuse_qkv(q, k, v, heads).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert all(torch.equal(a, b) for a, b in zip(split_qkv(fuse_qkv(q, k, v, heads), heads), (q, k, v), strict=True))


def test_gate_and_up_are_fused_on_every_rank():
    gate, up = torch.arange(4.0)[:, None], torch.arange(10.0, 14.0)[:, None]
    rule = rule_for("decoder.layers.0.mlp.linear_fc1.weight")
    assert shard(rule, [gate, up], HEADS, 1, 2).flatten().tolist() == [2, 3, 12, 13]


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_cutting_and_merging_is_bitwise(model_type, tp_size):
    state = hf_model(model_type).state_dict()
    names = [f"decoder.layers.{i}.{name}" for i in range(4) for name in LAYER_PARAMS]
    names += [f"decoder.layers.{i}.self_attention.{x}_layernorm.weight" for i in range(4) for x in "qk"]
    back = {}
    for name in (*names, *TOP_PARAMS):
        rule = rule_for(name)
        if all(hf_name in state for hf_name in rule.hf_names):
            full = [state[hf_name] for hf_name in rule.hf_names]
            back |= merge(rule, [shard(rule, full, HEADS, r, tp_size) for r in range(tp_size)], HEADS)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_layers_are_numbered_over_all_stages():
    assert rule_for("decoder.layers.1.input_layernorm.weight", 3).hf_names == ("model.layers.4.input_layernorm.weight",)


def test_tied_output_layer_is_the_embedding():
    rule = rule_for("output_layer.weight", tied=True)
    assert rule.hf_names == ("model.embed_tokens.weight",) and rule.layout is Layout.COLUMN


def test_unknown_parameter_is_an_error():
    with pytest.raises(KeyError):
        rule_for("decoder.layers.0.mlp.router.weight")


CONFIG = {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_unsupported_architectures_are_named(change, word):
    with pytest.raises(ConfigError, match=word):
        transformer_settings(CONFIG | change)


def test_rope_of_old_and_new_config_files():
    assert rope_frequencies({"rope_theta": 16.0}, 4).tolist() == pytest.approx([1.0, 0.25])
    new = {"rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}}
    assert rope_frequencies(new, 4).tolist() == pytest.approx([1.0, 0.1])
    linear = {"rope_theta": 16.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert rope_frequencies(linear, 4).tolist() == pytest.approx([0.5, 0.125])
    with pytest.raises(ConfigError, match="yarn"):
        rope_frequencies({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 4)
    with pytest.raises(ConfigError, match="llama3 lack 'low_freq_factor'"):
        rope_frequencies({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, 4)


def test_megatron_table_passes_through_and_names_the_nearest_key():
    known = {"attention_softmax_in_fp32", "num_layers"}
    config = PolicyConfig(megatron={"attention_softmax_in_fp32": True})
    assert config_fields(config, CONFIG, known)["attention_softmax_in_fp32"] is True
    with pytest.raises(ConfigError, match="did you mean attention_softmax_in_fp32"):
        config_fields(PolicyConfig(megatron={"attention_softmax_fp32": True}), CONFIG, known)
    with pytest.raises(ConfigError, match="decided by the checkpoint"):
        config_fields(PolicyConfig(megatron={"num_layers": 3}), CONFIG, known)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (PolicyConfig(dtype="float16"), "float16"),
        (PolicyConfig(tensor_model_parallel_size=3), "3"),
        (PolicyConfig(tensor_model_parallel_size=6), "vocabulary"),
    ],
)
def test_impossible_layouts_are_refused(config, word):
    with pytest.raises(ConfigError, match=word):
        check_layout(config, vocab_size=128, world_size=6 if config.tensor_model_parallel_size == 6 else 4)


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match="lr_warmup_iters"):
        scheduler_fields(PolicyConfig(lr_warmup_iters=10), train_iters=10)
