"""Speed of the policy's update alone: random weights and tokens, one Megatron rank on whatever device there is."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import append_results, arguments, console, positive, provenance, run, seconds
from benchmarks.training_shapes import (
    SHAPES,
    add_shape_options,
    peak_gib,
    phases_of,
    reset_peak,
    rollout,
    sample_lengths,
    write_checkpoint,
)
from draft_models.eagle3 import default_aux_layer_ids
from trainer.config import AlgorithmConfig, PolicyConfig
from trainer.megatron_policy import MegatronPolicy
from trainer.policy_capture import CaptureSpec

_PHASES = {"plan": "_plan", "forward_backward": "_run", "optimizer": "_take_step"}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One row: throughput over the repeats, then one more update cut into phases."""
    shape = SHAPES[args.shape]
    samples = rollout(args, shape.vocab)
    lengths = sample_lengths(samples)
    write_checkpoint(folder, shape, max(lengths), "cuda" if torch.cuda.is_available() else "cpu")
    config = PolicyConfig(
        dtype=args.dtype,
        recompute=args.recompute,
        use_distributed_optimizer=args.distributed_optimizer,
        max_tokens_per_gpu=args.max_tokens_per_gpu,
    )
    policy = MegatronPolicy(config, AlgorithmConfig(entropy_coef=args.entropy_coef), folder, train_iters=100)
    capture = CaptureSpec(default_aux_layer_ids(shape.layers), args.capture_bytes) if args.capture_bytes else None
    policy.update(samples, capture)
    reset_peak()
    times_s = [seconds(lambda: policy.update(samples, capture)) for _ in range(args.repeats)]
    peak = peak_gib()
    with phases_of(policy, _PHASES) as phases_ms:
        whole_ms = 1e3 * seconds(lambda: policy.update(samples, capture))
    phases_ms["rest"] = whole_ms - sum(phases_ms.values())
    median_s = statistics.median(times_s)
    return {
        "shape": args.shape,
        "parameters": shape.num_parameters,
        "dtype": args.dtype,
        "attention": policy.attention,
        "recompute": args.recompute,
        "distributed_optimizer": args.distributed_optimizer,
        "max_tokens_per_gpu": args.max_tokens_per_gpu,
        "capture_bytes": args.capture_bytes,
        "samples": args.samples,
        "tokens": sum(lengths),
        "response_tokens": sum(len(s.token_ids) for s in samples),
        "update_s": times_s,
        "tokens_per_s": sum(lengths) / median_s,
        "tflop_per_s": shape.training_flops(lengths) / median_s / 1e12,
        "phases_ms": phases_ms,
        "peak_gib": peak,
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments("benchmarks.policy_update", __doc__)
    add_shape_options(parser)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-tokens-per-gpu", type=positive, default=16384)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--distributed-optimizer", action="store_true")
    parser.add_argument("--entropy-coef", type=float, default=0.0)
    parser.add_argument("--capture-bytes", type=int, default=0, help="capture for the draft within this budget; 0 = no")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        row = measure(args, Path(folder))
    out = console()
    out.print_json(data=row)
    append_results(args.out or args.results, [row], provenance("benchmarks.policy_update"))


if __name__ == "__main__":
    run(main)
