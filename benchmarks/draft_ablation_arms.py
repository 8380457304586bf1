"""The ablation's sizes and arms: what each trained draft differs in, and in which order they are worth having."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from draft_models.losses import LossKind
from trainer.make_model import MakeModelConfig

AXES = ("loss", "learning", "unroll", "window", "temperature", "vocabulary", "length")
BASE = "base"


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of one ablation; the defaults are for one H200."""

    label: str = "one H200"
    task: str = "ledger"
    size: str = "100m-deep"
    vocab_size: int = 4096
    context_length: int = 1280
    model_seed: int = 0
    warm_start_s: float = 75.0
    warm_start_steps: int = 0  # instead of seconds
    warm_start_lr: float = 1e-3
    warm_start_tokens: int = 10_240
    dtype: str = "bfloat16"  # of the target, and of the draft's matrix products
    train_prompts: int = 192  # of each training temperature
    held_out_prompts: int = 16
    group: int = 4  # responses to a prompt
    max_response_len: int = 1024
    record_s: float = 75.0  # then what still runs is cut off, and the cut texts are kept
    max_state_bytes: int = 16 << 30
    temperatures: tuple[float, ...] = (0.3, 0.6, 0.8, 1.0, 1.2)  # of the held-out texts
    train_temperatures: tuple[float, ...] = (1.0, 0.6)  # the first is that of most arms
    updates: int = 128
    batch_tokens: int = 4096
    window: int = 512
    reduced_vocab: int = 1024  # tokens of a draft that proposes from a part of the vocabulary
    lr: float = 1e-3
    # Updates after which a part of the text is scored.
    curve_at: tuple[int, ...] = (8, 16, 24, 32, 48, 64, 96, 192, 384, 768, 1536)
    curve_tokens: int = 8192
    depths: tuple[int, ...] = (3, 5, 7)


# What a CPU does in some minutes: the same task, small, with short ledgers; it says so wherever it is shown.
CPU = Plan(
    label="a CPU, tiny",
    size="3m",
    vocab_size=512,
    warm_start_s=0.0,
    warm_start_steps=400,
    warm_start_lr=3e-3,
    warm_start_tokens=2560,
    dtype="float32",
    train_prompts=32,
    held_out_prompts=8,
    max_response_len=256,
    record_s=600.0,
    max_state_bytes=1 << 30,
    updates=192,
    batch_tokens=512,
    window=64,
    reduced_vocab=128,
    lr=3e-3,
    curve_at=(8, 16, 32, 64, 96, 128, 160),
    curve_tokens=1024,
)
# Seconds, to see that everything runs.
REHEARSAL = replace(
    CPU,
    label="a rehearsal",
    task="repeat",
    vocab_size=320,
    context_length=256,
    warm_start_steps=10,
    warm_start_tokens=1024,
    train_prompts=4,
    held_out_prompts=2,
    group=2,
    max_response_len=32,
    temperatures=(0.6, 1.0),
    updates=4,
    batch_tokens=128,
    window=16,
    reduced_vocab=64,
    curve_at=(1, 2),
    curve_tokens=64,
)
PLANS = {"h200": Plan(), "cpu": CPU, "rehearsal": REHEARSAL}


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train a draft. All have the same tokens; those of one batch size also as many updates."""

    name: str
    axis: str
    loss: LossKind = LossKind.LK
    unroll: int = 3
    step_decay: float = 0.8
    window: int = 0  # texts are cut into windows of so many tokens; 0 = whole
    first_tokens: int = 0  # or only so many of each are trained on; 0 = all
    temperature: float = 1.0  # of the recorded text that it learns from
    lr: float = 1e-3
    batch_tokens: int = 4096
    updates: int = 128
    ema: float = 0.0
    draft_vocab: int = 0  # 0 = the whole vocabulary


def base_arm(plan: Plan) -> Arm:
    return Arm(
        BASE,
        "loss",
        temperature=plan.train_temperatures[0],
        lr=plan.lr,
        batch_tokens=plan.batch_tokens,
        updates=plan.updates,
    )


def arms_of(plan: Plan) -> tuple[Arm, ...]:
    """Every arm once, the most telling first. The base arm is a member of every axis's table.

    Over the whole vocabulary cross-entropy on p has forward KL's gradient: it has an arm with a part of it only.
    """
    base = base_arm(plan)
    kinds = (LossKind.FORWARD_KL, LossKind.HARD_LABEL, LossKind.TV, LossKind.REVERSE_KL)
    learning, vocabulary = replace(base, axis="learning"), replace(base, axis="vocabulary")
    return (
        base,
        *(replace(base, name=kind.value, loss=kind) for kind in kinds),
        replace(learning, name="lr x 0.3", lr=0.3 * plan.lr),
        replace(learning, name="lr x 3", lr=3 * plan.lr),
        *(_with_batch(learning, scale) for scale in (0.5, 2.0)),
        replace(learning, name="average 0.95", ema=0.95),
        replace(base, name="unroll 1", axis="unroll", unroll=1),
        replace(base, name="unroll 7", axis="unroll", unroll=7),
        replace(base, name="unroll 7, equal weights", axis="unroll", unroll=7, step_decay=1.0),
        replace(base, name=f"windows of {plan.window}", axis="window", window=plan.window),
        replace(base, name=f"first {plan.window} tokens", axis="window", first_tokens=plan.window),
        *(
            replace(base, name=f"{kind.value} at T {t:g}", axis="temperature", loss=kind, temperature=t)
            for t in plan.train_temperatures[1:]
            for kind in (base.loss, LossKind.FORWARD_KL, LossKind.HARD_LABEL)
        ),
        *(
            replace(
                vocabulary, name=f"{kind.value}, {plan.reduced_vocab} tokens", loss=kind, draft_vocab=plan.reduced_vocab
            )
            for kind in (base.loss, LossKind.FORWARD_KL, LossKind.CROSS_ENTROPY)
        ),
        replace(base, name="tokens x 4", axis="length", updates=4 * plan.updates),
        replace(base, name="tokens x 4, unroll 7", axis="length", updates=4 * plan.updates, unroll=7),
        replace(
            base,
            name=f"tokens x 4, unroll 7, {LossKind.FORWARD_KL.value}",
            axis="length",
            updates=4 * plan.updates,
            unroll=7,
            loss=LossKind.FORWARD_KL,
        ),
        replace(base, name="tokens x 16, unroll 7", axis="length", updates=16 * plan.updates, unroll=7),
    )


def _with_batch(arm: Arm, scale: float) -> Arm:
    """As many tokens in batches of another size, hence another number of updates."""
    tokens, updates = int(arm.batch_tokens * scale), int(arm.updates / scale)
    return replace(arm, name=f"batch x {scale:g}", batch_tokens=tokens, updates=updates)


def jobs_of(arms: Sequence[Arm], seeds: Sequence[int]) -> list[tuple[Arm, int]]:
    """All seeds of an arm before the next arm: what there is time for has its interval."""
    return [(arm, seed) for arm in arms for seed in seeds]


def target_config(plan: Plan, out: Path) -> MakeModelConfig:
    """The fixed target, made as `benchmarks.rl_on_gpu` makes its start policy."""
    return MakeModelConfig(
        out=out,
        size=plan.size,
        task=plan.task,
        seed=plan.model_seed,
        context_length=plan.context_length,
        vocab_size=plan.vocab_size,
        warm_start_steps=plan.warm_start_steps,
        warm_start_s=plan.warm_start_s,
        batch_size=256,
        batch_tokens=plan.warm_start_tokens,
        lr=plan.warm_start_lr,
    )
