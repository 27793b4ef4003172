"""Several sources into one set, and the rows set apart for scoring: seeded, stratified, alike rows on one side."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weitiao.data.mixture import SourceRows, hold_out, read_mixture
from weitiao.data.record import Record
from weitiao.data.records import read_records
from weitiao.dataset import Dataset, load_dataset
from weitiao.errors import DataError
from weitiao.recipe import make_recipe

WORDS = "山水云风雨雪花鸟鱼虫书画琴棋茶酒灯桥船路城村田林石沙月星日春夏秋冬"


def sentence(seed: object, length: int = 40) -> str:
    """Characters in an order that no other seed has."""
    draw = random.Random(str(seed))
    return "".join(draw.choice(WORDS) for _ in range(length))


def label_row(text: str, label: str) -> dict[str, str]:
    context = f"Instruction: 请回答。\nInput: 选一个标签：\n\n{text}\nAnswer: "
    return {"context": context, "target": json.dumps([label], ensure_ascii=False)}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(train: Any, **data: Any) -> Dataset:
    recipe = make_recipe({"name": "t", "model": "starter", "data": {"train": train, **data}})
    return load_dataset(recipe)


def records_of(path: Path, texts: Iterable[str]) -> list[Record]:
    return read_records(write(path, (label_row(text, "甲") for text in texts)))


# ---- held-out rows ---------------------------------------------------------------------------------------------


def test_every_label_gives_its_share(tmp_path: Path) -> None:
    sizes = {"甲": 100, "乙": 50, "丙": 30, "丁": 20}
    rows = [label_row(sentence((label, n)), label) for label, size in sizes.items() for n in range(size)]
    dataset = load(write(tmp_path / "rows.jsonl", rows), held_out=0.1)
    assert Counter(json.loads(str(record.target))[0] for record in dataset.dev) == {"甲": 10, "乙": 5, "丙": 3, "丁": 2}


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), share=st.floats(0.01, 0.9))
def test_all_strata_together_give_the_share_and_none_gives_all(
    sizes: list[int], share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    strata = [str(kind) for kind, size in enumerate(sizes) for _ in range(size)]
    folder = tmp_path_factory.mktemp("rows")
    records = records_of(folder / "rows.jsonl", (sentence(n, 12) for n in range(len(strata))))
    chosen = Counter(strata[place] for place in hold_out(records, strata, share=share, seed=1))
    most = sum(size - 1 for size in sizes)
    assert sum(chosen.values()) == min(most, max(1, round(share * len(strata))))
    for kind, size in enumerate(sizes):
        assert chosen[str(kind)] <= max(0, size - 1)
        if all(other - 1 >= share * other + 1 for other in sizes):
            assert abs(chosen[str(kind)] - share * size) <= 1


@pytest.mark.parametrize("seed", range(6))
def test_nearly_the_same_texts_stay_on_one_side(seed: int, tmp_path: Path) -> None:
    texts = [sentence(n) for n in range(150)]
    alike = [text[:-1] + "。" for text in texts[:30]]
    records = records_of(tmp_path / "rows.jsonl", [*texts, *alike])
    chosen = hold_out(records, [""] * len(records), share=0.3, seed=seed)
    assert len(chosen) == round(0.3 * len(records))
    assert {place for place in range(30) if place in chosen} == {place - 150 for place in chosen if place >= 150}


def test_a_boilerplate_that_most_rows_share_ties_nothing_together(tmp_path: Path) -> None:
    """Where the text cannot be told apart from a long instruction, all prompts look alike."""
    records = records_of(tmp_path / "rows.jsonl", (sentence("the same", 400) + sentence(n, 12) for n in range(120)))
    assert len(hold_out(records, [""] * 120, share=0.1, seed=3)) == 12


def test_a_share_of_zero_holds_nothing_out(tmp_path: Path) -> None:
    records = records_of(tmp_path / "rows.jsonl", map(sentence, range(5)))
    assert hold_out(records, [""] * 5, share=0, seed=0) == frozenset()


# ---- sources ---------------------------------------------------------------------------------------------------


def test_a_limit_takes_rows_by_the_seed_in_their_order_and_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", (label_row(sentence(n), "甲乙"[n % 2]) for n in range(60)))
    limited = load({"path": path, "limit": 20}, held_out=0)
    lines = [int(record.source.rpartition(":")[2]) for record in limited.train]
    assert len(lines) == 20 and lines == sorted(lines) and lines[-1] > 20, "not simply the first"
    assert f"{path}: 20 of its 60 rows are used, chosen by the seed." in limited.notes
    assert [record.source for record in load({"path": path, "limit": 20}, held_out=0).train] == [
        record.source for record in limited.train
    ]
    whole = load({"path": path, "limit": 60}, held_out=0)
    assert len(whole.train) == 60 and not whole.notes


def test_all_bad_rows_of_all_sources_are_told_at_once(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [label_row("甲", "甲"), {"context": "问"}])
    two = write(tmp_path / "two.jsonl", [{"target": "答"}])
    with pytest.raises(DataError) as caught:
        read_mixture([SourceRows(path=one)], [SourceRows(path=two)], seed=0)
    assert [problem.source for problem in caught.value.problems] == [f"{one}:2", f"{two}:1"]
