"""On CUDA the random numbers are those of the CPU bit for bit, and so is every decision that they make in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from draft_models.randomness import Purpose, gumbel, uniforms
from draft_models.training import draft_loss, make_batch
from draft_models.types import VerifyRule
from draft_models.verify import draw_noise, inverse_cdf, sample_draft, target_probs, verify
from tests.draft_helpers import random_sample, small_draft

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
ROWS, K, VOCAB = 500, 3, 300


def test_random_numbers_are_those_of_the_cpu() -> None:
    seeds, positions = torch.arange(ROWS) * 2**53 + 7, torch.arange(90).expand(ROWS, -1)
    on_gpu = uniforms(seeds.cuda(), positions.cuda(), Purpose.ACCEPT).cpu()
    assert torch.equal(on_gpu, uniforms(seeds, positions, Purpose.ACCEPT))
    noise = gumbel(seeds, positions, 7)
    torch.testing.assert_close(gumbel(seeds.cuda(), positions.cuda(), 7).cpu(), noise, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("rule", list(VerifyRule))
def test_decisions_are_those_of_the_cpu(rule: VerifyRule) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, K + 1, VOCAB, generator=generator, dtype=torch.float64)
    q_logits = logits[:, :K] + 0.5 * torch.randn(ROWS, K, VOCAB, generator=generator, dtype=torch.float64)
    num_drafts = torch.randint(0, K + 1, (ROWS,), generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        top_p = torch.full((ROWS,), 0.9, device=device)
        seeds, first = torch.arange(ROWS, device=device), torch.full((ROWS,), 5, device=device)
        p, q = target_probs(logits.to(device), None, top_p), target_probs(q_logits.to(device), None)
        drafts = torch.stack([sample_draft(rule, q[:, j], seeds, first + j) for j in range(K)], dim=1)
        noise = draw_noise(rule, seeds, first, K, VOCAB)
        results.append(verify(rule, p, q, drafts, num_drafts.to(device), noise))
    cpu, cuda = results
    assert torch.equal(cpu.num_accepted_B, cuda.num_accepted_B.cpu())
    emitted = torch.arange(K + 1) <= cpu.num_accepted_B[:, None]
    assert torch.equal(cpu.tokens_BM[emitted], cuda.tokens_BM.cpu()[emitted])


def test_inverse_cdf_never_returns_a_token_of_weight_zero() -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    weights = torch.rand(500, 50_000, generator=generator, device="cuda") ** 8
    weights = weights.masked_fill(torch.rand(500, 50_000, generator=generator, device="cuda") < 0.9, 0.0)
    for u in (0.0, 0.3, 1 - 2.0**-24, 1 - 2.0**-53):
        index = inverse_cdf(weights, torch.full((500,), u, dtype=torch.float64, device="cuda"))
        assert (weights.gather(1, index[:, None]) > 0).all()


@pytest.mark.parametrize("rule", list(VerifyRule))
def test_training_is_that_of_the_cpu(rule: VerifyRule) -> None:
    samples = [random_sample(length, 4, seed, dtype=torch.float64) for seed, length in enumerate((9, 14, 30))]
    moved = [
        replace(
            s,
            token_ids=s.token_ids.cuda(),
            embeds=s.embeds.cuda(),
            aux_hidden=s.aux_hidden.cuda(),
            target_logits=s.target_logits.cuda(),
        )
        for s in samples
    ]
    draft = small_draft(draft_vocab_size=11, dtype=torch.float64)
    on_cpu, on_gpu = make_batch(samples), make_batch(moved)
    assert on_cpu is not None and on_gpu is not None
    expected = draft_loss(draft, on_cpu, 3, 0.8, rule)
    found = draft_loss(draft.cuda(), on_gpu, 3, 0.8, rule)
    torch.testing.assert_close(found.loss_sum.cpu(), expected.loss_sum, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found.posterior_QK.cpu(), expected.posterior_QK, atol=1e-10, rtol=1e-10)
