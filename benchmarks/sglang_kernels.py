"""Kernel timing only: SGLang on random weights of an 8B model, plain and with EAGLE-3 at a simulated accept length.

The draft is random too, so it would accept next to nothing; SGLANG_SIMULATE_ACC_LEN makes every verify keep so many
tokens instead. What is timed is real (draft, verification at T = 1, KV, graphs), the text is not: this says what an
accept length would be worth at a batch size, and nothing about which one a draft reaches. All arms have the same
settings, a graph for each batch size, and places for the largest. Decoding is the difference of a long and a short
response, so that prefill and overhead of the call cancel.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import (
    append_results,
    arguments,
    console,
    interleaved,
    paired_ratio,
    positive,
    positives,
    provenance,
    run,
    words,
)
from benchmarks.rollout_anchor import DirectEngine
from benchmarks.rollout_runs import emitted_per_verify
from rollout_engine.sglang_install import find_sglang
from rollout_engine.types import EngineError, RolloutRequest, SamplingParams

LABEL = "kernel timing only: random weights, simulated acceptance"
NOT_SIMULATED = "rehearsal: random weights, nothing simulated"
PLAIN = "none"
ARMS = (PLAIN, "rejection", "target_only")  # speculative arms by their verification rule
REDUCED_VOCAB = 32_000  # of the draft under the target-only rule; rejection needs the whole vocabulary

SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
}


def policy_config(shape: Mapping[str, int]) -> dict[str, Any]:
    """config.json of a Qwen3; it names no end token, so that every response has the length it is asked for."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        **shape,
    }


def draft_config(shape: Mapping[str, int], draft_vocab_size: int) -> dict[str, Any]:
    """config.json of an EAGLE-3 draft for it, in SGLang's form."""
    return policy_config(shape) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "draft_vocab_size": draft_vocab_size,
        "target_hidden_size": shape["hidden_size"],
    }


def write_configs(folder: Path, arm: str, shape: Mapping[str, int]) -> tuple[Path, Path]:
    """Folders with nothing but a config.json for policy and draft: `load_format = dummy` reads no weights."""
    policy, draft = folder / "policy", folder / f"draft-{arm}"
    size = shape["vocab_size"] if arm == "rejection" else min(REDUCED_VOCAB, shape["vocab_size"])
    for path, config in ((policy, policy_config(shape)), (draft, draft_config(shape, size))):
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(config))
    return policy, draft


def engine_settings(args: argparse.Namespace, arm: str, folder: Path) -> dict[str, Any]:
    """Keyword arguments of `sglang.Engine`; the arms differ in speculation alone."""
    policy, draft = write_configs(folder, arm, SHAPES[args.shape])
    most = max(args.batch_sizes)
    settings: dict[str, Any] = {
        "model_path": str(policy),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16" if args.device == "cuda" else "float32",
        "device": args.device,
        "context_length": args.prompt_len + args.long + 64,
        "max_running_requests": most,
        "max_total_tokens": most * (args.prompt_len + args.long + 64),
        "grammar_backend": "none",
        "random_seed": 0,
    }
    if args.device == "cuda":
        settings |= {
            "attention_backend": args.attention_backend,
            "sampling_backend": "flashinfer" if args.attention_backend == "flashinfer" else "pytorch",
            "cuda_graph_bs_decode": list(args.batch_sizes),
            "cuda_graph_max_bs_decode": most,
            "disable_prefill_cuda_graph": True,
            "mem_fraction_static": 0.9,  # the engines start side by side; max_total_tokens bounds what each takes
        }
    else:
        settings |= {
            "attention_backend": "torch_native" if arm == PLAIN else "intel_amx",
            "sampling_backend": "pytorch",
        }
    if arm != PLAIN:
        settings |= {
            "speculative_algorithm": "EAGLE3",
            "speculative_draft_model_path": str(draft),
            "speculative_num_steps": args.k,
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": args.k + 1,
        }
    if arm == "rejection" and args.device == "cuda":
        settings["speculative_use_rejection_sampling"] = True
    return settings


def start(args: argparse.Namespace, arm: str, folder: Path) -> DirectEngine:
    simulated = {} if arm == PLAIN or args.simulate <= 0 else {"SGLANG_SIMULATE_ACC_LEN": f"{args.simulate:g}"}
    settings = engine_settings(args, arm, folder)
    return DirectEngine(args.python or sys.executable, settings, (), folder / f"{arm}.log", simulated)


def requests(args: argparse.Namespace, batch_size: int, num_tokens: int, seed: int) -> list[RolloutRequest]:
    """Random prompts of one length, responses of another."""
    rng, vocab_size = Random(f"{seed}/{batch_size}"), SHAPES[args.shape]["vocab_size"]
    sampling = SamplingParams(temperature=args.temperature, max_new_tokens=num_tokens)
    return [
        RolloutRequest(i, 0, tuple(rng.randrange(vocab_size) for _ in range(args.prompt_len)), sampling)
        for i in range(batch_size)
    ]


@dataclass(frozen=True, slots=True)
class Decoding:
    """A full batch's decoding: the tokens of long over short responses, over their seconds."""

    tokens_per_s: float
    tokens_per_verify: float  # as SGLang's own histogram has it; 1 for plain decoding


def decoding(engine: DirectEngine, args: argparse.Namespace, batch_size: int, seed: int) -> Decoding:
    runs = {}
    for num_tokens in (args.short, args.long):
        engine.flush()
        runs[num_tokens] = found = engine.run(requests(args, batch_size, num_tokens, seed))
        if set(found.lengths) != {num_tokens}:
            raise EngineError(f"responses of {sorted(set(found.lengths))} tokens, all should have {num_tokens}")
    long = runs[args.long]
    rate = batch_size * (args.long - args.short) / (long.seconds - runs[args.short].seconds)
    return Decoding(rate, emitted_per_verify(long.spec, long.lengths) or 1.0)


def rows_of(found: Mapping[str, Sequence[Decoding]], batch_size: int, label: str) -> list[dict[str, Any]]:
    """One row an arm: its rate, its step, and the accept length at which it would be as fast as plain decoding."""
    rows = []
    rates = {arm: [one.tokens_per_s for one in several] for arm, several in found.items()}
    for arm, measured in rates.items():
        emitted = statistics.fmean(one.tokens_per_verify for one in found[arm])
        rate = statistics.median(measured)
        row: dict[str, Any] = {
            "label": label,
            "arm": arm,
            "batch_size": batch_size,
            "tokens_per_verify": emitted,
            "decode_tokens_per_s": rate,
            "decode_tokens_per_s_by_round": list(measured),
            "step_ms": batch_size * emitted / rate * 1e3,
        }
        if arm != PLAIN:
            row["speed_vs_plain"] = paired_ratio(measured, rates[PLAIN])
            row["needed_tokens_per_verify"] = emitted * statistics.median(rates[PLAIN]) / rate
        rows.append(row)
    return rows


def label(args: argparse.Namespace) -> str:
    return LABEL if args.simulate > 0 else NOT_SIMULATED


def show(out: Console, rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> None:
    table = Table(title=f"{args.shape}, k = {args.k}; {label(args)}")
    for head in ("batch", "arm", "decode tokens/s", "step ms", "tokens/verify", "vs plain [95 %]", "needed for 1.0"):
        table.add_column(head, justify="left" if head == "arm" else "right")
    for row in rows:
        needed = row.get("needed_tokens_per_verify")
        table.add_row(
            str(row["batch_size"]),
            row["arm"],
            f"{row['decode_tokens_per_s']:,.0f}",
            f"{row['step_ms']:.2f}",
            f"{row['tokens_per_verify']:.2f}",
            str(row.get("speed_vs_plain", "")),
            "" if needed is None else f"{needed:.2f}",
        )
    out.print(table)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments("benchmarks.sglang_kernels", __doc__.splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--arms", type=words, default=(PLAIN, "rejection"), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--batch-sizes", type=positives, default=(1, 8, 32, 128))
    parser.add_argument("--simulate", type=float, default=3.0, help="tokens each verify keeps; 0 = what the draft gets")
    parser.add_argument("--k", type=positive, default=3)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--prompt-len", type=positive, default=64)
    parser.add_argument("--short", type=positive, default=32, help="tokens of the shorter response")
    parser.add_argument("--long", type=positive, default=288, help="tokens of the longer response")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--attention-backend", default="triton")
    parser.add_argument("--python", default="", help="interpreter of SGLang's environment; default: this one")
    args = parser.parse_args(argv)
    if args.arms[0] != PLAIN or not set(args.arms) <= set(ARMS):
        parser.error(f"--arms {','.join(args.arms)}: begin with {PLAIN}, then any of {', '.join(ARMS[1:])}")
    if args.simulate > args.k + 1:
        parser.error(f"--simulate {args.simulate:g}: a verify of k = {args.k} keeps {args.k + 1} tokens at most")
    return args


def measure(args: argparse.Namespace, engines: Mapping[str, DirectEngine]) -> list[dict[str, Any]]:
    """Every batch size in turn, arms interleaved within it; a warm-up round that does not count."""
    rows = []
    for batch_size in args.batch_sizes:
        arms = {
            name: lambda seed, engine=engine, batch_size=batch_size: decoding(engine, args, batch_size, seed)
            for name, engine in engines.items()
        }
        interleaved(arms, [-1])
        rows += rows_of(interleaved(arms, range(args.rounds)), batch_size, label(args))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    version = find_sglang(args.python).version
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with ThreadPoolExecutor() as pool:
            starting = {arm: pool.submit(start, args, arm, folder) for arm in args.arms}
        for started in starting.values():
            if started.exception() is None:
                stack.callback(started.result().close)
        rows = measure(args, {arm: started.result() for arm, started in starting.items()})
    show(console(), rows, args)
    shared = {
        name: getattr(args, name) for name in ("shape", "k", "temperature", "prompt_len", "short", "long", "rounds")
    }
    shared |= {"attention_backend": args.attention_backend, "device": args.device, "sglang": version}
    append_results(args.results, [shared | row for row in rows], provenance("benchmarks.sglang_kernels"))


if __name__ == "__main__":
    run(main)
