"""A real server without speculation: requests, log-probs, weight updates. No stand-in kernel may run in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rollout_engine.config import RolloutConfig
from rollout_engine.sglang_engine import SGLangEngine
from rollout_engine.torch_engine import TorchEngine
from rollout_engine.types import BadRequest, EngineError, FinishReason, RolloutRequest, SamplingParams, VersionSpan
from sync.plan import SyncError
from sync.publish import make_bundle, publish
from tests.sglang import helpers
from tests.sglang.helpers import Reference, Weights, greedy, greedy_batch, serve
from trainer.serving import load_tokenizer

pytestmark = pytest.mark.sglang
VOCAB = 300  # of the tokenizer's ids; the model has some more


class Served:
    """The server and what it serves now."""

    def __init__(self, engine: SGLangEngine, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.version = -1
        self.weights = helpers.weights_of(folder)

    def publish(self, weights: Weights) -> None:
        report = publish(weights, None, self.engine.transport, self.version + 1)
        self.version, self.weights = report.version, weights

    @property
    def reference(self) -> Reference:
        return Reference(self.folder, self.weights)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    engine = helpers.start(model, tmp_path_factory.mktemp("plain"))
    try:
        with pytest.raises(EngineError, match="publish a version first"):
            list(engine.generate([greedy((1, 2, 3))]))
        served = Served(engine, model)
        served.publish(served.weights)
        yield served
    finally:
        engine.close()
    assert not helpers.listens(engine.address)


# ------------------------------------------------------------ requests


def test_responses_end_where_they_should_whatever_interrupts_them(server: Served) -> None:
    """Every sample brings a new version, so that many responses are interrupted in the step of their end."""
    stops = tuple(range(20, 50))
    sampling = SamplingParams(1.3, max_new_tokens=40, stop_token_ids=stops)
    for _ in range(3):
        requests = [RolloutRequest(0, i, (3 + i, 9, 8), sampling) for i in range(16)]
        for sample in server.engine.generate(requests):
            assert not {helpers.EOS, *stops} & set(sample.token_ids[:-1])
            assert len(sample.token_ids) <= 40 and sample.finish_reason is not FinishReason.ABORT
            assert (sample.finish_reason is FinishReason.STOP) == (sample.token_ids[-1] in {helpers.EOS, *stops})
            server.publish(server.weights)


def test_logprobs_and_tokens_are_those_of_the_embedded_engine(server: Served) -> None:
    """Twelve requests over four slots, at T = 0, 0.7 and 1.3."""
    requests = [
        RolloutRequest(i, 0, prompt, SamplingParams(temperature, max_new_tokens=20))
        for i, (prompt, temperature) in enumerate(zip(helpers.prompts(12, VOCAB), (0.0, 0.7, 1.3) * 4, strict=True))
    ]
    samples = serve(server.engine, requests)
    config = RolloutConfig(speculative_algorithm="NONE", max_running_requests=4)
    embedded = TorchEngine(server.reference.decoder, config, eos_token_ids=(helpers.EOS,))
    torch_samples = {sample.request.key: sample for sample in embedded.generate(requests)}
    num_compared = 0
    for key, sample in samples.items():
        helpers.assert_whole(sample)
        assert sample.policy_versions == (VersionSpan(0, len(sample.token_ids), server.version),)
        assert sample.spec.num_decode_steps == len(sample.token_ids) - 1 and sample.spec.accept_length == 1.0
        helpers.assert_logprobs(server.reference, sample)
        if sample.request.sampling.temperature == 0:
            helpers.assert_greedy(server.reference, sample)
            if not helpers.has_near_tie(server.reference, sample):
                assert sample.token_ids == torch_samples[key].token_ids
                num_compared += 1
    assert num_compared >= 3


def test_top_k_and_top_p_keep_to_their_tokens(server: Served) -> None:
    """Log-probs are those before the filter; tokens come from inside it, and not only the best one.

    top_k = 1 is asked at T = 1: SGLang reports its log-probs at 1, whatever T, in a batch of nothing else.
    """
    requests = [
        RolloutRequest(i, k, prompt, SamplingParams(1.0 if k == 1 else 1.5, top_k=k, top_p=p, max_new_tokens=20))
        for i, prompt in enumerate(helpers.prompts(3, VOCAB))
        for k, p in ((1, 1.0), (2, 1.0), (0, 0.6))
    ]
    samples = serve(server.engine, requests)
    ranks_by_k: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for sample in samples.values():
        helpers.assert_logprobs(server.reference, sample)
        laws = server.reference.of_response(sample)
        order = laws.sort(dim=-1, descending=True)
        for row, token in enumerate(sample.token_ids):
            rank = int((order.indices[row] == token).nonzero())
            ranks_by_k[sample.request.sample_id].add(rank)
            if sample.request.sampling.top_p < 1.0:
                assert order.values[row, :rank].exp().sum() <= 0.6 + 1e-3
    assert ranks_by_k[1] == {0}
    assert ranks_by_k[2] == {0, 1}
    assert len(ranks_by_k[0]) > 2


def test_stop_tokens_stop_strings_and_lengths(server: Served) -> None:
    request = greedy(helpers.prompts(2, VOCAB)[1], max_new_tokens=30)
    whole = serve(server.engine, [request])[request.key].token_ids
    at = next(i for i in range(5, 30) if whole[i] not in whole[:i])
    stopped = with_sampling(request, 1, stop_token_ids=(whole[at],))
    tokenizer = load_tokenizer(server.folder)
    text = tokenizer.decode(list(whole[: at + 1]), skip_special_tokens=False)
    by_text = with_sampling(request, 2, stop=(text[-3:],))
    near_end = greedy((2,) * (helpers.CONTEXT - 5), 3, max_new_tokens=30)
    samples = serve(server.engine, [stopped, by_text, near_end])
    assert samples[stopped.key].token_ids == whole[: at + 1]
    assert samples[stopped.key].finish_reason is FinishReason.STOP
    assert samples[near_end.key].finish_reason is FinishReason.LENGTH
    assert len(samples[near_end.key].token_ids) == 5
    config = RolloutConfig(speculative_algorithm="NONE", max_running_requests=4)
    embedded = TorchEngine(
        server.reference.decoder, config, detokenize=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)
    )
    (expected,) = embedded.generate([by_text])
    assert samples[by_text.key].finish_reason is FinishReason.STOP
    assert samples[by_text.key].token_ids == expected.token_ids


def with_sampling(request: RolloutRequest, prompt_id: int, **changes: object) -> RolloutRequest:
    return replace(request, prompt_id=prompt_id, sampling=replace(request.sampling, **changes))


def test_abort_keeps_what_there_is(server: Served) -> None:
    first = greedy((5, 6, 7), 0, max_new_tokens=1)
    long = [greedy(prompt, i + 1, max_new_tokens=110) for i, prompt in enumerate(helpers.prompts(6, VOCAB))]
    samples = {}
    for sample in server.engine.generate([first, *long]):
        if not samples:
            server.engine.abort([request.key for request in long[1:]])
        samples[sample.request.key] = sample
    assert samples.keys() == {first.key, *(request.key for request in long)}
    assert samples[long[0].key].finish_reason is FinishReason.LENGTH
    aborted = [samples[request.key] for request in long[1:]]
    assert {sample.finish_reason for sample in aborted} == {FinishReason.ABORT}
    assert {len(sample.token_ids) for sample in aborted[3:]} == {0}  # these still waited for a slot
    for sample in aborted:
        assert len(sample.token_ids) == len(sample.logprobs) < 110
        if sample.token_ids:
            helpers.assert_greedy(server.reference, sample)


def test_an_abandoned_iterator_leaves_nothing_running(server: Served) -> None:
    requests = greedy_batch(6, VOCAB, max_new_tokens=100)
    iterator = server.engine.generate([greedy((5, 6), 99, max_new_tokens=1), *requests])
    next(iterator)
    iterator.close()
    again = greedy((9, 8, 7), max_new_tokens=10)
    helpers.assert_greedy(server.reference, serve(server.engine, [again])[again.key])


def test_bad_requests_are_refused_before_any_work(server: Served) -> None:
    with pytest.raises(BadRequest, match="outside the vocabulary"):
        server.engine.generate([greedy((1, 100_000))])
    with pytest.raises(BadRequest):
        server.engine.generate([greedy((1,) * helpers.CONTEXT)])


# ------------------------------------------------------------ weights


def test_new_weights_speak_and_old_kv_does_not(server: Served) -> None:
    """The same prompts before and after: an entry of the radix cache that survived would carry the old policy's KV."""
    requests = greedy_batch(8, VOCAB)
    before = serve(server.engine, requests)
    server.publish(helpers.other_weights(server.weights, seed=1))
    after = serve(server.engine, requests)
    assert sum(before[key].token_ids != after[key].token_ids for key in before) >= 6
    for sample in after.values():
        assert sample.policy_versions == (VersionSpan(0, len(sample.token_ids), server.version),)
        helpers.assert_greedy(server.reference, sample)
        helpers.assert_logprobs(server.reference, sample)


def test_a_sync_in_mid_flight_loses_nothing_and_leaves_two_spans(server: Served) -> None:
    old = server.reference
    first = greedy((5, 6, 7), 99, max_new_tokens=1)
    requests = [first, *greedy_batch(8, VOCAB, max_new_tokens=100)]
    iterator = server.engine.generate(requests)
    samples = [next(iterator)]
    server.publish(helpers.other_weights(server.weights, seed=2))
    found = helpers.collect([*samples, *iterator])
    assert found.keys() == {request.key for request in requests}
    split = [sample for sample in found.values() if len(sample.policy_versions) == 2]
    assert split, "nothing was interrupted"
    for sample in split:
        before, after = sample.policy_versions
        assert (before.start, before.end, after.end) == (0, after.start, len(sample.token_ids))
        assert (before.version, after.version) == (server.version - 1, server.version)
        for reference, span in ((old, before), (server.reference, after)):
            helpers.assert_greedy(reference, sample, span.start, span.end)
            helpers.assert_logprobs(reference, sample, span.start, span.end)
        helpers.assert_whole(sample)


def test_the_engine_reads_back_what_was_sent(server: Served) -> None:
    """The verdict holds checksums of the engine's own tensors, taken after the copy."""
    weights = helpers.other_weights(server.weights, seed=3)
    bundle = make_bundle(server.engine.transport.plan, weights, None, server.version + 1)
    assert bundle.checksums.keys() == {f"policy.{name}" for name in weights}
    lying = dict(bundle.checksums)
    lying["policy.model.norm.weight"] ^= 1
    with pytest.raises(SyncError, match=r"policy\.model\.norm\.weight"):
        server.engine.transport.send(replace(bundle, checksums=lying))
    assert_still_serves(server)


@pytest.mark.parametrize("fault", ["missing", "shape", "unknown", "corrupted", "plan"])
def test_a_refused_sync_leaves_the_old_version_serving(server: Served, fault: str) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weights = helpers.other_weights(server.weights, seed=4)
    expected = "plan" if fault == "plan" else name
    if fault == "missing":
        del weights[name]
    elif fault == "shape":
        weights[name] = weights[name][:-1].contiguous()
    elif fault == "unknown":
        weights["model.layers.9.mlp.up_proj.weight"] = weights[name]
        expected = "layers.9"
    bundle = make_bundle(server.engine.transport.plan, weights, None, server.version + 1)
    if fault == "corrupted":
        bundle.tensors[f"policy.{name}"].view(torch.int32)[3, 5] ^= 1  # after its checksum was taken
    elif fault == "plan":
        bundle = replace(bundle, plan_digest="0" * 64)
    with pytest.raises(SyncError, match=expected):
        server.engine.transport.send(bundle)
    assert_still_serves(server)


def assert_still_serves(server: Served) -> None:
    requests = greedy_batch(2, VOCAB, max_new_tokens=12)
    for sample in serve(server.engine, requests).values():
        assert sample.policy_versions == (VersionSpan(0, len(sample.token_ids), server.version),)
        helpers.assert_greedy(server.reference, sample)
        helpers.assert_logprobs(server.reference, sample)
