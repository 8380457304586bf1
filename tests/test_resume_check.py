"""A resumed run keeps its settings, except those that its checkpoint does not depend on."""

from dataclasses import replace

import pytest

from trainer.config import ConfigError, PolicyConfig, RunConfig
from trainer.resume_check import check_resumed, flat_settings

CONFIG = RunConfig(policy=PolicyConfig(lr=1e-5, megatron={"swiglu": True}))


def with_policy(**changes):
    return replace(CONFIG, policy=replace(CONFIG.policy, **changes))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (with_policy(lr=1e-4), "policy.lr = 0.0001, but the checkpoint to resume was made with 1e-05"),
        (with_policy(megatron={}), "policy.megatron.swiglu = None, .* with True"),
        (replace(CONFIG, draft=replace(CONFIG.draft, lr=1.0)), "draft.lr = 1.0, .* with 0.001"),
        (replace(CONFIG, rollout=replace(CONFIG.rollout, speculative_num_steps=5)), "num_steps = 5, .* with 3"),
        (replace(CONFIG, seed=7), "seed = 7, .* with 0"),
    ],
)
def test_another_setting_is_refused_with_both_values(changed, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_resumed(flat_settings(CONFIG), changed)
    assert "\n" not in str(caught.value)


def test_what_may_change():
    data = replace(CONFIG.data, num_eval_prompts=3, eval_prompt_data="e.jsonl")
    changed = replace(CONFIG, resume=True, name="b", run_dir="r", save_interval=1, eval_interval=1, data=data)
    check_resumed(flat_settings(CONFIG), replace(changed, num_rollout=99, plain_probe_interval=4))


def test_an_sglang_run_may_move_but_no_run_changes_its_engine():
    elsewhere = replace(CONFIG.rollout, sglang_address="http://h:1", sync_dir="d", sglang={"port": 3})
    check_resumed(flat_settings(CONFIG), replace(CONFIG, rollout=elsewhere))
    with pytest.raises(ConfigError, match=r"rollout.engine = 'sglang', but the checkpoint .* made with 'torch'"):
        check_resumed(flat_settings(CONFIG), replace(CONFIG, rollout=replace(CONFIG.rollout, engine="sglang")))


def test_a_checkpoint_from_before_a_setting_was_made_with_its_default():
    old = flat_settings(CONFIG)
    del old["rollout.min_p"], old["rollout.allow_lossy"]
    check_resumed(old, CONFIG)
    with pytest.raises(ConfigError, match=r"rollout.min_p = 0.1, .* with 0.0"):
        check_resumed(old, replace(CONFIG, rollout=replace(CONFIG.rollout, min_p=0.1)))


def test_a_run_is_extended_only_when_its_schedule_does_not_hang_on_its_length():
    linear = with_policy(lr_decay_style="linear")
    with pytest.raises(ConfigError, match=r"num_rollout = 40, .* with 20, over which policy.lr_decay_style = 'linear'"):
        check_resumed(flat_settings(linear), replace(linear, num_rollout=40))
    fixed = with_policy(lr_decay_style="linear", lr_decay_iters=20)
    check_resumed(flat_settings(fixed), replace(fixed, num_rollout=40))
    check_resumed(flat_settings(linear), linear)
