"""`[rollout]`: the engine, its memory, sampling and speculation; `[speculation]`: what stands beside the drafter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class RolloutConfig:
    """Speculative keys carry SGLang's flag names. `verify_rule` applies at temperature > 0; at 0 it is greedy."""

    engine: str = "torch"  # torch: embedded, CPU or one GPU; sglang: an SGLang server
    max_running_requests: int = 32  # KV slots
    context_length: int = 0  # prompt + response; 0 = the checkpoint's max_position_embeddings
    dtype: str = "float32"
    device: str = "auto"  # auto = cuda when there is one
    batch_invariant: bool = False  # fixed row tiles and KV-block order: bitwise equal whatever the batch
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0  # SGLang only; its verification ignores it, so with speculation it is refused
    max_response_len: int = 128
    stop: tuple[str, ...] = ()
    speculative_algorithm: str = "EAGLE3"  # EAGLE3 | NGRAM | NONE
    speculative_num_steps: int = 3  # k, the depth of the draft chain
    speculative_eagle_topk: int = 1
    speculative_num_draft_tokens: int = 0  # 0 = num_steps + 1, the only value for topk 1
    speculative_draft_model_path: str = ""
    verify_rule: str = "rejection"  # rejection | target_only | coupled
    controller: str = "adaptive"  # adaptive: depth 0..k by measured cost; fixed: always k
    cost_table: str = ""  # JSON file of measured step costs; "" = measure at start
    ngram_min_match: int = 2
    ngram_max_match: int = 8
    # SGLang alone
    allow_lossy: bool = False  # accept settings under which the samples do not have the policy's distribution
    offload: bool = False  # give KV and weights back while the policy trains; both models are published again
    sglang_address: str = ""  # http://HOST:PORT of an engine that runs already; "" = start one
    sglang_python: str = ""  # interpreter of the environment that holds SGLang; "" = this one
    sglang_start_timeout_s: float = 600.0
    sync_transport: str = "auto"  # ipc: same machine | disk: a shared folder | broadcast: NCCL or gloo; auto = ipc
    sync_dir: str = ""  # folder that trainer and engine both see, for disk and for an engine elsewhere
    sync_host: str = ""  # for broadcast, the trainer's address as the engine sees it; "" = what its host name means
    sglang: dict[str, Any] = field(default_factory=dict)  # server flags, verbatim: mem_fraction_static = 0.3


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """`[speculation]`: a second drafter beside EAGLE-3, which remembers what was written before, and a sentinel.

    History drafts are what followed the same words in the prompt's siblings and in its earlier epochs. They go first
    where they are likelier to stand than EAGLE-3's, per request and step.

    The sentinel compares what draft and policy should have shown on a rollout's texts with what the engine showed, and
    stops speculation for good where chance cannot explain the difference.
    """

    history: bool = False  # the embedded engine with EAGLE3
    history_num_steps: int = 0  # most tokens of a history draft; 0 = rollout.speculative_num_steps
    history_min_match: int = 2  # last tokens that must agree with the older text
    history_max_match: int = 16  # more than these make no difference
    history_min_confidence: float = 0.3  # measured share of first tokens that stand, below which nothing is proposed
    history_max_bytes: int = 1 << 29  # of host memory: half for finished texts (4 bytes a token), half for indices
    sentinel: bool = True  # training with EAGLE3
    sentinel_alpha: float = 1e-3  # chance that a whole run of a sound engine sees a false alarm, at most
    sentinel_min_effect: float = 0.02  # acceptance that rounding may add or take anywhere; less raises nothing
    sentinel_tokens: int = 4096  # of a rollout's texts compared, at least; those of the draft's first update are free
