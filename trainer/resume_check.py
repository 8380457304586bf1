"""What a resumed run may change. A checkpoint brings its own optimizer, schedule and controller state along, so another
setting would be without effect or at odds with that state: it is refused rather than ignored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from trainer.config import ConfigError, RunConfig

_FREE = frozenset(
    {
        "resume",
        "name",
        "run_dir",
        "num_rollout",  # with conditions, see `check_resumed`
        "save_interval",
        "eval_interval",
        "plain_probe_interval",
        "data.num_eval_prompts",
        "data.eval_prompt_data",
        "draft.schedule",  # beyond the end of a record the run decides for itself
        "speculation.sentinel",  # off: an engine that it stopped speculates again
        "speculation.sentinel_alpha",
        "speculation.sentinel_min_effect",
        "speculation.sentinel_tokens",
        # where an SGLang server runs and how weights get there; so its flags (`rollout.sglang`) are free too
        "rollout.offload",
        "rollout.sglang_address",
        "rollout.sglang_python",
        "rollout.sglang_start_timeout_s",
        "rollout.sync_transport",
        "rollout.sync_dir",
        "rollout.sync_host",
    }
)
_FREE_TABLE = "rollout.sglang."


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted key, in the form in which JSON gives it back."""
    return json.loads(json.dumps(dict(_leaves(asdict(config), ""))))


def _leaves(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def check_resumed(saved: Mapping[str, Any], config: RunConfig) -> None:
    """Raises ConfigError for the first setting that differs from the checkpoint's, with both values."""
    present, defaults = flat_settings(config), flat_settings(RunConfig())
    for key in sorted((saved.keys() | present.keys()) - _FREE):
        # a checkpoint made before there was such a setting was made with its default
        before, now = saved.get(key, defaults.get(key)), present.get(key)
        if before != now and not key.startswith(_FREE_TABLE):
            raise ConfigError(
                f"{key} = {now!r}, but the checkpoint to resume was made with {before!r}: give the old value, or start "
                "a new run from the exported policy under another --name"
            )
    if saved["num_rollout"] != config.num_rollout and _decays_over_the_run(config):
        raise ConfigError(
            f"num_rollout = {config.num_rollout}, but the checkpoint to resume was made with {saved['num_rollout']}, "
            f"over which policy.lr_decay_style = {config.policy.lr_decay_style!r} decays: give the old value; runs "
            "with policy.lr_decay_style = 'constant' or policy.lr_decay_iters set can be extended"
        )


def _decays_over_the_run(config: RunConfig) -> bool:
    return config.policy.lr_decay_style != "constant" and config.policy.lr_decay_iters == 0
