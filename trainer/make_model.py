"""`slipstream make-model`: a small seeded policy with a real tokenizer, as a Hugging Face folder.

The weights come from a short supervised warm start on a synthetic task, or stay random. With
`eps_residual` the output projections of layers >= 2 are scaled down, which makes a policy that a one-layer
draft can follow: a synthetic subject for speed measurements, and labelled so in its config.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from trainer.config import ConfigError
from trainer.packing import pack
from trainer.suggest import nearest
from trainer.tasks import EVAL_START, TRAIN_START, WARM_START_START, Task, get_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MODEL_TYPES = ("qwen3", "qwen2", "llama")
EOS, PAD = "<|end|>", "<|pad|>"
# A prompt that already ends in the newline and one that went through the template are the same text.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ message.content + eos_token }}"
    "{% else %}{{ message.content | trim + '\\n' }}{% endif %}"
    "{% endfor %}"
)
_VOCAB_MULTIPLE = 64  # so that the vocabulary divides over any small tensor-parallel size
_BUCKET_BATCHES = 8  # batches drawn together and put together by length, so that little of a batch is padding
_REPORT_EVERY = 25  # steps of a warm start on a GPU


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one preset. Layers >= 7, so that SGLang's default capture layers are three distinct ones.

    `100m-deep` has the 28 layers of Qwen3-0.6B: a small model's decode step is bound by kernel launches, which go by
    layers.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int


PRESETS = {
    "3m": Shape(192, 7, 6, 2, 32, 512),
    "10m": Shape(320, 8, 10, 2, 32, 896),
    "30m": Shape(512, 10, 8, 4, 64, 1408),
    "100m": Shape(768, 16, 12, 4, 64, 2112),
    "100m-deep": Shape(512, 28, 8, 4, 64, 1536),
    "300m": Shape(1024, 24, 16, 8, 64, 3072),
}


@dataclass(frozen=True, slots=True)
class MakeModelConfig:
    """What to make. The same config gives the same weights, except when the warm start is bounded in seconds."""

    out: Path
    size: str = "3m"
    task: str = "sort"
    seed: int = 0
    model_type: str = "qwen3"
    tie_word_embeddings: bool = False
    context_length: int = 256
    vocab_size: int = 320  # of the tokenizer; the model's is rounded up to a multiple of 64
    warm_start_steps: int = 0
    warm_start_s: float = 0.0  # > 0: stop after these seconds instead of after a number of steps
    batch_size: int = 32
    # Padded tokens of a batch, instead of `batch_size` demonstrations: lines of `context_length`, each of several
    # demonstrations that see what stands before them. For long-tailed answers, and for a GPU.
    batch_tokens: int | None = None
    lr: float = 3e-3
    eps_residual: float = 1.0  # scale of o_proj and down_proj in layers >= 2
    embed_scale: float = 1.0  # scale of the embedding: larger, and the residual branches weigh less against it
    logit_scale: float = 1.0  # scale of the last norm: random weights alone give nearly uniform laws
    num_train_prompts: int = 4096
    num_eval_prompts: int = 128


@dataclass(frozen=True, slots=True)
class WarmStartProgress:
    step: int
    loss: float  # mean negative log-likelihood per answer token, nats
    elapsed_s: float
    tokens: int  # of prompts and answers so far, padding left out


Report = Callable[[WarmStartProgress], None]


def make_model(
    config: MakeModelConfig, report: Report = lambda progress: None, *, device: str = "cpu", num_workers: int = 0
) -> Path:
    """Write the folder (weights, config, tokenizer, train.jsonl, eval.jsonl, README.md) and return its path.

    The warm start runs on `device`, on CUDA in bfloat16 with float32 weights; `num_workers` processes prepare its
    batches.

    Everything is written aside and renamed, so a folder that exists is whole. `ConfigError`: an unknown size,
    task or architecture, or a folder that exists already.
    """
    check(config)
    task = get_task(config.task)
    tokenizer = train_tokenizer(task, config)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = build(config, tokenizer)
        if config.warm_start_steps or config.warm_start_s:
            warm_start(model.to(device), tokenizer, task, config, report, num_workers=num_workers)
            model.cpu()
    config.out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{config.out.name}-", dir=config.out.parent))
    try:
        _write(aside, model, tokenizer, task, config)
        os.replace(aside, config.out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return config.out


def check(config: MakeModelConfig) -> None:
    """`ConfigError` for anything that cannot be made, before anything heavy."""
    if config.size not in PRESETS:
        raise ConfigError(
            f"--size {config.size!r} is unknown{nearest(config.size, PRESETS)}; sizes: {', '.join(PRESETS)}"
        )
    if config.model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise ConfigError(
            f"--model-type {config.model_type!r} is unknown{nearest(config.model_type, MODEL_TYPES)}; types: {known}"
        )
    task = get_task(config.task)
    if config.out.exists():
        raise ConfigError(f"--out {config.out} exists already; choose another folder or remove it")
    for flag, value in (("--warm-start-steps", config.warm_start_steps), ("--warm-start-seconds", config.warm_start_s)):
        if not 0 <= value < math.inf:
            raise ConfigError(f"{flag} {value} must be 0 (none) or more")
    for flag in ("eps_residual", "embed_scale", "logit_scale"):
        if not 0 < getattr(config, flag) < math.inf:
            raise ConfigError(f"--{flag.replace('_', '-')} {getattr(config, flag)} must be a positive number")
    if config.context_length < task.min_context:
        raise ConfigError(
            f"--context-length {config.context_length} does not hold the prompts and answers of the task {task.name}; "
            f"at least {task.min_context}"
        )
    if config.warm_start_steps and config.warm_start_s:
        raise ConfigError("--warm-start-steps and --warm-start-seconds exclude each other; give one")


def train_tokenizer(task: Task, config: MakeModelConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the task's own seeded text, with eos, pad and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ("".join(task.demonstration(config.seed, WARM_START_START + i)) for i in range(1000))
    tokenizer.train_from_iterator(text, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, model_max_length=config.context_length
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build(config: MakeModelConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The model with random weights from torch's global generator, residual branches scaled."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = PRESETS[config.size]
    hf_config = AutoConfig.for_model(
        config.model_type,
        vocab_size=-(-len(tokenizer) // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=config.context_length,
        tie_word_embeddings=config.tie_word_embeddings,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.mul_(config.eps_residual)
            layer.mlp.down_proj.weight.mul_(config.eps_residual)
        model.model.embed_tokens.weight.mul_(config.embed_scale)
        model.model.norm.weight.mul_(config.logit_scale)
    return model


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    config: MakeModelConfig,
    report: Report = lambda progress: None,
    *,
    num_workers: int = 0,
) -> None:
    """Imitate the task's demonstrations (with their mistakes); the loss is on the answer and its end token."""
    on_cuda = model.device.type == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=on_cuda or None
    )
    batches = _batches(Pools(tokenizer, task, config), num_workers)
    if on_cuda and config.batch_tokens is not None:
        _compile_layers(model)
    first = next(batches)  # workers take their time to start, which is not the model's
    start, num_tokens = time.perf_counter(), 0
    model.train()
    for step, batch in enumerate(itertools.chain([first], batches)):
        elapsed_s = time.perf_counter() - start
        done = elapsed_s / config.warm_start_s if config.warm_start_s else step / config.warm_start_steps
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _schedule(step, done)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=on_cuda):
            loss = _answer_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        num_tokens += batch.num_tokens
        if not on_cuda or step % _REPORT_EVERY == 0:  # a loss that is read waits for the device
            report(WarmStartProgress(step + 1, loss.item(), elapsed_s, num_tokens))
    model.eval()


def _compile_layers(model: PreTrainedModel) -> None:
    """A small deep model's step is bound by kernel launches. One compilation serves all layers, which are alike."""
    for layer in model.model.layers:
        layer.compile(dynamic=False)


def _answer_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Mean negative log-likelihood of the answers' tokens, nats.

    On a CPU the head runs only where an answer's token follows; on a GPU choosing these would wait for the device.
    """
    input_ids_BT, labels_BT = (
        torch.from_numpy(array).to(model.device).long() for array in (batch.input_ids_BT, batch.labels_BT)
    )
    hidden_BTH = model.model(input_ids=input_ids_BT, use_cache=False).last_hidden_state[:, :-1]
    if model.device.type == "cuda":
        logits_BTV = model.lm_head(hidden_BTH)
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT[:, 1:].flatten())
    is_scored_BT = labels_BT[:, 1:] != -100
    logits_NV = model.lm_head(hidden_BTH[is_scored_BT])
    return F.cross_entropy(logits_NV.float(), labels_BT[:, 1:][is_scored_BT])


def _schedule(step: int, done: float) -> float:
    """Linear warm-up over 30 steps, then linear decay to a tenth."""
    return min(1.0, (step + 1) / 30) * (1.0 - 0.9 * done)


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded lines. No attention mask: padding stands behind everything that is scored.

    Arrays, because a tensor of another process would hold an open file each.
    """

    input_ids_BT: np.ndarray  # int32
    labels_BT: np.ndarray  # int32, -100 where there is no loss
    num_tokens: int  # padding left out


class Pools(torch.utils.data.Dataset[list[Batch]]):
    """Item i: some batches' worth of demonstrations, put together so that little of a batch is padding."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, task: Task, config: MakeModelConfig) -> None:
        self._tokenizer, self._task, self._config = tokenizer, task, config
        self.seed = config.seed

    def __getitem__(self, number: int) -> list[Batch]:
        size = _BUCKET_BATCHES * self._config.batch_size
        first = WARM_START_START + number * size
        prompts, responses = zip(
            *(self._task.demonstration(self.seed, row) for row in range(first, first + size)), strict=True
        )
        eos = self._tokenizer.eos_token_id
        answers = [[*ids, eos] for ids in self._tokenizer(list(responses))["input_ids"]]
        rows = list(zip(self._tokenizer(list(prompts))["input_ids"], answers, strict=True))
        return list(_cut(_lines(rows, self._config), self._config, self._tokenizer.pad_token_id))


Row = tuple[list[int], list[int]]  # a demonstration's prompt and answer


def _row_length(row: Row) -> int:
    return len(row[0]) + len(row[1])


def _lines(rows: list[Row], config: MakeModelConfig) -> list[list[Row]]:
    """The rows of the batches to be: one demonstration each, of ascending lengths; or, with `batch_tokens`, as many as
    `context_length` holds one behind another, what is longer left out."""
    if config.batch_tokens is None:
        return [[row] for row in sorted(rows, key=_row_length)]
    rows = [row for row in rows if _row_length(row) <= config.context_length]
    (bins,) = pack([_row_length(row) for row in rows], config.context_length, 1)
    return [[rows[i] for i in members] for members in bins]


def _cut(lines: list[list[Row]], config: MakeModelConfig, pad_id: int) -> Iterator[Batch]:
    """Batches of `batch_size` lines; with `batch_tokens` all of one shape, so that a compiled layer serves them all."""
    if config.batch_tokens is None:
        for start in range(0, len(lines), config.batch_size):
            part = lines[start : start + config.batch_size]
            yield _pad(part, pad_id, max(_row_length(row) for (row,) in part))
        return
    count = max(1, config.batch_tokens // config.context_length)
    for start in range(0, len(lines) - count + 1, count):
        yield _pad(lines[start : start + count], pad_id, config.context_length)


def _batches(pools: Pools, num_workers: int) -> Iterator[Batch]:
    """Endless batches, the pools one after another, the batches of a pool in an order from the seed."""
    rng = Random(pools.seed)
    loader = torch.utils.data.DataLoader(
        pools,
        batch_size=None,
        sampler=itertools.count(),
        num_workers=num_workers,
        generator=torch.Generator(),
        multiprocessing_context="spawn" if num_workers else None,  # a fork would copy the locks of running threads
    )
    for pool in loader:
        batches = list(pool)
        rng.shuffle(batches)
        yield from batches


def _pad(lines: list[list[Row]], pad_id: int, width: int) -> Batch:
    ids, labels = [], []
    for line in lines:
        fill = width - sum(map(_row_length, line))
        ids.append([token for prompt, answer in line for token in (*prompt, *answer)] + [pad_id] * fill)
        labels.append([label for prompt, answer in line for label in (*[-100] * len(prompt), *answer)] + [-100] * fill)
    num_tokens = sum(_row_length(row) for line in lines for row in line)
    return Batch(np.array(ids, np.int32), np.array(labels, np.int32), num_tokens)


def _write(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: Task, config: MakeModelConfig
) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # a second bar inside the command's own display
    model.config.slipstream = {**provenance(config), "num_parameters": model.num_parameters()}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, start, count in (
        ("train.jsonl", TRAIN_START, config.num_train_prompts),
        ("eval.jsonl", EVAL_START, config.num_eval_prompts),
    ):
        write_prompts(folder / name, task, config.seed, start, count)
    (folder / "README.md").write_text(_readme(model.config.slipstream), encoding="utf-8")
    folder.chmod(0o755)


def write_prompts(path: Path, task: Task, seed: int, start: int, count: int) -> None:
    """`count` rows {"prompt": ..., "label": ...} from row `start` on."""
    with path.open("w", encoding="utf-8") as file:
        for index in range(start, start + count):
            problem = task.problem(seed, index)
            file.write(json.dumps({"prompt": problem.prompt, "label": problem.label}) + "\n")


def provenance(config: MakeModelConfig) -> dict[str, Any]:
    """How a model was made, as its config.json says under "slipstream"; enough to make it again on a like machine."""
    made_by = {key: value for key, value in asdict(config).items() if key != "out" and value is not None}
    return {**made_by, "synthetic": config.eps_residual != 1.0 or not (config.warm_start_steps or config.warm_start_s)}


def _readme(made: dict[str, Any]) -> str:
    what = f"A {made['num_parameters'] / 1e6:.1f}M-parameter {made['model_type']} policy"
    if made["synthetic"]:
        how = (
            "SYNTHETIC: its weights are random, or its upper residual branches are scaled. It is a subject for "
            "speed measurements and says nothing about language."
        )
    else:
        how = f"Warm-started on demonstrations of the task {made['task']!r}, mistakes included."
    settings = json.dumps(made, indent=2)
    return f"# {what}\n\nMade by `slipstream make-model`. {how}\n\n```json\n{settings}\n```\n"
