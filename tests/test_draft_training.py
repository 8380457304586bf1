"""The unrolled training forward is the engine's computation; its loss and gradients are those of a plain version."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from draft_models import head_loss, losses, text_attention
from draft_models.eagle3 import Eagle3
from draft_models.forecast import EmittedTokens, accept_posterior
from draft_models.losses import LossKind
from draft_models.training import accept_posteriors, draft_loss, make_batch, unroll
from draft_models.types import DraftSample, VerifyRule
from tests.draft_helpers import TARGET_CONFIG, batch_of, random_sample, small_draft

DEPTH = 4


def mixed_samples(dtype: torch.dtype = torch.float32) -> list[DraftSample]:
    shapes = [(12, 5), (9, 3), (7, 5), (20, 1), (6, 5), (4, 3)]  # the last two have no chain
    return [random_sample(length, prompt, seed, dtype=dtype) for seed, (length, prompt) in enumerate(shapes)]


def incremental_logits(draft: Eagle3, sample: DraftSample, root: int, depth: int, fault: str = "") -> list[Tensor]:
    """As an engine drafts at `root`: prefix with the target's states, then the chain on its own states.

    `fault` makes the chain's first own step wrong in one way.
    """
    config = draft.config
    shape = (1, config.num_key_value_heads, len(sample.token_ids) + depth, config.head_dim)
    cache_k, cache_v = torch.zeros(shape, dtype=sample.embeds.dtype), torch.zeros(shape, dtype=sample.embeds.dtype)
    state = None
    for row in range(root + 1):  # one token at a time
        hidden = draft.fuse(sample.aux_hidden[row])[None, None]
        embeds = sample.embeds[row + 1][None, None]
        cache_k, cache_v = cache_k.clone(), cache_v.clone()
        state = draft.step(embeds, hidden, torch.tensor([[row]]), cache_k, cache_v)
    assert state is not None
    logits = [draft.logits(state)[0, 0]]
    for step in range(1, depth):
        if root + 2 + step >= len(sample.token_ids):
            break
        embeds = sample.embeds[root + 1 + step - (fault == "token")][None, None]
        hidden = draft.fuse(sample.aux_hidden[root])[None, None] if fault == "hidden" else state
        position = torch.tensor([[root + step + (fault == "position")]])
        # A fresh copy each time, so that autograd may keep the one that attention has read.
        cache_k, cache_v = cache_k.clone(), cache_v.clone()
        state = draft.step(embeds, hidden, position, cache_k, cache_v)
        logits.append(draft.logits(state)[0, 0])
    return logits


def chain_sources(samples: list[DraftSample]) -> list[tuple[int, int]]:
    """(sample, root) of every chain in the batch's order: by length."""
    by_length = sorted(enumerate(samples), key=lambda pair: len(pair[1].token_ids))
    return [
        (index, root) for index, sample in by_length for root in range(sample.prompt_len - 1, len(sample.token_ids) - 2)
    ]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@torch.no_grad()
def test_unroll_equals_incremental_steps(dtype: torch.dtype, tolerance: float) -> None:
    samples, draft = mixed_samples(dtype), small_draft(dtype=dtype)
    sources, batch = chain_sources(samples), batch_of(samples)
    logits = [draft.logits(state) for state in unroll(draft, batch, DEPTH)]
    for chain, (index, root) in enumerate(sources):
        expected = incremental_logits(draft, samples[index], root, DEPTH)
        assert len(expected) == min(DEPTH, int(batch.steps_left_Q[chain]))
        for step, expected_R in enumerate(expected):
            torch.testing.assert_close(logits[step][chain], expected_R, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("fault", ["position", "hidden", "token"])
@torch.no_grad()
def test_the_comparison_sees_a_fault(fault: str) -> None:
    samples, draft = mixed_samples(torch.float64), small_draft(dtype=torch.float64)
    right = [draft.logits(state) for state in unroll(draft, batch_of(samples), 2)]
    chain = chain_sources(samples).index((0, 5))
    wrong = incremental_logits(draft, samples[0], 5, 2, fault)[1]
    assert (wrong - right[1][chain]).abs().max() > 1e-3


def flash_stand_in(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, *rest: Any, scale: float) -> Any:
    """What torch's kernel computes, as one masked product: output, log-sum-exp [N, Q], and what is not read."""
    longest_q, longest_k, dropout, is_causal, _ = rest
    assert longest_q == ends_q.diff().max() and longest_k == ends_k.diff().max() and dropout == 0.0 and is_causal
    weights, lse = _flash_weights(q, k, ends_q, ends_k, scale)
    group = q.shape[1] // k.shape[1]
    out = torch.einsum("nqs,snd->qnd", weights, v.repeat_interleave(group, dim=1))
    return out, lse, None, None, None


def flash_backward_stand_in(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any, scale: float
) -> Any:
    """As the kernel does it: weights from the log-sum-exp that it is given, delta from the output that it is given."""
    ends_q, ends_k = rest[:2]
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    weights, own_lse = _flash_weights(q, k, ends_q, ends_k, scale)
    weights = weights * (own_lse - lse).exp()[..., None]
    delta_NQ = (grad * out).sum(-1).t()
    ds = weights * (torch.einsum("qnd,snd->nqs", grad, wide_v) - delta_NQ[..., None]) * scale
    dk, dv = torch.einsum("nqs,qnd->snd", ds, q), torch.einsum("nqs,qnd->snd", weights, grad)
    return torch.einsum("nqs,snd->qnd", ds, wide_k), *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))


def _flash_weights(q: Tensor, k: Tensor, ends_q: Tensor, ends_k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal from the END of each sequence, as FlashAttention aligns fewer queries than keys."""
    seen = torch.zeros(len(q), len(k), dtype=torch.bool)
    for (q0, q1), (k0, k1) in zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist()), strict=True):
        seen[q0:q1, k0:k1] = torch.ones(q1 - q0, k1 - k0).tril(k1 - k0 - (q1 - q0)).bool()
    scores = torch.einsum("qnd,snd->nqs", q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)) * scale
    scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1), scores.logsumexp(-1)


def test_flash_attention_is_asked_for_the_same_as_padded_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA kernel is stood in for by plain code with its signature: what is tested is the call and the merging."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_stand_in)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", flash_backward_stand_in)
    samples, draft = mixed_samples(torch.float64), small_draft(dtype=torch.float64)
    found = []
    for can_run in (False, True):
        monkeypatch.setattr(text_attention, "flash_can_run", lambda *_, can_run=can_run: can_run)
        draft.zero_grad()
        result = draft_loss(draft, batch_of(samples), DEPTH, 0.8)
        result.loss_sum.backward()
        found.append([result.loss_sum.detach(), *(weight.grad.clone() for weight in draft.parameters())])
    for padded, flash in zip(*found, strict=True):
        torch.testing.assert_close(padded, flash, atol=1e-12, rtol=1e-10)


def plain_loss(
    draft: Eagle3, samples: list[DraftSample], depth: int, decay: float, kind: LossKind = LossKind.FORWARD_KL
) -> Tensor:
    """The definition, one chain at a time: with torch's own kl_div, or cross-entropy on the token of the text."""
    total = torch.zeros((), dtype=torch.float64)
    for index, root in chain_sources(samples):
        sample = samples[index]
        for step, logits in enumerate(incremental_logits(draft, sample, root, depth)):
            p = (sample.target_logits[root + 1 + step] / sample.temperature).softmax(-1)
            if draft.target_ids is not None:
                p = p[draft.target_ids] / p[draft.target_ids].sum()
            log_q = (logits / sample.temperature).log_softmax(-1)
            token = sample.token_ids[root + 2 + step]
            at = token if draft.target_ids is None else (draft.target_ids == token).nonzero().flatten()
            value = torch.nn.functional.kl_div(log_q, p, reduction="sum")
            total = total + decay**step * (value if kind is LossKind.FORWARD_KL else -log_q[at].sum())
    return total


@pytest.mark.parametrize("kind", [LossKind.FORWARD_KL, LossKind.HARD_LABEL])
@pytest.mark.parametrize("draft_vocab_size", [0, 11])
def test_loss_and_gradients_equal_a_plain_version(draft_vocab_size: int, kind: LossKind) -> None:
    samples = [
        random_sample(8, 3, 1, dtype=torch.float64, temperature=0.7),
        random_sample(6, 4, 2, dtype=torch.float64),
        random_sample(9, 2, 3, dtype=torch.float64, temperature=1.5),
    ]
    draft = small_draft(draft_vocab_size=draft_vocab_size, dtype=torch.float64)
    result = draft_loss(draft, batch_of(samples), 3, 0.8, loss=kind)
    result.loss_sum.backward()
    gradients = {name: weight.grad.clone() for name, weight in draft.named_parameters()}
    draft.zero_grad()
    expected = plain_loss(draft, samples, 3, 0.8, kind)
    expected.backward()
    torch.testing.assert_close(result.loss_sum, expected, atol=1e-12, rtol=1e-12)
    assert result.token_count == len(chain_sources(samples))
    for name, weight in draft.named_parameters():
        torch.testing.assert_close(gradients[name], weight.grad, atol=1e-12, rtol=1e-10, msg=name)


def test_loss_sums_over_samples_in_any_split() -> None:
    """So that ranks can share the samples and divide by the global count."""
    samples, draft = mixed_samples(torch.float64), small_draft(dtype=torch.float64)
    whole = draft_loss(draft, batch_of(samples), 3, 0.8)
    parts = [draft_loss(draft, batch_of(samples[:2]), 3, 0.8), draft_loss(draft, batch_of(samples[2:]), 3, 0.8)]
    torch.testing.assert_close(whole.loss_sum, parts[0].loss_sum + parts[1].loss_sum, atol=1e-12, rtol=1e-12)
    assert whole.token_count == sum(part.token_count for part in parts)


def test_acceptance_sums_are_those_of_the_definitions() -> None:
    samples, draft = mixed_samples(torch.float64), small_draft(draft_vocab_size=11, dtype=torch.float64)
    result = draft_loss(draft, batch_of(samples), 2, 0.8)
    overlap, top1, agree = torch.zeros(2), torch.zeros(2), torch.zeros(2)
    for index, root in chain_sources(samples):
        for step, logits in enumerate(incremental_logits(draft, samples[index], root, 2)):
            p, q = samples[index].target_logits[root + 1 + step].softmax(-1), logits.softmax(-1)
            p_draft = p[draft.target_ids]
            overlap[step] += torch.minimum(p_draft, q).sum()
            top1[step] += p_draft[q.argmax()]
            agree[step] += q.argmax() == p_draft.argmax()
    for found, expected in zip((result.overlap_K, result.top1_K, result.agree_K), (overlap, top1, agree), strict=True):
        torch.testing.assert_close(found.float(), expected)


def test_forward_kl_is_zero_only_at_the_target() -> None:
    target_logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = losses.soft_target(target_logits, None)
    same = losses.compare(target_logits + 3.0, target)
    torch.testing.assert_close(same.kl, torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(same.overlap, torch.ones(5, dtype=torch.float64))
    assert (losses.compare(target_logits.roll(1, 1), target).kl > 0.01).all()


@pytest.mark.parametrize("elements", [1, 700, 1 << 30])
def test_pieces_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    samples, draft = mixed_samples(torch.float64), small_draft(draft_vocab_size=11, dtype=torch.float64)
    found = []
    for size in (5 * 40 * 3, elements):
        monkeypatch.setitem(head_loss._PIECE_ELEMENTS, "cpu", size)
        draft.zero_grad()
        result = draft_loss(draft, batch_of(samples), 3, 0.8, VerifyRule.REJECTION)
        result.loss_sum.backward()
        grads = [weight.grad.clone() for weight in draft.parameters()]
        found.append([result.loss_sum.detach(), result.overlap_K, result.posterior_QK, *grads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_the_coupled_figure_sorts_few_rows_of_a_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It estimates the sum over all rows by step; losses and gradients know nothing of it, nor does a forecast."""
    samples = [random_sample(30 + seed % 5, 2, seed, dtype=torch.float64) for seed in range(16)]
    draft, batch, num_sorted = small_draft(dtype=torch.float64), batch_of(samples), []
    exact = losses.coupled_acceptance

    def count(p_ND: Tensor, q: Tensor) -> Tensor:
        num_sorted.append(q.shape[1])
        return exact(p_ND, q)

    monkeypatch.setattr(losses, "coupled_acceptance", count)
    found = []
    for rows, elements in ((1 << 20, 1 << 21), (100, 1 << 21), (100, DEPTH * 40 * 7)):
        monkeypatch.setattr(head_loss, "_SORTED_ROWS", rows)
        monkeypatch.setitem(head_loss._PIECE_ELEMENTS, "cpu", elements)
        num_sorted.clear()
        found.append(draft_loss(draft, batch, DEPTH, 0.8, VerifyRule.COUPLED))
        assert sum(num_sorted) == sum(batch.num_chains) if rows > 100 else 50 < sum(num_sorted) <= 101
    whole, some, in_pieces = found
    torch.testing.assert_close(some.accept_K, in_pieces.accept_K)
    assert not torch.equal(some.accept_K, whole.accept_K)
    torch.testing.assert_close(some.accept_K, whole.accept_K, atol=0, rtol=0.1)
    torch.testing.assert_close(some.loss_sum, whole.loss_sum)
    num_sorted.clear()
    accept_posteriors(draft, batch, DEPTH, VerifyRule.COUPLED)
    assert not num_sorted


def test_a_forecast_computes_no_loss_and_says_what_the_training_forward_does(monkeypatch: pytest.MonkeyPatch) -> None:
    draft, batch = small_draft(), batch_of(mixed_samples(torch.float32))
    trained = draft_loss(draft, batch, DEPTH, 0.8, VerifyRule.REJECTION).posterior_QK
    monkeypatch.setattr(head_loss, "compare", None)
    monkeypatch.setattr(head_loss, "loss_and_gradient", None)
    assert torch.equal(accept_posteriors(draft, batch, DEPTH, VerifyRule.REJECTION), trained)


def test_every_step_is_in_the_coupled_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a step that a single chain reaches, in a text that is not the last."""
    monkeypatch.setattr(head_loss, "_SORTED_ROWS", 2)
    lengths = [(12, 6), *[(20, 18)] * 6]  # the longest prompts have one chain
    batch = batch_of([random_sample(*shape, seed, dtype=torch.float64) for seed, shape in enumerate(lengths)])
    result = draft_loss(small_draft(dtype=torch.float64), batch, 5, 0.8, VerifyRule.COUPLED)
    assert result.accept_K is not None and result.counts == (11, 4, 3, 2, 1) and (result.accept_K > 0).all()


# ---- packed samples, blocks, dtypes


@pytest.mark.parametrize("window", [0, 5, 8])
def test_packed_equals_unpacked(window: int) -> None:
    """Loss, figures, posteriors and every gradient of samples in one batch are those of each sample alone: no leak."""
    samples, draft = mixed_samples(torch.float64), small_draft(dtype=torch.float64)
    packed_batch = make_batch(samples, window=window)
    packed = draft_loss(draft, packed_batch, DEPTH, 0.8, VerifyRule.REJECTION, loss=LossKind.LK)
    packed.loss_sum.backward()
    gradients = [weight.grad.clone() for weight in draft.parameters()]
    draft.zero_grad()
    alone = []
    for sample in samples:
        batch = make_batch([sample], window=window)
        if batch is not None:
            alone.append((sample, draft_loss(draft, batch, DEPTH, 0.8, VerifyRule.REJECTION, loss=LossKind.LK)))
            alone[-1][1].loss_sum.backward()  # gradients add up, as over several forwards
    assert len(alone) == 4
    torch.testing.assert_close(packed.loss_sum, sum(result.loss_sum for _, result in alone), atol=1e-12, rtol=1e-12)
    for name in ("kl_K", "overlap_K", "top1_K", "accept_K"):
        torch.testing.assert_close(getattr(packed, name), sum(getattr(result, name) for _, result in alone))
    assert packed.counts == tuple(map(sum, zip(*(result.counts for _, result in alone), strict=True)))
    for found, weight in zip(gradients, draft.parameters(), strict=True):
        torch.testing.assert_close(found, weight.grad, atol=1e-12, rtol=1e-10)
    for index, (sample, result) in enumerate(alone):
        if not window:  # each sample's chains stand together
            mine = [at for at, (source, _) in enumerate(chain_sources(samples)) if samples[source] is sample]
            torch.testing.assert_close(
                packed.posterior_QK[mine], result.posterior_QK, atol=1e-12, rtol=0, msg=str(index)
            )


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("elements", [1, 3 * 4 * 17, 1 << 30])
def test_blocks_of_scores_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    samples, draft = mixed_samples(torch.float64), small_draft(dtype=torch.float64)
    found = []
    for size in (1 << 22, elements):
        monkeypatch.setitem(text_attention._SCORE_ELEMENTS, "cpu", size)
        draft.zero_grad()
        result = draft_loss(draft, batch_of(samples), DEPTH, 0.8)
        result.loss_sum.backward()
        found.append([result.loss_sum.detach(), *(weight.grad.clone() for weight in draft.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_a_long_texts_scores_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1000 tokens and 4 heads they would be 4 million numbers; nothing else is larger than [unroll, tokens, ...]."""
    monkeypatch.setitem(text_attention._SCORE_ELEMENTS, "cpu", 1 << 16)
    long_config = replace(small_draft().config, max_position_embeddings=1024)
    draft, batch = Eagle3(long_config), batch_of([random_sample(1000, 2, 0)])
    with LargestTensor() as largest:
        draft_loss(draft, batch, 4, 0.8).loss_sum.backward()
    assert 4 * 1000 * 32 <= largest.elements <= 4 * 1000 * 48


def test_bfloat16_products_stay_near_float32() -> None:
    """The same gradient but for rounding: its direction, its length, and the figures."""
    samples = [random_sample(24, 4, seed) for seed in range(12)]
    draft = small_draft()
    found = []
    for product_dtype in (None, torch.bfloat16):
        draft.zero_grad()
        result = draft_loss(draft, batch_of(samples), 3, 0.8, VerifyRule.REJECTION, product_dtype=product_dtype)
        result.loss_sum.backward()
        assert all(weight.grad.dtype == torch.float32 for weight in draft.parameters())
        found.append((result, torch.cat([weight.grad.flatten() for weight in draft.parameters()])))
    (exact, exact_grad), (rough, rough_grad) = found
    assert not torch.equal(exact.kl_K, rough.kl_K)  # the switch does something
    torch.testing.assert_close(rough.kl_K, exact.kl_K, rtol=0.02, atol=0)
    torch.testing.assert_close(rough.overlap_K, exact.overlap_K, rtol=0.02, atol=0)
    assert torch.nn.functional.cosine_similarity(exact_grad, rough_grad, dim=0) > 0.995
    assert float(rough_grad.norm() / exact_grad.norm()) == pytest.approx(1, abs=0.02)


class ProductDtypes(TorchDispatchMode):
    """The dtypes of every matrix product's operands."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.seen |= {x.dtype for x in args if isinstance(x, Tensor)}
        return func(*args, **(kwargs or {}))


def test_all_products_are_bfloat16_when_asked() -> None:
    half = torch.bfloat16
    samples = [random_sample(24, 4, seed, dtype=half) for seed in range(3)]
    with ProductDtypes() as products:
        draft_loss(small_draft(), batch_of(samples), 3, 0.8, product_dtype=half).loss_sum.backward()
    assert products.seen == {half}


def test_samples_of_two_forwards_make_no_batch() -> None:
    other = replace(random_sample(9, 3, 1), target_head=torch.eye(40))
    with pytest.raises(ValueError, match="different forwards"):
        make_batch([random_sample(9, 3, 0), other])


def test_samples_without_a_chain_make_no_batch() -> None:
    assert make_batch([random_sample(6, 5, 0), random_sample(4, 4, 1)]) is None


@pytest.mark.parametrize("rule", list(VerifyRule))
def test_posteriors_are_those_of_the_engines_chain(rule: VerifyRule) -> None:
    samples = [*mixed_samples(torch.float64), random_sample(9, 3, 77, temperature=0.0, dtype=torch.float64)]
    draft, batch = small_draft(draft_vocab_size=11, dtype=torch.float64), batch_of(samples)
    found = accept_posteriors(draft, batch, 3, rule)
    expected = torch.zeros_like(found)
    for chain, (index, root) in enumerate(chain_sources(samples)):
        sample = samples[index]
        for step, logits in enumerate(incremental_logits(draft, sample, root, 3)):
            place, token = root + 2 + step, sample.token_ids[root + 2 + step]
            p = (sample.target_logits[place - 1] / (sample.temperature or 1.0)).softmax(-1)
            emitted = EmittedTokens(token[None], p[token, None], torch.tensor([sample.seed]), torch.tensor([place]))
            temperature = torch.tensor([sample.temperature], dtype=torch.float64)
            expected[chain, step] = accept_posterior(rule, logits[None], temperature, emitted, draft.target_ids)[0]
    torch.testing.assert_close(found, expected)
    assert 0 <= found.min() <= found.max() <= 1


def test_training_follows_the_target() -> None:
    """A target whose law depends on its hidden state: the loss falls to a part of its start, on unseen samples too."""
    generator = torch.Generator().manual_seed(0)
    vocab, hidden = int(TARGET_CONFIG["vocab_size"]), int(TARGET_CONFIG["hidden_size"])
    readout, table = torch.randn(hidden, vocab, generator=generator), torch.randn(vocab, hidden, generator=generator)
    head = (readout / hidden**0.5 * 2).t().contiguous()

    def sample(seed: int) -> DraftSample:
        base = random_sample(16, 4, seed)
        embeds = table[base.token_ids]
        return DraftSample(
            base.prompt_id,
            base.sample_id,
            base.token_ids,
            embeds,
            torch.cat([embeds] * 3, dim=-1),
            embeds,
            head,
            base.prompt_len,
            base.temperature,
            base.seed,
            base.policy_version,
        )

    draft = Eagle3(small_draft().config, seed=0)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2, weight_decay=0.0)
    unseen = batch_of([sample(seed) for seed in range(1000, 1008)])
    before = float(draft_loss(draft, unseen, 3, 0.8).loss_sum.detach())
    for update in range(120):
        batch = batch_of([sample(16 * update + index) for index in range(16)])
        result = draft_loss(draft, batch, 3, 0.8)
        optimizer.zero_grad()
        (result.loss_sum / result.token_count).backward()
        optimizer.step()
    assert float(draft_loss(draft, unseen, 3, 0.8).loss_sum.detach()) < 0.3 * before
