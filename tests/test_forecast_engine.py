"""What the whole engine observes is what is forecast from its texts: policy, draft, alignment and rules agree."""

from __future__ import annotations

import pytest
import torch

from draft_models.eagle3 import Eagle3
from draft_models.forecast import forecast_acceptance
from draft_models.training import accept_posteriors, make_batch
from draft_models.types import DraftSample, VerifyRule
from rollout_engine.decoder import Decoder
from rollout_engine.kv_cache import KVCache
from rollout_engine.types import RolloutRequest, Sample, SamplingParams, SpecStats
from tests.rollout_engine_helpers import load_pair, make_engine, run_engine

DEPTH = 3
NUM_PROMPTS = 40
SIBLINGS = 4
Pair = tuple[Decoder, Eagle3]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load_pair(tmp_path_factory.mktemp("model"), torch.float64, vocab_size=16, num_hidden_layers=4)


@torch.no_grad()
def captured(pair: Pair, sample: Sample) -> DraftSample:
    """As the policy's training forward would capture it."""
    decoder, draft = pair
    tokens = torch.tensor(sample.request.prompt_ids + sample.token_ids)
    config = decoder.config
    cache = KVCache(config.num_layers, 1, config.num_kv_heads, config.head_dim, decoder.embed)
    cache.reserve(len(tokens))
    positions = torch.arange(len(tokens))[None]
    out = decoder.forward(tokens[None], positions, cache.view(1, len(tokens)), capture=draft.config.aux_layer_ids)
    assert out.aux_BMA is not None
    return DraftSample(
        prompt_id=sample.request.prompt_id,
        sample_id=sample.request.sample_id,
        token_ids=tokens,
        embeds=decoder.embed[tokens],
        aux_hidden=out.aux_BMA[0],
        target_hidden=out.hidden_BMH[0],
        target_head=decoder.head,
        prompt_len=len(sample.request.prompt_ids),
        temperature=sample.request.sampling.temperature,
        seed=sample.request.sampling.seed,
        policy_version=0,
    )


def differences(pair: Pair, rule: VerifyRule, temperature: float, scored_by: Eagle3 | None = None) -> torch.Tensor:
    """Observed less forecast counts of each prompt's siblings, [prompts, counts]."""
    requests = [
        RolloutRequest(
            prompt,
            sibling,
            tuple((prompt * 5 + 3 * i) % 13 for i in range(2 + prompt % 4)),
            SamplingParams(temperature, max_new_tokens=20, seed=10_007 * prompt + 13 * sibling, stop_token_ids=(5,)),
        )
        for prompt in range(NUM_PROMPTS)
        for sibling in range(SIBLINGS)
    ]
    served = "rejection" if rule is VerifyRule.GREEDY else rule.value
    samples = run_engine(make_engine(*pair, verify_rule=served), requests)
    rows = []
    for prompt in range(NUM_PROMPTS):
        group = [samples[prompt, sibling] for sibling in range(SIBLINGS)]
        batch = make_batch([captured(pair, sample) for sample in group])
        if batch is None:
            continue
        posterior = accept_posteriors(scored_by or pair[1], batch, DEPTH, rule)
        forecast = forecast_acceptance(posterior, batch.num_chains, DEPTH)
        observed = sum((sample.spec for sample in group), SpecStats())
        expected = [forecast.histogram, forecast.proposed_by_position, forecast.accepted_by_position]
        counted = [observed.accepted_histogram, observed.proposed_by_position, observed.accepted_by_position]
        rows.append(
            [o - e for seen, due in zip(counted, expected, strict=True) for o, e in zip(seen, due, strict=True)]
        )
    return torch.tensor(rows, dtype=torch.float64)


def worst_z(difference: torch.Tensor) -> float:
    error = difference.std(0) / len(difference) ** 0.5
    return (difference.mean(0) / error.clamp(min=1e-9)).abs().max().item()


def test_rejection(pair: Pair) -> None:
    difference = differences(pair, VerifyRule.REJECTION, 0.9)
    assert difference.std() > 0.1
    assert worst_z(difference) < 4


@pytest.mark.parametrize(
    ("rule", "temperature"), [(VerifyRule.TARGET_ONLY, 1.0), (VerifyRule.COUPLED, 0.8), (VerifyRule.GREEDY, 0.0)]
)
def test_rules_whose_acceptance_the_text_decides(pair: Pair, rule: VerifyRule, temperature: float) -> None:
    assert differences(pair, rule, temperature).abs().max() < 1e-9


@pytest.mark.parametrize("rule", [VerifyRule.REJECTION, VerifyRule.TARGET_ONLY, VerifyRule.COUPLED])
def test_a_draft_that_did_not_serve_is_seen(pair: Pair, rule: VerifyRule) -> None:
    other = Eagle3(pair[1].config, seed=9).double()
    with torch.no_grad():
        other.lm_head.weight.mul_(40.0)
    difference = differences(pair, rule, 1.0, scored_by=other)
    if rule is VerifyRule.REJECTION:
        assert worst_z(difference) > 4
    else:
        assert (difference.abs().amax(1) > 0.5).double().mean() > 0.5
