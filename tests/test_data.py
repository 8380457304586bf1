"""Prompt files: every bad row is named by its line, and the order is a pure function of seed and position."""

import json

import pytest
from jinja2 import TemplateError

from trainer.config import ConfigError, DataConfig
from trainer.data import DataPosition, load_prompts


class CharTokenizer:
    """One token a character; the template wraps each message."""

    def __init__(self, chat_template="x"):
        self.chat_template = chat_template

    def encode(self, text, *, add_special_tokens=True):
        return ([1] if add_special_tokens else []) + [ord(c) for c in text]

    def decode(self, token_ids, *, skip_special_tokens=False):
        return "".join(chr(t) for t in token_ids)

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "".join(f"<{m['role']}>{m['content']}" for m in conversation) + "<assistant>"


def write(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def load(path, tokenizer=None, max_prompt_len=100, seed=0, vocab_size=None, **settings):
    limits = {"max_prompt_len": max_prompt_len, "vocab_size": vocab_size}
    return load_prompts(path, DataConfig(**settings), tokenizer or CharTokenizer(), seed=seed, **limits)


GOOD = {"prompt": "ab", "label": "x"}


def rows(count):
    return [{"prompt": chr(97 + i), "label": i} for i in range(count)]


def test_a_string_is_tokenized_with_special_tokens_and_a_label_becomes_text(tmp_path):
    (prompt,) = load(write(tmp_path, {"prompt": "ab", "label": 7})).first()
    assert prompt.token_ids == (1, 97, 98) and prompt.label == "7" and prompt.text == "ab"


def test_chat_template_wraps_strings_and_messages_once(tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = write(tmp_path, GOOD, {"prompt": chat, "label": "y"})
    first, second = load(path, apply_chat_template=True).first()
    assert first.text == "<user>ab<assistant>"
    assert second.text == "<system>s<user>u<assistant>"
    assert second.token_ids[0] == ord("<")  # the template writes its own special tokens


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", "line 3: not JSON"),
        ("[1]", "line 3: expected a JSON object, got list"),
        ({"promt": "ab", "label": "x"}, "line 3: key 'prompt' is absent; present: 'promt', 'label'; --input-key"),
        ({"prompt": "ab"}, "line 3: key 'label' is absent"),
        ({"prompt": 3, "label": "x"}, "line 3: key 'prompt' must hold a string"),
        ({"prompt": [{"role": "user", "content": "a"}], "label": "x"}, "line 3: .*give --apply-chat-template"),
        ({"prompt": "a" * 100, "label": "x"}, "line 3: the prompt has 101 tokens, at most 100"),
    ],
)
def test_a_bad_row_is_named_by_its_line_or_skipped_and_counted(tmp_path, bad, message):
    path = write(tmp_path, GOOD, "", bad, GOOD)  # line 2 is blank, which is no row
    with pytest.raises(ConfigError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    data = load(path, skip_bad_rows=True)
    assert len(data) == 2 and data.num_skipped == 1


def test_a_token_beyond_the_vocabulary_is_a_bad_row(tmp_path):
    path = write(tmp_path, GOOD, {"prompt": "az", "label": "x"})
    assert len(load(path, vocab_size=ord("z") + 1)) == 2
    with pytest.raises(ConfigError, match=r"line 2: the tokenizer gives token id 122, but .* vocabulary has 122"):
        load(path, vocab_size=ord("z"))
    assert load(path, vocab_size=ord("z"), skip_bad_rows=True).num_skipped == 1


def test_messages_that_the_chat_template_refuses_are_a_bad_row(tmp_path):
    class Strict(CharTokenizer):
        def apply_chat_template(self, conversation, **options):
            if conversation[0]["role"] == "system":
                raise TemplateError("System role\nnot supported")
            return super().apply_chat_template(conversation, **options)

    path = write(tmp_path, GOOD, {"prompt": [{"role": "system", "content": "s"}], "label": "y"})
    with pytest.raises(ConfigError, match=r"line 2: the chat template refuses .* \(System role not supported\)"):
        load(path, Strict(), apply_chat_template=True)
    assert len(load(path, Strict(), apply_chat_template=True, skip_bad_rows=True)) == 1


def test_a_file_without_prompts_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "absent.jsonl")
    with pytest.raises(ConfigError, match="it has no rows"):
        load(write(tmp_path, ""))
    with pytest.raises(ConfigError, match="all 2 rows are bad"):
        load(write(tmp_path, "1", "2"), skip_bad_rows=True)


def test_a_checkpoint_without_chat_template_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no chat template"):
        load(write(tmp_path, GOOD), CharTokenizer(chat_template=None), apply_chat_template=True)


def test_epochs_hold_every_row_once_in_different_orders(tmp_path):
    data = load(write(tmp_path, *rows(20)))
    assert sorted(data.order(0)) == sorted(data.order(1)) == list(range(20))
    assert data.order(0) != data.order(1) and data.order(0) == data.order(0)
    assert load(write(tmp_path, *rows(20)), seed=1).order(0) != data.order(0)
    assert load(write(tmp_path, *rows(20)), rollout_shuffle=False).order(5) == list(range(20))


def test_taking_resumes_anywhere_and_crosses_epochs_with_new_ids(tmp_path):
    data = load(write(tmp_path, *rows(5)))
    whole, end = data.take(DataPosition(), 12)
    parts, position = [], DataPosition()
    for count in (3, 4, 5):
        part, position = data.take(position, count)
        parts.extend(part)
    assert tuple(parts) == whole and position == end == DataPosition(2, 2)
    assert len({prompt.prompt_id for prompt in whole}) == 12
    assert all(prompt.prompt_id % 5 == prompt.row for prompt in whole)


def test_an_evaluation_set_is_in_file_order(tmp_path):
    data = load(write(tmp_path, *rows(5)))
    assert [prompt.row for prompt in data.first(3)] == [0, 1, 2]
    assert len(data.first()) == len(data.first(9)) == 5
