"""The acceptance forecast equals what decoding with the real `verify` shows, on the very same texts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from draft_models.forecast import EmittedTokens, accept_posterior, forecast_acceptance
from draft_models.types import VerifyRule
from draft_models.verify import draw_noise, sample_draft, verify

VOCAB, EOS, MAX_NEW, DEPTH, ROWS, PROMPT = 6, 0, 14, 3, 4000, 5
DRAFT_IDS = torch.tensor([0, 1, 3, 4])


@dataclass(frozen=True)
class Chain:
    """A target over one token of context; the draft has another law at each step of its chain."""

    p: Tensor  # [V, V]
    q_logits: Tensor  # [K, V, R]
    ids: Tensor | None
    temperature: float = 1.0

    def q(self, step: int, context: Tensor) -> Tensor:
        logits = self.q_logits[step, context]
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
        return (logits / self.temperature).softmax(-1)

    def full_q(self, step: int, context: Tensor) -> Tensor:
        q = self.q(step, context)
        return q if self.ids is None else torch.zeros(len(q), VOCAB).double().index_copy(1, self.ids, q)


def random_chain(ids: Tensor | None = None, temperature: float = 1.0) -> Chain:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64)
    columns = torch.arange(VOCAB) if ids is None else ids
    noise = torch.randn(DEPTH, VOCAB, len(columns), generator=generator, dtype=torch.float64)
    q_logits = logits[None, :, columns] + noise * torch.tensor([0.3, 0.8, 1.5])[:, None, None]
    if temperature == 0:
        p = torch.nn.functional.one_hot(logits.argmax(-1), VOCAB).double()
    else:
        p = (logits / temperature).softmax(-1)
    return Chain(p, q_logits, ids, temperature)


@dataclass(frozen=True)
class Decoded:
    text: Tensor  # [B, MAX_NEW] response
    length_B: Tensor
    histogram: Tensor  # [B, K + 1]
    proposed: Tensor  # [B, K]
    accepted: Tensor  # [B, K]


def decode(chain: Chain, rule: VerifyRule, depth: int) -> Decoded:
    """Speculative decoding to EOS or MAX_NEW tokens; what falls behind the end of a text is not counted."""
    seeds, row = torch.arange(ROWS), torch.arange(ROWS)
    text = torch.zeros(ROWS, MAX_NEW + depth + 2, dtype=torch.int64)
    start = torch.full((ROWS,), PROMPT)
    none = torch.zeros(ROWS, 0, dtype=torch.int64)
    first_p = chain.p[seeds % VOCAB][:, None]
    text[:, 0] = verify(rule, first_p, None, none, 0 * seeds, draw_noise(rule, seeds, start, 0, VOCAB)).tokens_BM[:, 0]
    done = torch.ones(ROWS, dtype=torch.int64)
    ended = text[:, 0] == EOS
    histogram = torch.zeros(ROWS, depth + 1)
    proposed, accepted = torch.zeros(ROWS, depth), torch.zeros(ROWS, depth)
    while not bool(ended.all()):
        context = text[row, done - 1]
        drafts, q, p = torch.zeros(ROWS, depth, dtype=torch.int64), [], [chain.p[context]]
        for step in range(depth):
            q.append(chain.full_q(step, context))
            drafts[:, step] = sample_draft(rule, chain.q(step, context), seeds, start + done + step, chain.ids)
            context = drafts[:, step]
            p.append(chain.p[context])
        num_drafts = torch.full((ROWS,), depth)
        noise = draw_noise(rule, seeds, start + done, depth, VOCAB)
        result = verify(rule, torch.stack(p, 1), torch.stack(q, 1), drafts, num_drafts, noise)
        emitted = torch.zeros(ROWS, dtype=torch.int64)
        for step in range(depth + 1):
            emits = ~ended & (step <= result.num_accepted_B)
            text[row[emits], done[emits] + step] = result.tokens_BM[emits, step]
            emitted += emits
            if step < depth:
                accepted[:, step] += emits & (step < result.num_accepted_B)
                proposed[:, step] += (emitted > 0) & (step < num_drafts)
            ended = ended | (emits & ((result.tokens_BM[:, step] == EOS) | (done + emitted >= MAX_NEW)))
        kept = torch.minimum(result.num_accepted_B, emitted)
        verified = (emitted > 0) & (num_drafts > 0)
        histogram[row[verified], kept[verified]] += 1
        done = done + emitted
    return Decoded(text[:, :MAX_NEW], done, histogram, proposed, accepted)


def posteriors(chain: Chain, rule: VerifyRule, decoded: Decoded, depth: int) -> Tensor:
    """[B, MAX_NEW - 1, K] from the texts alone."""
    seeds = torch.arange(ROWS)[:, None].expand(-1, MAX_NEW - 1)
    rank = torch.arange(MAX_NEW - 1).expand(ROWS, -1)
    out = torch.zeros(ROWS, MAX_NEW - 1, depth, dtype=torch.float64)
    for step in range(depth):
        inside = rank + step + 1 < decoded.length_B[:, None]
        context = decoded.text[inside.nonzero()[:, 0], rank[inside] + step]
        token = decoded.text[inside.nonzero()[:, 0], rank[inside] + step + 1]
        emitted = EmittedTokens(token, chain.p[context, token], seeds[inside], PROMPT + rank[inside] + step + 1)
        temperature = torch.full((len(token),), chain.temperature)
        out[inside, step] = accept_posterior(rule, chain.q_logits[step, context], temperature, emitted, chain.ids)
    return out


def differences(chain: Chain, rule: VerifyRule, depth: int, scored_by: Chain | None = None) -> Tensor:
    """Observed less forecast counts for groups of rows, [groups, counts]."""
    decoded = decode(chain, rule, depth)
    posterior = posteriors(scored_by or chain, rule, decoded, depth)
    rows = []
    for part in torch.arange(ROWS).split(40):
        part = part[decoded.length_B[part] > 1]
        chains = decoded.length_B[part] - 1
        flat = posterior[part][torch.arange(MAX_NEW - 1) < chains[:, None]]
        forecast = forecast_acceptance(flat, chains.tolist(), depth)
        expected = [*forecast.histogram, *forecast.proposed_by_position, *forecast.accepted_by_position]
        observed = torch.cat([decoded.histogram[part], decoded.proposed[part], decoded.accepted[part]], dim=1).sum(0)
        rows.append(observed.double() - torch.tensor(expected, dtype=torch.float64))
    return torch.stack(rows)


def worst_z(difference: Tensor) -> float:
    error = difference.std(0) / len(difference) ** 0.5
    return (difference.mean(0) / error.clamp(min=1e-9)).abs().max().item()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("ids", [None, DRAFT_IDS], ids=["whole", "reduced"])
def test_rejection_forecast_agrees_with_decoding(depth: int, ids: Tensor | None) -> None:
    difference = differences(random_chain(ids), VerifyRule.REJECTION, depth)
    assert difference.std() > 0.1  # the acceptance of one text is random, its expectation is not
    assert worst_z(difference) < 4


@pytest.mark.parametrize("rule", [VerifyRule.TARGET_ONLY, VerifyRule.COUPLED])
@pytest.mark.parametrize("ids", [None, DRAFT_IDS], ids=["whole", "reduced"])
def test_forecast_is_exact_where_the_text_decides(rule: VerifyRule, ids: Tensor | None) -> None:
    assert differences(random_chain(ids, temperature=0.8), rule, DEPTH).abs().max() < 1e-9


@pytest.mark.parametrize("rule", list(VerifyRule))
def test_forecast_is_exact_at_temperature_zero(rule: VerifyRule) -> None:
    assert differences(random_chain(temperature=0.0), rule, DEPTH).abs().max() < 1e-9


@pytest.mark.parametrize("rule", [VerifyRule.REJECTION, VerifyRule.TARGET_ONLY, VerifyRule.COUPLED])
def test_forecast_sees_a_draft_that_is_not_the_one_that_served(rule: VerifyRule) -> None:
    served = random_chain()
    stale = Chain(served.p, served.q_logits.flip(0), None)
    assert worst_z(differences(served, rule, DEPTH, scored_by=stale)) > 8


def test_forecast_by_hand() -> None:
    """A response of three tokens: a start at rank 0, then at rank 1 or 2 (the end)."""
    posterior = torch.tensor([[0.25, 0.5], [0.4, 0.0]])
    forecast = forecast_acceptance(posterior, [2], 2)
    assert forecast.histogram == pytest.approx((0.75 + 0.75 * 0.6, 0.25 * 0.5 + 0.75 * 0.4, 0.25 * 0.5))
    assert forecast.proposed_by_position == pytest.approx((1.75, 1.75))
    assert forecast.accepted_by_position == pytest.approx((0.25 + 0.75 * 0.4, 0.125))
    assert forecast.num_verify_steps == pytest.approx(1.75)
    assert forecast.accept_length == pytest.approx(1 + (0.25 + 0.3 + 0.125) / 1.75)
