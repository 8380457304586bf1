"""The data of `slipstream finetune-draft`: rows of a JSONL file as token ids, what is held out, what each step takes.

A row is a prompt, or a prompt with the response that the policy gave:

    {"prompt": "2 + 2 =", "response": " 4"}              texts; the response ends with the policy's end token
    {"prompt": [17, 4, 17], "response": [19, 2]}         token ids, taken as they are
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

Chats go through the tokenizer's template; the last assistant's turn is the response. One file holds rows of one kind.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from random import Random
from typing import Any

from trainer.config import ConfigError, DataConfig
from trainer.data import (
    BadRow,
    Tokenizer,
    check_ids,
    check_template,
    is_chat,
    parse_record,
    prompt_text,
    read_lines,
)

_MESSAGES = "messages"  # of a row in the form of OpenAI's fine-tuning files
ONE_PROMPT = "there is one prompt only, and a draft is judged on prompts that it has not seen: give more"
MIN_RESPONSE = 2  # tokens: the draft learns from the second on, since the first comes from the prompt's own forward


@dataclass(frozen=True, slots=True)
class TextRow:
    """One row of the file; `response_ids` is None for a prompt that waits for its answers."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class TextRows:
    rows: tuple[TextRow, ...]
    num_skipped: int  # bad rows left out because `data.skip_bad_rows` is on

    @property
    def are_prompts(self) -> bool:
        return self.rows[0].response_ids is None


@dataclass(frozen=True, slots=True)
class RowLimits:
    """What a row's ids must fit into."""

    max_prompt_len: int
    max_positions: int  # prompt and response together
    vocab_size: int
    eos_token_ids: tuple[int, ...]


def load_texts(path: Path, config: DataConfig, response_key: str, tokenizer: Tokenizer, limits: RowLimits) -> TextRows:
    """Read every row. ConfigError names the file and the line: not JSON, keys absent, wrong type, too long, of another
    kind than the first; with `skip_bad_rows` such rows are counted. ConfigError too when no row has an answer."""
    check_template(config, tokenizer)
    reader = _RowReader(config, response_key, tokenizer, limits)
    rows: list[TextRow] = []
    num_skipped = 0
    for number, line in read_lines(path):
        try:
            row = reader.read(parse_record(line))
            if rows and (row.response_ids is None) != (rows[0].response_ids is None):
                has, had = ("no", "one") if row.response_ids is None else ("a", "none")
                raise BadRow(f"it has {has} response (key {response_key!r}), the first row has {had}")
            rows.append(row)
        except BadRow as bad:
            if not config.skip_bad_rows:
                raise ConfigError(f"{path} line {number}: {bad}") from None
            num_skipped += 1
    if not rows:
        why = f"all {num_skipped} rows are bad" if num_skipped else "it has no rows"
        raise ConfigError(f"{path}: no texts, {why}; expected one JSON object a line")
    if rows[0].response_ids is not None:
        check_answers([row.response_ids or () for row in rows], str(path))
    return TextRows(tuple(rows), num_skipped)


def check_answers(responses: Sequence[Sequence[int]], where: str) -> None:
    """ConfigError when a draft has nothing to learn from in any of them."""
    if not any(len(ids) >= MIN_RESPONSE for ids in responses):
        raise ConfigError(
            f"{where}: no answer tokens: none of {len(responses)} responses has {MIN_RESPONSE} tokens or more, and the "
            "first one is never drafted"
        )


class _RowReader:
    """From a record to token ids."""

    def __init__(self, config: DataConfig, response_key: str, tokenizer: Tokenizer, limits: RowLimits) -> None:
        self._config, self._response_key = config, response_key
        self._tokenizer, self._limits = tokenizer, limits

    def read(self, record: dict[str, Any]) -> TextRow:
        """Raises BadRow."""
        row = self._read(record)
        response = row.response_ids or ()
        for name in (self._prompt_key(record), self._response_key):
            self._check_given(name, record.get(name))
        check_ids((*row.prompt_ids, *response), self._limits.vocab_size)
        total = len(row.prompt_ids) + len(response)
        if total > self._limits.max_positions:
            raise BadRow(
                f"prompt and response have {total} tokens, the target has {self._limits.max_positions} positions; "
                "shorten it or set data.skip_bad_rows"
            )
        return row

    def _prompt_key(self, record: dict[str, Any]) -> str:
        key = self._config.input_key
        if key not in record and _MESSAGES not in record:
            present = ", ".join(map(repr, record))
            raise BadRow(f"keys {key!r} and {_MESSAGES!r} are absent; present: {present}; --input-key chooses another")
        return key if key in record else _MESSAGES

    def _check_given(self, key: str, value: Any) -> None:
        """Ids that the file itself holds are its own fault, not the tokenizer's."""
        if _is_ids(value) and max(value) >= self._limits.vocab_size:
            raise BadRow(
                f"key {key!r} holds token id {max(value)}, the target's vocabulary has {self._limits.vocab_size}: "
                "ids of another tokenizer; give texts, or the target that they belong to"
            )

    def _read(self, record: dict[str, Any]) -> TextRow:
        key = self._prompt_key(record)
        prompt = record[key]
        if prompt == []:
            raise BadRow("the prompt is empty")
        if not (is_chat(prompt) or (key == self._config.input_key and (isinstance(prompt, str) or _is_ids(prompt)))):
            forms = "a list of messages, each with role and content"
            if key == self._config.input_key:
                forms = f"a text, a list of token ids or {forms}"
            raise BadRow(f"key {key!r} must hold {forms}")
        response = record.get(self._response_key)
        if is_chat(prompt) and response is None:
            return self._chat(prompt)
        is_end = record.get("finish_reason") != "length"
        return TextRow(self._prompt(prompt), None if response is None else self._response(response, is_end=is_end))

    def _prompt(self, value: Any) -> tuple[int, ...]:
        if _is_ids(value):
            return self._checked_prompt(tuple(value))
        text = self._template(value) if is_chat(value) else prompt_text(value, self._config, self._tokenizer)
        templated = is_chat(value) or self._config.apply_chat_template
        ids = self._tokenizer.encode(text, add_special_tokens=not templated)
        return self._checked_prompt(tuple(ids))

    def _checked_prompt(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        if not ids:
            raise BadRow("the prompt is empty")
        if len(ids) > self._limits.max_prompt_len:
            raise BadRow(
                f"the prompt has {len(ids)} tokens, at most {self._limits.max_prompt_len} leave room for a response; "
                "shorten it or set data.skip_bad_rows"
            )
        return ids

    def _response(self, value: Any, *, is_end: bool) -> tuple[int, ...]:
        if value == [] or _is_ids(value):
            return tuple(value)
        if not isinstance(value, str):
            raise BadRow(f"key {self._response_key!r} must hold a text or a list of token ids")
        ids = tuple(self._tokenizer.encode(value, add_special_tokens=False))
        return self._ended(ids) if is_end else ids

    def _ended(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Up to its first end token, which is added where there is none: a policy says it too, and nothing after it."""
        ends = [i for i, token in enumerate(ids) if token in self._limits.eos_token_ids]
        return ids[: ends[0] + 1] if ends else (*ids, self._limits.eos_token_ids[0])

    def _chat(self, messages: list[dict[str, Any]]) -> TextRow:
        if not all(isinstance(message["content"], str) for message in messages):
            raise BadRow("the content of a message must be a text")
        if messages[-1]["role"] != "assistant":
            return TextRow(self._prompt(messages))
        if len(messages) == 1:
            raise BadRow("the chat holds an assistant's turn and nothing before it")
        before = self._template(messages[:-1])
        whole = self._template(messages, ends=True)
        # A template may write earlier turns otherwise than the last (Qwen3's drops their thinking): then the bare turn.
        said = whole.removeprefix(before) if whole.startswith(before) else messages[-1]["content"]
        prompt = self._checked_prompt(tuple(self._tokenizer.encode(before, add_special_tokens=False)))
        return TextRow(prompt, self._response(said, is_end=True))

    def _template(self, messages: list[dict[str, Any]], *, ends: bool = False) -> str:
        if not self._tokenizer.chat_template:
            raise BadRow("it holds a chat, and the target's tokenizer has no chat template")
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not ends)
        except TemplateError as error:
            raise BadRow(f"the chat template refuses the messages ({' '.join(str(error).split())})") from None


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and item >= 0 for item in value)


# ---------------------------------------------------------------- what is held out, and what each step takes


def split_held_out(
    prompts: Sequence[tuple[int, ...]], lengths: Sequence[int], share: float, max_tokens: int, seed: int
) -> tuple[list[int], list[int]]:
    """Indices (to train on, held out), ascending; siblings of one prompt stay together. A pure function.

    Held out is `share` of the prompts, or fewer where these have more than `max_tokens` tokens (`lengths`); at least
    one prompt goes to either side. ConfigError when there is only one.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(index)
    if len(by_prompt) < 2:
        raise ConfigError(f"texts long enough to draft from: {ONE_PROMPT}")
    groups = list(by_prompt.values())
    Random(f"{seed}/held-out").shuffle(groups)
    count = min(max(1, round(share * len(groups))), len(groups) - 1)
    tokens = list(accumulate(sum(lengths[i] for i in group) for group in groups[:count]))
    count = max(1, sum(total <= max_tokens for total in tokens))
    return sorted(chain(*groups[count:])), sorted(chain(*groups[:count]))


def epoch_steps(lengths: Sequence[int], epoch: int, seed: int, max_tokens: int) -> list[list[int]]:
    """Indices of the texts of each optimizer step of an epoch, in a new order every epoch. A pure function.

    A step takes at least one text and at most `max_tokens` tokens. There are as few steps as these allow, and they are
    about equally long: every step moves the weights as far, so that a short rest would teach too much.
    """
    order = list(range(len(lengths)))
    Random(f"{seed}/{epoch}").shuffle(order)
    count = len(pack_in_order(order, lengths, max_tokens))
    budgets = range(1, max_tokens + 1)
    least = bisect_left(budgets, True, key=lambda budget: len(pack_in_order(order, lengths, budget)) <= count)
    return pack_in_order(order, lengths, budgets[least])


def pack_in_order(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Consecutive runs of `order` of at most `max_tokens` tokens, a longer text alone."""
    steps: list[list[int]] = []
    left = 0
    for index in order:
        if not steps or lengths[index] > left:
            steps.append([])
            left = max_tokens
        steps[-1].append(index)
        left -= lengths[index]
    return steps


def share_of_rank(indices: Sequence[int], lengths: Sequence[int], rank: int, world_size: int) -> list[int]:
    """This rank's part of a step: longest first to whom has least, so that ranks have like loads."""
    parts: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        least = loads.index(min(loads))
        parts[least].append(index)
        loads[least] += lengths[index]
    return parts[rank]


def dump_row(row: TextRow) -> str:
    """A row as a line that `load_texts` reads, with the default keys."""
    return json.dumps({"prompt": list(row.prompt_ids), "response": list(row.response_ids or ())})


def parse_dumped(line: str) -> TextRow:
    """`dump_row` backwards."""
    record = json.loads(line)
    return TextRow(tuple(record["prompt"]), tuple(record["response"]))
