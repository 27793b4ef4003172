"""Reports as JSON, Markdown and one offline page, whatever the model wrote."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weitiao.errors import RunError
from weitiao.evaluate.differences import mark_differences
from weitiao.evaluate.metric_texts import METRICS
from weitiao.evaluate.report import Report, write_report
from weitiao.evaluate.score import Prediction, read_predictions, score_side
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


VOID_TAGS = {"meta", "br", "rect", "line", "input", "circle"}


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
