"""Random numbers are uniform, independent across every index, and functions of nothing else."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from draft_models.randomness import Purpose, ReservedStep, gumbel, request_seed, uniforms

ROWS, POSITIONS = 300, 300
KNOWN_SEED = 7687194474796967293
KNOWN_UNIFORM = 0.8300853645796666


def sibling_seeds(count: int) -> Tensor:
    return torch.tensor([request_seed(0, 3, 17, sample) for sample in range(count)])


def correlation(a: Tensor, b: Tensor) -> float:
    """z-score of the correlation of two sets of numbers."""
    return (torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] * a.numel() ** 0.5).item()


def numbers(purpose: Purpose = Purpose.ACCEPT) -> Tensor:
    return uniforms(sibling_seeds(ROWS), torch.arange(POSITIONS).expand(ROWS, -1), purpose)


def test_uniform() -> None:
    u = numbers()
    assert u.dtype == torch.float64
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u.float(), bins=100, min=0, max=1).double()
    expected = u.numel() / 100
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert 50 < chi_squared < 160  # 99 degrees of freedom
    assert abs((u - 0.5).mean().item()) * (12 * u.numel()) ** 0.5 < 4


def test_independent_across_every_index() -> None:
    u = numbers()
    assert abs(correlation(u[1:], u[:-1])) < 4  # siblings
    assert abs(correlation(u[:, 1:], u[:, :-1])) < 4  # positions
    assert abs(correlation(u[1:, 1:], u[:-1, :-1])) < 4  # a sibling that is one position ahead
    for first, second in itertools.combinations(Purpose, 2):
        assert abs(correlation(numbers(first), numbers(second))) < 4
    low_bits = (u * 2.0**53).long() & 0xFF
    assert abs(correlation(low_bits[1:].double(), low_bits[:-1].double())) < 4


def test_a_shared_stream_is_seen() -> None:
    """The same measures find siblings that draw from one stream, or from one stream shifted."""
    shared = uniforms(sibling_seeds(1).expand(ROWS), torch.arange(POSITIONS).expand(ROWS, -1), Purpose.ACCEPT)
    assert correlation(shared[1:], shared[:-1]) > 100
    shifted = uniforms(
        sibling_seeds(1).expand(ROWS), torch.arange(POSITIONS) + torch.arange(ROWS)[:, None], Purpose.ACCEPT
    )
    assert correlation(shifted[1:, :-1], shifted[:-1, 1:]) > 100


def test_no_collisions() -> None:
    seeds = {request_seed(*words) for words in itertools.product(range(12), repeat=4)}
    assert len(seeds) == 12**4
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    everything = torch.stack([numbers(purpose) for purpose in Purpose]).flatten()
    assert len(everything.unique()) == len(everything)


def test_seeds_of_plain_integers_work_too() -> None:
    u = uniforms(torch.arange(ROWS), torch.arange(POSITIONS).expand(ROWS, -1), Purpose.DRAFT)
    assert abs(correlation(u[1:], u[:-1])) < 4
    assert len(u.unique()) == u.numel()


def test_the_batch_does_not_matter() -> None:
    seeds, positions = sibling_seeds(5), torch.randint(1000, (5, 7), generator=torch.Generator().manual_seed(0))
    whole, noise = uniforms(seeds, positions, Purpose.DRAFT), gumbel(seeds, positions, 9)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(uniforms(seeds[order], positions[order], Purpose.DRAFT), whole[order])
    for row, column in itertools.product(range(5), range(7)):
        alone = seeds[row : row + 1], positions[row : row + 1, column : column + 1]
        assert uniforms(*alone, Purpose.DRAFT).item() == whole[row, column]
        assert torch.equal(gumbel(*alone, 9)[0, 0], noise[row, column])


def test_known_values_never_change() -> None:
    """Old runs stay reproducible: these numbers are part of the format."""
    assert request_seed(1, 2, 3, 4) == KNOWN_SEED
    assert uniforms(torch.tensor([7]), torch.tensor([[11]]), Purpose.RESIDUAL).item() == KNOWN_UNIFORM


def test_gumbel_law_and_ids() -> None:
    seeds, positions = sibling_seeds(200), torch.arange(100).expand(200, -1)
    noise = gumbel(seeds, positions, 5)
    assert noise.isfinite().all()
    count, euler = noise.numel(), 0.5772156649015329
    assert abs(noise.mean().item() - euler) / (1.6449340668 / count) ** 0.5 < 4
    below = (noise < 0).double().mean().item()
    expected = 0.36787944117  # exp(-1)
    assert abs(below - expected) / (expected * (1 - expected) / count) ** 0.5 < 4
    assert abs(correlation(noise[..., 1:], noise[..., :-1])) < 4
    ids = torch.tensor([4, 1])
    assert torch.equal(gumbel(seeds, positions, 5, ids), noise[..., ids])


def test_reserved_steps_are_none_of_trainings_and_have_seeds_of_their_own() -> None:
    assert all(step < 0 for step in ReservedStep)
    words = [(step, prompt) for step in (*ReservedStep, *range(50)) for prompt in range(50)]
    assert len({request_seed(0, step, prompt, 0) for step, prompt in words}) == len(words)
