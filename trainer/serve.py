"""`slipstream serve`: the engine that a run would start, alone and for anyone, OpenAI endpoints included."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rollout_engine.config import RolloutConfig
from rollout_engine.sglang_engine import SGLangEngine
from rollout_engine.sglang_preflight import check_folder
from trainer.config import ConfigError
from trainer.config_check import check_rollout, refuse_all_but_engine
from trainer.config_load import Override, load_config
from trainer.run_lock import RunLock
from trainer.serving import context_length, load_tokenizer, read_draft, start_sglang

_POLL_S = 1.0


def serve(policy: Path, draft: Path | None, work_dir: Path, overrides: Sequence[Override]) -> int:
    """Serve until Ctrl-C or SIGTERM, then stop everything. ConfigError and EngineError for what cannot be served."""
    rollout = _settings(draft, overrides)
    tokenizer = load_tokenizer(policy)
    context_length(policy, rollout)
    eagle3 = None if draft is None else read_draft(draft, policy)
    check_folder("--work-dir", work_dir)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # from here on like Ctrl-C, also while the server starts
    work_dir.mkdir(parents=True, exist_ok=True)
    lock = RunLock(work_dir / "lock", "--work-dir")  # another server's log is no explanation of this one's death
    try:
        return _serve(
            policy, rollout, lambda: start_sglang(policy, rollout, eagle3, tokenizer, work_dir, serves_files=True)
        )
    finally:
        lock.release()


def _serve(policy: Path, rollout: RolloutConfig, start: Callable[[], SGLangEngine]) -> int:
    engine = start()
    try:
        print(how_to_use(engine.address, policy, rollout), flush=True)
        while True:
            time.sleep(_POLL_S)
            engine.require_alive()
    except KeyboardInterrupt:
        print("slipstream: stopping the server", file=sys.stderr)
        return 0
    finally:
        engine.close()


def _settings(draft: Path | None, overrides: Sequence[Override]) -> RolloutConfig:
    """EAGLE3 exactly when there is a draft, unless the command line says otherwise."""
    refuse_all_but_engine(overrides, "serve")
    defaults = [
        Override("", "rollout.engine", "sglang"),
        Override("", "rollout.speculative_algorithm", "NONE" if draft is None else "EAGLE3"),
        Override("", "rollout.controller", "fixed"),
    ]
    rollout = load_config(None, [*defaults, *overrides]).rollout
    if rollout.engine != "sglang":
        raise ConfigError(f"--engine {rollout.engine}: serve starts an SGLang server; leave --engine out")
    if rollout.sglang_address:
        raise ConfigError(f"{rollout.sglang_address} is served already: leave the address out to start another server")
    if rollout.speculative_draft_model_path:
        raise ConfigError("--speculative-draft-model-path: give serve its draft as --draft DIR")
    if rollout.speculative_algorithm == "EAGLE3" and draft is None:
        raise ConfigError("--speculative-algorithm EAGLE3 needs a draft: give --draft DIR")
    for warning in check_rollout(rollout):
        print(f"slipstream: warning: {warning}", file=sys.stderr)
    return replace(rollout, speculative_draft_model_path="" if draft is None else str(draft))


def how_to_use(address: str, policy: Path, rollout: RolloutConfig) -> str:
    """What to type elsewhere, a line each."""
    host_port = address.removeprefix("http://")
    host, _, port = host_port.rpartition(":")
    return "\n".join(
        [
            f"serving {policy} at {address} ({rollout.speculative_algorithm}); Ctrl-C stops it",
            f"  chat        curl {address}/v1/chat/completions -H 'Content-Type: application/json' "
            """-d '{"model": "default", "messages": [{"role": "user", "content": "Hello"}]}'""",
            f"  benchmark   python -m sglang.benchmark.serving --backend sglang --host {host} --port {port}",
            f"  a run       slipstream train ... --engine sglang --rollout-external-engine-addrs {host_port} "
            "--update-weight-disk-dir DIR",
        ]
    )
