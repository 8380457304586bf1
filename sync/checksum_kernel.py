# mypy: disable-error-code="import-not-found,no-untyped-def"
"""The row hashes of `sync.checksum` in one launch over tensors wherever they lie. Triton; CUDA only.

In eager torch, hundreds of tensors cost either thousands of launches or two more passes over the memory (gathering them
into rows, then writing out the products); this reads each byte once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def row_hashes(
    where_T2: torch.Tensor, owner_R: torch.Tensor, index_R: torch.Tensor, weights_C: torch.Tensor
) -> torch.Tensor:
    """int64 [R]. `where_T2`: int64 address (a multiple of 8) and size in bytes of each tensor; the rest int64 too."""
    hashes_R = torch.empty_like(owner_R)
    if len(owner_R):
        with torch.cuda.device_of(owner_R):
            _row_hash[(len(owner_R),)](hashes_R, where_T2, owner_R, index_R, weights_C, len(weights_C))
    return hashes_R


@triton.jit
def _row_hash(hashes_ptr, where_ptr, owner_ptr, index_ptr, weights_ptr, ROW_WORDS: tl.constexpr):
    row = tl.program_id(0)
    where = where_ptr + tl.load(owner_ptr + row) * 2
    start = tl.load(index_ptr + row) * (ROW_WORDS * 8)
    address = tl.load(where) + start
    num_bytes = tl.load(where + 1) - start  # from this row to the tensor's end
    column = tl.arange(0, ROW_WORDS)
    words = tl.load(address.to(tl.pointer_type(tl.int64)) + column, mask=column * 8 + 8 <= num_bytes, other=0)
    total = tl.sum(words * tl.load(weights_ptr + column), axis=0)
    # A last word that is not whole is put together from its bytes, zeros behind them.
    whole = num_bytes // 8
    lane = tl.arange(0, 8)
    position = whole * 8 + lane
    in_row = (position < num_bytes) & (position < ROW_WORDS * 8)
    tail = tl.load(address.to(tl.pointer_type(tl.uint8)) + position, mask=in_row, other=0)
    last_word = tl.sum(tail.to(tl.int64) << (lane * 8).to(tl.int64), axis=0)
    total += last_word * tl.load(weights_ptr + whole, mask=whole < ROW_WORDS, other=0)
    tl.store(hashes_ptr + row, total)
