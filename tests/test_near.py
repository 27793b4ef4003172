"""Near-duplicates by MinHash: what is alike is found, what is not is left alone, and both quickly."""

from __future__ import annotations

import random
import time

import pytest

from weitiao.data.near import NearIndex, Pair, group
from weitiao.data.texts import plain_text

HANZI = [chr(0x4E00 + number) for number in range(3000)]


def index_of(texts: list[str], groups: list[str] | None = None) -> NearIndex:
    index = NearIndex()
    for number, text in enumerate(texts):
        index.add(text, groups[number] if groups else "")
    return index


def random_texts(count: int, *, seed: int = 0, shortest: int = 40, longest: int = 240) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(HANZI, k=rng.randint(shortest, longest))) for _ in range(count)]


def jaccard(one: str, other: str) -> float:
    a, b = ({text[at : at + 3] for at in range(len(text) - 2)} for text in map(plain_text, (one, other)))
    return len(a & b) / len(a | b)


def test_a_text_with_one_character_changed_is_found_and_others_are_not() -> None:
    texts = random_texts(400)
    changed = [text[:20] + "错" + text[21:] for text in texts[:100]]
    pairs = index_of([*texts, *changed]).pairs()
    assert {(pair.first, pair.second) for pair in pairs} == {(place, 400 + place) for place in range(100)}


def test_the_estimate_is_near_the_true_similarity() -> None:
    rng = random.Random(3)
    texts = random_texts(300, shortest=100)
    edited = []
    for text in texts:
        characters = list(text)
        for _ in range(rng.randint(1, 6)):
            characters[rng.randrange(len(characters))] = rng.choice(HANZI)
        edited.append("".join(characters))
    both = [*texts, *edited]
    found = index_of(both).pairs(threshold=0.7)
    errors = [pair.similarity - jaccard(both[pair.first], both[pair.second]) for pair in found]
    assert len(found) > 200
    assert abs(sum(errors) / len(errors)) < 0.01
    assert max(map(abs, errors)) < 0.12
    missed = [place for place in range(300) if jaccard(texts[place], edited[place]) > 0.9]
    assert {(place, 300 + place) for place in missed} <= {(pair.first, pair.second) for pair in found}


def test_case_width_and_spacing_make_no_difference() -> None:
    pairs = index_of(["Ｔｈｅ bridge was opened on Monday １２", "the  BRIDGE was\nopened on monday 12"]).pairs()
    assert pairs == [Pair(0, 1, 1.0)]


def test_short_texts_and_rows_of_different_groups_are_never_alike() -> None:
    long = "机器人学会了自己叠衣服，也学会了自己做饭，还会扫地。"
    assert index_of(["小王住在北京。", "小王住在北京。"]).pairs() == []
    assert index_of([long, long], ["topics", "triples"]).pairs() == []
    assert len(index_of([long, long], ["topics", "topics"]).pairs()) == 1


@pytest.mark.parametrize("texts", [[], [""], ["\ud800" * 30, "\ud800" * 30], ["a" * 50, "a" * 50, "b" * 50]])
def test_odd_texts_do_no_harm(texts: list[str]) -> None:
    assert len(index_of(texts).pairs()) == (1 if len(texts) > 1 else 0)


def test_boilerplate_in_every_row_costs_no_square_of_comparisons() -> None:
    opening = "".join(random.Random(9).choices(HANZI, k=40))
    texts = [opening + text for text in random_texts(3000, shortest=300, longest=301)]
    started = time.perf_counter()
    assert index_of(texts).pairs() == []
    assert time.perf_counter() - started < 5


def test_twenty_thousand_rows_take_a_moment() -> None:
    texts = random_texts(20_000, seed=5)
    started = time.perf_counter()
    assert index_of(texts).pairs() == []
    assert time.perf_counter() - started < 5


def test_pairs_join_into_groups() -> None:
    pairs = [Pair(4, 9, 0.8), Pair(1, 4, 0.9), Pair(2, 3, 1.0), Pair(9, 12, 0.9)]
    assert group(pairs) == [[1, 4, 9, 12], [2, 3]]
