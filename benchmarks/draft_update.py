"""Speed of the draft's update alone: random captured states, on whatever device there is; and what it should cost.

The cost is counted beside the measurement. FLOPs: a product's forward and its two gradients. Bytes: the passes over
float32 logits, which no matrix unit helps with.

    python -m benchmarks.draft_update --shape 0.6b --count-only     # the count alone
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.common import append_results, arguments, console, positive, provenance, run, seconds, words
from benchmarks.training_shapes import (
    SHAPES,
    Shape,
    add_shape_options,
    peak_gib,
    phases_of,
    reset_peak,
    rollout,
    sample_lengths,
)
from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config
from draft_models.text_attention import flash_can_run
from draft_models.types import DraftSample, VerifyRule
from rollout_engine.types import Sample
from trainer.draft_learner import DraftLearner, DraftSettings, plan_updates, product_dtype

_PHASES = {
    "forward_and_loss": "_loss",
    "forecast": "_forecasts",
    "backward": "_backward",
    "reduce_and_clip": "_reduce_and_clip",
    "optimizer": "_take_step",
}
# Reads and writes of one float32 logit of the draft in a training step: cast 6, log_softmax 12, KL 16, argmax 4,
# exp 8, overlap 16, LK's gradient 51 (forward KL's 12), weight 8, cast 6, two products' reads 4; the rejection rule's
# posterior 24.
_BYTES_PER_LOGIT = 155
_BYTES_PER_TARGET_LOGIT = 90


def count(shape: Shape, lengths: Sequence[int], unroll: int) -> dict[str, float]:
    """TFLOPs and GB of one update on texts of these lengths, all of them responses; attention counted as causal."""
    tokens, hidden, vocab = sum(lengths), shape.hidden, shape.vocab
    qkv = 2 * hidden * (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    layer = qkv + shape.heads * shape.head_dim * hidden + 3 * hidden * shape.ffn
    body = 4 * 3 * hidden * hidden + 6 * layer * unroll  # the captured states need no gradient
    head = 6 * hidden * vocab * unroll + 2 * hidden * vocab
    logit_bytes = vocab * (_BYTES_PER_LOGIT * unroll + _BYTES_PER_TARGET_LOGIT)
    attention = 7 * unroll * shape.heads * shape.head_dim * sum(n * n for n in lengths)
    return {"tflop": (tokens * (body + head) + attention) / 1e12, "logit_gb": tokens * logit_bytes / 1e9}


def captured(samples: Sequence[Sample], shape: Shape, dtype: torch.dtype, device: str) -> list[DraftSample]:
    """Random states of the shape that the policy's forward would leave."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    head_VH = normal(shape.vocab, shape.hidden).mul_(shape.hidden**-0.5)
    return [
        DraftSample(
            prompt_id=s.request.prompt_id,
            sample_id=s.request.sample_id,
            token_ids=torch.tensor([*s.request.prompt_ids, *s.token_ids], device=device),
            embeds=normal(length, shape.hidden),
            aux_hidden=normal(length, 3 * shape.hidden),
            target_hidden=normal(length, shape.hidden),
            target_head=head_VH,
            prompt_len=len(s.request.prompt_ids),
            temperature=1.0,
            seed=s.request.sampling.seed or 0,
            policy_version=0,
        )
        for s, length in zip(samples, sample_lengths(samples), strict=True)
    ]


def measure(args: argparse.Namespace, compute_dtype: str) -> dict[str, Any]:
    """One row: throughput over the repeats, then one more update cut into phases."""
    shape, device = SHAPES[args.shape], "cuda" if torch.cuda.is_available() else "cpu"
    samples = rollout(args, shape.vocab)
    context = max(sample_lengths(samples)) + args.unroll
    states = captured(samples, shape, torch.bfloat16 if device == "cuda" else torch.float32, device)
    config = DraftConfig(
        unroll=args.unroll,
        max_tokens_per_update=args.max_tokens_per_update,
        updates_per_step=args.updates_per_step,
        compute_dtype=compute_dtype,
    )
    draft = Eagle3(Eagle3Config.from_target(shape.hf_config(context), config)).to(device)
    learner = DraftLearner(draft, config, DraftSettings(VerifyRule.REJECTION, min(3, args.unroll)))
    plan = plan_updates(samples, config, seed=0, step=0)
    taken = [s for s in states if any((s.prompt_id, s.sample_id) in part for part in plan)]
    tokens = sum(len(s.token_ids) for s in taken)
    learner.update(states, plan)
    reset_peak()
    times_s = [seconds(lambda: learner.update(states, plan)) for _ in range(args.repeats)]
    peak = peak_gib()
    with phases_of(learner, _PHASES) as phases_ms:
        whole_ms = 1e3 * seconds(lambda: learner.update(states, plan))
    phases_ms["backward"] -= phases_ms["forward_and_loss"]  # which it calls
    phases_ms["batch_and_metrics"] = whole_ms - sum(phases_ms.values())
    median_s = statistics.median(times_s)
    counted = count(shape, [len(s.token_ids) for s in taken], args.unroll)
    packed = flash_can_run(product_dtype(compute_dtype) or torch.float32, torch.device(device), shape.head_dim)
    return {
        "shape": args.shape,
        "compute_dtype": compute_dtype,
        "text_attention": "FlashAttention-2, packed" if packed else "products, padded by length",
        "unroll": args.unroll,
        "max_tokens_per_update": args.max_tokens_per_update,
        "updates_per_step": args.updates_per_step,
        "tokens": tokens,
        "captured_bytes": sum(s.num_bytes for s in states),
        "update_s": times_s,
        "tokens_per_s": tokens / median_s,
        "tflop_per_s": counted["tflop"] / median_s,
        "counted": counted,
        "phases_ms": phases_ms,
        "peak_gib": peak,
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments("benchmarks.draft_update", __doc__.splitlines()[0])
    add_shape_options(parser)
    parser.add_argument("--unroll", type=positive, default=3)
    parser.add_argument("--max-tokens-per-update", type=positive, default=32768)
    parser.add_argument("--updates-per-step", type=positive, default=1)
    parser.add_argument("--compute-dtypes", type=words, default=("bfloat16", "float32"))
    parser.add_argument(
        "--count-only",
        action="store_true",
        help="print what an update should cost for texts of 512 tokens, run nothing",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    out = console()
    if args.count_only:
        lengths = [512] * (args.max_tokens_per_update // 512)
        out.print_json(data=count(SHAPES[args.shape], lengths, args.unroll))
        return
    rows = [measure(args, compute_dtype) for compute_dtype in args.compute_dtypes]
    out.print_json(data=rows)
    append_results(args.out or args.results, rows, provenance("benchmarks.draft_update"))


if __name__ == "__main__":
    run(main)
