"""The flag table: every row leads to a setting, and the names of SGLang, slime and Megatron do what they say."""

import pytest

from trainer.config import ConfigError, RunConfig
from trainer.config_load import known_keys, load_config, parse_flags
from trainer.flags import DERIVED, SGLANG, TABLE
from trainer.help import flags_help
from trainer.toml_writer import to_toml


def load(*arguments):
    return load_config(None, parse_flags(arguments)[1])


def test_every_flag_leads_to_a_setting_and_is_named_once():
    rows = [*SGLANG, *(flag for flag in TABLE.values() if flag not in SGLANG)]
    assert len(rows) == len(TABLE) == len({flag.name for flag in rows})
    for flag in rows:
        assert flag.key in known_keys() or flag.key in DERIVED, flag
        assert flag.help and flag.name == flag.name.lower().replace("_", "-")


@pytest.mark.parametrize("prefix", ["--", "--sglang-"])
def test_sglangs_speculative_flags_verbatim(prefix):
    rollout = load(
        f"{prefix}speculative-algorithm",
        "NGRAM",
        f"{prefix}speculative-num-steps=4",
        f"{prefix}speculative-eagle-topk=1",
        f"{prefix}speculative-num-draft-tokens=5",
        f"{prefix}speculative-draft-model-path=d",
    ).rollout
    assert (rollout.speculative_algorithm, rollout.speculative_num_steps) == ("NGRAM", 4)
    assert (rollout.speculative_num_draft_tokens, rollout.speculative_draft_model_path) == (5, "d")


def test_sglangs_other_flags_pass_on_verbatim(tmp_path):
    rollout = load(
        "--engine", "sglang", "--sglang-mem-fraction-static", "0.3", "--sglang-attention_backend=flashinfer",
        "--sglang-disable-radix-cache", "--sglang-cuda-graph-bs", "[1, 8]", "--rollout.sglang.log-level", "info",
        "--sglang-enable-deterministic-inference", "--sglang-json-model-override-args", '{"a": 1}', "--sglang-port=-1",
    ).rollout  # fmt: skip
    expected = {
        "mem_fraction_static": 0.3,
        "attention_backend": "flashinfer",
        "disable_radix_cache": True,
        "cuda_graph_bs": [1, 8],
        "log_level": "info",
        "enable_deterministic_inference": True,
        "json_model_override_args": '{"a": 1}',
        "port": -1,
    }
    assert rollout.engine == "sglang" and rollout.sglang == expected
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[rollout.sglang]\nmem_fraction_static = 0.5\ndtype_of_kv = 'x'\n")
    config = load_config(recipe, parse_flags(["--sglang-mem-fraction-static=0.3"])[1])
    assert config.rollout.sglang == {"mem_fraction_static": 0.3, "dtype_of_kv": "x"}
    (tmp_path / "written.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "written.toml") == config


def test_slimes_names_for_where_the_engine_is_and_how_weights_get_there():
    rollout = load(
        "--rollout-external-engine-addrs", "10.0.0.7:30000", "--colocate", "--update-weight-transport", "disk",
        "--update-weight-disk-dir=/shared/sync", "--allow-lossy",
    ).rollout  # fmt: skip
    assert rollout.sglang_address == "http://10.0.0.7:30000" and rollout.offload and rollout.allow_lossy
    assert (rollout.sync_transport, rollout.sync_dir) == ("disk", "/shared/sync")
    assert load("--rollout-external-engine-addrs=http://h:1/").rollout.sglang_address == "http://h:1"
    assert load("--offload").rollout.offload and not load("--offload=no").rollout.offload


def test_slimes_and_megatrons_names_and_underscores():
    config = load(
        "--hf-checkpoint", "m", "--rm-type=math", "--use-kl-loss", "--kl-loss-coef", "0.1", "--eps_clip_high", "0.3",
        "--tensor-model-parallel-size=2", "--sequence-parallel", "--bf16", "--disable-grpo-std-normalization",
    )  # fmt: skip
    assert config.policy.hf_checkpoint == "m" and config.data.reward == "math"
    assert config.algorithm.use_kl_loss and config.algorithm.kl_loss_coef == 0.1
    assert config.algorithm.eps_clip_high == 0.3 and not config.algorithm.normalize_std
    assert config.policy.tensor_model_parallel_size == 2 and config.policy.sequence_parallel
    assert config.policy.dtype == "bfloat16" and config.rollout.dtype == "float32"


def test_global_batch_size_sets_or_checks_the_optimizer_steps():
    data = ("--rollout-batch-size=8", "--n-samples-per-prompt=4")
    assert load("--global-batch-size=16", *data).algorithm.num_steps_per_rollout == 2
    assert load("--global-batch-size=16", "--num-steps-per-rollout=2", *data).algorithm.num_steps_per_rollout == 2
    with pytest.raises(ConfigError, match="does not divide the 32 samples"):
        load("--global-batch-size=5", *data)
    with pytest.raises(ConfigError, match="makes 2 optimizer steps a rollout"):
        load("--global-batch-size=16", "--num-steps-per-rollout=4", *data)


def test_eps_clip_is_both_clips_unless_the_upper_one_is_given(tmp_path):
    algorithm = load("--eps-clip=0.1").algorithm
    assert (algorithm.eps_clip, algorithm.eps_clip_high) == (0.1, 0.1)
    for arguments in (["--eps-clip=0.1", "--eps-clip-high=0.3"], ["--eps-clip-high=0.3", "--eps-clip=0.1"]):
        algorithm = load(*arguments).algorithm
        assert (algorithm.eps_clip, algorithm.eps_clip_high) == (0.1, 0.3)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[algorithm]\neps_clip_high = 0.4\n")
    assert load_config(recipe, parse_flags(["--eps-clip=0.1"])[1]).algorithm.eps_clip_high == 0.4


def test_flags_of_scripts_that_need_no_setting_or_one_of_two():
    config = load("--use-dynamic-batch-size", "--recompute-granularity", "full", "--custom-rm-path=m:f")
    assert config.policy.recompute and config.data.reward == "m:f"
    assert load("--use-dynamic-batch-size") == RunConfig()
    with pytest.raises(ConfigError, match="--recompute-granularity 'selective': only 'full'"):
        load("--recompute-granularity=selective")


def test_help_lists_every_flag_and_every_key():
    text = flags_help()
    for name in TABLE:
        assert name in text or name.replace("--sglang-", "--") in text, name
    for key in known_keys():
        assert key.replace("_", "-") in text, key
    assert str(RunConfig().policy.lr) in text
    assert "--sglang-NAME [VALUE]" in text
