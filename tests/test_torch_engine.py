"""The engine around the arithmetic: slots, shared prompts, stops, limits, abort, weight versions, bad input."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from draft_models.eagle3 import Eagle3
from rollout_engine.decoder import Decoder
from rollout_engine.prefill import PrefixCache
from rollout_engine.rows import SpecCounts
from rollout_engine.speculation import CostTable
from rollout_engine.stopping import kept_before_stop
from rollout_engine.types import (
    BadRequest,
    EngineConfigError,
    EngineError,
    FinishReason,
    RolloutRequest,
    SamplingParams,
    SpecStats,
)
from sync.checksum import checksum
from sync.receiver import Bundle, WeightReceiver
from tests.rollout_engine_helpers import (
    load_pair,
    make_engine,
    make_requests,
    run_engine,
    tokens_of,
    total_spec,
)

Pair = tuple[Decoder, Eagle3]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load_pair(tmp_path_factory.mktemp("model"))


def text_of(tokens: object) -> str:
    """A detokenizer: token 3 is "d", 29 is "3d"; so "3d" may come in one token or in two."""
    words = {29: "3d", 30: "ab", 31: "c"}
    return "".join(words.get(t, "0123456789abcdefghijklmnopqrstuvwxyzABCD"[t]) for t in tokens)  # type: ignore[attr-defined]


# ---------------------------------------------------------------- stops and limits


def test_kept_before_stop() -> None:
    stop = frozenset({9})
    assert kept_before_stop([1, 2, 3], 2, stop, (), None) is None
    assert kept_before_stop([1, 2, 9, 4, 9], 4, stop, (), None) == 2
    assert kept_before_stop([9, 2, 3], 2, stop, (), None) is None  # an earlier step's tokens are not looked at again
    assert kept_before_stop([1, 2, 30, 31, 5], 3, frozenset(), ("abc",), text_of) == 2
    assert kept_before_stop([1, 30, 31, 5], 2, frozenset(), ("bc", "zz"), text_of) == 1
    assert kept_before_stop([1, 30], 1, frozenset(), ("b",), text_of) == 1


def test_counts_leave_out_what_lies_behind_the_end() -> None:
    counts = SpecCounts()
    counts.add_step(0, 0, 1)
    counts.add_step(3, 3, 4)
    counts.add_step(3, 3, 2)
    counts.add_step(2, 0, 1)
    stats = counts.stats()
    assert (stats.num_decode_steps, stats.num_verify_steps) == (4, 3)
    assert stats.accepted_histogram == (1, 0, 1, 1)
    assert stats.proposed_by_position == (3, 3, 2)
    assert stats.accepted_by_position == (2, 2, 1)


def test_counts_tell_history_from_the_draft_model() -> None:
    parts, whole = [], SpecCounts()
    for steps in ([(3, 1, 2, True), (0, 0, 1, False), (2, 2, 3, False)], [(2, 0, 1, False)], [(5, 5, 6, True)]):
        counts = SpecCounts()
        for drafts, accepted, kept, from_history in steps:
            for each in (counts, whole):
                each.add_step(drafts, accepted, kept, from_history=from_history)
        parts.append(counts.stats())
    total = sum(parts, SpecStats())
    assert total == whole.stats() and (total.num_decode_steps, total.num_verify_steps, total.num_accepted) == (5, 4, 8)
    assert total.history == SpecStats(2, 2, (0, 1, 0, 0, 0, 1), (2, 2, 2, 1, 1), (2, 1, 1, 1, 1))
    assert total.by_draft_model == SpecStats(3, 2, (1, 0, 1), (2, 2), (1, 1))
    assert parts[1].history is None and parts[1].by_draft_model is parts[1]
    assert parts[2].by_draft_model == SpecStats()


def test_stop_strings_and_ids_across_speculative_steps(pair: Pair) -> None:
    """The same text, cut at the same token, with and without drafts; the completing token is kept."""
    decoder, draft = pair
    free = run_engine(make_engine(decoder, verify_rule="coupled"), make_requests(max_new_tokens=40, stop_token_ids=()))
    stop = ("3d", "ab", "7", "k5")
    requests = make_requests(max_new_tokens=40, stop_token_ids=(12,), stop=stop)
    num_stopped = 0
    for drafted in (None, draft):
        samples = run_engine(
            make_engine(decoder, drafted, verify_rule="coupled", eos_token_ids=(2,), detokenize=text_of), requests
        )
        for key, sample in samples.items():
            whole = free[key].token_ids
            ends = [n for n in range(1, 41) if whole[n - 1] in (2, 12) or any(s in text_of(whole[:n]) for s in stop)]
            assert sample.token_ids == whole[: ends[0] if ends else 40]
            assert len(sample.logprobs) == len(sample.token_ids)
            assert sample.finish_reason == (FinishReason.STOP if ends else FinishReason.LENGTH)
            num_stopped += bool(ends)
    assert num_stopped > 10


def test_limits_are_exact(pair: Pair) -> None:
    decoder, draft = pair
    requests = make_requests(3, 3, stop_token_ids=())
    requests = [
        dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, max_new_tokens=n))
        for r, n in zip(requests, (1, 2, 3, 4, 5, 6, 7, 90, 91), strict=True)
    ]
    samples = run_engine(make_engine(decoder, draft), requests)
    for request in requests:
        sample = samples[request.key]
        assert len(sample.token_ids) == min(request.sampling.max_new_tokens, 96 - len(request.prompt_ids))
        assert sample.finish_reason is FinishReason.LENGTH


# ---------------------------------------------------------------- slots and prompts


def test_more_requests_than_slots_and_the_prompt_is_computed_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, draft = pair
    computed: list[tuple[int, ...]] = []
    compute = PrefixCache._compute
    monkeypatch.setattr(
        PrefixCache, "_compute", lambda self, prompts: computed.extend(prompts) or compute(self, prompts)
    )
    requests = make_requests(5, 6)
    engine = make_engine(decoder, draft, max_running_requests=4)
    samples = run_engine(engine, requests)
    assert sorted(computed) == sorted({request.prompt_ids for request in requests})
    assert not engine._prefixes._prefixes and not engine._prefixes._waiting
    assert run_engine(engine, requests) == samples  # again, and nothing of the first run is left


def test_sibling_prompts_equal_separate_prefills(pair: Pair) -> None:
    decoder, draft = pair
    requests = make_requests(2, 4)
    together = run_engine(make_engine(decoder, draft), requests)
    for request in requests:
        alone = run_engine(make_engine(decoder, draft), [request])[request.key]
        assert alone.token_ids == together[request.key].token_ids
        assert alone.logprobs == pytest.approx(together[request.key].logprobs, abs=1e-11)
        assert alone.spec == together[request.key].spec


def test_prompt_of_one_token(pair: Pair) -> None:
    decoder, draft = pair
    requests = [RolloutRequest(p, 0, (p,), SamplingParams(max_new_tokens=9, seed=p)) for p in range(4)]
    plain = run_engine(make_engine(decoder, verify_rule="coupled"), requests)
    assert tokens_of(run_engine(make_engine(decoder, draft, verify_rule="coupled"), requests)) == tokens_of(plain)


# ---------------------------------------------------------------- abort


def test_abort_some_then_all(pair: Pair) -> None:
    decoder, draft = pair
    requests = make_requests(4, 4, max_new_tokens=60, stop_token_ids=())
    requests[0] = dataclasses.replace(requests[0], sampling=dataclasses.replace(requests[0].sampling, max_new_tokens=4))
    full = run_engine(make_engine(decoder, draft, verify_rule="coupled"), requests)
    engine = make_engine(decoder, draft, verify_rule="coupled", max_running_requests=6)
    stream = engine.generate(requests)
    first = next(stream)
    assert first.request.key == (0, 0)
    engine.abort([(0, 1), (3, 3), (9, 9)])  # one runs, one waits, one is unknown
    aborted = [next(stream), next(stream)]
    assert [s.request.key for s in aborted] == [(0, 1), (3, 3)]
    assert aborted[1].token_ids == () and 0 < len(aborted[0].token_ids) < 60
    engine.abort()
    rest = list(stream)
    assert len(rest) == 13 and all(s.finish_reason is FinishReason.ABORT for s in aborted + rest)
    for sample in aborted + rest:
        assert sample.token_ids == full[sample.request.key].token_ids[: len(sample.token_ids)]
        assert len(sample.logprobs) == len(sample.token_ids)
    assert tokens_of(run_engine(engine, requests)) == tokens_of(full)  # aborted keys are forgotten


def test_an_abandoned_stream_leaves_the_engine_usable(pair: Pair) -> None:
    decoder, draft = pair
    requests = make_requests()
    engine = make_engine(decoder, draft)
    stream = engine.generate(requests)
    next(stream)
    with pytest.raises(EngineError, match="still being read"):
        engine.generate(requests)
    stream.close()
    assert run_engine(engine, requests) == run_engine(make_engine(decoder, draft), requests)


# ---------------------------------------------------------------- weights


def send(receiver: WeightReceiver, version: int, scale: float, only: str = "") -> None:
    """Publish every weight anew; those whose name starts with `only` multiplied by `scale`."""
    tensors = {
        name: tensor.detach() * (scale if only and name.startswith(only) else 1.0)
        for name, tensor in receiver.destinations.items()
    }
    sums = {name: checksum(tensor) for name, tensor in tensors.items()}
    receiver.receive(Bundle(version, receiver.plan.digest, tensors, sums))


def test_weights_that_arrive_between_samples(tmp_path: Path) -> None:
    """Tokens after a sync are those of the new weights on the whole text: no stale KV, prompt or draft state."""
    decoder, draft = load_pair(tmp_path)
    requests = make_requests(4, 3, max_new_tokens=30, stop_token_ids=())
    requests[0] = dataclasses.replace(requests[0], sampling=dataclasses.replace(requests[0].sampling, max_new_tokens=5))
    engine = make_engine(decoder, draft, verify_rule="coupled", max_running_requests=5)
    stream = engine.generate(requests)
    first = next(stream)
    assert first.policy_versions[0].version == 0
    send(engine.receiver, 7, 1.3, "policy.model.layers.2.")
    samples = {s.request.key: s for s in stream}
    running = [s for s in samples.values() if len(s.policy_versions) == 2]
    assert len(running) == 4 and all(s.policy_versions[1].version == 7 for s in running)
    assert sum(s.policy_versions[0].version == 7 for s in samples.values()) == 7
    for sample in samples.values():
        span = sample.policy_versions[-1]
        assert span.end == len(sample.token_ids)
        # Continue the text from the sync on, from nothing, under the new weights.
        prompt = sample.request.prompt_ids + sample.token_ids[: span.start]
        request = dataclasses.replace(
            sample.request,
            prompt_ids=prompt,
            sampling=dataclasses.replace(sample.request.sampling, max_new_tokens=span.end - span.start),
        )
        want = run_engine(make_engine(decoder, verify_rule="coupled"), [request])[request.key]
        assert want.token_ids == sample.token_ids[span.start :]
        assert want.logprobs == pytest.approx(sample.logprobs[span.start :], abs=1e-11)


def test_draft_state_follows_a_sync(tmp_path: Path) -> None:
    """A new draft alone changes acceptance exactly as if the engine had started with it."""
    requests = make_requests(stop_token_ids=(), max_new_tokens=40)
    decoder, draft = load_pair(tmp_path)
    engine = make_engine(decoder, draft)
    old = run_engine(engine, requests)
    send(engine.receiver, 1, 1.7, "draft.")
    new = run_engine(engine, requests)
    fresh = run_engine(make_engine(decoder, draft), requests)
    assert tokens_of(new) == tokens_of(fresh) and total_spec(new) == total_spec(fresh)
    assert total_spec(new) != total_spec(old)


def test_the_plain_twin_serves_the_same_weights(tmp_path: Path) -> None:
    decoder, draft = load_pair(tmp_path)
    requests = make_requests()
    engine = make_engine(decoder, draft, verify_rule="coupled")
    send(engine.receiver, 3, 1.2, "policy.model.layers.1.")
    plain = run_engine(engine.without_speculation(), requests)
    assert tokens_of(plain) == tokens_of(run_engine(engine, requests))
    assert all(sample.policy_versions[0].version == 3 for sample in plain.values())
    assert total_spec(plain).num_verify_steps == 0
    engine.close()
    assert tokens_of(run_engine(engine, requests)) == tokens_of(plain)  # memory comes back when it is needed


def test_a_mixture_of_versions_is_not_served(tmp_path: Path) -> None:
    decoder, draft = load_pair(tmp_path)
    engine = make_engine(decoder, draft)
    engine.receiver._dirty = True
    with pytest.raises(EngineError, match="mixture of versions"):
        engine.generate(make_requests())
    send(engine.receiver, 1, 1.0)
    assert run_engine(engine, make_requests())


# ---------------------------------------------------------------- controller in the engine


def test_adaptive_engine_measures_or_loads_costs(tmp_path: Path) -> None:
    decoder, draft = load_pair(tmp_path)
    requests = make_requests(3, 4)  # the tail is the longest sibling of three prompts
    measured = make_engine(decoder, draft, controller="adaptive", max_running_requests=6)
    run_engine(measured, requests)
    table = measured.controller.table
    assert table is not None and table.batches == (1, 2, 4, 6) and table.max_depth == 3
    assert all(second > 0 for row in table.step_s for second in row)
    # Verification that is free but at batch 4 and above, where it is ruinous.
    CostTable((1, 3, 4), ((1.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0), (1.0, 9.0, 9.0, 9.0))).save(tmp_path / "t.json")
    engine = make_engine(
        decoder,
        draft,
        controller="adaptive",
        cost_table=str(tmp_path / "t.json"),
        verify_rule="coupled",
        max_running_requests=16,
    )
    samples = run_engine(engine, requests)
    spec = total_spec(samples)
    assert 0 < spec.num_verify_steps < spec.num_decode_steps
    plain = run_engine(make_engine(decoder, verify_rule="coupled"), requests)
    assert tokens_of(samples) == tokens_of(plain)


def test_a_cost_table_that_is_too_shallow_is_refused_at_once(pair: Pair, tmp_path: Path) -> None:
    CostTable((1,), ((1.0, 1.0, 1.0),)).save(tmp_path / "t.json")
    settings = {"controller": "adaptive", "cost_table": str(tmp_path / "t.json")}
    with pytest.raises(EngineConfigError, match=r"t\.json: measured up to 2 draft tokens, .*speculative_num_steps = 3"):
        make_engine(*pair, **settings)
    assert run_engine(make_engine(*pair, speculative_num_steps=2, **settings), make_requests(2, 2))


def test_the_plain_twin_starts_with_as_much_memory(pair: Pair) -> None:
    engine = make_engine(*pair)
    run_engine(engine, make_requests(2, 2))
    plain = engine.without_speculation()
    assert plain._cache.capacity == engine._cache.capacity > 0


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "request_, message",
    [
        (RolloutRequest(3, 1, ()), r"request \(prompt 3, sample 1\): the prompt is empty"),
        (RolloutRequest(3, 1, (1,) * 96), r"prompt 3, sample 1\): 96 prompt tokens leave no room in a context of 96"),
        (RolloutRequest(7, 0, (1,), SamplingParams(max_new_tokens=0)), "max_new_tokens = 0"),
        (RolloutRequest(7, 0, (1,), SamplingParams(top_p=0.0)), "top_p"),
        (RolloutRequest(7, 0, (1,), SamplingParams(stop=("x",))), "detokenizer"),
        (RolloutRequest(0, 1, (1,)), "another request has the same ids"),
    ],
)
def test_bad_requests(pair: Pair, request_: RolloutRequest, message: str) -> None:
    engine = make_engine(*pair)
    with pytest.raises(BadRequest, match=message):
        engine.generate([*make_requests(1, 2), request_])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"speculative_algorithm": "MEDUSA"}, "MEDUSA"),
        ({"speculative_num_steps": 0}, "speculative_num_steps = 0 with EAGLE3"),
        ({"speculative_eagle_topk": 4}, "speculative_eagle_topk = 4"),
        ({"speculative_num_draft_tokens": 9}, "speculative_num_draft_tokens = 9"),
        ({"verify_rule": "greedy"}, "verify_rule = 'greedy'"),
        ({"controller": "auto"}, "controller = 'auto'"),
        ({"context_length": 97}, "context_length = 97"),
        ({"max_running_requests": 0}, "max_running_requests = 0"),
    ],
)
def test_bad_settings(pair: Pair, settings: dict[str, object], message: str) -> None:
    with pytest.raises(EngineConfigError, match=message):
        make_engine(*pair, **settings)


def test_draft_that_does_not_fit(pair: Pair, tmp_path: Path) -> None:
    _, other = load_pair(tmp_path, vocab_size=41)
    with pytest.raises(EngineConfigError, match="vocabulary 41 against 32 and 40"):
        make_engine(pair[0], other)
    with pytest.raises(EngineConfigError, match="EAGLE3 needs a draft"):
        make_engine(pair[0], None, speculative_algorithm="EAGLE3")


def test_all_logprobs_are_finite(pair: Pair) -> None:
    samples = run_engine(make_engine(*pair), make_requests(top_k=3, top_p=0.5, temperature=0.3))
    assert all(math.isfinite(lp) and lp <= 0 for s in samples.values() for lp in s.logprobs)
    assert torch.isfinite(pair[0].embed).all()


def test_a_trace_tells_what_each_decode_step_did() -> None:
    counts = SpecCounts()
    counts.add_step(0, 0, 1)
    counts.add_step(3, 3, 2)  # the end is the second accepted draft
    counts.add_step(2, 1, 2, from_history=True)
    steps = torch.frombuffer(bytearray(counts.trace.tobytes()), dtype=torch.int16).reshape(-1, 3)
    assert steps.tolist() == [[0, 0, 1], [3, 2, 2], [0, 1, 2]]  # of the draft model nothing in the last one
