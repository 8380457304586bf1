"""The built-in tasks: pure, verifiable, and with the long tail that makes speculation worth having."""

from random import Random

import pytest

from trainer.config import ConfigError
from trainer.rewards import load_reward
from trainer.tasks import EVAL_START, TASKS, WARM_START_START, get_task, response_text
from trainer.tasks.base import with_mistakes
from trainer.tasks.ledger import ledger_reward, with_slips


@pytest.mark.parametrize("name", TASKS)
def test_a_problem_is_a_pure_function_of_seed_and_row(name):
    task = get_task(name)
    assert [task.problem(3, i) for i in range(20)] == [get_task(name).problem(3, i) for i in range(20)]
    assert [task.problem(3, i) for i in range(20)] != [task.problem(4, i) for i in range(20)]
    assert task.problem(3, 0) != task.problem(3, EVAL_START)


@pytest.mark.parametrize("name", TASKS)
def test_answer_lengths_are_long_tailed_and_bounded(name):
    lengths = sorted(len(get_task(name).problem(0, i).answer) for i in range(2000))
    median, p99 = lengths[1000], lengths[1980]
    assert lengths[0] >= 2 and lengths[-1] <= (60 if get_task(name).min_context == 128 else 1100)
    assert p99 >= 3 * median


def test_answers_are_right():
    for index in range(50):
        names = ("sort", "reverse", "repeat", "count")
        words = {name: get_task(name).problem(0, index).prompt.split() for name in names}
        answers = {name: get_task(name).problem(0, index).answer for name in names}
        assert list(answers["sort"]) == sorted(words["sort"][1:])
        assert list(answers["reverse"]) == words["reverse"][:0:-1]
        start, step, terms = (int(words["count"][i]) for i in (2, 4, 6))
        assert [int(word) for word in answers["count"]] == [(start + i * step) % 100 for i in range(terms)]
        phrase, times = words["repeat"][2:], int(words["repeat"][1])
        assert list(answers["repeat"]) == [w for turn in range(times, 0, -1) for w in (str(turn), *phrase)]


def test_demonstrations_go_wrong_at_the_stated_rate():
    task = get_task("sort")
    rows = range(WARM_START_START, WARM_START_START + 1000)
    right = sum(task.demonstration(0, i)[1] == response_text(task.problem(0, i).answer) for i in rows)
    expected = sum((1 - task.mistake_rate) ** len(task.problem(0, i).answer) for i in rows)
    assert abs(right - expected) < 80  # five standard deviations of a count of 1000


def test_without_mistakes_the_words_are_unchanged():
    assert with_mistakes(Random(0), ("a", "b", "c"), 0.0) == ("a", "b", "c")
    assert all(with_mistakes(Random(i), ("a", "b", "c"), 1.0) != ("a", "b", "c") for i in range(20))


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'sort'"):
        get_task("sorted")


# ---- the ledger ----

PROMPT = "steps 3 a 02 b 00 c 07 d 03\n"


@pytest.mark.parametrize(
    "response",
    [
        "3 one a 03 2 nine a 02 1 seven d 00",
        " 3 tofu renu seven d 00 2 two a 04 1 kola nine d 09",  # remarks are free, and modulo 10
        "3 five b 05 2 five b 00 1 five c 02",
    ],
)
def test_a_right_ledger_is_rewarded_whatever_it_chose(response):
    assert ledger_reward(PROMPT, response, "") == 1.0


@pytest.mark.parametrize(
    ("response", "right_steps"),
    [
        ("3 one a 04 2 nine a 03 1 seven d 00", 0),  # a wrong value: what follows it counts no more
        ("3 one a 03 2 nine a 01 1 seven d 00", 1),  # from the first value of a, not from its last
        ("3 one a 03 1 nine a 02", 1),  # a step left out
        ("3 one a 03 2 nine a 02", 2),  # not to its end
        ("3 one a 03 2 nine a 02 1 seven d 00 0 one a 03", 2),  # too far
        ("3 one a 03 2 nine a 02 1 seven d 00 tofu", 2),  # a remark behind the end
        ("3 one e 03 2 nine a 02 1 seven d 00", 0),  # an account that is not there
        ("3 one a 03 2 nine a 02 1 seven d 0", 2),  # a value of one digit
        ("3 one a 03 2 a nine a 02 1 seven d 00", 1),  # an account among the remarks
        ("3 4 one a 03 2 nine a 02 1 seven d 00", 0),  # a number among the remarks
        ("3 one a", 0),
        ("", 0),
    ],
)
def test_a_ledger_is_rewarded_up_to_its_first_mistake(response, right_steps):
    assert ledger_reward(PROMPT, response, "") == pytest.approx(right_steps / 3)


def test_a_prompt_of_another_task_is_an_error_and_no_reward():
    with pytest.raises(ValueError, match="not a ledger's prompt"):
        ledger_reward("sort a b c d e f g h i\n", "a", "")


def test_the_ledger_finds_its_own_answers_right_and_its_reward_by_name():
    task = get_task("ledger")
    assert load_reward(task.reward, None).function is ledger_reward
    for index in range(200):
        problem = task.problem(0, index)
        assert ledger_reward(problem.prompt, problem.label, problem.label) == 1.0


def test_the_ledgers_demonstrations_slip_at_the_stated_rate_and_go_on_from_what_they_wrote():
    words = ("2", "one", "a", "03", "1", "two", "a", "05")
    assert with_slips(Random(0), words, 0.0) == words
    assert with_slips(Random(0), words, 1.0) == ("2", "one", "a", "04", "1", "two", "a", "07")
    task = get_task("ledger")
    rows = range(WARM_START_START, WARM_START_START + 1000)
    right = sum(ledger_reward(*task.demonstration(0, i), "") == 1.0 for i in rows)
    expected = sum((1 - task.mistake_rate) ** int(task.problem(0, i).prompt.split()[1]) for i in rows)
    assert abs(right - expected) < 80  # five standard deviations of a count of 1000
