"""Which KV slot belongs to which token. `req_to_token` [requests, context] holds the slots of every request."""

import ctypes

import torch


def assign_req_to_token_pool(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len):
    """Write the slots `out_cache_loc` (requests one after another) into positions [start, end) of each request."""
    at = 0
    for row, start, end in _rows(req_pool_indices, start_offset, end_offset):
        req_to_token[row, start:end] = out_cache_loc[at : at + end - start].to(req_to_token.dtype)
        at += end - start


def assign_extend_cache_locs(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len):
    """Read the slots of positions [start, end) of each request into `out_cache_loc`."""
    at = 0
    for row, start, end in _rows(req_pool_indices, start_offset, end_offset):
        out_cache_loc[at : at + end - start] = req_to_token[row, start:end].to(out_cache_loc.dtype)
        at += end - start


def assign_draft_cache_locs_contiguous(
    req_pool_indices, req_to_token, seq_lens, out_cache_loc, pool_len, topk, num_steps
):
    """Read the slots of the `topk * num_steps` positions after each request's end."""
    ends = seq_lens + topk * num_steps
    assign_extend_cache_locs(req_pool_indices, req_to_token, seq_lens, ends, out_cache_loc, pool_len)


def copy_all_layer_kv_cache(data_ptrs, strides, tgt_loc, src_loc):
    """In every buffer, copy rows `src_loc` to rows `tgt_loc`: all are read before one is written."""
    for base, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        rows = [ctypes.string_at(base + source * stride, stride) for source in src_loc.tolist()]
        for target, row in zip(tgt_loc.tolist(), rows, strict=True):
            ctypes.memmove(base + target * stride, row, stride)


def build_draft_decode_metadata(req_to_token, req_pool_indices, seq_lens, topk, num_steps, pool_len):
    """Slots seen by each of `topk` branches of each request: its prefix, then the branch's own `num_steps` slots."""
    width = int(seq_lens.max()) + num_steps
    slots = torch.zeros((seq_lens.numel() * topk, width), dtype=req_to_token.dtype)
    for index, (row, length) in enumerate(_rows(req_pool_indices, seq_lens)):
        for branch in range(topk):
            out = slots[index * topk + branch]
            own = length + branch * num_steps
            out[:length] = req_to_token[row, :length]
            out[length : length + num_steps] = req_to_token[row, own : own + num_steps]
    return slots


def _rows(*columns):
    return zip(*(column.tolist() for column in columns), strict=True)
