"""The SGLang engine without SGLang: what it would start, say, and make of recorded answers of SGLang 0.5.20.

The real server is driven in tests/sglang (CPU) and tests/gpu.
"""

from __future__ import annotations

import base64
import json
import pickle
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout_engine.config import RolloutConfig
from rollout_engine.memory import MemoryNeed, count_parameters, memory_needed, static_fraction
from rollout_engine.request_pool import Progress
from rollout_engine.server_process import free_port
from rollout_engine.sglang_engine import SGLangEngine
from rollout_engine.sglang_flags import check_draft_fits, command_line, server_settings
from rollout_engine.sglang_install import canonical, find_sglang, known_flags, read_version, update_protocol
from rollout_engine.sglang_launch import attach_faults
from rollout_engine.sglang_wire import (
    error_text,
    failure_cause,
    generate_body,
    plain_stats,
    read_piece,
    spec_stats,
    update_body,
)
from rollout_engine.types import (
    BadRequest,
    EngineConfigError,
    EngineError,
    FinishReason,
    RolloutRequest,
    SamplingParams,
    SpecStats,
    VersionSpan,
)
from sync.plan import SyncError
from tests.sglang_server_helpers import ScriptedServer

PLAIN = RolloutConfig(engine="sglang", speculative_algorithm="NONE", max_running_requests=128)
EAGLE3 = replace(PLAIN, speculative_algorithm="EAGLE3", speculative_num_steps=3)
POLICY, DRAFT = Path("/models/policy"), Path("/models/draft")


def settings(config: RolloutConfig, device: str = "cuda", **overrides: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "device": device,
        "context_length": 1000,
        "port": 30000,
        "mem_fraction_static": 0.4,
        "has_flashinfer": True,
        "has_tokenizer": True,
        "extra": config.sglang,
    }
    draft = DRAFT if config.speculative_algorithm == "EAGLE3" else None
    return server_settings(config, POLICY, draft, **(given | overrides))


# ---------------------------------------------------------------- flags


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
    with pytest.raises(EngineConfigError, match=r"temperature = 1\.0 .*verifies greedily"):
        settings(EAGLE3, device="cpu")
    assert settings(replace(EAGLE3, allow_lossy=True), device="cpu")


def test_a_device_index_is_passed_on() -> None:
    assert settings(PLAIN, device="cuda:2")["base_gpu_id"] == 2


def test_the_users_flags_win() -> None:
    config = replace(PLAIN, sglang={"mem_fraction_static": 0.7, "attention_backend": "triton"})
    found = settings(config)
    assert (found["mem_fraction_static"], found["attention_backend"]) == (0.7, "triton")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(PLAIN, sglang={"custom_weight_loader": ["mine"]}), "custom_weight_loader"),
        (replace(PLAIN, sglang={"speculative_adaptive": True}), "speculative_adaptive needs"),
    ],
)
def test_flags_that_contradict_the_engine_are_refused(config: RolloutConfig, message: str) -> None:
    with pytest.raises(EngineConfigError, match=message):
        settings(config)


def test_a_draft_is_given_exactly_for_eagle3() -> None:
    given: dict[str, Any] = {"device": "cuda", "context_length": 9, "port": 1, "mem_fraction_static": None}
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


# ---------------------------------------------------------------- the installation


def write_package(folder: Path, layout: str) -> Path:
    """A package that declares flags as SGLang 0.5.15 ("old") or later versions ("new") do."""
    fields = """
from typing import Annotated as A
class Fields:
    model_path: A[str, Arg(help="path", aliases=["--model"])]
    tp_size: A[int, Arg(help="GPUs", cli_name="--tensor-parallel-size", aliases=["--tp-size"])] = 1
    mem_fraction_static: A[float, "share"] = 0.9
"""
    manual = """
class ServerArgs:
    def add_cli_args(parser):
        parser.add_argument("--reasoning-parser", type=str, help="not --a-flag")
"""
    arguments = folder / "srt" / "server_args.py"
    arguments.parent.mkdir(parents=True)
    if layout == "old":
        arguments.write_text(fields + manual)
    else:
        arguments.write_text(manual)
        (folder / "srt" / "arg_groups" / "fields").mkdir(parents=True)
        (folder / "srt" / "arg_groups" / "fields" / "model.py").write_text(fields)
    return folder


@pytest.mark.parametrize("layout", ["old", "new"])
def test_known_flags_are_read_without_importing(tmp_path: Path, layout: str) -> None:
    known = known_flags(write_package(tmp_path / "sglang", layout))
    assert known["model"] == known["model_path"] == "model_path"
    assert known["tensor_parallel_size"] == known["tp_size"] == "tp_size"
    assert known["reasoning_parser"] == "reasoning_parser" and "a_flag" not in known


def test_flags_get_the_names_of_their_fields(tmp_path: Path) -> None:
    known = known_flags(write_package(tmp_path / "sglang", "old"))
    assert canonical({"tensor-parallel-size": 1, "model": "m"}, known, "0.5.15") == {"tp_size": 1, "model_path": "m"}
    with pytest.raises(EngineConfigError, match=r"mem_fraction_statik: .*has no such flag, did you mean mem_fr"):
        canonical({"mem_fraction_statik": 0.3}, known, "0.5.15")
    with pytest.raises(EngineConfigError, match="given twice"):
        canonical({"tp_size": 1, "tensor_parallel_size": 1}, known, "0.5.15")


@pytest.mark.parametrize(
    ("version", "begin_end"),
    [("0.5.15.post1", False), ("0.5.20", False), ("0.5.22", False), ("0.5.23", True), ("0.5.23.post2", True)],
)
def test_the_update_protocol_goes_by_the_version(version: str, begin_end: bool) -> None:
    assert update_protocol(version) is begin_end


@pytest.mark.parametrize("version", ["0.5.14", "0.5.24", "0.6.0", "1.0", "unknown"])
def test_unknown_versions_are_refused(version: str) -> None:
    with pytest.raises(EngineConfigError, match=f"SGLang {version} is not known"):
        update_protocol(version)


def test_the_version_is_the_packages_own(tmp_path: Path) -> None:
    (tmp_path / "_version.py").write_text("__version__ = version = '0.5.15.post1'\n")
    assert read_version(tmp_path) == "0.5.15.post1"
    (tmp_path / "_version.py").write_text("")
    with pytest.raises(EngineConfigError, match="no version"):
        read_version(tmp_path)


def test_sglang_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(EngineConfigError, match=r"pip install '\.\[sglang\]'.*rollout\.sglang_python"):
        find_sglang(sys.executable)
    with pytest.raises(EngineConfigError, match="cannot be run"):
        find_sglang(str(tmp_path / "python"))


# ---------------------------------------------------------------- memory

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


def test_a_gpu_that_is_too_small_is_told_in_numbers() -> None:
    need = MemoryNeed(10 * GIB, 1 * GIB, 1024, num_slots=16, tokens_per_slot=2**20)
    with pytest.raises(EngineConfigError, match=r"too small: 20\.00 GiB are free.*50%.*policy 10\.00 GiB, draft 1\.00"):
        static_fraction(need, 20 * GIB, most=0.5)


def test_parameters_are_counted_from_headers(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, tmp_path / "model-1.safetensors")
    save_file({"c": torch.zeros(2)}, tmp_path / "model-2.safetensors")
    assert count_parameters(tmp_path) == 19
    with pytest.raises(EngineConfigError, match="no safetensors"):
        count_parameters(tmp_path / "nowhere")


# ---------------------------------------------------------------- requests and answers


def recorded(name: str) -> dict[str, Any]:
    """An answer that a real server gave (SGLang 0.5.20 on a CPU)."""
    return json.loads((Path(__file__).parent / "sglang_answers.json").read_text())[name]


def progress(**sampling: Any) -> Progress:
    return Progress(RolloutRequest(1, 2, (3, 4, 5), SamplingParams(**sampling)), 6)


def test_a_request_as_sglang_reads_it() -> None:
    work = progress(temperature=0.7, top_p=0.9, stop_token_ids=(9,), seed=5)
    work.add(read_piece(recorded("length"), 0), 0)
    work.limit = 10
    body = generate_body("id-1", work, [7, 9], 0.1)
    assert body["input_ids"] == [3, 4, 5, *recorded("length")["output_ids"]], "goes on from the tokens so far"
    assert body["rid"] == "id-1" and body["return_logprob"] is True
    params = body["sampling_params"]
    assert params == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.1,
        "max_new_tokens": 4,
        "stop_token_ids": [7, 9],
    }
    assert generate_body("x", progress(top_k=5), [], 0.0)["sampling_params"]["top_k"] == 5
    stops = generate_body("x", progress(stop=("</s>",)), [], 0.0)["sampling_params"]
    assert stops["stop"] == ["</s>"] and stops["skip_special_tokens"] is False


def test_a_recorded_answer() -> None:
    answer = recorded("length")
    piece = read_piece(answer, 0)
    assert piece.token_ids == tuple(answer["output_ids"]) and len(piece.token_ids) == 6
    assert piece.logprobs == tuple(entry[0] for entry in answer["meta_info"]["output_token_logprobs"])
    assert piece.finish_reason is FinishReason.LENGTH
    assert piece.spec == SpecStats(num_decode_steps=5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("stop", FinishReason.STOP), ("aborted", FinishReason.ABORT), ("aborted_waiting", FinishReason.ABORT)],
)
def test_recorded_ends(name: str, reason: FinishReason) -> None:
    piece = read_piece(recorded(name), 0)
    assert piece.finish_reason is reason
    assert len(piece.token_ids) == len(piece.logprobs) == len(recorded(name)["output_ids"])


def test_one_that_was_aborted_in_its_prefill_has_no_token() -> None:
    answer = recorded("aborted_waiting")
    answer["meta_info"]["output_token_logprobs"] = [[-1.5, 17, None]]
    assert read_piece(answer, 0).logprobs == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answer: answer.pop("output_ids"), "output_ids"),
        (lambda answer: answer["meta_info"].pop("output_token_logprobs"), "log-probs of 0"),
        (lambda answer: answer["output_ids"].__setitem__(2, 0), "other ones"),
        (lambda answer: answer["output_ids"].append(1), "7 tokens, log-probs of 6"),
        (lambda answer: answer["meta_info"].update(finish_reason=None), "lacks"),
    ],
)
def test_an_answer_that_breaks_the_protocol_is_an_error(change: Any, message: str) -> None:
    answer = recorded("length")
    change(answer)
    with pytest.raises(EngineError, match=message):
        read_piece(answer, 0)


def test_statistics_come_from_the_histogram() -> None:
    """As recorded; the server's own accept rate and length say other things."""
    meta = recorded("speculative")["meta_info"]
    assert meta["spec_correct_drafts_histogram"] == [22, 1] and meta["completion_tokens"] == 25
    found = spec_stats(meta, 3)
    assert found == SpecStats(23, 23, (22, 1, 0, 0), (23, 23, 23), (1, 0, 0))
    assert found.accept_length == pytest.approx(24 / 23)
    assert meta["spec_accept_length"] == pytest.approx(25 / 23), "counts the prefill's token"
    # One token from the prefill and every step's accepted drafts and bonus: all tokens, when none was cut off.
    assert 1 + found.num_accepted + found.num_verify_steps == 25
    deeper = spec_stats({"spec_verify_ct": 14, "spec_correct_drafts_histogram": [10, 1, 1, 2]}, 3)
    assert deeper.accepted_by_position == (4, 3, 2)


def test_statistics_are_padded_to_the_depth() -> None:
    assert spec_stats({"spec_verify_ct": 3, "spec_correct_drafts_histogram": [1, 2]}, 3) == SpecStats(
        3, 3, (1, 2, 0, 0), (3, 3, 3), (2, 0, 0)
    )
    nothing = spec_stats({}, 2)
    assert (nothing.num_verify_steps, nothing.accepted_histogram) == (0, (0, 0, 0))
    with pytest.raises(EngineError, match="4 verify steps, its histogram 3"):
        spec_stats({"spec_verify_ct": 4, "spec_correct_drafts_histogram": [1, 2]}, 3)


def test_plain_statistics() -> None:
    assert [plain_stats(n).num_decode_steps for n in (0, 1, 5)] == [0, 0, 4]


def test_an_update_carries_the_payload_unchanged() -> None:
    body = update_body(b"the message")
    ((name, tensor),) = pickle.loads(base64.b64decode(body["serialized_named_tensors"][0]))
    assert name == "slipstream" and tensor.dtype == torch.uint8 and bytes(tensor.tolist()) == b"the message"
    assert body["load_format"] == "sync.loader.load"
    assert body["flush_cache"] is False, "SGLang 0.5.15 dies of a flush that it refuses"


def test_error_answers_become_one_line() -> None:
    assert error_text(400, '{"error":{"message":"top_p must be in (0, 1], got 3."}}') == (
        "HTTP 400: top_p must be in (0, 1], got 3."
    )
    assert error_text(500, "Internal\nServer Error") == "HTTP 500: Internal Server Error"


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("usage: ...\nsglang serve: error: unrecognized arguments: --bogus-flag 1\n", "flag --bogus-flag 1"),
        ("sglang serve: error: argument --dtype: invalid choice: 'foo' (choose from 'auto')", "--dtype: invalid"),
        ("ValueError: Not enough memory. Please try to increase --mem-fraction-static.", "memory ran out"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "memory ran out"),
        ("ValueError: Port is already in use. dist_init_port=1", "port is taken"),
        ("ModuleNotFoundError: No module named 'sgl_kernel'", "lacks the module sgl_kernel"),
        ("ValueError: draft vocab size 5 does not match target vocab size 7", "the draft does not fit"),
        ("INFO: Port 3 is already in use, trying port 4\nINFO: No module named 'x', ignored; the draft matches", ""),
    ],
)
def test_causes_are_read_from_the_log(log: str, cause: str) -> None:
    found = failure_cause(log)
    assert cause in found and bool(found) == bool(cause)


# ---------------------------------------------------------------- the engine over a scripted server


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 50, "max_position_embeddings": 40}))
    return folder


@pytest.fixture
def engine(server: ScriptedServer, policy: Path, tmp_path: Path) -> Iterator[SGLangEngine]:
    config = replace(PLAIN, sglang_address=server.address, sync_dir=str(tmp_path / "sync"), max_running_requests=2)
    server.info["model_path"] = str(policy)
    engine = SGLangEngine(policy, config, eos_token_ids=(49,), work_dir=tmp_path / "work")
    yield engine
    engine.close()


def requests(num_requests: int, **sampling: Any) -> list[RolloutRequest]:
    params = SamplingParams(**({"max_new_tokens": 4} | sampling))
    return [RolloutRequest(0, i, (1, 2, i), params) for i in range(num_requests)]


def test_nothing_is_served_before_the_first_sync(engine: SGLangEngine, server: ScriptedServer) -> None:
    with pytest.raises(EngineError, match="publish a version first"):
        engine.generate(requests(1))
    server.publish(engine, 0)
    (sample,) = engine.generate(requests(1))
    assert sample.token_ids == server.tokens_after((1, 2, 0), 4)
    assert sample.policy_versions == (VersionSpan(0, 4, 0),)


def test_max_new_tokens_is_cut_to_the_context(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 0)
    (sample,) = engine.generate(requests(1, max_new_tokens=1000))
    assert len(sample.token_ids) == 37 and sample.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (RolloutRequest(3, 4, (1, 50)), r"\(prompt 3, sample 4\): a prompt token is outside the vocabulary of 50"),
        (RolloutRequest(3, 4, (-1,)), "outside the vocabulary"),
        (RolloutRequest(3, 4, ()), "the prompt is empty"),
        (RolloutRequest(3, 4, (1,) * 40), "no room in a context of 40"),
        (RolloutRequest(3, 4, (1,), SamplingParams(stop=("x",))), "stop strings need"),
    ],
)
def test_bad_requests_never_reach_the_server(
    engine: SGLangEngine, server: ScriptedServer, request_: RolloutRequest, message: str
) -> None:
    server.publish(engine, 0)
    with pytest.raises(BadRequest, match=message):
        engine.generate([request_])
    assert server.num_generate == 0


def test_a_sync_in_mid_generate_loses_nothing(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 0)
    server.pause_after = 2  # tokens: a request then runs on until it is interrupted
    server.finishes_first = 1
    samples = engine.generate(requests(5))
    found = [next(samples)]
    server.wait_until_paused()
    server.pause_after = None
    server.publish(engine, 1)
    found += samples
    assert {sample.request.sample_id for sample in found} == set(range(5)) and len(found) == 5
    spans = {sample.policy_versions for sample in found}
    assert spans == {(VersionSpan(0, 4, 0),), (VersionSpan(0, 2, 0), VersionSpan(2, 4, 1)), (VersionSpan(0, 4, 1),)}
    for sample in found:
        assert sample.token_ids == server.tokens_after(sample.request.prompt_ids, 4)
    assert server.running_at_update == 0 and server.flushes_after_update == [True, True]


def test_a_refused_sync_leaves_the_old_version_serving(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 3)
    server.refuses = "policy.w was changed on the way"
    with pytest.raises(SyncError, match=r"policy\.w was changed"):
        server.publish(engine, 4)
    (sample,) = engine.generate(requests(1))
    assert sample.policy_versions == (VersionSpan(0, 4, 3),)


def test_a_broken_sync_stops_serving_until_a_whole_one(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 3)
    server.refuses, server.leaves_dirty = "broke off", True
    with pytest.raises(SyncError, match="broke off"):
        server.publish(engine, 4)
    with pytest.raises(EngineError, match=r"serves nothing.*broke off"):
        engine.generate(requests(1))
    server.refuses, server.leaves_dirty = None, False
    server.publish(engine, 5)
    (sample,) = engine.generate(requests(1))
    assert sample.policy_versions == (VersionSpan(0, 4, 5),)


def test_requests_that_wait_for_broken_weights_are_told(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 0)
    server.pause_after, server.finishes_first = 2, 1
    samples = engine.generate(requests(4))
    next(samples)
    server.wait_until_paused()
    server.refuses, server.leaves_dirty = "broke off", True
    with pytest.raises(SyncError):
        server.publish(engine, 1)
    with pytest.raises(EngineError, match="requests wait"):
        for _ in samples:
            pass


def test_abort_keeps_partial_results(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 0)
    server.pause_after, server.finishes_first = 2, 1
    samples = engine.generate(requests(4))
    found = [next(samples)]
    server.wait_until_paused()
    engine.abort()
    found += samples
    assert sorted(len(sample.token_ids) for sample in found) == [0, 2, 2, 4]
    assert [sample.finish_reason for sample in found].count(FinishReason.ABORT) == 3


def test_an_abandoned_iterator_stops_what_runs(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 0)
    server.pause_after, server.finishes_first = 2, 1
    samples = engine.generate(requests(4))
    next(samples)
    server.wait_until_paused()
    samples.close()
    assert server.num_running == 0
    server.pause_after = None
    assert len(list(engine.generate(requests(2)))) == 2


def test_one_generate_at_a_time(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 0)
    samples = engine.generate(requests(2))
    next(samples)
    with pytest.raises(EngineError, match="another generate"):
        engine.generate(requests(1))
    samples.close()


def test_a_request_that_the_server_refuses_is_named(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 0)
    server.fails_with = (400, {"error": {"message": "too odd"}})
    with pytest.raises(EngineError, match=r"request \(prompt 0, sample 0\): .*refused it: HTTP 400: too odd"):
        list(engine.generate(requests(1)))


def test_a_server_that_goes_away_is_told(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 0)
    server.pause_after, server.finishes_first = 2, 1
    samples = engine.generate(requests(3))
    next(samples)
    server.wait_until_paused()
    server.close()
    with pytest.raises(EngineError, match="does not answer"):
        list(samples)
    with pytest.raises(SyncError, match="could not be handed new weights"):
        server.publish(engine, 1)


def test_warm_up_fills_the_batch_and_forgets_it(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 0)
    num_flushes = server.num_flushes
    engine.warm_up()
    assert server.num_generate == 2 and server.num_flushes > num_flushes


def test_offload_is_remembered_until_a_sync(engine: SGLangEngine, server: ScriptedServer) -> None:
    server.publish(engine, 0)
    engine.offload()
    with pytest.raises(EngineError, match="onload"):
        engine.generate(requests(1))
    engine.onload()
    with pytest.raises(EngineError, match="not filled yet"):
        engine.generate(requests(1))
    server.refuses = "refused"
    with pytest.raises(SyncError):
        server.publish(engine, 1)
    with pytest.raises(EngineError, match="serves nothing"):  # the old version is gone with its memory
        engine.generate(requests(1))
    server.refuses = None
    server.publish(engine, 2)
    assert len(list(engine.generate(requests(1)))) == 1
    assert server.memory_calls == [], "without rollout.offload the server keeps its memory"


def test_memory_is_released_and_taken_again_in_order(server: ScriptedServer, policy: Path, tmp_path: Path) -> None:
    config = replace(PLAIN, sglang_address=server.address, sync_dir=str(tmp_path / "sync"), offload=True)
    server.info |= {"model_path": str(policy), "enable_memory_saver": True}
    engine = SGLangEngine(policy, config, eos_token_ids=(49,), work_dir=tmp_path / "work")
    server.publish(engine, 0)
    engine.offload()
    engine.onload()
    server.publish(engine, 1)
    engine.close()
    assert server.memory_calls == [
        ("release", ["kv_cache", "weights"]),
        ("resume", ["weights"]),
        ("update", []),
        ("resume", ["kv_cache"]),
    ]


def test_a_server_elsewhere_is_left_running(engine: SGLangEngine, server: ScriptedServer) -> None:
    engine.close()
    engine.close()
    assert server.is_up


def test_it_cannot_decode_plainly_beside_and_has_no_state(engine: SGLangEngine) -> None:
    with pytest.raises(EngineConfigError, match="plain_probe_interval = 0"):
        engine.without_speculation()
    assert engine.state() == {} and engine.reproducible is False


def test_attaching_names_every_difference(policy: Path) -> None:
    info = {
        "version": "0.5.20",
        "model_path": str(policy),
        "dtype": "float32",
        "speculative_algorithm": None,
        "context_length": 48,
        "custom_weight_loader": ["sync.loader.load"],
    }
    assert attach_faults(info, PLAIN, policy, 40) == []
    assert attach_faults({}, PLAIN, policy, 40) == ["what answers there does not describe itself as SGLang"]
    changed = info | {"dtype": "bfloat16", "context_length": 30, "custom_weight_loader": [], "model_path": "/other"}
    faults = "; ".join(attach_faults(changed, PLAIN, policy, 40))
    for expected in ("dtype = 'bfloat16'", "context_length = 30", "custom-weight-loader", "model_path = '/other'"):
        assert expected in faults
    assert "speculative_algorithm" in "; ".join(attach_faults(info, EAGLE3, policy, 40))
    target_only = info | {"speculative_algorithm": "EAGLE3", "speculative_num_draft_tokens": 4, "device": "cuda"}
    assert "rejection" in "; ".join(attach_faults(target_only, EAGLE3, policy, 40))


def test_an_address_without_a_server_is_one_line(policy: Path, tmp_path: Path) -> None:
    config = replace(PLAIN, sglang_address=f"http://127.0.0.1:{free_port()}", sync_dir=str(tmp_path))
    with pytest.raises(EngineConfigError, match="no SGLang server answers"):
        SGLangEngine(policy, config, work_dir=tmp_path / "work")
