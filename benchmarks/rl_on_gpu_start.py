"""What every arm starts from: the warm-started policy, the drafts, the servers, and what the start policy is like."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.rl_on_gpu_arms import ARMS, RECORDS_FILE, Arm, Place, Plan, model_config, server_config
from draft_models.checkpoint import save_draft
from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config, choose_draft_vocab
from draft_models.ngram import NgramDrafter
from sync.atomic import whole_folder, write_file
from trainer.hf_files import read_config
from trainer.make_model import WarmStartProgress, make_model
from trainer.metrics import METRICS_FILE, length_metrics, read_metrics
from trainer.serving import eos_token_ids, load_tokenizer

NGRAM_MATCH = (2, 8)
LOADER_WORKERS = 8


def make_shape(plan: Plan, place: Place) -> Path:
    """The policy with random weights, for servers to start with: they need shapes, and get weights from each run."""
    out = place.work / "shape" / place.policy.name  # a run is attached to a server of a policy of its own name only
    if not out.exists():
        make_model(model_config(plan, out, trained=False))
    return out


def make_policy(plan: Plan, place: Place) -> dict[str, Any]:
    """The start policy, made once; how its warm start went."""
    told = place.work / "warm_start.json"
    if told.exists():
        return json.loads(told.read_text())
    shutil.rmtree(place.policy, ignore_errors=True)  # of a call that was cut off between the two
    seen: list[WarmStartProgress] = []

    def note(progress: WarmStartProgress) -> None:
        seen.append(progress)
        if progress.step % 50 == 0:
            rate = progress.tokens / max(progress.elapsed_s, 1e-9)
            print(f"warm start: step {progress.step}, loss {progress.loss:.3f}, {rate:,.0f} tokens/s", flush=True)

    start_s = time.perf_counter()
    on_gpu = torch.cuda.is_available()
    config = model_config(plan, place.policy)
    make_model(config, note, device="cuda" if on_gpu else "cpu", num_workers=LOADER_WORKERS if on_gpu else 0)
    if on_gpu:
        torch.cuda.empty_cache()
    last = seen[-1]
    about = {
        "num_parameters": read_config(place.policy)["slipstream"]["num_parameters"],
        "warm_start_steps": last.step,
        "warm_start_tokens": last.tokens,
        "warm_start_loss": last.loss,
        "warm_start_s": time.perf_counter() - start_s,
    }
    write_file(told, json.dumps(about))
    return about


def make_drafts(plan: Plan, place: Place, policy: Path) -> None:
    """Random drafts: over the whole vocabulary, and over the tokens that right answers are made of."""
    hf_config = read_config(policy)
    for name, size in (("random", 0), ("reduced", plan.reduced_vocab)):
        if place.draft(name).exists():
            continue
        sizes = Eagle3Config.from_target(hf_config, DraftConfig(draft_vocab_size=size))
        target_ids = answer_tokens(policy, hf_config["vocab_size"], size) if size else None
        with whole_folder(place.draft(name)) as folder:
            save_draft(Eagle3(sizes, seed=plan.model_seed, target_ids=target_ids), folder)


def answer_tokens(policy: Path, vocab_size: int, count: int) -> torch.Tensor:
    """The tokens most frequent in the prompts' right answers, those that end a response among them."""
    tokenizer = load_tokenizer(policy)
    counts_V = torch.zeros(vocab_size, dtype=torch.int64)
    for line in (policy / "train.jsonl").read_text().splitlines():
        ids = tokenizer.encode(" " + json.loads(line)["label"])
        counts_V += torch.bincount(torch.tensor(ids), minlength=vocab_size)
    counts_V[list(eos_token_ids(policy, tokenizer))] = counts_V.max() + 1
    return choose_draft_vocab(counts_V, count)


# ---- servers ----


class Servers:
    """SGLang servers by name, started side by side, each serving one run after another."""

    def __init__(self, plan: Plan, place: Place) -> None:
        self._plan, self._place = plan, place
        self._pool = ThreadPoolExecutor(max_workers=len(ARMS))
        self._engines: dict[str, Future[Any]] = {}

    def start(self, arms: Sequence[Arm], policy: Path) -> None:
        """Begin to start what these arms need; `address` waits for it."""
        ends = eos_token_ids(policy, load_tokenizer(policy))  # here: threads trip over each other's first import
        for arm in arms:
            if arm.server not in self._engines:
                self._engines[arm.server] = self._pool.submit(self._start, arm, policy, ends)

    def _start(self, arm: Arm, policy: Path, ends: Sequence[int]) -> Any:
        from rollout_engine.sglang_engine import SGLangEngine

        draft = self._place.draft("reduced" if arm.draft == "reduced" else "random") if arm.draft else None
        start_s = time.perf_counter()
        engine = SGLangEngine(
            policy,
            server_config(self._plan, arm, draft),
            draft=draft,
            eos_token_ids=ends,
            work_dir=self._place.work / "servers" / arm.server,
            serves_files=True,
        )
        up_s = time.perf_counter() - start_s
        engine.warm_up()  # a machine's first batch compiles for more than a minute: better while the policy is made
        ready_s = time.perf_counter() - start_s
        print(f"server {arm.server}: up after {up_s:.0f} s, warm after {ready_s:.0f} s, {engine.address}", flush=True)
        return engine

    def address(self, arm: Arm) -> str:
        """Of the arm's server, once it is up. Raises what its start raised."""
        return self._engines[arm.server].result().address

    def close(self) -> None:
        for started in self._engines.values():
            if started.exception() is None:
                started.result().close()
        self._pool.shutdown()


class NoServers:
    """In the place of `Servers` for the embedded engine, which lives inside each run."""

    def start(self, arms: Sequence[Arm], policy: Path) -> None:
        """Nothing to start."""

    def address(self, arm: Arm) -> str:
        return ""

    def close(self) -> None:
        """Nothing to stop."""


@contextmanager
def serving(plan: Plan, place: Place) -> Iterator[Servers | NoServers]:
    servers = Servers(plan, place) if plan.engine == "sglang" else NoServers()
    try:
        yield servers
    finally:
        servers.close()


# ---- what the start policy is like ----


def start_statistics(plan: Plan, folder: Path) -> dict[str, Any]:
    """From the offline run's rollouts, which all are the start policy's: reward, lengths, uncertainty, n-gram hits."""
    lines = read_metrics(folder / METRICS_FILE)
    noted = [json.loads(line) for line in (folder / RECORDS_FILE).read_text().splitlines()]
    responses = [r for line in noted for r in line["responses"]]
    lengths = length_metrics([r[2] for r in responses])
    truncated = sum(line["finish_reasons"].get("length", 0) for line in lines)
    keyed = [((r[0], i), ids) for line in noted[:2] for i, (r, ids) in enumerate(_with_tokens(line))]
    return {
        "num_responses": len(responses),
        "response_tokens": sum(r[2] for r in responses),
        "reward": sum(r[4] for r in responses) / len(responses),
        "truncated": truncated / len(responses),
        **{key: lengths[f"response_len_{key}"] for key in ("mean", "p50", "p90", "p99", "max")},
        "entropy": _mean([line["entropy"] for line in lines]),
        "max_prob": _mean([line["max_prob"] for line in noted]),
        "sampled_prob": _mean([line["sampled_prob"] for line in noted]),
        "ngram_hits_siblings": ngram_hits(keyed),
        "ngram_hits_all": ngram_hits([((0, n), ids) for n, (_, ids) in enumerate(keyed)]),
        "draft_tokens": sum(line.get("draft_tokens", 0) for line in lines),
        "draft_updates": sum(line.get("draft_updates", 0) for line in lines),
        "draft_s": sum(line["time_draft_s"] for line in lines),
        "accept_length_first": lines[0]["accept_length"],
        "accept_length_last": lines[-1]["accept_length"],
    }


def _with_tokens(line: dict[str, Any]) -> Iterator[tuple[list[float], list[int]]]:
    return zip(line["responses"], line["token_ids"], strict=True)


def _mean(values: Sequence[float | None]) -> float:
    found = [value for value in values if value is not None]
    return sum(found) / len(found)


def ngram_hits(texts: Sequence[tuple[tuple[int, int], Sequence[int]]]) -> float:
    """Share of tokens that an n-gram drafter guesses, when all earlier texts of the same group are known to it.

    That is its expected acceptance of a first draft token under the target-only rule, no match counting as a rejection.
    """
    drafter, hits, total = NgramDrafter(*NGRAM_MATCH), 0, 0
    for key, ids in texts:
        for i, token in enumerate(ids):
            hits += bool(i) and drafter.propose(key, 1) == [token]
            drafter.extend(key, [token])
        total += len(ids)
    return hits / total


def with_flags(plan: Plan, flags: Sequence[str]) -> Plan:
    """`NAME=VALUE` server flags, values as JSON where they are JSON."""
    pairs = dict(flag.split("=", 1) for flag in flags)
    return replace(plan, sglang=plan.sglang | {name: _json_or_text(text) for name, text in pairs.items()})


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
