"""Where a decode step's time goes in a real SGLang server, plain and with EAGLE-3: draft, verification, extension.

The server is started as training starts it. A wave of requests decodes with all of them running, and SGLang's own
profiler records some steps in its middle: once what the GPU does (with its launches), and once with the host's spans,
which name the parts and slow the host more. The same wave without a profiler says how long a step really takes: from
it, and from the busy time of the trace, follows how much of a step the GPU waits. Timing only: `ignore_eos` keeps every
request running to the end.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.common import (
    add_policy_options,
    append_results,
    arguments,
    console,
    positive,
    positives,
    provenance,
    run,
    words,
)
from benchmarks.rollout_anchor import DirectHttp, draft_depth, sampling_params
from benchmarks.rollout_sglang import (
    PromptSet,
    about_server,
    engine_config,
    load_prompt_set,
    settings_from,
    waves_of,
)
from benchmarks.step_trace import TraceError, load_events, parse_events, step_figures, summary
from rollout_engine.sglang_engine import SGLangEngine
from rollout_engine.sglang_wire import plain_stats, spec_stats
from rollout_engine.types import EngineError, RolloutRequest, SamplingParams

LABEL = "step timing only: ignore_eos, so that every request runs to its last token"
ARMS = ("none", "eagle3")
# What the profiler records. "gpu" alone, of a server without a GPU, ends SGLang's scheduler.
ACTIVITIES = {"gpu+host": ("CPU", "GPU"), "gpu": ("GPU",)}
MEM_FRACTION_STATIC = 0.7  # of the GPU at most, unless a flag says otherwise; the engine takes what its slots need
START_AT = 0.3  # of a wave's time, when the profiler starts: behind prefill, far from the first end
WAVE_TIMEOUT_S = 300.0  # the first one at temperature 1 may compile for more than a minute
CONTROL_TIMEOUT_S = 120.0
WARM_UP_STEPS = 4  # of the first profile, which initializes the profiler and is thrown away


@dataclass(frozen=True, slots=True)
class Wave:
    """One batch of responses of equal length; all ran until the first of them finished."""

    seconds: float
    first_finish_s: float
    first_forwards: int  # decode forwards of the one that finished first
    tokens: int  # decoded by all
    forwards: int  # of all


class Server:
    """One arm's SGLang server, asked directly."""

    def __init__(self, http: DirectHttp, args: argparse.Namespace, prompts: PromptSet) -> None:
        self._http, self._args, self._prompts = http, args, prompts
        settings = http.settings()
        self._depth = draft_depth(settings)
        self.about = about_server(settings)

    def wave(self, batch_size: int, num_tokens: int, seed: int) -> Wave:
        """Raises EngineError when a response is not as long as asked for: then not all were running."""
        sampling = SamplingParams(self._args.temperature, self._args.top_p, self._args.top_k, num_tokens)
        (work,) = waves_of(self._prompts, sampling, batch_size, 1, seed)
        body = wave_body(work, self._prompts.eos_token_ids)
        self._http.flush()
        start_s = time.perf_counter()
        outputs = self._http.ask_json("/generate", body, WAVE_TIMEOUT_S)
        elapsed_s = time.perf_counter() - start_s
        return wave_of(elapsed_s, [out["meta_info"] for out in outputs], num_tokens, self._depth)

    def trace(self, batch_size: int, num_steps: int, activities: Sequence[str], wave_s: float, folder: Path) -> Path:
        """Profile `num_steps` steps in the middle of a wave; the trace's file. `wave_s`: what a wave takes.

        The scheduler itself writes the file before it goes on decoding, so it is whole when the wave is done.
        Raises TraceError when there is none then.
        """
        request = profile_request(num_steps, activities, folder)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(self.wave, batch_size, self._args.tokens, 0)
            time.sleep(START_AT * wave_s)
            try:
                self._http.ask("/start_profile", request, CONTROL_TIMEOUT_S)
            finally:
                running.result()
        if not found_traces(folder):
            with suppress(EngineError):  # it says so when it does not profile any more
                self._http.ask("/stop_profile", {}, CONTROL_TIMEOUT_S)
        if not (found := found_traces(folder)):
            raise TraceError(f"SGLang left no trace in {folder}: its log says why")
        return found[-1]


def found_traces(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.trace.json*"))


def profile_request(num_steps: int, activities: Sequence[str], folder: Path) -> dict[str, Any]:
    """What /start_profile is told: begin now, end by itself, no stacks or shapes, which slow the host."""
    return {
        "output_dir": str(folder),
        "num_steps": num_steps,
        "activities": list(activities),
        "with_stack": False,
        "record_shapes": False,
        "profile_by_stage": False,
        "merge_profiles": False,
        "profile_id": "steps",
    }


def wave_body(work: Sequence[RolloutRequest], eos_token_ids: Sequence[int]) -> dict[str, Any]:
    """One call for all of them, log-probs as training needs them."""
    return {
        "input_ids": [list(request.prompt_ids) for request in work],
        "sampling_params": sampling_params(work[0], eos_token_ids) | {"ignore_eos": True},
        "return_logprob": True,
    }


def wave_of(seconds: float, outputs: Sequence[Mapping[str, Any]], num_tokens: int, depth: int) -> Wave:
    """A wave from the `meta_info`s of its responses; `depth` 0 is plain decoding."""
    lengths = {out["completion_tokens"] for out in outputs}
    if lengths != {num_tokens}:
        raise EngineError(f"responses of {sorted(lengths)} tokens, all should have {num_tokens}")
    forwards = [
        (spec_stats(out, depth) if depth else plain_stats(out["completion_tokens"])).num_decode_steps for out in outputs
    ]
    first_s, first_forwards = min(zip((out["e2e_latency"] for out in outputs), forwards, strict=True))
    return Wave(seconds, first_s, first_forwards, len(outputs) * (num_tokens - 1), sum(forwards))


def step_ms(short: Wave, long: Wave) -> float:
    """A step of the whole batch: what the first response to finish takes beyond a shorter one, by forward.

    Prefill and the call's overhead cancel, and the batch is whole all the time. Raises EngineError when the
    difference is no time.
    """
    forwards = long.first_forwards - short.first_forwards
    seconds = long.first_finish_s - short.first_finish_s
    if forwards <= 0 or seconds <= 0:
        raise EngineError(
            f"a longer response took {seconds:.3f} s and {forwards} forwards more than a short one: raise --tokens"
        )
    return seconds / forwards * 1e3


def unprofiled(server: Server, args: argparse.Namespace, batch_size: int) -> tuple[dict[str, Any], float]:
    """The step without a profiler, and the seconds of a long wave. A first round does not count."""
    rounds = []
    for seed in range(args.rounds + 1):
        short, long = (server.wave(batch_size, n, seed) for n in (args.tokens // 4, args.tokens))
        rounds.append((step_ms(short, long) if seed else 0.0, long))
    steps = [ms for ms, _ in rounds[1:]]
    waves = [wave for _, wave in rounds[1:]]
    return {
        "step_ms": statistics.median(steps),
        "step_ms_by_round": steps,
        "tokens_per_step": sum(wave.tokens for wave in waves) / sum(wave.forwards for wave in waves),
        "tokens_per_s": sum(wave.tokens for wave in waves) / sum(wave.seconds for wave in waves),
    }, statistics.median(wave.seconds for wave in waves)


def profiled(server: Server, args: argparse.Namespace, batch_size: int, profile: str, wave_s: float) -> dict[str, Any]:
    """What one trace says; the reason under `fault`, and no figure, where it says nothing. The trace is deleted."""
    found: dict[str, Any] = {"profile": profile}
    try:
        with tempfile.TemporaryDirectory(prefix="slipstream-trace-") as folder:
            path = server.trace(batch_size, args.steps, ACTIVITIES[profile], wave_s, Path(folder))
            found["trace_bytes"] = path.stat().st_size
            events = load_events(path)
        found["trace_events"] = summary(events)
        return found | step_figures(parse_events(events), batch_size)
    except TraceError as error:
        return found | {"fault": str(error)}


def compared(row: Mapping[str, Any]) -> dict[str, float]:
    """How much the profiler slowed the step, and how long in the real step the GPU has nothing to do.

    Outside of graphs it waits for the host. To what is idle inside them, from kernel to kernel, the profiler adds.
    """
    if "fault" in row:
        return {}
    idle_ms = max(0.0, row["step_ms"] - row["busy_ms"])
    return {
        "slowed_by_profiler": row["wall_ms"] / row["step_ms"],
        "idle_share_unprofiled": idle_ms / row["step_ms"],
        "idle_outside_graphs_ms": max(0.0, idle_ms - row["idle_in_graphs_ms"]),
    }


def measure(server: Server, args: argparse.Namespace, arm: str, deadline_s: float) -> Iterator[dict[str, Any]]:
    """A row for each kind of profile and batch size, all batch sizes with the first kind before any with the next."""
    real: dict[int, tuple[dict[str, Any], float]] = {}
    for profile in args.profiles:
        for batch_size in args.batch_sizes:
            if time.monotonic() > deadline_s:
                raise EngineError(f"no time was left for {arm}, batch {batch_size}, {profile}: raise --limit-s")
            if batch_size not in real:
                real[batch_size] = unprofiled(server, args, batch_size)
            figures, wave_s = real[batch_size]
            row = {"label": LABEL, "arm": arm, "batch_size": batch_size, **server.about, **figures}
            row |= profiled(server, args, batch_size, profile, wave_s)
            yield row | compared(row)


@contextmanager
def served(args: argparse.Namespace, arm: str, prompts: PromptSet, work_dir: Path) -> Iterator[Server]:
    """Graphs for the batch sizes that are measured, places for the largest. Of a server that died, its log says why."""
    folder = work_dir / arm
    folder.mkdir(parents=True, exist_ok=True)
    engine = SGLangEngine(
        args.policy.resolve(),
        engine_config(args, arm, prompts),
        draft=args.draft.resolve() if arm == "eagle3" else None,
        eos_token_ids=prompts.eos_token_ids,
        work_dir=folder,
        serves_files=True,
    )
    with closing(engine):
        try:
            yield Server(DirectHttp(engine.address, prompts.eos_token_ids), args, prompts)
        except EngineError:
            engine.require_alive()
            raise


def warm_up(server: Server, args: argparse.Namespace) -> None:
    """The first wave compiles, the first profile initializes the profiler: neither is looked at."""
    batch_size = args.batch_sizes[0]
    server.wave(batch_size, args.tokens, 0)
    wave_s = server.wave(batch_size, args.tokens, 0).seconds
    with suppress(TraceError), tempfile.TemporaryDirectory(prefix="slipstream-trace-") as folder:
        server.trace(batch_size, WARM_UP_STEPS, ACTIVITIES["gpu+host"], wave_s, Path(folder))


def show(out: Console, rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> None:
    table = Table(title=f"a decode step, k = {args.k}, rule {args.rule}, T = {args.temperature}; {LABEL}")
    left = ("arm", "profile")
    heads = (
        "batch",
        "arm",
        "step ms",
        "tokens",
        "profile",
        "wall ms",
        "busy ms",
        "idle",
        "idle in graphs ms",
        "kernels",
    )
    for head in (*heads, "launches"):
        table.add_column(head, justify="left" if head in left else "right")
    for row in rows:
        cells = [str(row["batch_size"]), row["arm"], f"{row['step_ms']:.2f}", f"{row['tokens_per_step']:.2f}"]
        cells.append(row["profile"])
        if "fault" not in row:
            launches = f"{row['graph_launches']:.1f} graphs + {row['kernel_launches']:.0f}"
            cells += [f"{row['wall_ms']:.2f}", f"{row['busy_ms']:.2f}", f"{row['idle_share_unprofiled']:.0%}"]
            cells += [f"{row['idle_in_graphs_ms']:.2f}", f"{row['kernels']:.0f}", launches]
        table.add_row(*cells)
    out.print(table)
    for row in rows:
        name = f"{row['arm']}, batch {row['batch_size']}, {row['profile']}"
        if "fault" in row:
            out.print(f"NO FIGURES from {name}: {row['fault']}", markup=False)
        else:
            show_parts(out, row, f"{name}: ms of a step by part (named by {row['named_by']})")


def show_parts(out: Console, row: Mapping[str, Any], title: str) -> None:
    table = Table(title=title)
    for head in ("part", "on the GPU", "host", "extent", "kernels", "largest kernels"):
        table.add_column(head, justify="left" if head in ("part", "largest kernels") else "right")
    host_ms = {name: f"{ms:.3f}" for name, ms in row["host_ms"].items()}
    for part in row["parts"]:
        table.add_row(
            f"{part['part']}, {'graph' if part['in_graph'] else 'no graph'}",
            f"{part['busy_ms']:.3f}",
            host_ms.pop(part["part"], ""),  # of the whole part, so in the first of its rows alone
            f"{part['extent_ms']:.3f}" if "extent_ms" in part else "",
            f"{part['kernels']:.0f}",
            escape(", ".join(kernel["name"][:40] for kernel in part["largest"][:2])),
        )
    out.print(table)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments("benchmarks.step_profile", __doc__.splitlines()[0])
    parser.epilog = "Further flags go to the engine, as those of slipstream train: --sglang-NAME VALUE"
    add_policy_options(parser)
    parser.set_defaults(dtype="bfloat16")
    parser.add_argument("--draft", type=Path, help="folder of an EAGLE-3 draft, for the arm eagle3")
    parser.add_argument("--arms", type=words, default=ARMS, help=f"of {','.join(ARMS)}")
    parser.add_argument("--profiles", type=words, help=f"of {','.join(ACTIVITIES)}; by default all that the device has")
    parser.add_argument("--batch-sizes", type=positives, default=(1, 8, 32, 128))
    parser.add_argument("--steps", type=positive, default=20, help="decode steps in a trace")
    parser.add_argument("--tokens", type=positive, default=320, help="of each response; prompt and it fit the context")
    parser.add_argument("--rounds", type=positive, default=3, help="waves without the profiler")
    parser.add_argument("--k", type=positive, default=3, help="draft tokens of a verify step")
    parser.add_argument("--rule", default="rejection", choices=("rejection", "target_only"))
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=480.0, help="no batch size begins later than that")
    parser.add_argument("--work-dir", type=Path, help="keep the servers' logs here")
    args, rest = parser.parse_known_args(argv)
    args.profiles = args.profiles or (tuple(ACTIVITIES) if args.device != "cpu" else ("gpu+host",))
    for name, known in (("arms", ARMS), ("profiles", ACTIVITIES)):
        if unknown := [word for word in getattr(args, name) if word not in known]:
            parser.error(f"--{name}: unknown {unknown[0]!r}; there are {', '.join(known)}")
    if "eagle3" in args.arms and args.draft is None:
        parser.error("the arm eagle3 needs --draft DIR, an EAGLE-3 draft in SGLang's form; or --arms none")
    if args.tokens < 4 * (args.steps + args.k):
        parser.error(f"--tokens {args.tokens}: {args.steps} steps in a wave's middle need more tokens")
    args.max_new_tokens = args.tokens
    settings = settings_from(rest)
    flags: dict[str, Any] = {}
    if args.device != "cpu":
        flags = {"mem_fraction_static": MEM_FRACTION_STATIC, "cuda_graph_bs_decode": sorted(args.batch_sizes)}
    args.engine_settings = replace(settings, sglang=flags | settings.sglang)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Rows are written as they come, and an arm whose server fails does not stop the next one."""
    args = parse(argv)
    deadline_s = time.monotonic() + args.limit_s
    prompts, origin = load_prompt_set(args), provenance("benchmarks.step_profile")
    names = ("k", "rule", "temperature", "tokens", "steps", "rounds", "dtype", "device")
    shared = {"policy": str(args.policy), "ignore_eos": True} | {name: getattr(args, name) for name in names}
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    with ExitStack() as stack:
        work_dir = args.work_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slipstream-bench-")))
        for arm in args.arms:
            if time.monotonic() > deadline_s:  # a server takes a minute to start
                faults.append(f"{arm}: no time was left to start: raise --limit-s")
                continue
            try:
                with served(args, arm, prompts, work_dir) as server:
                    warm_up(server, args)
                    for row in measure(server, args, arm, deadline_s):
                        append_results(args.results, [shared | row], origin)
                        rows.append(row)
            except EngineError as error:
                faults.append(f"{arm}: {error}")
    show(console(150), rows, args)
    faults += [row["fault"] for row in rows if "fault" in row]
    if faults:
        raise EngineError(f"{len(rows)} rows, {len(faults)} faults; the first: {faults[0]}")


if __name__ == "__main__":
    run(main)
