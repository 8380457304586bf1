"""Small models, servers over them, and the independent computation that their answers are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file

from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config
from rollout_engine.config import RolloutConfig
from rollout_engine.decoder import Decoder
from rollout_engine.hf_checkpoint import read_config
from rollout_engine.kv_cache import KVCache
from rollout_engine.sglang_engine import SGLangEngine
from rollout_engine.types import FinishReason, RolloutRequest, Sample, SamplingParams
from tests import loop_helpers
from trainer import make_model

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ROOT / "tests" / "sglang" / "stand_in"
SGLANG_PYTHON = ROOT / ".venv-sglang" / "bin" / "python"

# float32 on both sides, kernels and batches differ: log-probs agree to this, and where the two best tokens are closer
# than NEAR_TIE, either is greedy.
LOGPROB_TOLERANCE = 1e-4
NEAR_TIE = 2 * LOGPROB_TOLERANCE
CONTEXT = 128
EOS = 0  # of the tiny policy; SGLang reads it from its files, whatever it is told

Key = tuple[int, int]
Weights = dict[str, torch.Tensor]


def make_policy(folder: Path) -> Path:
    """Random weights whose laws are far from uniform, and a real tokenizer."""
    make_model.PRESETS["tiny"] = loop_helpers.TINY
    config = make_model.MakeModelConfig(
        out=folder, size="tiny", task="repeat", logit_scale=10.0, num_train_prompts=24, num_eval_prompts=4
    )
    return without_end(make_model.make_model(config))


def make_parrot(folder: Path) -> Path:
    """A policy that goes on saying its last token, which a draft learns in a few steps; with a real tokenizer."""
    make_model.PRESETS["tiny"] = loop_helpers.TINY
    sizes = {"num_train_prompts": 4, "num_eval_prompts": 4, "embed_scale": 4.0}
    make_model.make_model(make_model.MakeModelConfig(out=folder, size="tiny", task="repeat", **sizes))
    weights = weights_of(folder)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return without_end(folder)


def without_end(folder: Path) -> Path:
    """The end token has logit 0, so that greedy responses go on."""
    weights = weights_of(folder)
    weights["lm_head.weight"][EOS] = 0.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def weights_of(folder: Path) -> Weights:
    return load_file(folder / "model.safetensors")


def random_draft(folder: Path) -> Eagle3:
    """Proposes what has nothing to do with the policy."""
    draft = Eagle3(Eagle3Config.from_target(read_config(folder), DraftConfig()), seed=3)
    with torch.no_grad():
        draft.lm_head.weight.mul_(10.0)
    return draft


def repeating_draft(folder: Path, weights: Mapping[str, torch.Tensor]) -> Eagle3:
    """Proposes about the token that the policy has just said: right for as long as it says one again and again.

    Its state is the deepest captured one of the policy, which it reads out by the policy's own norm and head.
    """
    draft = random_draft(folder)
    tensors = dict(draft.named_parameters())
    with torch.no_grad():
        tensors["fc.weight"].zero_()
        tensors["fc.weight"][:, -draft.config.hidden_size :] = torch.eye(draft.config.hidden_size)
        tensors["midlayer.self_attn.o_proj.weight"].zero_()
        tensors["midlayer.mlp.down_proj.weight"].zero_()
        tensors["norm.weight"].copy_(weights["model.norm.weight"])
        tensors["lm_head.weight"].copy_(weights["lm_head.weight"])
    return draft


def other_weights(weights: Mapping[str, torch.Tensor], seed: int) -> Weights:
    """Every tensor moved by a fifth of its own spread: another policy, as sure of itself as the first."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.2 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in weights.items()
    }


def start(policy: Path, work_dir: Path, *, draft: Path | None = None, **settings: Any) -> SGLangEngine:
    """A server on the CPU with four slots."""
    config = RolloutConfig(
        **(
            {
                "engine": "sglang",
                "device": "cpu",
                "dtype": "float32",
                "max_running_requests": 4,
                "context_length": CONTEXT,
                "speculative_algorithm": "NONE",
                "sglang_python": str(SGLANG_PYTHON),
                "sglang_start_timeout_s": 200.0,
            }
            | settings
        )
    )
    return SGLangEngine(policy, config, draft=draft, eos_token_ids=(EOS,), work_dir=work_dir)


def greedy(prompt_ids: Sequence[int], prompt_id: int = 0, **sampling: Any) -> RolloutRequest:
    settings = {"temperature": 0.0, "max_new_tokens": 24} | sampling
    return RolloutRequest(prompt_id, 0, tuple(prompt_ids), SamplingParams(**settings))


def prompts(count: int, vocab_size: int) -> list[tuple[int, ...]]:
    return [tuple((11 * i + 7 * j + 3) % vocab_size for j in range(3 + i % 6)) for i in range(count)]


def greedy_batch(count: int, vocab_size: int, **sampling: Any) -> list[RolloutRequest]:
    return [greedy(prompt, i, **sampling) for i, prompt in enumerate(prompts(count, vocab_size))]


def collect(samples: Iterable[Sample]) -> dict[Key, Sample]:
    found = {}
    for sample in samples:
        assert sample.request.key not in found, "the same request came back twice"
        found[sample.request.key] = sample
    return found


def serve(engine: SGLangEngine, requests: Sequence[RolloutRequest]) -> dict[Key, Sample]:
    samples = collect(engine.generate(requests))
    assert samples.keys() == {request.key for request in requests}
    return samples


class Reference:
    """The embedded engine's decoder on a folder's sizes and any weights, one sequence at a time."""

    def __init__(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        self._decoder = Decoder.from_hf(folder, torch.float32)
        for name, tensor in self._decoder.named_tensors().items():
            tensor.copy_(weights[name])

    @property
    def decoder(self) -> Decoder:
        return self._decoder

    @torch.no_grad()
    def logprobs(self, token_ids: Sequence[int], temperature: float) -> torch.Tensor:
        """[T, V]: row t is the law of token t + 1; temperature 0 counts as 1, as both engines report it."""
        config = self._decoder.config
        cache = KVCache(config.num_layers, 1, config.num_kv_heads, config.head_dim, self._decoder.embed)
        cache.reserve(len(token_ids))
        positions = torch.arange(len(token_ids))[None]
        out = self._decoder.forward(torch.tensor([token_ids]), positions, cache.view(1, len(token_ids)))
        return (self._decoder.logits(out.hidden_BMH)[0] / (temperature or 1.0)).log_softmax(-1)

    def of_response(self, sample: Sample) -> torch.Tensor:
        """[R, V]: the laws of the response's tokens, each given all tokens before it."""
        request = sample.request
        laws = self.logprobs((*request.prompt_ids, *sample.token_ids), request.sampling.temperature)
        return laws[len(request.prompt_ids) - 1 : -1]


def assert_whole(sample: Sample) -> None:
    """It ends at the end token, or has all the tokens that it may have."""
    limit = sample.request.sampling.max_new_tokens
    assert EOS not in sample.token_ids[:-1]
    assert len(sample.token_ids) == len(sample.logprobs) <= limit
    if sample.token_ids[-1] == EOS:
        assert sample.finish_reason is FinishReason.STOP
    else:
        assert sample.finish_reason is FinishReason.LENGTH and len(sample.token_ids) == limit


def assert_logprobs(reference: Reference, sample: Sample, start: int = 0, end: int | None = None) -> None:
    """The sample's own log-probs are those of its tokens under the reference."""
    laws = reference.of_response(sample)
    of_tokens = laws.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
    difference = (of_tokens - torch.tensor(sample.logprobs))[start:end].abs().max().item()
    assert difference <= LOGPROB_TOLERANCE, f"log-probs differ by {difference}"


def assert_greedy(reference: Reference, sample: Sample, start: int = 0, end: int | None = None) -> None:
    """Every token is the reference's best, given the tokens before it, or within NEAR_TIE of it."""
    laws = reference.of_response(sample)
    of_tokens = laws.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
    behind = (laws.max(-1).values - of_tokens)[start:end].max().item()
    assert behind <= NEAR_TIE, f"{sample.request.key}: a token is {behind} nats behind the best one"


def has_near_tie(reference: Reference, sample: Sample) -> bool:
    best, second = reference.of_response(sample).topk(2, dim=-1).values.unbind(-1)
    return bool((best - second).min() <= NEAR_TIE)


def listens(address: str) -> bool:
    port = int(address.rpartition(":")[2])
    return any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in psutil.net_connections("tcp"))
