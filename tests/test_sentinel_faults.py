"""Structural faults of the serving draft alone, on a draft that the learner has trained: the sentinel sees each, and
nothing in a sound engine."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3
from draft_models.sentinel import Look, Pattern, Sentinel
from draft_models.training import accept_posteriors, make_batch
from draft_models.types import DraftSample, VerifyRule
from rollout_engine.config import RolloutConfig, SpeculationConfig
from rollout_engine.decoder import Decoder
from rollout_engine.torch_engine import TorchEngine
from rollout_engine.types import RolloutRequest, Sample, SamplingParams, SpecStats
from tests.rollout_engine_helpers import load_pair, make_engine, run_engine
from tests.test_forecast_engine import captured
from trainer.draft_forecast import DraftSettings, look_at_batch
from trainer.draft_learner import DraftLearner

DEPTH, ALPHA, MIN_EFFECT = 3, 1e-3, 0.02
MOST_STEPS = 2000  # verify steps in which a fault has to be seen
TEXTS_A_LOOK = 8


@dataclass(frozen=True)
class Pair:
    decoder: Decoder
    draft: Eagle3


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A policy whose layers differ from each other, and a draft that the learner has brought near to it."""
    decoder, draft = load_pair(
        tmp_path_factory.mktemp("model"), torch.float32, vocab_size=40, num_hidden_layers=6, scale=4.5
    )
    for name, tensor in decoder.named_tensors().items():
        if "o_proj" in name or "down_proj" in name:
            tensor.mul_(6.0)
    plain = run_engine(make_engine(decoder, max_running_requests=64), requests(40, 8, run=0))
    texts = [captured((decoder, draft), sample) for sample in plain.values()]
    settings = DraftSettings(VerifyRule.REJECTION, DEPTH)
    learner = DraftLearner(draft, DraftConfig(lr=5e-3, unroll=DEPTH), settings)
    order = random.Random(0)
    for _ in range(80):
        part = frozenset((text.prompt_id, text.sample_id) for text in order.sample(texts, 32))
        metrics = learner.update(texts, [part])
    assert metrics["predicted_accept_length"] > 2.5  # of at most 4: trained, so that there is something to lose
    return Pair(decoder, draft)


def requests(num_prompts: int, num_siblings: int, *, run: int, temperature: float = 1.0) -> list[RolloutRequest]:
    def sampling(prompt: int, sibling: int) -> SamplingParams:
        seed = 1_000_000_007 * run + 10_007 * prompt + 13 * sibling
        return SamplingParams(temperature, max_new_tokens=40, seed=seed, stop_token_ids=(5,))

    return [
        RolloutRequest(p, s, tuple((p * 5 + 3 * i) % 13 for i in range(2 + p % 4)), sampling(p, s))
        for p in range(num_prompts)
        for s in range(num_siblings)
    ]


def rename(draft: Eagle3, **tensors: Tensor) -> Eagle3:
    """A copy of the draft with other values under some names, dots written as double underscores."""
    found = copy.deepcopy(draft)
    with torch.no_grad():
        for name, tensor in tensors.items():
            found.get_parameter(name.replace("__", ".")).copy_(tensor)
    return found


def swapped_halves(draft: Eagle3, dim: int) -> Eagle3:
    names = [f"midlayer.self_attn.{x}_proj.weight" for x in "qkv"]
    halves = {name: draft.get_parameter(name).chunk(2, dim) for name in names}
    return rename(draft, **{n.replace(".", "__"): torch.cat((b, a), dim) for n, (a, b) in halves.items()})


def other_layers(draft: Eagle3, change: Callable[[list[int]], Iterable[int]]) -> Eagle3:
    found = copy.deepcopy(draft)
    found.config = replace(draft.config, aux_layer_ids=tuple(change(list(draft.config.aux_layer_ids))))
    return found


FAULTS: dict[str, Callable[[Pair], Eagle3]] = {
    "q, k, v with swapped input halves": lambda pair: swapped_halves(pair.draft, 1),
    "q, k, v with swapped output halves": lambda pair: swapped_halves(pair.draft, 0),
    "the policy's lm_head": lambda pair: rename(pair.draft, lm_head__weight=pair.decoder.head),
    "the policy's norm": lambda pair: rename(
        pair.draft, norm__weight=pair.decoder.named_tensors()["model.norm.weight"]
    ),
    "no lm_head, zeros": lambda pair: rename(pair.draft, lm_head__weight=torch.zeros_like(pair.draft.lm_head.weight)),
    "no lm_head, random": lambda pair: rename(
        pair.draft, lm_head__weight=Eagle3(pair.draft.config, seed=8).lm_head.weight
    ),
    "lost: random weights": lambda pair: Eagle3(pair.draft.config, seed=9),
    "captured layers one too low": lambda pair: other_layers(pair.draft, lambda ids: [i - 1 for i in ids]),
    "captured layers one too high": lambda pair: other_layers(pair.draft, lambda ids: [i + 1 for i in ids]),
    "captured layers in another order": lambda pair: other_layers(pair.draft, reversed),
}


@dataclass(frozen=True)
class Served:
    """What an engine with `draft` brought, and what the sound draft should have."""

    samples: dict[tuple[int, int], Sample]
    texts: list[DraftSample]

    def looks(self, pair: Pair, rule: VerifyRule, *, traced: bool, min_effect: float = MIN_EFFECT) -> Iterable[Look]:
        """One for every few texts; without traces an engine tells a histogram alone, as a server does."""
        shown = self.samples
        if not traced:
            shown = {key: replace(sample, trace=b"") for key, sample in shown.items()}
        for start in range(0, len(self.texts), TEXTS_A_LOOK):
            batch = make_batch(self.texts[start : start + TEXTS_A_LOOK])
            if batch is not None:
                posteriors = accept_posteriors(pair.draft, batch, DEPTH, rule)
                yield look_at_batch(posteriors, batch, shown, min_effect)


def serve(pair: Pair, draft: Eagle3, rule: VerifyRule, num_prompts: int, run: int) -> Served:
    temperature = 0.0 if rule is VerifyRule.GREEDY else 1.0
    served = VerifyRule.REJECTION if rule is VerifyRule.GREEDY else rule
    engine = make_engine(pair.decoder, draft, max_running_requests=64, verify_rule=served.value)
    samples = run_engine(engine, requests(num_prompts, 4, run=run, temperature=temperature))
    # Not in the order in which they finished, which tells who accepted more than expected.
    ordered = sorted(samples.values(), key=lambda sample: sample.request.key)
    return Served(samples, [captured((pair.decoder, pair.draft), sample) for sample in ordered])


def steps_until_alarm(sentinel: Sentinel, looks: Iterable[Look]) -> int | None:
    num_steps = 0
    for step, look in enumerate(looks, start=100):
        num_steps += int(look.num_steps)
        if sentinel.take(look, step) is not None:
            return num_steps
    return None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_serving_draft_is_caught(pair: Pair, fault: str) -> None:
    served = serve(pair, FAULTS[fault](pair), VerifyRule.REJECTION, 30, run=1)
    for traced in (True, False):
        sentinel = Sentinel(ALPHA)
        num_steps = steps_until_alarm(sentinel, served.looks(pair, VerifyRule.REJECTION, traced=traced))
        alarm = sentinel.alarm
        assert num_steps is not None and num_steps <= MOST_STEPS and alarm is not None
        if "random" in fault or "zeros" in fault:
            assert alarm.pattern is Pattern.LOST
        assert alarm.pattern is not Pattern.HIGHER
        kind = "steps told" if traced else "histogram told"
        lengths = f"{alarm.accept_length:.2f} for {alarm.expected_accept_length:.2f}"
        print(f"\n{fault} ({kind}): {alarm.pattern} after {num_steps} verify steps, {lengths}")


@pytest.mark.parametrize("rule", [VerifyRule.TARGET_ONLY, VerifyRule.COUPLED, VerifyRule.GREEDY])
def test_a_fault_is_caught_under_every_rule(pair: Pair, rule: VerifyRule) -> None:
    served = serve(pair, FAULTS["captured layers in another order"](pair), rule, 30, run=2)
    for traced in (True, False):
        num_steps = steps_until_alarm(Sentinel(ALPHA), served.looks(pair, rule, traced=traced))
        assert num_steps is not None and num_steps <= MOST_STEPS


def test_a_draft_that_is_lost_in_the_middle_is_dated(pair: Pair) -> None:
    """As by a release and resume of the engine's memory after which the draft is not sent again."""
    sentinel = Sentinel(ALPHA)
    sound = serve(pair, pair.draft, VerifyRule.REJECTION, 30, run=3)
    assert steps_until_alarm(sentinel, sound.looks(pair, VerifyRule.REJECTION, traced=True)) is None
    lost = serve(pair, FAULTS["lost: random weights"](pair), VerifyRule.REJECTION, 10, run=4)
    looks = lost.looks(pair, VerifyRule.REJECTION, traced=True)
    alarms = [alarm for step, look in enumerate(looks, start=200) if (alarm := sentinel.take(look, step))]
    assert [(a.since_step, a.was_sound, a.pattern) for a in alarms] == [(200, True, Pattern.LOST)]
    assert alarms[0].num_steps <= MOST_STEPS


def test_more_than_draft_and_policy_can_have_is_caught(pair: Pair) -> None:
    """An engine that verifies by the coupled rule when it was told target-only accepts more."""
    served = serve(pair, pair.draft, VerifyRule.COUPLED, 30, run=5)
    sentinel = Sentinel(ALPHA)
    assert steps_until_alarm(sentinel, served.looks(pair, VerifyRule.TARGET_ONLY, traced=True)) is not None
    assert sentinel.alarm is not None and sentinel.alarm.pattern is Pattern.HIGHER


def test_drafts_from_older_texts_are_left_out(tmp_path: Path) -> None:
    """The forecast knows nothing of a step that history drafted; those of the model are as forecast, to the count."""
    decoder, draft = load_pair(tmp_path, torch.float64, vocab_size=16, num_hidden_layers=4)
    history = SpeculationConfig(history=True, history_min_match=1, history_min_confidence=0.0)
    settings = RolloutConfig(controller="fixed", verify_rule="coupled", max_running_requests=16)
    engine = TorchEngine(decoder, settings, draft=draft, speculation=history)
    for run in range(3):
        samples = run_engine(engine, requests(6, 8, run=run, temperature=0.5))
    spec = sum((sample.spec for sample in samples.values()), SpecStats())
    batch = make_batch([captured((decoder, draft), sample) for sample in samples.values()])
    assert batch is not None and spec.history is not None
    look = look_at_batch(accept_posteriors(draft, batch, DEPTH, VerifyRule.COUPLED), batch, samples, 0.0)
    assert 0 < int(look.num_steps) == spec.num_verify_steps - spec.history.num_verify_steps < spec.num_verify_steps
    torch.testing.assert_close(look.observed_K, look.expected_K)


NUM_CLEAN_LOOKS = 100


@pytest.mark.slow
@pytest.mark.parametrize("traced", [True, False], ids=["steps told", "histogram told"])
def test_no_false_alarm_in_a_hundred_looks_at_a_sound_engine(sound_looks: dict[bool, list[Look]], traced: bool) -> None:
    """Not even of a sentinel that tolerates nothing at all: `sound_looks` have no tolerance."""
    looks = sound_looks[traced]
    sentinel = Sentinel(ALPHA)
    highest = max(sentinel.evidence for step, look in enumerate(looks) if sentinel.take(look, step) is None)
    assert sentinel.alarm is None and len(looks) == NUM_CLEAN_LOOKS
    z_L = torch.tensor([look.z for look in looks])
    assert abs(float(z_L.mean())) * NUM_CLEAN_LOOKS**0.5 < 4 and 0.8 < float(z_L.std()) < 1.25
    print(f"\n{sum(int(look.num_steps) for look in looks)} steps, highest evidence {highest:.2f} nats")


@pytest.fixture(scope="session")
def sound_looks(pair: Pair) -> dict[bool, list[Look]]:
    served = serve(pair, pair.draft, VerifyRule.REJECTION, NUM_CLEAN_LOOKS * TEXTS_A_LOOK // 4, run=6)
    found = {}
    for traced in (True, False):
        found[traced] = list(served.looks(pair, VerifyRule.REJECTION, traced=traced, min_effect=0.0))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rule", [VerifyRule.REJECTION, VerifyRule.TARGET_ONLY])
def test_an_engine_in_bfloat16_is_no_fault(pair: Pair, rule: VerifyRule) -> None:
    """Policy and draft serve in bfloat16, and the learner's forecast is in float32 from the same rounded policy."""
    served = Decoder(pair.decoder.config, torch.bfloat16)
    policy = Decoder(pair.decoder.config, torch.float32)
    for name, tensor in pair.decoder.named_tensors().items():
        served.named_tensors()[name].copy_(tensor)
        policy.named_tensors()[name].copy_(tensor.to(torch.bfloat16))
    rounded = Pair(served, copy.deepcopy(pair.draft).to(torch.bfloat16))
    engine = make_engine(rounded.decoder, rounded.draft, max_running_requests=64, verify_rule=rule.value)
    samples = run_engine(engine, requests(60, 4, run=7))
    ordered = sorted(samples.values(), key=lambda sample: sample.request.key)
    looks = Served(samples, [captured((policy, pair.draft), sample) for sample in ordered])
    assert steps_until_alarm(Sentinel(ALPHA), looks.looks(pair, rule, traced=True)) is None
