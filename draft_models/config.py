"""`[draft]`: which drafter, and how it is trained beside the policy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DraftConfig:
    """Settings of the EAGLE-3 draft and of its online training.

    The path of an existing draft is `rollout.speculative_draft_model_path` (SGLang's spelling); without one
    the draft starts from random weights.
    """

    train: bool = True  # false: the same as train_when = "never"
    train_when: str = "always"  # always | never | pays: in the steps, and on the tokens, that win more than they cost
    burst: int = 8  # with pays: after a fall of acceptance or while it rises, at most so many times updates_per_step
    verify_cost: float = 0.0  # of a step that verifies, in plain ones; used where no probe and no cost table tells
    schedule: str = ""  # with pays: the draft_schedule.jsonl of an earlier run, whose decisions are taken again
    aux_layer_ids: tuple[int, ...] = ()  # () = three distinct layers: second, middle, fourth from the top
    draft_vocab_size: int = 0  # 0 = all of it (SGLang's rejection rule needs that); else what the policy says most
    intermediate_size: int = 0  # 0 = the target's
    compute_dtype: str = "float32"  # of the training's matrix products; bfloat16 on a GPU. Weights stay float32
    loss: str = "auto"  # what suits rollout.verify_rule; or forward_kl, reverse_kl, tv, lk, cross_entropy, hard_label
    unroll: int = 3  # training-time-test steps (EAGLE-3)
    step_decay: float = 0.8  # weight of unroll step j is step_decay ** j
    token_weighting: str = "uniform"  # or tail: a token weighs what it cost in wall clock, most where few requests run
    lr: float = 1e-3
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    clip_grad: float = 0.5
    updates_per_step: int = 1  # optimizer steps per rollout, each on its own part of the captured samples
    max_tokens_per_update: int = 4096  # tokens of one optimizer step; the rest of the samples is left out
    max_tokens_per_forward: int = 0  # of that; the gradients of several forwards add up. 0 = one forward
    ema: float = 0.0  # share of the old average kept at each update; the average is what serves. 0 = no average
    capture_max_bytes: int = 2 << 30  # captured states kept at once; above it samples are dropped, and counted

    @property
    def when(self) -> str:
        """`train_when`, or "never" where `train` is off: the one place that joins the two."""
        return self.train_when if self.train else "never"
