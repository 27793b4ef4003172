"""What the doctor finds in rows: every kind of fault, each with its rows, its cure and nothing beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from weitiao.data.doctor import Doctor
from weitiao.data.findings import Edit, Finding, count_of, first_few
from weitiao.data.formats import row_to_record
from weitiao.data.lengths import LengthCount, nice_edges
from weitiao.data.mend import find_answer, mend_row, mend_rows
from weitiao.data.options import DEFAULT_OPTIONS
from weitiao.data.record import Record
from weitiao.data.texts import find_faults
from weitiao.errors import Problem
from weitiao.tasks.answers import AnswerWatch
from weitiao.tasks.base import infer_tasks
from weitiao.tasks.copying import nearest_piece

PLACES = ("北京", "上海", "苏州", "广州", "成都", "杭州", "南京", "武汉", "西安", "天津")


def record(row: dict[str, Any], source: str) -> Record:
    converted = row_to_record(row, source, DEFAULT_OPTIONS, require_target=True)
    assert isinstance(converted, Record), converted
    return converted


def asked(text: str, target: Any, **more: Any) -> dict[str, Any]:
    return {"context": f"Instruction: 回答。\nInput: 选一个。\n\n{text}\nAnswer: ", "target": target, **more}


def examine(
    train: Sequence[dict[str, Any]], dev: Sequence[dict[str, Any]] = (), *, free: bool = False
) -> dict[str, Finding]:
    """The findings of the data's own doctor by their code."""
    doctor = Doctor()
    for side, rows in (("train", train), ("dev", dev)):
        for number, row in enumerate(rows, start=1):
            doctor.add(record(row, f"{side}.jsonl:{number}"), side=side, task="t", free=free)  # type: ignore[arg-type]
    found = doctor.finish()
    assert len({finding.code for finding in found}) == len(found), "a fault of one kind is told once"
    return {finding.code: finding for finding in found}


def judge(train: Sequence[dict[str, Any]], dev: Sequence[dict[str, Any]] = ()) -> dict[str, Finding]:
    """The findings about answers by their code."""
    sides = [("train", row, n) for n, row in enumerate(train, 1)] + [("dev", row, n) for n, row in enumerate(dev, 1)]
    records = [(side, record(row, f"{side}.jsonl:{number}")) for side, row, number in sides]
    watch = AnswerWatch(infer_tasks([one for _, one in records]))
    for side, one in records:
        watch.add(one, side=side)  # type: ignore[arg-type]
    return {finding.code: finding for finding in watch.finish()}


# ---- rows that say the same -------------------------------------------------------------------------------------


def test_sound_rows_have_no_findings() -> None:
    assert examine([asked(f"第{n}篇讲的是{PLACES[n]}。", '["游记"]') for n in range(9)]) == {}


def test_a_repeat_is_a_warning_that_drops_the_later_row() -> None:
    spaced = asked("甲", "是 ")
    spaced["context"] += "  "
    (finding,) = examine([asked("甲", "是"), asked("乙", "否"), spaced]).values()
    assert (finding.code, finding.grade, finding.sources) == ("repeat", "warning", ("train.jsonl:3",))
    assert finding.details == ("The same as train.jsonl:1.",)
    assert [(edit.source, edit.action) for edit in finding.edits] == [("train.jsonl:3", "drop")]


def test_two_answers_to_one_input_are_an_error_unless_answers_are_free_text() -> None:
    rows = [asked("甲", "是"), asked("甲", "否"), asked("甲", "否")]
    found = examine(rows)
    assert {code: finding.grade for code, finding in found.items()} == {"contradiction": "error", "repeat": "warning"}
    assert found["contradiction"].details == ("'否' answers the input of train.jsonl:1, which is answered '是' there.",)
    assert not found["contradiction"].edits, "which of the two is right is for a person to say"
    assert examine(rows, free=True)["several-answers"].grade == "note"


def test_a_dev_row_that_is_trained_on_is_an_error_that_drops_the_train_row() -> None:
    (finding,) = examine([asked("甲", "是"), asked("乙", "否")], [asked("丙", "是"), asked("乙", "是")]).values()
    assert (finding.code, finding.grade, finding.sources) == ("leak", "error", ("dev.jsonl:2",))
    assert [edit.source for edit in finding.edits] == ["train.jsonl:2"]


def test_near_repeats_and_near_leaks_are_told_apart_and_name_their_twin() -> None:
    text = "昨天下午主队在最后一分钟踢进一球，赢下了这场艰难的比赛，全场观众起立鼓掌。"
    found = examine(
        [asked(text, "体育"), asked(text.replace("昨天", "前天"), "财经")],
        [asked(text.replace("一球", "两球"), "体育")],
    )
    assert found["near-repeat"].sources == ("train.jsonl:2",)
    assert found["near-repeat"].details[0].endswith("like train.jsonl:1, but answered differently.")
    assert found["near-leak"].sources == ("dev.jsonl:1",)
    assert "train.jsonl:1" in found["near-leak"].details[0]
    assert {finding.grade for finding in found.values()} == {"warning"}


# ---- texts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["你好，世界。今天天气不错！", "café “naïve” — 3 €", "電子郵件です"])
def test_utf8_read_as_latin_is_found_and_read_back(text: str) -> None:
    garbled = "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in text.encode())
    faults = [fault for fault in find_faults(garbled) if fault.kind == "mojibake"]
    assert faults
    for fault in faults:
        assert fault.mended is not None
        assert fault.mended in text


@pytest.mark.parametrize("text", ["电子", "我们今天学习编程", "产品质量很好，下次还会再来购买的"])
@pytest.mark.parametrize("before", ["", "前面是正常的句子。", "plain words "])
def test_utf8_read_as_gbk_is_found_within_sound_text_too(text: str, before: str) -> None:
    garbled = text.encode().decode("gbk")
    faults = find_faults(before + garbled)
    if len(text) < 4 and not before.isascii():
        assert faults == (), "too short to tell from sound text"
    else:
        assert [(fault.kind, fault.piece, fault.mended) for fault in faults] == [("mojibake", garbled, text)]


def test_garbled_text_that_lost_bytes_is_found_but_not_guessed_at() -> None:
    garbled = "这家公司成立于北京，创始人是张三。".encode().decode("gbk", "ignore")
    (fault,) = find_faults(f"前面是正常的句子。{garbled}")
    assert (fault.kind, fault.mended) == ("mojibake", None)


@pytest.mark.parametrize(
    "text",
    [
        "São Paulo à Genève, naïve Ärger, «CAFÉ», Ünïcödé, ÅÄÖ, déjà «vu»",
        "这是一段正常的话，没有问题。「引号」、顿号；还有——破折号……",
        "𠮷野家、麗しい、한국어 문장도 괜찮다, Привет мир",
        "a < b && c > d; x & y",
        "👨\u200d👩\u200d👧 和 می\u200cخواهم",
        "line one\nline two\tend",
    ],
)
def test_sound_texts_of_many_scripts_have_no_faults(text: str) -> None:
    assert find_faults(text) == ()


@pytest.mark.parametrize(
    ("text", "kind", "mended"),
    [
        ("价\u200b格", "invisible-characters", ""),
        ("\ufeff价格", "invisible-characters", ""),
        ("价\x07格", "control-characters", ""),
        ("价\r\n格", "carriage-returns", "\n"),
        ("价\ufffd格", "lost-characters", None),
        ("锟斤拷锟斤拷", "lost-characters", None),
        ("价&nbsp;格", "web-leftovers", None),
        ("价<br/>格", "web-leftovers", None),
        ("２０２１年", "full-width", None),
    ],
)
def test_each_kind_of_fault_has_its_name_and_its_cure(text: str, kind: str, mended: str | None) -> None:
    (fault,) = find_faults(text)
    assert (fault.kind, fault.mended) == (kind, mended)


def test_faulty_texts_are_listed_with_code_points_in_place_of_invisible_characters() -> None:
    finding = examine([asked("好", "是"), asked("价\u200b格", "否")])["invisible-characters"]
    assert (finding.sources, finding.details) == (("train.jsonl:2",), ('"<U+200B>"',))


def test_answers_that_are_not_composed_are_noted_and_can_be_mended() -> None:
    finding = examine([asked("一", "cafe\u0301"), asked("二", "café")])["not-nfc"]
    assert (finding.grade, finding.sources) == ("note", ("train.jsonl:1",))
    assert finding.edits[0].new == "café"


# ---- rows by themselves -----------------------------------------------------------------------------------------


def test_personal_data_is_counted_and_never_shown() -> None:
    doctor = Doctor()
    doctor.add(record(asked("电话13812345678，邮箱abc@example.com", "是"), "a:1"), side="train", task="t", free=False)
    (finding,) = doctor.finish()
    assert doctor.personal_data() == {"phone": 1, "email": 1}
    assert finding.title == "1 row with personal data: 1 phone, 1 e-mail"
    assert "138" not in json.dumps(finding.to_json())
    assert "abc@" not in json.dumps(finding.to_json())


def test_keys_that_nothing_uses_are_noted_and_the_others_are_not() -> None:
    rows = [asked("甲", "是", id=7, origin="某处"), asked("乙", "否", id=8, task="t", note=None, echo="乙", empty="")]
    (finding,) = examine(rows).values()
    assert finding.title == "2 rows with keys that nothing uses: id (2), origin (1)"
    assert finding.details == ("id, origin", "id")


def test_a_row_without_text_among_rows_with_text_is_conspicuous() -> None:
    rows = [asked(f"第{n}篇。", "是") for n in range(30)]
    assert examine([*rows, asked(" ", "否")])["empty-text"].sources == ("train.jsonl:31",)


def test_a_text_far_longer_than_the_others_is_named_with_its_length() -> None:
    rows = [asked(f"第{n}篇。", "是") for n in range(30)]
    finding = examine([*rows, asked("长" * 5000, "是")])["overlong-input"]
    assert finding.sources == ("train.jsonl:31",)
    assert finding.details[0].startswith("5,0")


def test_bad_rows_are_one_error_counting_rows_and_listing_problems() -> None:
    doctor = Doctor()
    for field in ("context", "target"):
        doctor.reject(Problem(source="a:1", field=field, message="is missing.", fix="Add it."))
    (finding,) = doctor.finish()
    assert (finding.grade, finding.count, finding.sources) == ("error", 1, ("a:1", "a:1"))
    assert finding.details[1] == "target: is missing. Fix: Add it."


def test_lengths_are_described_and_every_row_is_in_a_bin() -> None:
    count = LengthCount("characters", "input")
    count.add(*range(100), 5000)
    lengths = count.describe()
    assert lengths is not None
    assert (lengths.shortest, lengths.median, lengths.ninety_fifth, lengths.longest) == (0, 50, 95, 5000)
    assert sum(lengths.bins) == lengths.count == 101
    assert lengths.wide_end, "one far-off row does not flatten the others"
    assert count.over(98) == [99, 100]
    assert LengthCount("tokens", "example").describe() is None
    assert nice_edges(3, 47, 5) == (0, 10, 20, 30, 40, 50)


# ---- answers ----------------------------------------------------------------------------------------------------


def triple(number: int, place: str, *, said: str | None = None) -> dict[str, Any]:
    answer = [{"subject": f"第{number}人", "predicate": "住在", "object": said or place}]
    return asked(f"第{number}人一直住在{place}的老城里。", f"```json\n{json.dumps(answer, ensure_ascii=False)}\n```")


def test_a_value_that_is_not_in_the_text_is_named_with_the_nearest_piece() -> None:
    rows = [triple(n, PLACES[n % 10]) for n in range(30)]
    rows[4] = triple(4, "呼和浩特市", said="呼和号特市")
    finding = judge(rows)["not-copied"]
    assert (finding.grade, finding.sources) == ("warning", ("train.jsonl:5",))
    assert finding.details == ('object "呼和号特市", near "呼和浩特市"',)
    assert "呼和浩特市" in finding.edits[0].new
    assert "第4人" in finding.edits[0].new


def test_a_value_with_several_near_pieces_is_left_to_a_person() -> None:
    rows = [triple(n, PLACES[n % 10]) for n in range(30)]
    rows[4] = triple(4, "四川外语学院法语系", said="四川外语学院x")
    finding = judge(rows)["not-copied"]
    assert not finding.edits


@pytest.mark.parametrize(
    ("value", "text", "piece", "certain"),
    [
        ("IPhone 15", "他买了 iphone15 。", "iphone15", True),
        ("《喜剧之王》", "请读喜剧之王周星驰", "喜剧之王", True),
        ("北京大字医学部", "他毕业于北京大学医学部。", "北京大学医学部", True),
        ("周星池", "《喜剧之王》由周星驰主演", "周星驰", False),
        ("A B", "ab 与 AB", "ab", False),
    ],
)
def test_the_nearest_piece_is_found_and_sure_only_where_one_can_be_meant(
    value: str, text: str, piece: str, certain: bool
) -> None:
    near = nearest_piece(value, text)
    assert near is not None
    assert (near.text, near.certain) == (piece, certain)


def test_nothing_is_near_a_value_from_elsewhere() -> None:
    assert nearest_piece("火星", "今天下雨") is None


def test_spellings_of_one_label_are_joined_to_the_most_frequent() -> None:
    rows = [asked(f"第{n}篇。", '["体育"]' if n % 2 else '["科技"]') for n in range(40)]
    rows[6]["target"] = '["科技 "]'
    finding = judge(rows)["label-variant"]
    assert finding.sources == ("train.jsonl:7",)
    assert finding.edits[0].new == '["科技"]'


def test_labels_out_of_balance_rare_ones_and_those_that_only_dev_rows_have() -> None:
    rows = [asked(f"第{n}篇。", '["体育"]' if n > 5 else '["科技"]' if n > 2 else '["财经"]') for n in range(80)]
    found = judge(rows, [asked("后来。", '["天气"]')])
    assert found["unbalanced-labels"].title.startswith("92% of the train rows of labels have the label 体育")
    assert "科技 (3), 财经 (3)" in found["rare-label"].message
    assert found["dev-only-label"].title.endswith("only dev rows have: 天气")
    assert {found[code].grade for code in ("unbalanced-labels", "dev-only-label")} == {"warning"}


def test_answers_of_another_form_are_errors_and_other_spellings_notes() -> None:
    rows = [asked(f"第{n}篇。", '["体育"]' if n % 2 else '["科技"]') for n in range(40)]
    rows[3]["target"], rows[8]["target"] = "体育", '[ "科技" ]'
    found = judge(rows)
    assert (found["misfit"].grade, found["misfit"].sources) == ("error", ("train.jsonl:4",))
    assert (found["respelled"].grade, found["respelled"].sources) == ("note", ("train.jsonl:9",))


# ---- mending ----------------------------------------------------------------------------------------------------


def test_the_place_of_the_answer_is_found_in_any_row() -> None:
    assert find_answer({"text": "好", "target": "好"}, "好") == ("target",)
    assert find_answer({"instruction": "说好", "output": "好", "label": "好"}, "好") == ("output",)
    turns = [{"role": "user", "content": "好"}, {"role": "assistant", "content": "好"}]
    assert find_answer({"messages": turns, "id": "好的"}, "好") == ("messages", 1, "content")
    assert find_answer({"a": "x", "b": "y"}, "好") is None
    assert find_answer({"a": "好", "b": "好"}, "好") is None, "either may be it"


def test_mending_changes_the_copy_and_lists_what_it_did() -> None:
    rows = [asked("甲", '["体育"]'), asked("价\u200b格", '["科技"]'), asked("甲", '["体育"]')]
    records = [record(row, f"a:{number}") for number, row in enumerate(rows, 1)]
    doctor = Doctor()
    for one in records:
        doctor.add(one, side="train", task="t", free=False)
    doctor.reject(Problem(source="a:4", field="row", message="is not JSON.", fix="Mend it."))
    lines: list[str] = []
    count, changes = mend_rows([*records, "a:4"], doctor.finish(), lines.append)
    assert count == len(lines) == 2
    assert json.loads(lines[1])["context"] == asked("价格", "")["context"]
    assert [(change.source, change.what) for change in changes] == [
        ("a:2", "text"), ("a:3", "dropped"), ("a:4", "dropped")
    ]  # fmt: skip
    assert "\u200b" in records[1].raw["context"], "the row itself stays as it is"


def test_an_answer_whose_place_is_unknown_is_listed_as_not_mended() -> None:
    one = record(asked("甲", '["体育"]'), "a:1")
    elsewhere = replace(one, raw={"question": "甲", "choice": 3})
    row, (change,) = mend_row(elsewhere, [Edit(source="a:1", action="answer", new="x", why="spelling")])
    assert row == {"question": "甲", "choice": 3}
    assert change.what == "not mended"


def test_counts_and_places_are_told_in_words() -> None:
    assert count_of(1, "reply", "replies") == "1 reply"
    assert count_of(1234, "row") == "1,234 rows"
    assert first_few(["a", "b", "c"], limit=2) == "a, b and 1 more"
