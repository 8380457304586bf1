"""Prompts from a JSONL file: read and checked once, then drawn by a position that a checkpoint can hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

from jinja2 import TemplateError

from trainer.config import ConfigError, DataConfig


class Tokenizer(Protocol):
    """What of a Hugging Face tokenizer is used here."""

    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of one epoch."""

    prompt_id: int  # epoch * rows + row: unique in a run, so that epochs draw different random numbers
    row: int  # place in the file, the same in every epoch
    text: str  # as the model reads it, chat template applied
    token_ids: tuple[int, ...]
    label: str


@dataclass(frozen=True, slots=True)
class DataPosition:
    """The next prompt to be drawn: entry `index` of the order of `epoch`. Part of a checkpoint."""

    epoch: int = 0
    index: int = 0


@dataclass(frozen=True, slots=True)
class _Row:
    text: str
    token_ids: tuple[int, ...]
    label: str


@dataclass(frozen=True, slots=True)
class PromptData:
    """The rows of one prompt file, tokenized, and the seed of their order."""

    rows: tuple[_Row, ...]
    seed: int
    shuffle: bool
    num_skipped: int = 0  # bad rows left out because `skip_bad_rows` is on

    def __len__(self) -> int:
        return len(self.rows)

    def order(self, epoch: int) -> list[int]:
        """Row numbers in the order of that epoch: a pure function of (seed, epoch)."""
        order = list(range(len(self.rows)))
        if self.shuffle:
            Random(f"{self.seed}/{epoch}").shuffle(order)
        return order

    def take(self, position: DataPosition, count: int) -> tuple[tuple[Prompt, ...], DataPosition]:
        """The next `count` prompts from `position` on, across epochs if need be, and the position behind them."""
        prompts: list[Prompt] = []
        epoch, index = position.epoch, position.index
        while len(prompts) < count:
            part = self.order(epoch)[index : index + count - len(prompts)]
            prompts.extend(self._prompt(epoch, row) for row in part)
            index += len(part)
            if index >= len(self.rows):
                epoch, index = epoch + 1, 0
        return tuple(prompts), DataPosition(epoch, index)

    def first(self, count: int = 0) -> tuple[Prompt, ...]:
        """The first `count` rows in file order (0 = all): an evaluation set."""
        return tuple(self._prompt(0, row) for row in range(min(count or len(self), len(self))))

    def _prompt(self, epoch: int, row: int) -> Prompt:
        data = self.rows[row]
        return Prompt(epoch * len(self.rows) + row, row, data.text, data.token_ids, data.label)


def load_prompts(
    path: str | Path,
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    max_prompt_len: int,
    seed: int,
    vocab_size: int | None = None,
) -> PromptData:
    """Read and tokenize every row of a JSONL file.

    The prompt is a string, or a list of chat messages {"role": ..., "content": ...}; with
    `apply_chat_template` it goes through the tokenizer's template, a string as one user message. A prompt has
    at most `max_prompt_len` tokens, of ids below the model's `vocab_size` (None = not checked). `ConfigError` names
    the file and the line: missing, empty, not JSON, key absent, wrong type, too long, refused by the template. With
    `skip_bad_rows` bad rows are left out and counted.
    """
    path = Path(path)
    check_template(config, tokenizer)
    rows, num_skipped = [], 0
    for number, line in read_lines(path):
        try:
            row = _row(line, config, tokenizer, max_prompt_len)
            check_ids(row.token_ids, vocab_size)
            rows.append(row)
        except BadRow as bad:
            if not config.skip_bad_rows:
                raise ConfigError(f"{path} line {number}: {bad}") from None
            num_skipped += 1
    if not rows:
        why = f"all {num_skipped} rows are bad" if num_skipped else "it has no rows"
        raise ConfigError(f"{path}: no prompts, {why}; expected one JSON object a line")
    return PromptData(tuple(rows), seed, config.rollout_shuffle, num_skipped)


def one_prompt(
    text: str, config: DataConfig, tokenizer: Tokenizer, *, max_prompt_len: int, vocab_size: int | None = None
) -> Prompt:
    """A prompt given as text, as row 0 of a file would be, without a label. `ConfigError` when it does not fit."""
    check_template(config, tokenizer)
    try:
        text = prompt_text(text, config, tokenizer)
        token_ids = tokenize_prompt(text, config, tokenizer, max_prompt_len)
        check_ids(token_ids, vocab_size)
        return Prompt(0, 0, text, token_ids, "")
    except BadRow as bad:
        raise ConfigError(f"--prompt: {bad}") from None


def check_template(config: DataConfig, tokenizer: Tokenizer) -> None:
    """ConfigError when the chat template is asked for and there is none."""
    if config.apply_chat_template and not tokenizer.chat_template:
        raise ConfigError("--apply-chat-template: the checkpoint's tokenizer has no chat template; leave the flag out")


class BadRow(ValueError):
    """What is wrong with one row, without its place."""


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Non-blank lines with their numbers, from 1."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ConfigError(f"prompt data {path}: {error.strerror}; give a JSONL file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompt data {path}: not UTF-8 text ({error.reason})") from None


def parse_record(line: str) -> dict[str, Any]:
    """A line's JSON object. Raises BadRow."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(record, dict):
        raise BadRow(f"expected a JSON object, got {type(record).__name__}")
    return record


def _row(line: str, config: DataConfig, tokenizer: Tokenizer, max_prompt_len: int) -> _Row:
    record = parse_record(line)
    text = prompt_text(_get(record, config.input_key, "--input-key"), config, tokenizer)
    label = _get(record, config.label_key, "--label-key")
    token_ids = tokenize_prompt(text, config, tokenizer, max_prompt_len)
    return _Row(text, token_ids, label if isinstance(label, str) else json.dumps(label))


def tokenize_prompt(text: str, config: DataConfig, tokenizer: Tokenizer, max_prompt_len: int) -> tuple[int, ...]:
    """Ids of a prompt's text, at least one. Raises BadRow, also when they are too many."""
    token_ids = tuple(tokenizer.encode(text, add_special_tokens=not config.apply_chat_template))
    if not token_ids:
        raise BadRow("the prompt is empty")
    if len(token_ids) > max_prompt_len:
        raise BadRow(
            f"the prompt has {len(token_ids)} tokens, at most {max_prompt_len} leave room for a response in the "
            "context; shorten it, raise rollout.context_length or set data.skip_bad_rows"
        )
    return token_ids


def check_ids(token_ids: tuple[int, ...], vocab_size: int | None) -> None:
    """Raises BadRow for an id that the model has no row for."""
    if vocab_size is not None and max(token_ids) >= vocab_size:
        raise BadRow(
            f"the tokenizer gives token id {max(token_ids)}, but the model's vocabulary has {vocab_size} (vocab_size "
            "in config.json); tokenizer and weights do not belong together"
        )


def _get(record: dict[str, Any], key: str, flag: str) -> Any:
    if key not in record:
        raise BadRow(f"key {key!r} is absent; present: {', '.join(map(repr, record))}; {flag} chooses another")
    return record[key]


def prompt_text(value: Any, config: DataConfig, tokenizer: Tokenizer) -> str:
    """A row's prompt as the model reads it. Raises BadRow."""
    if isinstance(value, str):
        if not config.apply_chat_template:
            return value
        messages = [{"role": "user", "content": value}]
    elif is_chat(value):
        if not config.apply_chat_template:
            raise BadRow(f"key {config.input_key!r} holds chat messages; give --apply-chat-template")
        messages = value
    else:
        raise BadRow(f"key {config.input_key!r} must hold a string or a list of messages with role and content")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise BadRow(f"the chat template refuses the messages ({' '.join(str(error).split())})") from None


def is_chat(value: Any) -> bool:
    """Whether it is a list of messages, each with role and content."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    )
