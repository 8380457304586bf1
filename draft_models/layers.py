"""The few operations that the policy's decoder and the draft share, and the two ways to do their arithmetic.

Axes: B rows (sequences), M tokens per row, R = B * M, H query heads, G KV heads, D head size, L cache positions.

`FAST` lets torch choose its kernels. `BATCH_INVARIANT` gives a token's result bitwise the same whatever stands
beside it: any batch size, tokens per row, row order or cache view length. Its three rules: a matrix product is a batch
of one-row products; every element-wise or row-wise function runs on whole vector registers of one thread chunk, so that
no element falls into a kernel's scalar tail; attention visits keys in blocks of fixed size, in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F


class Numerics(Protocol):
    """How products, norms, activation and attention are computed."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] @ weight [out, in].T + bias [out] -> [..., out]."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root-mean-square norm over the last axis."""

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up [..., 2I], gate first -> silu(gate) * up [..., I]."""

    def attend(
        self,
        q_BMHD: torch.Tensor,
        k_BGLD: torch.Tensor,
        v_BGLD: torch.Tensor,
        positions_BM: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Query (b, m) sees cache positions 0 .. positions_BM[b, m]; H is a multiple of G. Returns [B, M, H * D].

        `positions_BM` must not be changed in place afterwards. Unseen cache entries must be finite.
        """


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; float32 inside for half types."""
    if x.dtype in (torch.bfloat16, torch.float16):
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


# ---------------------------------------------------------------- rotary embedding


@dataclass(frozen=True, slots=True)
class RopeTable:
    """cos and sin for every position, [max_positions, D], in the Hugging Face rotate-half layout.

    The first half of `sin` is negated, so that rotating is x * cos + swap_halves(x) * sin.
    """

    cos: torch.Tensor
    sin: torch.Tensor  # its first half negated

    def at(self, positions_BM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, signed sin), each [B, M, 1, D], for `apply_rope`."""
        cos, sin = F.embedding(positions_BM, self.cos), F.embedding(positions_BM, self.sin)
        return cos.unsqueeze(2), sin.unsqueeze(2)


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta, rope_type and what that type needs, from a config.json.

    Transformers 5 writes them as `rope_parameters`; before it there were `rope_theta` and `rope_scaling`.
    """
    rope: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_theta"] = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    rope.setdefault("rope_type", rope.pop("type", "default"))
    return rope


def inverse_frequencies(theta: float, head_dim: int, scaling: Mapping[str, Any] | None = None) -> torch.Tensor:
    """float32 [D / 2]; `scaling` is a config's rope dictionary: rope_type default, linear or llama3.

    Raises ValueError for another rope_type.
    """
    inv_freq = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    scaling = scaling or {}
    rope_type = scaling.get("rope_type", "default")
    if rope_type == "default":
        return inv_freq
    if rope_type == "linear":
        return inv_freq / float(scaling["factor"])
    if rope_type == "llama3":
        return _llama3_frequencies(inv_freq, scaling)
    raise ValueError(f"rope_type {rope_type!r} is not supported; known: default, linear, llama3")


def _llama3_frequencies(inv_freq: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between interpolated."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    old_context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    smooth = (old_context / wavelength - low) / (high - low)
    middle = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wavelength > old_context / low, inv_freq / factor, inv_freq)
    is_middle = (wavelength <= old_context / low) & (wavelength >= old_context / high)
    return torch.where(is_middle, middle, scaled)


def rope_table(
    max_positions: int,
    inv_freq: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> RopeTable:
    """Angles are taken in float32, as Transformers does, then stored in `dtype`."""
    angles = torch.outer(torch.arange(max_positions).float(), inv_freq.float())
    cos = torch.cat((angles.cos(), angles.cos()), dim=-1)
    signed_sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)
    return RopeTable(cos.to(device, dtype), signed_sin.to(device, dtype))


def apply_rope(x_BMHD: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads; cos and signed sin from `RopeTable.at`."""
    return x_BMHD * cos + x_BMHD.roll(x_BMHD.shape[-1] // 2, -1) * signed_sin


# ---------------------------------------------------------------- fast


@dataclass(slots=True)
class _SeenMask:
    """The mask of the latest positions tensor: all layers of a forward ask for the same one."""

    positions_BM: torch.Tensor | None = None
    shape: tuple[int, ...] = ()
    mask: torch.Tensor = field(default_factory=lambda: torch.empty(0))


_ONEDNN_MULTIPLIES = 1 << 20  # multiply-adds from which oneDNN's start-up cost is won back


def _prefers_onednn() -> bool:
    """Whether this CPU is one that MKL, torch's choice for float32 products, has no good kernels for: AMD's.

    There oneDNN, which writes its kernels at run time, takes a half to a third of the time. Elsewhere MKL is as good.
    """
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text() and torch.backends.mkldnn.is_available()


_QUERY_BLOCK = 256


class FastNumerics:
    """Torch's own kernels. The group of query heads that shares a KV head becomes more queries of that head, so that
    no KV head is ever repeated in memory and every fused attention kernel applies."""

    def __init__(self) -> None:
        self._seen = _SeenMask()
        self._onednn = _prefers_onednn()

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self._onednn and torch.is_inference_mode_enabled() and x.dtype == torch.float32 and x.device.type == "cpu":
            num_multiplies = x.numel() * weight.shape[0]
            if num_multiplies >= _ONEDNN_MULTIPLIES:
                return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return F.linear(x, weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def attend(
        self,
        q_BMHD: torch.Tensor,
        k_BGLD: torch.Tensor,
        v_BGLD: torch.Tensor,
        positions_BM: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        num_rows, num_tokens, num_heads, head_dim = q_BMHD.shape
        if num_tokens > _QUERY_BLOCK:  # bounds the mask, which a long prompt would make quadratic
            blocks = zip(q_BMHD.split(_QUERY_BLOCK, 1), positions_BM.split(_QUERY_BLOCK, 1), strict=True)
            return torch.cat([self.attend(q, k_BGLD, v_BGLD, positions, scale) for q, positions in blocks], dim=1)
        num_kv_heads, length = k_BGLD.shape[1], k_BGLD.shape[2]
        group = num_heads // num_kv_heads
        q = q_BMHD.view(num_rows, num_tokens, num_kv_heads, group * head_dim).transpose(1, 2)
        q = q.reshape(num_rows, num_kv_heads, num_tokens * group, head_dim)
        mask = self._mask(positions_BM, length, group, q.dtype)
        out = F.scaled_dot_product_attention(q, k_BGLD, v_BGLD, attn_mask=mask, scale=scale)
        out = out.reshape(num_rows, num_kv_heads, num_tokens, group * head_dim).transpose(1, 2)
        return out.reshape(num_rows, num_tokens, num_heads * head_dim)

    def _mask(self, positions_BM: torch.Tensor, length: int, group: int, dtype: torch.dtype) -> torch.Tensor:
        """Additive [B, 1, M * group, L]: 0 where the key is seen, -inf elsewhere."""
        seen, shape = self._seen, (length, group)
        if seen.positions_BM is not positions_BM or seen.shape != shape or seen.mask.dtype != dtype:
            keys = torch.arange(length, device=positions_BM.device)
            queries = positions_BM.repeat_interleave(group, dim=1) if group > 1 else positions_BM
            hidden = keys > queries[:, :, None]
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)
            self._seen = seen = _SeenMask(positions_BM, shape, mask.unsqueeze(1))
        return seen.mask


class MixedNumerics(FastNumerics):
    """Products of half-precision operands; norms, sums and the weights themselves stay as they are. For training.

    For one forward: it keeps each weight's half-precision copy, which a recurrent forward reads at every step (as
    autocast does), so that the gradients of the steps are added up in half precision too.
    """

    def __init__(self, product_dtype: torch.dtype) -> None:
        super().__init__()
        self._product_dtype = product_dtype
        self._halves: dict[torch.Tensor, torch.Tensor] = {}  # tensors are told apart by identity

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        half = self._product_dtype
        if weight not in self._halves:
            self._halves[weight] = weight.to(half)
        return F.linear(x.to(half), self._halves[weight], None if bias is None else bias.to(half))

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return super().rms_norm(x, weight, eps).to(self._product_dtype)  # every norm feeds a product


# ---------------------------------------------------------------- batch-invariant

_LANES = 64  # a multiple of every CPU vector width (elements), so a row of whole lanes has no scalar tail
_CHUNK = 32768  # torch's CPU grain: below it one thread does the whole call
_KV_BLOCK = 64


class BatchInvariantNumerics:
    """Slow and reproducible: see the module's first lines."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.reshape(-1, 1, x.shape[-1])
        out = torch.bmm(rows, weight.t().expand(len(rows), -1, -1)).view(*x.shape[:-1], weight.shape[0])
        return out if bias is None else out + bias

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return _by_tiles(lambda tile: rms_norm(tile, weight, eps), x)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return _by_tiles(F.silu, gate) * up

    def attend(
        self,
        q_BMHD: torch.Tensor,
        k_BGLD: torch.Tensor,
        v_BGLD: torch.Tensor,
        positions_BM: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        rows = [
            self._attend_row(q_BMHD[row], k_BGLD[row], v_BGLD[row], positions_BM[row], scale)
            for row in range(len(q_BMHD))
        ]
        return torch.stack(rows)

    def _attend_row(
        self,
        q_MHD: torch.Tensor,
        k_GLD: torch.Tensor,
        v_GLD: torch.Tensor,
        positions_M: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Two passes: a maximum does not depend on order, and an unseen block adds exact zeros to both sums."""
        num_tokens, num_heads, head_dim = q_MHD.shape
        group = num_heads // k_GLD.shape[0]
        pad = -k_GLD.shape[1] % _KV_BLOCK
        k_GLD, v_GLD = F.pad(k_GLD, (0, 0, 0, pad)), F.pad(v_GLD, (0, 0, 0, pad))
        q = q_MHD.reshape(num_tokens * num_heads, 1, head_dim)  # one product per (query, head)
        queries = positions_M.repeat_interleave(num_heads)[:, None, None]

        def blocks(cache_GLD: torch.Tensor) -> list[torch.Tensor]:
            per_head = cache_GLD.repeat_interleave(group, dim=0).repeat(num_tokens, 1, 1)
            return list(per_head.split(_KV_BLOCK, dim=1))

        scores = []
        for index, k_block in enumerate(blocks(k_GLD)):
            keys = torch.arange(index * _KV_BLOCK, (index + 1) * _KV_BLOCK, device=q.device)
            score = torch.bmm(q, k_block.transpose(1, 2)) * scale
            scores.append(score.masked_fill(keys > queries, -math.inf))
        top = torch.cat(scores, dim=-1).amax(-1, keepdim=True)
        total, out = torch.zeros_like(top), torch.zeros_like(q)
        for score, v_block in zip(scores, blocks(v_GLD), strict=True):
            weights = _by_tiles(torch.exp, score - top)
            total = total + _sum_by_halves(weights)
            out = out + torch.bmm(weights, v_block)
        return (out / total).view(num_tokens, num_heads * head_dim)


def _by_tiles(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """A row-wise function on as many rows at once as can neither meet a scalar tail nor be split between threads."""
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    tile = max(1, _CHUNK // width) if width % _LANES == 0 else 1
    return torch.cat([function(part) for part in rows.split(tile)]).view(x.shape)


def _sum_by_halves(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis (a power of two) in one fixed order; keeps the axis."""
    while x.shape[-1] > 1:
        first, second = x.chunk(2, dim=-1)
        x = first + second
    return x


FAST: Numerics = FastNumerics()
BATCH_INVARIANT: Numerics = BatchInvariantNumerics()
