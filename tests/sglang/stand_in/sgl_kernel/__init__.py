"""Test-only stand-in for the CPU build of `sgl_kernel`, in plain torch. See the README beside it.

`SLIPSTREAM_STAND_IN=forbid` makes every op raise: a server that runs so shows that it needs none of them.
"""

import os

import torch

from sgl_kernel import attention, cache_ops, speculative, tree_ops

_FORBIDDEN = os.environ.get("SLIPSTREAM_STAND_IN") == "forbid"


def _exported(op):
    def forbidden(*args, **kwargs):
        raise RuntimeError(f"{op.__name__}: a stand-in kernel was called where none may be")

    return forbidden if _FORBIDDEN else op


assign_req_to_token_pool_cpu = _exported(cache_ops.assign_req_to_token_pool)
assign_extend_cache_locs_cpu = _exported(cache_ops.assign_extend_cache_locs)
assign_draft_cache_locs_contiguous_cpu = _exported(cache_ops.assign_draft_cache_locs_contiguous)
copy_all_layer_kv_cache_cpu = _exported(cache_ops.copy_all_layer_kv_cache)
build_draft_decode_metadata_cpu = _exported(cache_ops.build_draft_decode_metadata)
fill_bonus_tokens_cpu = _exported(tree_ops.fill_bonus_tokens)
fill_accept_out_cache_loc_cpu = _exported(tree_ops.fill_accept_out_cache_loc)
build_tree_kernel_efficient_cpu = _exported(tree_ops.build_tree)
verify_tree_greedy_cpu = _exported(tree_ops.verify_tree_greedy)
rotate_input_ids_cpu = _exported(tree_ops.rotate_input_ids)
speculative.reconstruct_indices_from_tree_mask = _exported(speculative.reconstruct_indices_from_tree_mask)
torch.ops.sgl_kernel.extend_attention_cpu = _exported(attention.extend_attention)
torch.ops.sgl_kernel.decode_attention_cpu = _exported(attention.decode_attention)
