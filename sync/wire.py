"""What travels between a trainer and an engine in another process: one message there, one verdict back. Pure.

The message rides in the engine's own weight-update request as a byte tensor; the engine's answer to that request says
nothing about what the loader did (SGLang always answers success), so the loader writes its verdict to a file.

    trainer --message--> engine --> sync.loader, once per model    (attach: what do you hold?  apply: take this version)
            <--verdict-- file <----
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LOADER = "sync.loader.load"  # the dotted path under which an engine finds the loader

# Hands a payload to the loader of every model of the engine and returns when the engine has answered. Between its call
# and its return the engine serves nothing. Raises SyncError when the engine cannot be reached or died of it.
Deliver = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class Message:
    """`attach` asks for the plan and puts the engine at version -1, serving nothing; `apply` brings a version."""

    kind: str  # attach | apply
    id: str  # unique; names the verdict's file
    roles: Sequence[str]  # models that the loader waits for: ["policy"] or ["draft", "policy"], in any order
    reply_dir: str  # folder for the verdict, seen by both sides
    version: int = -1
    plan_digest: str = ""
    checksums: Mapping[str, int] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)  # where the tensors are; its "kind" names the transport

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def decode(payload: bytes) -> Message:
        return Message(**json.loads(payload))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the loader did. `error` is None exactly when it did what the message asked."""

    id: str
    version: int  # the last version that arrived whole; -1 before any
    dirty: bool  # the weights are a mixture: nothing may be served
    error: str | None = None
    tensors: Sequence[tuple[str, Sequence[int], str]] = ()  # attach: full name, shape, dtype ("bfloat16") of each
    checksums: Mapping[str, int] = field(default_factory=dict)  # apply: of the engine's own tensors, read back
    loader_s: float = 0.0  # apply: from the last model's call to here

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def decode(payload: bytes) -> Verdict:
        return Verdict(**json.loads(payload))


def verdict_path(message: Message) -> Path:
    """Where the loader writes its verdict on `message`: the file appears whole or not at all."""
    return Path(message.reply_dir, f"verdict-{message.id}.json")
