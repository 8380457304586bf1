"""The compact decoder against Transformers, its loader's errors, and batch-invariant arithmetic bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from draft_models.layers import BATCH_INVARIANT, FAST, Numerics
from rollout_engine.decoder import Decoder
from rollout_engine.hf_checkpoint import CheckpointError, open_policy, tensor_shapes
from rollout_engine.kv_cache import KVCache
from tests.rollout_engine_helpers import save_hf_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
MODELS = {
    "qwen3 tied": ("Qwen3", {}),
    "qwen3 untied": ("Qwen3", {"tie_word_embeddings": False}),
    "qwen3 sharded": ("Qwen3", {"shard": "20KB", "tie_word_embeddings": False}),
    "qwen3 attention bias": ("Qwen3", {"attention_bias": True}),
    "qwen2 bias": ("Qwen2", {"tie_word_embeddings": False}),
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama mha": ("Llama", {"num_key_value_heads": 4}),
    "llama 3.1 rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama linear rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
    ),
}


def new_cache(decoder: Decoder, num_rows: int, num_positions: int) -> KVCache:
    config = decoder.config
    cache = KVCache(config.num_layers, num_rows, config.num_kv_heads, config.head_dim, decoder.embed)
    cache.reserve(num_positions)
    return cache


def run(decoder: Decoder, tokens: torch.Tensor, numerics: Numerics = FAST) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, aux of layers 1, 2, 3) of whole rows."""
    num_rows, length = tokens.shape
    positions = torch.arange(length).expand(num_rows, -1)
    view = new_cache(decoder, num_rows, length).view(num_rows, length)
    out = decoder.forward(tokens, positions, view, numerics=numerics, capture=(1, 2, 3))
    assert out.aux_BMA is not None
    return decoder.logits(out.hidden_BMH, numerics), out.aux_BMA


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_and_hidden_states_equal_transformers(name: str, tmp_path: Path) -> None:
    architecture, overrides = MODELS[name]
    model = save_hf_model(tmp_path, architecture, **overrides)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("sharded" in name)
    tokens = torch.randint(0, 40, (2, 30), generator=torch.Generator().manual_seed(1))
    want = model(tokens, output_hidden_states=True)
    decoder = Decoder.from_hf(tmp_path, torch.float32)
    assert tensor_shapes(decoder.config) == {key: tuple(t.shape) for key, t in decoder.named_tensors().items()}
    logits, aux = run(decoder, tokens)
    torch.testing.assert_close(logits, want.logits, atol=1e-4, rtol=0)
    # Hugging Face's hidden_states[i] is the input of layer i.
    torch.testing.assert_close(aux, torch.cat(want.hidden_states[2:5], dim=-1), atol=1e-4, rtol=0)


@torch.no_grad()
def test_both_spellings_of_rope_in_the_config(tmp_path: Path) -> None:
    save_hf_model(tmp_path, rope_theta=500.0)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    new = Decoder.from_hf(tmp_path, torch.float32)
    config.pop("rope_parameters")
    path.write_text(json.dumps(config | {"rope_theta": 500.0, "rope_scaling": None}))
    old = Decoder.from_hf(tmp_path, torch.float32)
    assert new.config.rope_theta == old.config.rope_theta == 500.0
    tokens = torch.arange(12)[None]
    assert torch.equal(run(new, tokens)[0], run(old, tokens)[0])
    path.write_text(json.dumps(config | {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}))
    scaled = Decoder.from_hf(tmp_path, torch.float32)
    assert not torch.equal(run(scaled, tokens)[0], run(old, tokens)[0])


@torch.no_grad()
def test_decoding_in_pieces_equals_one_forward(tmp_path: Path) -> None:
    """Rows of different lengths in one padded batch, then several tokens per row at each row's own position."""
    save_hf_model(tmp_path)
    decoder = Decoder.from_hf(tmp_path, torch.float64)
    tokens = torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(2))
    want = run(decoder, tokens)[0]
    cache = new_cache(decoder, 2, 20)
    starts = torch.tensor([9, 5])
    decoder.forward(tokens[:, :9], torch.arange(9).expand(2, -1), cache.view(2, 9))
    for _ in range(3):
        positions = starts[:, None] + torch.arange(3)
        out = decoder.forward(tokens.gather(1, positions), positions, cache.view(2, int(positions.max()) + 1))
        got = decoder.logits(out.hidden_BMH)
        for row in range(2):
            torch.testing.assert_close(got[row], want[row, positions[row]], atol=1e-12, rtol=0)
        starts = starts + 3


@torch.no_grad()
def test_batch_invariant_rows_are_bitwise_equal(tmp_path: Path) -> None:
    """One row alone, among others, token by token, and in a longer cache view: the same bits."""
    save_hf_model(tmp_path, intermediate_size=56)
    decoder = Decoder.from_hf(tmp_path, torch.float32)
    tokens = torch.randint(0, 40, (13, 70), generator=torch.Generator().manual_seed(3))
    want, want_aux = run(decoder, tokens, BATCH_INVARIANT)
    for rows in (slice(4, 5), slice(2, 9)):
        got, aux = run(decoder, tokens[rows], BATCH_INVARIANT)
        assert torch.equal(got, want[rows]) and torch.equal(aux, want_aux[rows])
    order = torch.randperm(13, generator=torch.Generator().manual_seed(4))
    assert torch.equal(run(decoder, tokens[order], BATCH_INVARIANT)[0], want[order])
    cache = new_cache(decoder, 1, 130)
    for at in range(0, 70, 10):
        piece = torch.arange(at, at + 10)[None]
        out = decoder.forward(tokens[:1, at : at + 10], piece, cache.view(1, 130), numerics=BATCH_INVARIANT)
        assert torch.equal(decoder.logits(out.hidden_BMH, BATCH_INVARIANT), want[:1, at : at + 10])
    # The fast kernels do differ, so the comparison above can fail.
    assert not torch.equal(run(decoder, tokens, FAST)[0], want)
    torch.testing.assert_close(run(decoder, tokens, FAST)[0], want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (7, 2)])
def test_onednn_products_equal_the_ordinary_ones(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine prefers, in the engine's inference mode."""
    monkeypatch.setattr(FAST, "_onednn", True)
    generator = torch.Generator().manual_seed(5)
    x, weight = torch.randn(*shape, 1024, generator=generator), torch.randn(1040, 1024, generator=generator)
    bias = torch.randn(1040, generator=generator)
    for b in (None, bias):
        with torch.inference_mode():
            got = FAST.linear(x, weight, b)
        assert got.is_contiguous()
        torch.testing.assert_close(got, torch.nn.functional.linear(x, weight, b), atol=1e-3, rtol=0)


def test_attention_of_a_long_prompt_goes_by_blocks() -> None:
    generator = torch.Generator().manual_seed(6)
    q = torch.randn(2, 600, 4, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 640, 8, generator=generator, dtype=torch.float64)
    positions = torch.stack((torch.arange(600), torch.arange(30, 630)))
    got = FAST.attend(q, k, v, positions, 0.3)
    visible = torch.arange(640) <= positions[:, None, :, None]
    want = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=visible, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(got, want.transpose(1, 2).flatten(2), atol=1e-12, rtol=0)


@torch.no_grad()
def test_named_tensors_are_views_into_the_weights(tmp_path: Path) -> None:
    model = save_hf_model(tmp_path, "Qwen2", tie_word_embeddings=False)
    decoder = Decoder.from_hf(tmp_path, torch.float32)
    tensors = decoder.named_tensors()
    state = model.state_dict()
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)
    tokens = torch.arange(10)[None]
    before = run(decoder, tokens)[0]
    tensors["model.layers.3.self_attn.k_proj.bias"].add_(1.0)
    tensors["model.layers.3.mlp.up_proj.weight"].mul_(2.0)
    assert not torch.equal(run(decoder, tokens)[0], before)


def test_tied_model_has_no_head_of_its_own(tmp_path: Path) -> None:
    save_hf_model(tmp_path)
    assert "lm_head.weight" not in Decoder.from_hf(tmp_path, torch.float32).named_tensors()


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


BREAKAGES = {
    "no such folder": (lambda d: [p.unlink() for p in d.iterdir()] + [d.rmdir()], "no such folder"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: missing"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json: not JSON"),
    "config not an object": (lambda d: (d / "config.json").write_text("[]"), "config.json: holds list"),
    "not an index": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "index.json: not an index"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "cut off": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:5000]),
        "model.safetensors: not a readable safetensors file",
    ),
    "missing tensor": (lambda d: edit_tensors(d, model__norm__weight=None), "tensor model.norm.weight is missing"),
    "extra tensor": (lambda d: edit_tensors(d, model__spare=torch.zeros(2)), "tensor model.spare does not belong"),
    "wrong shape": (
        lambda d: edit_tensors(d, model__norm__weight=torch.zeros(31)),
        r"tensor model.norm.weight has shape \[31\], config.json asks for \[32\]",
    ),
    "unknown architecture": (lambda d: edit_config(d, architectures=["Mamba2ForCausalLM"]), "Mamba2ForCausalLM"),
    "sliding window": (lambda d: edit_config(d, use_sliding_window=True), "sliding-window"),
    "unknown rope": (lambda d: edit_config(d, rope_parameters={"rope_type": "yarn"}), "rope_type 'yarn'"),
    "missing key": (lambda d: edit_config(d, hidden_size=None), "hidden_size"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_bad_checkpoint_is_one_clear_line(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    save_hf_model(directory)
    breakage, message = BREAKAGES[name]
    breakage(directory)
    with pytest.raises(CheckpointError, match=message) as caught:
        Decoder.from_hf(directory, torch.float32)
    assert "\n" not in str(caught.value)
    if name != "unknown rope":  # which Megatron's own settings refuse
        with pytest.raises(CheckpointError, match=message):
            open_policy(directory)
