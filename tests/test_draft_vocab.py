"""A reduced draft vocabulary is what the policy emits, chosen once and then fixed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from draft_models.checkpoint import load_draft, save_draft
from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config
from tests.draft_helpers import TARGET_CONFIG
from tests.loop_helpers import make_tiny_model, metrics, run, tiny_config
from tests.policy_helpers import rollout
from trainer import draft_vocab
from trainer.config import ConfigError
from trainer.data import DataPosition
from trainer.draft_vocab import answers_vocabulary
from trainer.hf_files import read_config
from trainer.rollouts import make_requests, sampling_params
from trainer.run import make_draft, read_inputs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def test_tokens_said_come_before_tokens_asked_and_ends_are_always_in() -> None:
    samples = [replace(s, token_ids=(7, 7, 30, 9)) for s in rollout(1, 2)]
    samples = [replace(s, request=replace(s.request, prompt_ids=(3, 3, 3, 3, 3, 4))) for s in samples]

    def vocabulary(size: int) -> list[int]:
        sizes = Eagle3Config.from_target(TARGET_CONFIG, DraftConfig(draft_vocab_size=size))
        return answers_vocabulary(sizes, samples, eos=(39, 1000)).tolist()

    assert vocabulary(2) == [7, 39]
    assert vocabulary(4) == [7, 9, 30, 39]
    assert vocabulary(6) == [3, 4, 7, 9, 30, 39]  # what fills it up was asked


def vocabulary_of(folder: Path, model: Path) -> torch.Tensor:
    ids = load_draft(folder / "draft", read_config(model)).target_ids
    assert ids is not None
    return ids


def test_a_run_counts_its_first_answers_and_a_resumed_one_keeps_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(model, tmp_path, "counted", num_rollout=2, rollout__verify_rule="coupled")
    config = replace(config, draft=replace(config.draft, draft_vocab_size=24))
    inputs = read_inputs(config)
    answers = draft_vocab.first_answers(config, inputs)
    said = Counter(token for sample in answers for token in sample.token_ids)
    assert len(answers) == 12 and len(said) > 24
    prompts, _ = inputs.prompts.take(DataPosition(), 3)
    first_step = make_requests(prompts, sampling_params(config.rollout), 4, config.seed, 0)
    assert {s.request.key for s in answers} == {request.key for request in first_step}
    assert not {s.request.sampling.seed for s in answers} & {request.sampling.seed for request in first_step}
    folder = run(config)
    found = vocabulary_of(folder, model)
    assert set(found.tolist()) >= {token for token, _ in said.most_common(20)}
    assert set(found.tolist()) >= set(inputs.eos_token_ids)
    assert "answering 3 prompts once without speculation" in capsys.readouterr().err

    monkeypatch.setattr(draft_vocab, "first_answers", lambda *_: pytest.fail("a resumed run has its vocabulary"))
    run(replace(config, num_rollout=3, resume=True))
    assert torch.equal(vocabulary_of(folder, model), found)
    assert len(metrics(folder)) == 3


def test_a_setting_that_contradicts_the_given_draft_is_refused(model: Path, tmp_path: Path) -> None:
    hf_config = read_config(model)
    sizes = Eagle3Config.from_target(hf_config, DraftConfig(draft_vocab_size=24, aux_layer_ids=(0, 1, 2)))
    save_draft(Eagle3(sizes), tmp_path / "draft")
    given = tiny_config(model, tmp_path, "x", rollout__speculative_draft_model_path=str(tmp_path / "draft"))
    inputs = read_inputs(given)
    assert make_draft(given, inputs).config == sizes
    for key, value in (("draft_vocab_size", 12), ("aux_layer_ids", (1, 0, 2)), ("intermediate_size", 8)):
        asked = replace(given, draft=replace(given.draft, **{key: value}))
        with pytest.raises(ConfigError, match=rf"draft\.{key} = .* has .*: leave the setting out"):
            make_draft(asked, inputs)
