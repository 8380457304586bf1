"""A published version is what the engine then computes with: caches, tied heads and the draft included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config
from rollout_engine.config import RolloutConfig
from rollout_engine.decoder import Decoder
from rollout_engine.torch_engine import TorchEngine
from rollout_engine.types import EngineError, RolloutRequest, Sample, SamplingParams
from sync.plan import SyncError
from sync.publish import publish
from tests.rollout_engine_helpers import TINY, save_hf_model
from tests.sync_helpers import TRANSPORTS, MakeTransport

CONFIG = RolloutConfig(controller="fixed", device="cpu", max_running_requests=4, verify_rule="rejection")


def decoder(folder: Path, seed: int, tied: bool = True) -> Decoder:
    path = folder / f"model_{seed}"
    if not path.exists():
        save_hf_model(path, seed=seed, tie_word_embeddings=tied)
    return Decoder.from_hf(path, torch.float32, torch.device("cpu"))


def draft(seed: int) -> Eagle3:
    """A random draft with opinions: untrained, its law is so flat that the rule's noise alone decides."""
    made = Eagle3(Eagle3Config.from_target(TINY, DraftConfig()), seed=seed)
    with torch.no_grad():
        made.lm_head.weight.mul_(50.0)
    return made


def roll_out(engine: TorchEngine) -> list[Sample]:
    requests = [
        RolloutRequest(prompt_id, sample_id, (3, 5 + prompt_id, 7), SamplingParams(max_new_tokens=20, seed=prompt_id))
        for prompt_id in range(3)
        for sample_id in range(2)
    ]
    return sorted(engine.generate(requests), key=lambda sample: sample.request.key)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("connect", TRANSPORTS.values(), ids=TRANSPORTS.keys())
def test_after_a_sync_the_engine_equals_one_built_from_the_new_weights(
    connect: MakeTransport, tmp_path: Path, tied: bool
) -> None:
    engine = TorchEngine(decoder(tmp_path, 0, tied), CONFIG, draft=draft(0), version=0)
    old = roll_out(engine)  # fills every cache under the old weights
    new, new_draft = decoder(tmp_path, 1, tied), draft(1)
    publish(new.named_tensors(), new_draft.named_tensors(), connect(engine.receiver, tmp_path / "sync"), version=1)
    fresh = TorchEngine(new, CONFIG, draft=new_draft, version=1)
    assert roll_out(engine) == roll_out(fresh) != old


def test_a_stale_draft_gives_right_samples_and_only_the_acceptance_tells(tmp_path: Path) -> None:
    """What the one version is for: nothing in the text betrays a draft that stayed behind."""
    coupled = replace(CONFIG, verify_rule="coupled")  # its tokens do not depend on the draft
    engine = TorchEngine(decoder(tmp_path, 0), coupled, draft=draft(0))
    before = roll_out(engine)
    for name, tensor in draft(1).named_tensors().items():
        engine.receiver.destinations[f"draft.{name}"].copy_(tensor)
    after = roll_out(engine)
    assert [s.token_ids for s in before] == [s.token_ids for s in after]
    assert [s.spec for s in before] != [s.spec for s in after]


def test_a_dirty_engine_serves_nothing_until_caught_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TorchEngine(decoder(tmp_path, 0), CONFIG, draft=draft(0))
    transport = TRANSPORTS["inprocess"](engine.receiver, tmp_path)
    new, new_draft = decoder(tmp_path, 1).named_tensors(), draft(1).named_tensors()

    def lost(*_: object) -> None:
        raise SyncError("device lost")

    with monkeypatch.context() as patched:
        patched.setattr(engine.receiver, "_verify_written", lost)
        with pytest.raises(SyncError, match="device lost"):
            publish(new, new_draft, transport, version=1)
    with pytest.raises(EngineError, match="mixture of versions"):
        roll_out(engine)
    publish(new, new_draft, transport, version=1)
    assert {span.version for sample in roll_out(engine) for span in sample.policy_versions} == {1}
