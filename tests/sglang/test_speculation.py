"""SGLang's speculation on the CPU: real control flow over stand-in kernels, so always greedy.

The draft travels by disk here and the n-gram policy by broadcast, so that every transport meets a real server.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from safetensors.torch import save_file

from draft_models.checkpoint import save_draft
from draft_models.eagle3 import Eagle3
from rollout_engine.config import RolloutConfig
from rollout_engine.sglang_engine import SGLangEngine
from rollout_engine.torch_engine import TorchEngine
from rollout_engine.types import EngineError, RolloutRequest, Sample, SpecStats, VersionSpan
from sync.plan import SyncError
from sync.publish import publish
from tests.rollout_engine_helpers import save_hf_model
from tests.sglang import helpers
from tests.sglang.helpers import Reference, Weights, greedy, greedy_batch, random_draft, repeating_draft, serve

pytestmark = pytest.mark.sglang
VOCAB = 16
DEPTH = 3
NUM_REQUESTS = 12


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No tokenizer, and an output layer of its own: its name is that of the draft's.

    Layers in multiples of 64: a CPU taken for one with AMX makes SGLang pad them.
    """
    folder = tmp_path_factory.mktemp("policy") / "tiny"
    sizes = {
        "num_hidden_layers": 4,
        "intermediate_size": 64,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
    }
    save_hf_model(folder, max_position_embeddings=helpers.CONTEXT, **sizes)
    tensors = helpers.weights_of(folder)
    # Like input, like output: such a policy repeats itself, which gives its drafts something to be right about.
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return helpers.without_end(folder)


@pytest.fixture(scope="module")
def weights(policy: Path) -> Weights:
    return helpers.weights_of(policy)


@pytest.fixture(scope="module")
def eagle(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangEngine]:
    draft = tmp_path_factory.mktemp("draft")
    save_draft(random_draft(policy), draft)
    yield from speculating(
        policy,
        tmp_path_factory.mktemp("eagle"),
        draft=draft,
        speculative_algorithm="EAGLE3",
        sync_transport="disk",
        sync_dir=str(tmp_path_factory.mktemp("exchange")),
    )


@pytest.fixture(scope="module")
def ngram(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangEngine]:
    yield from speculating(
        policy, tmp_path_factory.mktemp("ngram"), speculative_algorithm="NGRAM", sync_transport="broadcast"
    )


def speculating(policy: Path, work_dir: Path, **settings: object) -> Iterator[SGLangEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SLIPSTREAM_STAND_IN")
        engine = helpers.start(policy, work_dir, temperature=0.0, speculative_num_steps=DEPTH, **settings)
    try:
        yield engine
    finally:
        engine.close()


def assert_lossless(samples: Mapping[helpers.Key, Sample], reference: Reference, version: int) -> None:
    for sample in samples.values():
        helpers.assert_whole(sample)
        assert sample.policy_versions == (VersionSpan(0, len(sample.token_ids), version),)
        helpers.assert_greedy(reference, sample)
        helpers.assert_logprobs(reference, sample)


def assert_consistent(sample: Sample) -> None:
    """The statistics explain the tokens: the prefill's, then the accepted drafts and one more of every verify step."""
    spec = sample.spec
    steps = spec.num_verify_steps
    assert steps == spec.num_decode_steps == sum(spec.accepted_histogram)
    assert len(spec.accepted_histogram) == DEPTH + 1
    assert spec.proposed_by_position == (steps,) * DEPTH
    assert spec.accepted_by_position == tuple(sum(spec.accepted_histogram[j + 1 :]) for j in range(DEPTH))
    surplus = 1 + spec.num_accepted + steps - len(sample.token_ids)
    assert 0 <= surplus <= DEPTH  # the last step may have gone beyond the response's end


def total(samples: Mapping[helpers.Key, Sample]) -> SpecStats:
    return sum((sample.spec for sample in samples.values()), SpecStats())


def embedded_stats(reference: Reference, draft: Eagle3, requests: list[RolloutRequest]) -> SpecStats:
    config = RolloutConfig(controller="fixed", speculative_num_steps=DEPTH, max_running_requests=4)
    engine = TorchEngine(reference.decoder, config, draft=draft, eos_token_ids=(helpers.EOS,))
    return total(helpers.collect(engine.generate(requests)))


def test_eagle3_is_lossless_and_follows_the_draft_that_was_sent(
    eagle: SGLangEngine, policy: Path, weights: Weights
) -> None:
    """Policy and draft both change, twice; each time acceptance is that of the embedded engine with the same two.

    Only SGLang counts drafts that were accepted behind a response's end: at most one a position and request.
    """
    requests = greedy_batch(NUM_REQUESTS, VOCAB, max_new_tokens=40)
    lengths = []
    with pytest.raises(EngineError, match="publish a version first"):
        eagle.generate(requests)
    policies = (weights, helpers.other_weights(weights, seed=1), weights)
    for version, served in enumerate(policies):
        reference = Reference(policy, served)
        draft = repeating_draft(policy, served) if version % 2 == 0 else random_draft(policy)
        publish(served, draft.named_tensors(), eagle.transport, version)
        samples = serve(eagle, requests)
        assert_lossless(samples, reference, version)
        for sample in samples.values():
            assert_consistent(sample)
        expected, found = embedded_stats(reference, draft, requests), total(samples)
        assert abs(found.num_verify_steps - expected.num_verify_steps) <= 2  # near ties
        for a, b in zip(found.accepted_by_position, expected.accepted_by_position, strict=True):
            assert abs(a - b) <= NUM_REQUESTS + 2, (found, expected)
        lengths.append(found.accept_length)
    assert min(lengths[0], lengths[2]) > 2.5 > 1.3 > lengths[1]


def test_a_draft_is_never_taken_over_alone(eagle: SGLangEngine, policy: Path, weights: Weights) -> None:
    """lm_head.weight is in both models: without the draft's, the version is refused and the old one serves on."""
    publish(weights, repeating_draft(policy, weights).named_tensors(), eagle.transport, 10)
    requests = greedy_batch(NUM_REQUESTS, VOCAB, max_new_tokens=40)
    before = serve(eagle, requests)
    for broken in ("draft.lm_head.weight", "policy.lm_head.weight"):
        sent = dict(helpers.other_weights(weights, seed=2))
        draft = random_draft(policy).named_tensors()
        del (draft if broken.startswith("draft") else sent)["lm_head.weight"]
        with pytest.raises(SyncError, match=broken):
            publish(sent, draft, eagle.transport, 11)
        after = serve(eagle, requests)
        assert_lossless(after, Reference(policy, weights), 10)
        assert total(after) == total(before)


def test_a_sync_in_mid_flight_under_speculation(eagle: SGLangEngine, policy: Path, weights: Weights) -> None:
    """The new policy and draft serve the rest of each response; statistics go on over both parts."""
    publish(weights, repeating_draft(policy, weights).named_tensors(), eagle.transport, 20)
    newer = helpers.other_weights(weights, seed=3)
    newer_draft = repeating_draft(policy, newer).named_tensors()
    requests = [helpers.greedy((3, 4), 99, max_new_tokens=1), *greedy_batch(6, VOCAB, max_new_tokens=100)]
    iterator = eagle.generate(requests)
    first = next(iterator)
    publish(newer, newer_draft, eagle.transport, 21)
    found = helpers.collect([first, *iterator])
    assert found.keys() == {request.key for request in requests}
    split = [sample for sample in found.values() if len(sample.policy_versions) == 2]
    assert split, "nothing was interrupted"
    references = {20: Reference(policy, weights), 21: Reference(policy, newer)}
    for sample in found.values():
        for span in sample.policy_versions:
            helpers.assert_greedy(references[span.version], sample, span.start, span.end)
            helpers.assert_logprobs(references[span.version], sample, span.start, span.end)


def test_ngram_is_lossless_before_and_after_an_update(ngram: SGLangEngine, policy: Path, weights: Weights) -> None:
    requests = greedy_batch(NUM_REQUESTS, VOCAB, max_new_tokens=40)
    for version, served in enumerate((weights, helpers.other_weights(weights, seed=1))):
        publish(served, None, ngram.transport, version)
        samples = serve(ngram, requests)
        assert_lossless(samples, Reference(policy, served), version)
        for sample in samples.values():
            assert_consistent(sample)
        assert total(samples).accept_length > 1.2


def test_no_interruption_lets_a_response_pass_its_limit(ngram: SGLangEngine, weights: Weights) -> None:
    """Every sample brings a new version: a verify step that is interrupted may hold more tokens than are left."""
    version = ngram.transport.version + 1
    publish(weights, None, ngram.transport, version)
    for _ in range(3):
        requests = [greedy((3 + i % 5, 9, 8) * 2, i, max_new_tokens=2 + i % 12) for i in range(24)]
        for sample in ngram.generate(requests):
            helpers.assert_whole(sample)
            version += 1
            publish(weights, None, ngram.transport, version)
