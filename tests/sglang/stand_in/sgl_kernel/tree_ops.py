"""Trees of draft tokens. A request has n nodes; node 0 is the last token that is already certain.

`next_token[i]` is the first child of node i and `next_sibling[i]` the next child of its parent, or -1;
`retrieve_index[i]` is its row in the batch's flat arrays.
"""

import torch


def fill_bonus_tokens(accept_tokens, accept_lens, bonus_tokens, accept_stride):
    """The last accepted token of each request; `accept_lens` counts it."""
    last = torch.arange(accept_lens.numel()) * accept_stride + accept_lens.long() - 1
    bonus_tokens[: last.numel()] = accept_tokens.flatten()[last].to(bonus_tokens.dtype)


def fill_accept_out_cache_loc(accept_index, out_cache_loc, accept_out_cache_loc):
    """Slots of the accepted tokens, close together; -1 in `accept_index` marks none."""
    accepted = accept_index.flatten()
    accepted = accepted[accepted > -1].long()
    accept_out_cache_loc[: accepted.numel()] = out_cache_loc[accepted].to(accept_out_cache_loc.dtype)


def rotate_input_ids(*args, **kwargs):
    raise NotImplementedError("rotate_input_ids: only drafts of several layers' heads (MTP) call this")


def build_tree(
    parent_list,
    selected_index,
    verified_seq_len,
    tree_mask,
    positions,
    retrieve_index,
    retrieve_next_token,
    retrieve_next_sibling,
    topk,
    depth,
    draft_token_num,
    tree_mask_mode,
):
    """Fill links, positions and the tree's attention mask from the candidates that the draft has chosen.

    `tree_mask_mode` 0: rows as long as the whole context, of which the prefix is left alone; 1: n x n.
    """
    n = draft_token_num
    lengths = verified_seq_len.tolist()
    rows = [tensor.view(-1, n) for tensor in (retrieve_index, retrieve_next_token, retrieve_next_sibling)]
    parent_list = parent_list.reshape(len(lengths), parent_list.numel() // len(lengths)).tolist()
    mask_start = 0
    for b, length in enumerate(lengths):
        parents = _parents(selected_index[b].tolist(), parent_list[b], topk, n)
        _link(parents, b * n, *(row[b] for row in rows))
        prefix = length if tree_mask_mode == 0 else 0
        mask = tree_mask[mask_start : mask_start + n * (prefix + n)].view(n, prefix + n)[:, prefix:]
        mask_start += n * (prefix + n)
        for node in range(n):
            path = _path(parents, node, depth)
            mask[node] = False
            mask[node, [0, *path]] = True
            positions[b * n + node] = length + len(path)


def _parents(selected, parent_list, topk, n):
    """Parent of nodes 1..n-1 (entry 0 is unused); None when it was not chosen itself."""
    parents = [0]
    for candidate in selected[: n - 1]:
        group = candidate // topk
        if group == 0:
            parents.append(0)
        else:
            parent = parent_list[group]
            parents.append(selected[: n - 1].index(parent) + 1 if parent in selected[: n - 1] else None)
    return parents


def _link(parents, first_row, retrieve_index, next_token, next_sibling):
    retrieve_index[:] = torch.arange(first_row, first_row + len(parents))
    for node in range(len(parents) - 1, 0, -1):  # backwards, so that each list of children ends up ascending
        parent = parents[node]
        if parent is not None:
            if next_token[parent] != -1:
                next_sibling[node] = next_token[parent]
            next_token[parent] = node


def _path(parents, node, depth):
    """`node` and its ancestors but for the root, at most `depth` of them."""
    path = []
    while node and len(path) < depth:
        path.append(node)
        node = parents[node]
    return path


def verify_tree_greedy(
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    target_predict,
):
    """Walk down from the root along children that equal the target's argmax; the last argmax is the bonus token."""
    target = target_predict.reshape(-1).tolist()
    for b, (tokens, rows, child, sibling) in enumerate(
        zip(*(t.tolist() for t in (candidates, retrive_index, retrive_next_token, retrive_next_sibling)), strict=True)
    ):
        path = [rows[0]]
        node = child[0]
        while node != -1 and len(path) < accept_index.shape[1]:
            if tokens[node] == target[path[-1]]:
                path.append(rows[node])
                node = child[node]
            else:
                node = sibling[node]
        accept_index[b, : len(path)] = torch.tensor(path, dtype=accept_index.dtype)
        accept_token_num[b] = len(path) - 1
        for row in path:
            predicts[row] = target[row]
