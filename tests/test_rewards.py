"""Rewards: right where they are defined, and an error with the sample where they are not; never a silent 0."""

import sys
import types

import pytest

from rollout_engine.types import FinishReason, RolloutRequest, Sample
from trainer.config import ConfigError
from trainer.data import Prompt
from trainer.rewards import RewardError, load_reward


class Decoder:
    def decode(self, token_ids, *, skip_special_tokens=False):
        assert skip_special_tokens
        return "".join(chr(t) for t in token_ids)


@pytest.fixture
def user_module(monkeypatch):
    module = types.ModuleType("user_rewards")
    monkeypatch.setitem(sys.modules, "user_rewards", module)
    return module


def test_exact_match_strips_and_compares_the_whole_response():
    reward = load_reward("exact", Decoder())
    assert reward.score("p", " a b\n", "a b") == 1.0
    assert reward.score("p", "a b c", "a b") == 0.0


def test_a_sample_is_scored_by_its_decoded_text():
    prompt = Prompt(0, 0, "p", (1,), "hi")
    request = RolloutRequest(0, 0, (1,))
    sample = Sample(request, tuple(map(ord, " hi")), (0.0,) * 3, (), FinishReason.STOP)
    assert load_reward("exact", Decoder())(prompt, sample) == 1.0


@pytest.mark.parametrize(
    ("response", "label", "expected"),
    [
        ("so it is \\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("the answer is $4$", "4", 1.0),
        ("the answer is $5$", "4", 0.0),
        ("no idea", "4", 0.0),
    ],
)
def test_math_compares_values(response, label, expected):
    assert load_reward("math", Decoder()).score("p", response, label) == expected


def test_a_math_label_without_mathematics_stops():
    with pytest.raises(RewardError, match="finds no answer in the label"):
        load_reward("math", Decoder()).score("p", "4", "")


def test_a_users_function_gets_three_texts(user_module):
    user_module.score = lambda prompt, response, label: len(prompt) + 10 * len(response) + 100 * len(label)
    assert load_reward("user_rewards:score", Decoder()).score("p", "rr", "lll") == 321.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "1", [1.0]])
def test_a_result_that_is_no_number_stops_with_the_sample(user_module, value):
    user_module.score = lambda prompt, response, label: value
    with pytest.raises(RewardError) as caught:
        load_reward("user_rewards:score", Decoder()).score("the prompt", "the\nresponse", "the label")
    message = str(caught.value)
    assert "user_rewards:score returned" in message and "\n" not in message
    assert "'the prompt'" in message and "'the\\nresponse'" in message and "'the label'" in message


def test_a_function_that_raises_stops_with_the_sample(user_module):
    def score(prompt, response, label):
        raise KeyError("gone")

    user_module.score = score
    with pytest.raises(RewardError, match=r"raised KeyError: 'gone'; prompt 'p', response 'r', label 'l'") as caught:
        load_reward("user_rewards:score", Decoder()).score("p", "r", "l")
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exat", "did you mean 'exact'"),
        ("no_such_module_here:score", "cannot import 'no_such_module_here'"),
        ("user_rewards:scoer", "has no function 'scoer', did you mean 'score'"),
        ("user_rewards:", "give exact, math or MODULE:FUNCTION"),
    ],
)
def test_a_misspelt_reward_is_refused(user_module, name, message):
    user_module.score = lambda prompt, response, label: 1.0
    with pytest.raises(ConfigError, match=message):
        load_reward(name, Decoder())


@pytest.fixture
def current_folder(tmp_path, monkeypatch):
    """A folder to run in, with the module path of an installed script, which does not name it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in ("my_rewards_here", "my_broken_rewards"):
        sys.modules.pop(name, None)


def test_a_module_in_the_current_folder_is_found(current_folder):
    (current_folder / "my_rewards_here.py").write_text("def score(prompt, response, label):\n    return 2.0\n")
    assert load_reward("my_rewards_here:score", Decoder()).score("p", "r", "l") == 2.0


@pytest.mark.parametrize("text", ["def score(:\n", "raise RuntimeError('no\\nway')\n", "import no_such_module_here\n"])
def test_a_module_that_fails_at_import_is_one_line(current_folder, text):
    (current_folder / "my_broken_rewards.py").write_text(text)
    with pytest.raises(
        ConfigError, match=r"cannot import 'my_broken_rewards' \((Syntax|Runtime|ModuleNotFound)"
    ) as caught:
        load_reward("my_broken_rewards:score", Decoder())
    assert "\n" not in str(caught.value)
