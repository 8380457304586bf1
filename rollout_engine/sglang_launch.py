"""Starting an SGLang server, or attaching to one that runs: everything between the settings and a healthy address."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from draft_models.eagle3 import Eagle3Config
from rollout_engine.config import RolloutConfig
from rollout_engine.http_client import HttpClient, ServerUnreachable
from rollout_engine.memory import (
    MemoryNeed,
    NoRoom,
    TrainerNeed,
    count_parameters,
    gib,
    memory_needed,
    most_share,
    static_fraction,
)
from rollout_engine.server_process import ServerProcess, free_port, port_is_taken
from rollout_engine.sglang_attach import attach_faults
from rollout_engine.sglang_flags import command_line, server_settings
from rollout_engine.sglang_install import update_protocol
from rollout_engine.sglang_preflight import GRPC_ABOVE, Ready, check_files, check_start, has_tokenizer, read_json
from rollout_engine.sglang_wire import known_cause, last_words, taken_port
from rollout_engine.types import EngineConfigError, EngineError

_log = logging.getLogger(__name__)
_PROJECT = Path(__file__).resolve().parent.parent
_PORT_TRIES = 3
_ANOTHER_PORT = "name another, or leave it out to have a free one chosen"
_ALL_HOSTS = "0.0.0.0"
_HEALTH_TIMEOUT_S = 30.0
_LOG_LINES = 2000  # among which the cause of an end is looked for: libraries say much as they go
_ITEMSIZE = {"float32": 4, "bfloat16": 2}
# torchrun's variables would make SGLang's own process groups join the trainer's, or wait for torchrun's store.
_OF_TORCHRUN = re.compile(
    r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_.*)"
)


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers: started here, or attached to."""

    client: HttpClient
    version: str
    process: ServerProcess | None  # None: not ours


def start(
    config: RolloutConfig,
    policy: Path,
    draft: Path | None,
    context_length: int,
    work_dir: Path,
    *,
    trainer: TrainerNeed | None,
) -> Server:
    """Start a server and wait until it is healthy. `trainer` computes on the same GPU; None when nobody does.

    Raises EngineConfigError before anything is started, or with the cause that the server's log names; EngineError
    when it does not become healthy in time. Nothing is left running then.
    """
    ready = check_start(config)
    check_files(config, policy, draft)
    given_port = _given_port(ready)
    share = _memory_share(config, policy, draft, ready, context_length, trainer)
    settings = server_settings(
        config,
        policy.resolve(),
        None if draft is None else draft.resolve(),
        device=ready.device,
        context_length=context_length,
        mem_fraction_static=share,
        has_flashinfer=ready.installation.has_flashinfer,
        has_tokenizer=has_tokenizer(policy),
        extra=ready.flags,
    )
    if given_port:
        return _start_at(given_port, settings, ready, config.sglang_start_timeout_s, work_dir)
    for _ in range(_PORT_TRIES - 1):
        try:
            return _start_at(_port(ready.host), settings, ready, config.sglang_start_timeout_s, work_dir)
        except _PortTaken as error:
            _log.warning("the SGLang server is started again at another port: %s", error)
    return _start_at(_port(ready.host), settings, ready, config.sglang_start_timeout_s, work_dir)


def check_launch(
    config: RolloutConfig,
    policy: Path,
    draft: Path | Eagle3Config | None,
    context_length: int,
    *,
    trainer: TrainerNeed,
    held_bytes: int,
) -> float | None:
    """What `start` would refuse before it starts anything; returns mem_fraction_static, None on a CPU.

    `draft`: its folder, or the sizes of one that is yet to be written. Of the memory that is free now the trainer
    takes `held_bytes` before a server starts.
    """
    ready = check_start(config)
    check_files(config, policy, draft if isinstance(draft, Path) else None)
    _given_port(ready)
    try:
        return _memory_share(config, policy, draft, ready, context_length, trainer, held_bytes)
    except NoRoom as error:
        if not held_bytes:
            raise
        counted = f"{gib(held_bytes)}, which the trainer holds by then, are counted as no longer free"
        raise NoRoom(f"{error} ({counted})") from error


class _PortTaken(EngineConfigError):
    """Another process took it between our look and the server's."""


def _given_port(ready: Ready) -> int | None:
    """The user's; None leaves it to us. EngineConfigError when somebody has it."""
    port: int | None = ready.flags.get("port")
    if port and port_is_taken(port, ready.host):
        raise EngineConfigError(f"rollout.sglang.port = {port} is taken: {_ANOTHER_PORT}")
    return port


def _port(host: str) -> int:
    return free_port(host, neighbour=GRPC_ABOVE)


def _start_at(port: int, settings: Mapping[str, Any], ready: Ready, timeout_s: float, work_dir: Path) -> Server:
    """One try; raises as `start` does."""
    command_flags = command_line({**settings, "host": ready.host, "port": port}, ready.spellings)
    command = [ready.installation.python, "-m", "sglang.launch_server", *command_flags]
    log = work_dir / "engine.log"
    log.unlink(missing_ok=True)
    process = ServerProcess(command, log, _environment(ready.device, work_dir), work_dir)
    reached_at = "127.0.0.1" if ready.host == _ALL_HOSTS else ready.host
    client = HttpClient(f"http://{reached_at}:{port}")
    try:
        _wait_until_healthy(process, client, port, ready, timeout_s, log)
    except BaseException:  # Ctrl-C too leaves no server behind
        client.close()
        process.close()
        raise
    return Server(client, ready.installation.version, process)


def attach(config: RolloutConfig, policy: Path, context_length: int) -> Server:
    """Use the server at config.sglang_address, which is not ours to stop.

    Raises EngineConfigError when nothing answers there, or naming all in which it is not the server that `config` asks
    for.
    """
    address = config.sglang_address
    client = HttpClient(address)
    try:
        reply = client.call("GET", "/server_info", timeout_s=_HEALTH_TIMEOUT_S)
        info = reply.json() if reply.ok else {}
    except (ServerUnreachable, ValueError) as error:
        client.close()
        raise EngineConfigError(
            f"rollout.sglang_address = {address!r}: no SGLang server answers ({error}); start one "
            "with slipstream serve, or leave the address out to have one started"
        ) from error
    faults = attach_faults(info, config, policy, context_length)
    if faults:
        client.close()
        raise EngineConfigError(f"rollout.sglang_address = {address!r}: {'; '.join(faults)}")
    update_protocol(info["version"])
    return Server(client, info["version"], None)


def _memory_share(
    config: RolloutConfig,
    policy: Path,
    draft: Path | Eagle3Config | None,
    ready: Ready,
    context_length: int,
    trainer: TrainerNeed | None,
    held_bytes: int = 0,
) -> float | None:
    """mem_fraction_static; None on a CPU, where SGLang's own default stands."""
    if ready.device == "cpu":
        return None
    need = engine_need(config, policy, draft, context_length)
    free_bytes = max(1, torch.cuda.mem_get_info(torch.device(ready.device))[0] - held_bytes)
    most = float(ready.flags.get("mem_fraction_static", most_share(free_bytes, trainer, offload=config.offload)))
    is_given = "mem_fraction_static" in ready.flags
    share = static_fraction(need, free_bytes, most, trainer, offload=config.offload, is_given=is_given)
    if need.total_bytes > free_bytes * most:
        _log.warning(
            "KV memory does not hold every request at full length, some will wait: of %s free the engine may take "
            "%.0f%%; it needs %s%s",
            *(gib(free_bytes), 100 * most, need, "" if trainer is None else f", and the trainer will take {trainer}"),
        )
    return share


def engine_need(
    config: RolloutConfig, policy: Path, draft: Path | Eagle3Config | None, context_length: int
) -> MemoryNeed:
    """What weights and KV take. `draft`: its folder, or the sizes of one that is yet to be written."""
    draft_sizes, draft_params = _sizes(draft)
    return memory_needed(
        read_json(policy / "config.json"),
        draft_sizes,
        policy_params=count_parameters(policy),
        draft_params=draft_params,
        itemsize=_ITEMSIZE[config.dtype],
        num_slots=config.max_running_requests,
        tokens_per_slot=context_length,
    )


def _sizes(draft: Path | Eagle3Config | None) -> tuple[Mapping[str, Any] | None, int]:
    """Its config.json and its parameters."""
    if draft is None:
        return None, 0
    if isinstance(draft, Eagle3Config):
        return draft.to_hf(), sum(map(prod, draft.tensor_shapes().values()))
    return read_json(draft / "config.json"), count_parameters(draft)


def _environment(device: str, work_dir: Path) -> dict[str, str]:
    """The server's, which runs in `work_dir`: this process's, and the package `sync` alone of all that lies here."""
    visible = work_dir.absolute() / "python"
    visible.mkdir(exist_ok=True)
    link = visible / "sync"
    link.unlink(missing_ok=True)
    link.symlink_to(_PROJECT / "sync")
    env = {key: value for key, value in os.environ.items() if not _OF_TORCHRUN.fullmatch(key)}
    inherited = [str(Path(folder).absolute()) for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder]
    env["PYTHONPATH"] = os.pathsep.join([str(visible), *inherited])
    # Lets the server's context be a little longer than the model's, see sglang_flags, and a draft's shorter.
    env["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    env.pop("SGLANG_RETURN_ORIGINAL_LOGPROB", None)  # log-probs at temperature 1, whatever was sampled at
    if device == "cpu":
        env["SGLANG_USE_CPU_ENGINE"] = "1"
    return env


def _wait_until_healthy(
    process: ServerProcess, client: HttpClient, port: int, ready: Ready, timeout_s: float, log: Path
) -> None:
    def is_healthy() -> bool:
        # Another run's server may have come to the port since our look. It would answer in place of ours, which only
        # finds the port taken once its model is loaded, and would be sent this run's weights.
        if not process.listens_at(port):
            return False
        try:
            return client.call("GET", "/health", timeout_s=_HEALTH_TIMEOUT_S).ok
        except ServerUnreachable:
            return False

    try:
        healthy = process.wait_until(is_healthy, timeout_s)
    except EngineError as error:
        text = process.log_tail(_LOG_LINES)
        taken = taken_port(text)
        users = _users_port(taken, ready.flags)
        cause = _cause_of_taken(taken, port, ready.flags) if taken else known_cause(text)
        what = f"the SGLang server did not start: {cause or last_words(text) or error}; {end_of_log(process, log)}"
        if taken and not users:
            raise _PortTaken(what) from None
        raise (EngineConfigError if cause else EngineError)(what) from None
    if not healthy:
        another = port_is_taken(port, ready.host) and not process.listens_at(port)
        raise EngineError(
            f"the SGLang server is not healthy after {timeout_s:.0f} s (rollout.sglang_start_timeout_s)"
            f"{f'; another process listens at its port {port}' if another else ''}; {end_of_log(process, log)}"
        )


def _cause_of_taken(line: str, port: int, flags: Mapping[str, Any]) -> str:
    """What to do about a port that a line of the log calls taken; `port` is the one that the server was given."""
    if users := _users_port(line, flags):
        return f"{users} is taken: {_ANOTHER_PORT}"
    beside = "" if str(port) in re.findall(r"\d+", line) else ", or one that it takes beside it,"
    if "port" in flags:
        which, mend = f"rollout.sglang.port = {port}", _ANOTHER_PORT
    else:
        which, mend = f"its port {port}", "start again, or name a free one as rollout.sglang.port"
    return f"{which}{beside} is taken ({line.strip()}): {mend}"


def _users_port(line: str, flags: Mapping[str, Any]) -> str:
    """Which of the ports in [rollout.sglang] a line of the log names, as a setting; "" when it names none."""
    numbers = set(re.findall(r"\d+", line))
    given = {name: value for name, value in flags.items() if name.endswith("port")}
    return next((f"rollout.sglang.{name} = {value}" for name, value in given.items() if str(value) in numbers), "")


def cause_of_end(process: ServerProcess) -> str:
    """Why a server that was healthy has ended, in one line; "" when its log does not say."""
    text = process.log_tail(_LOG_LINES)
    return last_words(text) or known_cause(text)


def end_of_log(process: ServerProcess, log: Path) -> str:
    """The end of an error: the last lines that the server wrote, or that it wrote none."""
    tail = process.log_tail()
    return f"the end of {log}:\n{tail}" if tail.strip() else f"{log} is empty"
