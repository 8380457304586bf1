"""`slipstream demo`: the policy that the demo trains, and the settings of its run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trainer.config import ConfigError, RunConfig
from trainer.config_load import Override, load_config
from trainer.hf_files import read_config
from trainer.make_model import MakeModelConfig, provenance
from trainer.make_model_progress import make_model_with_progress

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "demo.toml"
TASK, WARM_START_STEPS = "repeat", 450


def demo_config(overrides: Sequence[Override]) -> RunConfig:
    """The demo recipe's settings under a free run name, its policy made first unless it is there already."""
    config = load_config(RECIPE, overrides)
    out = Path(config.policy.hf_checkpoint)
    ensure_model(MakeModelConfig(out=out, task=TASK, warm_start_steps=WARM_START_STEPS))
    return config if config.resume else replace(config, name=free_name(config))


def ensure_model(model: MakeModelConfig) -> None:
    """Make the model, or keep the one that was made with the same settings."""
    if not model.out.exists():
        make_model_with_progress(model)
        return
    made_with = read_config(model.out).get("slipstream", {})
    wanted = provenance(model)
    if {key: made_with.get(key) for key in wanted} != wanted:
        raise ConfigError(
            f"{model.out} holds another model than the demo's; remove the folder, or train it with a recipe"
        )


def free_name(config: RunConfig) -> str:
    """`demo`, or `demo-2`, `demo-3`, ... when runs of that name exist."""
    name, number = config.name, 1
    while (Path(config.run_dir) / name).exists():
        number += 1
        name = f"{config.name}-{number}"
    return name
