"""Recipes and overrides become one frozen config, or one line that says what is wrong and where."""

from dataclasses import replace
from pathlib import Path

import pytest

from rollout_engine.sglang_checks import lossy_settings
from trainer import generate
from trainer.config import ConfigError, RunConfig
from trainer.config_check import validate
from trainer.config_load import Override, load_config, parse_flags
from trainer.toml_writer import to_toml

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("--hf-checkpoint=m", "--prompt-data=p.jsonl")


def from_flags(*arguments, recipe=None):
    positional, overrides = parse_flags(arguments)
    assert positional == []
    return load_config(recipe, overrides)


def write(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_a_recipe_sets_keys_and_flags_go_over_it(tmp_path):
    recipe = write(tmp_path, "seed = 3\n[rollout]\ntemperature = 1\nstop = ['a', 'b']\n[policy]\nlr = 1e-4\n")
    config = from_flags("--policy.lr=2e-4", "--rollout.speculative_num_steps", "5", recipe=recipe)
    assert config.seed == 3 and config.policy.lr == 2e-4 and config.rollout.speculative_num_steps == 5
    assert config.rollout.stop == ("a", "b") and isinstance(config.rollout.temperature, float)
    assert config.draft == RunConfig().draft


def test_what_is_written_reads_back_equal(tmp_path):
    config = from_flags(*SOURCES, "--draft.aux-layer-ids=1,3,5", "--policy.megatron.attention_dropout=0.1", "--lr=3e-4")
    assert load_config(write(tmp_path, to_toml(config))) == config


@pytest.mark.parametrize(
    ("arguments", "value"),
    [(["--resume"], True), (["--resume", "true"], True), (["--resume=no"], False), (["--resume", "--seed=1"], True)],
)
def test_a_boolean_flag_may_stand_alone(arguments, value):
    assert from_flags(*arguments).resume is value


def test_lists_and_passed_through_keys():
    config = from_flags("--draft.aux_layer_ids", "[1, 3, 5]", "--rollout.stop=x,y", "--policy.megatron.swiglu=true")
    assert config.draft.aux_layer_ids == (1, 3, 5) and config.rollout.stop == ("x", "y")
    assert config.policy.megatron == {"swiglu": True}


def test_what_is_no_flag_is_positional():
    assert parse_flags(["a.toml", "--seed", "1", "b"])[0] == ["a.toml", "b"]
    assert parse_flags(["--resume", "a.toml"])[0] == ["a.toml"] and parse_flags(["--resume", "./a"])[0] == ["./a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[rollout]\ntemprature = 1", "unknown key 'rollout.temprature', did you mean 'rollout.temperature'"),
        ("lr = 1", "unknown key 'lr', did you mean 'policy.lr'"),
        ("[rolout]\nseed = 1", "unknown key 'rolout', did you mean 'rollout'"),
        ("policy = 3", "policy is a table; write \\[policy\\]"),
        ("[policy]\nmegatron = 3", "policy.megatron is a table"),
        ("seed = '3'", "recipe.toml: seed = '3' is of the wrong type, expected a whole number"),
        ("seed = true", "expected a whole number"),
        ("[rollout]\nstop = 'a'", "expected a list, each a string"),
        ("[draft]\naux_layer_ids = [1, 'x']", "expected a whole number"),
        ("seed = ", "recipe.toml: not TOML"),
        ("[policy]\nlr = inf", "recipe.toml: policy.lr = inf: it must be a finite number"),
    ],
)
def test_a_bad_recipe_is_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml: No such file"):
        load_config(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hf-chekpoint", "x"], "did you mean '--hf-checkpoint'"),
        (["--rollout.temprature", "1"], "did you mean '--rollout.temperature'"),
        (["--policy.megatron", "1"], "unknown flag"),
        (["--rollout.sglang", "1"], "unknown flag"),
        (["--sglang-", "1"], "unknown flag"),
        (["--colocate=yes"], "--colocate takes no value"),
        (["--lr"], "--lr needs a value, a number"),
        (["--seed", "1.5"], "--seed '1.5' is of the wrong type, expected a whole number"),
        (["--resume=maybe"], "expected true or false"),
        (["--resume", "maybe"], "--resume 'maybe' is of the wrong type, expected true or false"),
        (["--num-eval-prompt", "8"], "did you mean '--num-eval-prompts'"),
        (["--bf16=yes"], "--bf16 takes no value"),
        (["--lr=nan"], "--lr = nan: it must be a finite number"),
        (["--rollout-temperature", "inf"], "--rollout-temperature = inf: it must be a finite number"),
    ],
)
def test_a_bad_flag_is_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message):
        from_flags(*arguments)


GOOD = ("--rollout-batch-size=4", "--n-samples-per-prompt=4", *SOURCES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speculative-num-steps=0"], "speculative_num_steps = 0 with EAGLE3"),
        (["--speculative-eagle-topk=2"], "only 1, a chain"),
        (["--speculative-num-draft-tokens=3"], "it must be 4"),
        (["--n-samples-per-prompt=1"], "a group of 1 has no advantage"),
        (["--num-steps-per-rollout=3"], "do not divide into algorithm.num_steps_per_rollout = 3"),
        (["--deterministic"], "set rollout.controller = 'fixed', or give a measured rollout.cost_table"),
        (["--rollout.engine=vllm"], "rollout.engine = 'vllm' is unknown"),
        (["--speculative-algorithm=EAGLE"], "did you mean 'EAGLE3'"),
        (["--rollout.verify-rule=rejecton"], "did you mean 'rejection'"),
        (["--rollout.verify-rule=greedy"], "what temperature 0 uses by itself"),
        (["--advantage-estimator=gae"], "use one of grpo"),
        (["--rollout-temperature=0"], "teach nothing"),
        (["--rollout-temperature=-1"], "0 \\(greedy\\) or more"),
        (["--rollout-top-p=0"], "above 0"),
        (["--num-rollout=0"], "at least 1"),
        (["--context-length=64", "--rollout-max-response-len=64"], "leaves no room"),
        (["--eval-interval=2"], "give --eval-prompt-data"),
        (["--hf-checkpoint="], "give --hf-checkpoint DIR"),
        (["--tensor-model-parallel-size=2"], "start a multiple of 2"),
        (["--rollout.cost_table=absent.json"], "'absent.json': no such file"),
        (["--context-length=-1"], "context_length = -1: it must be 0"),
        (["--lr=-1"], "policy.lr = -1.0: it must be at least 0"),
        (["--lr=1e-6", "--min-lr=1e-5"], "min_lr = 1e-05 is above policy.lr = 1e-06"),
        (["--num-rollout=20", "--lr-warmup-iters=100"], "lr_warmup_iters = 100 must be below the 20"),
        (["--save-interval=-1"], "save_interval = -1: it must be at least 0"),
        (["--eval-interval=-1"], "eval_interval = -1"),
        (["--plain-probe-interval=-1"], "plain_probe_interval = -1"),
        (["--clip-grad=-1"], "policy.clip_grad = -1"),
        (["--draft.clip-grad=-1"], "draft.clip_grad = -1"),
        (["--adam-beta1=1"], "adam_beta1 = 1.0: it must be at least 0 and below 1"),
        (["--draft.adam-beta2=-0.1"], "draft.adam_beta2 = -0.1"),
        (["--draft.capture-max-bytes=0"], "capture_max_bytes = 0: it must be at least 1"),
        (["--draft.updates-per-step=0"], "updates_per_step = 0"),
        (["--draft.max-tokens-per-update=0"], "max_tokens_per_update = 0"),
        (["--speculation.history-num-steps=-1"], "speculation.history_num_steps = -1: it must be at least 0"),
        (["--speculation.history-min-match=0"], "history_min_match = 0: it must be at least 1"),
        (["--speculation.sentinel-tokens=0"], "sentinel_tokens = 0: it must be at least 1"),
        (["--speculation.sentinel-alpha=0"], "sentinel_alpha = 0.0: it must be between 0 and 1"),
        (["--speculation.sentinel-min-effect=0.5"], "sentinel_min_effect = 0.5: it must be at least 0 and below 0.5"),
        (["--speculation.history-max-bytes=0"], "history_max_bytes = 0"),
        (
            ["--speculation.history-min-match=9", "--speculation.history-max-match=8"],
            "must be at least 1 and in this order",
        ),
        (["--speculation.history-min-confidence=1.5"], "confidence = 1.5: it must be 0 to 1"),
        (["--speculation.history", "--speculative-algorithm=NGRAM"], "history drafts stand beside EAGLE3's"),
        (["--speculation.history", "--speculative-algorithm=NONE"], "history drafts stand beside EAGLE3's"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    assert validate(from_flags(*GOOD)) == []
    with pytest.raises(ConfigError, match=message) as caught:
        validate(from_flags(*GOOD, *arguments))
    assert "\n" not in str(caught.value)


SGLANG = ("--engine=sglang", "--rollout.controller=fixed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speculation.history"], "SGLang runs one speculative algorithm"),
        (["--rollout.verify-rule=coupled"], "needs seeds, which SGLang ignores while verifying: use 'rejection' or"),
        (["--enable-deterministic-inference"], "batch_invariant = True is for the embedded engine alone; with SGLang:"),
        (["--rollout.ngram-min-match=4"], "ngram_min_match = 4 is for the embedded engine alone"),
        (["--plain-probe-interval=5"], "measure with slipstream bench rollout --engine sglang"),
        (["--draft.draft-vocab-size=64"], "needs a draft over the whole vocabulary.* draft.draft_vocab_size = 0, or"),
        (["--dtype=float64"], "SGLang has no float64"),
        (["--rollout.device=cpu:1"], "use auto, cpu, cuda or cuda:N"),
        (["--sglang-base-gpu-id=1"], "use rollout.device = 'cuda:N'"),
        (["--deterministic"], "deterministic = true: SGLang ignores seeds while verifying"),
        (["--sglang-tp-size=2"], "rollout.sglang.tp_size = 2: an engine over several GPUs is not built yet"),
        (["--sglang-data-parallel-size=2"], "data_parallel_size = 2: an engine over several"),
        (["--sglang-model-path=x"], "rollout.sglang.model_path has a setting of its own: use policy.hf_checkpoint"),
        (["--rollout.sglang.dtype=half"], "has a setting of its own: use rollout.dtype"),
        (["--rollout.min-p=0.1"], "min_p = 0.1 with speculation: SGLang applies it to the first token only"),
        (["--rollout.min-p=1.5"], "at least 0 \\(off\\) and below 1"),
        (["--sglang-speculative-accept-threshold-single=0.9"], "below 1.0 SGLang keeps draft tokens.*--allow-lossy"),
        (["--sglang-speculative-accept-threshold-acc", "x"], "threshold_acc = 'x' with speculation"),
        (
            ["--sglang-preferred-sampling-params={repetition_penalty = 1.1}"],
            "of which training knows nothing.*allow-lossy",
        ),
        (
            ["--speculative-algorithm=NGRAM", "--rollout.verify-rule=target_only"],
            "fills up short drafts with token 0.*--allow-lossy",
        ),
        (["--sglang-incremental-streaming-output"], "brings answers in pieces"),
        (["--update-weight-transport=nccl"], "use one of auto, ipc, disk, broadcast"),
        (["--update-weight-transport=disk"], "give --update-weight-disk-dir DIR"),
        (["--rollout-external-engine-addrs=h:30000"], "needs a folder that trainer and engine both see"),
        (["--rollout.sglang-address=h:30000"], "expected http://HOST:PORT"),
        (["--rollout.sglang-python=/absent/python"], "'/absent/python': no such file"),
        (["--rollout.sglang-start-timeout-s=0"], "must be above 0 seconds"),
    ],
)
def test_what_sglang_cannot_do_is_refused_with_what_to_do_instead(arguments, message):
    validate(from_flags(*GOOD, *SGLANG))
    with pytest.raises(ConfigError, match=message) as caught:
        validate(from_flags(*GOOD, *SGLANG, *arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("recipes/*.toml")), ids=lambda path: path.name)
def test_every_recipe_is_possible_once_it_has_its_files(recipe):
    warnings = validate(from_flags(*SOURCES, "--eval-prompt-data=e.jsonl", recipe=recipe))
    assert not [line for line in warnings if "reproducible" not in line]


def test_a_cost_table_is_the_embedded_engines(tmp_path):
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"cost_table .* with SGLang: give --sglang-speculative-adaptive"):
        validate(from_flags(*GOOD, *SGLANG, f"--rollout.cost_table={tmp_path}/t.json"))


@pytest.mark.parametrize(
    "argument",
    [
        "--rollout.min-p=0.1",
        "--allow-lossy",
        "--offload",
        "--colocate",
        "--rollout-external-engine-addrs=h:1",
        "--update-weight-transport=disk",
        "--update-weight-disk-dir=d",
        "--sglang-mem-fraction-static=0.3",
        "--rollout.sglang-python=p",
        "--rollout.sglang-start-timeout-s=5",
    ],
)
def test_what_the_embedded_engine_would_leave_aside_is_refused(argument):
    with pytest.raises(ConfigError, match="is for SGLang alone: add --engine sglang"):
        validate(from_flags(*GOOD, argument))


def test_generate_warns_of_seeds_too(capsys):
    for engine, warned in (("sglang", 1), ("torch", 0)):
        generate._config(None, [Override("", "rollout.engine", engine), Override("", "rollout.controller", "fixed")])
        assert capsys.readouterr().err.count("ignores seeds while verifying") == warned


def test_a_servers_flag_may_be_spelt_with_hyphens_in_a_recipe(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("[rollout.sglang]\nspeculative-adaptive = true\n")
    assert load_config(recipe).rollout.sglang == {"speculative_adaptive": True}
    recipe.write_text("[rollout.sglang]\npage-size = 1\npage_size = 2\n")
    with pytest.raises(ConfigError, match="has both page-size and page_size: they are one flag"):
        load_config(recipe)


def test_sglang_warns_once_of_each_thing():
    (seeds,) = validate(from_flags(*GOOD, *SGLANG))
    assert "ignores seeds while verifying" in seeds and "reproducible = false" in seeds
    depth, _ = validate(from_flags(*GOOD, "--engine=sglang"))
    assert "always drafts 3 tokens" in depth and "--sglang-speculative-adaptive" in depth
    _, unwatched = validate(from_flags(*GOOD, "--engine=sglang", "--sglang-speculative-adaptive"))
    assert "sentinel watches nothing" in unwatched and "speculative_adaptive" in unwatched
    rounded, _ = validate(from_flags(*GOOD, *SGLANG, "--sglang-kv-cache-dtype=fp8_e4m3"))
    assert "kv_cache_dtype = 'fp8_e4m3'" in rounded and "use_tis" in rounded
    lossy, *_ = validate(from_flags(*GOOD, *SGLANG, "--rollout.min-p=0.1", "--allow-lossy"))
    assert "min_p = 0.1" in lossy and "do not follow the policy's law" in lossy


@pytest.mark.parametrize("exact", ["--speculative-num-steps=1", "--rollout-temperature=0"])
def test_an_ngram_in_sglang_is_let_through_where_its_filling_changes_nothing(exact):
    arguments = [*SGLANG, "--speculative-algorithm=NGRAM", "--rollout.verify-rule=target_only", exact]
    config = from_flags(*GOOD, *arguments)
    assert lossy_settings(config.rollout) == []
    assert len(lossy_settings(replace(config.rollout, temperature=1.0, speculative_num_steps=2))) == 1


def test_without_speculation_sglang_takes_min_p():
    _, warning = validate(from_flags(*GOOD, *SGLANG, "--speculative-algorithm=NONE", "--rollout.min-p=0.1"))
    assert "rollout.min_p = 0.1 in training" in warning


def test_the_target_only_rule_takes_a_reduced_draft_vocabulary_in_sglang():
    reduced = ("--draft.draft-vocab-size=64", "--rollout.verify-rule=target_only")
    validate(from_flags(*GOOD, *SGLANG, *reduced))
    at = ("--rollout.sglang-address=http://127.0.0.1:30000", "--update-weight-disk-dir=d")
    with pytest.raises(ConfigError, match="has the tokens of its draft already"):
        validate(from_flags(*GOOD, *SGLANG, *reduced, *at))
    validate(from_flags(*GOOD, *SGLANG, *reduced, *at, "--speculative-draft-model-path=d"))


def test_samples_must_divide_over_data_parallel_ranks():
    validate(from_flags(*GOOD), world_size=4)
    validate(from_flags(*GOOD, "--tensor-model-parallel-size=3"), world_size=6)
    with pytest.raises(ConfigError, match="over 3 data-parallel ranks"):
        validate(from_flags(*GOOD), world_size=3)


def test_dtypes_that_differ_warn():
    (warning,) = validate(from_flags(*GOOD, "--bf16"))
    assert "policy.dtype = 'bfloat16'" in warning and "rollout.dtype = 'float32'" in warning
    assert validate(from_flags(*GOOD, "--bf16", "--dtype=bfloat16")) == []


def test_a_chain_deeper_than_the_training_warns():
    deep = ("--speculative-num-steps=5", "--draft.unroll=4")
    (warning,) = validate(from_flags(*GOOD, *deep))
    assert "beyond the first 4 are never trained" in warning and "--draft.unroll 5" in warning
    for cured in ("--draft.unroll=5", "--draft.train-when=never", "--speculative-algorithm=NONE"):
        assert validate(from_flags(*GOOD, *deep, cured)) == []


def test_filters_in_training_and_ngram_rejection_warn():
    assert "top_p = 0.9 and top_k = 5" in validate(from_flags(*GOOD, "--rollout-top-p=0.9", "--rollout-top-k=5"))[0]
    assert "sentinel watches nothing" in validate(from_flags(*GOOD, "--rollout-top-p=0.9"))[1]
    assert len(validate(from_flags(*GOOD, "--rollout-top-p=0.9", "--speculation.sentinel=false"))) == 1
    assert "point masses" in validate(from_flags(*GOOD, "--speculative-algorithm=NGRAM"))[0]
    assert validate(from_flags(*GOOD, "--speculative-algorithm=NGRAM", "--rollout.verify-rule=target_only")) == []


def test_determinism_with_a_fixed_depth_or_without_speculation_is_fine(tmp_path):
    assert validate(from_flags(*GOOD, "--deterministic", "--rollout.controller=fixed")) == []
    table = tmp_path / "t.json"
    table.write_text("{}")
    assert validate(from_flags(*GOOD, "--deterministic", f"--rollout.cost_table={table}")) == []
    assert validate(from_flags(*GOOD, "--deterministic", "--speculative-algorithm=NONE")) == []


def test_later_overrides_win():
    overrides = [Override("--seed", "seed", "1"), Override("--seed", "seed", "2")]
    assert load_config(None, overrides).seed == 2


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--num-rollout=9"], "num_rollout = 9 ends before"),
        (["--speculative-algorithm=NONE"], "has no draft to freeze"),
        (["--draft.train=false"], "the draft itself is frozen"),
        (["--draft.train-when=never"], "the draft itself is frozen"),
    ],
)
def test_a_frozen_draft_that_will_never_be_scored_is_warned_of(arguments, why):
    assert validate(from_flags(*GOOD, "--frozen-draft-step=9")) == []
    (warning,) = validate(from_flags(*GOOD, "--frozen-draft-step=9", *arguments))
    assert why in warning and "no frozen_accept_length is recorded" in warning
