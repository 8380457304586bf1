"""A 64-bit checksum of a tensor's dtype, shape and raw bytes, the same on every device."""

from __future__ import annotations

import zlib
from functools import lru_cache

import torch

# Below this a CRC on the host is quicker than the dozen small tensor operations of the sums.
SMALL_BYTES = 1 << 18
ROW_WORDS = 4096
_MASK = (1 << 64) - 1


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> int:
    """Checksum of any tensor: every dtype, NaN payloads and signed zeros included.

    Small tensors: CRC-32 of the bytes; a CUDA tensor is copied to the host for it. Large ones: the bytes as
    a matrix of int64 words, row sums and column sums, each weighted by its index, modulo 2^64. That is one
    read of the memory per kind of sum, stays on the tensor's device, and does not depend on the order of
    summation, so CPU and CUDA agree. Any change within one 8-byte word changes the result; other changes and
    moved blocks are missed with a chance of about 2^-63 (CRC: 2^-32).
    """
    header = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
    bytes_flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if bytes_flat.numel() < SMALL_BYTES:
        return zlib.crc32(_host_bytes(bytes_flat), header)
    tail_start = bytes_flat.numel() // (8 * ROW_WORDS) * (8 * ROW_WORDS)
    tail = zlib.crc32(_host_bytes(bytes_flat[tail_start:]), header)
    return (_weighted_sums(bytes_flat[:tail_start]) + tail) & _MASK


def _host_bytes(bytes_flat: torch.Tensor) -> memoryview:
    return bytes_flat.cpu().numpy().data


def _weighted_sums(bytes_flat: torch.Tensor) -> int:
    """Sum over words of word * (column weight + row weight), modulo 2^64."""
    if bytes_flat.storage_offset() % 8:
        bytes_flat = bytes_flat.clone()  # a slice that begins inside a word cannot be viewed as words
    words_RC = bytes_flat.view(torch.int64).view(-1, ROW_WORDS)
    # Odd column and even row weights: their sum is odd, so a changed word can never be multiplied away.
    column_weights = _weights(ROW_WORDS, words_RC.device) | 1
    row_weights = _weights(words_RC.shape[0], words_RC.device) << 1
    columns = (words_RC.sum(0) * column_weights).sum()
    rows = (words_RC.sum(1) * row_weights).sum()
    return int((columns + rows).item()) & _MASK


@lru_cache(maxsize=64)
def _weights(count: int, device: torch.device) -> torch.Tensor:
    """Well-mixed int64 for 0..count-1 (a multiply-xorshift round of splitmix64; int64 wraps on every device)."""
    mixed = (torch.arange(1, count + 1, device=device) * -7046029254386353131) ^ 0x5851F42D4C957F2D
    mixed = (mixed ^ (mixed >> 31)) * -4658895280553007687
    return mixed ^ (mixed >> 29)
