"""The compact decoder of dense Qwen3, Qwen2 and Llama policies: Hugging Face folder in, logits and hidden states out.

Axes: B rows, M tokens per row, H hidden size, V vocabulary, L cache positions. Weights of fused projections live in one
storage; `named_tensors` shows them under their Hugging Face names, so that a weight sync copies in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from draft_models.layers import FAST, Numerics, RopeTable, apply_rope, inverse_frequencies, rope_table
from rollout_engine.hf_checkpoint import CheckpointError, DecoderConfig, decoder_config, load_tensors, read_config
from rollout_engine.kv_cache import KVView


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one decoder layer; biases and head norms are None where the architecture has none."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True)
class Decoded:
    hidden_BMH: torch.Tensor  # after the final norm: what the head takes
    aux_BMA: torch.Tensor | None  # outputs of the captured layers side by side, [B, M, 3H]


class Decoder:
    """Weights and forward pass. Stateless between calls: the caller owns the cache."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        """Weights are uninitialised; fill them through `named_tensors`."""
        self.config = config
        self.dtype = dtype
        self.device = torch.device(device)
        self.embed = self._new(config.vocab_size, config.hidden_size)
        self.head = self.embed if config.tied else self._new(config.vocab_size, config.hidden_size)
        self.final_norm = self._new(config.hidden_size)
        self.layers = [self._new_layer() for _ in range(config.num_layers)]
        self._rope: RopeTable = rope_table(0, self._inverse_frequencies(), dtype, self.device)

    @classmethod
    def from_hf(cls, directory: Path | str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Decoder:
        """Load a Hugging Face folder. Raises CheckpointError with the file or tensor at fault."""
        directory = Path(directory)
        config = decoder_config(read_config(directory), str(directory / "config.json"))
        decoder = cls(config, dtype, device)
        load_tensors(directory, decoder.named_tensors(), frozenset({"lm_head.weight"} if config.tied else ()))
        return decoder

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """Hugging Face names -> views into the weights' storage; no lm_head for tied models."""
        tensors = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.final_norm}
        if not self.config.tied:
            tensors["lm_head.weight"] = self.head
        for index, layer in enumerate(self.layers):
            tensors.update({f"model.layers.{index}.{name}": view for name, view in self._layer_tensors(layer).items()})
        return tensors

    def forward(
        self,
        token_ids_BM: torch.Tensor,
        positions_BM: torch.Tensor,
        cache: KVView,
        *,
        numerics: Numerics = FAST,
        capture: tuple[int, ...] = (),
    ) -> Decoded:
        """Write K and V of the tokens at their positions and return the final states.

        int64 [B, M] tokens and positions; `cache` has B rows and covers every position. `capture` lists layer ids
        whose outputs are returned, concatenated in that order.
        """
        self._reserve_rope(cache.keys.shape[3])
        x = torch.nn.functional.embedding(token_ids_BM, self.embed)
        rope = self._rope.at(positions_BM)
        rows = torch.arange(len(token_ids_BM), device=token_ids_BM.device)[:, None]
        captured: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(self.layers):
            keys, values = cache.keys[index], cache.values[index]
            x = self._layer(layer, x, rope, rows, positions_BM, keys, values, numerics)
            if index in capture:
                captured[index] = x
        hidden = numerics.rms_norm(x, self.final_norm, self.config.rms_eps)
        return Decoded(hidden, torch.cat([captured[i] for i in capture], dim=-1) if capture else None)

    def logits(self, hidden: torch.Tensor, numerics: Numerics = FAST) -> torch.Tensor:
        """[..., H] after the final norm -> [..., V]."""
        return numerics.linear(hidden, self.head)

    def _layer(
        self,
        layer: Layer,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        rows: torch.Tensor,
        positions_BM: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        numerics: Numerics,
    ) -> torch.Tensor:
        config, eps = self.config, self.config.rms_eps
        num_rows, num_tokens = positions_BM.shape
        qkv = numerics.linear(numerics.rms_norm(x, layer.input_norm, eps), layer.qkv, layer.qkv_bias)
        qkv = qkv.view(num_rows, num_tokens, -1, config.head_dim)
        q, k, v = qkv.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=2)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = numerics.rms_norm(q, layer.q_norm, eps), numerics.rms_norm(k, layer.k_norm, eps)
        keys[rows, :, positions_BM] = apply_rope(k, *rope)
        values[rows, :, positions_BM] = v
        attended = numerics.attend(apply_rope(q, *rope), keys, values, positions_BM, config.head_dim**-0.5)
        x = x + numerics.linear(attended, layer.o, layer.o_bias)
        gate_up = numerics.linear(numerics.rms_norm(x, layer.post_norm, eps), layer.gate_up)
        return x + numerics.linear(numerics.swiglu(gate_up), layer.down)

    def _new(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _new_layer(self) -> Layer:
        config = self.config
        qkv_size = config.q_size + 2 * config.kv_size
        return Layer(
            input_norm=self._new(config.hidden_size),
            qkv=self._new(qkv_size, config.hidden_size),
            qkv_bias=self._new(qkv_size) if config.qkv_bias else None,
            q_norm=self._new(config.head_dim) if config.qk_norm else None,
            k_norm=self._new(config.head_dim) if config.qk_norm else None,
            o=self._new(config.hidden_size, config.q_size),
            o_bias=self._new(config.hidden_size) if config.o_bias else None,
            post_norm=self._new(config.hidden_size),
            gate_up=self._new(2 * config.intermediate_size, config.hidden_size),
            down=self._new(config.hidden_size, config.intermediate_size),
        )

    def _layer_tensors(self, layer: Layer) -> dict[str, torch.Tensor]:
        sizes = (self.config.q_size, self.config.kv_size, self.config.kv_size)
        gate, up = layer.gate_up.chunk(2)
        tensors: dict[str, torch.Tensor | None] = {
            "input_layernorm.weight": layer.input_norm,
            "self_attn.q_norm.weight": layer.q_norm,
            "self_attn.k_norm.weight": layer.k_norm,
            "self_attn.o_proj.weight": layer.o,
            "self_attn.o_proj.bias": layer.o_bias,
            "post_attention_layernorm.weight": layer.post_norm,
            "mlp.gate_proj.weight": gate,
            "mlp.up_proj.weight": up,
            "mlp.down_proj.weight": layer.down,
        }
        for name, weight in zip("qkv", layer.qkv.split(sizes), strict=True):
            tensors[f"self_attn.{name}_proj.weight"] = weight
        if layer.qkv_bias is not None:
            for name, bias in zip("qkv", layer.qkv_bias.split(sizes), strict=True):
                tensors[f"self_attn.{name}_proj.bias"] = bias
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def _inverse_frequencies(self) -> torch.Tensor:
        try:
            return inverse_frequencies(self.config.rope_theta, self.config.head_dim, self.config.rope_scaling)
        except ValueError as error:
            raise CheckpointError(f"config.json: {error}") from error

    def _reserve_rope(self, num_positions: int) -> None:
        """Grow by doubling: models announce far longer contexts than a rollout uses."""
        if num_positions > len(self._rope.cos):
            size = max(num_positions, 2 * len(self._rope.cos))
            self._rope = rope_table(size, self._inverse_frequencies(), self.dtype, self.device)
