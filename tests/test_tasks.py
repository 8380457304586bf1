"""The built-in tasks: pure, verifiable, and with the long tail that makes speculation worth having."""

import pytest

from trainer.config import ConfigError
from trainer.tasks import EVAL_START, TASKS, WARM_START_START, get_task, response_text
from trainer.tasks.base import with_mistakes


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
    assert lengths[0] >= 2 and lengths[-1] <= 60
    assert p99 >= 3 * median


def test_answers_are_right():
    for index in range(50):
        words = {name: get_task(name).problem(0, index).prompt.split() for name in TASKS}
        answers = {name: get_task(name).problem(0, index).answer for name in TASKS}
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
    from random import Random

    assert with_mistakes(Random(0), ("a", "b", "c"), 0.0) == ("a", "b", "c")
    assert all(with_mistakes(Random(i), ("a", "b", "c"), 1.0) != ("a", "b", "c") for i in range(20))


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'sort'"):
        get_task("sorted")
