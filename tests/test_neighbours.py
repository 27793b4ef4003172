"""Nearest labelled rows: found by what they share, never the row itself, the same ones after saving, and quickly."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from weitiao.data.neighbours import NeighbourIndex, load_index, searched_text, texts_alike
from weitiao.data.postings import Postings
from weitiao.data.record import Record
from weitiao.data.records import read_records
from weitiao.errors import DataError
from weitiao.messages import Message, ToolCall
from weitiao.tasks.base import Task, assign_task, infer_tasks

ROOT = Path(__file__).parents[1]


def row(text: str, *, source: str = "rows.jsonl:1", target: str = "a", turns: tuple[Message, ...] = ()) -> Record:
    return Record(
        messages=(*turns, Message(role="user", text=text)),
        target=target,
        source=source,
        task=None,
        instruction="",
        question="",
        text=text,
        text_span=(0, len(text)),
        raw={"text": text},
    )


def index_of(*texts: str) -> NeighbourIndex:
    return NeighbourIndex.build([row(text, source=f"rows.jsonl:{place}") for place, text in enumerate(texts)])


def places(index: NeighbourIndex, text: str, k: int = 5, **how: object) -> list[int]:
    return [neighbour.place for neighbour in index.nearest(text, k, **how)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def starter() -> tuple[list[Record], list[Record], list[Task], list[Task]]:
    train, dev = (read_records(ROOT / "examples/starter" / f"{name}.jsonl") for name in ("train", "heldout"))
    tasks = infer_tasks(train)
    return train, dev, *([assign_task(record, tasks) for record in rows] for rows in (train, dev))  # type: ignore[return-value]


# --- What is found ---------------------------------------------------------------------------------------------------


def test_the_row_that_shares_the_rarest_pieces_comes_first() -> None:
    index = index_of("今天天气很好", "这部手机的屏幕很好", "苹果很甜，孩子很喜欢", "屏幕碎了，手机也坏了")
    assert places(index, "手机屏幕") == [3, 1]
    assert places(index, "孩子要吃苹果")[0] == 2
    assert places(index, "xyz") == places(index, "") == []


def test_words_without_case_or_width_and_their_stems_are_found() -> None:
    index = index_of("The Battery lasts two days", "浏览器 ＰＹＴＨＯＮ 脚本", "ripe mangoes from Hainan")
    assert places(index, "BATTERY")[0] == 0
    assert places(index, "python")[0] == 1
    assert places(index, "a mango")[0] == 2, "mango is inside mangoes"


def test_equal_rows_come_in_their_order_and_k_is_a_bound() -> None:
    index = index_of(*["完全一样的一句话"] * 30, "别的话")
    assert places(index, "完全一样的一句话", 3) == [0, 1, 2]
    assert places(index, "完全一样的一句话", 40) == [*range(30), 30]  # 的 and 话 are in the last row too
    assert places(index, "完全一样的一句话", 0) == []


def test_the_order_is_that_of_bm25_worked_out_by_hand() -> None:
    from math import log1p

    texts = ["aa bb", "aa aa cc", "dd", "ee ee ee ff gg"]
    found = dict(Postings.build(texts).best_first("aa", wanted=9))
    sizes = [2, 3, 1, 5]  # two letters make a word and no trigram
    idf = log1p((4 - 2 + 0.5) / (2 + 0.5))

    def score(times: int, size: int) -> float:
        return idf * times * 2.2 / (times + 1.2 * (0.25 + 0.75 * size / (sum(sizes) / 4)))

    assert found == pytest.approx({0: score(1, 2), 1: score(2, 3)}, rel=1e-6)


def test_only_rows_of_the_group_are_neighbours() -> None:
    rows = [row("手机很好"), row("手机很坏"), row("手机壳")]
    index = NeighbourIndex.build(rows, groups=["a", "b", "a"])
    assert places(index, "手机", group="a") == [2, 0]
    assert places(index, "手机", group="b") == [1]
    assert places(index, "手机", group="c") == []


def test_conversations_are_found_by_all_that_was_said() -> None:
    talk = row(
        "那就买吧", turns=(Message(role="user", text="这台冰箱怎么样"), Message(role="assistant", text="很静音"))
    )
    index = NeighbourIndex.build([row("今天下雨"), talk])
    assert places(index, "冰箱静音")[0] == 1


# --- Not oneself -----------------------------------------------------------------------------------------------------


def test_neighbours_of_a_train_row_are_neither_itself_nor_near_repeats_of_it(
    starter: tuple[list[Record], list[Record], list[Task], list[Task]],
) -> None:
    train, _, tasks, _ = starter
    twice = [*train, *(record.with_text(record.text + "。") for record in train)]
    names = [task.name for task in (*tasks, *tasks)]
    index = NeighbourIndex.build(twice, groups=names)
    for place in range(0, len(train), 7):
        text = searched_text(train[place])
        free = places(index, text, 4, group=names[place])
        guarded = index.nearest(text, 4, group=names[place], exclude=(place,), exclude_alike=True)
        assert place in free
        assert len(guarded) == 4
        assert not any(texts_alike(text, searched_text(neighbour.record)) for neighbour in guarded)


def test_texts_are_alike_by_the_measure_of_near_repeats() -> None:
    long = "华为公司一九八七年成立于深圳，创始人是任正非，主营通信设备和手机。"
    assert texts_alike(long, long.replace("。", "！"))
    assert not texts_alike(long, long.replace("华为", "小米").replace("任正非", "雷军"))
    assert not texts_alike("苹果很甜", "苹果很咸"), "in a short text one character is a difference in meaning"


# --- Worth ----------------------------------------------------------------------------------------------------------


def test_neighbours_share_the_label_far_more_often_than_chance(
    starter: tuple[list[Record], list[Record], list[Task], list[Task]],
) -> None:
    train, dev, train_tasks, dev_tasks = starter
    index = NeighbourIndex.build(train, groups=[task.name for task in train_tasks])
    asked = [(record, task) for record, task in zip(dev, dev_tasks) if task.name == "labels"]
    hits = [
        task.gold(neighbour.record) == task.gold(record)
        for record, task in asked
        for neighbour in index.nearest(searched_text(record), 5, group="labels")
    ]
    assert sum(hits) / len(hits) > 2.5 / 8, "eight labels, all equally frequent: one in eight by chance"


def test_the_predicates_of_a_text_are_among_those_of_its_neighbours(
    starter: tuple[list[Record], list[Record], list[Task], list[Task]],
) -> None:
    train, dev, train_tasks, dev_tasks = starter
    index = NeighbourIndex.build(train, groups=[task.name for task in train_tasks])
    rng = random.Random(0)
    triples = [record for record, task in zip(train, train_tasks) if task.name == "triples"]
    found, drawn = Counter(), Counter()
    for record, task in zip(dev, dev_tasks):
        if task.name != "triples":
            continue
        wanted = {item["predicate"] for item in task.gold(record)}
        near = [neighbour.record for neighbour in index.nearest(searched_text(record), 3, group="triples")]
        for count, rows in ((found, near), (drawn, rng.sample(triples, 3))):
            count["there"] += len(wanted & {item["predicate"] for shot in rows for item in task.gold(shot)})
            count["all"] += len(wanted)
    assert found["there"] / found["all"] > 0.95
    assert drawn["there"] / drawn["all"] < 0.7


# --- Keeping --------------------------------------------------------------------------------------------------------


def full_row() -> Record:
    call = ToolCall(name="get_weather", arguments={"city": "北京\n", "days": 2})
    return Record(
        messages=(
            Message(role="system", text="你是助手\t。"),
            Message(role="user", text="天气？"),
            Message(role="assistant", text="", calls=(call,), learn=False),
            Message(role="tool", text='{"sun": true}'),
        ),
        target=[{"a": 1}],
        source="data/行.jsonl:3",
        task="天气",
        instruction="你是助手\t。",
        question="",
        text="",
        text_span=None,
        raw={"kept": "no"},
        calls=(call,),
        says="看看",
        tools=({"name": "get_weather", "description": "", "parameters": {"type": "object"}},),
        left_out="the last question",
    )


def test_an_index_read_back_is_the_same_rows_and_all(
    starter: tuple[list[Record], list[Record], list[Task], list[Task]],
) -> None:
    train, dev, tasks, dev_tasks = starter
    rows = [*train, full_row()]
    index = NeighbourIndex.build(rows, groups=[*(task.name for task in tasks), "天\n气\t"])
    again = load_index(index.to_bytes(), where="neighbours.jsonl")
    assert again.fingerprint == index.fingerprint and again.to_bytes() == index.to_bytes()
    for record, task in zip(dev, dev_tasks):
        before, after = (each.nearest(searched_text(record), 3, group=task.name) for each in (index, again))
        assert [(one.place, one.score) for one in before] == [(one.place, one.score) for one in after]
        for one, other in zip(before, after):
            assert other.record.messages == one.record.messages and other.record.target == one.record.target
    [kept] = again.nearest("天气", 1, group="天\n气\t")
    wanted = full_row()
    for name in Record.__slots__:
        assert name == "raw" or getattr(kept.record, name) == getattr(wanted, name)
    assert kept.record.raw == {}


def test_other_rows_or_groups_have_another_fingerprint() -> None:
    rows = [row("手机很好"), row("手机很坏")]
    marks = {
        NeighbourIndex.build(rows, groups=groups).fingerprint
        for rows, groups in (
            (rows, None),
            (rows, ["a", "b"]),
            (rows[::-1], None),
            ([rows[0], row("手机很坏", target="b")], None),
        )
    }
    assert len(marks) == 4


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda data: data[:-9], "was changed or cut"),
        (lambda data: data.replace("手机".encode(), "手表".encode()), "was changed or cut"),
        (lambda data: data.replace(b'"layout": 1', b'"layout": 9'), "has layout 9, but this weitiao reads 1"),
        (lambda data: data.partition(b"\n")[2], "holds no rows to look for neighbours in"),
        (lambda data: b"", "holds no rows to look for neighbours in"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_by_name(harm, told) -> None:  # type: ignore[no-untyped-def]
    data = index_of("手机很好", "手机很坏").to_bytes()
    with pytest.raises(DataError, match=f"^runs/x/neighbours.jsonl {told}"):
        load_index(harm(data), where="runs/x/neighbours.jsonl")


def test_without_rows_there_is_no_index() -> None:
    with pytest.raises(DataError, match="but there are 0"):
        NeighbourIndex.build([])


def test_the_head_is_readable() -> None:
    head = json.loads(index_of("手机很好").to_bytes().splitlines()[0])
    assert head["rows"] == 1 and len(head["fingerprint"]) == 64


# --- Speed ----------------------------------------------------------------------------------------------------------


def test_twenty_thousand_rows_are_built_in_seconds_and_searched_in_milliseconds() -> None:
    rng = random.Random(0)
    hanzi = [chr(0x4E00 + number) for number in range(2000)]
    weights = [1 / (number + 5) for number in range(2000)]  # a few characters are in every text, as in any language
    rows = [row("".join(rng.choices(hanzi, weights, k=80)), source=f"r:{number}") for number in range(20_000)]
    started = time.perf_counter()
    index = NeighbourIndex.build(rows)
    built = time.perf_counter() - started
    started = time.perf_counter()
    for number in range(50):
        assert len(index.nearest(rows[number].text, 4, exclude=(number,), exclude_alike=True)) == 4
    assert built < 10
    assert (time.perf_counter() - started) / 50 < 0.1
