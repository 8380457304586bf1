"""History drafts in the engine: no token changes, siblings and earlier epochs are found, and what was seen is kept."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch

import draft_models.history as history_module
import rollout_engine.history_plan as plan_module
from draft_models.eagle3 import Eagle3
from draft_models.history import indexed_token_bytes
from rollout_engine.config import RolloutConfig, SpeculationConfig
from rollout_engine.decoder import Decoder
from rollout_engine.drafting import EagleDrafter
from rollout_engine.history import HistoryDrafter
from rollout_engine.rows import Row
from rollout_engine.speculation import CostTable, DepthController
from rollout_engine.torch_engine import TorchEngine
from rollout_engine.types import EngineConfigError, RolloutRequest, Sample
from sync.publish import publish
from tests.rollout_engine_helpers import load_pair, make_engine, make_requests, run_engine, tokens_of, total_spec

Pair = tuple[Decoder, Eagle3]
ANY = SpeculationConfig(history=True, history_min_match=1, history_min_confidence=0.0)


@pytest.fixture(scope="module")
def pair64(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load_pair(tmp_path_factory.mktemp("model64"))


def history_engine(pair: Pair, speculation: SpeculationConfig = ANY, **settings: Any) -> TorchEngine:
    decoder, draft = pair
    config = RolloutConfig(**({"controller": "fixed", "verify_rule": "coupled"} | settings))
    return TorchEngine(decoder, config, draft=draft, speculation=speculation)


def epoch(requests: list[RolloutRequest], number: int) -> list[RolloutRequest]:
    """The same prompts under other ids, and hence other seeds."""
    return [
        dataclasses.replace(
            request,
            prompt_id=request.prompt_id + 100 * number,
            sampling=dataclasses.replace(request.sampling, seed=request.sampling.seed + 10**6 * number),
        )
        for request in requests
    ]


def take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which source a row has no longer follows from what was measured: every mixture comes up."""
    turns = iter(range(10**9))
    monkeypatch.setattr(plan_module, "prefers_history", lambda gains, depth, width: next(turns) % 3 != 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_of_plain_decoding_in_float64(pair64: Pair, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of slots, order and depth; sources that take turns; a second epoch of the same prompts."""
    take_turns(monkeypatch)
    first = make_requests(temperature=temperature, max_new_tokens=40, stop_token_ids=())
    second = epoch(first, 1)
    plain = make_engine(pair64[0], verify_rule="coupled")
    expected = [tokens_of(run_engine(plain, requests)) for requests in (first, second)]
    for steps, slots in ((0, 16), (1, 3), (7, 5)):
        speculation = dataclasses.replace(ANY, history_num_steps=steps)
        engine = history_engine(pair64, speculation, max_running_requests=slots)
        for requests, tokens in zip((first, second[::-1]), expected, strict=True):
            samples = run_engine(engine, requests)
            assert tokens_of(samples) == tokens
            spec = total_spec(samples)
            assert spec.history is not None and spec.history.num_accepted > 20
            assert spec.by_draft_model.num_verify_steps > 20
            assert len(spec.history.proposed_by_position) == (steps or 3)
            assert len(spec.by_draft_model.proposed_by_position) == 3


def test_an_earlier_epoch_is_found_by_what_the_prompt_says(pair64: Pair) -> None:
    """Greedy texts repeat: in the second epoch, under other ids, every draft of history stands."""
    engine = history_engine(pair64)
    requests = make_requests(num_siblings=1, temperature=0.0, max_new_tokens=30, stop_token_ids=())
    first = run_engine(engine, requests)
    second = run_engine(engine, epoch(requests, 1))
    assert list(tokens_of(second).values()) == list(tokens_of(first).values())
    seen = total_spec(second).history
    assert seen is not None and seen.num_verify_steps > 20
    assert seen.num_accepted > 0.9 * seen.num_proposed
    other = [dataclasses.replace(r, prompt_ids=(*r.prompt_ids, 3)) for r in epoch(requests, 2)]
    elsewhere = total_spec(run_engine(engine, other)).history
    assert elsewhere is None or elsewhere.num_accepted < seen.num_accepted


def test_unfinished_siblings_are_found(pair64: Pair) -> None:
    """Two rows of one greedy prompt, the second a few tokens behind: it reads in what the first has just written."""
    request = make_requests(1, 1, temperature=0.0, max_new_tokens=60, stop_token_ids=())[0]
    ahead = dataclasses.replace(request, sample_id=1)
    blocker = dataclasses.replace(
        make_requests(2, 1, temperature=0.0, stop_token_ids=())[1],
        sampling=dataclasses.replace(request.sampling, max_new_tokens=12),
    )
    engine = history_engine(pair64, dataclasses.replace(ANY, history_min_match=3), max_running_requests=2)
    samples = run_engine(engine, [ahead, blocker, request])
    spec = samples[request.key].spec
    assert samples[request.key].token_ids == samples[ahead.key].token_ids
    assert spec.history is not None and spec.history.num_accepted > 20
    alone = run_engine(history_engine(pair64, dataclasses.replace(ANY, history_min_match=3)), [request])
    assert spec.tokens_per_forward > 1.2 * alone[request.key].spec.tokens_per_forward


def test_the_draft_model_rests_where_history_drafts_every_row(pair64: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    propose = EagleDrafter.propose
    monkeypatch.setattr(EagleDrafter, "propose", lambda self, *rest: calls.append(1) or propose(self, *rest))
    requests = make_requests(1, 1, temperature=0.0, max_new_tokens=60, stop_token_ids=())
    engine = history_engine(pair64)
    run_engine(engine, requests)
    calls.clear()
    (sample,) = run_engine(engine, epoch(requests, 1)).values()
    steps = sample.spec
    assert steps.history is not None and steps.history.num_verify_steps > 10
    assert len(calls) == steps.by_draft_model.num_verify_steps < steps.num_verify_steps / 2


def test_a_resumed_engine_drafts_what_the_unbroken_one_would(pair64: Pair, tmp_path) -> None:
    """Under the rejection rule tokens depend on every proposal: texts and what was measured are both in the state."""
    settings = {"verify_rule": "rejection", "max_running_requests": 5}
    speculation = dataclasses.replace(ANY, history_num_steps=5)
    requests = make_requests(max_new_tokens=30, stop_token_ids=())
    unbroken = history_engine(pair64, speculation, **settings)
    run_engine(unbroken, requests)
    torch.save(unbroken.state(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = history_engine(pair64, speculation, **settings)
    resumed.load_state(state)
    expected = run_engine(unbroken, epoch(requests, 1))
    assert run_engine(resumed, epoch(requests, 1)) == expected
    for part in ("texts", "planner"):
        forgetful = history_engine(pair64, speculation, **settings)
        fresh = forgetful.state()["history"][part]
        forgetful.load_state(state | {"history": state["history"] | {part: fresh}})
        assert run_engine(forgetful, epoch(requests, 1)) != expected, f"{part} make no difference"


@pytest.mark.parametrize("error", [None, KeyError])
def test_what_is_to_leave_no_trace_changes_no_later_token(pair64: Pair, error: type[Exception] | None) -> None:
    """In a generation after new weights, which make the engine forget a part of what it has measured."""
    decoder, draft = pair64
    costs = CostTable((1, 5), ((1.0, 1.05, 1.1, 1.15), (1.0, 1.3, 1.6, 1.9)))
    requests = make_requests(max_new_tokens=30, stop_token_ids=())
    engines = []
    for _ in range(2):
        engine = history_engine(pair64, verify_rule="rejection", max_running_requests=5, controller="adaptive")
        engine.controller.table = costs
        engine.controller._learns_costs = False
        run_engine(engine, requests)
        weights = ({name: t.clone() for name, t in model.named_tensors().items()} for model in (decoder, draft))
        publish(*weights, engine.transport, 1)
        engines.append(engine)
    left_alone, watched = engines
    with suppress(KeyError), watched.leaving_no_trace():
        run_engine(watched, epoch(requests, 2))
        if error is not None:
            raise error
    assert watched.controller.state() == left_alone.controller.state()
    for number in (1, 2):
        assert run_engine(watched, epoch(requests, number)) == run_engine(left_alone, epoch(requests, number))
    assert watched.controller.state() == left_alone.controller.state()


def test_a_state_of_other_settings_is_refused(pair64: Pair) -> None:
    state = history_engine(pair64).state()
    other = history_engine(pair64, dataclasses.replace(ANY, history_num_steps=5))
    with pytest.raises(EngineConfigError, match="history drafts of 3 tokens, now it is 25 and 5; resume with the same"):
        other.load_state(state)
    history_engine(pair64).load_state(DepthController(3, None).state())  # made before there was history


def test_indices_live_as_long_as_their_requests(pair64: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aborted, abandoned and finished requests all let go of their texts."""
    engine = history_engine(pair64, max_running_requests=4)
    drafter: HistoryDrafter = engine._history  # type: ignore[assignment]
    most = 0
    plan = HistoryDrafter.plan

    def spying(self: HistoryDrafter, rows: Any) -> Any:
        nonlocal most
        found = plan(self, rows)
        most = max(most, len(self._indices))
        assert len(self._running) == len(rows)
        return found

    monkeypatch.setattr(HistoryDrafter, "plan", spying)
    requests = make_requests(6, 2)
    samples: Iterator[Sample] = engine.generate(requests)
    next(samples)
    engine.abort([requests[3].key, requests[-1].key])
    list(samples)
    assert 2 <= most <= 4 and not drafter._indices and not drafter._running and not drafter._expected
    abandoned = engine.generate(epoch(requests, 1))
    next(abandoned)
    abandoned.close()
    assert not drafter._indices and not drafter._running and not drafter._expected
    assert drafter._free_bytes == drafter._max_bytes


def test_earlier_texts_are_indexed_in_what_memory_is_left() -> None:
    """A new index takes an eighth, at most, of what the running ones leave of its half."""
    rng = random.Random(0)
    prompts = [(number, 1, 2) for number in range(4)]
    token_bytes = indexed_token_bytes(ANY.history_min_match, ANY.history_max_match)

    def indexed(max_bytes: int) -> tuple[list[int], int]:
        drafter = HistoryDrafter(dataclasses.replace(ANY, history_max_bytes=max_bytes), DepthController(3, None), 3)
        drafter.expect(prompts * 11)
        for sample_id, prompt in itertools.product(range(10), prompts):
            request = RolloutRequest(prompt[0], sample_id, prompt)
            drafter.finish(Row(request, 200, [*prompt, *rng.choices(range(30_000), k=100)]))
        drafter.look_up([Row(RolloutRequest(prompt[0], 10, prompt), 200, [*prompt]) for prompt in prompts], 3)
        indices = drafter._indices.values()
        return [len(index._texts) - 2 for index in indices], sum(index.num_bytes for index in indices)

    assert indexed(1 << 29)[0] == [10] * 4
    assert indexed(2 * 8 * 450 * token_bytes)[0] == [4, 3, 3, 3]  # of what is left, which is less each time
    found, num_bytes = indexed(1000)
    assert found == [0] * 4 and num_bytes == 4 * 2 * 500  # an entry for what is being written


def test_running_texts_are_taken_in_while_there_is_room_and_look_up_what_was() -> None:
    """Four texts of 5,000 new tokens each hold 6 MB; half of a MiB is theirs."""
    rng = random.Random(0)
    drafter = HistoryDrafter(dataclasses.replace(ANY, history_max_bytes=1 << 20), DepthController(3, None), 3)
    prompts = [(number, 1, 2) for number in range(4)]
    drafter.expect(prompts)
    rows = [Row(RolloutRequest(prompt[0], 0, prompt), 9000, [*prompt]) for prompt in prompts]
    for _ in range(100):
        for row in rows:
            row.tokens.extend(rng.sample(range(30_000), 50))
        drafter.look_up(rows, 3)
    num_bytes = [index.num_bytes for index in drafter._indices.values()]
    entries = 8 * history_module._INDEXED_TEXT_BYTES
    assert 0.9 * (1 << 19) < sum(num_bytes) <= (1 << 19) + entries
    assert drafter._free_bytes == (1 << 19) - sum(num_bytes)
    assert drafter.look_up(rows, 3) == [None] * 4  # these ends were never seen
    first = rows[0].tokens
    first.extend(first[10:30])
    found = drafter.look_up(rows, 3)
    assert found[0] is not None and found[0].tokens == tuple(first[30:33]) and found[1:] == [None] * 3
    for row in rows[1:]:  # their room is free again
        drafter.finish(row)
    assert len(drafter._indices) == 1 and drafter._free_bytes == (1 << 19) - num_bytes[0]
    drafter.finish(rows[0])
    assert drafter._free_bytes == 1 << 19


def test_the_adaptive_controller_measures_given_drafts_too(pair64: Pair) -> None:
    engine = history_engine(
        pair64,
        dataclasses.replace(ANY, history_num_steps=5),
        controller="adaptive",
        max_running_requests=4,
        context_length=90,
    )
    table = engine.measure_costs(budget_s=0.01)
    assert (table.max_depth, table.max_width) == (3, 5)
    requests = make_requests(max_new_tokens=100, stop_token_ids=())
    requests = [dataclasses.replace(r, prompt_ids=r.prompt_ids * 4) for r in requests]
    plain = make_engine(pair64[0], verify_rule="coupled", context_length=90)
    assert tokens_of(run_engine(engine, requests)) == tokens_of(run_engine(plain, requests))


def test_a_cost_table_must_know_given_drafts(pair64: Pair, tmp_path) -> None:
    path = tmp_path / "table.json"
    make_engine(*pair64, max_running_requests=2).measure_costs(budget_s=0.01).save(path)
    settings = {"controller": "adaptive", "cost_table": str(path)}
    history_engine(pair64, **settings)
    deeper = dataclasses.replace(ANY, history_num_steps=5)
    with pytest.raises(EngineConfigError, match=r"measured up to 3 given drafts, but .*history_num_steps = 5; measure"):
        history_engine(pair64, deeper, **settings)
    history_engine(pair64, deeper, max_running_requests=2).measure_costs(budget_s=0.01).save(path)
    history_engine(pair64, deeper, **settings)


@pytest.mark.parametrize(
    ("settings", "speculation", "message"),
    [
        ({"speculative_algorithm": "NGRAM"}, {}, "history drafts stand beside EAGLE3's"),
        ({"engine": "sglang"}, {}, "SGLang runs one speculative algorithm"),
        ({}, {"history_min_match": 0}, "history_min_match = 0 and history_max_match = 16"),
        ({}, {"history_min_confidence": 1.1}, "history_min_confidence = 1.1: it must be 0 to 1"),
    ],
)
def test_what_no_engine_has_is_refused(
    pair64: Pair, settings: dict[str, Any], speculation: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineConfigError, match=message):
        history_engine(pair64, dataclasses.replace(ANY, **speculation), **settings)
