"""The EAGLE-3 draft (Li et al. 2025): one decoder layer over three captured hidden states of the target.

Parameter names, shapes and arithmetic are those of SGLang's LlamaForCausalLMEagle3. The token embedding is the
policy's own, so the caller passes embedded rows.

Alignment: row t takes embed(x_{t+1}) and the target's hidden states at t, has RoPE position t, and predicts x_{t+2}.
Chain step 0 starts from fc(aux_t); each later step takes the state that the step before returned.

Axes: B rows, M tokens, H hidden, N query heads, G KV heads, L cache positions, D head size, V target vocabulary,
R draft vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from draft_models.config import DraftConfig
from draft_models.layers import FAST, Numerics, RopeTable, apply_rope, inverse_frequencies, rope_parameters, rope_table

Rope = tuple[Tensor, Tensor]


class DraftError(ValueError):
    """A draft that cannot be made, loaded or fitted to its target: one line saying what, where and how to mend it."""


@dataclass(frozen=True, slots=True)
class Eagle3Config:
    """The network's sizes. `aux_layer_ids`: the target layers (0-based) whose OUTPUTS are captured, in order."""

    hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Mapping[str, Any]  # rope_theta, rope_type and what that type needs
    max_position_embeddings: int
    aux_layer_ids: tuple[int, ...]

    @property
    def is_reduced(self) -> bool:
        """Whether the draft proposes from a part of the target's vocabulary only."""
        return self.draft_vocab_size != self.vocab_size

    @classmethod
    def from_target(cls, hf_config: Mapping[str, Any], draft: DraftConfig) -> Eagle3Config:
        """A draft for the target with this Hugging Face config. Raises DraftError for sizes that cannot work."""
        vocab_size = int(hf_config["vocab_size"])
        draft_vocab_size = draft.draft_vocab_size or vocab_size
        if draft_vocab_size > vocab_size:
            raise DraftError(f"draft.draft_vocab_size = {draft_vocab_size} is above the target's {vocab_size} tokens")
        ids = _checked_layer_ids(draft.aux_layer_ids, int(hf_config["num_hidden_layers"]))
        return cls(
            vocab_size=vocab_size,
            draft_vocab_size=draft_vocab_size,
            intermediate_size=draft.intermediate_size or int(hf_config["intermediate_size"]),
            aux_layer_ids=ids,
            **_shared_fields(hf_config),
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Eagle3Config:
        """From the config.json of a LlamaForCausalLMEagle3 draft. Raises KeyError for a missing key, DraftError for a
        value of the wrong kind."""
        _check_sizes(config)
        vocab_size = config["vocab_size"]
        return cls(
            vocab_size=vocab_size,
            draft_vocab_size=config.get("draft_vocab_size") or vocab_size,
            intermediate_size=config["intermediate_size"],
            aux_layer_ids=_read_layer_ids(config),
            **_shared_fields(config),
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json that SGLang, vLLM and `from_hf` read."""
        rope = dict(self.rope)
        old_scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        return {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "num_hidden_layers": 1,
            "hidden_size": self.hidden_size,
            "target_hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "draft_vocab_size": self.draft_vocab_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": rope,
            "rope_theta": rope["rope_theta"],  # readers older than Transformers 5 look here
            "rope_scaling": None if old_scaling.get("rope_type", "default") == "default" else old_scaling,
            "max_position_embeddings": self.max_position_embeddings,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "eagle_config": {
                "use_aux_hidden_state": True,
                "eagle_aux_hidden_state_layer_ids": list(self.aux_layer_ids),
            },
        }

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the checkpoint by name; d2t and t2d only with a reduced vocabulary."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q_size, kv_size = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "fc.weight": (hidden, len(self.aux_layer_ids) * hidden),
            "midlayer.hidden_norm.weight": (hidden,),
            "midlayer.input_layernorm.weight": (hidden,),
            "midlayer.post_attention_layernorm.weight": (hidden,),
            "midlayer.self_attn.q_proj.weight": (q_size, 2 * hidden),
            "midlayer.self_attn.k_proj.weight": (kv_size, 2 * hidden),
            "midlayer.self_attn.v_proj.weight": (kv_size, 2 * hidden),
            "midlayer.self_attn.o_proj.weight": (hidden, q_size),
            "midlayer.mlp.gate_proj.weight": (inner, hidden),
            "midlayer.mlp.up_proj.weight": (inner, hidden),
            "midlayer.mlp.down_proj.weight": (hidden, inner),
            "norm.weight": (hidden,),
            "lm_head.weight": (self.draft_vocab_size, hidden),
        }
        if self.is_reduced:
            shapes |= {"d2t": (self.draft_vocab_size,), "t2d": (self.vocab_size,)}
        return shapes


def default_aux_layer_ids(num_layers: int) -> tuple[int, int, int]:
    """SGLang's default (1, n//2 - 1, n - 4) where its ids are distinct, else three spread below the last layer.

    SGLang can capture any layer but the last. Raises DraftError below 4 layers.
    """
    if num_layers < 4:
        raise DraftError(f"an EAGLE-3 draft needs a target of at least 4 layers, this one has {num_layers}")
    if num_layers >= 7:
        return (1, num_layers // 2 - 1, num_layers - 4)
    low, high = (0 if num_layers == 4 else 1), num_layers - 2
    return (low, (low + high) // 2, high)


def choose_draft_vocab(counts_V: Tensor, size: int) -> Tensor:
    """The `size` most frequent token ids, ascending, int64; ties go to the lower id."""
    order = counts_V.sort(descending=True, stable=True).indices[:size]
    return order.sort().values


class Eagle3(nn.Module):
    """The draft network. `d2t` (offset: target id - draft id) and `t2d` exist only with a reduced vocabulary."""

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: Eagle3Config, *, seed: int = 0, target_ids: Tensor | None = None) -> None:
        """Float32 weights drawn from `seed` alone; the global generator is not touched.

        `target_ids`: int64 [R], ascending, the tokens of a reduced vocabulary; default the first R ids.
        """
        super().__init__()
        self.config = config
        self.fc = _Weight(config.hidden_size, len(config.aux_layer_ids) * config.hidden_size)
        self.midlayer = _Midlayer(config)
        self.norm = _Weight(config.hidden_size)
        self.lm_head = _Weight(config.draft_vocab_size, config.hidden_size)
        self._init_weights(torch.Generator().manual_seed(seed))
        if config.is_reduced:
            ids = torch.arange(config.draft_vocab_size) if target_ids is None else target_ids
            in_draft = torch.zeros(config.vocab_size, dtype=torch.bool)
            in_draft[ids] = True
            self.register_buffer("d2t", ids - torch.arange(config.draft_vocab_size))
            self.register_buffer("t2d", in_draft)
        theta = float(config.rope["rope_theta"])
        table = rope_table(config.max_position_embeddings, inverse_frequencies(theta, config.head_dim, config.rope))
        self.register_buffer("rope_cos", table.cos, persistent=False)
        self.register_buffer("rope_sin", table.sin, persistent=False)

    def named_tensors(self) -> dict[str, Tensor]:
        """Every tensor that is saved and sent, by checkpoint name, sharing memory with the module, detached."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    @property
    def target_ids(self) -> Tensor | None:
        """int64 [R]: the target id of each draft id; None when the vocabularies are the same."""
        if not self.config.is_reduced:
            return None
        offsets: Tensor = self.get_buffer("d2t")
        return offsets + torch.arange(len(offsets), device=offsets.device)

    def fuse(self, aux: Tensor, numerics: Numerics = FAST) -> Tensor:
        """Hidden input of chain step 0: the captured states [..., 3H], in layer order, to [..., H]."""
        return numerics.linear(aux, self.fc.weight)

    def logits(self, state: Tensor, numerics: Numerics = FAST) -> Tensor:
        """Draft logits [..., R] of a pre-norm state [..., H]."""
        return numerics.linear(self.final_norm(state, numerics), self.lm_head.weight)

    def final_norm(self, state: Tensor, numerics: Numerics = FAST) -> Tensor:
        """What the head reads, [..., H]."""
        return numerics.rms_norm(state, self.norm.weight, self.config.rms_norm_eps)

    def attention_input(self, embeds: Tensor, hidden: Tensor, numerics: Numerics = FAST) -> Tensor:
        """Normed embeddings and normed hidden states side by side, each [..., H], as [..., 2H]."""
        eps, layer = self.config.rms_norm_eps, self.midlayer
        normed_embeds = numerics.rms_norm(embeds, layer.input_layernorm.weight, eps)
        return torch.cat((normed_embeds, numerics.rms_norm(hidden, layer.hidden_norm.weight, eps)), dim=-1)

    def rope(self, positions_BM: Tensor) -> Rope:
        """cos and sin of RoPE positions, for `queries` and `keys_values`."""
        return RopeTable(self.rope_cos, self.rope_sin).at(positions_BM)

    def queries(self, x_BM2H: Tensor, rope: Rope, numerics: Numerics = FAST) -> Tensor:
        """Rotated queries [B, M, N, D] of `attention_input`."""
        q_BMND = self._heads(x_BM2H, self.midlayer.self_attn.q_proj.weight, numerics)
        return apply_rope(q_BMND, *rope)

    def keys_values(self, x_BM2H: Tensor, rope: Rope, numerics: Numerics = FAST) -> tuple[Tensor, Tensor]:
        """Rotated keys and plain values, each [B, M, G, D]."""
        k_BMGD = self._heads(x_BM2H, self.midlayer.self_attn.k_proj.weight, numerics)
        v_BMGD = self._heads(x_BM2H, self.midlayer.self_attn.v_proj.weight, numerics)
        return apply_rope(k_BMGD, *rope), v_BMGD

    def finish(self, attended: Tensor, hidden: Tensor, numerics: Numerics = FAST) -> Tensor:
        """The layer after its attention: [..., N * D] and the layer's hidden input [..., H] to the state [..., H]."""
        layer = self.midlayer
        residual = hidden + numerics.linear(attended, layer.self_attn.o_proj.weight)
        x = numerics.rms_norm(residual, layer.post_attention_layernorm.weight, self.config.rms_norm_eps)
        gate = numerics.linear(x, layer.mlp.gate_proj.weight)
        gate_up = torch.cat((gate, numerics.linear(x, layer.mlp.up_proj.weight)), dim=-1)
        return residual + numerics.linear(numerics.swiglu(gate_up), layer.mlp.down_proj.weight)

    def step(
        self,
        embeds_BMH: Tensor,
        hidden_BMH: Tensor,
        positions_BM: Tensor,
        cache_k_BGLD: Tensor,
        cache_v_BGLD: Tensor,
        numerics: Numerics = FAST,
    ) -> Tensor:
        """Run M tokens per row: write their K and V into the cache at `positions_BM`, return states [B, M, H].

        Token (b, m) sees cache entries 0 .. positions_BM[b, m], the ones written now included.
        """
        x_BM2H = self.attention_input(embeds_BMH, hidden_BMH, numerics)
        rope = self.rope(positions_BM)
        k_BMGD, v_BMGD = self.keys_values(x_BM2H, rope, numerics)
        rows_B1 = torch.arange(len(positions_BM), device=positions_BM.device)[:, None]
        cache_k_BGLD.transpose(1, 2)[rows_B1, positions_BM] = k_BMGD
        cache_v_BGLD.transpose(1, 2)[rows_B1, positions_BM] = v_BMGD
        q_BMND = self.queries(x_BM2H, rope, numerics)
        attended = numerics.attend(q_BMND, cache_k_BGLD, cache_v_BGLD, positions_BM, self.attention_scale)
        return self.finish(attended, hidden_BMH, numerics)

    @property
    def attention_scale(self) -> float:
        return 1.0 / math.sqrt(self.config.head_dim)

    def _init_weights(self, generator: torch.Generator) -> None:
        """Matrices get variance 1 / inputs, norms 1; a small head starts the draft near the uniform law."""
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                nn.init.ones_(weight)
            else:
                std = 0.02 if name == "lm_head.weight" else weight.shape[1] ** -0.5
                nn.init.normal_(weight, std=std, generator=generator)

    def _heads(self, x_BM2H: Tensor, weight: Tensor, numerics: Numerics) -> Tensor:
        return numerics.linear(x_BM2H, weight).unflatten(-1, (-1, self.config.head_dim))


class _Weight(nn.Module):
    """One tensor under the name NAME.weight, so that parameter names are those of the checkpoint."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class _Attention(nn.Module):
    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = _Weight(q_size, 2 * config.hidden_size)
        self.k_proj = _Weight(kv_size, 2 * config.hidden_size)
        self.v_proj = _Weight(kv_size, 2 * config.hidden_size)
        self.o_proj = _Weight(config.hidden_size, q_size)


class _Mlp(nn.Module):
    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.gate_proj = _Weight(config.intermediate_size, config.hidden_size)
        self.up_proj = _Weight(config.intermediate_size, config.hidden_size)
        self.down_proj = _Weight(config.hidden_size, config.intermediate_size)


class _Midlayer(nn.Module):
    """The weights of a Llama decoder layer whose attention reads the embedding and the hidden state (2H)."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.hidden_norm = _Weight(config.hidden_size)
        self.input_layernorm = _Weight(config.hidden_size)
        self.post_attention_layernorm = _Weight(config.hidden_size)
        self.self_attn = _Attention(config)
        self.mlp = _Mlp(config)


def _shared_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a draft and its target spell the same way in their configs."""
    heads = int(config["num_attention_heads"])
    return {
        "hidden_size": int(config["hidden_size"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or int(config["hidden_size"]) // heads),
        "rms_norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "rope": rope_parameters(config),
        "max_position_embeddings": int(config["max_position_embeddings"]),
    }


_SIZES = ("hidden_size", "vocab_size", "draft_vocab_size", "intermediate_size", "num_attention_heads")
_MORE_SIZES = ("num_key_value_heads", "head_dim", "target_hidden_size", "max_position_embeddings")


def _check_sizes(config: Mapping[str, Any]) -> None:
    """Raises DraftError for a size that is no count. One that is absent, null or 0 is left to its reader."""
    for key in (*_SIZES, *_MORE_SIZES):
        value = config.get(key)
        if value and (type(value) is not int or value < 1):
            raise DraftError(f"{key} is {value!r}, expected a whole number above 0")


def _read_layer_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The captured layers of a draft's config.json. Raises KeyError or DraftError."""
    inner = config["eagle_config"] or {}
    ids = inner["eagle_aux_hidden_state_layer_ids"] if isinstance(inner, Mapping) else inner
    if not isinstance(ids, (list, tuple)) or any(type(i) is not int for i in ids) or not _are_three_ascending(ids):
        raise DraftError(
            f"eagle_aux_hidden_state_layer_ids is {ids!r}, expected three ascending layers of the target, as [1, 3, 4]"
        )
    return tuple(ids)


def _are_three_ascending(ids: Sequence[int]) -> bool:
    """SGLang puts captured states side by side from the lowest layer to the highest, whatever the config's order is."""
    return len(ids) == 3 and ids[0] < ids[1] < ids[2]


def _checked_layer_ids(ids: Sequence[int], num_layers: int) -> tuple[int, ...]:
    if not ids:
        return default_aux_layer_ids(num_layers)
    if not _are_three_ascending(ids) or ids[0] < 0 or ids[-1] > num_layers - 2:
        raise DraftError(
            f"draft.aux_layer_ids = {list(ids)}: expected three ascending ids from 0 to {num_layers - 2} "
            f"(outputs of the target's {num_layers} layers, the last one excepted)"
        )
    return tuple(ids)
