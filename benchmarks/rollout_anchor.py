"""SGLang without Slipstream's engine around it, on the same work: what the engine's overhead is measured against.

Two ways, each with one call for a whole batch: `DirectEngine`, SGLang's offline engine in a process of its own, and
`DirectHttp`, the very server that Slipstream's engine drives.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.common import ROOT
from benchmarks.rollout_runs import ArmRun
from rollout_engine.sglang_wire import plain_stats, spec_stats
from rollout_engine.types import EngineError, RolloutRequest, SpecStats

HTTP_TIMEOUT_S = 600.0
FLUSH_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
LOG_LINES = 15  # of a dead process, in the error

# Of two servers that are set alike, these still differ: addresses, seeds, and what only one of them is for.
_OWN_TO_A_PROCESS = frozenset(
    (
        *(
            "host",
            "port",
            "nccl_port",
            "dist_init_addr",
            "random_seed",
            "launch_command",
            "log_level",
            "log_level_http",
        ),
        *("custom_weight_loader", "served_model_name", "weight_version", "tokenizer_path", "status", "internal_states"),
        *("max_total_num_tokens", "file_storage_path", "skip_server_warmup", "watchdog_timeout", "api_key"),
    )
)


def sampling_params(request: RolloutRequest, eos_token_ids: Sequence[int]) -> dict[str, Any]:
    """A request's sampling as SGLang spells it."""
    sampling = request.sampling
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "max_new_tokens": sampling.max_new_tokens,
        "stop_token_ids": sorted({*eos_token_ids, *sampling.stop_token_ids}),
    }


def run_of(seconds: float, outputs: Sequence[Mapping[str, Any]], draft_depth: int) -> ArmRun:
    """One wave from the `meta_info`s of its responses; `draft_depth` 0 is plain decoding."""
    spec = SpecStats()
    for out in outputs:
        spec += spec_stats(out, draft_depth) if draft_depth else plain_stats(out["completion_tokens"])
    lengths = tuple(out["completion_tokens"] for out in outputs)
    return ArmRun(seconds, lengths, tuple(out["e2e_latency"] for out in outputs), spec)


def draft_depth(settings: Mapping[str, Any]) -> int:
    """Draft tokens of a verify step, 0 without speculation."""
    return settings["speculative_num_draft_tokens"] - 1 if settings.get("speculative_algorithm") else 0


def setting_differences(ours: Mapping[str, Any], direct: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Settings of two running SGLangs that are not the same, as [ours, direct], without those of a process alone."""
    shared = sorted((ours.keys() & direct.keys()) - _OWN_TO_A_PROCESS)
    return {name: [ours[name], direct[name]] for name in shared if ours[name] != direct[name]}


class DirectHttp:
    """The server at `address`, one POST for a batch. Raises EngineError when it does not answer."""

    def __init__(self, address: str, eos_token_ids: Sequence[int]):
        self.address = address
        self.eos_token_ids = eos_token_ids
        self._draft_depth = draft_depth(self.settings())

    def run(self, work: Sequence[RolloutRequest]) -> ArmRun:
        """One batch of requests that share their sampling."""
        body = {
            "input_ids": [list(request.prompt_ids) for request in work],
            "sampling_params": sampling_params(work[0], self.eos_token_ids),
            "return_logprob": True,
        }
        start_s = time.perf_counter()
        outputs = self.ask_json("/generate", body)
        elapsed_s = time.perf_counter() - start_s
        return run_of(elapsed_s, [out["meta_info"] for out in outputs], self._draft_depth)

    def flush(self) -> None:
        """Forget cached prefixes, as soon as the server is idle."""
        self.ask(f"/flush_cache?timeout={FLUSH_TIMEOUT_S:g}", {})

    def settings(self) -> dict[str, Any]:
        return self.ask_json("/server_info")

    def ask_json(self, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = HTTP_TIMEOUT_S) -> Any:
        return json.loads(self.ask(path, body, timeout_s))

    def ask(self, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = HTTP_TIMEOUT_S) -> bytes:
        """The server's answer. Raises EngineError when there is none in time, or one with an error's status."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode(errors="replace").split())
            raise EngineError(f"{self.address}{path}: status {error.code}, {said[:300]}") from error
        except OSError as error:
            raise EngineError(f"{self.address}{path}: no answer ({error})") from error


class DirectEngine:
    """`sglang.Engine` in a process of its own (`benchmarks.rollout_direct`), one call for a batch.

    `settings` are the keyword arguments of `sglang.Engine`. Raises EngineError, with the end of its log, when it dies.
    """

    def __init__(
        self,
        python: str,
        settings: Mapping[str, Any],
        eos_token_ids: Sequence[int],
        log: Path,
        environment: Mapping[str, str] = MappingProxyType({}),
    ):
        self.eos_token_ids = eos_token_ids
        self.log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.rollout_direct", json.dumps(dict(settings))],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                start_new_session=True,  # its schedulers die with it, also when it cannot tell them to
            )
        try:
            self._settings = self._answer()["settings"]
        except BaseException:
            self._kill()
            raise

    def run(self, work: Sequence[RolloutRequest]) -> ArmRun:
        """One batch of requests that share their sampling. Timed in that process, around SGLang's own call."""
        answer = self._ask(
            "generate",
            input_ids=[list(request.prompt_ids) for request in work],
            sampling_params=sampling_params(work[0], self.eos_token_ids),
        )
        return run_of(answer["seconds"], answer["outputs"], draft_depth(self._settings))

    def flush(self) -> None:
        """Forget cached prefixes, as soon as the engine is idle."""
        self._ask("flush")

    def settings(self) -> dict[str, Any]:
        """What SGLang made of the settings: plain values only."""
        return self._settings

    def close(self) -> None:
        """Ask it to end, then end it: nothing of its process group is left."""
        try:
            if self._process.poll() is None:
                self._ask("close")
                self._process.wait(STOP_TIMEOUT_S)
        except (EngineError, subprocess.TimeoutExpired):
            pass  # what does not end by itself is ended below
        finally:
            self._kill()

    def _ask(self, name: str, **arguments: Any) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps({name: arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._death()
        return json.loads(line)

    def _death(self) -> EngineError:
        tail = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        return EngineError(f"SGLang's own engine ended by itself; the end of {self.log}: {' | '.join(tail)}")

    def _kill(self) -> None:
        with suppress(ProcessLookupError):  # all of the group has ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        with suppress(BrokenPipeError):  # a command that it never read
            self._process.stdin.close()
