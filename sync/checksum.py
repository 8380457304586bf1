"""A 64-bit checksum of a tensor's dtype, shape and raw bytes, the same on every device.

The bytes, padded with zeros to whole rows, are a matrix of int64 words. A row's hash is the sum of its words times the
column weights, the tensor's sum is that of the hashes times the row weights, and a CRC of dtype and shape is added, all
modulo 2^64. The weights are odd, so any change within one word changes the result; other changes, and moved blocks,
are missed with a chance of about 2^-63. No order of summation is fixed, so every device, kernel and grouping agrees.

`checksum` is the definition. `checksums` gives the same numbers for hundreds of tensors at once: on a GPU with Triton a
dozen launches, one read of the memory and one copy to the host; without Triton a few launches per tensor, and still one
copy to the host.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch

ROW_WORDS = 1024
ROW_BYTES = 8 * ROW_WORDS
_CHUNK_ROWS = 2048  # 16 MiB: products of one chunk stay in a GPU's L2 cache between the two kernels that make them
_MASK = (1 << 64) - 1


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> int:
    """Checksum of any tensor: every dtype, NaN payloads and signed zeros included. Takes twice its memory."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    words_RC = torch.nn.functional.pad(flat, (0, -flat.numel() % ROW_BYTES)).view(torch.int64).view(-1, ROW_WORDS)
    hashes_R = (words_RC * _column_weights(flat.device)).sum(1)
    rows_R = torch.arange(len(hashes_R), device=flat.device)
    return _finish(tensor, int((hashes_R * _weights(rows_R)).sum()))


@torch.no_grad()
def checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """`checksum` of each tensor, in the order of `tensors`; waits for a device once, however many tensors it holds."""
    names_by_device: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        names_by_device.setdefault(tensor.device, []).append(name)
    sums: dict[str, int] = {}
    for device, names in names_by_device.items():
        sums.update(zip(names, _sums([tensors[name] for name in names], device), strict=True))
    return {name: sums[name] for name in tensors}


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where each row of several tensors comes from: `owner_R` names the tensor, `index_R` the row within it."""

    counts: Sequence[int]  # rows of each tensor
    headers: Sequence[int]
    owner_R: torch.Tensor  # int64
    index_R: torch.Tensor  # int64
    weights_R: torch.Tensor  # int64


def _sums(tensors: Sequence[torch.Tensor], device: torch.device) -> list[int]:
    layout = _lay_out(tuple((tensor.dtype, tensor.shape) for tensor in tensors), device)
    flats = [_aligned(tensor) for tensor in tensors]
    hashes_R = _hashes_by_kernel(flats, layout) if _has_kernel(device) else _hashes(flats, layout)
    sums_T = torch.zeros(len(tensors), dtype=torch.int64, device=device)
    sums_T.index_add_(0, layout.owner_R, hashes_R * layout.weights_R)
    return [(total + header) & _MASK for total, header in zip(sums_T.tolist(), layout.headers, strict=True)]


# Syncs are of the same few lists of tensors again and again; what is kept of one is 3/1000 of the tensors' memory.
@lru_cache(maxsize=4)
def _lay_out(forms: tuple[tuple[torch.dtype, torch.Size], ...], device: torch.device) -> _Layout:
    sizes_bytes = [dtype.itemsize * shape.numel() for dtype, shape in forms]
    counts = [-(-size // ROW_BYTES) for size in sizes_bytes]
    counts_T = torch.tensor(counts, device=device)
    owner_R = torch.repeat_interleave(torch.arange(len(counts), device=device), counts_T)
    first_T = counts_T.cumsum(0) - counts_T
    index_R = torch.arange(len(owner_R), device=device) - first_T[owner_R]
    return _Layout(counts, [_header(*form) for form in forms], owner_R, index_R, _weights(index_R))


def _hashes(tensors: Sequence[torch.Tensor], layout: _Layout) -> torch.Tensor:
    """Row hashes in plain torch. What does not fill a row is gathered with zeros behind it, and hashed together."""
    device = layout.owner_R.device
    flats = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]
    ragged = [n for n, flat in enumerate(flats) if flat.numel() % ROW_BYTES]
    tails_NB = torch.zeros(len(ragged), ROW_BYTES, dtype=torch.uint8, device=device)
    tail_rows: list[int] = []
    hashes_R = torch.empty(len(layout.owner_R), dtype=torch.int64, device=device)
    first = 0
    for flat, count in zip(flats, layout.counts, strict=True):
        whole = flat.numel() // ROW_BYTES
        if whole:
            _hash_words(flat[: whole * ROW_BYTES], hashes_R[first : first + whole])
        if whole < count:
            tail = flat[whole * ROW_BYTES :] if whole else flat
            tails_NB[len(tail_rows), : len(tail)] = tail
            tail_rows.append(first + whole)
        first += count
    tail_hashes_N = torch.empty(len(ragged), dtype=torch.int64, device=device)
    _hash_words(tails_NB.view(-1), tail_hashes_N)
    hashes_R[torch.tensor(tail_rows, dtype=torch.int64, device=device)] = tail_hashes_N
    return hashes_R


def _hash_words(flat: torch.Tensor, out_R: torch.Tensor) -> None:
    """Hashes of whole rows. CUDA has no integer matrix product, so there the products are summed chunk by chunk."""
    words_RC, weights_C = flat.view(torch.int64).view(-1, ROW_WORDS), _column_weights(flat.device)
    if flat.device.type == "cpu":
        torch.mv(words_RC, weights_C, out=out_R)
        return
    for start in range(0, len(words_RC), _CHUNK_ROWS):
        chunk = slice(start, start + _CHUNK_ROWS)
        torch.sum(words_RC[chunk] * weights_C, 1, out=out_R[chunk])


def _hashes_by_kernel(tensors: Sequence[torch.Tensor], layout: _Layout) -> torch.Tensor:
    from sync.checksum_kernel import row_hashes

    device = layout.owner_R.device
    addresses = array("q", [number for tensor in tensors for number in (tensor.data_ptr(), tensor.nbytes)])
    where_T2 = torch.frombuffer(addresses, dtype=torch.int64).view(-1, 2).to(device)  # many times faster than a list
    return row_hashes(where_T2, layout.owner_R, layout.index_R, _column_weights(device))


@lru_cache
def _has_kernel(device: torch.device) -> bool:
    return device.type == "cuda" and find_spec("triton") is not None


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it, with its values in order and beginning at a whole word of the memory."""
    whole = tensor.contiguous()
    at_word = whole.data_ptr() % 8 == 0 and whole.storage_offset() * whole.itemsize % 8 == 0
    return whole if at_word else whole.clone()


def _finish(tensor: torch.Tensor, total: int) -> int:
    return (total + _header(tensor.dtype, tensor.shape)) & _MASK


@lru_cache(maxsize=4096)
def _header(dtype: torch.dtype, shape: torch.Size) -> int:
    return zlib.crc32(f"{dtype} {list(shape)}".encode())


@lru_cache(maxsize=64)
def _column_weights(device: torch.device) -> torch.Tensor:
    return _weights(torch.arange(-ROW_WORDS, 0, device=device))  # not those of any row


def _weights(index: torch.Tensor) -> torch.Tensor:
    """Well-mixed odd int64 of each index (a round of splitmix64; int64 wraps around on every device)."""
    mixed = (index * -7046029254386353131) ^ 0x5851F42D4C957F2D
    mixed = (mixed ^ (mixed >> 31)) * -4658895280553007687
    return (mixed ^ (mixed >> 29)) | 1
