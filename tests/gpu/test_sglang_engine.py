"""SGLang on a GPU through its engine: EAGLE-3 with rejection sampling, syncs, memory given back, and no leftovers.

Small random bfloat16 models; nothing here depends on time. The servers run in the interpreter of the tests: three for
the whole module, one for each rule of sampling, and three for a test each.

Where two engines must say the same to the last count, drafts are verified by SGLang's own rule ("target_only"): there
they are the draft's first choices, and one request at a time is computed by the same kernels in the same shapes. Under
the rejection rule SGLang draws them, at temperature 0 too, so that no two engines see the same verify steps, and a near
tie in bfloat16 may fall either way.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from draft_models.checkpoint import save_draft
from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config
from rollout_engine.config import RolloutConfig
from rollout_engine.decoder import Decoder
from rollout_engine.kv_cache import KVCache
from rollout_engine.memory import memory_needed
from rollout_engine.sglang_engine import SGLangEngine
from rollout_engine.types import (
    EngineError,
    FinishReason,
    RolloutRequest,
    Sample,
    SamplingParams,
    SpecStats,
    VersionSpan,
)
from sync.publish import publish
from tests.gpu.counting import EOS, SIZES, VOCAB, save_counting
from tests.rollout_engine_helpers import save_hf_model
from tests.test_server_process import wait_for

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs SGLang: pip install '.[sglang]'"),
]
ROOT = Path(__file__).resolve().parents[2]
SLOTS = 8
PLAIN = "plain"  # decoding, beside the rules of verification
# The models are tiny, and so is the KV of all slots: no test could tell its loss. This is 4 GiB of it, see kv_bytes.
LARGE_KV = {"max_total_tokens": 2**20, "mem_fraction_static": 0.2} if torch.cuda.is_available() else {}
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Models:
    policy: Path
    draft: Path

    def weights(self) -> tuple[Weights, Weights]:
        draft = load_file(self.draft / "model.safetensors")
        return load_file(self.policy / "model.safetensors"), draft

    def moved(self, folder: Path) -> Models:
        """Other weights of the same sizes, saved under `folder`."""
        moved = Models(folder / "policy", folder / "draft")
        for number, (source, target) in enumerate(((self.policy, moved.policy), (self.draft, moved.draft))):
            target.mkdir(parents=True)
            for path in source.iterdir():
                if path.suffix == ".json":
                    (target / path.name).write_bytes(path.read_bytes())
            generator = torch.Generator().manual_seed(number)
            weights = {
                name: (tensor.float() + 0.1 * tensor.float().std() * torch.randn(tensor.shape, generator=generator)).to(
                    tensor.dtype
                )
                for name, tensor in load_file(source / "model.safetensors").items()
            }
            save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        return moved


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Logits spread so that sampling is neither flat nor certain."""
    folder = tmp_path_factory.mktemp("models")
    model = save_hf_model(folder / "policy", max_position_embeddings=1024, eos_token_id=EOS, **SIZES)
    model.to(torch.bfloat16).save_pretrained(folder / "policy")
    config = json.loads((folder / "policy" / "config.json").read_text())
    draft = Eagle3(Eagle3Config.from_target(config, DraftConfig()), seed=5)
    save_draft(draft.to(torch.bfloat16), folder / "draft")
    return Models(folder / "policy", folder / "draft")


def counting(folder: Path, step: int) -> Models:
    """Of the same sizes as `models`; here a draft shows in what is accepted."""
    models = Models(folder / "policy", folder / "draft")
    save_counting(models.policy, models.draft, step, torch.bfloat16)
    return models


def make_engine(models: Models, work_dir: Path, *, serves_files: bool = False, **changes: Any) -> SGLangEngine:
    settings = {
        "engine": "sglang",
        "device": DEVICE,
        "dtype": "bfloat16",
        "max_running_requests": SLOTS,
        "temperature": 1.0,
        "speculative_algorithm": "EAGLE3",
        "speculative_num_steps": 3,
        "verify_rule": "rejection",
        "sglang": {"mem_fraction_static": 0.15} if DEVICE == "cuda" else {},
    }
    config = RolloutConfig(**(settings | changes))
    draft = models.draft if config.speculative_algorithm == "EAGLE3" else None
    return SGLangEngine(
        models.policy, config, draft=draft, eos_token_ids=(EOS,), work_dir=work_dir, serves_files=serves_files
    )


def send(engine: SGLangEngine, models: Models, version: int) -> None:
    policy, draft = models.weights()
    planned = engine.transport.plan.by_name
    draft = {name: tensor for name, tensor in draft.items() if f"draft.{name}" in planned}
    publish(policy, draft or None, engine.transport, version)


EngineOf = Callable[[str], SGLangEngine]


@pytest.fixture(scope="module")
def engine_of(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineOf]:
    """By the rule that its samples follow; started when first asked for, and kept until the module's end."""
    engines: dict[str, SGLangEngine] = {}

    def get(rule: str) -> SGLangEngine:
        if rule in engines:
            return engines[rule]
        changes = {"speculative_algorithm": "NONE"} if rule == PLAIN else {"verify_rule": rule}
        engine = engines[rule] = make_engine(models, tmp_path_factory.mktemp(rule), **changes)
        with pytest.raises(EngineError, match="publish a version first"):
            engine.generate(requests(1))
        send(engine, models, 0)
        engine.warm_up()
        return engine

    yield get
    pids = server_pids()
    for engine in engines.values():
        engine.close()
    assert not any(map(psutil.pid_exists, pids))


@pytest.fixture
def engine(engine_of: EngineOf) -> SGLangEngine:
    return engine_of("rejection")


def server_pids() -> list[int]:
    """Of this process's servers; the supervisor is the parent of all that belongs to one."""
    return [process.pid for process in psutil.Process().children(recursive=True)]


def free_gpu_bytes() -> int:
    """Of the whole GPU, with this process's own context in place."""
    torch.zeros(1, device=DEVICE)
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def kv_bytes(models: Models, num_tokens: int) -> int:
    """Of policy and draft together."""
    policy, draft = (json.loads((folder / "config.json").read_text()) for folder in (models.policy, models.draft))
    need = memory_needed(
        policy, draft, policy_params=0, draft_params=0, itemsize=2, num_slots=1, tokens_per_slot=num_tokens
    )
    return need.kv_bytes


def requests(num_requests: int, temperature: float = 1.0, max_new_tokens: int = 64) -> list[RolloutRequest]:
    sampling = SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens)
    return [
        RolloutRequest(0, i, tuple((13 * i + 7 * j + 3) % VOCAB for j in range(4 + i % 5)), sampling)
        for i in range(num_requests)
    ]


def collect(samples: Iterable[Sample]) -> dict[int, Sample]:
    found: dict[int, Sample] = {}
    for sample in samples:
        assert sample.request.sample_id not in found
        found[sample.request.sample_id] = sample
    return found


def one_by_one(engine: SGLangEngine, num_requests: int) -> list[Sample]:
    """Greedy, each alone, so that no two engines see different batches."""
    return [next(iter(list(engine.generate([request])))) for request in requests(num_requests, temperature=0.0)]


def said(samples: Iterable[Sample]) -> list[tuple[int, ...]]:
    return [sample.token_ids for sample in samples]


def total(samples: Iterable[Sample]) -> SpecStats:
    return sum((sample.spec for sample in samples), SpecStats())


@torch.no_grad()
def teacher_forced(models: Models, sample: Sample, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[R, V] log-probs of one forward of the embedded engine's decoder over prompt and response, log_softmax(logits/T).

    T is that of the request, or 1 for a greedy one.
    """
    decoder = Decoder.from_hf(models.policy, dtype, torch.device(DEVICE))
    config, prompt_len = decoder.config, len(sample.request.prompt_ids)
    text = [*sample.request.prompt_ids, *sample.token_ids]
    cache = KVCache(config.num_layers, 1, config.num_kv_heads, config.head_dim, decoder.embed)
    cache.reserve(len(text))
    positions = torch.arange(len(text), device=DEVICE)[None]
    out = decoder.forward(torch.tensor([text], device=DEVICE), positions, cache.view(1, len(text)))
    logits = decoder.logits(out.hidden_BMH)[0, prompt_len - 1 : -1].float()
    return (logits / (sample.request.sampling.temperature or 1.0)).log_softmax(-1).cpu()


@pytest.mark.parametrize(
    ("rule", "temperature"),
    [
        ("rejection", 1.0),
        ("rejection", 0.0),
        ("rejection", 0.7),
        ("rejection", 1.3),
        ("target_only", 1.0),
        ("target_only", 0.7),
        ("target_only", 1.3),
        (PLAIN, 1.0),
        (PLAIN, 0.7),
        (PLAIN, 1.3),
    ],
)
def test_logprobs_are_those_of_a_teacher_forced_forward(
    engine_of: EngineOf, models: Models, rule: str, temperature: float
) -> None:
    """Within twice what bfloat16 costs the embedded decoder; a wrong temperature costs over three times that."""
    engine = engine_of(rule)
    send(engine, models, engine.transport.version + 1)
    samples = collect(engine.generate(requests(2 * SLOTS, temperature)))
    assert samples.keys() == set(range(2 * SLOTS))
    differences, roundings, behinds = [], [], []
    for sample in samples.values():
        laws, rounded = teacher_forced(models, sample), teacher_forced(models, sample, torch.bfloat16)
        tokens = torch.tensor(sample.token_ids)
        exact = laws.gather(1, tokens[:, None])[:, 0]
        differences.append((exact - torch.tensor(sample.logprobs)).abs())
        roundings.append((exact - rounded.gather(1, tokens[:, None])[:, 0]).abs())
        behinds.append(laws.max(-1).values - exact)
    difference, rounding = torch.cat(differences), torch.cat(roundings)
    assert difference.mean() < 2 * rounding.mean() < 0.3, (difference.mean(), rounding.mean())
    assert difference.max() < 3 * rounding.max(), (difference.max(), rounding.max())
    if temperature == 0:
        assert torch.cat(behinds).max() < 2 * rounding.max(), "a greedy token is the best one, up to rounding"


def test_statistics_count_every_token(engine: SGLangEngine, models: Models) -> None:
    send(engine, models, engine.transport.version + 1)
    for sample in collect(engine.generate(requests(SLOTS))).values():
        spec, num_tokens = sample.spec, len(sample.token_ids)
        emitted = 1 + spec.num_accepted + spec.num_verify_steps
        assert num_tokens <= emitted <= num_tokens + 3, "at most the drafts behind the response's end are too many"
        assert sum(spec.accepted_histogram) == spec.num_verify_steps == spec.proposed_by_position[0]


def test_after_a_sync_it_equals_a_fresh_engine(engine_of: EngineOf, tmp_path: Path) -> None:
    engine = engine_of("target_only")
    first, second = (counting(tmp_path / f"step{step}", step) for step in (1, 3))
    answers: dict[str, list[Sample]] = {}
    sent = {"first": first, "stale draft": Models(second.policy, first.draft), "second": second}
    for name, models in sent.items():
        send(engine, models, engine.transport.version + 1)
        answers[name] = one_by_one(engine, 6)
    fresh_engine = make_engine(second, tmp_path / "fresh", serves_files=True, verify_rule="target_only")
    try:
        fresh = one_by_one(fresh_engine, 6)
    finally:
        fresh_engine.close()
    assert said(answers["second"]) == said(fresh) != said(answers["first"])
    assert total(answers["second"]) == total(fresh), "the draft is the saved one too"
    assert total(fresh).accept_length > 1.4 and total(answers["stale draft"]).accept_length < 1.1, "or it would show"


def test_a_sync_in_mid_generate_loses_nothing(engine: SGLangEngine, models: Models, tmp_path: Path) -> None:
    version = engine.transport.version + 1
    send(engine, models, version)
    samples = engine.generate(requests(4 * SLOTS, max_new_tokens=400))
    found = [next(samples)]
    send(engine, models.moved(tmp_path / "moved"), version + 1)
    found += samples
    assert collect(found).keys() == set(range(4 * SLOTS))
    assert {span.version for sample in found for span in sample.policy_versions} == {version, version + 1}
    for sample in found:
        assert [span.start for span in sample.policy_versions] == sorted(span.start for span in sample.policy_versions)
        assert sample.policy_versions[0].start == 0 and sample.policy_versions[-1].end == len(sample.token_ids)
        assert sample.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        assert len(sample.logprobs) == len(sample.token_ids) <= 400 and EOS not in sample.token_ids[:-1]


def test_no_interruption_lets_a_response_pass_its_end(engine: SGLangEngine, models: Models) -> None:
    """Every sample brings a new version: with several tokens a step, some are interrupted in the step of their end."""
    stops = tuple(range(0, VOCAB, 16))
    prompts = [request.prompt_ids for request in requests(4 * SLOTS)]
    work = [
        RolloutRequest(0, i, prompt, SamplingParams(max_new_tokens=2 + i % 23, stop_token_ids=stops))
        for i, prompt in enumerate(prompts)
    ]
    send(engine, models, engine.transport.version + 1)
    for sample in engine.generate(work):
        limit = sample.request.sampling.max_new_tokens
        assert not {EOS, *stops} & set(sample.token_ids[:-1])
        if sample.finish_reason is FinishReason.STOP:
            assert sample.token_ids[-1] in {EOS, *stops}
        else:
            assert sample.finish_reason is FinishReason.LENGTH and len(sample.token_ids) == limit
        assert len(sample.logprobs) == len(sample.token_ids) <= limit
        send(engine, models, engine.transport.version + 1)


def test_abort_keeps_what_there_is(engine: SGLangEngine, models: Models) -> None:
    version = engine.transport.version + 1
    send(engine, models, version)
    samples = engine.generate(requests(4 * SLOTS, max_new_tokens=900))
    found = [next(samples)]
    engine.abort()
    found += samples
    assert collect(found).keys() == set(range(4 * SLOTS))
    aborted = [sample for sample in found if sample.finish_reason is FinishReason.ABORT]
    assert any(not sample.token_ids for sample in aborted), "those that still waited have nothing"
    for sample in aborted:
        assert len(sample.logprobs) == len(sample.token_ids) < 900
        assert sample.policy_versions == ((VersionSpan(0, len(sample.token_ids), version),) if sample.token_ids else ())


def test_memory_is_given_back_and_filled_again(tmp_path: Path) -> None:
    if importlib.util.find_spec("torch_memory_saver") is None:
        pytest.skip("needs torch_memory_saver")
    models = counting(tmp_path / "step1", 1)
    most_bytes = kv_bytes(models, LARGE_KV["max_total_tokens"])
    assert most_bytes >= 4 * 2**30
    free_bytes = free_gpu_bytes()
    engine = make_engine(models, tmp_path / "engine", offload=True, verify_rule="target_only", sglang=LARGE_KV)
    try:
        send(engine, models, 0)
        before = one_by_one(engine, 4)
        serving_bytes = free_gpu_bytes()
        assert free_bytes - serving_bytes > most_bytes, "the server has KV for so many tokens"
        engine.offload()
        training_bytes = free_gpu_bytes()
        assert training_bytes - serving_bytes > 0.9 * most_bytes, f"{training_bytes - serving_bytes} bytes came back"
        engine.onload()
        with pytest.raises(EngineError, match="not filled yet"):
            engine.generate(requests(1))
        send(engine, models, 1)
        after = one_by_one(engine, 4)
        assert training_bytes - free_gpu_bytes() > 0.9 * most_bytes, "and is taken again"
        assert said(after) == said(before) and total(after) == total(before)
        assert total(after).accept_length > 1.4, "the draft is back, too"
    finally:
        engine.close()


def test_kill_9_leaves_no_process_and_no_memory(models: Models, tmp_path: Path) -> None:
    program = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        from tests.gpu.test_sglang_engine import LARGE_KV, Models, make_engine, requests
        folder = Path(sys.argv[1])
        models = Models(Path({str(models.policy)!r}), Path({str(models.draft)!r}))
        engine = make_engine(models, folder / "engine", serves_files=True, sglang=LARGE_KV)
        list(engine.generate(requests(2)))
        (folder / "ready").touch()
        time.sleep(600)
    """)
    free_bytes = free_gpu_bytes() if DEVICE == "cuda" else 0
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=env)
    try:
        while parent.poll() is None and not (tmp_path / "ready").exists():
            time.sleep(0.2)
        assert parent.poll() is None, (tmp_path / "engine" / "engine.log").read_text()[-3000:]
        pids = [process.pid for process in psutil.Process(parent.pid).children(recursive=True)]
        assert len(pids) >= 4, "supervisor, server, scheduler, detokenizer"
        if DEVICE == "cuda":
            taken_bytes = free_bytes - free_gpu_bytes()
            assert taken_bytes > kv_bytes(models, LARGE_KV["max_total_tokens"]), "there is memory to lose"
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not any(map(psutil.pid_exists, pids)), "the end of the server's processes")
    if DEVICE == "cuda":
        # What others hold comes and goes by little; any process of the server holds more by its context alone.
        wait_for(lambda: free_gpu_bytes() > free_bytes - 2**28, "the return of the GPU's memory")
