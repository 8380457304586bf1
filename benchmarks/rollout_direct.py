"""SGLang driven directly, as the anchor of `benchmarks.rollout`: a whole batch of token ids in one call.

Runs as `python -m benchmarks.rollout_direct SETTINGS`, in a process of its own and in SGLang's environment, because a
scheduler that fails kills its parent. The first line of output tells what SGLang made of SETTINGS. Commands come as
JSON lines on standard input, and each has one JSON line as its answer on standard output. What SGLang and its processes
log goes to standard error.

    {"generate": {"input_ids": [[...]], "sampling_params": {...}}}  ->  {"seconds": ..., "outputs": [...]}
    {"flush": {}}                                                   ->  {}
    {"close": {}}                                                   ->  {}, and the process ends
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import IO, Any

KEPT = ("completion_tokens", "e2e_latency", "spec_verify_ct", "spec_correct_drafts_histogram")  # of SGLang's meta_info
FLUSH_TIMEOUT_S = 30.0


def generate(engine: Any, input_ids: list[list[int]], sampling_params: dict[str, Any]) -> dict[str, Any]:
    """One batch, timed around SGLang's own call. Log-probs are asked for, as a rollout for training does."""
    start_s = time.perf_counter()
    outputs = engine.generate(input_ids=input_ids, sampling_params=sampling_params, return_logprob=True)
    elapsed_s = time.perf_counter() - start_s
    kept = [{name: out["meta_info"].get(name) for name in KEPT} for out in outputs]
    return {"seconds": elapsed_s, "outputs": kept}


def flush(engine: Any) -> dict[str, Any]:
    """Forget cached prefixes. SGLang only does so when it is idle, a moment after its last answer."""
    give_up_s = time.monotonic() + FLUSH_TIMEOUT_S
    while not engine.flush_cache().success:
        if time.monotonic() > give_up_s:
            raise RuntimeError(f"SGLang did not flush its prefix cache within {FLUSH_TIMEOUT_S} s")
        time.sleep(0.01)
    return {}


def serve(engine: Any, commands: IO[str], answers: IO[str]) -> None:
    """Answer commands until "close" or the end of the input, which is also what a parent's death looks like."""
    actions = {"generate": lambda args: generate(engine, **args), "flush": lambda _: flush(engine)}
    for line in commands:
        ((name, args),) = json.loads(line).items()
        answer = {} if name == "close" else actions[name](args)
        print(json.dumps(answer), file=answers, flush=True)
        if name == "close":
            return


def main() -> None:
    """Start `sglang.Engine` with the settings of the first argument, a JSON object, and serve."""
    # The answers keep standard output to themselves: SGLang and the processes that it starts log to standard error.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    import sglang

    with sglang.Engine(**json.loads(sys.argv[1])) as engine:
        info = engine.get_server_info()
        settings = {name: value for name, value in info.items() if isinstance(value, bool | int | float | str | None)}
        print(json.dumps({"settings": settings}), file=answers, flush=True)
        serve(engine, sys.stdin, answers)


if __name__ == "__main__":
    main()
