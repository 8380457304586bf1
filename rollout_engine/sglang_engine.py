"""The production engine: an SGLang server, started here or running elsewhere, behind `RolloutEngine`.

All that knows SGLang lies in this file and its parts: sglang_install (which one is there), sglang_checks and
sglang_preflight (what it cannot do), sglang_flags and sglang_launch (how it is started or attached to), sglang_wire
and sglang_calls (what is said to it, and in how many calls), sglang_ends (where its responses end); and in
`sync.loader`, which runs inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from queue import Empty
from time import monotonic, sleep
from typing import Any, TypeVar

from rollout_engine.checks import check_requests
from rollout_engine.config import RolloutConfig
from rollout_engine.http_client import Reply, ServerUnreachable
from rollout_engine.memory import TrainerNeed
from rollout_engine.request_pool import Piece, Progress, RequestPool
from rollout_engine.server_process import ServerProcess
from rollout_engine.sglang_calls import GenerateCalls
from rollout_engine.sglang_checks import top_k_fault
from rollout_engine.sglang_ends import end_token_ids, ended
from rollout_engine.sglang_install import update_protocol
from rollout_engine.sglang_launch import attach, cause_of_end, end_of_log, start
from rollout_engine.sglang_preflight import check_folder, check_policy, has_tokenizer
from rollout_engine.sglang_wire import Refused, error_text, generate_body, read_piece, routes, update_body
from rollout_engine.stopping import Detokenize
from rollout_engine.types import (
    BadRequest,
    EngineConfigError,
    EngineError,
    RolloutRequest,
    Sample,
    SamplingParams,
)
from sync.plan import SyncError, SyncPlan
from sync.receiver import Bundle
from sync.remote import RemoteTransport, connect

_NOTHING_MORE = TrainerNeed()
T = TypeVar("T")

_POLL_S = 0.5
_DEATH_S = 3.0  # how long a server that broke a connection may take to be seen dead
_FLUSH_TIMEOUT_S, _FLUSH_AGAIN_S = 30.0, 0.003
_CONTROL_TIMEOUT_S = 300.0  # for one weight update, release or resume of memory
_STOP_TIMEOUT_S = 60.0  # for the answer to an abort, which waits for nothing
_WARM_UP_TOKENS = 8
# A request may run for long, so only the server itself can say whether it is still at work: it is asked after so long
# without a result, and given up after so long without a result or a healthy answer. The first batch ever may compile
# for minutes, in which SGLang calls itself unhealthy.
_ASK_AFTER_S = 60.0
_LOST_AFTER_S = 600.0
_HEALTH_TIMEOUT_S = 30.0  # SGLang's own is 20


class _Gone(EngineError):
    """The server did not answer. Why is found out by the thread that waits, never in the event loop."""


class _Silence:
    """Since when nothing was heard of a server."""

    def __init__(self) -> None:
        self._heard_s = self._asked_s = monotonic()

    def is_too_long(self, is_healthy: Callable[[], bool]) -> bool:
        """Asks now and then."""
        if monotonic() - self._asked_s >= _ASK_AFTER_S:
            healthy = is_healthy()
            self._asked_s = monotonic()
            if healthy:
                self._heard_s = self._asked_s
        return monotonic() - self._heard_s >= _LOST_AFTER_S


class SGLangEngine:
    """Implements `RolloutEngine`. One `generate` at a time; weights may be sent between its samples.

    Nothing is served before the first sync, except with `serves_files`, when it serves the files' weights as version
    0. A request with stop strings can only go on across a sync in mid-response when there is a `detokenize`.
    """

    def __init__(
        self,
        policy: Path,
        config: RolloutConfig,
        *,
        draft: Path | None = None,
        eos_token_ids: Sequence[int] = (),
        work_dir: Path,
        serves_files: bool = False,
        detokenize: Detokenize | None = None,
        trainer: TrainerNeed = _NOTHING_MORE,
    ) -> None:
        """Start a server over `policy` and `draft` (EAGLE-3, SGLang's form), or attach to config.sglang_address.

        Responses end at `eos_token_ids` and at those that the policy's files name, as SGLang reads them. `work_dir`
        gets engine.log and the files of syncs. `detokenize` turns token ids into text, special tokens included, for
        stop strings of interrupted requests. Without `serves_files` a trainer shares the GPU, and will take `trainer`
        more of its memory. Raises EngineConfigError for settings, files or an installation from which no server can
        be started, and EngineError with the last lines of its log when it does not come up.
        """
        self._config, self._detokenize = config, detokenize
        self._eos = end_token_ids(policy).union(eos_token_ids)
        sizes = check_policy(config, policy)
        self._vocab_size = int(sizes["vocab_size"])
        self._context_length = config.context_length or int(sizes["max_position_embeddings"])
        self._depth = 0 if config.speculative_algorithm == "NONE" else config.speculative_num_steps
        self._roles = ["draft", "policy"] if config.speculative_algorithm == "EAGLE3" else ["policy"]
        self._work_dir = work_dir = work_dir.absolute()  # the server runs in it
        check_folder("work_dir", work_dir)
        if config.sync_dir:
            check_folder("rollout.sync_dir", Path(config.sync_dir))
        work_dir.mkdir(parents=True, exist_ok=True)
        self._has_tokenizer = has_tokenizer(policy)
        self._process: ServerProcess | None = None
        if config.sglang_address:
            server = attach(config, policy, self._context_length)
        else:
            server = start(
                config, policy, draft, self._context_length, work_dir, trainer=None if serves_files else trainer
            )
        self._process, self._client, self._server_version = server.process, server.client, server.version
        self._calls = GenerateCalls(self._client)
        self._pool = RequestPool(self._serve, self._stop, config.max_running_requests)
        self._begins_updates: bool | None = None  # None: not asked yet
        self._transport: SteppingTransport | None = None
        self._version = 0 if serves_files else -1
        self._shut_because = "" if serves_files else "no weights have been sent to it yet: publish a version first"
        self._released: list[str] = []  # kinds of memory that the server has given back
        self._has_weights = True  # False from offload to the next complete sync
        self._is_generating = self._is_syncing = self._is_closed = False
        self.delivery_s: Mapping[str, float] = {}  # of the last sync's request: hold, update (loader included), flush
        if serves_files:
            self._client.run(self._pool.open(0))

    # ------------------------------------------------------------ what a run asks of an engine

    @property
    def address(self) -> str:
        """http://HOST:PORT of the server; OpenAI's endpoints lie under /v1."""
        return self._client.address

    def require_alive(self) -> None:
        """Raise EngineError with the end of its log when the server that was started here has ended."""
        if self._process is not None and self._process.exit_status is not None:
            raise EngineError(self._why_unreachable("it is gone"))

    def generate(self, requests: Iterable[RolloutRequest]) -> Iterator[Sample]:
        """Samples as they finish, in no fixed order. See `RolloutEngine`; seeds of the requests are not used.

        Raises BadRequest for a request that cannot be served and EngineError while nothing may be served, both before
        any work; later EngineError naming the request that the server refused, or with the last lines of the log of
        a server that died. Abandoning the iterator stops what is running.
        """
        requests = list(requests)
        self._check(requests)
        self._require_free()
        self._require_open()
        return self._collect(requests)

    def abort(self, keys: Iterable[tuple[int, int]] | None = None) -> None:
        """Finish requests early, all of them by default: each still yields what it has so far."""
        self._client.run(self._pool.abort(None if keys is None else set(keys)))

    def warm_up(self) -> None:
        """One batch as large as the run's, at its temperature, so that the first rollout waits for no compilation.

        Its prompts are forgotten afterwards. With EAGLE-3 at temperature 1 the first batch ever on a machine can take
        more than a minute.
        """
        config = self._config
        num_tokens = min(_WARM_UP_TOKENS, self._context_length // 2)
        sampling = SamplingParams(
            temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, max_new_tokens=num_tokens
        )
        requests = [
            RolloutRequest(-1, slot, tuple((slot + i) % self._vocab_size for i in range(num_tokens)), sampling)
            for slot in range(config.max_running_requests)
        ]
        for _ in self.generate(requests):
            pass
        self._flush()

    def step_costs(self) -> None:
        """Not known: the server tells nothing of its steps."""

    def state(self) -> dict[str, Any]:
        """Nothing to keep: the server drafts at a fixed depth."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Also of a run that had another engine, whose state says nothing to this one."""

    def leaving_no_trace(self) -> AbstractContextManager[None]:
        """Nothing to do: there is nothing that it learns."""
        return nullcontext()

    def without_speculation(self) -> SGLangEngine:
        """A server cannot switch: EngineConfigError."""
        raise EngineConfigError(
            "a running SGLang server cannot decode plainly for comparison: set plain_probe_interval = 0, and compare "
            "two runs, the other with rollout.speculative_algorithm = 'NONE'"
        )

    # ------------------------------------------------------------ weights and memory

    @property
    def transport(self) -> SteppingTransport:
        """The way for weights. The first use asks the server for its tensors, and puts it at no version at all."""
        if self._transport is None:
            config = self._config
            kind = "ipc" if config.sync_transport == "auto" else config.sync_transport
            exchange = Path(config.sync_dir) if config.sync_dir else self._work_dir / "exchange"
            exchange.mkdir(parents=True, exist_ok=True)
            self._close_gate("no weights have been sent to it yet: publish a version first")
            self._transport = SteppingTransport(
                connect(kind, self.deliver, self._roles, exchange, config.sync_host), self
            )
        return self._transport

    def deliver(self, payload: bytes) -> None:
        """Hand `payload` to the loader of every model (`sync.wire.Deliver`), while nothing runs.

        Running requests are interrupted and wait with what they have; `SteppingTransport` lets them go on once the
        loader's verdict is known. Raises SyncError when the server cannot be reached or died of it.
        """
        try:
            start_s = monotonic()
            self._run(self._pool.hold())
            held_s = monotonic()
            with self._weight_update() as models:
                self._control("/update_weights_from_tensor", update_body(payload) | models)
            self._resume("kv_cache")
            updated_s = monotonic()
            self._flush()
            self.delivery_s = {"hold": held_s - start_s, "update": updated_s - held_s, "flush": monotonic() - updated_s}
        except EngineError as error:
            raise SyncError(f"the engine could not be handed new weights: {error}") from error

    def offload(self) -> None:
        """Give weights and KV back while the policy trains; nothing is served until `onload` and a complete sync.

        Without rollout.offload the server keeps its memory, and only that it may not serve is remembered.
        """
        self._require_free()
        self._close_gate("its memory is given back: call onload() and publish a version")
        self._has_weights = False
        if self._config.offload and not self._released:
            self._flush()
            self._control("/release_memory_occupation", {"tags": ["kv_cache", "weights"]})
            self._released = ["kv_cache", "weights"]

    def onload(self) -> None:
        """Take memory for the weights again; KV follows with the sync that fills them, when less else is in use."""
        self._resume("weights")
        self._shut_because = "its weights are not filled yet after onload: publish a version"

    def close(self) -> None:
        """Stop the server; one that was attached is left running. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._shut_because = "it is closed"
        with ExitStack() as parts:  # each, even when Ctrl-C interrupts the end of another
            parts.callback(self._client.close)
            if self._process is not None:
                parts.callback(self._process.close)
            if self._transport is not None:
                parts.callback(self._transport.close)

    @contextmanager
    def _weight_update(self) -> Iterator[dict[str, Any]]:
        """Which models an update is for; begun and ended where this SGLang asks for it, ended after a failure too.

        A server that is left in an update refuses the next one.
        """
        if self._begins_updates is None:
            reply = self._call("GET", "/openapi.json")
            self._begins_updates = update_protocol(self._server_version, routes(reply.text(None)) if reply.ok else ())
        if not self._begins_updates:
            yield {}
            return
        models = {"selector": "all"}
        try:
            self._control("/begin_weight_update", models)
            yield models
        except BaseException:  # Ctrl-C too: the server waits for the end of what began
            with suppress(EngineError):  # the first failure is the one to tell
                self._control("/end_weight_update", {})
            raise
        self._control("/end_weight_update", {})

    def _resume(self, tag: str) -> None:
        if tag in self._released:
            self._control("/resume_memory_occupation", {"tags": [tag]})
            self._released.remove(tag)

    def _flush(self) -> None:
        """Forget the KV of old weights and prompts. Nothing of ours runs.

        A server refuses while the last request is being put away, or while others have one that runs: it is stopped.
        """
        deadline_s = monotonic() + _FLUSH_TIMEOUT_S
        while not (reply := self._call("POST", "/flush_cache")).ok:
            if monotonic() > deadline_s:
                raise EngineError(f"the SGLang server does not flush its cache: {reply.text()}")
            self._run(self._stop(None))
            sleep(_FLUSH_AGAIN_S)

    def _control(self, path: str, payload: dict[str, Any]) -> None:
        """While nothing of ours runs; what others send meanwhile is stopped, because a weight update waits for it."""
        reply = self._run(self._pool.alone(self._client.request("POST", path, payload, timeout_s=_CONTROL_TIMEOUT_S)))
        if not reply.ok:
            raise EngineError(f"the SGLang server refused {path}: {error_text(reply.status, reply.text())}")

    def _call(self, method: str, path: str) -> Reply:
        return self._run(self._client.request(method, path, timeout_s=_CONTROL_TIMEOUT_S))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result. EngineError that tells why, when the server does not answer."""
        try:
            return self._client.run(work)
        except (ServerUnreachable, _Gone) as error:
            raise EngineError(self._why_unreachable(str(error))) from error

    def _close_gate(self, because: str) -> None:
        self._shut_because = because  # first: whatever interrupts the wait, nothing goes on without a reason
        self._run(self._pool.hold())

    def _open_gate(self, version: int) -> None:
        self._version, self._shut_because = version, ""
        self._client.run(self._pool.open(version))

    # ------------------------------------------------------------ requests

    def _check(self, requests: Sequence[RolloutRequest]) -> None:
        check_requests(requests, self._context_length, has_detokenizer=self._has_tokenizer)
        for request in requests:
            name = f"request (prompt {request.prompt_id}, sample {request.sample_id})"
            if fault := top_k_fault(request.sampling.top_k, request.sampling.temperature):
                raise BadRequest(f"{name}: {fault}")
            # The server dies of these: its embedding reads beyond the table.
            if not all(0 <= token < self._vocab_size for token in request.prompt_ids):
                raise BadRequest(f"{name}: a prompt token is outside the vocabulary of {self._vocab_size}")

    def _collect(self, requests: list[RolloutRequest]) -> Iterator[Sample]:
        self._require_free()
        self._is_generating = True
        try:
            self._client.run(self._pool.submit(self._progress(request) for request in requests))
            for _ in requests:
                yield self._next()
        finally:
            self._is_generating = False
            if not self._is_closed:
                self._client.run(self._pool.drop())

    def _progress(self, request: RolloutRequest) -> Progress:
        room = self._context_length - len(request.prompt_ids)
        return Progress(request, min(request.sampling.max_new_tokens, room))

    def _next(self) -> Sample:
        silence = _Silence()
        while True:
            try:
                found = self._pool.results.get(timeout=_POLL_S)
            except Empty:
                self.require_alive()
                if self._shut_because and not self._is_syncing:
                    raise EngineError(
                        f"requests wait for an engine that serves nothing: {self._shut_because}"
                    ) from None
                if silence.is_too_long(self._is_healthy):
                    raise EngineError(
                        self._why_unreachable(f"no result and no healthy answer for {_LOST_AFTER_S:.0f} s")
                    ) from None
                continue
            if isinstance(found, _Gone):
                raise EngineError(self._why_unreachable(str(found))) from found
            if isinstance(found, Exception):
                raise found
            return found

    def _is_healthy(self) -> bool:
        try:
            return self._client.call("GET", "/health", timeout_s=_HEALTH_TIMEOUT_S).ok
        except ServerUnreachable:
            return False

    async def _serve(self, rid: str, progress: Progress) -> Piece:
        prompt_id, sample_id = progress.request.key
        name = f"request (prompt {prompt_id}, sample {sample_id})"
        try:
            answer = await self._calls(generate_body(rid, progress, self._eos, self._config.min_p))
            return ended(read_piece(answer, self._depth), progress, self._eos, self._detokenize)
        except ServerUnreachable as error:
            raise _Gone(f"{name}: {error}") from error
        except Refused as error:
            raise EngineError(f"{name}: the SGLang server refused it: {error}") from error
        except (EngineError, ValueError) as error:
            raise EngineError(f"{name}: {error}") from error

    async def _stop(self, rid: str | None) -> None:
        payload = {"abort_all": True} if rid is None else {"rid": rid}
        try:
            await self._client.request("POST", "/abort_request", payload, timeout_s=_STOP_TIMEOUT_S)
        except ServerUnreachable as error:
            raise _Gone(str(error)) from error

    def _why_unreachable(self, what: str) -> str:
        process = self._process
        if process is None:
            return f"the SGLang server at {self.address} does not answer: {what}"
        deadline_s = monotonic() + _DEATH_S
        while process.exit_status is None and monotonic() < deadline_s:
            sleep(0.05)
        state = "runs but does not answer"
        if process.exit_status is not None:
            state = f"ended ({process.exit_status})"
            if cause := cause_of_end(process):
                state += f" by {cause}"
        return f"the SGLang server {state}: {what}; {end_of_log(process, self._work_dir / 'engine.log')}"

    def _require_free(self) -> None:
        if self._is_generating:
            raise EngineError("generate() was called while another generate() of this engine is still being read")

    def _require_open(self) -> None:
        if self._shut_because:
            raise EngineError(f"the SGLang engine serves nothing: {self._shut_because}")


class SteppingTransport:
    """The transport into the server; what its verdict says decides whether and as which version the engine serves."""

    def __init__(self, inner: RemoteTransport, engine: SGLangEngine) -> None:
        self._inner, self._engine = inner, engine

    @property
    def plan(self) -> SyncPlan:
        return self._inner.plan

    @property
    def version(self) -> int:
        """The last version that arrived whole; -1 before any."""
        return self._inner.version

    @property
    def phases_s(self) -> Mapping[str, float]:
        """Of the last send, as `sync.remote.RemoteTransport` measures them, and the parts of its request."""
        return {**self._inner.phases_s, **self._engine.delivery_s}

    def send(self, bundle: Bundle) -> int:
        """See `sync.publish.Transport`. After a refusal the old version serves on, if it is whole and still there."""
        engine, inner = self._engine, self._inner
        engine._is_syncing = True
        try:
            version = inner.send(bundle)
            engine._has_weights = True
            engine._open_gate(version)
            return version
        except SyncError as error:
            if not inner.dirty and inner.version >= 0 and engine._has_weights:
                engine._open_gate(inner.version)
            else:
                engine._shut_because = f"the last sync failed ({error})"
            raise
        except BaseException as error:  # Ctrl-C, above all: what the engine holds now is not known
            engine._shut_because = f"the last sync was interrupted ({type(error).__name__}): publish a version"
            raise
        finally:
            engine._is_syncing = False

    def close(self) -> None:
        self._inner.close()
