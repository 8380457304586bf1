"""The ablation's fixed target and the rollouts recorded from it, once; and their states, as every arm sees them."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.draft_ablation_arms import Plan, target_config
from benchmarks.draft_scores import law_statistics
from benchmarks.draft_texts import draw_prompts, group_requests, ngram_statistics
from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3Config
from draft_models.types import DraftSample
from rollout_engine.capture import capture_samples
from rollout_engine.config import RolloutConfig
from rollout_engine.decoder import Decoder
from rollout_engine.torch_engine import TorchEngine
from rollout_engine.types import FinishReason, RolloutRequest, Sample, SamplingParams
from trainer.config import ConfigError, DataConfig
from trainer.data import load_prompts
from trainer.hf_files import read_config
from trainer.make_model import WarmStartProgress, make_model
from trainer.serving import eos_token_ids, load_tokenizer

LOADER_WORKERS = 8  # prepare the warm start's batches beside a GPU
TRAIN, HELD_OUT = "train", "held out"
_ROLLOUT_SEED = 7


@dataclass(frozen=True, slots=True)
class Recorded:
    """The texts of one split at one temperature, in the order of their keys."""

    split: str
    temperature: float
    samples: tuple[Sample, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(sample.token_ids) for sample in self.samples)


@dataclass(frozen=True, slots=True)
class Texts:
    """Recorded texts with the target's states, on the device, all arms' alike."""

    hf_config: dict[str, Any]
    train: dict[float, list[DraftSample]]  # by temperature
    held_out: dict[float, list[DraftSample]]
    about: dict[str, Any]


def make_target(plan: Plan, work: Path, device: str) -> dict[str, Any]:
    """The target's folder, made once per `work`; how its warm start went."""
    told = work / "target.json"
    if told.exists():
        return json.loads(told.read_text())
    shutil.rmtree(work / "target", ignore_errors=True)  # of a call that was cut off between the two
    seen: list[WarmStartProgress] = []
    start_s = time.perf_counter()
    make_model(
        target_config(plan, work / "target"),
        seen.append,
        device=device,
        num_workers=LOADER_WORKERS if device == "cuda" else 0,
    )
    if device == "cuda":
        torch.cuda.empty_cache()
    about = {
        "num_parameters": read_config(work / "target")["slipstream"]["num_parameters"],
        "made_in_s": time.perf_counter() - start_s,
    }
    if seen:
        last = seen[-1]
        about |= {"warm_start_steps": last.step, "warm_start_tokens": last.tokens, "warm_start_loss": last.loss}
    told.write_text(json.dumps(about))
    return about


# ---- rollouts ----


def record(plan: Plan, work: Path, decoder: Decoder) -> tuple[list[Recorded], float]:
    """The rollouts, sampled once per `work` by the embedded engine, all in flight together, and kept as token ids.

    Also the seconds that it took.
    """
    path = work / "rollouts.json.gz"
    if path.exists():
        return _read(path)
    tokenizer = load_tokenizer(work / "target")
    requests, split_of = _requests(plan, work / "target", tokenizer)
    config = RolloutConfig(
        max_running_requests=len(requests),
        speculative_algorithm="NONE",
        verify_rule="coupled",
        dtype=plan.dtype,
        context_length=plan.context_length,
    )
    engine = TorchEngine(decoder, config, eos_token_ids=eos_token_ids(work / "target", tokenizer))
    found: dict[tuple[str, float], list[Sample]] = {}
    start_s = time.perf_counter()
    for sample in engine.generate(requests):
        found.setdefault(split_of[sample.request.key], []).append(sample)
        if time.perf_counter() - start_s > plan.record_s:
            engine.abort()  # what still runs is handed out as far as it is: a text cut off is a text of the target
    engine.close()
    recorded = [
        Recorded(split, temperature, tuple(sorted(samples, key=lambda s: s.request.key)))
        for (split, temperature), samples in sorted(found.items())
    ]
    seconds = time.perf_counter() - start_s
    _write(path, recorded, seconds)
    return recorded, seconds


def _requests(
    plan: Plan, target: Path, tokenizer: Any
) -> tuple[list[RolloutRequest], dict[tuple[int, int], tuple[str, float]]]:
    """Every request, and the split and temperature of each key. Splits share no prompt.

    A prompt is drawn with a chance that goes with the length of its right answer, because the task's lengths are
    long-tailed and it is the long texts that fill a batch.
    """
    rows = load_prompts(
        target / "train.jsonl", DataConfig(), tokenizer, max_prompt_len=plan.context_length - 1, seed=0
    ).first()
    weights = [float(len(row.label)) for row in rows]
    count = plan.train_prompts + plan.held_out_prompts
    if count > len(rows):
        raise ConfigError(f"{target}/train.jsonl has {len(rows)} prompts, the ablation needs {count}")
    prompts = draw_prompts([row.token_ids for row in rows], count, _ROLLOUT_SEED, weights)
    parts = [(TRAIN, t, prompts[: plan.train_prompts]) for t in plan.train_temperatures]
    parts += [(HELD_OUT, t, prompts[plan.train_prompts :]) for t in plan.temperatures]
    requests, split_of = [], {}
    for stream, (split, temperature, members) in enumerate(parts):
        sampling = SamplingParams(temperature=temperature, max_new_tokens=plan.max_response_len)
        part = group_requests(members, plan.group, _ROLLOUT_SEED, sampling, first_prompt_id=stream * count)
        requests += part
        split_of |= {request.key: (split, temperature) for request in part}
    return requests, split_of


def _write(path: Path, recorded: Sequence[Recorded], seconds: float) -> None:
    parts = [
        {
            "split": part.split,
            "temperature": part.temperature,
            "samples": [
                [*s.request.key, s.request.prompt_ids, s.token_ids, s.request.sampling.seed, s.finish_reason.value]
                for s in part.samples
            ],
        }
        for part in recorded
    ]
    aside = path.with_suffix(".aside")
    with gzip.open(aside, "wt", encoding="utf-8") as file:
        json.dump({"seconds": seconds, "parts": parts}, file)
    aside.replace(path)


def _read(path: Path) -> tuple[list[Recorded], float]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        told = json.load(file)
    recorded = []
    for part in told["parts"]:
        samples = tuple(_sample(part["temperature"], *fields) for fields in part["samples"])
        recorded.append(Recorded(part["split"], part["temperature"], samples))
    return recorded, told["seconds"]


def _sample(
    temperature: float,
    prompt_id: int,
    sample_id: int,
    prompt_ids: list[int],
    token_ids: list[int],
    seed: int,
    finish: str,
) -> Sample:
    sampling = SamplingParams(temperature=temperature, seed=seed)
    request = RolloutRequest(prompt_id, sample_id, tuple(prompt_ids), sampling)
    return Sample(request, tuple(token_ids), (), (), FinishReason(finish))


def fingerprint(recorded: Sequence[Recorded]) -> str:
    """Of all recorded tokens: results of different ones must not stand in one table."""
    digest = hashlib.sha256()
    for part in recorded:
        digest.update(repr((part.split, part.temperature, [s.token_ids for s in part.samples])).encode())
    return digest.hexdigest()[:16]


# ---- states ----


def load_texts(plan: Plan, work: Path, device: str) -> Texts:
    """Target and rollouts, made where they are missing, and the states of all texts."""
    about: dict[str, Any] = {"target": make_target(plan, work, device)}
    hf_config = read_config(work / "target")
    decoder = Decoder.from_hf(work / "target", getattr(torch, plan.dtype), device)
    recorded, record_s = record(plan, work, decoder)
    about |= {"record_s": record_s, "fingerprint": fingerprint(recorded)}
    start_s = time.perf_counter()
    layers = Eagle3Config.from_target(hf_config, DraftConfig()).aux_layer_ids
    train: dict[float, list[DraftSample]] = {}
    held_out: dict[float, list[DraftSample]] = {}
    left_bytes, texts = plan.max_state_bytes, []
    for part in sorted(recorded, key=lambda part: part.split):  # the held-out texts first: they are never dropped
        kept = list(_fitting(part.samples, left_bytes, 5 * decoder.config.hidden_size * decoder.embed.element_size()))
        captured = capture_samples(decoder, kept, layers)
        left_bytes -= sum(sample.num_bytes for sample in captured)
        (train if part.split == TRAIN else held_out)[part.temperature] = captured
        texts.append(_about(part, kept, captured, max(plan.depths)))
    about |= {
        "texts": texts,
        "states_s": time.perf_counter() - start_s,
        "state_bytes": plan.max_state_bytes - left_bytes,
    }
    return Texts(hf_config, train, held_out, about)


def _fitting(samples: Sequence[Sample], max_bytes: int, bytes_per_token: int) -> Iterator[Sample]:
    """Texts that hold a chain, up to the first one that does not fit."""
    for sample in samples:
        if len(sample.token_ids) < 2:
            continue
        max_bytes -= bytes_per_token * (len(sample.request.prompt_ids) + len(sample.token_ids))
        if max_bytes < 0:
            return
        yield sample


def _about(part: Recorded, kept: Sequence[Sample], captured: Sequence[DraftSample], k: int) -> dict[str, Any]:
    lengths = sorted(len(sample.token_ids) for sample in kept)
    return {
        "split": part.split,
        "temperature": part.temperature,
        "samples": len(kept),
        "left_out": len(part.samples) - len(kept),
        "cut_off": sum(sample.finish_reason is not FinishReason.STOP for sample in kept),
        "response_tokens": sum(lengths),
        "length_p50": lengths[len(lengths) // 2],
        "length_max": lengths[-1],
        **law_statistics(captured),
        **(ngram_statistics(kept, k) if part.split == HELD_OUT else {}),
    }
