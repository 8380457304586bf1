"""The command line's flags, as a table: SGLang's, slime's and Megatron's spellings of this project's own keys.

Every key also has its own flag (`--rollout.temperature`, `--seed`); the table only adds names that users of those
systems know. A flag with a fixed value takes none on the command line.
"""

from __future__ import annotations

from typing import NamedTuple


class Flag(NamedTuple):
    name: str
    key: str  # dotted key of RunConfig, or a key of DERIVED
    help: str
    value: str = ""  # what the flag stands for, when it takes no value


# Keys that are no settings of their own but say something about several others.
DERIVED: dict[str, type] = {
    "global_batch_size": int,
    "eps_clip": float,
    "recompute_granularity": str,
    "use_dynamic_batch_size": bool,
    "external_engine_addrs": str,
}

# SGLang's own server flags pass through under this prefix, unless the table below has a setting for them.
SGLANG_PREFIX = "--sglang-"

_SGLANG = (
    Flag("--speculative-algorithm", "rollout.speculative_algorithm", "EAGLE3, NGRAM or NONE"),
    Flag("--speculative-num-steps", "rollout.speculative_num_steps", "depth k of the draft chain"),
    Flag("--speculative-eagle-topk", "rollout.speculative_eagle_topk", "branches a step; 1 (a chain) is supported"),
    Flag("--speculative-num-draft-tokens", "rollout.speculative_num_draft_tokens", "num-steps + 1 for a chain"),
    Flag("--speculative-draft-model-path", "rollout.speculative_draft_model_path", "folder of an EAGLE-3 draft"),
    Flag("--max-running-requests", "rollout.max_running_requests", "requests decoded at once"),
    Flag("--context-length", "rollout.context_length", "prompt + response, tokens"),
    Flag("--dtype", "rollout.dtype", "of the engine's weights: float32, bfloat16, float64"),
    Flag("--enable-deterministic-inference", "rollout.batch_invariant", "bitwise the same whatever the batch", "true"),
)

# As slime spells them. Deterministic inference is left out: with the prefix it is SGLang's own, not this project's.
_PREFIXED = tuple(
    flag._replace(name=SGLANG_PREFIX + flag.name[2:])
    for flag in _SGLANG
    if flag.name != "--enable-deterministic-inference"
)

_ENGINE = (
    Flag("--engine", "rollout.engine", "torch: embedded, on a CPU or one GPU; sglang: an SGLang server"),
    Flag("--offload", "rollout.offload", "SGLang gives its GPU memory back while the policy trains"),
    Flag("--colocate", "rollout.offload", "the same: engine and trainer share a GPU anyway", "true"),
    Flag("--rollout-external-engine-addrs", "external_engine_addrs", "HOST:PORT of an SGLang server that runs already"),
    Flag(
        "--update-weight-transport", "rollout.sync_transport", "weights to SGLang: ipc, disk, broadcast or auto (ipc)"
    ),
    Flag("--update-weight-disk-dir", "rollout.sync_dir", "folder that trainer and engine both see"),
    Flag("--sglang-python", "rollout.sglang_python", "interpreter of the environment that holds SGLang"),
    Flag("--sglang-address", "rollout.sglang_address", "http://HOST:PORT of an SGLang server that runs already"),
    Flag("--sglang-start-timeout-s", "rollout.sglang_start_timeout_s", "seconds until a started server must answer"),
    Flag("--allow-lossy", "rollout.allow_lossy", "accept samples that do not follow the policy's law"),
)

SGLANG = (*_SGLANG, *_PREFIXED, *_ENGINE)

SLIME = (
    Flag("--hf-checkpoint", "policy.hf_checkpoint", "Hugging Face folder of the policy"),
    Flag("--ref-load", "policy.ref_load", "Hugging Face folder of the KL reference"),
    Flag("--max-tokens-per-gpu", "policy.max_tokens_per_gpu", "token budget of one packed micro-batch"),
    Flag("--use-dynamic-batch-size", "use_dynamic_batch_size", "accepted: micro-batches are always packed", "true"),
    Flag("--prompt-data", "data.prompt_data", "JSONL file of prompts"),
    Flag("--input-key", "data.input_key", "key of the prompt, a string or chat messages"),
    Flag("--label-key", "data.label_key", "key of the label"),
    Flag("--apply-chat-template", "data.apply_chat_template", "send prompts through the chat template"),
    Flag("--rollout-shuffle", "data.rollout_shuffle", "new order every epoch"),
    Flag("--rm-type", "data.reward", "exact, math or MODULE:FUNCTION"),
    Flag("--custom-rm-path", "data.reward", "MODULE:FUNCTION, of (prompt, response, label) texts"),
    Flag("--rollout-batch-size", "data.rollout_batch_size", "prompts a step"),
    Flag("--n-samples-per-prompt", "data.n_samples_per_prompt", "group size"),
    Flag("--eval-prompt-data", "data.eval_prompt_data", "JSONL file of held-out prompts"),
    Flag("--num-rollout", "num_rollout", "steps of the run"),
    Flag("--rollout-seed", "seed", "seed of everything random"),
    Flag("--save-interval", "save_interval", "steps between checkpoints; 0 = only at the end"),
    Flag("--num-eval-prompts", "data.num_eval_prompts", "of them, the first; 0 = all"),
    Flag("--eval-interval", "eval_interval", "steps between evaluations; 0 = never"),
    Flag("--rollout-max-response-len", "rollout.max_response_len", "tokens"),
    Flag("--rollout-max-context-len", "rollout.context_length", "prompt + response, tokens"),
    Flag("--rollout-temperature", "rollout.temperature", "0 = greedy"),
    Flag("--rollout-top-p", "rollout.top_p", "1 = off"),
    Flag("--rollout-top-k", "rollout.top_k", "0 = off"),
    Flag("--rollout-stop", "rollout.stop", "stop strings, separated by commas; when given twice, the last"),
    Flag("--global-batch-size", "global_batch_size", "samples of one optimizer step; sets num_steps_per_rollout"),
    Flag("--num-steps-per-rollout", "algorithm.num_steps_per_rollout", "optimizer steps of one rollout"),
    Flag("--advantage-estimator", "algorithm.advantage_estimator", "grpo"),
    Flag("--disable-grpo-std-normalization", "algorithm.normalize_std", "only subtract the group's mean", "false"),
    Flag("--eps-clip", "eps_clip", "lower clip of the ratio, and the upper one unless that is given"),
    Flag("--eps-clip-high", "algorithm.eps_clip_high", "upper clip of the ratio"),
    Flag("--use-kl-loss", "algorithm.use_kl_loss", "add the KL to the reference to the loss"),
    Flag("--kl-loss-coef", "algorithm.kl_loss_coef", "its weight"),
    Flag("--kl-loss-type", "algorithm.kl_loss_type", "k1, k2, k3 or low_var_kl"),
    Flag("--entropy-coef", "algorithm.entropy_coef", "weight of the entropy bonus"),
    Flag("--use-tis", "algorithm.use_tis", "truncated importance sampling"),
    Flag("--tis-clip", "algorithm.tis_clip", "its upper clip"),
)

MEGATRON = (
    Flag("--tensor-model-parallel-size", "policy.tensor_model_parallel_size", "ranks a layer is cut over"),
    Flag("--pipeline-model-parallel-size", "policy.pipeline_model_parallel_size", "ranks the layers are cut over"),
    Flag("--sequence-parallel", "policy.sequence_parallel", "cut activations over the tensor-parallel ranks"),
    Flag("--use-distributed-optimizer", "policy.use_distributed_optimizer", "cut optimizer state over data ranks"),
    Flag("--lr", "policy.lr", "learning rate"),
    Flag("--min-lr", "policy.min_lr", "where decay ends"),
    Flag("--lr-decay-style", "policy.lr_decay_style", "constant, linear, cosine or inverse-square-root"),
    Flag("--lr-warmup-iters", "policy.lr_warmup_iters", "optimizer steps of linear warm-up"),
    Flag("--lr-decay-iters", "policy.lr_decay_iters", "optimizer steps of decay; 0 = the whole run"),
    Flag("--weight-decay", "policy.weight_decay", "decoupled"),
    Flag("--adam-beta1", "policy.adam_beta1", "first moment"),
    Flag("--adam-beta2", "policy.adam_beta2", "second moment"),
    Flag("--adam-eps", "policy.adam_eps", "epsilon"),
    Flag("--clip-grad", "policy.clip_grad", "global gradient norm; 0 = no clipping"),
    Flag("--recompute-granularity", "recompute_granularity", "full: policy.recompute; no other is accepted"),
    Flag("--bf16", "policy.dtype", "train in bfloat16 (the engine: --dtype bfloat16)", "bfloat16"),
    Flag("--deterministic-mode", "deterministic", "bit for bit the same run, on the CPU", "true"),
)

GROUPS = (
    ("speculation and engine (SGLang's names, also with --sglang- in front)", _SGLANG),
    ("which engine, and how it gets its weights", _ENGINE),
    ("rollout, data and algorithm (slime's names)", SLIME),
    ("policy (Megatron's names)", MEGATRON),
)

TABLE: dict[str, Flag] = {flag.name: flag for flag in (*SGLANG, *SLIME, *MEGATRON)}
