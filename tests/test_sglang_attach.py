"""A server that runs already is refused when it is another one than the settings describe, or a lossy one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollout_engine.config import RolloutConfig
from rollout_engine.sglang_attach import attach_faults

POLICY = Path("/models/policy")
PLAIN = RolloutConfig(engine="sglang", speculative_algorithm="NONE", dtype="float32", max_running_requests=32)
EAGLE3 = replace(PLAIN, speculative_algorithm="EAGLE3", speculative_num_steps=3)
INFO = {
    "version": "0.5.20",
    "model_path": "/elsewhere/policy",
    "dtype": "float32",
    "quantization": None,
    "speculative_algorithm": None,
    "context_length": 48,
    "max_running_requests": 32,
    "tp_size": 1,
    "custom_weight_loader": ["sync.loader.load"],
}
SPECULATING = INFO | {
    "device": "cuda",
    "speculative_algorithm": "EAGLE3",
    "speculative_num_draft_tokens": 4,
    "speculative_num_steps": 3,
    "speculative_eagle_topk": 1,
    "speculative_adaptive": False,
    "speculative_use_rejection_sampling": True,
    "speculative_accept_threshold_single": 1.0,
    "speculative_accept_threshold_acc": 1.0,
}

STARTED = {
    "attention_backend": "triton",
    "port": 30000,
    "log_level": "info",
    "mem_fraction_static": 0.5,
    "disable_radix_cache": True,
    "log_requests": None,
    "json_model_override_args": '{"a": 1}',
}


def faults(info: dict[str, Any], config: RolloutConfig) -> str:
    return "; ".join(attach_faults(info, config, POLICY, 40))


def test_one_as_it_would_be_started_is_taken() -> None:
    assert faults(INFO, PLAIN) == faults(SPECULATING, EAGLE3) == ""
    assert faults({}, PLAIN) == "what answers there does not describe itself as SGLang: start one with slipstream serve"
    assert "speculative_algorithm = None" in faults(INFO, EAGLE3)
    assert "speculative_algorithm = 'EAGLE3', the run asks for None" in faults(SPECULATING, PLAIN)


def test_all_differences_are_named_at_once() -> None:
    changed = {"dtype": "bfloat16", "context_length": 30, "custom_weight_loader": [], "model_path": "/other"}
    found = faults(INFO | changed, PLAIN)
    for expected in ("dtype = 'bfloat16'", "context_length = 30", "custom-weight-loader", "model_path = '/other'"):
        assert expected in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speculative_accept_threshold_single": 0.5}, "threshold_single = 0.5: below 1.0 it keeps draft tokens"),
        ({"speculative_accept_threshold_acc": 0.9}, "threshold_acc = 0.9: below"),
        ({"speculative_eagle_topk": 4}, "speculative_eagle_topk = 4, the run asks for 1"),
        ({"speculative_num_steps": 2}, "speculative_num_steps = 2, the run asks for 3"),
        ({"speculative_num_draft_tokens": 8}, "speculative_num_draft_tokens = 8"),
        ({"speculative_use_rejection_sampling": False}, "rejection_sampling = False, the run asks for True"),
        ({"max_running_requests": 16}, "max_running_requests = 16 at once, the run asks for 32"),
        ({"tp_size": 2}, "tp_size = 2, the run asks for 1"),
        ({"quantization": "fp8"}, "quantization = 'fp8'"),
        ({"incremental_streaming_output": True}, "incremental_streaming_output = True, the run asks for False"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype = 'fp8_e4m3', the run asks for 'auto'"),
        ({"kv_cache_dtype": "bf16"}, "kv_cache_dtype = 'bf16', the run asks for 'auto'"),  # its models are float32
        ({"preferred_sampling_params": {"min_p": 0.1}}, "changes every request by preferred_sampling_params"),
    ],
)
def test_a_difference_is_named(change: dict[str, Any], message: str) -> None:
    assert message in faults(SPECULATING | change, EAGLE3)


def test_lossy_ones_can_be_allowed_and_plain_ones_have_no_thresholds() -> None:
    lossy = {"speculative_accept_threshold_single": 0.5}
    assert faults(SPECULATING | lossy, replace(EAGLE3, allow_lossy=True)) == ""
    assert faults(INFO | lossy, PLAIN) == ""
    assert "preferred" in faults(INFO | {"preferred_sampling_params": '{"min_p": 0.1}'}, PLAIN)


def test_kv_of_the_models_own_kind_has_several_names() -> None:
    in_bfloat16 = replace(PLAIN, dtype="bfloat16")
    for name in ("auto", None, "bf16", "bfloat16"):
        assert faults(INFO | {"dtype": "bfloat16", "kv_cache_dtype": name}, in_bfloat16) == ""
    narrow = replace(PLAIN, sglang={"kv_cache_dtype": "fp8_e5m2"})
    assert faults(INFO | {"kv_cache_dtype": "fp8_e5m2"}, narrow) == ""
    assert "kv_cache_dtype = 'auto', the run asks for 'fp8_e5m2'" in faults(INFO | {"kv_cache_dtype": "auto"}, narrow)
    assert faults(INFO | {"incremental_streaming_output": False}, PLAIN) == ""


def test_one_that_caps_its_requests_in_silence() -> None:
    assert "48 at once" in faults(
        SPECULATING | {"max_running_requests": None}, replace(EAGLE3, max_running_requests=64)
    )
    assert faults(INFO | {"max_running_requests": None}, replace(PLAIN, max_running_requests=64)) == ""


def test_memory_can_only_be_given_back_by_one_that_saves_it() -> None:
    offloading, saves = replace(PLAIN, offload=True), {"enable_memory_saver": True}
    assert "enable_memory_saver = None, the run asks for True" in faults(INFO, offloading)
    assert faults(INFO | saves, offloading) == ""
    with_draft = replace(EAGLE3, offload=True)
    for backup in ({}, {"enable_draft_weights_cpu_backup": False}):
        assert "draft_weights_cpu_backup = " in faults(SPECULATING | saves | backup, with_draft)
    assert faults(SPECULATING | saves | {"enable_draft_weights_cpu_backup": True}, with_draft) == ""
    assert faults(SPECULATING | {"enable_draft_weights_cpu_backup": False}, EAGLE3) == ""


def test_a_depth_that_changes_must_be_asked_for() -> None:
    adaptive = SPECULATING | {"speculative_adaptive": True}
    assert "speculative_adaptive = True, the run asks for False" in faults(adaptive, EAGLE3)
    for name in ("speculative_adaptive", "speculative-adaptive"):
        assert faults(adaptive, replace(EAGLE3, sglang={name: True})) == ""
        assert "adaptive = False, the run asks for True" in faults(SPECULATING, replace(EAGLE3, sglang={name: True}))
    without = {name: value for name, value in SPECULATING.items() if name != "speculative_adaptive"}
    assert faults(without, EAGLE3) == "", "an SGLang that does not know it"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"attention_backend": "flashinfer"},
            "it runs with attention_backend = 'triton', the run asks for 'flashinfer': start the server with it, or "
            "leave --sglang-attention-backend out where SGLang itself changes it",
        ),
        ({"no_such_flag": 3}, "it names no flag no_such_flag: leave --sglang-no-such-flag out"),
        ({"atention_backend": "triton"}, "it names no flag atention_backend (did you mean attention_backend?): leave"),
        ({"port": 1}, "port = 30000, the run asks for 1"),
        ({"log_level": "debug"}, "log_level = 'info', the run asks for 'debug'"),
        ({"mem_fraction_static": 0.4}, "mem_fraction_static = 0.5, the run asks for 0.4"),
        ({"disable_radix_cache": False}, "disable_radix_cache = True, the run asks for False"),
        ({"log_requests": True}, "log_requests = None, the run asks for True"),
    ],
)
def test_a_flag_that_the_server_was_not_started_with_is_named(flags: dict[str, Any], message: str) -> None:
    assert message in faults(INFO | STARTED, replace(PLAIN, sglang=flags))


def test_flags_that_the_server_was_started_with_are_taken() -> None:
    same = {"attention-backend": "triton", "port": 30000, "mem_fraction_static": 0.5, "disable_radix_cache": True}
    as_command_line = {"log_requests": False, "json_model_override_args": {"a": 1}}
    assert faults(INFO | STARTED, replace(PLAIN, sglang=same | as_command_line)) == ""
