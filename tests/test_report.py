"""Reports as JSON, Markdown and one offline page, whatever the model wrote."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weitiao.errors import DataError, RunError
from weitiao.evaluate.differences import label_in_answers_order, mark_differences
from weitiao.evaluate.metric_texts import METRICS
from weitiao.evaluate.prediction import FieldConfidence
from weitiao.evaluate.report import Report, scored_files, write_report
from weitiao.evaluate.score import Prediction, read_predictions, score_side, write_predictions
from weitiao.tasks.base import Task
from weitiao.tasks.forms import AnswerForm, Field
from weitiao.visible import shorten, visible

FACTS = Task(
    name="facts",
    form=AnswerForm(
        shape="object list", fields=tuple(Field(key=key, kind="string") for key in ("subject", "predicate", "object"))
    ),
)
TOPICS = Task(name="topics", form=AnswerForm(shape="label list", labels=("手机", "水果", "酒店")))
CHAT = Task(name="chat", form=AnswerForm(shape="text"))
EVIL = (
    "</pre></script><script>alert(1)</script><img src=x onerror='alert(\"2\")'>{{ 7*7 }}`|*_&amp;"
    "\u202e\x00\x1b[31m\ud800"
)


def fact(subject: str, predicate: str, value: str) -> dict[str, str]:
    return {"subject": subject, "predicate": predicate, "object": value}


def row(task: Task, gold: Any, answer: Any, *, line: int = 1, finish: Any = "stop", prompt: str = "问题") -> Prediction:
    texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in (gold, answer)]
    return Prediction(
        source=f"dev.jsonl:{line}", task=task.name, prompt=prompt, gold=texts[0], answer=texts[1], finish=finish
    )


BASE = [
    row(FACTS, [fact("甲", "父亲", "乙")], "我不知道", line=1, finish="length"),
    row(TOPICS, ["水果"], ["手机"], line=2),
    row(TOPICS, ["手机"], ["手机"], line=3),
]
TUNED = [
    row(FACTS, [fact("甲", "父亲", "乙")], [fact("甲", "父亲", "丙"), fact("甲", "父亲", "乙")], line=1),
    row(TOPICS, ["水果"], ["水果"], line=2),
    row(TOPICS, ["手机"], ["酒店"], line=3),
]


def report(tasks: tuple[Task, ...] = (FACTS, TOPICS), *, texts: str = "", **sides: list[Prediction]) -> Report:
    return Report(
        title=f"Demo{texts}",
        created="2026-01-02",
        run=f"runs/demo{texts}",
        models={f"{name}": f"model of {name}{texts}" for name in sides},
        data_file=f"dev.jsonl{texts}",
        data_fingerprint="0123456789abcdef",
        facts={f"machine{texts}": f"a laptop{texts}"},
        tasks=tasks,
        sides={name: score_side(rows, tasks, resamples=50) for name, rows in sides.items()},
    )


VOID_TAGS = {"meta", "br", "rect", "line", "input"}


class Page(HTMLParser):
    """Collects tags, attributes and text; fails on tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.data: list[str] = []
        """Of the script elements, those that are run, and those that only hold data."""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID_TAGS:
            self.open.append("data" if tag == "script" and ("type", "application/json") in attrs else tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        last = self.open.pop()
        assert last == tag or (last, tag) == ("data", "script")

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] == ["data"]:
            self.data.append(data)
        elif self.open[-1:] != ["style"]:
            self.text += f" {data}"

    @property
    def rows(self) -> Any:
        """What the script shows rows from."""
        (data,) = self.data
        return json.loads(data)


# ---- the page -------------------------------------------------------------------------------------------------


def test_the_worst_rows_show_the_whole_conversation_escaped() -> None:
    before = (("tools", '{"name": "weather"}'), ("system", "你是助手。"), ("user", EVIL), ("assistant", "好的。"))
    asked = replace(row(CHAT, "晴", "雨", prompt="那明天呢？"), before=before)
    made = report((CHAT,), base=[row(CHAT, "晴", "雪")], tuned=[asked])
    page = Page(made.to_html())
    assert "img" not in page.tags and "alert(1)" not in "".join(page.scripts)
    places = [page.text.index(text) for text in ("weather", "你是助手。", "<img src=x", "好的。", "那明天呢？")]
    assert places == sorted(places)
    for speaker in ("tools", "system", "user", "assistant", "asked"):
        assert f" {speaker} " in page.text
    markdown = made.to_markdown()
    assert "- system: ` 你是助手。 `" in markdown and "- input: ` 那明天呢？ `" in markdown
    assert made.to_json()["worst"][0]["before"][1] == ["system", "你是助手。"]


def test_the_page_shows_figures_reasons_and_differences() -> None:
    page = Page(report(base=BASE, tuned=TUNED).to_html())
    text = " ".join(page.text.split())
    for shown in (
        "0.0 → 66.7 +66.7",  # facts: strict F1
        "50.0 → 50.0 +0.0",  # topics: accuracy
        "In the labelled form: 0.0 → 100.0 %",
        "Cut at the length limit: 1 → 0 answers",
        "Mean of the tasks: 25.0 → 58.3.",
        "By predicate, tuned",
        "By label, tuned",
        "Label (row) and answer (column), tuned",
        "The 2 lowest-scored answers",
        "spurious 甲 · 父亲 · 丙",
        "Strict F1 a fact counts as found only when",
        "a laptop",
    ):
        assert shown in text, shown
    assert page.tags.count("article") == 2


def test_one_side_alone_is_a_whole_report() -> None:
    page = Page(report(base=BASE).to_html())
    text = " ".join(page.text.split())
    assert "→" not in text
    assert "Why base answers were refused" in text
    assert "Not JSON at character N, near '…': Expecting value. 1" in text
    assert "cut at the length limit" in text


def test_the_page_fetches_nothing_and_runs_only_its_own_script() -> None:
    html = report(base=BASE, tuned=TUNED).to_html()
    page = Page(html)
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not {"src", "srcset", "action"} & {name for name, _ in page.attributes}
    assert all((value or "").startswith("#") for name, value in page.attributes if name == "href")
    assert not re.search(r"url\(|@import|https?:", html)
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [value or "" for name, value in page.attributes if name == "content" and "default-src" in (value or "")]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_no_text_of_the_data_or_the_model_becomes_markup(tmp_path: Path) -> None:
    facts_task = Task(name=f"facts{EVIL}", form=FACTS.form)
    labels_task = Task(name="labels", form=AnswerForm(shape="label", labels=("a", EVIL.replace("\x1b", ""))))
    rows = [
        row(facts_task, [fact("a", "b", EVIL)], [fact("a", EVIL, "c")], prompt=EVIL),
        row(facts_task, [fact("a", "b", "c")], EVIL, prompt=EVIL),
        row(labels_task, EVIL.replace("\x1b", ""), "a"),
        row(labels_task, "a", EVIL + "?"),
        row(CHAT, "a", EVIL),
    ]
    tasks = (facts_task, labels_task, CHAT)
    hostile = report(tasks, texts=EVIL, **{f"base{EVIL}": rows, f"tuned{EVIL}": rows})
    _, markdown, html = (path.read_text(encoding="utf-8") for path in write_report(hostile, tmp_path)[:3])
    page = Page(html)
    assert (len(page.scripts), len(page.data), page.tags.count("script")) == (1, 1, 2)
    assert "img" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "49" not in page.text
    for text in (html, markdown):
        assert not set(text) & {"\u202e", "\x00", "\x1b", "\ud800"}
    outside_code = re.sub(r"(`+) .*? \1(?!`)", "", markdown)
    assert not re.search(r"(?<!\\)<", outside_code)


@settings(deadline=None)
@given(st.text(), st.text())
def test_any_answer_gives_a_page_that_can_be_parsed(gold: str, answer: str) -> None:
    Page(report((CHAT,), tuned=[row(CHAT, gold, answer)]).to_html())


def test_a_task_without_rows_and_a_side_without_a_task_are_shown_as_such() -> None:
    partial = report((FACTS, TOPICS, CHAT), base=BASE[1:], tuned=TUNED)
    page = Page(partial.to_html())
    assert page.text.count("No rows of this task.") == 1
    assert "| chat | 0 | no rows | – | – | – |" in partial.to_markdown()
    assert "| facts | 1 | Strict F1 | – | 66.7" in partial.to_markdown()
    assert Page(report((FACTS,), tuned=[]).to_html()).text.count("Every answer is right.") == 1


def test_more_labels_than_can_be_read_get_no_confusion_table() -> None:
    names = tuple(f"{number:02}" for number in range(64))
    task = Task(name="many", form=AnswerForm(shape="label list", labels=names))
    few = report((task,), tuned=[row(task, [name], [names[0]]) for name in names])
    many = report((task,), tuned=[*[row(task, [name], [names[0]]) for name in names], row(task, ["00", "01"], [])])
    assert 'class="heat"' in few.to_html()
    assert 'class="heat"' not in many.to_html()
    assert "65 different labels or sets of labels are too many to read" in many.to_html()


def test_typed_f1_is_shown_only_where_labels_have_types() -> None:
    typed = Task(name="typed", form=AnswerForm(shape="object list", fields=(Field(key="object_type", kind="string"),)))
    assert "f1_typed" not in report(tuned=TUNED).metric_names(FACTS)
    gold = [{"object_type": "人物"}]
    assert "f1_typed" in report((typed,), tuned=[row(typed, gold, gold)]).metric_names(typed)


def test_every_metric_of_every_kind_of_task_is_explained() -> None:
    tasks = (FACTS, TOPICS, CHAT)
    rows = [*TUNED, row(CHAT, "a", "b")]
    names = {name for score in score_side(rows, tasks).scores for name in score.metrics}
    assert names <= set(METRICS)
    assert all(text.meaning.endswith(".") for text in METRICS.values())


# ---- the worst rows -------------------------------------------------------------------------------------------


def test_refused_answers_come_first_then_the_lowest_scored_and_right_ones_never() -> None:
    gold = [fact("甲", "父亲", "乙"), fact("甲", "母亲", "丙")]
    answers = [gold, gold[:1], [], "[{", gold[::-1]]
    rows = [row(FACTS, gold, answer, line=line) for line, answer in enumerate(answers, start=1)]
    worst = report(tuned=rows).worst_rows()
    assert [(found.prediction.source, round(found.value, 2)) for found in worst] == [
        ("dev.jsonl:4", 0),
        ("dev.jsonl:3", 0),
        ("dev.jsonl:2", 0.67),
    ]
    assert [(one.kind, one.gold) for one in worst[1].errors] == [
        ("missing", "甲 · 母亲 · 丙"),
        ("missing", "甲 · 父亲 · 乙"),
    ]


def test_every_task_gets_an_equal_share_of_the_worst_rows() -> None:
    rows = [row(FACTS, [fact("a", "b", "c")], "", line=line) for line in range(80)]
    rows += [row(TOPICS, ["水果"], ["手机"], line=line) for line in range(80, 120)]
    rows += [row(CHAT, "right", "wrong", line=line) for line in range(120, 123)]
    worst = report((FACTS, TOPICS, CHAT), tuned=rows).worst_rows()
    names = [found.task.name for found in worst]
    assert len(worst) == 50
    assert {name: names.count(name) for name in set(names)} == {"facts": 31, "topics": 16, "chat": 3}
    assert [found.score.valid for found in worst] == sorted(found.score.valid for found in worst)


# ---- differences ----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text(), st.text(), st.booleans())
def test_the_pieces_of_a_difference_are_the_whole_texts(gold: str, answer: str, keep_space: bool) -> None:
    pieces = mark_differences(gold, answer, keep_space=keep_space)
    for text, spans in zip((gold, answer), pieces):
        assert "".join(span.text for span in spans) == text
    same = ["".join(span.text for span in spans if not span.differs) for spans in pieces]
    if keep_space:
        assert same[0] == same[1]
    assert "".join(same[0].split()) == "".join(same[1].split())


@settings(deadline=None)
@given(st.text())
def test_equal_texts_have_no_marks(text: str) -> None:
    assert not any(span.differs for side in mark_differences(text, text) for span in side)


def test_words_differ_as_wholes_and_chinese_by_the_character() -> None:
    gold, answer = mark_differences('["red shoes", "北京市"]', '["read shoes", "北平市"]')
    assert [span.text for span in gold if span.differs] == ["red ", "京"]
    assert [span.text for span in answer if span.differs] == ["read ", "平"]


def test_a_looping_answer_is_compared_in_a_moment() -> None:
    gold = json.dumps([fact(f"人物{n}", "父亲", f"人物{n + 1}") for n in range(80)], ensure_ascii=False)
    start = time.perf_counter()
    mark_differences(gold, json.dumps([fact("人物1", "父亲", "人物2")], ensure_ascii=False) * 400)
    mark_differences(gold, "[" * 100_000)
    assert time.perf_counter() - start < 3


def test_long_texts_are_shortened_and_say_so() -> None:
    assert shorten("a" * 4000) == "a" * 4000
    assert shorten("a" * 4010) == "a" * 4000 + " … 10 more characters"


def test_invisible_characters_are_made_visible() -> None:
    assert visible("a\x00\r\x7f\u202e\u200b\ufeff\ud800") == "a␀␍\\u007f\\u202e\\u200b\\ufeff\\ud800"
    assert visible("两\u3000格\n\t👨\u200d👩 \U0001f34e") == "两\u3000格\n\t👨\u200d👩 \U0001f34e"


# ---- Markdown, JSON, files ------------------------------------------------------------------------------------


def test_markdown_tables_have_as_many_cells_in_every_row() -> None:
    hostile = [row(FACTS, [fact("a", "b|c`", "d")], [fact("a", "b|c`", "e|")])]
    for text in (report(base=BASE, tuned=TUNED), report((FACTS,), tuned=hostile)):
        blocks = re.findall(r"(?:^\|.*\n)+", text.to_markdown(), re.MULTILINE)
        assert blocks
        for block in blocks:
            widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
            assert len(widths) == 1, block


def test_markdown_holds_figures_and_at_most_ten_rows() -> None:
    rows = [row(TOPICS, ["水果"], ["手机"], line=line) for line in range(30)]
    text = report((TOPICS,), tuned=rows).to_markdown()
    assert "| topics | 30 | Accuracy | 0.0 [0.0, 0.0] |" in text
    assert len(re.findall(r"^\d+\. ", text, re.MULTILINE)) == 10


def test_json_holds_everything_and_rounds_to_six_digits() -> None:
    data = report(base=BASE, tuned=TUNED).to_json()
    assert data == json.loads(json.dumps(data))
    assert data["sides"]["tuned"]["overall"] == 0.583333
    assert data["data"] == {"file": "dev.jsonl", "fingerprint": "0123456789abcdef"}
    assert [found["source"] for found in data["worst"]] == ["dev.jsonl:3", "dev.jsonl:1"]
    assert data["worst"][1]["errors"] == [{"kind": "spurious", "gold": "", "given": "甲 · 父亲 · 丙"}]


def test_the_files_are_written_whole_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "demo"
    paths = write_report(report(base=BASE, tuned=TUNED), folder)
    names = [*(f"report.{end}" for end in ("json", "md", "html")), "suspects.jsonl"]
    assert [path.name for path in paths] == [*names, "scored-base.jsonl", "scored-tuned.jsonl"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in paths)
    assert read_predictions(folder / "scored-tuned.jsonl") == tuple(TUNED)


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.json").write_text("old", encoding="utf-8")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RunError, match="The disk is full"):
        write_report(report(tuned=TUNED), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == "old"


def test_a_report_folder_that_is_a_file_is_an_error_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    with pytest.raises(RunError, match="taken"):
        write_report(report(tuned=TUNED), tmp_path / "taken")


def test_the_same_input_gives_the_same_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import test_report as t; "
        "from weitiao.evaluate.report import write_report; "
        "write_report(t.report(base=t.BASE, tuned=t.TUNED), Path(sys.argv[2]))"
    )
    for seed in ("1", "2"):
        command = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path / seed)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    for name in ("report.json", "report.md", "report.html", "suspects.jsonl", "scored-base.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_ten_thousand_rows_make_a_page_of_a_few_megabytes_that_holds_every_row() -> None:
    pairs = [(fact("甲", f"关系{n % 50}", "乙"), fact("甲", f"关系{n % 49}", "乙")) for n in range(5000)]
    rows = [row(FACTS, [gold], [given], line=n) for n, (gold, given) in enumerate(pairs)]
    rows += [row(TOPICS, ["水果"], [TOPICS.form.labels[n % 3]], line=n) for n in range(5000)]
    made = report(base=rows, tuned=rows)
    start = time.perf_counter()
    html = made.to_html()
    assert time.perf_counter() - start < 15
    assert len(html) < 3_000_000
    assert len(Page(html).rows["rows"]) == 10_000


# ---- every row, and what rows show together -------------------------------------------------------------------


def test_the_page_holds_every_row_with_all_that_is_known_of_it() -> None:
    known = replace(
        TUNED[0],
        confidence=0.93,
        loss=1.25,
        fields=(FieldConfidence(path="[0].subject", value="甲", confidence=0.5),),
    )
    data = Page(report(base=BASE, tuned=[known, *TUNED[1:]]).to_html()).rows
    assert [one["s"] for one in data["rows"]] == ["dev.jsonl:1", "dev.jsonl:2", "dev.jsonl:3"]
    first = data["rows"][0]
    assert (first["k"], first["c"], first["l"], first["m"]) == ("wrong", 0.93, 1.25, [["[0].subject", "甲", 0.5]])
    assert first["e"] == [["spurious", "", "甲 · 父亲 · 丙"]]
    assert first["o"] == [["我不知道", 0, "refused"]]
    assert [one["k"] for one in data["rows"][1:]] == ["right", "wrong"]
    assert [one["n"] for one in data["rows"]] == [["父亲"], ["水果"], ["手机", "酒店"]]


def test_rows_of_long_texts_are_shortened_so_that_the_page_stays_small() -> None:
    rows = [row(TOPICS, ["手机"], ["水果"], line=line, prompt="问" * 9000) for line in range(4000)]
    html = report((TOPICS,), tuned=rows).to_html()
    assert len(html) < 8_000_000
    assert all("more characters" in one["p"] for one in Page(html).rows["rows"])


def test_a_label_is_shown_in_the_answers_order_with_nothing_lost() -> None:
    gold = json.dumps(
        [fact("甲", "父亲", "乙"), fact("丙", "母亲", "丁"), fact("戊", "妻子", "己")], ensure_ascii=False
    )
    answer = json.dumps([fact("戊", "妻子", "己"), fact("x", "y", "z"), fact("甲", "父亲", "乙")], ensure_ascii=False)
    shown = FACTS.form.parse(label_in_answers_order(FACTS.form, gold, answer))
    assert [one["subject"] for one in shown] == ["戊", "丙", "甲"]
    assert label_in_answers_order(FACTS.form, gold, "[{") == gold
    for other in ("[]", answer, json.dumps([fact("甲", "父亲", "乙")] * 5, ensure_ascii=False)):
        shown = FACTS.form.parse(label_in_answers_order(FACTS.form, gold, other))
        assert sorted(map(str, shown)) == sorted(map(str, FACTS.form.parse(gold)))


def with_sides(sides: dict[str, list[Prediction]]) -> Report:
    tasks = (FACTS, TOPICS)
    return replace(report(tuned=TUNED), sides={name: score_side(rows, tasks) for name, rows in sides.items()})


def test_any_number_of_sides_stand_beside_each_other_and_the_held_one_is_examined() -> None:
    free = [*TUNED[:2], row(TOPICS, ["手机"], ["手机"], line=3)]
    made = with_sides({"base": BASE, "8-shot": BASE, "tuned": TUNED, "tuned, unconstrained": free})
    assert (made.baseline, made.examined) == ("base", "tuned")
    (effect,) = [one for one in made.findings().constraint if one.task == "topics"]
    assert (effect.held, effect.free, effect.rows, effect.differ, effect.better, effect.worse) == (0.5, 1, 2, 1, 0, 1)
    page = Page(made.to_html())
    assert "What the constraint changed" in page.text
    assert page.rows["others"] == ["base", "8-shot", "tuned, unconstrained"] and page.rows["free"] == 2
    assert "| topics | 2 | 100.0 | 50.0 | 1 | 0 | 1 |" in made.to_markdown()
    assert with_sides({"tuned, unconstrained": TUNED}).examined == "tuned, unconstrained"


def test_sides_of_like_names_are_written_to_files_of_their_own() -> None:
    files = scored_files(["a b", "a-b", "a/b", "../x", "底座", "\ud800"])
    assert len(set(files.values())) == 6
    assert list(files.values())[:4] == [
        "scored-a-b.jsonl",
        "scored-a-b-2.jsonl",
        "scored-a-b-3.jsonl",
        "scored-x.jsonl",
    ]
    assert not any("/" in name for name in files.values())


def test_slices_cut_by_length_file_and_rarity() -> None:
    rows = [
        replace(
            row(TOPICS, [TOPICS.form.labels[n % 3]], [TOPICS.form.labels[0]], line=n, prompt="字" * (n + 1)),
            origin="早.jsonl" if n < 9 else "晚.jsonl",
        )
        for n in range(24)
    ]
    made = replace(report((TOPICS,), tuned=rows), train_counts={"topics": {"手机": 200, "水果": 3}})
    length, file, rarity = made.findings().slices["topics"]
    assert [(one.name, one.size) for one in length.slices] == [("1–6", 6), ("7–12", 6), ("13–18", 6), ("19–24", 6)]
    assert [(one.name, one.size) for one in file.slices] == [("晚.jsonl", 15), ("早.jsonl", 9)]
    assert [one.values["tuned"] for one in file.slices] == pytest.approx([1 / 3, 1 / 3])
    assert all(one.interval and one.interval[0] <= 1 / 3 <= one.interval[1] for one in file.slices)
    assert [(one.name, one.size) for one in rarity.slices] == [("never", 8), ("1–9 times", 8), ("100–999 times", 8)]
    assert sum(one.size for one in length.slices) == sum(one.size for one in rarity.slices) == 24
    text = Page(made.to_html()).text
    assert "By length of the input" in text and "By how often training showed it" in text


def test_rows_of_one_length_and_one_file_are_not_cut() -> None:
    assert report((TOPICS,), tuned=[TUNED[1]] * 30).findings().slices["topics"] == ()


def test_errors_are_counted_by_kind_with_examples() -> None:
    gold = [fact("甲", "毕业院校", "北京大学"), fact("甲", "母亲", "丙")]
    rows = [row(FACTS, gold, [fact("甲", "毕业院校", "北京"), fact("乙", "妻子", "丁")], line=n) for n in range(7)]
    kinds = {one.kind: one for one in report((FACTS,), tuned=rows).findings().errors["facts"]}
    assert {kind: (one.count, one.rows, len(one.examples)) for kind, one in kinds.items()} == {
        "boundary": (7, 7, 5),
        "missing": (7, 7, 5),
        "spurious": (7, 7, 5),
    }
    assert kinds["boundary"].examples[0][1] == ("boundary", "甲 · 毕业院校 · 北京大学", "甲 · 毕业院校 · 北京")


# ---- labels that look wrong, refusals, users' metrics, calibration --------------------------------------------


def test_suspects_are_sure_wrong_answers_whose_label_surprises(tmp_path: Path) -> None:
    def sure(line: int, gold: str, answer: str, confidence: float | None, loss: float | None) -> Prediction:
        return replace(row(TOPICS, [gold], [answer], line=line), confidence=confidence, loss=loss)

    usual = [sure(line, "手机", "手机", 0.99, 0.01 * line) for line in range(1, 21)]
    odd = [
        sure(30, "手机", "水果", 0.97, 3.0),
        sure(31, "手机", "水果", 0.97, 0.05),  # the label is as likely as others: an open choice
        sure(32, "手机", "水果", 0.60, 3.0),  # unsure
        sure(33, "手机", "手机", 0.99, 3.0),  # right
        sure(34, "手机", "水果", None, 3.0),  # no confidence: the loss alone decides
        sure(35, "手机", "水果", 0.999, None),
    ]
    same = [replace(one, confidence=None, loss=None) for one in odd[:1]]
    made = report((TOPICS,), base=same, tuned=[*usual, *odd])
    suspects = made.findings().suspects
    assert [one.prediction.source for one in suspects] == ["dev.jsonl:35", "dev.jsonl:30", "dev.jsonl:34"]
    write_report(made, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "suspects.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[1] == {
        "source": "dev.jsonl:30",
        "task": "topics",
        "prompt": "问题",
        "gold": '["手机"]',
        "suggested": '["水果"]',
        "confidence": 0.97,
        "loss": 3.0,
        "reason": suspects[1].reason,
    }
    assert "97 % sure of another answer" in suspects[1].reason and "came from: base" in suspects[1].reason
    page = Page(made.to_html())
    assert "3 rows where tuned is sure of another answer" in page.text
    assert sum("q" in one for one in page.rows["rows"]) == 3


def test_another_order_of_the_same_facts_is_no_suspect() -> None:
    gold = [fact("甲", "父亲", "乙"), fact("丙", "母亲", "丁")]
    rows = [replace(row(FACTS, gold, gold[::-1]), confidence=0.99), replace(row(CHAT, "a", "b"), confidence=0.99)]
    assert report((FACTS, CHAT), tuned=rows).findings().suspects == ()


def test_where_nothing_was_measured_the_page_says_that_nothing_was_looked_for() -> None:
    assert "so nothing could be looked for" in Page(report(tuned=TUNED).to_html()).text
    known = [replace(one, confidence=0.2) for one in TUNED]
    assert "so nothing could be looked for" not in Page(report(tuned=known).to_html()).text


@pytest.mark.parametrize("task", [FACTS, TOPICS, CHAT])
def test_a_refused_answer_earns_nothing_whatever_it_holds(task: Task) -> None:
    gold: Any = {"facts": [fact("甲", "父亲", "乙")], "topics": ["水果"], "chat": ""}[task.name]
    refused = replace(row(task, gold, gold, finish="refused"), refusal="No token can follow.")
    made = report((task,), tuned=[refused])
    side = made.sides["tuned"]
    (score,) = side.scores
    assert (score.metrics[score.primary], score.metrics["valid"], score.metrics["exact"], score.refused) == (0, 0, 0, 1)
    assert score.refusals == {"No token can follow.": 1}
    assert (side.rows[0].valid, side.rows[0].exact) == (False, False)
    text = Page(made.to_html()).text
    assert "Answers the engine refused" in text and "1 of 1" in text
    assert "| Answers the engine refused | 1 |" in made.to_markdown()


def test_predictions_with_all_that_may_be_known_read_back_as_written(tmp_path: Path) -> None:
    full = replace(
        TUNED[0],
        finish="refused",
        refusal="limit",
        confidence=0.0,
        fields=(FieldConfidence(path="", value="甲", confidence=1.0),),
        loss=0.0,
        length=7,
        origin="a.jsonl",
    )
    write_predictions([full, TUNED[1]], tmp_path / "p.jsonl")
    assert read_predictions(tmp_path / "p.jsonl") == (full, TUNED[1])
    assert set(TUNED[1].to_json()) == {"source", "task", "prompt", "gold", "answer", "finish"}
    for wrong in ({"confidence": 1.5}, {"loss": "high"}, {"length": -1}, {"fields": [{"path": "a"}]}, {"refusal": 1}):
        with pytest.raises(ValueError, match="must be"):
            Prediction.from_json({**full.to_json(), **wrong})


def test_users_metrics_are_averaged_over_the_rows_that_have_them() -> None:
    extra = [{"polite": 1.0}, {"polite": 1.0, "short": 0.5}, {"polite": 0.0}]
    side = score_side(TUNED, (FACTS, TOPICS), resamples=200, extra=extra)
    facts_score, topics = side.scores
    assert (facts_score.metrics["polite"], topics.metrics["polite"], topics.metrics["short"]) == (1, 0.5, 0.5)
    assert topics.intervals["polite"] == (0, 1)
    assert "short" not in facts_score.metrics
    made = replace(report(tuned=TUNED), sides={"tuned": side})
    assert "| polite | 50.0 [0.0, 100.0] |" in made.to_markdown()
    assert Page(made.to_html()).rows["rows"][1]["u"] == {"polite": 1, "short": 0.5}
    long = replace(made, sides={"tuned": score_side(TUNED, (FACTS, TOPICS), resamples=0, extra=[{"words": 12.0}] * 3)})
    assert "| words (not per cent) | 12.0 |" in long.to_markdown()
    assert "words (not per cent) 12.0 " in " ".join(Page(long.to_html()).text.split())
    with pytest.raises(DataError, match="has a metric accuracy already"):
        score_side(TUNED, (FACTS, TOPICS), extra=[{"accuracy": 1.0}] * 3)
    with pytest.raises(DataError, match="3 predictions but further metrics of 1"):
        score_side(TUNED, (FACTS, TOPICS), extra=extra[:1])


class Calibrated(NamedTuple):
    """The parts of a calibration that a report shows."""

    bins: tuple[tuple[float, float, int, float, float], ...] = ((0.0, 0.5, 4, 0.3, 0.25), (0.5, 1.0, 0, 0.75, 0.0))
    ece: float = 0.05
    table: tuple[tuple[float, float, float], ...] = ((0.5, 0.8, 0.95), (0.9, 0.0, 0.0))

    def to_json(self) -> dict[str, Any]:
        return {"ece": self.ece}


def test_calibration_is_drawn_and_its_table_shown() -> None:
    made = replace(report((TOPICS,), tuned=TUNED[1:]), calibration={"topics": Calibrated()})
    page = Page(made.to_html())
    text = " ".join(page.text.split())
    assert "topics: expected calibration error 5.0 points" in text
    assert "50.0 % sure 20.0 % 95.0 % 90.0 % sure 100.0 % –" in text
    assert page.tags.count("circle") == 1  # the empty bin has no dot
    assert made.to_json()["calibration"] == {"topics": {"ece": 0.05}}


# ---- the page in a browser ------------------------------------------------------------------------------------


def test_a_browser_shows_the_rows_and_runs_nothing_of_theirs(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium or google-chrome on this machine")
    rows = [row(CHAT, EVIL, f"{EVIL} {n}", line=n, prompt=EVIL) for n in range(40)]
    page = tmp_path / "report.html"
    html = report((CHAT,), base=rows, tuned=rows).to_html()
    page.write_text(html, encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert 'class="scripted"' in shown
    assert "40 of 40 rows" in shown
    inside = shown.split('<div id="rows">')[1].split('<script type="application/json"')[0]
    assert inside.count("<article>") == 25
    assert "&lt;img src=x" in inside and "<img" not in shown.split("<script")[0]
