"""The two attention ops of SGLang's backend `intel_amx`, by torch's scaled_dot_product_attention, a request at a time.

Axes: q [tokens, heads, head_dim]; key and value buffers [slots, kv_heads, head_dim].
"""

import torch
from torch.nn.functional import scaled_dot_product_attention


def extend_attention(
    q,
    k,
    v,
    out,
    key_buffer,
    value_buffer,
    k_scale,
    v_scale,
    req_to_token,
    req_pool_indices,
    seq_lens,
    extend_seq_lens,
    extend_start_loc,
    max_extend_len,
    scale,
    *features_and_mask,
):
    """The last `extend_seq_lens` tokens of each request attend to all of its tokens; K and V are stored already."""
    *features, tree_mask, is_causal = features_and_mask
    _refuse_unwritten(k_scale, v_scale, *features)
    columns = (req_pool_indices, seq_lens, extend_seq_lens, extend_start_loc)
    mask_at = 0
    for row, length, num_new, start in zip(*(column.tolist() for column in columns), strict=True):
        mask = torch.ones(num_new, length, dtype=torch.bool)
        if tree_mask is not None:  # n x n for each request, without its prefix
            mask[:, length - num_new :] = tree_mask[mask_at : mask_at + num_new**2].view(num_new, num_new).bool()
            mask_at += num_new**2
        elif is_causal:
            mask[:, length - num_new :].tril_()
        slots = req_to_token[row, :length].long()
        mine = slice(start, start + num_new)
        out[mine] = _attend(q[mine], key_buffer[slots], value_buffer[slots], mask, scale)


def decode_attention(
    q,
    key_buffer,
    value_buffer,
    k_scale,
    v_scale,
    out,
    k,
    v,
    out_cache_loc,
    attn_logits,
    req_to_token,
    req_pool_indices,
    seq_lens,
    scale,
    *features,
):
    """One token of each request attends to all of its tokens; its own K and V are stored here first."""
    _refuse_unwritten(k_scale, v_scale, *features)
    if k is not None:
        key_buffer[out_cache_loc] = k.view(-1, *key_buffer.shape[1:]).to(key_buffer.dtype)
        value_buffer[out_cache_loc] = v.view(-1, *value_buffer.shape[1:]).to(value_buffer.dtype)
    for i, (row, length) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
        slots = req_to_token[row, :length].long()
        out[i : i + 1] = _attend(q[i : i + 1], key_buffer[slots], value_buffer[slots], None, scale)


def _attend(q, k, v, mask, scale):
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k.to(q.dtype), v.to(q.dtype)))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def _refuse_unwritten(k_scale, v_scale, logit_cap, is_cross, window, encoder_lens, sinks):
    plain = k_scale == v_scale == 1.0 and not logit_cap and not is_cross and window <= 0
    if not plain or encoder_lens is not None or sinks is not None:
        raise NotImplementedError("stand-in attention: only plain causal or tree attention is written")
