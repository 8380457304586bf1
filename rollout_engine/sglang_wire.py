"""What is said to an SGLang server and what it answers, as pure functions. Tried with 0.5.15.post1 and 0.5.20."""

from __future__ import annotations

import base64
import json
import pickle
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from rollout_engine.request_pool import Piece, Progress
from rollout_engine.types import EngineError, FinishReason, SpecStats
from sync.wire import LOADER


def generate_body(rid: str, progress: Progress, eos_token_ids: Collection[int], min_p: float) -> dict[str, Any]:
    """The /generate request for the rest of a response. No seed: SGLang 0.5.15 ignores seeds while verifying."""
    sampling = progress.request.sampling
    params: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": min_p,
        "max_new_tokens": progress.num_left,
        "stop_token_ids": sorted({*eos_token_ids, *sampling.stop_token_ids}),
    }
    if sampling.stop:
        # A stop string is text of special tokens too, as in the embedded engine.
        params |= {"stop": list(sampling.stop), "skip_special_tokens": False}
    return {"rid": rid, "input_ids": progress.prompt_ids, "sampling_params": params, "return_logprob": True}


class Refused(EngineError):
    """The server says no to a request; the text is its reason."""


_NEVER = 1 << 30  # tokens between two events of a response


def joint_body(bodies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One request for the answers to several, as a stream with an event for each that has ended.

    (SGLang sends one with a response's first token as well, which `streamed_answer` passes over.)
    """
    return {
        "rid": [body["rid"] for body in bodies],
        "input_ids": [body["input_ids"] for body in bodies],
        "sampling_params": [{**body["sampling_params"], "stream_interval": _NEVER} for body in bodies],
        "return_logprob": True,
        "stream": True,
    }


def streamed_answer(event: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The whole answer that a stream's event is; None while the response goes on.

    Raises Refused for one that never ran, and ValueError when part of it is missing.
    """
    meta = event["meta_info"]
    reason = meta["finish_reason"]
    if reason is None:
        return None
    if reason["type"] == "abort" and reason.get("status_code"):
        raise Refused(f"HTTP {int(reason['status_code'])}: {reason.get('message', '')}")
    count = meta["completion_tokens"]
    if len(event["output_ids"]) == count:
        return event
    # A stream that is stopped while it waits names its last token alone (0.5.15), but all log-probs with their tokens.
    token_ids = [entry[1] for entry in (meta.get("output_token_logprobs") or [])[:count]]
    if len(token_ids) != count:
        raise ValueError(
            f"SGLang's stream brought {len(event['output_ids'])} of {count} tokens: start the server without "
            "incremental_streaming_output"
        )
    return {**event, "output_ids": token_ids}


def read_piece(answer: Mapping[str, Any], draft_depth: int) -> Piece:
    """One /generate answer. EngineError when it is not what SGLang's protocol promises.

    Log-probs are log_softmax(logits / T) before top-k and top-p, of the verifying forward under speculation, and
    those of T = 1 for greedy requests.
    """
    try:
        meta = answer["meta_info"]
        token_ids = tuple(int(token) for token in answer["output_ids"])
        # One that was stopped within its prefill has the log-prob of a token which it does not report.
        entries = (meta.get("output_token_logprobs") or [])[: len(token_ids)]
        reason = _REASONS[meta["finish_reason"]["type"]]
        logprobs = tuple(float(entry[0]) for entry in entries)
        ids = tuple(entry[1] for entry in entries)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"SGLang's answer lacks or garbles a field ({type(error).__name__}: {error})") from error
    if ids != token_ids:
        raise EngineError(f"SGLang's answer: {len(token_ids)} tokens, log-probs of {len(entries)} or of other ones")
    spec = plain_stats(len(token_ids)) if draft_depth == 0 else spec_stats(meta, draft_depth)
    return Piece(token_ids, logprobs, reason, spec)


_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORT}


def plain_stats(num_tokens: int) -> SpecStats:
    """Every token after the first, which the prefill brings, took one forward."""
    return SpecStats(num_decode_steps=max(0, num_tokens - 1))


def spec_stats(meta: Mapping[str, Any], draft_depth: int) -> SpecStats:
    """Statistics from the histogram alone, which counts every verify step by its accepted drafts.

    The server's own spec_accept_length divides all tokens, the prefill's included, by verify steps, and drops drafts
    behind the response's end; its spec_accept_rate assumes the depth of the launch. Drafts that were accepted behind a
    response's end do count here, at most `draft_depth` per response. Each step is taken to propose `draft_depth`
    drafts: exact for a fixed depth; under SGLang's speculative_adaptive, which does not say what it proposed, an upper
    bound, so that rates by position are lower bounds then (accept_length stays exact). An n-gram step without a match
    verifies padding, and counts as a step whose proposals were all rejected.
    """
    histogram = list(meta.get("spec_correct_drafts_histogram") or meta.get("spec_accept_histogram") or [])
    depth = max(draft_depth, len(histogram) - 1)
    histogram += [0] * (depth + 1 - len(histogram))
    num_steps = sum(histogram)
    if num_steps != meta.get("spec_verify_ct", num_steps):
        raise EngineError(f"SGLang counts {meta['spec_verify_ct']} verify steps, its histogram {num_steps}")
    return SpecStats(
        num_decode_steps=num_steps,
        num_verify_steps=num_steps,
        accepted_histogram=tuple(histogram),
        proposed_by_position=(num_steps,) * depth,
        accepted_by_position=tuple(sum(histogram[position + 1 :]) for position in range(depth)),
    )


def update_body(payload: bytes) -> dict[str, Any]:
    """The /update_weights_from_tensor request that hands `payload` to the loader of every model.

    A flush within the update kills SGLang 0.5.15 when it is refused, so it is asked for separately.
    """
    message = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    pickled = pickle.dumps([("slipstream", message)], protocol=pickle.HIGHEST_PROTOCOL)
    return {
        "serialized_named_tensors": [base64.b64encode(pickled).decode()],
        "load_format": LOADER,
        "flush_cache": False,
    }


def routes(openapi: str) -> frozenset[str]:
    """The paths that a server's /openapi.json names; none when that is no such description."""
    try:
        return frozenset(json.loads(openapi)["paths"])
    except (ValueError, KeyError, TypeError):
        return frozenset()


def error_text(status: int, text: str) -> str:
    """The message inside an error answer, in one line."""
    found = re.search(r'"(?:message|msg|detail)"\s*:\s*"((?:[^"\\]|\\.)*)"', text)
    return f"HTTP {status}: {' '.join((found.group(1) if found else text).split())}"


_PORT_TAKEN = r"(?P<what>[Aa]ddress already in use|ValueError: Port is already in use)"
_CAUSES = (
    (r"unrecognized arguments?: (?P<what>.+)", "it does not know the flag {what}"),
    (r"error: argument (?P<what>.+)", "it refuses the flag {what}"),
    (
        r"(?i)(?P<what>cuda out of memory|torch\.OutOfMemoryError|not enough memory\b[^\n]*|cudaErrorMemoryAllocation)",
        "accelerator memory ran out ({what}): lower rollout.max_running_requests or rollout.context_length, or choose "
        "rollout.sglang.mem_fraction_static",
    ),
    (_PORT_TAKEN, "its port is taken ({what}): name another rollout.sglang.port, or leave it out"),
    (
        r"(?m)^ModuleNotFoundError: No module named '(?P<what>[\w.]+)'",
        "its environment lacks the module {what}: pip install '.[sglang]', or name another rollout.sglang_python",
    ),
    (
        # Of sizes alone: kernels, graphs and memory of a draft that fits can fail too.
        r"(?m)^(?P<what>\w+Error: (?=.*[Dd]raft)(?=.*(?:size|shape|vocab|hidden|dim))"
        r"(?=.*(?:match|!=|differ|identical)).*)$",
        "the draft does not fit ({what}): name one that was made for this policy",
    ),
)


# A log has many of these, and the last one is nearest to the end, but for what one process says about another's end.
_LAST_WORDS = re.compile(
    r"^(?:[\w.]+\.)?\w*(?:Error|Exception)(?:: .*)?$|^[\w .\-]+: error: .+$|Subprocess \w+ .*crashed with exit code.*",
    re.MULTILINE,
)
_ABOUT_ANOTHER = re.compile(r"scheduler died during|crashed with exit code|^(EOF|BrokenPipe|ConnectionReset)Error")


def known_cause(log: str) -> str:
    """What to change so that a server starts, read from its log; "" when it is none of the known causes."""
    for pattern, text in _CAUSES:
        if found := re.search(pattern, log):
            return text.format(what=found.group("what").strip())
    return ""


def taken_port(log: str) -> str:
    """The line that says so where `known_cause` is that a port is taken; "" where it is another one, or none."""
    for pattern, _ in _CAUSES:
        if found := re.search(pattern, log):
            return _line_at(log, found.start()) if pattern == _PORT_TAKEN else ""
    return ""


def _line_at(text: str, position: int) -> str:
    return text[text.rfind("\n", 0, position) + 1 :].partition("\n")[0]


def last_words(log: str) -> str:
    """The error of which a server died, in one line, as its log tells it; "" when it tells none."""
    found = [line.strip() for line in _LAST_WORDS.findall(log)]
    causes = [line for line in found if not _ABOUT_ANOTHER.search(line)]
    return (causes or found or [""])[-1]
