"""The draft's logits are those of SGLang's LlamaForCausalLMEagle3, written down again here without cache or batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from draft_models.config import DraftConfig
from draft_models.eagle3 import (
    DraftError,
    Eagle3,
    Eagle3Config,
    choose_draft_vocab,
    default_aux_layer_ids,
)
from draft_models.layers import BATCH_INVARIANT, FAST, Numerics
from tests.draft_helpers import TARGET_CONFIG, random_sample, small_draft


class Reference:
    """llama_eagle3.py, one token at a time; keys and values of earlier tokens are kept in plain lists."""

    def __init__(self, draft: Eagle3, position_shift: int = 0, swap_halves: bool = False) -> None:
        self.w = draft.named_tensors()
        self.c = draft.config
        self.position_shift, self.swap_halves = position_shift, swap_halves
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean() + self.c.rms_norm_eps).sqrt() * self.w[name]

    def rotate(self, head: Tensor, position: int) -> Tensor:
        half = self.c.head_dim // 2
        out = head.clone()
        for i in range(half):
            angle = position / TARGET_CONFIG["rope_theta"] ** (2 * i / self.c.head_dim)
            a, b = head[i], head[i + half]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def heads(self, x: Tensor, name: str) -> Tensor:
        return (self.w[f"midlayer.self_attn.{name}.weight"] @ x).view(-1, self.c.head_dim)

    def step(self, embed: Tensor, hidden: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """(logits, recurrent state) of the token at `position`; `hidden` has width 3H at chain step 0."""
        if len(hidden) != len(embed):
            hidden = self.w["fc.weight"] @ hidden
        residual = hidden
        halves = [self.norm(embed, "midlayer.input_layernorm.weight"), self.norm(hidden, "midlayer.hidden_norm.weight")]
        x = torch.cat(halves[::-1] if self.swap_halves else halves)
        if self.position_shift and self.keys:
            position += self.position_shift
        q = torch.stack([self.rotate(head, position) for head in self.heads(x, "q_proj")])
        self.keys.append(torch.stack([self.rotate(head, position) for head in self.heads(x, "k_proj")]))
        self.values.append(self.heads(x, "v_proj"))
        group = self.c.num_attention_heads // self.c.num_key_value_heads
        attended = []
        for head in range(self.c.num_attention_heads):
            scores = torch.stack([q[head] @ key[head // group] for key in self.keys]) / self.c.head_dim**0.5
            weights = scores.softmax(0)
            attended.append(sum(w * value[head // group] for w, value in zip(weights, self.values, strict=True)))
        residual = residual + self.w["midlayer.self_attn.o_proj.weight"] @ torch.cat(attended)
        x = self.norm(residual, "midlayer.post_attention_layernorm.weight")
        gate, up = self.w["midlayer.mlp.gate_proj.weight"] @ x, self.w["midlayer.mlp.up_proj.weight"] @ x
        state = residual + self.w["midlayer.mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up)
        return self.w["lm_head.weight"] @ self.norm(state, "norm.weight"), state


ROWS, CHAIN = 6, 3


def reference_logits(draft: Eagle3, seed: int, **faults: int) -> Tensor:
    """Logits of the last prefix row and of a chain behind it, [CHAIN, V]."""
    sample, reference = random_sample(ROWS + CHAIN + 1, 3, seed), Reference(draft, **faults)
    for row in range(ROWS):
        logits, state = reference.step(sample.embeds[row + 1], sample.aux_hidden[row], row)
    out = [logits]
    for row in range(ROWS, ROWS + CHAIN - 1):
        logits, state = reference.step(sample.embeds[row + 1], state, row)
        out.append(logits)
    return torch.stack(out)


@torch.no_grad()
def engine_logits(draft: Eagle3, seeds: list[int], numerics: Numerics) -> Tensor:
    """The same for a batch: the prefix in one call, then the chain token by token, [B, CHAIN, V]."""
    samples = [random_sample(ROWS + CHAIN + 1, 3, seed) for seed in seeds]
    embeds, aux = torch.stack([s.embeds for s in samples]), torch.stack([s.aux_hidden for s in samples])
    config = draft.config
    cache_k = torch.zeros(len(seeds), config.num_key_value_heads, ROWS + CHAIN, config.head_dim)
    cache_v = torch.zeros_like(cache_k)
    positions = torch.arange(ROWS).expand(len(seeds), -1)
    hidden = draft.fuse(aux[:, :ROWS], numerics)
    state = draft.step(embeds[:, 1 : ROWS + 1], hidden, positions, cache_k, cache_v, numerics)[:, -1:]
    out = [draft.logits(state, numerics)]
    for row in range(ROWS, ROWS + CHAIN - 1):
        position = torch.full((len(seeds), 1), row)
        state = draft.step(embeds[:, row + 1, None], state, position, cache_k, cache_v, numerics)
        out.append(draft.logits(state, numerics))
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("numerics", [FAST, BATCH_INVARIANT])
def test_logits_are_those_of_sglang(numerics: Numerics) -> None:
    draft, seeds = small_draft(), [1, 2, 3]
    expected = torch.stack([reference_logits(draft, seed) for seed in seeds])
    torch.testing.assert_close(engine_logits(draft, seeds, numerics), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fault", [{"position_shift": 1}, {"swap_halves": 1}])
def test_the_comparison_sees_a_fault(fault: dict[str, int]) -> None:
    draft = small_draft()
    assert (engine_logits(draft, [1], FAST)[0] - reference_logits(draft, 1, **fault)).abs().max() > 1e-3


def test_names_and_shapes_are_those_of_the_config() -> None:
    for draft in (small_draft(), small_draft(draft_vocab_size=11)):
        assert {name: tuple(t.shape) for name, t in draft.named_tensors().items()} == draft.config.tensor_shapes()
    assert "embed_tokens.weight" not in draft.named_tensors()
    assert torch.equal(draft.t2d.nonzero()[:, 0], draft.target_ids)


def test_named_tensors_share_memory() -> None:
    draft = small_draft()
    draft.named_tensors()["lm_head.weight"].zero_()
    assert draft.lm_head.weight.abs().max() == 0


def test_weights_come_from_the_seed_alone() -> None:
    config = small_draft().config
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = Eagle3(config, seed=5), Eagle3(config, seed=5), Eagle3(config, seed=6)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.fc.weight, again.fc.weight)
    assert not torch.equal(first.fc.weight, other.fc.weight)


@pytest.mark.parametrize("num_layers", range(4, 50))
def test_default_layers_are_distinct_and_capturable(num_layers: int) -> None:
    ids = default_aux_layer_ids(num_layers)
    assert len(set(ids)) == 3
    assert list(ids) == sorted(ids)
    assert ids[0] >= 0 and ids[-1] <= num_layers - 2
    if num_layers >= 7:
        assert ids == (1, num_layers // 2 - 1, num_layers - 4)


@pytest.mark.parametrize(
    ("target", "draft", "message"),
    [
        ({"num_hidden_layers": 3}, DraftConfig(), "at least 4 layers"),
        ({}, DraftConfig(aux_layer_ids=(1, 1, 3)), "three ascending ids"),
        ({}, DraftConfig(aux_layer_ids=(3, 1, 5)), "three ascending ids"),
        ({}, DraftConfig(aux_layer_ids=(1, 2, 7)), "from 0 to 6"),
        ({}, DraftConfig(draft_vocab_size=41), "above the target's 40"),
    ],
)
def test_impossible_drafts_are_refused(target: dict[str, int], draft: DraftConfig, message: str) -> None:
    with pytest.raises(DraftError, match=message):
        Eagle3Config.from_target(TARGET_CONFIG | target, draft)


def test_draft_vocabulary_is_the_most_frequent_tokens() -> None:
    assert choose_draft_vocab(torch.tensor([3, 9, 0, 3, 5]), 3).tolist() == [0, 1, 4]
