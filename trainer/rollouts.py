"""Roll out: prompts become requests, samples come back and are scored. Only rank 0 holds the engine.

A request's seed is a function of (run seed, step, prompt, sample) alone, so siblings and epochs differ and nothing
depends on scheduling. Samples are put in (prompt_id, sample_id) order before anything looks at them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from draft_models.randomness import ReservedStep, request_seed
from rollout_engine.config import RolloutConfig
from rollout_engine.types import FinishReason, RolloutEngine, RolloutRequest, Sample, SamplingParams
from trainer.data import Prompt
from trainer.rewards import RewardFunction


@dataclass(frozen=True, slots=True)
class Generated:
    """Samples in (prompt_id, sample_id) order and the seconds that generating them took.

    `running` lists (seconds since the start, requests in a slot) whenever that number could change.
    """

    samples: tuple[Sample, ...]
    time_s: float
    running: tuple[tuple[float, int], ...]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One step: the scored samples, and those of the probe without speculation when there was one."""

    speculative: Generated
    plain: Generated | None

    @property
    def samples(self) -> tuple[Sample, ...]:
        return self.speculative.samples


def sampling_params(rollout: RolloutConfig) -> SamplingParams:
    """How the run's responses are sampled; seeds come with the requests."""
    return SamplingParams(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_new_tokens=rollout.max_response_len,
        stop=rollout.stop,
    )


def make_requests(
    prompts: Sequence[Prompt], sampling: SamplingParams, num_samples: int, run_seed: int, step: int
) -> list[RolloutRequest]:
    """`num_samples` requests for every prompt, siblings next to each other."""
    return [
        RolloutRequest(
            prompt.prompt_id,
            sample_id,
            prompt.token_ids,
            replace(sampling, seed=request_seed(run_seed, step, prompt.prompt_id, sample_id)),
        )
        for prompt in prompts
        for sample_id in range(num_samples)
    ]


def generate(engine: RolloutEngine, requests: Sequence[RolloutRequest], num_slots: int) -> Generated:
    """Run every request to its end; an engine of `num_slots` refills a slot as soon as it is free."""
    start_s = time.perf_counter()
    running = [(0.0, min(num_slots, len(requests)))]
    samples: list[Sample] = []
    for sample in engine.generate(requests):
        samples.append(sample)
        running.append((time.perf_counter() - start_s, min(num_slots, len(requests) - len(samples))))
    time_s = time.perf_counter() - start_s
    return Generated(tuple(sorted(samples, key=lambda sample: sample.request.key)), time_s, tuple(running))


def score(generated: Generated, prompts: Sequence[Prompt], reward: RewardFunction) -> Generated:
    """Give every sample its reward. Raises RewardError with the sample in it; a failure never becomes a number."""
    prompt_of = {prompt.prompt_id: prompt for prompt in prompts}
    scored = (replace(s, reward=reward(prompt_of[s.request.prompt_id], s)) for s in generated.samples)
    return replace(generated, samples=tuple(scored))


def evaluate(
    engine: RolloutEngine, prompts: Sequence[Prompt], sampling: SamplingParams, num_slots: int, reward: RewardFunction
) -> dict[str, float]:
    """Greedy reward over held-out prompts, and the share of answers cut off by the length limit."""
    greedy = replace(sampling, temperature=0.0, top_p=1.0, top_k=0)
    requests = make_requests(prompts, greedy, 1, 0, ReservedStep.EVALUATION)
    samples = score(generate(engine, requests, num_slots), prompts, reward).samples
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    truncated = sum(sample.finish_reason is FinishReason.LENGTH for sample in samples)
    return {"eval_reward": sum(rewards) / len(rewards), "eval_truncated": truncated / len(samples)}
