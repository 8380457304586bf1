"""KV memory by slot, row-compact: the n running requests are rows 0..n-1, so every view is a slice, never a gather."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_GRANULE = 64  # positions; capacity grows in these steps, at least by half


@dataclass(frozen=True, slots=True)
class KVView:
    """Keys and values of the first rows and positions, [layers, B, G, L, D] each, writable."""

    keys: torch.Tensor
    values: torch.Tensor

    def row(self, row: int, num_positions: int) -> KVView:
        """One row's first positions, [layers, 1, G, P, D]."""
        rows = slice(row, row + 1)
        return KVView(self.keys[:, rows, :, :num_positions], self.values[:, rows, :, :num_positions])


class KVCache:
    """[layers, slots, G, capacity, D] twice, zero where nothing was written (attention needs finite numbers)."""

    def __init__(self, num_layers: int, num_slots: int, num_heads: int, head_dim: int, like: torch.Tensor) -> None:
        """`like` gives dtype and device."""
        self._keys = like.new_zeros(num_layers, num_slots, num_heads, 0, head_dim)
        self._values = torch.zeros_like(self._keys)

    @property
    def capacity(self) -> int:
        return self._keys.shape[3]

    def reserve(self, num_positions: int) -> None:
        """Make room for at least `num_positions` per slot; contents stay."""
        if num_positions > self.capacity:
            room = max(num_positions, self.capacity * 3 // 2)
            extra = -(-room // _GRANULE) * _GRANULE - self.capacity
            self._keys = torch.nn.functional.pad(self._keys, (0, 0, 0, extra))
            self._values = torch.nn.functional.pad(self._values, (0, 0, 0, extra))

    def view(self, num_rows: int, num_positions: int) -> KVView:
        return KVView(self._keys[:, :num_rows, :, :num_positions], self._values[:, :num_rows, :, :num_positions])

    def move(self, source: int, target: int, num_positions: int) -> None:
        """Row `source` takes the place of row `target`."""
        for cache in (self._keys, self._values):
            cache[:, target, :, :num_positions] = cache[:, source, :, :num_positions]

    def write(self, slots: list[int], prefix: KVView) -> None:
        """Copy one row's `prefix` ([layers, 1, G, P, D]) to each of `slots`."""
        length = prefix.keys.shape[3]
        self._keys[:, slots, :, :length] = prefix.keys
        self._values[:, slots, :, :length] = prefix.values

    def release(self) -> None:
        """Give the memory back."""
        self._keys, self._values = self._keys[..., :0, :].clone(), self._values[..., :0, :].clone()
