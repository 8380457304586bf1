"""What a profiler's trace says of decode steps: pure functions from Kineto's chrome trace to one row of figures.

Every kernel carries the correlation id of the call that launched it; all kernels of a CUDA graph carry that of one
cudaGraphLaunch. So a kernel belongs to the step, and to the part of it, in which the host launched it. SGLang names
the parts by spans ("scheduler.run_batch", "draft", "step[TARGET_VERIFY bs=8]", "draft_extend"), which the profiler
records together with CPU activity. Without spans the parts are the graphs of a step by their order. Times in the trace
are microseconds of one clock for host and GPU.
"""

from __future__ import annotations

import gzip
import json
import re
import statistics
import zlib
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout_engine.types import EngineError

SKIPPED_STEPS = 3  # at the beginning: the profiler has just been started in the middle of them
LEAST_STEPS = 3  # from fewer nothing is said
MOST_GRAPHS = 8  # of one step
TOP_KERNELS, NAMED_KERNELS = 10, 3  # of a step, of one of its parts
NAME_CHARS = 120  # kept of a kernel's name: templates are long
MOST_TRACE_BYTES = 256 * 1024 * 1024  # compressed; some steps have a few megabytes

_ON_GPU = frozenset(("kernel", "gpu_memcpy", "gpu_memset"))
_CALLS = frozenset(("cuda_runtime", "cuda_driver"))
_RUN_BATCH = "scheduler.run_batch"
_FORWARD = re.compile(r"step\[(\w+) bs=(\d+)")  # of a policy's or a draft's forward
_DECODING = {"DECODE": "forward", "TARGET_VERIFY": "verify forward", "VERIFY": "verify forward"}  # by SGLang's version
_DRAFTING = {"draft": "draft", "draft_extend": "draft extend"}


class TraceError(EngineError):
    """The trace says nothing of decode steps; one line why."""


@dataclass(frozen=True, slots=True)
class Work:
    """Something that ran on the GPU."""

    name: str
    start_us: float
    end_us: float
    call: int | None  # the correlation id of what launched it
    is_kernel: bool  # else a copy or a fill


@dataclass(frozen=True, slots=True)
class Call:
    """Something that the host asked of the CUDA runtime or driver."""

    name: str
    start_us: float
    end_us: float

    @property
    def is_graph(self) -> bool:
        return "GraphLaunch" in self.name

    @property
    def is_launch(self) -> bool:
        return "LaunchKernel" in self.name

    @property
    def is_wait(self) -> bool:
        return "Synchronize" in self.name


@dataclass(frozen=True, slots=True)
class Span:
    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True, slots=True)
class Trace:
    """All in the order of their starts."""

    work: tuple[Work, ...]
    calls: Mapping[int, Call]  # by correlation id
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Steps:
    """How the host's time is cut: `marks[i]` names the part that lasts from its time to the next mark's."""

    starts_us: tuple[float, ...]  # of each step; the last one only ends the one before it
    marks: tuple[tuple[float, str], ...]
    kept: tuple[int, ...]  # the steps of which something is said
    named_by: str

    def step_at(self, time_us: float) -> int:
        return bisect_right(self.starts_us, time_us) - 1

    def part_at(self, time_us: float) -> str:
        i = bisect_right(self.marks, time_us, key=lambda mark: mark[0]) - 1
        return self.marks[i][1] if i >= 0 else "before the first step"


# ---- reading ----


def load_events(path: Path) -> list[dict[str, Any]]:
    """The events of a trace file, gzipped or not. Raises TraceError when it cannot be read."""
    try:
        size = path.stat().st_size
        if size > MOST_TRACE_BYTES:
            raise TraceError(f"{path.name}: {size:,} bytes are too many to read: profile fewer steps")
        raw = path.read_bytes()
        data = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise TraceError(f"{path.name}: not a trace that can be read ({type(error).__name__}: {error})") from error
    events = data.get("traceEvents") if isinstance(data, dict) else data
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise TraceError(f"{path.name}: it has no list traceEvents")
    return events


def summary(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """By category: number of events, commonest names and the first one: to see where the rest was read wrongly."""
    names: dict[str, Counter[str]] = defaultdict(Counter)
    first: dict[str, Mapping[str, Any]] = {}
    for event in events:
        category = str(event.get("cat", f"ph={event.get('ph')}"))
        names[category][str(event.get("name"))[:NAME_CHARS]] += 1
        first.setdefault(category, event)
    return {
        category: {
            "count": sum(found.values()),
            "names": dict(found.most_common(8)),
            "first": json.dumps(first[category], default=str)[:600],
        }
        for category, found in sorted(names.items())
    }


def parse_events(events: Iterable[Mapping[str, Any]]) -> Trace:
    """Work on the GPU, calls and spans. Raises TraceError without kernels, or for one without its times."""
    work, calls, spans = [], {}, []
    for event in events:
        category = str(event.get("cat", "")).lower()
        if event.get("ph") != "X" or category not in _ON_GPU | _CALLS | {"user_annotation"}:
            continue
        name, start_us, end_us = str(event.get("name")), *_times(event)
        arguments = event.get("args")
        call = arguments.get("correlation") if isinstance(arguments, dict) else None
        call = int(call) if call is not None else None
        if category in _ON_GPU:
            work.append(Work(name, start_us, end_us, call, category == "kernel"))
        elif category in _CALLS and call is not None:
            known = calls.get(call)  # the driver's call inside the runtime's has the same id: the outer one counts
            if known is None or start_us < known.start_us:
                calls[call] = Call(name, start_us, end_us)
        elif category == "user_annotation":
            spans.append(Span(name, start_us, end_us))
    if not any(one.is_kernel for one in work):
        raise TraceError("the trace has no kernel: nothing ran on a GPU, or the profiler did not see it")
    unknown = sum(one.call not in calls for one in work)
    if unknown * 2 > len(work):
        raise TraceError(f"{unknown} of {len(work)} kernels and copies do not name the call that launched them")
    return Trace(
        tuple(sorted(work, key=lambda one: one.start_us)),
        dict(sorted(calls.items(), key=lambda item: item[1].start_us)),
        tuple(sorted(spans, key=lambda one: (one.start_us, -one.end_us))),
    )


def _times(event: Mapping[str, Any]) -> tuple[float, float]:
    try:
        start_us, duration_us = float(event["ts"]), float(event["dur"])
    except (KeyError, TypeError, ValueError) as error:
        raise TraceError(f"the {event.get('cat')} event {event.get('name')!r} has no number ts or dur") from error
    return start_us, start_us + duration_us


# ---- where steps and their parts begin ----


def steps_by_span(trace: Trace, batch_size: int) -> Steps | None:
    """Steps by SGLang's own spans; None where the trace has none of them.

    Kept are decode steps of the whole batch. Raises TraceError when they are too few.
    """
    runs = [span for span in trace.spans if span.name == _RUN_BATCH]
    parts = _outermost([(span, name) for span in trace.spans if (name := _part_name(span.name))])
    if not runs or not parts:
        return None
    starts = tuple(span.start_us for span in runs)
    marks = [(start_us, "before the first part") for start_us in starts]
    for span, name in parts:
        marks += [(span.start_us, name), (span.end_us, f"after {name}")]
    batches: dict[int, list[int]] = defaultdict(list)  # of the policy's decode forwards, by step
    for span, _ in parts:
        if (found := _FORWARD.match(span.name)) and found[1] in _DECODING:
            batches[bisect_right(starts, span.start_us) - 1].append(int(found[2]))
    whole = tuple(i for i in range(SKIPPED_STEPS, len(starts) - 1) if batch_size in batches[i])
    if len(whole) < LEAST_STEPS:
        seen = Counter(size for sizes in batches.values() for size in sizes)
        raise TraceError(
            f"{len(whole)} whole decode steps of {batch_size} requests in {len(starts)} recorded ones (batch sizes "
            f"seen: {dict(seen)}; parts: {dict(Counter(name for _, name in parts))}): let responses be longer"
        )
    return Steps(starts, tuple(sorted(marks, key=lambda mark: mark[0])), whole, "spans")


def _part_name(span: str) -> str | None:
    if found := _FORWARD.match(span):
        return _DECODING.get(found[1], f"forward of {found[1]}")
    return _DRAFTING.get(span)


def _outermost(named: Sequence[tuple[Span, str]]) -> list[tuple[Span, str]]:
    """Without those inside of others: a draft's own forwards, where no graph runs them, are named like the policy's."""
    kept: list[tuple[Span, str]] = []
    for span, name in named:
        if not kept or span.start_us >= kept[-1][0].end_us:
            kept.append((span, name))
    return kept


def steps_by_graph(trace: Trace) -> Steps:
    """Steps by the order of graphs: after how many launches the same ones come again; the largest is the first.

    Raises TraceError when there is no such order.
    """
    sizes = Counter(one.call for one in trace.work if one.is_kernel)
    launches = [(call, sizes[number]) for number, call in trace.calls.items() if call.is_graph and sizes[number]]
    found = _repeating([size for _, size in launches])
    if found is None:
        raise TraceError(
            f"{len(launches)} graph launches in no order that repeats; kernels of the first: "
            f"{[size for _, size in launches][:12]}"
        )
    period, begin, end = found
    first = begin + max(range(period), key=lambda i: launches[begin + i][1])
    launches = launches[first:end]
    marks: list[tuple[float, str]] = []
    for i, (call, _) in enumerate(launches):
        name = f"graph {i % period + 1} of {period}"
        marks += [(call.start_us, name), (call.end_us, f"after {name}")]
    starts = tuple(call.start_us for call, _ in launches[::period])
    kept = tuple(range(SKIPPED_STEPS, len(starts) - 1))
    if len(kept) < LEAST_STEPS:
        raise TraceError(f"{len(launches)} launches, {period} a step, are too few steps: let responses be longer")
    return Steps(starts, tuple(marks), kept, "order of graphs, the largest first")


def _repeating(sizes: Sequence[int]) -> tuple[int, int, int] | None:
    """The smallest period that most of `sizes` keep, and the begin and end of the longest stretch that keeps it."""
    for period in range(1, MOST_GRAPHS + 1):
        begin, longest = 0, (0, 0)
        for i in range(len(sizes)):
            if i - period >= begin and sizes[i] != sizes[i - period]:
                begin = i - period + 1
            longest = max(longest, (begin, i + 1), key=lambda stretch: stretch[1] - stretch[0])
        length = longest[1] - longest[0]
        if length >= LEAST_STEPS * period and 2 * length > len(sizes):
            return period, *longest
    return None


# ---- figures ----


def step_figures(trace: Trace, batch_size: int) -> dict[str, Any]:
    """Milliseconds and counts of one decode step, as means over the steps kept. Raises TraceError.

    `wall_ms` is from a step's first kernel in its largest graph to the next step's. `busy_ms` is the union of all that
    ran on the GPU. `host_ms` is the host's time by part, waits included, and says little of a host that runs ahead.
    """
    steps = steps_by_span(trace, batch_size) or steps_by_graph(trace)
    kept, num = set(steps.kept), len(steps.kept)
    placed = [(one, trace.calls[one.call]) for one in trace.work if one.call in trace.calls]
    work = [(one, call) for one, call in placed if steps.step_at(call.start_us) in kept]
    calls = [call for call in trace.calls.values() if steps.step_at(call.start_us) in kept]
    walls = _walls_us(placed, steps)
    if not work or not walls:
        raise TraceError(f"{num} steps, but no two that follow one another with kernels of their own")
    graphs = {number for number, call in trace.calls.items() if call.is_graph and steps.step_at(call.start_us) in kept}
    blind = len(graphs - {one.call for one, _ in work})
    if blind * 10 > len(graphs):
        raise TraceError(
            f"{blind} of {len(graphs)} graph launches have no kernel in the trace: it shows part of the work"
        )
    busy_us = union_us([one for one, _ in work]) / num
    parts = _parts(work, steps, num)
    wall_us = statistics.fmean(walls)
    return {
        "num_steps": num,
        "named_by": steps.named_by,
        "wall_ms": wall_us / 1e3,
        "wall_ms_median": statistics.median(walls) / 1e3,
        "busy_ms": busy_us / 1e3,
        "idle_share": max(0.0, 1 - busy_us / wall_us),
        "kernels": sum(one.is_kernel for one, _ in work) / num,
        "copies": sum(not one.is_kernel for one, _ in work) / num,
        "graph_launches": sum(call.is_graph for call in calls) / num,
        "kernel_launches": sum(call.is_launch for call in calls) / num,
        "host_calls": len(calls) / num,
        "host_waits_ms": sum(call.end_us - call.start_us for call in calls if call.is_wait) / num / 1e3,
        "host_ms": _host_ms(steps),
        "idle_in_graphs_ms": sum(part["extent_ms"] - part["busy_ms"] for part in parts if part["in_graph"]),
        "parts": parts,
        "top_kernels": _largest([one for one, _ in work], num, TOP_KERNELS),
        "work_without_call": len(trace.work) - len(placed),
        "graphs_without_work": blind,
    }


def union_us(work: Iterable[Work]) -> float:
    """Time in which at least one of them runs; `work` in the order of its starts."""
    total = 0.0
    end_us = float("-inf")
    for one in work:
        if one.end_us > end_us:
            total += one.end_us - max(one.start_us, end_us)
            end_us = one.end_us
    return total


def _walls_us(placed: Sequence[tuple[Work, Call]], steps: Steps) -> list[float]:
    """From each kept step to the next, by the first kernel of the largest graph, or the first kernel without graphs."""
    kernels: dict[int, list[tuple[Work, Call]]] = defaultdict(list)
    for one, call in placed:
        if one.is_kernel:
            kernels[steps.step_at(call.start_us)].append((one, call))
    anchors = {}
    for step, found in kernels.items():
        sizes = Counter(one.call for one, call in found if call.is_graph)
        graph = sizes.most_common(1)[0][0] if sizes else None
        anchors[step] = min(one.start_us for one, _ in found if graph is None or one.call == graph)
    walls = [anchors[i + 1] - anchors[i] for i in steps.kept if i in anchors and i + 1 in anchors]
    return [wall for wall in walls if wall > 0]


def _host_ms(steps: Steps) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    kept = set(steps.kept)
    for (start_us, name), (end_us, _) in zip(steps.marks, steps.marks[1:], strict=False):
        if steps.step_at(start_us) in kept:
            total[name] += end_us - start_us
    return {name: us / len(steps.kept) / 1e3 for name, us in total.items()}


def _parts(work: Sequence[tuple[Work, Call]], steps: Steps, num: int) -> list[dict[str, Any]]:
    """A part of the step, inside its graph and outside, in the order in which a step launches them.

    `extent_ms` of a graph is from its first kernel's start to its last one's end: what lies in it beside `busy_ms` is
    the GPU's own way from one kernel to the next.
    """
    groups: dict[tuple[str, bool], list[Work]] = defaultdict(list)
    for one, call in sorted(work, key=lambda pair: pair[1].start_us):
        groups[steps.part_at(call.start_us), call.is_graph].append(one)
    rows = []
    for (part, in_graph), found in groups.items():
        found.sort(key=lambda one: one.start_us)
        row: dict[str, Any] = {
            "part": part,
            "in_graph": in_graph,
            "busy_ms": union_us(found) / num / 1e3,
            "kernels": sum(one.is_kernel for one in found) / num,
            "calls": len({one.call for one in found}) / num,
            "largest": _largest(found, num, NAMED_KERNELS),
        }
        if in_graph:
            row["extent_ms"] = _extent_us(found) / num / 1e3
        rows.append(row)
    return rows


def _extent_us(work: Iterable[Work]) -> float:
    launches: dict[int | None, list[Work]] = defaultdict(list)
    for one in work:
        launches[one.call].append(one)
    return sum(max(one.end_us for one in of) - min(one.start_us for one in of) for of in launches.values())


def _largest(work: Iterable[Work], num_steps: int, most: int) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = defaultdict(list)
    for one in work:
        times[one.name[:NAME_CHARS]].append(one.end_us - one.start_us)
    ordered = sorted(times.items(), key=lambda item: -sum(item[1]))[:most]
    return [{"name": name, "ms": sum(us) / num_steps / 1e3, "count": len(us) / num_steps} for name, us in ordered]
