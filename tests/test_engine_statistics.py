"""The whole engine samples from the policy: many tokens against teacher-forced probabilities.

Each statistic is a sum of (what happened - its probability given the text before), a martingale, over its standard
deviation: standard normal for an exact engine, whatever the depth, the draft or the stop of a chain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import draft_models.verify as verify_module
import rollout_engine.history_plan as plan_module
from draft_models.eagle3 import Eagle3
from rollout_engine.config import RolloutConfig, SpeculationConfig
from rollout_engine.decoder import Decoder
from rollout_engine.kv_cache import KVCache
from rollout_engine.sampling import Proposal, RowSampling
from rollout_engine.torch_engine import TorchEngine
from rollout_engine.types import RolloutRequest, SamplingParams, SpecStats
from tests.rollout_engine_helpers import load_pair, run_engine, total_spec

SIZES = {
    "vocab_size": 12,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
RESPONSE = 50
NO_HISTORY = SpeculationConfig()
HISTORY = SpeculationConfig(history=True, history_num_steps=5, history_min_match=1, history_min_confidence=0.0)
Pair = tuple[Decoder, Eagle3]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load_pair(tmp_path_factory.mktemp("model"), torch.float32, **SIZES)


def roll_out(pair: Pair, rule: str, num_tokens: int, history: SpeculationConfig = NO_HISTORY) -> torch.Tensor:
    """[N, 1 + RESPONSE] texts, each a prompt of one token and a response under `rule` at temperature 1."""
    requests = [
        RolloutRequest(i, 0, (i % 11,), SamplingParams(max_new_tokens=RESPONSE, seed=7919 * i + 1))
        for i in range(num_tokens // RESPONSE)
    ]
    config = RolloutConfig(controller="fixed", verify_rule=rule, max_running_requests=128 if history.history else 512)
    samples = run_engine(TorchEngine(pair[0], config, draft=pair[1], speculation=history), requests)
    spec = total_spec(samples)
    if history.history:
        of_history = spec.history or SpecStats()
        assert len(of_history.proposed_by_position) == 5
        assert min(of_history.num_verify_steps, spec.by_draft_model.num_verify_steps) > 0.2 * spec.num_verify_steps
        spec = spec.by_draft_model
    assert len(spec.accepted_histogram) == 4 and min(spec.accepted_histogram) > 0.005 * spec.num_verify_steps
    return torch.tensor([samples[r.key].request.prompt_ids + samples[r.key].token_ids for r in requests])


@torch.no_grad()
def teacher_forced(pair: Pair, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy's law p of each response token, and the law q that the draft has for it as a chain's first step;
    [N, RESPONSE, V] in float64. The draft has none for the first token, which gets p."""
    decoder, draft = pair
    config, sizes = decoder.config, draft.config
    num_rows, length = text.shape
    cache = KVCache(config.num_layers, num_rows, config.num_kv_heads, config.head_dim, decoder.embed)
    own = KVCache(1, num_rows, sizes.num_key_value_heads, sizes.head_dim, decoder.embed)
    for c in (cache, own):
        c.reserve(length)
    positions = torch.arange(length).expand(num_rows, -1)
    out = decoder.forward(text, positions, cache.view(num_rows, length), capture=sizes.aux_layer_ids)
    p = decoder.logits(out.hidden_BMH)[:, :-1].double().softmax(-1)
    assert out.aux_BMA is not None
    view = own.view(num_rows, length)
    embeds, hidden = decoder.embed[text[:, 1:-1]], draft.fuse(out.aux_BMA[:, :-2])
    state = draft.step(embeds, hidden, positions[:, :-2], view.keys[0], view.values[0])
    q = draft.logits(state).double().softmax(-1)
    return p, torch.cat((p[:, :1], q), dim=1)


def z_score(events: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Of independent-looking yes/no events, summed over the first axis."""
    variance = (probabilities * (1 - probabilities)).sum(0)
    return (events - probabilities).sum(0) / variance.clamp(min=1e-9).sqrt()


def statistics(pair: Pair, text: torch.Tensor, rule: str) -> dict[str, float]:
    parts = [teacher_forced(pair, rows) for rows in text.split(2048)]
    p, q = (torch.cat(tensors).flatten(0, 1) for tensors in zip(*parts, strict=True))
    tokens, before = text[:, 1:].flatten(), text[:, :-1].flatten()
    surprise = -p.gather(1, tokens[:, None])[:, 0].log()
    entropy = -torch.xlogy(p, p).sum(-1)
    variance = (p * p.clamp(min=1e-300).log().square()).sum(-1) - entropy**2
    happened = torch.nn.functional.one_hot(tokens, p.shape[1]).double()
    cells = torch.stack([z_score(happened[before == t], p[before == t]) for t in range(p.shape[1])])
    # What a faulty acceptance favours: the tokens that the draft likes more than the policy does.
    favoured = q > p if rule == "rejection" else torch.nn.functional.one_hot(q.argmax(-1), p.shape[1]).bool()
    return {
        "entropy": float((surprise - entropy).sum() / variance.sum().sqrt()),
        "cells": float(cells.abs().max()) - 0.8,  # the largest of 144 is about that much above a single one
        "favoured": float(z_score((happened * favoured).sum(-1), (p * favoured).sum(-1))),
    }


def check(pair: Pair, rule: str, num_tokens: int, history: SpeculationConfig = NO_HISTORY) -> None:
    for name, z in statistics(pair, roll_out(pair, rule, num_tokens, history), rule).items():
        assert abs(z) < 4, f"{name}: z = {z:.1f}"


@pytest.mark.parametrize("rule", ["rejection", "target_only"])
def test_hundred_thousand_tokens(pair: Pair, rule: str) -> None:
    check(pair, rule, 100_000)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["rejection", "target_only"])
def test_million_tokens(pair: Pair, rule: str) -> None:
    check(pair, rule, 1_000_000)


def in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one batch have drafts of the model and of history in every mixture, whatever was measured before."""
    turns = iter(range(10**9))
    monkeypatch.setattr(plan_module, "prefers_history", lambda gains, depth, width: next(turns) % 5 in (1, 2))


@pytest.mark.parametrize("rule", ["rejection", "target_only"])
def test_history_drafts_between_the_models(pair: Pair, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_turns(monkeypatch)
    check(pair, rule, 30_000, HISTORY)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["rejection", "target_only"])
@pytest.mark.parametrize("turns", [True, False])
def test_a_million_tokens_with_history(pair: Pair, rule: str, turns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if turns:
        in_turns(monkeypatch)
    check(pair, rule, 1_000_000, HISTORY if turns else replace(HISTORY, history_min_confidence=0.05))


def accept_more(factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    accept = verify_module.accept_probability

    def bug(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(verify_module, "accept_probability", lambda p, q: (factor * accept(p, q)).clamp(max=1))

    return bug


def stale_q(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification gets the draft's laws of the row before."""
    choose = RowSampling.choose

    def with_stale_q(self: Any, logits: Any, first: Any, proposal: Proposal | None) -> Any:
        if proposal is not None and proposal.probs_BKV is not None:
            proposal = Proposal(proposal.tokens_BK, proposal.probs_BKV.roll(1, dims=0), proposal.num_drafts)
        return choose(self, logits, first, proposal)

    monkeypatch.setattr(RowSampling, "choose", with_stale_q)


def whole_p_after_rejection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rejected token is drawn again from p instead of the residual."""
    monkeypatch.setattr(verify_module, "residual", lambda p, q: p)


@pytest.mark.parametrize(
    ("rule", "bug"),  # target_only has no q to be stale
    [("rejection", stale_q), ("rejection", whole_p_after_rejection), ("target_only", whole_p_after_rejection)],
)
def test_gross_bugs_are_noticed(
    pair: Pair, rule: str, bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bug(monkeypatch)
    with pytest.raises(AssertionError, match="z = "):
        check(pair, rule, 20_000)


def history_with_the_models_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification takes a token of history for one that the draft model drew."""
    with_given = Proposal.with_given

    def bug(self: Proposal, given: Any) -> Proposal:
        merged = with_given(self, given)
        if self.probs_BKV is None or merged.probs_BKV is None:
            return merged
        probs = merged.probs_BKV.clone()
        probs[:, : self.probs_BKV.shape[1]] = self.probs_BKV
        return replace(merged, probs_BKV=probs)

    monkeypatch.setattr(Proposal, "with_given", bug)


def test_a_wrong_law_for_history_is_noticed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    in_turns(monkeypatch)
    history_with_the_models_law(monkeypatch)
    with pytest.raises(AssertionError, match="z = "):
        check(pair, "rejection", 20_000, HISTORY)


@pytest.mark.parametrize("rule", ["rejection"])
def test_accepting_a_little_more_is_noticed(pair: Pair, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accept_more(1.06)(monkeypatch)
    with pytest.raises(AssertionError, match="z = "):
        check(pair, rule, 60_000)


@pytest.mark.slow
def test_accepting_one_percent_more_is_noticed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    accept_more(1.01)(monkeypatch)
    with pytest.raises(AssertionError, match="z = "):
        check(pair, "rejection", 1_000_000)
