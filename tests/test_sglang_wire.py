"""What is said to an SGLang server, and what is made of recorded answers of SGLang 0.5.20."""

from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout_engine.request_pool import Progress
from rollout_engine.sglang_wire import (
    error_text,
    generate_body,
    known_cause,
    last_words,
    plain_stats,
    read_piece,
    routes,
    spec_stats,
    update_body,
)
from rollout_engine.types import EngineError, FinishReason, RolloutRequest, SamplingParams, SpecStats


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
        (lambda answer: answer["meta_info"]["output_token_logprobs"][2].__setitem__(0, None), "garbles.*NoneType"),
        (lambda answer: answer["meta_info"]["output_token_logprobs"].__setitem__(2, None), "garbles.*NoneType"),
        (lambda answer: answer["meta_info"]["output_token_logprobs"].__setitem__(2, [-1.0]), "garbles.*range"),
        (lambda answer: answer.update(meta_info=[]), "garbles"),
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


def test_the_routes_of_a_server() -> None:
    assert routes('{"paths": {"/a": {}, "/b": {}}}') == {"/a", "/b"}
    assert routes("<html>") == routes("[]") == routes("{}") == frozenset()


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
        ("ValueError: Port is already in use. dist_init_port=1", "name another rollout.sglang.port, or leave it out"),
        ("ModuleNotFoundError: No module named 'sgl_kernel'", "lacks the module sgl_kernel"),
        ("ValueError: draft vocab size 5 does not match target vocab size 7", "the draft does not fit"),
        ("ValueError: share one vocab, but the draft vocab (5) != target vocab (7).", "the draft does not fit"),
        ("RuntimeError: shape mismatch for draft weight fc.weight", "name one that was made for this policy"),
        ("RuntimeError: Capturing the draft CUDA graph failed: invalid device function", ""),
        ("RuntimeError: draft graph of batch size 4: invalid device function", ""),
        ("RuntimeError: the draft's kernels do not match this GPU", ""),
        ("ModuleNotFoundError: no draft\nKeyError: 'size does not match'", ""),
        ("INFO: Port 3 is already in use, trying port 4\nINFO: No module named 'x', ignored; the draft matches", ""),
    ],
)
def test_causes_are_read_from_the_log(log: str, cause: str) -> None:
    found = known_cause(log)
    assert cause in found and bool(found) == bool(cause)


TRACEBACK = """[2026-01-01 12:00:00] Scheduler hit an exception: Traceback (most recent call last):
  File "weight_utils.py", line 1351, in _load_file
    raise ValueError("in the source: never this")
{error}

[2026-01-01 12:00:01] SIGQUIT received. signum=None, frame=None. It usually means one child failed.
"""
SPAM = "nanobind: leaked 518 functions!\n" + ' - leaked function "create_fneg"\n' * 100
CRASH = "[2026-01-01] Subprocess scheduler_0 (pid=9) crashed with exit code -9. Triggering SIGQUIT for cleanup...\n"
RANK = "RuntimeError: Rank 0 scheduler died during initialization (exit code: 1).\n"


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (
            TRACEBACK.format(error="safetensors_rust.SafetensorError: file not fully covered") + SPAM,
            "safetensors_rust.S",
        ),
        ("ValueError: the first\n" + TRACEBACK.format(error="KeyError: 'the last'"), "KeyError: 'the last'"),
        (TRACEBACK.format(error="AssertionError"), "AssertionError"),
        (TRACEBACK.format(error="KeyError: 'mine'") + RANK + "EOFError\n", "KeyError: 'mine'"),
        (RANK, "RuntimeError: Rank 0 scheduler died"),
        ("usage: x\nsglang serve: error: argument --x: invalid float value: 'abc'\n", "sglang serve: error: argument"),
        (CRASH, "Subprocess scheduler_0 (pid=9) crashed with exit code -9"),
        ("[2026-01-01] Ignore import error when loading x: No module named 'vllm'\n", ""),
        ("", ""),
    ],
)
def test_the_last_words_of_a_server_are_one_line(log: str, words: str) -> None:
    found = last_words(log)
    assert found.startswith(words) and bool(found) == bool(words) and "\n" not in found
