"""Runs inside SGLang's scheduler: takes new weights for policy and draft over as one version, or not at all.

SGLang calls `load(model, named_tensors)` once for each model of an update request, between two batches, so nothing
decodes in between. It ignores what the loader returns, always answers success, and dies of an exception. So the loader
returns nothing and raises nothing: what it did goes into a verdict file. It acts on the last model of the request, when
all are known, and then checks everything before it writes anything (`sync.receiver`).

Imports torch and sync only. Memory of another process is mapped once and kept until the next attach.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from sync.atomic import write_file
from sync.buckets import bucket_sizes_bytes, bucket_views
from sync.collective import Receiving
from sync.disk import read_version
from sync.ipc import Mappings
from sync.plan import SyncError
from sync.receiver import Bundle, WeightReceiver, describe_serving
from sync.views import draft_maps, draft_views, policy_views, role_of
from sync.wire import Message, Verdict, verdict_path


@dataclass(slots=True)
class _State:
    """What outlives a request. One scheduler process has one engine, so there is one."""

    receiver: WeightReceiver | None = None
    mappings: Mappings = field(default_factory=Mappings)
    receiving: Receiving = field(default_factory=Receiving)
    buckets: Sequence[torch.Tensor] = ()  # of the last version, and the tensors in them
    views: Mapping[str, torch.Tensor] = field(default_factory=dict)
    message_id: str = ""  # of the request that is being handled
    models: dict[str, nn.Module] = field(default_factory=dict)  # by role, that it has shown so far
    done: bool = False  # every model was shown, the rest of this request is nothing to us


_state = _State()


def load(model: nn.Module, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """SGLang's custom weight loader: one uint8 tensor, an encoded `sync.wire.Message`. Never raises."""
    message: Message | None = None
    try:
        message = _decode(named_tensors)
        verdict = _handle(message, model)
    except Exception as error:  # noqa: BLE001  whatever it is, SGLang would die of it: the trainer decides instead
        verdict = _verdict(message, f"the loader failed: {type(error).__name__}: {error}; {_serving()}")
    if message is None or verdict is None:
        return  # nobody to answer (the trainer misses the verdict), or models are still to come
    try:
        write_file(verdict_path(message), verdict.encode().decode(), durable=False)
    except OSError as error:
        print(f"sync.loader: {verdict_path(message)} cannot be written ({error}); the trainer misses it", flush=True)


def _decode(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Message:
    ((_, payload),) = named_tensors
    return Message.decode(payload.cpu().numpy().tobytes())


def _handle(message: Message, model: nn.Module) -> Verdict | None:
    """The verdict once every role was seen, before that None. A model that cannot be updated is judged at once."""
    if message.id != _state.message_id:
        _state.message_id, _state.models, _state.done = message.id, {}, False
    if _state.done:
        return None
    try:
        _state.models[role_of(model)] = model
        if not set(message.roles) <= _state.models.keys():
            return None
        _state.done = True
        return _attach(message, _state.models) if message.kind == "attach" else _apply(message)
    except SyncError as error:
        return _verdict(message, str(error))


def _attach(message: Message, models: Mapping[str, nn.Module]) -> Verdict:
    """Note where the weights are. From now on they count as unknown: only a whole version makes them servable."""
    _state.receiver, _state.mappings, _state.receiving = None, Mappings(), Receiving()
    _state.buckets, _state.views = (), {}
    destinations = {f"policy.{name}": view for name, view in policy_views(models["policy"]).items()}
    fixed: dict[str, torch.Tensor] = {}
    if "draft" in message.roles:
        views = draft_views(models["draft"], models["policy"])
        destinations |= {f"draft.{name}": view for name, view in views.items()}
        fixed = {f"draft.{name}": values for name, values in draft_maps(models["draft"]).items()}
    receiver = _state.receiver = WeightReceiver(destinations, -1, fixed=fixed, dirty=True)
    tensors = [(spec.full_name, spec.shape, str(spec.dtype).removeprefix("torch.")) for spec in receiver.plan.tensors]
    return Verdict(message.id, receiver.version, receiver.dirty, tensors=tensors)


def _apply(message: Message) -> Verdict:
    start_s = time.perf_counter()
    receiver = _state.receiver
    if receiver is None:
        raise SyncError(f"sync of version {message.version}: the engine was not attached, or has restarted since")
    try:
        bundle = _bundle(message, receiver)
    except SyncError as error:
        raise SyncError(f"sync of version {message.version} refused: {error}; {receiver.serving()}") from error
    version = receiver.receive(bundle)
    loader_s = time.perf_counter() - start_s
    return Verdict(message.id, version, False, checksums=receiver.read_back, loader_s=loader_s)


def _bundle(message: Message, receiver: WeightReceiver) -> Bundle:
    """What the message names. Buckets are cut by the engine's own plan, so that one must also be the sender's."""
    source, plan = message.source, receiver.plan
    if source["kind"] == "disk":
        bundle = read_version(Path(source["folder"]))
        if bundle.version != message.version:
            raise SyncError(f"{source['folder']} holds version {bundle.version}, not {message.version}")
        return bundle
    if source["kind"] == "broadcast":
        device = next(iter(receiver.destinations.values())).device
        buckets = _state.receiving(source, device)
    elif source["kind"] in ("cuda", "file"):
        buckets = _state.mappings(source)
    else:
        raise SyncError(f"sources of kind {source['kind']!r} are not known here")
    if message.plan_digest != plan.digest or [len(bucket) for bucket in buckets] != bucket_sizes_bytes(plan):
        raise SyncError(f"the sender's plan {message.plan_digest[:12]} is not this engine's plan {plan.digest[:12]}")
    if buckets is not _state.buckets:
        _state.buckets, _state.views = buckets, bucket_views(plan, buckets)
    return Bundle(message.version, message.plan_digest, _state.views, message.checksums)


def _verdict(message: Message | None, error: str) -> Verdict:
    version, dirty = _held()
    return Verdict(message.id if message else "", version, dirty, error)


def _serving() -> str:
    return describe_serving(*_held())


def _held() -> tuple[int, bool]:
    """The last whole version, and whether the weights may be another's."""
    return (_state.receiver.version, _state.receiver.dirty) if _state.receiver else (-1, True)
