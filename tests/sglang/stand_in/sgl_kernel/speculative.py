"""What SGLang imports from `sgl_kernel.speculative`: used by NGRAM."""


def reconstruct_indices_from_tree_mask(
    tree_mask,
    verified_seq_len,
    positions,
    retrieve_index,
    retrieve_next_token,
    retrieve_next_sibling,
    batch_size,
    draft_token_num,
):
    """Links and positions of trees that are given as masks: node i sees node j when j is i or an ancestor of it."""
    n = draft_token_num
    masks = tree_mask.view(-1)[: batch_size * n * n].view(batch_size, n, n).bool().tolist()
    flat = [tensor.view(-1) for tensor in (positions, retrieve_index, retrieve_next_token, retrieve_next_sibling)]
    for b, (mask, length) in enumerate(zip(masks, verified_seq_len.tolist(), strict=True)):
        parents = [max((j for j in range(i) if mask[i][j]), default=-1) for i in range(n)]
        for i in range(n):
            later = range(i + 1, n)
            child = next((k for k in later if mask[k][i]), -1)
            sibling = next((k for k in later if parents[i] >= 0 and parents[k] == parents[i]), -1)
            values = (length + sum(mask[i][:i]), b * n + i, child, sibling)
            for tensor, value in zip(flat, values, strict=True):
                tensor[b * n + i] = value
