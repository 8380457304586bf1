"""make-model: the folder is a real checkpoint, whole or absent, and the same for the same seed."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from trainer import make_model as module
from trainer.config import ConfigError
from trainer.make_model import MakeModelConfig, Shape, make_model


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(module.PRESETS, "3m", Shape(32, 7, 2, 1, 16, 48))


def config_for(tmp_path, **changes):
    base = MakeModelConfig(out=tmp_path / "model", batch_size=4, num_train_prompts=10, num_eval_prompts=4)
    return replace(base, **changes)


@pytest.mark.parametrize("model_type", module.MODEL_TYPES)
def test_the_folder_loads_with_transformers(tmp_path, model_type):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = make_model(config_for(tmp_path, model_type=model_type))
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.model_type == model_type and model.config.num_hidden_layers == 7
    assert model.config.vocab_size % 64 == 0 and model.config.vocab_size >= len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and rows[0].keys() == {"prompt", "label"}
    ids = tokenizer.encode(rows[0]["prompt"])
    assert tokenizer.decode(ids) == rows[0]["prompt"]
    assert model(torch.tensor([ids])).logits.isfinite().all()


def test_prompt_and_chat_template_give_the_same_tokens_and_split_anywhere(tmp_path):
    from transformers import AutoTokenizer

    out = make_model(config_for(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(out)
    for line in (out / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        chat = [{"role": "user", "content": row["prompt"]}]
        assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == row["prompt"]
        whole = tokenizer.encode(row["prompt"] + " " + row["label"])
        assert whole == tokenizer.encode(row["prompt"]) + tokenizer.encode(" " + row["label"])


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_same_seed_same_weights_and_the_warm_start_learns(tmp_path):
    losses = []
    config = config_for(tmp_path, warm_start_steps=12, lr=1e-2)
    first = weights(make_model(config, lambda progress: losses.append(progress.loss)))
    second = weights(make_model(replace(config, out=tmp_path / "again")))
    other = weights(make_model(replace(config, out=tmp_path / "other", seed=1)))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.2


def test_eps_residual_scales_the_upper_layers_only_and_is_labelled(tmp_path):
    plain = weights(make_model(config_for(tmp_path)))
    scaled_dir = make_model(config_for(tmp_path, out=tmp_path / "scaled", eps_residual=0.25))
    scaled = weights(scaled_dir)
    for name, tensor in plain.items():
        upper = any(f"layers.{i}." in name for i in range(2, 7))
        factor = 0.25 if upper and ("o_proj" in name or "down_proj" in name) else 1.0
        assert torch.equal(tensor * factor, scaled[name]), name
    assert json.loads((scaled_dir / "config.json").read_text())["slipstream"]["synthetic"] is True
    assert "SYNTHETIC" in (scaled_dir / "README.md").read_text()


def test_nothing_is_left_when_making_fails(tmp_path):
    def interrupt(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_model(config_for(tmp_path, warm_start_steps=2), interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "4m"}, "--size '4m' is unknown, did you mean"),
        ({"model_type": "qwen33"}, "did you mean 'qwen3'"),
        ({"task": "srot"}, "did you mean 'sort'"),
        ({"task": "ledger"}, "--context-length 256 does not hold .* the task ledger; at least 1280"),
        ({"warm_start_steps": 3, "warm_start_s": 1.0}, "exclude each other"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make_model(config_for(tmp_path, **changes))
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        make_model(config_for(tmp_path))


@pytest.mark.parametrize(
    ("flag", "changes"),
    [
        ("--warm-start-steps", {"warm_start_steps": -3}),
        ("--warm-start-seconds", {"warm_start_s": float("nan")}),
        ("--eps-residual", {"eps_residual": float("nan")}),
        ("--logit-scale", {"logit_scale": -1.0}),
        ("--embed-scale", {"embed_scale": 0.0}),
        ("--context-length", {"context_length": 3}),
    ],
)
def test_impossible_numbers_are_refused(tmp_path, flag, changes):
    with pytest.raises(ConfigError, match=flag):
        make_model(config_for(tmp_path, **changes))
    assert not (tmp_path / "model").exists()


def test_lines_hold_whole_demonstrations_and_have_one_shape(tmp_path):
    config = config_for(tmp_path, task="repeat", batch_size=8, batch_tokens=600, context_length=200)
    task = module.get_task("repeat")
    tokenizer = module.train_tokenizer(task, config)
    batches = module.Pools(tokenizer, task, config)[0]
    assert batches and all(batch.input_ids_BT.shape == (3, 200) == batch.labels_BT.shape for batch in batches)
    first = module.WARM_START_START
    known = {
        prompt + answer for prompt, answer in (task.demonstration(config.seed, i) for i in range(first, first + 64))
    }
    seen = []
    for batch in batches:
        for ids, labels in zip(batch.input_ids_BT, batch.labels_BT, strict=True):
            text = ids[ids != tokenizer.pad_token_id]
            seen += tokenizer.decode(text).split(module.EOS)[:-1]
            answers = tokenizer.decode(labels[labels != -100]).split(module.EOS)[:-1]
            assert answers == [told.partition("\n")[2] for told in seen[-len(answers) :]], (
                "the loss is on answers alone"
            )
        assert batch.num_tokens == (batch.input_ids_BT != tokenizer.pad_token_id).sum()
    assert len(seen) == len(set(seen)) and set(seen) <= known
    assert len(seen) > 2 * 3 * len(batches), "several demonstrations share a line"


def test_a_worker_prepares_the_same_batches(tmp_path):
    config = config_for(tmp_path, batch_tokens=600)
    task = module.get_task(config.task)
    pools = module.Pools(module.train_tokenizer(task, config), task, config)
    alone, helped = (itertools.islice(module._batches(pools, workers), 12) for workers in (0, 1))
    assert all(np.array_equal(a.input_ids_BT, b.input_ids_BT) for a, b in zip(alone, helped, strict=True))


def test_the_head_runs_on_answers_only_and_the_loss_is_the_whole_models(tmp_path):
    config = config_for(tmp_path)
    task = module.get_task(config.task)
    tokenizer = module.train_tokenizer(task, config)
    model = module.build(config, tokenizer)
    batch = module.Pools(tokenizer, task, config)[0][0]
    input_ids_BT, labels_BT = (torch.from_numpy(array).long() for array in (batch.input_ids_BT, batch.labels_BT))
    logits_BTV = model(input_ids=input_ids_BT).logits[:, :-1]
    whole = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten())
    torch.testing.assert_close(module._answer_loss(model, batch), whole)
