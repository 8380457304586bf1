"""The gap between surprise and entropy: what tells an exact sampler from a biased one."""

from dataclasses import replace

import pytest
import torch

from rollout_engine.types import FinishReason, RolloutRequest, Sample, SamplingParams, VersionSpan
from trainer.config import AlgorithmConfig
from trainer.policy_batch import SUM_NAMES, make_micro_batch, policy_loss, surprise_metrics

TOKENS, VOCAB = 20_000, 40


def drawn_gaps(sharpness: float, *, with_old: bool = False) -> dict[str, float]:
    """Tokens drawn from p^sharpness, renormalised, where the policy's law is p."""
    generator = torch.Generator().manual_seed(0)
    logits_RV = 2 * torch.randn(TOKENS, VOCAB, generator=generator)
    tokens_R = torch.multinomial((sharpness * logits_RV).softmax(-1), 1, generator=generator)[:, 0]
    law_RV = logits_RV.log_softmax(-1)
    logp_R = law_RV.gather(1, tokens_R[:, None])[:, 0]
    entropy_R = -(law_RV.exp() * law_RV).sum(-1)
    request = RolloutRequest(0, 0, (1,), SamplingParams())
    spans = (VersionSpan(0, TOKENS, 0),)
    sample = Sample(request, tuple(tokens_R.tolist()), tuple(logp_R.tolist()), spans, FinishReason.LENGTH)
    batch = make_micro_batch([replace(sample, advantage=0.5)], [0], 1, torch.device("cpu"))
    old_logp_R = logp_R if with_old else None
    _, report = policy_loss(batch, logp_R, entropy_R, old_logp_R, None, AlgorithmConfig())
    sums = dict(zip(SUM_NAMES, report.sums.tolist(), strict=True))
    return surprise_metrics(report.num_tokens, sums["surprise_gap"], sums["surprise_gap_squared"])


def test_an_exact_sampler_has_no_gap():
    assert abs(drawn_gaps(1.0)["surprise_gap_z"]) < 4


@pytest.mark.parametrize(("sharpness", "sign"), [(1.1, -1), (0.9, 1)])
def test_a_biased_sampler_shows_though_its_log_probs_are_right(sharpness, sign):
    found = drawn_gaps(sharpness)
    assert sign * found["surprise_gap_z"] > 8
    assert sign * found["surprise_gap"] > 0.03


def test_no_gap_is_told_against_another_versions_entropy():
    assert drawn_gaps(1.1, with_old=True) == {}
