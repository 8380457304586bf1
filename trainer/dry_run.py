"""`--dry-run`: read and check what a run reads; print settings, plan and what was not checked; write nothing."""

from __future__ import annotations

import os

import torch

from rollout_engine.config import RolloutConfig
from trainer.config import RunConfig
from trainer.megatron_settings import DTYPES, transformer_settings
from trainer.policy_attention import attention_name
from trainer.run import Inputs, check_folder, make_draft, read_inputs
from trainer.serving import check_server
from trainer.toml_writer import to_toml


def dry_run(config: RunConfig) -> int:
    """Print the resolved recipe and what the run would do. `ConfigError` for whatever the run would refuse."""
    run = check_folder(config)
    inputs = read_inputs(config)
    draft = make_draft(config, inputs)
    share = None
    if config.rollout.engine == "sglang":
        share = check_server(inputs.folder, config, draft, int(os.environ.get("WORLD_SIZE", "1")))
    print(to_toml(config))
    print("\n".join(plan(config, inputs)))
    if share is not None:
        print(f"# memory      weights and KV of the engine take {share:.0%} of what the trainer leaves free")
    print(f"dry run: nothing started, nothing written; the run would go to {run.path}")
    print(f"not checked: {'; '.join(not_checked(config.rollout, knows_share=share is not None))}")
    return 0


def not_checked(rollout: RolloutConfig, *, knows_share: bool) -> list[str]:
    """What only the run itself finds out. `knows_share`: the engine's share of the GPU's memory could be computed."""
    memory = "whether the memory suffices" + (" for the policy's activations" if knows_share else "")
    rewards = "what the reward says to a response"
    if rollout.engine == "torch":
        return [memory, rewards]
    if rollout.sglang_address:
        return ["whether the server takes the run's weights", memory, rewards]
    return ["whether the SGLang server comes up", memory, rewards]


def _engine(rollout: RolloutConfig) -> str:
    if rollout.engine == "torch":
        return "torch, in this process"
    where = rollout.sglang_address or "started by the run"
    gives = ", gives its memory back while the policy trains" if rollout.offload else ""
    return f"SGLang, {where}; weights by {rollout.sync_transport}{gives}"


def _policy(config: RunConfig, inputs: Inputs) -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    head_dim = transformer_settings(inputs.hf_config)["kv_channels"]
    return f"{config.policy.dtype}, attention by {attention_name(DTYPES[config.policy.dtype], device, head_dim)}"


def plan(config: RunConfig, inputs: Inputs) -> list[str]:
    """What the run would do, a line each."""
    data, rollout = config.data, config.rollout
    samples = data.rollout_batch_size * data.n_samples_per_prompt
    rows = len(inputs.prompts)
    epochs = config.num_rollout * data.rollout_batch_size / rows
    skipped = f", {inputs.prompts.num_skipped} bad rows skipped" if inputs.prompts.num_skipped else ""
    speculation = "plain decoding"
    if rollout.speculative_algorithm != "NONE":
        speculation = (
            f"{rollout.speculative_algorithm} with k = {rollout.speculative_num_steps}, rule {rollout.verify_rule}, "
            f"{'fixed' if rollout.engine == 'sglang' else rollout.controller} depth"
            f"{', history beside it' if config.speculation.history else ''}"
        )
    lines = [
        f"# prompts     {rows} rows of {data.prompt_data}{skipped}; {epochs:.2f} epochs",
        f"# a step      {data.rollout_batch_size} prompts x {data.n_samples_per_prompt} = {samples} samples, "
        f"{config.algorithm.num_steps_per_rollout} optimizer step(s)",
        f"# steps       {config.num_rollout}",
        f"# policy      {_policy(config, inputs)}",
        f"# engine      {_engine(rollout)}",
        f"# speculation {speculation}",
    ]
    if config.eval_interval:
        lines.append(f"# evaluation  {len(inputs.eval_prompts)} prompts every {config.eval_interval} steps, greedy")
    return lines
