"""Compares the stand-in index and tree ops with SGLang's own Triton kernels, in Triton's interpreter.

Run by `test_stand_in.py` in SGLang's environment, with TRITON_INTERPRET=1 and the stand-ins on PYTHONPATH; random
cases from a seed. Prints one line a kernel and fails at the first difference. Not compared: the attention ops,
`copy_all_layer_kv_cache` and `build_draft_decode_metadata`.
"""

import random
from collections.abc import Callable

import sgl_kernel
import torch
from sglang.kernels.ops.speculative import cache_locs, eagle, spec_tree
from sglang.srt.mem_cache import allocation

NUM_CASES = 30
CONTEXT = 40
Case = tuple[str, list[torch.Tensor], list[torch.Tensor]]


def power_of_two_from(n: int) -> int:
    return 1 << (n - 1).bit_length()


def slots_of_requests(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(pool rows, req_to_token, start, end) of a batch."""
    size = rng.randint(1, 5)
    rows = torch.tensor(rng.sample(range(8), size))
    req_to_token = torch.tensor(rng.sample(range(1000), 8 * CONTEXT), dtype=torch.int32).view(8, CONTEXT)
    start = torch.tensor([rng.randint(0, 20) for _ in range(size)])
    end = start + torch.tensor([rng.randint(0, 18) for _ in range(size)])
    return rows, req_to_token, start, end


def assign_to_pool(rng: random.Random) -> Case:
    rows, pool, start, end = slots_of_requests(rng)
    new = torch.tensor(rng.sample(range(2000, 3000), int((end - start).sum()) + 1))
    ours, theirs = pool.clone(), pool.clone()
    sgl_kernel.assign_req_to_token_pool_cpu(rows, ours, start, end, new, CONTEXT)
    kernel = allocation.assign_req_to_token_pool[(len(rows),)]
    kernel(rows, theirs, start, end, new, CONTEXT, power_of_two_from(len(rows)))
    return "assign_req_to_token_pool", [ours], [theirs]


def assign_extend(rng: random.Random) -> Case:
    rows, pool, start, end = slots_of_requests(rng)
    ours = torch.full((int((end - start).sum()) + 3,), -7)
    theirs = ours.clone()
    sgl_kernel.assign_extend_cache_locs_cpu(rows, pool, start, end, ours, CONTEXT)
    kernel = cache_locs.assign_extend_cache_locs[(len(rows),)]
    kernel(rows, pool, start, end, theirs, CONTEXT, power_of_two_from(len(rows)))
    return "assign_extend_cache_locs", [ours], [theirs]


def assign_draft(rng: random.Random) -> Case:
    rows, pool, start, _ = slots_of_requests(rng)
    topk, num_steps = rng.randint(1, 3), rng.randint(1, 4)
    ours = torch.full((len(rows) * topk * num_steps + 3,), -7)
    theirs = ours.clone()
    sgl_kernel.assign_draft_cache_locs_contiguous_cpu(rows, pool, start, ours, CONTEXT, topk, num_steps)
    kernel = cache_locs.assign_draft_cache_locs_contiguous[(len(rows),)]
    kernel(rows, pool, start, theirs, CONTEXT, topk, num_steps)
    return "assign_draft_cache_locs_contiguous", [ours], [theirs]


def bonus_tokens(rng: random.Random) -> Case:
    size, width = rng.randint(1, 5), rng.randint(1, 5)
    tokens = torch.randint(0, 100, (size, width))
    lengths = torch.tensor([rng.randint(1, width) for _ in range(size)])
    ours = torch.full((size,), -7)
    theirs = ours.clone()
    sgl_kernel.fill_bonus_tokens_cpu(tokens, lengths, ours, width)
    eagle.fill_bonus_tokens[(size,)](tokens, lengths, theirs, width)
    return "fill_bonus_tokens", [ours], [theirs]


def accepted_slots(rng: random.Random) -> Case:
    size = rng.randint(1, 12)
    index = torch.tensor([rng.choice([-1, i]) for i in range(size)], dtype=torch.int32)
    slots = torch.tensor(rng.sample(range(1000), size))
    ours = torch.full((size,), -7)
    theirs = ours.clone()
    sgl_kernel.fill_accept_out_cache_loc_cpu(index, slots, ours)
    eagle.fill_accept_out_cache_loc[(size,)](index, slots, theirs, power_of_two_from(size))
    return "fill_accept_out_cache_loc", [ours], [theirs]


def random_tree(rng: random.Random, topk: int, num_steps: int, n: int) -> tuple[list[int], list[int]]:
    """(selected candidates, parent list) as the draft's beam search lays them out; c is in group c // topk."""
    parent_list, num_candidates, first = [-1, *range(topk)], topk, 0
    for step in range(1, num_steps):
        first = 0 if step == 1 else topk + (step - 2) * topk * topk
        width = topk if step == 1 else topk * topk
        if step > 1:
            parent_list += sorted(rng.sample(range(first, first + width), topk))
        num_candidates += topk * topk
    parents = {c: 0 if c < topk else parent_list[c // topk] for c in range(num_candidates)}
    selected: list[int] = []
    while len(selected) < n - 1:
        free = [c for c in parents if c not in selected and (c < topk or parents[c] in selected)]
        selected.append(rng.choice(free))
    return sorted(selected), parent_list


def empty_links(size: int, n: int) -> list[torch.Tensor]:
    return [torch.full((size, n), -1) for _ in range(3)]


def tree(rng: random.Random) -> tuple[list[torch.Tensor], list[torch.Tensor], int, int]:
    """(outputs of the stand-in, outputs of the kernel: mask, positions, three links; requests, nodes)."""
    size, topk = rng.randint(1, 4), rng.randint(1, 3)
    num_steps = rng.randint(2, 4)
    n = rng.randint(2, num_steps + 1) if topk == 1 else rng.randint(2, 6)
    trees = [random_tree(rng, topk, num_steps, n) for _ in range(size)]
    selected = torch.tensor([chosen for chosen, _ in trees])
    parents = torch.tensor([parent for _, parent in trees])
    lengths = torch.tensor([rng.randint(1, 9) for _ in range(size)])
    mode = rng.randint(0, 1)
    mask = torch.ones(n * n * size + (n * int(lengths.sum()) if mode == 0 else 0), dtype=torch.bool)
    ours = [mask, torch.zeros(size * n, dtype=torch.long), *empty_links(size, n)]
    theirs = [tensor.clone() for tensor in ours]
    sgl_kernel.build_tree_kernel_efficient_cpu(parents, selected, lengths, *ours, topk, num_steps, n, mode)
    spec_tree.sgl_build_tree_kernel_efficient_triton[(size,)](
        parents,
        selected,
        lengths,
        lengths.cumsum(0) - lengths,
        *theirs,
        topk,
        num_steps,
        n,
        mode,
        size,
        parents.shape[1],
        selected.shape[1],
    )
    return ours, theirs, size, n


def build_tree(rng: random.Random) -> Case:
    ours, theirs, _, _ = tree(rng)
    return "build_tree_kernel_efficient", ours, theirs


def verify_tree(rng: random.Random) -> Case:
    (_, _, *links), _, size, n = tree(rng)
    candidates, target = torch.randint(0, 3, (size, n)), torch.randint(0, 3, (size, n))
    depth = rng.randint(2, 5)
    ours = [torch.full((size * n,), -7), torch.full((size, depth), -1), torch.zeros(size, dtype=torch.long)]
    theirs = [tensor.clone() for tensor in ours]
    sgl_kernel.verify_tree_greedy_cpu(*ours, candidates, *links, target)
    spec_tree.verify_tree_greedy_kernel_triton[(size,)](*theirs, candidates, *links, target, size, depth, n)
    return "verify_tree_greedy", ours, theirs


def links_of_mask(rng: random.Random) -> Case:
    """No kernel to compare with: the links that the tree's builder made must come back from its mask."""
    size, topk, num_steps, n = rng.randint(1, 3), 2, 3, rng.randint(2, 6)
    trees = [random_tree(rng, topk, num_steps, n) for _ in range(size)]
    lengths = torch.tensor([rng.randint(1, 9) for _ in range(size)])
    mask, links = torch.ones(n * n * size, dtype=torch.bool), empty_links(size, n)
    positions = torch.zeros(size * n, dtype=torch.long)
    selected, parents = (torch.tensor(list(column)) for column in zip(*trees, strict=True))
    sgl_kernel.build_tree_kernel_efficient_cpu(
        parents, selected, lengths, mask, positions, *links, topk, num_steps, n, 1
    )
    again = [torch.zeros_like(positions), *empty_links(size, n)]
    sgl_kernel.speculative.reconstruct_indices_from_tree_mask(mask, lengths, *again, size, n)
    return "reconstruct_indices_from_tree_mask", again, [positions, *links]


CASES: tuple[Callable[[random.Random], Case], ...] = (
    assign_to_pool,
    assign_extend,
    assign_draft,
    bonus_tokens,
    accepted_slots,
    build_tree,
    verify_tree,
    links_of_mask,
)


def main() -> None:
    for make in CASES:
        rng = random.Random(0)
        torch.manual_seed(0)
        for case in range(NUM_CASES):
            name, ours, theirs = make(rng)
            for index, (mine, reference) in enumerate(zip(ours, theirs, strict=True)):
                if not torch.equal(mine, reference):
                    raise SystemExit(f"{name}, case {case}, output {index}: {mine.tolist()} != {reference.tolist()}")
        print(f"{name}: {NUM_CASES} cases equal")


if __name__ == "__main__":
    main()
