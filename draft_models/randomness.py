"""Counter-based random numbers: each is a pure function of (request seed, position, purpose).

Nothing is drawn from a shared generator, so a request's tokens do not depend on its batch, on the order of admission
or on how many drafts were thrown away. "Position" is always the sequence index, prompt included, of the token that
the number decides. The mixer is splitmix64 (Steele, Lea & Flood 2014), used as a keyed hash, written in int64
arithmetic that wraps the same way on CPU and CUDA.
"""

from __future__ import annotations

from enum import IntEnum, unique

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB
_MASK_64 = (1 << 64) - 1


class Purpose(IntEnum):
    """What a random number decides. Numbers of different purposes at one position are independent."""

    ACCEPT = 0  # accept or reject the draft token at this position
    RESIDUAL = 1  # the token itself when it is drawn from the target or from the residual
    DRAFT = 2  # the draft's own token
    GUMBEL = 3  # noise shared by target and draft, one value per token id


@unique  # two names of one step would be two texts drawn with the same numbers
class ReservedStep(IntEnum):
    """`step` of requests that belong to no step of training, whose steps begin at 0.

    No text may be drawn with numbers that verify another one: a draft which learned from it, or counted its tokens,
    would know them, and what it proposes would be no fair draw.
    """

    EVALUATION = -1  # greedy, so that the seed decides nothing
    ANSWERS = -2  # of the target, for a draft to learn from before a run
    VOCABULARY = -3  # of the policy, to choose the tokens of a reduced draft


def request_seed(run_seed: int, step: int, prompt_id: int, sample_id: int) -> int:
    """The 63-bit seed of one request; any change of any argument gives an unrelated seed.

    `step` is one of training, from 0 on, or a `ReservedStep`.
    """
    state = 0
    for word in (run_seed, step, prompt_id, sample_id):
        state = _mix_int((state ^ (word & _MASK_64)) + _GOLDEN)
    return state >> 1


def uniforms(seeds_B: Tensor, positions_BM: Tensor, purpose: Purpose) -> Tensor:
    """Uniform numbers in [0, 1), float64 [B, M], for int64 seeds [B] and positions [B, M]."""
    return unit_interval(hash_bits(seeds_B[:, None], positions_BM, int(purpose)))


def gumbel(seeds_B: Tensor, positions_BM: Tensor, vocab_size: int, token_ids: Tensor | None = None) -> Tensor:
    """Standard Gumbel noise, float64 [B, M, V], keyed by the *target's* token id.

    `token_ids` (int64 [D]) picks the target ids of a reduced draft vocabulary and gives [B, M, D], so that draft and
    target see the same noise for the same token.
    """
    if token_ids is None:
        token_ids = torch.arange(vocab_size, dtype=torch.int64, device=seeds_B.device)
    rows_BM = hash_bits(seeds_B[:, None], positions_BM, int(Purpose.GUMBEL))
    bits_BMV = _mix(rows_BM[..., None] + (token_ids + 1) * _signed(_GOLDEN))
    # 52 bits and a half keep u strictly inside (0, 1), so that both logarithms are finite.
    u_BMV = _top_bits(bits_BMV, 52).to(torch.float64).add_(0.5).mul_(2.0**-52)
    return u_BMV.log_().neg_().log_().neg_()


def hash_bits(seeds: Tensor, positions: Tensor, purpose: Tensor | int) -> Tensor:
    """64 mixed bits as int64 for every element of the broadcast arguments (all int64)."""
    offset = _signed((purpose + 1) * _GOLDEN) if isinstance(purpose, int) else (purpose + 1) * _signed(_GOLDEN)
    keys = _mix(seeds + offset)
    return _mix(keys + (positions + 1) * _signed(_GOLDEN))


def unit_interval(bits: Tensor) -> Tensor:
    """int64 random bits as float64 in [0, 1), on the grid of 2**-53."""
    return _top_bits(bits, 53).to(torch.float64).mul_(2.0**-53)


def _signed(value: int) -> int:
    value &= _MASK_64
    return value - (1 << 64) if value >> 63 else value


def _top_bits(bits: Tensor, count: int) -> Tensor:
    # `>>` on int64 carries the sign along; the mask makes it a logical shift.
    return (bits >> (64 - count)) & ((1 << count) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _top_bits(z, 64 - 30)) * _signed(_MULTIPLY_1)
    z = (z ^ _top_bits(z, 64 - 27)) * _signed(_MULTIPLY_2)
    return z ^ _top_bits(z, 64 - 31)


def _mix_int(z: int) -> int:
    z &= _MASK_64
    z = ((z ^ (z >> 30)) * _MULTIPLY_1) & _MASK_64
    z = ((z ^ (z >> 27)) * _MULTIPLY_2) & _MASK_64
    return z ^ (z >> 31)
