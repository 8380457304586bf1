"""The engine on one CUDA GPU: the same code, the same tokens."""

from __future__ import annotations

import math

import pytest
import torch

from tests.rollout_engine_helpers import make_engine, make_requests, random_pair, run_engine, tokens_of, total_spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("depth", [1, 3])
def test_cuda_gives_the_tokens_of_the_cpu_in_float64(temperature: float, depth: int) -> None:
    requests = make_requests(temperature=temperature)
    on_cpu = run_engine(make_engine(random_pair(torch.float64, "cpu")[0], verify_rule="coupled"), requests)
    decoder, draft = random_pair(torch.float64, "cuda")
    engine = make_engine(decoder, draft, verify_rule="coupled", speculative_num_steps=depth, max_running_requests=5)
    on_gpu = run_engine(engine, requests)
    assert tokens_of(on_gpu) == tokens_of(on_cpu)
    for key, sample in on_gpu.items():
        assert sample.logprobs == pytest.approx(on_cpu[key].logprobs, abs=1e-9)


@pytest.mark.parametrize("rule", ["rejection", "target_only", "coupled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rules_and_dtypes_run(rule: str, dtype: torch.dtype) -> None:
    decoder, draft = random_pair(dtype, "cuda")
    engine = make_engine(decoder, draft, verify_rule=rule, controller="adaptive", max_running_requests=6)
    samples = run_engine(engine, make_requests(top_k=20, top_p=0.95))
    assert all(math.isfinite(lp) and lp <= 0 for s in samples.values() for lp in s.logprobs)
    table = engine.controller.table
    assert table is not None and all(second > 0 for row in table.step_s for second in row)


def test_ngrams_on_cuda() -> None:
    decoder, _ = random_pair(torch.float64, "cuda")
    requests = make_requests(max_new_tokens=40, stop_token_ids=())
    plain = run_engine(make_engine(decoder, verify_rule="coupled"), requests)
    engine = make_engine(decoder, verify_rule="coupled", speculative_algorithm="NGRAM", ngram_min_match=1)
    samples = run_engine(engine, requests)
    assert tokens_of(samples) == tokens_of(plain) and total_spec(samples).num_accepted > 0


def test_batch_invariant_is_refused() -> None:
    """Its arithmetic was seen to differ in the last bits there."""
    with pytest.raises(ValueError, match="batch_invariant = true holds on the CPU only"):
        make_engine(random_pair(torch.float32, "cuda")[0], batch_invariant=True)
