"""The trainer's side of a sync into an engine in another process: ask, send, and believe only the loader's verdict."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from sync.collective import BroadcastCarrier
from sync.disk import DiskCarrier, own_folder
from sync.ipc import IpcCarrier
from sync.plan import SyncError, SyncPlan, make_plan
from sync.receiver import Bundle, describe_serving, join_faults, layout_faults
from sync.wire import Deliver, Message, Verdict, verdict_path

KINDS = ("ipc", "disk", "broadcast")
_UNKNOWN = "what the engine holds is unknown: it may serve nothing until a complete sync"


class Carrier(Protocol):
    """How the tensors get to where the loader reads them. `put`, then `send`, then `settle`, for each version."""

    def put(self, bundle: Bundle) -> Mapping[str, Any]:
        """Lay the tensors out; what the loader needs to find them. Raises SyncError: the engine was not told."""

    def send(self, deliver: Deliver, payload: bytes) -> None:
        """Deliver the message, and what has to happen beside it. Raises what `deliver` raises."""

    def settle(self, accepted: bool) -> None:
        """The verdict is known: clear away what is no longer needed."""

    def close(self) -> None:
        """Give memory, files and connections back."""


class RemoteTransport:
    """The way into one engine whose loader answered an attach. Implements `sync.publish.Transport`."""

    def __init__(
        self,
        deliver: Deliver,
        roles: Sequence[str],
        exchange_dir: Path,
        make_carrier: Callable[[SyncPlan], Carrier],
    ) -> None:
        """Attaches, and raises what `attach` raises."""
        self._deliver = deliver
        self._roles = tuple(roles)
        self._exchange_dir = exchange_dir
        self._make_carrier = make_carrier
        self._version, self._dirty = -1, True
        self._carrier: Carrier | None = None
        self.phases_s: Mapping[str, float] = {}  # of the last send: pack, request (loader included), loader
        self._plan = SyncPlan(())
        self.attach()

    def attach(self) -> None:
        """Ask anew what the engine holds, after it was restarted or lost its weights: nothing is served until a sync.

        Raises SyncError: the engine cannot be reached, has no loader, or holds a model that it cannot update.
        """
        verdict = self._ask(self._message("attach"), self._deliver)
        if verdict.error is not None:
            raise SyncError(f"the engine's weights cannot be updated: {verdict.error}")
        self._plan = make_plan({name: _meta(shape, dtype) for name, shape, dtype in verdict.tensors})
        self.close()  # another process may be at the other end: it knows none of what was exported before
        self._carrier = self._make_carrier(self._plan)

    @property
    def plan(self) -> SyncPlan:
        return self._plan

    @property
    def version(self) -> int:
        """The last version that is known to have arrived whole; -1 before any."""
        return self._version

    @property
    def dirty(self) -> bool:
        """The engine may hold a mixture, or something unknown: it must not be asked for tokens."""
        return self._dirty

    def send(self, bundle: Bundle) -> int:
        """Raises SyncError in one line: what was wrong, with which tensor, and what the engine serves now."""
        if self._carrier is None:
            raise SyncError(f"sync of version {bundle.version}: the engine has not been attached")
        faults = list(layout_faults(self._plan, bundle.tensors))
        if faults:
            raise SyncError(f"sync of version {bundle.version} refused: {join_faults(faults)}; {self._serving()}")
        start_s = time.perf_counter()
        try:
            source = self._carrier.put(bundle)
        except SyncError as error:
            raise SyncError(f"{error}; the engine was not told, {self._serving()}") from error
        message = self._message(
            "apply",
            version=bundle.version,
            plan_digest=bundle.plan_digest,
            checksums=bundle.checksums,
            source=source,
        )
        packed_s = time.perf_counter()
        accepted, whole_version = False, self._version
        try:
            verdict = self._ask(message, partial(self._carrier.send, self._deliver))
            self._check(bundle, verdict, whole_version)
            accepted = True
        finally:
            self._carrier.settle(accepted)
        request_s = time.perf_counter() - packed_s
        self.phases_s = {"pack": packed_s - start_s, "request": request_s, "loader": verdict.loader_s}
        return verdict.version

    def close(self) -> None:
        """Give back what the transport holds here; the engine goes on with what it has."""
        if self._carrier is not None:
            self._carrier.close()
            self._carrier = None

    def _message(self, kind: str, **fields: Any) -> Message:
        return Message(kind, uuid.uuid4().hex, self._roles, str(self._exchange_dir), **fields)

    def _ask(self, message: Message, deliver: Deliver) -> Verdict:
        """Deliver `message` and read the verdict on it, which also says what the engine holds from now on."""
        self._dirty = True  # until a verdict says otherwise
        path = verdict_path(message)
        try:
            deliver(message.encode())
            verdict = Verdict.decode(path.read_bytes())
        except FileNotFoundError:
            raise SyncError(
                f"{_subject(message)}: the engine's loader gave no verdict; does it run {' and '.join(message.roles)}, "
                f"load weights by sync.loader and see {path.parent}? {_UNKNOWN}"
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise SyncError(f"{_subject(message)}: {path} is no verdict ({error}); {_UNKNOWN}") from error
        finally:
            path.unlink(missing_ok=True)
        if verdict.id != message.id:
            raise SyncError(
                f"{_subject(message)}: the verdict is on message {verdict.id}, not {message.id}; {_UNKNOWN}"
            )
        self._version, self._dirty = verdict.version, verdict.dirty
        return verdict

    def _check(self, bundle: Bundle, verdict: Verdict, whole_version: int) -> None:
        if verdict.error is not None:
            raise SyncError(verdict.error)
        if verdict.dirty or verdict.version != bundle.version:
            raise SyncError(f"sync of version {bundle.version}: not taken over by the engine; {self._serving()}")
        wrong = [name for name, sent in bundle.checksums.items() if verdict.checksums.get(name) != sent]
        if wrong:
            self._version, self._dirty = whole_version, True
            raise SyncError(
                f"sync of version {bundle.version}: the engine reads back other bytes than were sent: "
                f"{join_faults(wrong)}; {self._serving()}"
            )

    def _serving(self) -> str:
        return describe_serving(self._version, self._dirty)


def connect(kind: str, deliver: Deliver, roles: Sequence[str], exchange_dir: Path, host: str = "") -> RemoteTransport:
    """Attach to an engine and return the transport into it; nothing may be served before the first whole sync.

    `kind`: ipc (one machine), disk (a folder that both sides see) or broadcast (NCCL or gloo). `roles`: the models that
    the trainer publishes, ["policy"] or ["policy", "draft"]. `exchange_dir`: existing folder that both sides see, for
    verdicts and, by disk, weights. `host`: for broadcast, this machine's address as the engine sees it ("" = guess).
    Raises SyncError: one line.
    """
    if kind not in KINDS:
        raise SyncError(f"sync_transport is {kind!r}: choose one of {', '.join(KINDS)}")
    exchange_dir = exchange_dir.absolute()  # the engine has another working folder
    make_carrier: dict[str, Callable[[SyncPlan], Carrier]] = {
        "ipc": IpcCarrier,
        # A folder for each attach: after it the same version may be published again.
        "disk": lambda plan: DiskCarrier(own_folder(exchange_dir), plan),
        "broadcast": lambda plan: BroadcastCarrier(plan, host),
    }
    return RemoteTransport(deliver, roles, exchange_dir, make_carrier[kind])


def _subject(message: Message) -> str:
    return "attach" if message.kind == "attach" else f"sync of version {message.version}"


def _meta(shape: Sequence[int], dtype: str) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device="meta")
