"""Rows of a fine-tuning file: every form becomes the tokens that the policy read and said; bad ones are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from draft_models.randomness import ReservedStep
from rollout_engine.config import RolloutConfig
from trainer import finetune_answers
from trainer.config import ConfigError, DataConfig
from trainer.data import Prompt
from trainer.finetune_data import (
    RowLimits,
    TextRow,
    TextRows,
    dump_row,
    epoch_steps,
    load_texts,
    pack_in_order,
    parse_dumped,
    share_of_rank,
    split_held_out,
)
from trainer.rollouts import make_requests, sampling_params

EOS = ord("$")
USER = {"role": "user", "content": "u"}


class ChatTokenizer:
    """One token a character; a turn of the assistant ends with $ and a newline, as Qwen's does."""

    chat_template: Any = "x"
    forgets = False  # a template that writes earlier turns otherwise than the last

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return ([1] if add_special_tokens else []) + [ord(c) for c in text]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, token_ids))

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
        if conversation[0]["role"] == "tool":
            raise TemplateError("starts with a tool")
        text = "".join(
            f"<{m['role'][0]}>{m['content']}{'$' if m['role'] == 'assistant' else ''}\n" for m in conversation
        )
        if self.forgets and not add_generation_prompt:
            text = text.upper()
        return text + ("<a>" if add_generation_prompt else "")


def load(tmp_path: Path, *lines: Any, tokenizer: Any = None, positions: int = 40, **settings: Any) -> TextRows:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    limits = RowLimits(positions - 1, positions, 128, (EOS,))
    key = settings.pop("response_key", "response")
    return load_texts(path, DataConfig(**settings), key, tokenizer or ChatTokenizer(), limits)


def ids(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


CHAT = [USER, {"role": "assistant", "content": "yes"}]
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], TextRow]] = {
    "prompt": ({"prompt": "ab"}, {}, TextRow((1, *ids("ab")))),
    "prompt ids": ({"prompt": [5, 6]}, {}, TextRow((5, 6))),
    "texts": ({"prompt": "ab", "response": "cd"}, {}, TextRow((1, *ids("ab")), ids("cd$"))),
    "texts, cut by length": (
        {"prompt": "ab", "response": "cd", "finish_reason": "length"},
        {},
        TextRow((1, *ids("ab")), ids("cd")),
    ),
    "texts that say their end": ({"prompt": "ab", "response": "cd$e"}, {}, TextRow((1, *ids("ab")), ids("cd$"))),
    "ids": ({"prompt": [5, 6], "response": [7, 8]}, {}, TextRow((5, 6), (7, 8))),
    "messages": ({"messages": CHAT}, {}, TextRow(ids("<u>u\n<a>"), ids("yes$"))),
    "messages under the prompt's key": ({"prompt": CHAT}, {}, TextRow(ids("<u>u\n<a>"), ids("yes$"))),
    "messages, earlier turns are no answers": (
        {"messages": [*CHAT, USER, {"role": "assistant", "content": "no"}]},
        {},
        TextRow(ids("<u>u\n<a>yes$\n<u>u\n<a>"), ids("no$")),
    ),
    "messages that end with the user": ({"messages": [USER]}, {}, TextRow(ids("<u>u\n<a>"))),
    "messages and a response": ({"prompt": [USER], "response": "no"}, {}, TextRow(ids("<u>u\n<a>"), ids("no$"))),
    "a text through the template": (
        {"prompt": "u", "response": "no"},
        {"apply_chat_template": True},
        TextRow(ids("<u>u\n<a>"), ids("no$")),
    ),
    "other keys": (
        {"q": "ab", "a": "cd"},
        {"input_key": "q", "response_key": "a"},
        TextRow((1, *ids("ab")), ids("cd$")),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_becomes_what_was_read_and_said(tmp_path: Path, name: str) -> None:
    record, settings, expected = FORMS[name]
    found = load(tmp_path, record, **settings)
    assert found.rows == (expected,) and found.are_prompts == (expected.response_ids is None)


def test_a_template_that_rewrites_history_leaves_the_bare_turn(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer()
    tokenizer.forgets = True
    assert load(tmp_path, {"messages": CHAT}, tokenizer=tokenizer).rows[0].response_ids == ids("yes$")


GOOD = {"prompt": "ab", "response": "cdef"}
BAD: dict[str, tuple[Any, str]] = {
    "garbled": ("{not json", "not JSON"),
    "a list": ("[1]", "expected a JSON object, got list"),
    "no keys": ({"promt": "ab"}, "keys 'prompt' and 'messages' are absent; present: 'promt'; --input-key"),
    "no response": ({"prompt": "ab"}, r"it has no response \(key 'response'\), the first row has one"),
    "a number": ({"prompt": "ab", "response": 3}, "key 'response' must hold a text or a list of token ids"),
    "negative ids": ({"prompt": [3], "response": [-1]}, "key 'response' must hold a text or a list of token ids"),
    "foreign ids": (
        {"prompt": [3], "response": [128]},
        "key 'response' holds token id 128, the target's vocabulary has 128",
    ),
    "no prompt": ({"prompt": [], "response": "x"}, "the prompt is empty"),
    "negative prompt ids": (
        {"prompt": [3, -1], "response": "x"},
        "'prompt' must hold a text, a list of token ids or a",
    ),
    "no chat": ({"messages": "u", "response": "x"}, "key 'messages' must hold a list of messages, each with role"),
    "too long": ({"prompt": "a" * 20, "response": "b" * 20}, "prompt and response have 42 tokens, .* 40 positions"),
    "a long prompt": ({"prompt": "a" * 40, "response": "b"}, "the prompt has 41 tokens, at most 39"),
    "an image": ({"messages": [USER, {"role": "assistant", "content": [{}]}]}, "content of a message must be a text"),
    "no question": ({"messages": [{"role": "assistant", "content": "x"}]}, "nothing before it"),
    "a refused chat": ({"messages": [{"role": "tool", "content": "x"}, *CHAT]}, "refuses the messages"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_by_its_line_or_skipped_and_counted(tmp_path: Path, name: str) -> None:
    bad, message = BAD[name]
    with pytest.raises(ConfigError, match=f"texts.jsonl line 3: .*{message}") as caught:
        load(tmp_path, GOOD, "", bad)
    assert "\n" not in str(caught.value)
    found = load(tmp_path, GOOD, "", bad, GOOD, skip_bad_rows=True)
    assert len(found.rows) == 2 and found.num_skipped == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no texts, it has no rows"),
        (["{", "["], "line 1: not JSON"),
        ([{"prompt": "ab", "response": ""}] * 2, "no answer tokens: none of 2 responses has 2 tokens"),
        ([{"prompt": "ab", "response": []}], "no answer tokens: none of 1 responses"),
    ],
)
def test_a_file_with_nothing_to_learn_from_is_refused(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, *lines)
    if lines[:1] == ["{"]:
        with pytest.raises(ConfigError, match="all 2 rows are bad"):
            load(tmp_path, *lines, skip_bad_rows=True)


def test_a_chat_needs_a_template(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="line 1: it holds a chat, and the target's tokenizer has no chat template"):
        load(tmp_path, {"messages": CHAT}, tokenizer=tokenizer)


def test_siblings_are_held_out_together() -> None:
    prompts, lengths = [(i // 3,) for i in range(60)], [10] * 60

    def split(share: float, max_tokens: int = 1000, seed: int = 1) -> tuple[list[int], list[int]]:
        return split_held_out(prompts, lengths, share, max_tokens, seed)

    train, held_out = split(0.25)
    assert sorted(train + held_out) == list(range(60)) and len(held_out) == 15
    assert not {prompts[i] for i in train} & {prompts[i] for i in held_out}
    assert (train, held_out) == split(0.25) != split(0.25, seed=2)
    assert len(split(0.001)[1]) == len(split(0.999)[0]) == 3
    assert [len(split(0.25, max_tokens)[1]) for max_tokens in (1, 89, 90, 149, 150)] == [3, 6, 9, 12, 15]
    with pytest.raises(ConfigError, match="one prompt only"):
        split_held_out([(1,), (1,)], [5, 5], 0.5, 100, 0)


def test_an_epoch_takes_every_text_once_within_the_budget() -> None:
    lengths = [3, 50, 7, 7, 20, 1, 9, 12]
    steps = epoch_steps(lengths, epoch=0, seed=5, max_tokens=25)
    assert sorted(i for step in steps for i in step) == list(range(8))
    assert all(sum(lengths[i] for i in step) <= 25 or len(step) == 1 for step in steps)
    assert steps == epoch_steps(lengths, 0, 5, 25) != epoch_steps(lengths, 1, 5, 25)
    assert pack_in_order([0, 1], [30, 30], 25) == [[0], [1]]


def test_the_steps_of_an_epoch_are_as_few_as_the_budget_allows_and_about_equally_long() -> None:
    lengths = [10] * 101
    steps = epoch_steps(lengths, epoch=0, seed=5, max_tokens=500)
    assert [len(step) for step in steps] == [34, 34, 33]  # 50, 50 and 1 without care
    assert epoch_steps([600, 10], 0, 0, 500) in ([[0], [1]], [[1], [0]])


def test_ranks_share_a_step_evenly() -> None:
    lengths = [9, 8, 7, 6, 5, 4]
    parts = [share_of_rank([0, 1, 2, 3, 4, 5], lengths, rank, 2) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == [0, 1, 2, 3, 4, 5]
    assert abs(sum(lengths[i] for i in parts[0]) - sum(lengths[i] for i in parts[1])) <= 1
    assert [share_of_rank([3], lengths, rank, 2) for rank in range(2)] == [[3], []]


def test_a_written_row_reads_back() -> None:
    row = TextRow((3, 1), (4, 1, 5))
    assert parse_dumped(dump_row(row)) == row


# ---------------------------------------------------------------- random numbers of answers


def test_answers_have_none_of_the_numbers_of_a_run() -> None:
    """Same prompts, row numbers and seed: a draft must not have learned what the numbers say that will verify it."""
    rollout, rows = RolloutConfig(), [TextRow((1, 2, row)) for row in range(40)]
    answers = finetune_answers.make_requests(rows, rollout, 4, seed=1)
    prompts = [Prompt(row, row, "", text.prompt_ids, "") for row, text in enumerate(rows)]
    others = {
        request.sampling.seed
        for step in (*range(20), ReservedStep.EVALUATION, ReservedStep.VOCABULARY)
        for request in make_requests(prompts, sampling_params(rollout), 4, 1, step)
    }
    seeds = {request.sampling.seed for request in answers}
    assert len(seeds) == 160 and len(others) == 22 * 160 and not seeds & others
