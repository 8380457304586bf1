"""The index over a prompt's texts against looking everything up by hand, and what the store of finished texts keeps."""

from __future__ import annotations

import random
import tracemalloc
from array import array
from collections import Counter
from collections.abc import Callable

import pytest
import torch

import draft_models.history as history_module
from draft_models.history import HistoryIndex, HistoryStore, match_levels, num_kinds

Texts = dict[int, list[int]]
Place = tuple[int, int]  # number of a text, index of what followed


def by_hand(texts: Texts, places: list[Place], number: int, levels: tuple[int, ...], num_tokens: int) -> list[int]:
    """What the index should propose, from all places of all texts in the order in which they were taken in."""
    text = texts[number]

    def agreement(place: Place) -> int:
        other, position = place
        before = texts[other][:position]
        return sum(len(before) >= n and len(text) >= n and before[-n:] == text[-n:] for n in levels)

    for first in (2, 0):  # the long chain, then the short one
        found = [place for place in reversed(places) if agreement(place) > first][: history_module._MAX_CANDIDATES]
        if not found:
            continue
        longest = max(map(agreement, found))
        best = [place for place in found if agreement(place) == longest]
        followers = [texts[other][position] for other, position in best]
        counts = Counter(followers)
        token = followers[0] if 2 * counts[followers[0]] > len(followers) else max(counts, key=lambda t: counts[t])
        other, position = best[followers.index(token)]
        read_on = texts[other][position:]
        while other == number and len(read_on) < num_tokens:
            read_on.append(read_on[-(len(text) - position)])
        return read_on[:num_tokens]
    return []


@pytest.mark.parametrize("vocab", [2, 4, 12])
def test_look_ups_are_those_made_by_hand(vocab: int) -> None:
    """Texts that grow in turns, some with a prompt that they share, over few and over many words."""
    rng = random.Random(vocab)
    index, levels = HistoryIndex(1, 8), match_levels(1, 8)
    prompt = [rng.randrange(vocab) for _ in range(6)]
    texts: Texts = {}
    places: list[Place] = []
    for _ in range(5):
        text = list(prompt)
        number = index.add(text, start=0 if not texts else len(prompt))
        places += [(number, position) for position in range(1, len(prompt))] if not texts else []
        texts[number] = text
    num_found = 0
    for _ in range(400):
        number = rng.randrange(5)
        grown = [rng.randrange(vocab) for _ in range(rng.randrange(1, 5))]
        places += [(number, len(texts[number]) + i) for i in range(len(grown))]
        texts[number] += grown
        index.extend(number, texts[number])
        match = index.look_up(number, 4)
        assert list(match.tokens if match else ()) == by_hand(texts, places, number, levels, 4)
        num_found += match is not None
    assert num_found > 300


@pytest.mark.parametrize("num_missing", [1, 3, 40])
def test_a_text_that_grew_is_looked_up_in_what_was_taken_in(num_missing: int) -> None:
    rng = random.Random(num_missing)
    index, levels = HistoryIndex(1, 8), match_levels(1, 8)
    texts = {number: rng.choices(range(4), k=60) for number in range(3)}
    places = [(number, position) for number, text in texts.items() for position in range(1, len(text))]
    for text in texts.values():
        index.add(text)
    for _ in range(50):
        grown = texts[2] + rng.choices(range(4), k=num_missing)
        match = index.look_up(2, 4, grown)
        assert match is not None
        assert list(match.tokens) == by_hand({**texts, 3: grown}, places, 3, levels, 4)
    assert index.length(2) == 60


def kind(level: int, support: int) -> int:
    return level * history_module._SUPPORTS + support


def test_kinds_tell_length_and_agreement() -> None:
    index = HistoryIndex(2, 8)
    for text in ([1, 2, 3, 4, 5, 6, 7, 8, 9], [4, 4, 7, 8, 9], [1, 1, 7, 8, 9], [6, 6, 7, 8, 5]):
        index.add(text)

    def look_up(*text: int) -> tuple[tuple[int, ...], int]:
        match = index.look_up(index.add(list(text), start=len(text)), 2)
        assert match is not None
        return match.tokens, match.kind

    assert look_up(0, 0, 2, 3) == ((4, 5), kind(0, 2))  # two words, one place
    assert look_up(0, 0, 7, 8) == ((9,), kind(0, 1))  # three places of four
    assert look_up(0, 4, 4, 7) == ((8, 9), kind(0, 2))
    assert look_up(0, 1, 2, 3, 4) == ((5, 6), kind(1, 2))  # four words
    assert look_up(1, 2, 3, 4, 5, 6, 7, 8) == ((9,), kind(2, 2))
    assert index.look_up(index.add([0, 9, 9], start=3), 2) is None
    assert num_kinds(len(match_levels(2, 8))) == kind(3, 0)


def test_a_loop_is_read_on() -> None:
    index = HistoryIndex(2, 8)
    number = index.add([9, 1, 2, 3, 1, 2, 3, 1, 2])
    match = index.look_up(number, 7)
    assert match is not None and match.tokens == (3, 1, 2, 3, 1, 2, 3)


def test_lengths_that_make_no_sense_are_refused() -> None:
    for bad in ((0, 4), (5, 4)):
        with pytest.raises(ValueError, match="match lengths must be 1 <= min <= max"):
            HistoryIndex(*bad)


# ------------------------------------------------------------------ finished texts


def lists(store: HistoryStore, prompt: tuple[int, ...], max_tokens: int) -> list[list[int]]:
    return [list(response) for response in store.responses(prompt, max_tokens)]


def test_the_oldest_texts_are_forgotten_first() -> None:
    a, b = (1, 2), (3, 4, 5)
    prompts = sum(map(history_module._prompt_bytes, (a, b)))
    text = history_module._STORED_TEXT_BYTES + 4 * 100
    store = HistoryStore(max_bytes=prompts + 3 * text)
    store.add(a, [10] * 100)
    store.add(b, [11] * 100)
    store.add(a, [12] * 100)
    assert store.num_bytes == prompts + 3 * text and lists(store, a, 1000) == [[10] * 100, [12] * 100]
    store.add(b, [13])
    assert store.num_bytes == prompts + 3 * text - 4 * 99  # the first went
    assert lists(store, a, 1000) == [[12] * 100] and lists(store, b, 1000) == [[11] * 100, [13]]
    assert lists(store, b, 100) == [[13]] and lists(store, (9,), 4) == []
    store.add(a, [14] * 5000)
    assert store.num_bytes == 0 and lists(store, b, 1000) == []


@pytest.mark.parametrize("max_bytes", [100_000, 8_000])
def test_a_store_resumes_from_its_state(max_bytes: int, tmp_path) -> None:
    rng = random.Random(0)
    store = HistoryStore(100_000)
    prompts = [tuple(rng.randrange(50_000) for _ in range(rng.randrange(1, 9))) for _ in range(5)]
    for _ in range(60):
        store.add(rng.choice(prompts), [rng.randrange(150_000) for _ in range(rng.randrange(0, 20))])
    torch.save(store.state(), tmp_path / "state.pt")
    restored = HistoryStore(max_bytes)
    restored.add((7,), [1, 2, 3])
    restored.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert restored.num_bytes <= max_bytes
    for prompt in prompts:
        kept, all_of_them = restored.responses(prompt, 10_000), store.responses(prompt, 10_000)
        assert kept == all_of_them[len(all_of_them) - len(kept) :]
    assert restored.responses((7,), 10) == []
    for each in (store, restored):
        for length in range(1, 20):
            each.add(prompts[0], [length] * length)
    assert restored.responses(prompts[0], 100) == store.responses(prompts[0], 100)


def test_an_empty_store_has_a_state() -> None:
    store = HistoryStore(10)
    store.load_state(HistoryStore(10).state())
    assert store.num_bytes == 0


# ------------------------------------------------------------------ memory


def taken(make: Callable[[], object]) -> tuple[object, int]:
    """What `make` returns, and the bytes that it holds on to."""
    tracemalloc.start()
    try:
        made = make()
        return made, tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("num_texts", "length"), [(44, 1000), (2200, 20), (5, 300)])
@pytest.mark.parametrize("max_match", [3, 16, 32])
def test_memory_is_what_is_said(num_texts: int, length: int, max_match: int) -> None:
    """Random text over a large vocabulary, where everything is new; 44,000 tokens: the dictionaries have just grown."""
    rng = random.Random(0)
    prompt, responses = tuple(range(1000, 1016)), [rng.choices(range(150_000), k=length) for _ in range(num_texts)]

    def fill() -> HistoryStore:
        store = HistoryStore(1 << 30)
        for response in responses:
            store.add(prompt, response)
        return store

    def index() -> HistoryIndex:
        index = HistoryIndex(2, max_match)
        for response in store.responses(prompt, 1 << 30):
            index.add(array("i", prompt) + response, start=len(prompt))
        return index

    store, num_bytes = taken(fill)
    assert isinstance(store, HistoryStore) and 0.5 * store.num_bytes < num_bytes < 1.02 * store.num_bytes
    made, num_bytes = taken(index)
    assert isinstance(made, HistoryIndex) and 0.5 * made.num_bytes < num_bytes < 1.02 * made.num_bytes
