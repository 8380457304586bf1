"""What can be known to fail before a server is started, without a server and without a GPU. Writes nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from rollout_engine.config import RolloutConfig
from rollout_engine.hf_checkpoint import CheckpointError, CheckpointReader
from rollout_engine.server_process import port_is_forbidden, port_is_taken
from rollout_engine.sglang_checks import check_draft_vocabulary, check_sglang
from rollout_engine.sglang_flags import check_draft_fits
from rollout_engine.sglang_install import Installation, canonical, check_types, find_sglang, flag_types, known_flags
from rollout_engine.types import EngineConfigError

_THIS_MACHINE = "127.0.0.1"
_ANY_PORT = 0
_HIGHEST_PORT = 65535
GRPC_ABOVE = 10000  # SGLang 0.5.15 counts the port so far above as its own for gRPC, and does not start without one


class NoGpu(EngineConfigError):
    """The device that was asked for is not there."""


@dataclass(frozen=True, slots=True)
class Ready:
    """What a start goes by, checked."""

    installation: Installation
    device: str  # "cpu", "cuda" or "cuda:N"
    flags: Mapping[str, Any]  # [rollout.sglang] by field of this SGLang
    spellings: Mapping[str, str]  # how the user wrote them, by field
    host: str = _THIS_MACHINE  # that the server listens on: its name or IPv4 address, 0.0.0.0 for all


def check_start(config: RolloutConfig) -> Ready:
    """Everything about the start of a server that this machine can tell now, the models' files left out.

    Raises EngineConfigError for an SGLang that is missing or unknown, flags that it does not have, values that it does
    not take, a host that is not this machine, a port that it cannot have there, and a device that is not there or
    cannot do what is asked.
    """
    installation = find_sglang(config.sglang_python)
    known = known_flags(installation.folder)
    flags = canonical(config.sglang, known, installation.version)
    check_sglang(replace(config, sglang=flags))  # again, because a flag may have come under another spelling
    check_types(flags, flag_types(installation.folder), installation.version)
    device = _device(config)
    _check_environment(config, installation, device)
    spellings = {known[key.replace("-", "_")]: key.replace("-", "_") for key in config.sglang}
    host = _host(flags)
    if port := flags.get("port"):
        has_own_grpc_port = "grpc_port" in known or "SGLANG_GRPC_PORT" in os.environ
        _check_port(port, host, "" if has_own_grpc_port else installation.version)
    return Ready(installation, device, flags, spellings, host)


def check_policy(config: RolloutConfig, policy: Path) -> dict[str, Any]:
    """Its config.json. EngineConfigError when that lacks a size which the engine needs, or is too small."""
    path = policy / "config.json"
    sizes = read_json(path)
    for key in ("vocab_size", "max_position_embeddings"):
        if not isinstance(sizes.get(key), int):
            raise EngineConfigError(f"{path}: key {key} is missing or not a whole number; copy the checkpoint again")
    limit = sizes["max_position_embeddings"]
    if config.context_length > limit:
        raise EngineConfigError(
            f"rollout.context_length = {config.context_length} is above the {limit} positions of {policy}"
        )
    return sizes


def check_files(config: RolloutConfig, policy: Path, draft: Path | None) -> None:
    """Raises EngineConfigError for weights of the policy that no server could load, and for a draft that does not fit.

    Only the headers of the weights are read.
    """
    sizes = check_policy(config, policy)
    try:
        CheckpointReader(policy)
    except CheckpointError as error:
        raise EngineConfigError(str(error)) from error
    if draft is not None:
        path = draft / "config.json"
        found = read_json(path)
        check_draft_fits(sizes, found, path)
        check_draft_vocabulary(config, found.get("draft_vocab_size") not in (None, sizes["vocab_size"]))


def check_folder(setting: str, folder: Path) -> None:
    """Raises EngineConfigError naming `setting` when `folder` cannot be made or written to. Leaves nothing behind."""
    there = folder.absolute()
    while not (there.exists() or there.is_symlink()):
        there = there.parent
    try:
        with TemporaryFile(dir=there):  # by trying, because root may write where no file can be
            pass
    except OSError as error:
        raise EngineConfigError(
            f"{setting} = {str(folder)!r} cannot be written to ({there}: {error.strerror}); choose another folder"
        ) from error


def has_tokenizer(policy: Path) -> bool:
    """Whether the folder holds one; without it a server takes and gives token ids alone."""
    return any((policy / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. EngineConfigError naming the file when it is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EngineConfigError(f"{path} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise EngineConfigError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _host(flags: Mapping[str, Any]) -> str:
    host = str(flags.get("host") or _THIS_MACHINE)
    try:
        port_is_taken(_ANY_PORT, host)
    except (OSError, UnicodeError) as error:
        raise EngineConfigError(
            f"rollout.sglang.host = {host!r} cannot be listened on ({error}): give a name or an IPv4 address of this "
            "machine, 0.0.0.0 for all of them, or leave it out for this machine alone"
        ) from error
    return host


def _check_port(port: int, host: str, counts_above: str) -> None:
    """`counts_above`: the version of an SGLang that counts a second port above it; "" for one that does not.

    That second one need not be free: nothing listens there. It only has to be a port.
    """
    mend, highest = "or leave it out to have a free one chosen", _HIGHEST_PORT - GRPC_ABOVE
    if counts_above and port > highest:
        raise EngineConfigError(
            f"rollout.sglang.port = {port}: SGLang {counts_above} counts {port + GRPC_ABOVE} ({GRPC_ABOVE} above) as "
            f"its own too, and that is no port; name one up to {highest}, {mend}"
        )
    if port_is_forbidden(port, host):
        raise EngineConfigError(
            f"rollout.sglang.port = {port}: this user may not listen there; name one above 1023, {mend}"
        )


def _device(config: RolloutConfig) -> str:
    """ "cpu", "cuda" or "cuda:N"; "auto" takes CUDA when there is one."""
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    name, _, index = config.device.partition(":")
    num_gpus = torch.cuda.device_count()
    if name == "cuda" and int(index or 0) >= num_gpus:
        raise NoGpu(
            f"rollout.device = {config.device!r}: torch finds {num_gpus} GPUs on this machine (slipstream doctor shows "
            "what is there); take a machine with more, "
            + (f"name one up to cuda:{num_gpus - 1}, " if num_gpus else "")
            + "or set rollout.device = 'cpu' where this SGLang has a CPU build"
        )
    return config.device


def _check_environment(config: RolloutConfig, installation: Installation, device: str) -> None:
    on_cpu = "on a CPU"
    if config.device == "auto":
        on_cpu += " (rollout.device = 'auto' found no GPU that torch can use; slipstream doctor shows what is there)"
    if config.offload and device == "cpu":
        raise EngineConfigError(f"rollout.offload = true gives GPU memory back: leave it out {on_cpu}")
    if config.offload and not installation.has_memory_saver:
        raise EngineConfigError(
            f"rollout.offload = true needs torch_memory_saver beside SGLang: {installation.python} -m pip install "
            "torch_memory_saver"
        )
    speculates = config.speculative_algorithm != "NONE"
    if speculates and device == "cpu" and config.temperature > 0 and not config.allow_lossy:
        raise EngineConfigError(
            f"rollout.temperature = {config.temperature} with rollout.speculative_algorithm = "
            f"{config.speculative_algorithm!r} {on_cpu}: SGLang verifies greedily there; set temperature 0, "
            "speculative_algorithm 'NONE', or allow_lossy = true"
        )
    simulated = sorted(name for name in os.environ if name.startswith("SGLANG_SIMULATE_ACC"))
    if simulated and speculates and not config.allow_lossy:
        raise EngineConfigError(
            f"{simulated[0]} is set: drafts would be accepted by decree, not by the policy; unset it, or time kernels "
            "with rollout.allow_lossy = true"
        )
