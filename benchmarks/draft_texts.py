"""Texts that drafts are compared on: which prompts, sampled how, and what an n-gram would have won on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from draft_models.ngram import NgramDrafter
from draft_models.randomness import request_seed
from rollout_engine.types import RolloutRequest, Sample, SamplingParams

NGRAM_MATCH = (2, 8)  # the engine's defaults


def group_requests(
    prompts: Sequence[tuple[int, ...]], group: int, seed: int, sampling: SamplingParams, *, first_prompt_id: int = 0
) -> list[RolloutRequest]:
    """`group` siblings of every prompt; prompts are numbered from `first_prompt_id`, and random numbers follow."""
    return [
        RolloutRequest(number, i, prompt, replace(sampling, seed=request_seed(seed, 0, number, i)))
        for number, prompt in enumerate(prompts, start=first_prompt_id)
        for i in range(group)
    ]


def draw_prompts(
    prompts: Sequence[tuple[int, ...]], count: int, seed: int, weights: Sequence[float] | None = None
) -> list[tuple[int, ...]]:
    """`count` prompts in an order from the seed, none twice before all were drawn; with weights, likelier ones sooner.

    Weighted draws are without replacement by exponential keys (Efraimidis & Spirakis 2006).
    """
    rng = Random(seed)
    keys = [rng.expovariate(1.0) / (weights[row] if weights else 1.0) for row in range(len(prompts))]
    order = sorted(range(len(prompts)), key=keys.__getitem__)
    return [prompts[order[i % len(order)]] for i in range(count)]


def ngram_statistics(samples: Sequence[Sample], k: int) -> dict[str, float]:
    """What an n-gram drafter would have won on these texts, each seeing its earlier siblings whole, and itself.

    Its proposals are point masses, so on a given text they stand or fall by the target-only rule without chance.
    `ngram_tokens_per_verify` counts steps with a proposal; `ngram_tokens_per_forward` all.
    """
    drafter = NgramDrafter(*NGRAM_MATCH)
    steps = verifies = accepted = first = 0
    for sample in sorted(samples, key=lambda s: s.request.key):
        key, text = sample.request.key, sample.token_ids
        drafter.extend(key, (*sample.request.prompt_ids, *text[:1]))
        at = 1
        while at < len(text):
            proposal = drafter.propose(key, k)
            matched = _common_prefix(proposal, text[at:])
            steps, verifies = steps + 1, verifies + bool(proposal)
            accepted, first = accepted + matched, first + (matched > 0)
            drafter.extend(key, text[at : at + matched + 1])
            at += matched + 1
    return {
        "ngram_k": k,
        "ngram_proposes": verifies / max(steps, 1),
        "ngram_accept_rate_1": first / max(verifies, 1),
        "ngram_tokens_per_verify": 1 + accepted / max(verifies, 1),
        "ngram_tokens_per_forward": 1 + accepted / max(steps, 1),
    }


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
