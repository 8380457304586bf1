"""Speculation changes no token: greedy and coupled rules give those of plain decoding, and log-probs are the policy's.

Every check is also run against an engine with an injected bug, and must then fail.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rollout_engine.sampling as sampling_module
from draft_models.eagle3 import Eagle3
from draft_models.randomness import gumbel
from draft_models.types import VerifyRule
from draft_models.verify import Noise, Verified, draw_noise, verify
from rollout_engine.decoder import Decoder
from rollout_engine.drafting import EagleDrafter
from rollout_engine.kv_cache import KVCache
from rollout_engine.rows import Row
from rollout_engine.sampling import Proposal, RowSampling
from rollout_engine.types import Sample
from tests.rollout_engine_helpers import (
    load_pair,
    make_engine,
    make_requests,
    run_engine,
    save_hf_model,
    tokens_of,
    total_spec,
)

Samples = dict[tuple[int, int], Sample]
NEAR_TIE = 1e-4


@pytest.fixture(scope="module")
def pair64(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Eagle3]:
    return load_pair(tmp_path_factory.mktemp("model64"))


@pytest.fixture(scope="module")
def pair32(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Eagle3]:
    return load_pair(tmp_path_factory.mktemp("model32"), torch.float32)


class Oracle:
    """Proposes what plain decoding is known to emit, and now and then something else."""

    def __init__(self, plain: Samples, error_every: int) -> None:
        self._texts = {key: s.request.prompt_ids + s.token_ids for key, s in plain.items()}
        self._error_every = error_every

    def propose(self, rows: list[Row], depth: int) -> Proposal:
        drafts = []
        for row in rows:
            text = self._texts[row.request.key]
            positions = range(len(row.tokens), len(row.tokens) + depth)
            right = [text[p] if p < len(text) else 0 for p in positions]
            drafts.append([(t + (p % self._error_every == 0)) % 40 for t, p in zip(right, positions, strict=True)])
        return Proposal(torch.tensor(drafts), None, [depth] * len(rows))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafter", ["random", "oracle"])
def test_tokens_of_plain_decoding_in_float64(
    pair64: tuple[Decoder, Eagle3], temperature: float, drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any depth, number of slots, admission order and draft."""
    decoder, draft = pair64
    requests = make_requests(temperature=temperature)
    plain = run_engine(make_engine(decoder, verify_rule="coupled"), requests)
    if drafter == "oracle":
        oracle = Oracle(plain, error_every=5)
        monkeypatch.setattr(EagleDrafter, "propose", lambda self, rows, depth, sampling: oracle.propose(rows, depth))
    for depth, slots in ((1, 16), (2, 1), (3, 5), (5, 16)):
        engine = make_engine(
            decoder, draft, verify_rule="coupled", speculative_num_steps=depth, max_running_requests=slots
        )
        order = requests[::-1] if slots == 5 else requests
        samples = run_engine(engine, order)
        assert tokens_of(samples) == tokens_of(plain)
        for key, sample in samples.items():
            assert sample.logprobs == pytest.approx(plain[key].logprobs, abs=1e-11)
            assert sample.finish_reason == plain[key].finish_reason
        spec = total_spec(samples)
        assert spec.num_accepted + spec.num_decode_steps >= sum(len(s.token_ids) - 1 for s in samples.values())
        assert spec.num_accepted > 0 or (drafter == "random" and temperature == 0)
        if drafter == "oracle" and depth > 1:
            assert spec.accept_length > 1.5


@pytest.mark.parametrize("rule", ["coupled", "rejection", "target_only"])
def test_reduced_draft_vocabulary(pair64: tuple[Decoder, Eagle3], rule: str) -> None:
    """A draft that proposes from every third token only: greedy and coupled tokens stay, and drafts are accepted."""
    decoder, whole = pair64
    sizes = dataclasses.replace(whole.config, draft_vocab_size=14)
    draft = Eagle3(sizes, seed=3, target_ids=torch.arange(0, 40, 3)).double()
    with torch.no_grad():
        draft.lm_head.weight.mul_(10.0)
    for temperature in (0.0, 1.0):
        requests = make_requests(temperature=temperature)
        plain = run_engine(make_engine(decoder, verify_rule=rule), requests)
        samples = run_engine(make_engine(decoder, draft, verify_rule=rule), requests)
        if rule == "coupled" or temperature == 0:
            assert tokens_of(samples) == tokens_of(plain)
        if temperature > 0:
            assert total_spec(samples).num_accepted > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ngrams_give_the_tokens_of_plain_decoding(pair64: tuple[Decoder, Eagle3], temperature: float) -> None:
    decoder, _ = pair64
    requests = make_requests(temperature=temperature, max_new_tokens=40, stop_token_ids=())
    plain = run_engine(make_engine(decoder, verify_rule="coupled"), requests)
    for slots in (3, 16):
        engine = make_engine(
            decoder, verify_rule="coupled", speculative_algorithm="NGRAM", ngram_min_match=1, max_running_requests=slots
        )
        samples = run_engine(engine, requests)
        assert tokens_of(samples) == tokens_of(plain)
        assert total_spec(samples).num_accepted > 0


def test_greedy_and_sampled_rows_in_one_batch(pair64: tuple[Decoder, Eagle3]) -> None:
    """A greedy row's tokens are the argmax whatever rule its neighbours use."""
    decoder, draft = pair64
    greedy, sampled = make_requests(temperature=0.0), make_requests(temperature=1.0, top_k=7, top_p=0.9)
    mixed = [(greedy, sampled)[i % 2][i] for i in range(len(greedy))]
    alone = run_engine(make_engine(decoder), greedy)
    for rule in ("rejection", "target_only", "coupled"):
        together = run_engine(make_engine(decoder, draft, verify_rule=rule), mixed)
        for key, sample in together.items():
            if sample.request.sampling.temperature == 0:
                assert sample.token_ids == alone[key].token_ids
                assert sample.logprobs == pytest.approx(alone[key].logprobs, abs=1e-11)


def first_difference(a: Sample, b: Sample) -> int | None:
    """Index of the first token at which two responses part; None when they do not."""
    pairs = zip(a.token_ids, b.token_ids, strict=False)
    parted = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
    if parted is None and len(a.token_ids) != len(b.token_ids):
        raise AssertionError("one response is a prefix of the other")
    return parted


@torch.no_grad()
def perturbed_gap(decoder: Decoder, sample: Sample, index: int) -> float:
    """Between the two highest scores (with the coupled rule's noise) of response token `index`."""
    text = sample.request.prompt_ids + sample.token_ids[:index]
    scores = teacher_forced(decoder, text)[-1].double()
    if sample.request.sampling.temperature > 0:
        seed, position = torch.tensor([sample.request.sampling.seed]), torch.tensor([[len(text)]])
        scores = scores.log_softmax(-1) + gumbel(seed, position, len(scores))[0, 0]
    top = scores.topk(2).values
    return float(top[0] - top[1])


def teacher_forced(decoder: Decoder, text: tuple[int, ...]) -> torch.Tensor:
    config = decoder.config
    cache = KVCache(config.num_layers, 1, config.num_kv_heads, config.head_dim, decoder.embed)
    cache.reserve(len(text))
    positions = torch.arange(len(text))[None]
    return decoder.logits(decoder.forward(torch.tensor([text]), positions, cache.view(1, len(text))).hidden_BMH)[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_of_plain_decoding_in_float32_up_to_near_ties(
    pair32: tuple[Decoder, Eagle3], temperature: float, record_property: Callable[[str, Any], None]
) -> None:
    decoder, draft = pair32
    requests = make_requests(6, 8, temperature=temperature)
    plain = run_engine(make_engine(decoder, verify_rule="coupled"), requests)
    samples = run_engine(make_engine(decoder, draft, verify_rule="coupled", max_running_requests=7), requests)
    parted = {key: first_difference(plain[key], samples[key]) for key in plain}
    near_ties = {key: index for key, index in parted.items() if index is not None}
    record_property("near_ties", len(near_ties))
    for key, index in near_ties.items():
        assert perturbed_gap(decoder, plain[key], index) < NEAR_TIE
    assert len(near_ties) <= 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_invariant_is_bitwise(pair32: tuple[Decoder, Eagle3], temperature: float) -> None:
    decoder, draft = pair32
    requests = make_requests(3, 3, temperature=temperature)
    common = {"verify_rule": "coupled", "batch_invariant": True}
    plain = run_engine(make_engine(decoder, **common), requests)
    for depth, slots in ((1, 9), (3, 2)):
        engine = make_engine(decoder, draft, speculative_num_steps=depth, max_running_requests=slots, **common)
        samples = run_engine(engine, requests[::-1])
        assert tokens_of(samples) == tokens_of(plain)
        assert all(samples[key].logprobs == plain[key].logprobs for key in plain)
    fast = run_engine(make_engine(decoder, draft, verify_rule="coupled"), requests)
    assert any(fast[key].logprobs != plain[key].logprobs for key in plain)  # the comparison can fail


@pytest.mark.parametrize("rule", ["rejection", "target_only", "coupled"])
@torch.no_grad()
def test_logprobs_are_those_of_a_teacher_forced_forward(rule: str, tmp_path: Path) -> None:
    """By Transformers and by the decoder; temperature inside, filters not."""
    decoder, draft = load_pair(tmp_path, torch.float32)
    model = save_hf_model(tmp_path)
    requests = make_requests(3, 3, temperature=0.7, top_k=9) + make_requests(6, 1, temperature=0.0)[3:]
    samples = run_engine(make_engine(decoder, draft, verify_rule=rule), requests)
    for sample in samples.values():
        text = sample.request.prompt_ids + sample.token_ids
        start = len(sample.request.prompt_ids)
        temperature = sample.request.sampling.temperature or 1.0
        for logits in (model(torch.tensor([text])).logits[0], teacher_forced(decoder, text)):
            table = (logits[start - 1 : -1] / temperature).log_softmax(-1)
            want = table.gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(sample.logprobs), want, atol=1e-4, rtol=0)


# ---------------------------------------------------------------- the draft's own arithmetic


@torch.no_grad()
def reference_chain(decoder: Decoder, draft: Eagle3, tokens: list[int], drafts: list[int]) -> list[torch.Tensor]:
    """Draft logits of a chain, from nothing: all captured states by one forward, then row after row."""
    config, sizes = decoder.config, draft.config
    length = len(tokens)
    cache = KVCache(config.num_layers, 1, config.num_kv_heads, config.head_dim, decoder.embed)
    own = KVCache(1, 1, sizes.num_key_value_heads, sizes.head_dim, decoder.embed)
    for c in (cache, own):
        c.reserve(length + len(drafts))
    view = own.view(1, length + len(drafts))
    text = torch.tensor([tokens])
    positions = torch.arange(length - 1)[None]
    aux = decoder.forward(text[:, :-1], positions, cache.view(1, length), capture=sizes.aux_layer_ids).aux_BMA
    assert aux is not None
    state = draft.step(decoder.embed[text[:, 1:]], draft.fuse(aux), positions, view.keys[0], view.values[0])[:, -1:]
    logits = [draft.logits(state)[0, 0]]
    for offset, token in enumerate(drafts[:-1]):
        position = torch.tensor([[length - 1 + offset]])
        state = draft.step(decoder.embed[torch.tensor([[token]])], state, position, view.keys[0], view.values[0])
        logits.append(draft.logits(state)[0, 0])
    return logits


def check_draft_logits(pair: tuple[Decoder, Eagle3], monkeypatch: pytest.MonkeyPatch, depths: list[int]) -> int:
    """Every proposal's logits against `reference_chain`, with depths that change from step to step."""
    decoder, draft = pair
    compared = 0
    propose, choose = EagleDrafter.propose, RowSampling.draft
    seen: list[torch.Tensor] = []

    def spying_draft(self: RowSampling, logits_BD: torch.Tensor, *rest: Any) -> Any:
        seen.append(logits_BD.clone())
        return choose(self, logits_BD, *rest)

    def spying_propose(self: EagleDrafter, rows: list[Row], depth: int, sampling: RowSampling) -> Proposal:
        nonlocal compared
        seen.clear()
        proposal = propose(self, rows, depth, sampling)
        for index, row in enumerate(rows):
            want = reference_chain(decoder, draft, row.tokens, proposal.tokens_BK[index].tolist())
            for step, logits in enumerate(want):
                torch.testing.assert_close(seen[step][index], logits, atol=1e-9, rtol=0)
                compared += 1
        return proposal

    monkeypatch.setattr(RowSampling, "draft", spying_draft)
    monkeypatch.setattr(EagleDrafter, "propose", spying_propose)
    engine = make_engine(decoder, draft, max_running_requests=5)
    plans = iter(depths * 1000)
    plan = type(engine.controller).plan
    monkeypatch.setattr(
        type(engine.controller), "plan", lambda self, n: type(plan(self, n))(depth := next(plans), n if depth else 0)
    )
    with torch.inference_mode():
        run_engine(engine, make_requests(3, 3))
    return compared


@pytest.mark.parametrize("depths", [[3], [0, 0, 0, 0, 3, 1, 0, 2]])
def test_draft_logits_equal_a_computation_from_nothing(
    pair64: tuple[Decoder, Eagle3], monkeypatch: pytest.MonkeyPatch, depths: list[int]
) -> None:
    """Slots, padding, lag and chains change nothing, also when speculation pauses for some steps."""
    assert check_draft_logits(pair64, monkeypatch, depths) > 60


def shift_chain_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    step = EagleDrafter._step

    def shifted(self: Any, tokens: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor, view: Any) -> Any:
        return step(self, tokens, hidden, positions + (tokens.shape[1] == 1), view)

    monkeypatch.setattr(EagleDrafter, "_step", shifted)


def stale_aux(monkeypatch: pytest.MonkeyPatch) -> None:
    record = EagleDrafter.record
    monkeypatch.setattr(EagleDrafter, "record", lambda self, p, aux: record(self, p, aux.roll(1, dims=1) * 1.01))


@pytest.mark.parametrize("bug", [shift_chain_positions, stale_aux])
def test_a_wrong_draft_is_noticed(
    pair64: tuple[Decoder, Eagle3], monkeypatch: pytest.MonkeyPatch, bug: Callable[[pytest.MonkeyPatch], None]
) -> None:
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        check_draft_logits(pair64, monkeypatch, [3])


# ---------------------------------------------------------------- injected bugs


def off_by_one_bonus(rule: VerifyRule, p: Any, q: Any, drafts: Any, num_drafts: Any, noise: Noise) -> Verified:
    """The last token is decided by the position before."""
    out = verify(rule, p, q, drafts, num_drafts, noise)
    tokens = out.tokens_BM.clone()
    if tokens.shape[1] > 1:
        tokens[:, -1] = tokens[:, -2]
    return Verified(tokens, out.num_accepted_B)


def accepts_all(rule: VerifyRule, p: Any, q: Any, drafts: Any, num_drafts: Any, noise: Noise) -> Verified:
    out = verify(rule, p, q, drafts, num_drafts, noise)
    tokens = out.tokens_BM.clone()
    tokens[:, :1] = drafts[:, :1] if drafts.shape[1] else tokens[:, :1]
    return Verified(tokens, out.num_accepted_B)


def shifted_noise(rule: VerifyRule, seeds: Any, first: torch.Tensor, k: int, vocab_size: int) -> Noise:
    """The engine asks for the random numbers of the next position when it speculates."""
    return draw_noise(rule, seeds, first + (k > 0), k, vocab_size)


@pytest.mark.parametrize(
    "name, bug", [("verify", off_by_one_bonus), ("verify", accepts_all), ("draw_noise", shifted_noise)]
)
def test_injected_bugs_change_tokens(
    pair64: tuple[Decoder, Eagle3], monkeypatch: pytest.MonkeyPatch, name: str, bug: Callable[..., Any]
) -> None:
    decoder, draft = pair64
    requests = make_requests()
    plain = run_engine(make_engine(decoder, verify_rule="coupled"), requests)
    monkeypatch.setattr(sampling_module, name, bug)
    assert tokens_of(run_engine(make_engine(decoder, draft, verify_rule="coupled"), requests)) != tokens_of(plain)


@pytest.mark.parametrize("rule", ["rejection", "target_only", "coupled"])
def test_siblings_have_random_streams_of_their_own(
    pair64: tuple[Decoder, Eagle3], rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, draft = pair64
    requests = make_requests(1, 8, max_new_tokens=20, stop_token_ids=())

    def num_distinct() -> int:
        return len(set(tokens_of(run_engine(make_engine(decoder, draft, verify_rule=rule), requests)).values()))

    assert num_distinct() == 8
    monkeypatch.setattr(sampling_module, "draw_noise", lambda rule, seeds, *rest: draw_noise(rule, seeds * 0, *rest))
    monkeypatch.setattr(
        RowSampling, "draft", lambda self, logits, *rest: (logits.argmax(-1), None)
    )  # so that only the target's stream is left
    assert num_distinct() == 1
