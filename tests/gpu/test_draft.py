"""On CUDA the random numbers are those of the CPU bit for bit, and so is every decision that they make in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from draft_models import text_attention
from draft_models.config import DraftConfig
from draft_models.losses import LossKind
from draft_models.randomness import Purpose, gumbel, uniforms
from draft_models.training import draft_loss, make_batch
from draft_models.types import DraftSample, VerifyRule
from draft_models.verify import draw_noise, inverse_cdf, sample_draft, target_probs, verify
from tests.draft_helpers import random_sample, small_draft
from trainer.draft_learner import DraftLearner, DraftSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
ROWS, K, VOCAB = 500, 3, 300


def on_gpu(samples: Sequence[DraftSample], dtype: torch.dtype | None = None) -> list[DraftSample]:
    """The samples' tensors on the GPU, floating-point ones in `dtype`; one output layer for all of them."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cuda() if dtype is None else tensor.cuda().to(dtype)

    head = moved(samples[0].target_head)
    return [
        replace(
            s,
            token_ids=s.token_ids.cuda(),
            embeds=moved(s.embeds),
            aux_hidden=moved(s.aux_hidden),
            target_hidden=moved(s.target_hidden),
            target_head=head,
        )
        for s in samples
    ]


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
    moved = on_gpu(samples)
    draft = small_draft(draft_vocab_size=11, dtype=torch.float64)
    cpu_batch, gpu_batch = make_batch(samples), make_batch(moved)
    assert cpu_batch is not None and gpu_batch is not None
    expected = draft_loss(draft, cpu_batch, 3, 0.8, rule)
    found = draft_loss(draft.cuda(), gpu_batch, 3, 0.8, rule)
    torch.testing.assert_close(found.loss_sum.cpu(), expected.loss_sum, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found.posterior_QK.cpu(), expected.posterior_QK, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", list(LossKind))
def test_losses_and_acceptances_are_those_of_the_cpu(kind: LossKind) -> None:
    samples = [random_sample(length, 4, seed, dtype=torch.float64) for seed, length in enumerate((9, 14, 30))]
    found = []
    for device in ("cpu", "cuda"):
        draft = small_draft(draft_vocab_size=11, dtype=torch.float64).to(device)
        batch = make_batch(samples if device == "cpu" else on_gpu(samples))
        assert batch is not None
        result = draft_loss(draft, batch, 3, 0.8, VerifyRule.COUPLED, loss=kind)
        result.loss_sum.backward()
        gradients = [weight.grad.cpu() for weight in draft.parameters() if weight.grad is not None]
        assert result.accept_K is not None
        found.append([result.loss_sum.detach().cpu(), result.accept_K.cpu(), result.overlap_K.cpu(), *gradients])
    for cpu, cuda in zip(*found, strict=True):
        torch.testing.assert_close(cuda, cpu, atol=1e-10, rtol=1e-8)


def long_samples(dtype: torch.dtype) -> list[DraftSample]:
    """Of lengths that are no multiple of a kernel's tile, with chains from the first row and from the last only."""
    shapes = [(60, 1), (33, 32), (47, 13), (17, 4), (64, 5), (6, 5)]
    return on_gpu([random_sample(length, prompt, seed) for seed, (length, prompt) in enumerate(shapes)], dtype)


def loss_and_gradient(samples: list[DraftSample]) -> tuple[torch.Tensor, torch.Tensor]:
    draft, batch = small_draft().cuda(), make_batch(samples)
    assert batch is not None
    result = draft_loss(draft, batch, 4, 0.8, product_dtype=torch.bfloat16)
    result.loss_sum.backward()
    gradients = [weight.grad.flatten() for weight in draft.parameters() if weight.grad is not None]
    return result.kl_K, torch.cat(gradients)


def test_flash_attention_trains_as_padded_products_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert text_attention.flash_can_run(torch.bfloat16, torch.device("cuda"), 8)
    flash_kl, flash_grad = loss_and_gradient(long_samples(torch.bfloat16))
    monkeypatch.setattr(text_attention, "flash_can_run", lambda *_: False)
    padded_kl, padded_grad = loss_and_gradient(long_samples(torch.bfloat16))
    torch.testing.assert_close(flash_kl, padded_kl, rtol=1e-2, atol=0)
    assert float((flash_grad - padded_grad).norm() / padded_grad.norm()) < 0.03


def test_bfloat16_products_train_as_float32_does() -> None:
    rough_kl, rough_grad = loss_and_gradient(long_samples(torch.bfloat16))
    draft, batch = small_draft().cuda(), make_batch(long_samples(torch.float32))
    assert batch is not None
    exact = draft_loss(draft, batch, 4, 0.8)
    exact.loss_sum.backward()
    exact_grad = torch.cat([weight.grad.flatten() for weight in draft.parameters() if weight.grad is not None])
    torch.testing.assert_close(rough_kl, exact.kl_K, rtol=3e-2, atol=0)
    assert torch.nn.functional.cosine_similarity(rough_grad, exact_grad, dim=0) > 0.99


@pytest.mark.parametrize("rule", [VerifyRule.REJECTION, VerifyRule.TARGET_ONLY])
@pytest.mark.parametrize("kind", list(LossKind))
def test_a_step_waits_for_the_device_nowhere(kind: LossKind, rule: VerifyRule) -> None:
    """From the batch to the gradients; the learner then reads its figures back once."""
    draft, samples = small_draft().cuda(), long_samples(torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = make_batch(samples)
        assert batch is not None
        loss = draft_loss(draft, batch, 3, 0.8, rule, loss=kind, product_dtype=torch.bfloat16)
        (loss.loss_sum / loss.token_count).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rule", [VerifyRule.REJECTION, VerifyRule.COUPLED])
@pytest.mark.parametrize("kind", list(LossKind))
def test_deterministic_training_repeats_bit_for_bit(deterministic: None, kind: LossKind, rule: VerifyRule) -> None:
    weights = []
    for _ in range(2):
        config = DraftConfig(compute_dtype="bfloat16", loss=kind, ema=0.9)
        learner = DraftLearner(small_draft().cuda(), config, DraftSettings(rule, 3))
        samples = long_samples(torch.bfloat16)
        for _ in range(3):
            learner.update(samples, [frozenset((s.prompt_id, s.sample_id) for s in samples)])
        weights.append(torch.cat([p.detach().flatten() for p in learner.served.parameters()]))
    assert torch.equal(*weights)
