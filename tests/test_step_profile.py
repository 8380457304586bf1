"""A decode step's breakdown from made-up traces with the fields that Kineto writes, and what waves say beside it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import common, step_profile
from benchmarks.rollout_sglang import PromptSet
from benchmarks.step_trace import TraceError, load_events, parse_events, step_figures, summary, union_us
from rollout_engine.types import EngineError, RolloutRequest, SamplingParams

STEP_US = 1000.0
BATCH = 4
NUM_STEPS = 10


class TraceMaker:
    """Events of decode steps, one every STEP_US. Work begins 50 us after its launch, kernels of a graph last 8 us and
    come every 10 us."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = [
            {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}},
            {"ph": "s", "cat": "ac2g", "name": "ac2g", "id": 7, "pid": 1, "ts": 0.5},
        ]
        self._calls = 100

    def event(self, category: str, name: str, ts: float, dur: float, **args: Any) -> None:
        self.events.append({"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "pid": 1, "args": args})

    def span(self, name: str, ts: float, dur: float) -> None:
        self.event("user_annotation", name, ts, dur)
        self.event("gpu_user_annotation", name, ts + 50, dur)  # the GPU's copy of it is no work

    def call(self, name: str, ts: float, dur: float = 2.0) -> int:
        self._calls += 1
        driver = name.startswith("cu") and not name.startswith("cuda")
        self.event("cuda_driver" if driver else "cuda_runtime", name, ts, dur, correlation=self._calls, cbid=1)
        return self._calls

    def graph(self, ts: float, name: str, kernels: int) -> None:
        call = self.call("cudaGraphLaunch", ts, 5.0)
        for i in range(kernels):
            args = {"correlation": call, "graph id": kernels, "graph node id": i, "stream": 7}
            self.event("kernel", f"{name}{i % 2}", ts + 50 + 10 * i, 8.0, **args)

    def kernel(self, ts: float, name: str, dur: float = 20.0, launched_by: str = "cudaLaunchKernel") -> None:
        self.event("kernel", name, ts + 50, dur, correlation=self.call(launched_by, ts), stream=7)

    def copy(self, ts: float, dur: float = 4.0) -> None:
        self.event("gpu_memcpy", "Memcpy DtoH", ts + 50, dur, correlation=self.call("cudaMemcpyAsync", ts), stream=8)

    def speculative_step(self, ts: float, batch: int = BATCH, mode: str = "TARGET_VERIFY") -> None:
        self.span("scheduler.run_batch", ts, 800)
        self.span("draft", ts + 10, 80)
        self.graph(ts + 20, "small", 5)
        self.span(f"step[{mode} bs={batch}]", ts + 100, 100)
        self.kernel(ts + 110, "plan", 10.0, "cuLaunchKernelEx")
        self.graph(ts + 150, "layer", 20)
        self.kernel(ts + 420, "softmax")
        self.kernel(ts + 450, "accept")
        self.span("draft_extend", ts + 500, 100)
        self.graph(ts + 510, "small", 6)
        self.copy(ts + 700)
        self.span("scheduler.process_batch_result", ts + 810, 150)
        self.call("cudaEventSynchronize", ts + 820, 100.0)

    def plain_step(self, ts: float, batch: int = BATCH) -> None:
        self.span("scheduler.run_batch", ts, 500)
        self.span(f"step[DECODE bs={batch}]", ts + 100, 100)
        self.graph(ts + 110, "layer", 20)
        self.kernel(ts + 400, "sample")


def trace_of(step: Callable[[TraceMaker, float], None], num_steps: int = NUM_STEPS) -> list[dict[str, Any]]:
    maker = TraceMaker()
    maker.span("scheduler.run_batch", 5.0, 900)  # a prefill before
    maker.span("step[EXTEND bs=4 toks=100]", 50.0, 100)
    maker.kernel(60.0, "prefill", 500.0)
    for i in range(num_steps):
        step(maker, (i + 1) * STEP_US)
    return maker.events


def without_spans(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event.get("cat") not in ("user_annotation", "gpu_user_annotation")]


def parts_of(figures: dict[str, Any]) -> dict[tuple[str, bool], dict[str, Any]]:
    return {(part["part"], part["in_graph"]): part for part in figures["parts"]}


def test_a_speculative_step_by_spans():
    figures = step_figures(parse_events(trace_of(TraceMaker.speculative_step)), BATCH)
    # Of the prefill and ten steps the first three are left out, and the last one, which nothing ends
    assert figures["num_steps"] == 7 and figures["named_by"] == "spans"
    busy_us = (5 + 20 + 6) * 8 + 10 + 2 * 20 + 4
    assert figures["wall_ms"] == pytest.approx(STEP_US / 1e3)
    assert figures["busy_ms"] == pytest.approx(busy_us / 1e3)
    assert figures["idle_share"] == pytest.approx(1 - busy_us / STEP_US)
    assert (figures["kernels"], figures["copies"]) == (34, 1)
    assert (figures["graph_launches"], figures["kernel_launches"], figures["host_calls"]) == (3, 3, 8)
    assert figures["host_waits_ms"] == pytest.approx(0.1)
    assert figures["idle_in_graphs_ms"] == pytest.approx(2 * (4 + 19 + 5) / 1e3)
    parts = parts_of(figures)
    found = {name: (part["kernels"], round(part["busy_ms"] * 1e3), part["calls"]) for name, part in parts.items()}
    assert found == {
        ("draft", True): (5, 40, 1),
        ("verify forward", False): (1, 10, 1),
        ("verify forward", True): (20, 160, 1),
        ("after verify forward", False): (2, 40, 2),
        ("draft extend", True): (6, 48, 1),
        ("after draft extend", False): (0, 4, 1),
    }
    assert parts["verify forward", True]["extent_ms"] == pytest.approx(0.198)
    assert [one["name"] for one in parts["after verify forward", False]["largest"]] == ["softmax", "accept"]
    assert figures["host_ms"]["draft"] == pytest.approx(0.08) and sum(figures["host_ms"].values()) == pytest.approx(1)
    assert figures["top_kernels"][0] == {"name": "layer0", "ms": pytest.approx(0.08), "count": 10}


def test_a_newer_sglangs_name_of_a_verification_is_the_same_part():
    def newer(maker: TraceMaker, ts: float) -> None:
        maker.speculative_step(ts, mode="VERIFY")

    old, new = (step_figures(parse_events(trace_of(step)), BATCH) for step in (TraceMaker.speculative_step, newer))
    assert old == new


def test_a_plain_step_by_spans():
    figures = step_figures(parse_events(trace_of(TraceMaker.plain_step)), BATCH)
    assert {name: part["kernels"] for name, part in parts_of(figures).items()} == {
        ("forward", True): 20,
        ("after forward", False): 1,
    }
    assert figures["wall_ms"] == pytest.approx(1.0) and figures["busy_ms"] == pytest.approx(0.18)


def test_without_spans_the_graphs_order_says_what_repeats():
    events = trace_of(TraceMaker.speculative_step)
    spans, order = (step_figures(parse_events(one), BATCH) for one in (events, without_spans(events)))
    assert order["named_by"] == "order of graphs, the largest first"
    # What a step launches before its largest graph now counts to the step before
    parts = {name: part["kernels"] for name, part in parts_of(order).items()}
    assert parts == {
        ("graph 1 of 3", True): 20,
        ("after graph 1 of 3", False): 2,
        ("graph 2 of 3", True): 6,
        ("after graph 2 of 3", False): 0,
        ("graph 3 of 3", True): 5,
        ("after graph 3 of 3", False): 1,
    }
    for name in ("wall_ms", "busy_ms", "kernels", "graph_launches", "kernel_launches"):
        assert order[name] == pytest.approx(spans[name])
    plain = step_figures(parse_events(without_spans(trace_of(TraceMaker.plain_step))), BATCH)
    assert [part["part"] for part in plain["parts"]] == ["graph 1 of 1", "after graph 1 of 1"]


def test_a_disturbance_in_the_middle_leaves_the_order_of_graphs():
    maker = TraceMaker()
    for i in range(12):
        maker.speculative_step(i * STEP_US)
        if i == 2:
            maker.graph(i * STEP_US + 600, "other", 9)
    figures = step_figures(parse_events(without_spans(maker.events)), BATCH)
    assert figures["graph_launches"] == 3 and figures["num_steps"] == 5


def test_an_order_that_only_a_few_graphs_keep_is_none():
    maker = TraceMaker()
    for i, kernels in enumerate([3, 9, 4, 8, 2, 2, 2, 2, 2, 2, 2, 2, 5, 1, 6, 3, 7, 2, 9, 4]):
        maker.graph(i * STEP_US, "any", kernels)
    with pytest.raises(TraceError, match=r"20 graph launches in no order that repeats; .* \[3, 9, 4"):
        step_figures(parse_events(maker.events), BATCH)


def test_forwards_of_a_draft_without_graphs_belong_to_the_draft():
    def step(maker: TraceMaker, ts: float) -> None:
        maker.span("scheduler.run_batch", ts, 800)
        maker.span("draft", ts + 10, 300)
        for i in range(3):
            maker.span("step[DECODE bs=4]", ts + 20 + 60 * i, 50)
            maker.kernel(ts + 30 + 60 * i, "small")
        maker.span("step[TARGET_VERIFY bs=4]", ts + 400, 100)
        maker.kernel(ts + 410, "layer", 100.0)

    figures = step_figures(parse_events(trace_of(step)), BATCH)
    parts = {name: part["kernels"] for name, part in parts_of(figures).items()}
    assert parts == {("draft", False): 3, ("verify forward", False): 1} and figures["wall_ms"] == pytest.approx(1.0)


def test_what_runs_at_the_same_time_counts_once():
    maker = TraceMaker()
    maker.kernel(0.0, "a", 100.0)
    maker.kernel(10.0, "inside", 20.0)
    maker.kernel(90.0, "beyond", 30.0)
    maker.kernel(200.0, "apart", 5.0)
    assert union_us(parse_events(maker.events).work) == pytest.approx(100 + 20 + 5)


def test_steps_of_another_batch_do_not_count():
    maker = TraceMaker()
    for i in range(12):
        maker.speculative_step((i + 1) * STEP_US, batch=BATCH if i < 8 else 3)
    assert step_figures(parse_events(maker.events), BATCH)["num_steps"] == 5
    with pytest.raises(TraceError, match=r"0 whole decode steps of 128 requests .* \{4: 8, 3: 4\}; parts"):
        step_figures(parse_events(maker.events), 128)


def test_optional_fields_may_be_missing_essential_ones_not():
    events = trace_of(TraceMaker.speculative_step)
    whole = step_figures(parse_events(events), BATCH)
    bare = [dict(event) for event in events]
    for event in bare:
        if event.get("cat") == "kernel":
            event["args"] = {"correlation": event["args"]["correlation"]}
        elif event.get("cat") == "user_annotation":
            del event["args"]
    assert step_figures(parse_events(bare), BATCH) == whole
    timeless = next(event for event in bare if event.get("cat") == "kernel")
    del timeless["dur"]
    with pytest.raises(TraceError, match="kernel event 'prefill' has no number ts or dur"):
        parse_events(bare)
    for event in events:
        if event.get("cat") == "kernel":
            event["args"] = {}
    with pytest.raises(TraceError, match="do not name the call that launched them"):
        parse_events(events)


def test_graphs_whose_kernels_were_not_recorded_are_not_passed_over():
    events = trace_of(TraceMaker.speculative_step)
    seen = [event for event in events if not (event.get("cat") == "kernel" and event["name"].startswith("layer"))]
    with pytest.raises(TraceError, match="7 of 21 graph launches have no kernel in the trace"):
        step_figures(parse_events(seen), BATCH)
    lost = {event["args"]["correlation"] for event in events if event.get("name") == "layer0"}
    few = [event for event in events if event.get("cat") != "kernel" or event["args"]["correlation"] != sorted(lost)[6]]
    assert step_figures(parse_events(few), BATCH)["graphs_without_work"] == 1


def test_a_trace_that_says_nothing_is_one_line(tmp_path: Path):
    host = [event for event in trace_of(TraceMaker.plain_step) if event.get("cat") != "kernel"]
    with pytest.raises(TraceError, match="the trace has no kernel"):
        parse_events(host)
    with pytest.raises(TraceError, match="0 graph launches in no order that repeats"):
        maker = TraceMaker()
        maker.kernel(0.0, "alone")
        step_figures(parse_events(maker.events), BATCH)
    with pytest.raises(TraceError, match="2 whole decode steps"):
        step_figures(parse_events(trace_of(TraceMaker.plain_step, 5)), BATCH)
    packed = gzip.compress(json.dumps({"traceEvents": host}).encode())
    for name, content in {"cut.json.gz": packed[:-20], "text.json": b"no", "other.json": b'{"traceEvents": 3}'}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TraceError, match=name) as error:
            load_events(tmp_path / name)
        assert "\n" not in str(error.value)
    (tmp_path / "whole.json.gz").write_bytes(packed)
    assert load_events(tmp_path / "whole.json.gz") == host


def test_the_summary_shows_what_a_trace_consists_of():
    found = summary(trace_of(TraceMaker.plain_step))
    assert found["kernel"]["count"] == 1 + NUM_STEPS * 21 and found["ph=M"]["count"] == 1
    assert found["cuda_runtime"]["names"] == {"cudaLaunchKernel": 11, "cudaGraphLaunch": 10}
    assert '"correlation"' in found["kernel"]["first"]


# ---- waves ----


def meta(tokens: int, latency_s: float, histogram: list[int] | None = None) -> dict[str, Any]:
    more = {} if histogram is None else {"spec_accept_histogram": histogram, "spec_verify_ct": sum(histogram)}
    return {"completion_tokens": tokens, "e2e_latency": latency_s, **more}


def test_a_step_is_what_the_first_to_finish_takes_beyond_a_short_response():
    short = step_profile.wave_of(0.5, [meta(9, 0.4, [2, 2, 0, 0]), meta(9, 0.5, [4, 1, 0, 0])], 9, 3)
    long = step_profile.wave_of(1.5, [meta(33, 1.4, [20, 4, 0, 0]), meta(33, 1.0, [10, 6, 0, 0])], 33, 3)
    assert (short.first_forwards, long.first_forwards, long.tokens, long.forwards) == (4, 16, 64, 40)
    assert step_profile.step_ms(short, long) == pytest.approx(50.0)
    plain = step_profile.wave_of(1.0, [meta(33, 0.9)], 33, 0)
    assert plain.first_forwards == 32
    with pytest.raises(EngineError, match="raise --tokens"):
        step_profile.step_ms(long, short)
    with pytest.raises(EngineError, match=r"responses of \[20, 33\] tokens, all should have 33"):
        step_profile.wave_of(1.0, [meta(33, 0.9), meta(20, 0.5)], 33, 0)


def test_the_server_is_asked_for_whole_responses_and_a_small_trace():
    request = RolloutRequest(0, 0, (5, 6), SamplingParams(1.0, 1.0, 0, 40))
    body = step_profile.wave_body([request, request], (0,))
    assert body["input_ids"] == [[5, 6], [5, 6]] and body["return_logprob"] is True
    assert body["sampling_params"]["ignore_eos"] is True and body["sampling_params"]["max_new_tokens"] == 40
    told = step_profile.profile_request(20, ("CPU", "GPU"), Path("/x"))
    assert told["num_steps"] == 20 and told["activities"] == ["CPU", "GPU"] and told["output_dir"] == "/x"
    assert not any(told[name] for name in ("with_stack", "record_shapes", "profile_by_stage", "merge_profiles"))


class FakeHttp:
    """The server: writes `trace`, if any, when a profile is started or, with `late`, only when it is stopped."""

    def __init__(self, trace: list[dict[str, Any]] | None, late: bool = False) -> None:
        self.trace, self.late, self.asked = trace, late, []
        self._folder = Path()

    def settings(self) -> dict[str, Any]:
        return {"version": "0", "attention_backend": "a", "sampling_backend": "b"}

    def flush(self) -> None:
        pass

    def ask_json(self, path: str, body: dict[str, Any], timeout_s: float) -> list[dict[str, Any]]:
        tokens = body["sampling_params"]["max_new_tokens"]
        return [{"meta_info": meta(tokens, 0.1 + 0.01 * tokens)} for _ in body["input_ids"]]

    def ask(self, path: str, body: dict[str, Any], timeout_s: float) -> bytes:
        self.asked.append(path)
        self._folder = Path(body.get("output_dir", self._folder))
        if self.trace is not None and (path == "/stop_profile" or not self.late):
            packed = gzip.compress(json.dumps({"traceEvents": self.trace}).encode())
            (self._folder / "steps-TP-0.trace.json.gz").write_bytes(packed)
        elif path == "/stop_profile":
            raise EngineError("not in progress")
        return b""


def rows_from(http: FakeHttp, profiles: str = "gpu+host,gpu") -> Iterator[dict[str, Any]]:
    flags = ["--policy", "p", "--arms", "none", "--batch-sizes", str(BATCH), "--device", "cuda", "--profiles", profiles]
    args = step_profile.parse([*flags, "--tokens", "100", "--rounds", "2"])
    server = step_profile.Server(http, args, PromptSet(((1, 2),) * BATCH, (0,)))
    return step_profile.measure(server, args, "none", float("inf"))


@pytest.mark.parametrize("late", [False, True])
def test_a_row_has_the_real_step_beside_the_profiled_one(late: bool):
    http = FakeHttp(trace_of(TraceMaker.plain_step), late)
    first, second = rows_from(http)
    assert (first["profile"], second["profile"], first["batch_size"]) == ("gpu+host", "gpu", BATCH)
    assert first["step_ms"] == pytest.approx(10.0) and first["tokens_per_step"] == pytest.approx(1.0)
    assert first["wall_ms"] == pytest.approx(1.0) and first["slowed_by_profiler"] == pytest.approx(0.1)
    assert first["idle_share_unprofiled"] == pytest.approx(1 - 0.18 / 10)
    assert first["idle_outside_graphs_ms"] == pytest.approx(10 - 0.198 - 0.02)
    assert first["trace_events"]["kernel"]["count"] == 211 and "ignore_eos" in first["label"]
    assert http.asked == (["/start_profile", "/stop_profile"] if late else ["/start_profile"]) * 2
    assert not http._folder.exists()  # traces are deleted
    step_profile.show(common.console(), [first, second], SimpleNamespace(k=3, rule="rejection", temperature=1.0))


def test_the_host_s_time_of_a_part_is_shown_once(capsys: pytest.CaptureFixture[str]):
    """Its rows, with a graph and without, share it."""
    figures = {"busy_ms": 0.5, "kernels": 2.0, "largest": []}
    parts = [
        {"part": "draft", "in_graph": True, "extent_ms": 0.7, **figures},
        {"part": "draft", "in_graph": False, **figures},
    ]
    step_profile.show_parts(common.console(), {"parts": parts, "host_ms": {"draft": 3.125}}, "parts")
    shown = capsys.readouterr().out
    assert "draft, graph" in shown and "draft, no graph" in shown and shown.count("3.125") == 1


def test_no_server_is_started_when_no_time_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(step_profile, "load_prompt_set", lambda args: PromptSet(((1, 2),), (0,)))
    monkeypatch.setattr(step_profile, "served", lambda *_: pytest.fail("started"))
    flags = ["--policy", "p", "--arms", "none", "--device", "cpu", "--limit-s", "-1", "--results", str(tmp_path / "r")]
    with pytest.raises(
        EngineError, match="0 rows, 1 faults; the first: none: no time was left to start: raise --limit-s"
    ):
        step_profile.main(flags)


def test_a_trace_without_figures_is_a_reason_and_no_number(capsys: pytest.CaptureFixture[str]):
    host = [event for event in trace_of(TraceMaker.plain_step) if event.get("cat") != "kernel"]
    (without,) = rows_from(FakeHttp(host), "gpu+host")
    (missing,) = rows_from(FakeHttp(None), "gpu+host")
    for row, reason in ((without, "has no kernel"), (missing, "SGLang left no trace")):
        assert reason in row["fault"] and row["step_ms"] == pytest.approx(10.0)
        assert not {"wall_ms", "busy_ms", "idle_share_unprofiled", "parts"} & row.keys()
    assert "kernel" not in without["trace_events"] and "cuda_runtime" in without["trace_events"]
    step_profile.show(common.console(), [without], SimpleNamespace(k=3, rule="rejection", temperature=1.0))
    assert "NO FIGURES from none, batch 4, gpu+host: the trace has no kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--arms none,ngram", "--arms: unknown 'ngram'"),
        ("--profiles cpu --arms none", "--profiles: unknown 'cpu'"),
        ("", "the arm eagle3 needs --draft"),
        ("--arms none --tokens 50", "--tokens 50: 20 steps in a wave's middle need more tokens"),
    ],
)
def test_wrong_arguments_are_one_line(flags: str, message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        step_profile.parse(["--policy", "p", *flags.split()])
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and message in said and said.count("\n") == 1


def test_a_server_has_graphs_for_the_batch_sizes_that_are_measured():
    flags = "--policy p --draft d --device cuda --batch-sizes 8,1"
    args = step_profile.parse([*flags.split(), "--sglang-page-size", "1"])
    assert args.engine_settings.sglang == {
        "mem_fraction_static": 0.7,
        "cuda_graph_bs_decode": [1, 8],
        "page_size": 1,
    }
    assert args.profiles == ("gpu+host", "gpu") and args.dtype == "bfloat16"
    assert step_profile.parse(["--policy", "p", "--draft", "d", "--device", "cpu"]).profiles == ("gpu+host",)
