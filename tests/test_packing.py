"""Micro-batches under a token budget."""

import random

import pytest

from trainer.packing import pack, split_evenly


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("seed", range(20))
def test_every_sample_once_within_the_budget_and_as_many_micro_batches_on_each_rank(dp_size, seed):
    draw = random.Random(seed)
    lengths = [draw.randrange(1, 70) for _ in range(draw.randrange(1, 40))]
    ranks = pack(lengths, 64, dp_size)
    assert len(ranks) == dp_size and len({len(rank) for rank in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= 64
        assert list(batch) == sorted(batch)
    assert ranks == pack(lengths, 64, dp_size)


def test_a_sample_over_the_budget_is_alone():
    assert pack([100, 10, 10], 64, 1) == [[(0,), (1, 2)]]


def test_micro_batches_are_balanced():
    # first fit alone would make 60 + 60 + 20
    (batches,) = pack([20] * 7, 60, 1)
    assert sorted(len(batch) for batch in batches) == [2, 2, 3]


def test_ranks_get_like_loads():
    lengths = [64, 60, 33, 32, 31, 30]
    loads = [sum(lengths[i] for batch in rank for i in batch) for rank in pack(lengths, 64, 2)]
    assert abs(loads[0] - loads[1]) <= 4


def test_fewer_samples_than_ranks_leaves_empty_micro_batches():
    assert pack([5], 64, 3) == [[(0,)], [()], [()]]


def test_split_evenly():
    assert [list(r) for r in split_evenly(7, 3)] == [[0, 1, 2], [3, 4], [5, 6]]
