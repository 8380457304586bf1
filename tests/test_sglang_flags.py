"""With which flags a server is started, and what of its memory is asked for."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout_engine import sglang_launch
from rollout_engine.config import RolloutConfig
from rollout_engine.memory import (
    MemoryNeed,
    TrainerNeed,
    count_parameters,
    memory_needed,
    most_share,
    static_fraction,
    trainer_needed,
)
from rollout_engine.sglang_checks import check_sglang
from rollout_engine.sglang_flags import check_draft_fits, command_line, server_settings
from rollout_engine.sglang_install import Installation
from rollout_engine.sglang_preflight import Ready
from rollout_engine.types import EngineConfigError

PLAIN = RolloutConfig(engine="sglang", speculative_algorithm="NONE", max_running_requests=128)
EAGLE3 = replace(PLAIN, speculative_algorithm="EAGLE3", speculative_num_steps=3)
POLICY, DRAFT = Path("/models/policy"), Path("/models/draft")


def settings(config: RolloutConfig, device: str = "cuda", **overrides: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "device": device,
        "context_length": 1000,
        "mem_fraction_static": 0.4,
        "has_flashinfer": True,
        "has_tokenizer": True,
        "extra": config.sglang,
    }
    draft = DRAFT if config.speculative_algorithm == "EAGLE3" else None
    return server_settings(config, POLICY, draft, **(given | overrides))


def test_flags_of_plain_decoding() -> None:
    found = settings(PLAIN)
    assert found["max_running_requests"] == found["cuda_graph_max_bs_decode"] == 128
    assert found["context_length"] == 1008, "SGLang itself ends two tokens before its context is full"
    assert found["max_total_tokens"] >= 128 * 1000
    assert (found["attention_backend"], found["sampling_backend"]) == ("flashinfer", "flashinfer")
    assert found["grammar_backend"] == "none" and found["custom_weight_loader"] == ["sync.loader.load"]
    assert found["mem_fraction_static"] == 0.4 and not found["skip_tokenizer_init"]
    assert not [name for name in found if name.startswith("speculative")] and "enable_memory_saver" not in found
    without = settings(PLAIN, has_flashinfer=False)
    assert (without["attention_backend"], without["sampling_backend"]) == ("triton", "pytorch")


def test_flags_of_eagle3() -> None:
    found = settings(EAGLE3)
    speculative = {name: value for name, value in found.items() if name.startswith("speculative")}
    assert speculative == {
        "speculative_algorithm": "EAGLE3",
        "speculative_draft_model_path": "/models/draft",
        "speculative_num_steps": 3,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 4,
        "speculative_use_rejection_sampling": True,
    }
    target_only = settings(replace(EAGLE3, verify_rule="target_only"))
    assert "speculative_use_rejection_sampling" not in target_only


def test_flags_of_ngram() -> None:
    found = settings(replace(PLAIN, speculative_algorithm="NGRAM", speculative_num_steps=4, ngram_max_match=8))
    assert found["speculative_num_draft_tokens"] == 5
    assert found["speculative_ngram_min_bfs_breadth"] == found["speculative_ngram_max_bfs_breadth"] == 1
    assert found["speculative_ngram_max_trie_depth"] == 12


def test_flags_of_offload() -> None:
    assert settings(replace(PLAIN, offload=True))["enable_memory_saver"] is True
    assert "enable_draft_weights_cpu_backup" not in settings(replace(PLAIN, offload=True))
    assert settings(replace(EAGLE3, offload=True))["enable_draft_weights_cpu_backup"] is True


def test_flags_on_a_cpu() -> None:
    found = settings(PLAIN, device="cpu")
    assert found["attention_backend"] == "torch_native" and "cuda_graph_max_bs_decode" not in found
    greedy = replace(EAGLE3, temperature=0.0)
    assert settings(greedy, device="cpu")["attention_backend"] == "intel_amx"


def test_a_device_index_is_passed_on() -> None:
    assert settings(PLAIN, device="cuda:2")["base_gpu_id"] == 2


def test_an_idle_server_sleeps_unless_it_is_told_not_to() -> None:
    assert settings(PLAIN)["sleep_on_idle"] is True
    awake = settings(replace(PLAIN, sglang={"sleep_on_idle": False}))
    assert "--sleep-on-idle" not in command_line(awake)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.5])
def test_the_likeliest_token_alone_is_asked_for_at_temperature_0_or_1(temperature: float) -> None:
    config = replace(PLAIN, temperature=temperature, top_k=1)
    if temperature in (0.0, 1.0):
        check_sglang(config)
    else:
        with pytest.raises(EngineConfigError, match=rf"rollout\.top_k = 1 at temperature {temperature}.*log-probs"):
            check_sglang(config)
    check_sglang(replace(config, top_k=2))


def test_the_users_flags_win() -> None:
    config = replace(PLAIN, sglang={"mem_fraction_static": 0.7, "attention_backend": "triton"})
    found = settings(config)
    assert (found["mem_fraction_static"], found["attention_backend"]) == (0.7, "triton")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"custom_weight_loader": ["mine"]}, "custom_weight_loader belongs to the sync"),
        ({"speculative_adaptive": True}, "speculative_adaptive needs"),
        ({"ep_size": 2}, "ep_size = 2: an engine over several GPUs"),
        ({"expert_parallel_size": 2}, "expert_parallel_size = 2: an engine over several GPUs"),
        ({"enable_dp_attention": True}, "enable_dp_attention needs an engine over several GPUs"),
        *[({"port": port}, f"port = {port!r}: expected a TCP port, 1 to 65535") for port in ("abc", 99999, -1, 0)],
        ({"port": True}, "port = True: expected"),
        *[
            ({"mem_fraction_static": share}, f"mem_fraction_static = {share!r}: expected a share")
            for share in ("abc", 3, 0, 1.0, -0.5, float("nan"), True)
        ],
        ({"skip_tokenizer_init": True}, r"skip_tokenizer_init with rollout\.stop = \['END'\]"),
    ],
)
def test_flags_that_contradict_the_engine_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineConfigError, match=message):
        check_sglang(replace(PLAIN, sglang=flags, stop=("END",)))


def test_flags_that_fit_are_let_through() -> None:
    flags = {"port": 30000, "mem_fraction_static": 0.3, "ep_size": 1, "enable_dp_attention": False}
    assert check_sglang(replace(PLAIN, sglang=flags)) == []
    assert check_sglang(replace(EAGLE3, controller="fixed", sglang={"speculative_adaptive": True})) == []
    assert check_sglang(replace(PLAIN, sglang={"skip_tokenizer_init": True})) == []


def test_random_weights_are_warned_of() -> None:
    (warning,) = check_sglang(replace(PLAIN, sglang={"load_format": "dummy"}))
    assert "load_format = 'dummy': the server starts with random weights" in warning


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:99999", "http://127.0.0.1:0", "http://a:123456789", "http://a:1,http://b:2", "foo"]
)
def test_an_address_that_nothing_can_listen_at_is_refused(address: str) -> None:
    with pytest.raises(EngineConfigError, match="expected http://HOST:PORT of one server"):
        check_sglang(replace(PLAIN, sglang_address=address))
    check_sglang(replace(PLAIN, sglang_address="https://somewhere:65535"))


def test_a_draft_is_given_exactly_for_eagle3() -> None:
    given: dict[str, Any] = {"device": "cuda", "context_length": 9, "mem_fraction_static": None}
    given |= {"has_flashinfer": True, "has_tokenizer": True, "extra": {}}
    with pytest.raises(EngineConfigError, match="needs a draft folder"):
        server_settings(EAGLE3, POLICY, None, **given)
    with pytest.raises(EngineConfigError, match="uses no draft"):
        server_settings(PLAIN, POLICY, DRAFT, **given)


def test_flags_become_words() -> None:
    words = command_line(
        {"a_b": 1, "on": True, "off": False, "none": None, "many": [1, 2], "table": {"x": [3]}, "renamed": "y"},
        {"renamed": "other_name"},
    )
    assert words == ["--a-b", "1", "--on", "--many", "1", "2", "--table", '{"x": [3]}', "--other-name", "y"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLMEagle3"),
        ({"vocab_size": 90}, "vocab_size 90, the policy has 100"),
        ({"target_hidden_size": 32}, "hidden size of the target 32, the policy has 64"),
    ],
)
def test_a_draft_that_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    policy = {"vocab_size": 100, "hidden_size": 64}
    draft = {"architectures": ["LlamaForCausalLMEagle3"], "vocab_size": 100, "hidden_size": 64}
    check_draft_fits(policy, draft, Path("draft/config.json"))
    with pytest.raises(EngineConfigError, match=message):
        check_draft_fits(policy, draft | change, Path("draft/config.json"))


LLAMA_8B = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
}
GIB = 1024**3


def test_memory_of_an_8b_model() -> None:
    draft = LLAMA_8B | {"num_hidden_layers": 1}
    need = memory_needed(
        LLAMA_8B, draft, policy_params=8 * 10**9, draft_params=10**9, itemsize=2, num_slots=64, tokens_per_slot=4096
    )
    assert need.kv_bytes_per_token == 33 * 2 * 8 * 128 * 2
    assert need.policy_bytes == 16 * 10**9 and need.draft_bytes == 2 * 10**9
    assert need.kv_bytes == 64 * need.one_slot_bytes == 64 * 4096 * 135_168
    assert "policy 14.90 GiB, draft 1.86 GiB, KV 33.00 GiB for 64 requests of 4096 tokens" in str(need)


def test_the_share_is_what_is_needed_and_leaves_room() -> None:
    need = MemoryNeed(10 * GIB, 1 * GIB, 1024, num_slots=16, tokens_per_slot=2**20)  # KV 16 GiB
    assert static_fraction(need, 100 * GIB, most=0.5) == pytest.approx(27 * 1.1 / 100, abs=1e-3)
    assert static_fraction(need, 40 * GIB, most=0.5) == 0.5, "some requests wait for KV"
    assert static_fraction(need, 10_000 * GIB, most=0.5) == 0.1


def told(need: MemoryNeed, free_gib: float, most: float, trainer: TrainerNeed | None = None, **how: bool) -> str:
    """What the user reads of a share that is too small."""
    with pytest.raises(EngineConfigError) as raised:
        static_fraction(need, int(free_gib * GIB), most, trainer, **how)
    assert "max_running_requests" not in str(raised.value), "the least that is needed is of one request"
    return str(raised.value)


def test_a_gpu_that_is_too_small_is_told_in_numbers() -> None:
    need = MemoryNeed(10 * GIB, 1 * GIB, 1024, num_slots=16, tokens_per_slot=2**20)
    assert told(need, 20, 0.5) == (
        "the GPU is too small: 20.00 GiB are free, of which the engine may take 50% "
        "(rollout.sglang.mem_fraction_static); it needs policy 10.00 GiB, draft 1.00 GiB, KV 16.00 GiB for 16 requests "
        "of 1048576 tokens (1.00 GiB each), at the least 13.20 GiB for the models, one request and a margin; take a "
        "smaller model or a GPU with more free memory"
    )


def test_a_shorter_context_is_advised_where_the_models_have_room() -> None:
    need = MemoryNeed(10 * GIB, 1 * GIB, 1024, num_slots=16, tokens_per_slot=2**20)
    found = re.search(r"; lower rollout\.context_length to (\d+) or less, or take a smaller", told(need, 15, 0.85))
    assert found
    shorter = replace(need, tokens_per_slot=int(found.group(1)))
    assert static_fraction(shorter, 15 * GIB, 0.85) == 0.85
    longer = replace(need, tokens_per_slot=int(found.group(1)) + 1)
    assert "lower rollout.context_length" in told(longer, 15, 0.85)


def test_a_share_of_the_users_own_that_is_too_small_is_to_be_raised() -> None:
    need = MemoryNeed(10 * GIB, 1 * GIB, 1024, num_slots=16, tokens_per_slot=2**20)
    found = told(need, 140, 0.05, is_given=True)
    assert found.startswith("rollout.sglang.mem_fraction_static = 0.05 is too small: 140.00 GiB are free, of which")
    assert "policy 10.00 GiB" in found and found.endswith("; raise it to at least 0.095, or leave it out")
    assert static_fraction(need, 140 * GIB, 0.095, is_given=True) == 0.095
    growing = TrainerNeed(policy_bytes=60 * GIB, capture_bytes=18 * GIB)  # leaves 7 % of 100 GiB
    assert "; leave it out, and set rollout.offload = true, or " in told(need, 100, 0.05, growing, is_given=True)
    capped = most_share(100 * GIB, growing, offload=False)  # what the user said is no less than we would give
    assert "; leave it out, and set rollout.offload = true, or " in told(need, 100, capped, growing, is_given=True)
    assert "is too small: 12.00 GiB are free" in told(need, 12, 0.9, is_given=True)
    assert "raise" not in told(need, 12, 0.9, is_given=True)


def test_what_a_trainer_is_yet_to_take() -> None:
    sizes = {"policy_params": 600, "draft_params": 100, "itemsize": 2, "capture_bytes": 5000}
    alone = trainer_needed(adam_params=600, trains_draft=True, gathers=False, **sizes)
    assert alone == TrainerNeed(policy_bytes=4800, draft_bytes=1200, sync_bytes=1400, capture_bytes=5000)
    assert alone.beside_engine_bytes(offload=True) == 7400, "while states are captured the engine's KV is away"
    assert alone.beside_engine_bytes(offload=False) == 12400
    of_four = trainer_needed(adam_params=150, trains_draft=False, gathers=True, **sizes)
    assert of_four == TrainerNeed(policy_bytes=1200, draft_bytes=0, sync_bytes=2600, capture_bytes=5000)


def test_a_trainer_that_will_grow_is_left_its_room() -> None:
    """The sizes of recipes/gpu-eagle3.toml on 80 GB: with 85 % the KV would not come back after the first step."""
    trainer = TrainerNeed(int(4.4 * GIB), 2 * GIB, int(1.5 * GIB), int(4.3 * GIB))
    free_bytes = 72 * GIB
    most = most_share(free_bytes, trainer, offload=True)
    assert most * free_bytes == pytest.approx((0.85 * 72 - 7.9) * GIB)
    assert most_share(free_bytes, None, offload=True) == 0.85
    assert most_share(free_bytes, trainer, offload=False) == 0.5, "activations need the rest"
    assert most_share(24 * GIB, trainer, offload=False) == pytest.approx(0.85 - 12.2 / 24)
    assert most_share(4 * GIB, trainer, offload=True) == 0.0
    need = MemoryNeed(GIB, GIB // 2, 1024, num_slots=16, tokens_per_slot=2**20)
    found = told(need, 8, most_share(8 * GIB, trainer, offload=True), trainer, offload=True)
    assert re.search(r"too small: 8\.00 GiB .*policy 1\.00 GiB, draft 0\.50 GiB, KV 16\.00 GiB .*", found)
    assert re.search(
        r"trainer will take Adam of the.*; spread Adam over more GPUs .*, or take a smaller model or a GPU", found
    )
    found = told(need, 1, most_share(GIB, trainer, offload=True), trainer, offload=True)
    assert re.search("take 0%.*will take.*; take a smaller model or a GPU with more free memory$", found)


def test_what_is_advised_beside_a_trainer_would_be_enough() -> None:
    need = MemoryNeed(GIB, GIB // 2, 1024, num_slots=16, tokens_per_slot=2**20)  # 2.75 GiB at the least
    capturing = TrainerNeed(policy_bytes=GIB // 2, capture_bytes=4 * GIB + GIB // 2)
    assert most_share(8 * GIB, capturing, offload=True) * 8 > 2.75 > most_share(8 * GIB, capturing, offload=False) * 8

    def advice(trainer: TrainerNeed, *, offload: bool) -> str:
        return told(need, 8, most_share(8 * GIB, trainer, offload=offload), trainer, offload=offload).split("; ")[-1]

    assert advice(capturing, offload=False) == (
        "set rollout.offload = true, or lower draft.capture_max_bytes, or lower rollout.context_length to 142987 or "
        "less, or take a smaller model or a GPU with more free memory"
    )
    stepping = TrainerNeed(policy_bytes=5 * GIB, capture_bytes=GIB)
    assert advice(stepping, offload=True).startswith("spread Adam over more GPUs (policy.use_distributed_optimizer"), (
        "no captured states are in the way"
    )
    assert "rollout.offload" not in advice(stepping, offload=False), "it would not be enough"


def test_a_server_is_told_a_share_that_leaves_the_trainer_its_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | {"num_hidden_layers": 16, "num_key_value_heads": 8}))
    save_file({"a": torch.zeros(1000)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (72 * GIB, 80 * GIB))
    config = replace(PLAIN, offload=True, dtype="bfloat16", max_running_requests=256)
    ready = Ready(Installation("python", tmp_path, "0.5.20", True, True), "cuda", {}, {})

    def share(ready: Ready, trainer: TrainerNeed | None) -> float | None:
        return sglang_launch._memory_share(config, tmp_path, None, ready, 4096, trainer)

    assert share(ready, None) == 0.85 and "trainer" not in caplog.text
    assert share(ready, TrainerNeed(policy_bytes=18 * GIB, capture_bytes=9 * GIB)) == 0.6
    assert "of 72.00 GiB free the engine may take 60%" in caplog.text and "Adam of the policy 18.00 GiB" in caplog.text
    given = replace(ready, flags={"mem_fraction_static": 0.7})
    assert share(given, TrainerNeed(policy_bytes=18 * GIB)) == 0.7, "the user's word"
    tiny = replace(ready, flags={"mem_fraction_static": 0.001})
    with pytest.raises(EngineConfigError, match=r"mem_fraction_static = 0\.001 is too small.*; raise it to at least "):
        share(tiny, None)
    with pytest.raises(EngineConfigError, match=r"the GPU is too small.*; spread Adam over more GPUs") as raised:
        share(ready, TrainerNeed(policy_bytes=62 * GIB, capture_bytes=9 * GIB))
    assert "rollout.offload" not in str(raised.value)


def test_parameters_are_counted_from_headers(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, tmp_path / "model-1.safetensors")
    save_file({"c": torch.zeros(2)}, tmp_path / "model-2.safetensors")
    assert count_parameters(tmp_path) == 19
    with pytest.raises(EngineConfigError, match="no safetensors"):
        count_parameters(tmp_path / "nowhere")
