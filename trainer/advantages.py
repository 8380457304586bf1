"""GRPO's group-relative advantages and DAPO's dynamic sampling. Pure.

A group is the samples of one prompt_id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rollout_engine.types import Sample

_EPS = 1e-6  # keeps a group of equal rewards at advantage 0


def group_advantages(rewards: Sequence[float], *, normalize_std: bool) -> list[float]:
    """reward - mean of the group, divided by the group's standard deviation when asked.

    GRPO (Shao et al. 2024) divides by the (n - 1) deviation; without it, Dr. GRPO (Liu et al. 2025). A group of one has
    advantage 0.
    """
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    if not normalize_std or len(rewards) == 1:
        return centred
    std = (sum(x * x for x in centred) / (len(rewards) - 1)) ** 0.5
    return [x / (std + _EPS) for x in centred]


def groups(samples: Sequence[Sample]) -> dict[int, list[Sample]]:
    """Samples by prompt_id, each group in sample_id order, groups in prompt_id order."""
    ordered: dict[int, list[Sample]] = {}
    for sample in sorted(samples, key=lambda s: s.request.key):
        ordered.setdefault(sample.request.prompt_id, []).append(sample)
    return ordered


def with_advantages(samples: Sequence[Sample], *, normalize_std: bool) -> list[Sample]:
    """The samples in (prompt_id, sample_id) order, each with its advantage. Every sample needs a reward."""
    result = []
    for group in groups(samples).values():
        rewards = [sample.reward for sample in group]
        if any(reward is None for reward in rewards):
            raise ValueError(f"prompt {group[0].request.prompt_id}: a sample has no reward; score samples first")
        values = group_advantages(rewards, normalize_std=normalize_std)  # type: ignore[arg-type]
        result += [replace(sample, advantage=value) for sample, value in zip(group, values, strict=True)]
    return result


def drop_groups_without_signal(samples: Sequence[Sample]) -> list[Sample]:
    """Dynamic sampling (DAPO, Yu et al. 2025): leaves out groups of equal rewards, whose advantages are 0."""
    kept = []
    for group in groups(samples).values():
        if len({sample.reward for sample in group}) > 1:
            kept += group
    return kept
