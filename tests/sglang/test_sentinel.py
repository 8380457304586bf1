"""The sentinel over a real server: a draft that lost its output layer on the way raises the alarm, the server is ended
and another started without speculation, and the run goes on in it.

A CPU's SGLang verifies greedily over stand-in kernels. Under the target-only rule a draft then stands exactly where the
text has it, as that rule forecasts, so a sound engine shows no difference: the alarm is real.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from draft_models.checkpoint import save_draft
from tests import loop_helpers
from tests.sglang import helpers
from trainer.draft_learner import DraftLearner
from trainer.report import write_report

pytestmark = pytest.mark.sglang

FAULTY_FROM = 1  # version; the first one that is sent by a step


@pytest.fixture
def lost_output_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a version on the draft leaves the learner without its lm_head. What is sent arrives: no checksum sees it."""
    tensors, versions = DraftLearner.tensors, iter(range(100))

    def sent(learner: DraftLearner) -> dict[str, torch.Tensor]:
        found = tensors(learner)
        if next(versions) < FAULTY_FROM:
            return found
        # The server that is started from now on, too, must have no use for speculation's stand-ins.
        monkeypatch.setenv("SLIPSTREAM_STAND_IN", "forbid")
        return {**found, "lm_head.weight": torch.zeros_like(found["lm_head.weight"])}

    monkeypatch.setattr(DraftLearner, "tensors", sent)


@pytest.mark.usefixtures("stand_ins_allowed", "lost_output_layer")
def test_a_server_whose_draft_is_lost_is_started_again_without_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, draft = helpers.make_parrot(tmp_path / "parrot"), tmp_path / "draft"
    save_draft(helpers.repeating_draft(policy, helpers.weights_of(policy)), draft)
    settings = {
        "engine": "sglang",
        "device": "cpu",
        "sglang_python": str(helpers.SGLANG_PYTHON),
        "sglang": {"sleep_on_idle": True},
        "verify_rule": "target_only",
        "allow_lossy": True,  # the greedy verification
        "speculative_draft_model_path": str(draft),
        "max_response_len": 24,
    }
    rollout = {f"rollout__{name}": value for name, value in settings.items()}
    config = loop_helpers.tiny_config(policy, tmp_path, "watched", num_rollout=4, plain_probe_interval=0, **rollout)
    folder = loop_helpers.run(config)
    lines = loop_helpers.metrics(folder)
    sound, alarmed, *plain = lines

    assert abs(sound["sentinel_z"]) < 1 and sound["accept_length"] > 1.5
    text = alarmed["sentinel_alarm"]
    assert text.startswith("sentinel, step 1: speculation is stopped") and "since step 1" in text
    assert "the engine lost its draft" in text and f"slipstream: {text}" in capsys.readouterr().out
    assert alarmed["accept_length"] < 1.1 < alarmed["sentinel_expected_accept_length"]

    assert [line["policy_version"] for line in lines] == [0, 1, 2, 3]
    assert max(line["logp_diff_max"] for line in lines) < helpers.LOGPROB_TOLERANCE
    for line in plain:
        assert line["speculation_stopped"] == 1 and "accept_length" not in line
        assert abs(line["surprise_gap_z"]) < 5, "the new server samples from the policy's own law"
    assert (folder / "engine" / "without_speculation" / "engine.log").exists()
    assert "Speculation was stopped" in write_report(folder).read_text()
