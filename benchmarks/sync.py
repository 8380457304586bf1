"""One sync of policy and draft, checks included, beside a plain copy of the same bytes.

With the embedded engine in process and over disk; with --engine sglang into a running server, by phases.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import rollout_sglang, sync_sglang
from benchmarks.common import append_results, arguments, console, interleaved, positive, provenance, run, seconds
from draft_models.checkpoint import load_draft
from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config
from rollout_engine.decoder import Decoder
from rollout_engine.hf_checkpoint import read_config
from sync.disk import DiskTransport, receive_folder
from sync.inprocess import InProcessTransport
from sync.publish import publish
from sync.receiver import WeightReceiver


def make_arms(decoder: Decoder, draft: Eagle3, folder: Path) -> tuple[dict[str, Callable[[int], float]], int, int]:
    """Arms that take one sync each and return its seconds; the bytes and the tensors that go over."""
    policy_tensors, draft_tensors = decoder.named_tensors(), draft.named_tensors()
    destinations = {f"policy.{name}": tensor for name, tensor in policy_tensors.items()}
    destinations |= {f"draft.{name}": tensor for name, tensor in draft_tensors.items()}
    receiver = WeightReceiver(destinations, 0)
    # The sender's own memory, as a trainer's weights are
    policy_source = {name: tensor.detach().clone() for name, tensor in policy_tensors.items()}
    draft_source = {name: tensor.detach().clone() for name, tensor in draft_tensors.items()}
    sources = [*policy_source.values(), *draft_source.values()]
    targets = [tensor.detach() for tensor in destinations.values()]
    versions = itertools.count(1)
    in_process = InProcessTransport(receiver)
    disk = DiskTransport(folder, receiver.plan, partial(receive_folder, receiver))

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    arms = {
        "plain copy": lambda _: seconds(copy),
        "in process": lambda _: seconds(lambda: publish(policy_source, draft_source, in_process, next(versions))),
        "disk": lambda _: seconds(lambda: publish(policy_source, draft_source, disk, next(versions))),
    }
    return arms, receiver.plan.num_bytes, len(targets)


def rows_of(measured: dict[str, list[float]], num_bytes: int, num_tensors: int) -> list[dict[str, Any]]:
    copy_s = statistics.median(measured["plain copy"])
    return [
        {
            "arm": name,
            "median_s": statistics.median(times),
            "times_s": times,
            "over_copy": statistics.median(times) / copy_s,
            "gib_per_s": num_bytes / statistics.median(times) / 2**30,
            "num_bytes": num_bytes,
            "num_tensors": num_tensors,
        }
        for name, times in measured.items()
    ]


def show(out: Console, rows: Sequence[dict[str, Any]]) -> None:
    size = f"{rows[0]['num_bytes'] / 2**20:.1f} MiB in {rows[0]['num_tensors']} tensors"
    table = Table(title=f"sync of policy and draft: {size}")
    for head in ("transport", "median ms", "GiB/s", "x plain copy"):
        table.add_column(head, justify="left" if head == "transport" else "right")
    for row in rows:
        cells = (f"{row['median_s'] * 1e3:.2f}", f"{row['gib_per_s']:.2f}", f"{row['over_copy']:.1f}")
        table.add_row(row["arm"], *cells)
    out.print(table)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments("benchmarks.sync", __doc__.splitlines()[0])
    parser.epilog = (
        "With --engine sglang further flags go to the engine, as those of slipstream train: --sglang-NAME VALUE"
    )
    parser.add_argument("--engine", default="torch", choices=("torch", "sglang"))
    parser.add_argument("--policy", type=Path, help="Hugging Face folder of the policy")
    parser.add_argument(
        "--shape", choices=tuple(sync_sglang.SHAPES), help="engine sglang: make policy and draft so large"
    )
    parser.add_argument("--draft", type=Path, help="folder of an EAGLE-3 draft; default: a random one")
    parser.add_argument("--transport", default="ipc", choices=("ipc", "disk", "broadcast"), help="engine sglang")
    parser.add_argument("--repeats", type=positive, default=15, help="syncs of each transport, interleaved")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU with --engine sglang, else float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where the disk transport writes; default: the temporary folder")
    args, rest = parser.parse_known_args(argv)
    on_gpu_server = args.engine == "sglang" and args.device.startswith("cuda")
    args.dtype = args.dtype or ("bfloat16" if on_gpu_server else "float32")
    if args.engine == "sglang":
        args.engine_settings = rollout_sglang.settings_from(rest)
        if (args.policy is None) == (args.shape is None):
            parser.error("--engine sglang needs either --policy DIR or --shape")
    elif rest or args.policy is None:
        parser.error(f"unrecognized arguments: {' '.join(rest)}" if rest else "--policy DIR is missing")
    return args


def torch_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    dtype = getattr(torch, args.dtype)
    decoder = Decoder.from_hf(args.policy, dtype, args.device)
    hf_config = read_config(args.policy)
    draft = (
        load_draft(args.draft, hf_config) if args.draft else Eagle3(Eagle3Config.from_target(hf_config, DraftConfig()))
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        arms, num_bytes, num_tensors = make_arms(decoder, draft.to(dtype).to(args.device), Path(folder))
        interleaved(arms, range(2))  # warm-up
        measured = interleaved(arms, range(args.repeats))
    rows = rows_of(measured, num_bytes, num_tensors)
    show(console(), rows)
    return rows


def sglang_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = sync_sglang.measure_all(args, args.engine_settings)
    sync_sglang.show(console(), rows)
    return [{"engine": "sglang"} | row for row in rows]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = sglang_rows(args) if args.engine == "sglang" else torch_rows(args)
    shared = {
        "policy": str(args.policy or args.shape),
        "dtype": args.dtype,
        "device": args.device,
        "repeats": args.repeats,
    }
    append_results(args.results, [shared | row for row in rows], provenance("benchmarks.sync"))


if __name__ == "__main__":
    run(main)
