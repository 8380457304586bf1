"""Every setting of a run: frozen dataclasses, one per table of the TOML recipe, joined by `RunConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from draft_models.config import DraftConfig
from rollout_engine.config import RolloutConfig, SpeculationConfig


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """`[policy]`: the Megatron-core policy. `megatron` passes verbatim into TransformerConfig."""

    hf_checkpoint: str = ""
    ref_load: str = ""  # reference policy for the KL term; "" = hf_checkpoint
    dtype: str = "float32"
    lr: float = 1e-6
    min_lr: float = 0.0
    lr_decay_style: str = "constant"
    lr_warmup_iters: int = 0
    lr_decay_iters: int = 0  # 0 = num_rollout * num_steps_per_rollout
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    recompute: bool = False  # full activation recompute
    max_tokens_per_gpu: int = 4096  # token budget of one packed micro-batch
    megatron: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AlgorithmConfig:
    """`[algorithm]`: GRPO (Shao et al. 2024) with DAPO's token-level mean, clip-higher and dynamic sampling."""

    advantage_estimator: str = "grpo"
    normalize_std: bool = True  # divide by the group's standard deviation
    num_steps_per_rollout: int = 1
    eps_clip: float = 0.2
    eps_clip_high: float = 0.28
    use_kl_loss: bool = False
    kl_loss_coef: float = 0.001
    kl_loss_type: str = "low_var_kl"
    entropy_coef: float = 0.0
    use_tis: bool = False  # truncated importance sampling between trainer and engine log-probs
    tis_clip: float = 2.0
    dynamic_sampling: bool = False  # drop groups whose rewards are all equal


@dataclass(frozen=True, slots=True)
class DataConfig:
    """`[data]`: prompts and reward. `reward` is exact | math | MODULE:FUNCTION."""

    prompt_data: str = ""
    input_key: str = "prompt"
    label_key: str = "label"
    apply_chat_template: bool = False
    rollout_shuffle: bool = True
    rollout_batch_size: int = 8  # prompts a step
    n_samples_per_prompt: int = 8
    reward: str = "exact"
    eval_prompt_data: str = ""
    num_eval_prompts: int = 0  # 0 = all of them
    skip_bad_rows: bool = False


@dataclass(frozen=True, slots=True)
class RunConfig:
    """A whole run. Top-level keys of the recipe, then its tables."""

    name: str = "run"
    run_dir: str = "runs"
    seed: int = 0
    deterministic: bool = False
    num_rollout: int = 20  # steps
    save_interval: int = 0  # 0 = only at the end
    eval_interval: int = 0  # 0 = never
    plain_probe_interval: int = 0  # every n steps the same prompts once more without speculation; 0 = never
    frozen_draft_step: int = 0  # keep a copy of the draft as it was after this step, to score it beside; 0 = none
    resume: bool = False
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    data: DataConfig = field(default_factory=DataConfig)


class ConfigError(ValueError):
    """Bad input from the user: one line saying what, where and how to mend it. The command line exits with status 2."""
