"""Exported chats of every generation are read whole; bad rows are named all at once.

Every person, message and number here is invented.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from chat_exports import (
    DIALOGUE,
    NAMES,
    OLD,
    TURNS,
    ai_text,
    at,
    convert,
    later_table,
    old_row,
    old_table,
    rows_of,
    samples,
    table,
    text_export,
    write,
)
from weitiao.data.chatlogs import ImportSettings
from weitiao.data.chatlogs.folder import read_chats, recognise_export
from weitiao.errors import DataError

# --- Every generation of export --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "kind", "contact"),
    [
        ("小红_utf8.csv", old_table(), "table", "小红"),
        ("小红_utf8.csv", old_table(names=False), "table", "小红"),
        ("messages.csv", old_table(), "table", "小红"),
        ("小红.csv", later_table(), "later table", "小红"),
        ("我的导出.csv", later_table(me="我"), "later table", "小红"),
        ("小红.txt", text_export(old=True), "text", "小红"),
        ("小红.txt", text_export(old=False), "text", "小红"),
        ("小红.txt", text_export(old=False).replace("\n", "\r\n"), "text", "小红"),
        ("小红_chat.txt", ai_text(old=False), "AI text", "小红"),
        ("小红_train.json", samples("conversations"), "samples", "小红"),
        ("小红.json", samples("messages"), "samples", "小红"),
        ("小红(1).json", samples("alpaca"), "samples", "小红"),
    ],
)
def test_every_export_gives_the_same_conversation(
    tmp_path: Path, name: str, text: str, kind: str, contact: str
) -> None:
    assert recognise_export(text) == kind
    summary, conversations = convert(tmp_path, {name: text})
    assert conversations == [TURNS]
    assert [each.contact for each in summary.contacts] == [contact]
    assert [file["kind"] for file in summary.files] == [kind]
    (row,) = rows_of(tmp_path / "out")
    assert row["contact"] == contact
    timed = kind not in ("samples", "AI text")
    day = "2023-05-01T00:00:00+08:00" if kind == "AI text" else None
    assert (row["start"], row["end"]) == (
        ("2023-05-01T20:00:00+08:00", "2023-05-01T20:04:00+08:00") if timed else (day, day)
    )


def test_the_old_ai_text_parts_messages_by_blanks(tmp_path: Path) -> None:
    _, conversations = convert(tmp_path, {"小红_chat.txt": ai_text(old=True)})
    assert conversations == [["u:在吗 周末去爬山吗", "a:去啊", "u:几点", "a:八点吧\n别迟到"]]


def test_in_an_ai_text_the_speaker_goes_on_over_midnight_and_colons_are_no_names(tmp_path: Path) -> None:
    stars = "*" * 20
    text = (
        f"\n\n{stars}2023-05-01{stars}\n\n小红:在吗\n明天:三点\n\n小明:在"
        f"\n\n{stars}2023-05-02{stars}\n还没睡\n\n小红:记得\n\n地址:老地方\n\n小明:好"
    )
    summary, conversations = convert(
        tmp_path, {"小红_chat.txt": text}, ImportSettings(system="", held_out=0, me=["小明"])
    )
    assert conversations == [["u:在吗\n明天:三点", "a:在"], ["u:记得\n地址:老地方", "a:好"]]
    assert summary.dropped == {"leading reply": 1}
    with pytest.raises(DataError, match=r"these stand where names do: .*地址.*--members"):
        convert(tmp_path, {}, ImportSettings(system=""))


def test_a_table_of_all_chats_is_told_apart_by_talker(tmp_path: Path) -> None:
    blue = ("小蓝", "蓝", "wxid_blue000")
    rows = [
        old_row(0, False, "在吗"),
        old_row(1, False, "你好", talker=8, names=blue),
        old_row(2, True, "在"),
        old_row(3, True, "好", talker=8),
    ]
    summary, conversations = convert(tmp_path, {"messages.csv": table([*OLD, *NAMES], rows)})
    assert conversations == [["u:在吗", "a:在"], ["u:你好", "a:好"]]
    assert [each.contact for each in summary.contacts] == ["小红", "小蓝"]
    nameless = [row[:9] for row in rows]
    summary, _ = convert(tmp_path, {"messages.csv": table(OLD, nameless)})
    assert [each.contact for each in summary.contacts] == ["联系人7", "联系人8"]


def test_the_table_of_contacts_names_who_has_no_name(tmp_path: Path) -> None:
    rows = [old_row(0, False, "在吗", names=("", "", "wxid_red0000")), old_row(1, True, "在")]
    rows[0][9:] = ["", "", "wxid_red0000"]
    contacts = table(
        [
            "UserName",
            "Alias",
            "Type",
            "Remark",
            "NickName",
            "PYInitial",
            "RemarkPYInitial",
            "smallHeadImgUrl",
            "bigHeadImgUrl",
        ],
        [["wxid_red0000", "", 3, "小红同学", "红红", "", "", "", ""]],
    )
    summary, _ = convert(tmp_path, {"a.csv": table([*OLD, *NAMES], rows), "contacts.csv": contacts})
    assert [each.contact for each in summary.contacts] == ["小红同学"]
    assert [(file["kind"], file["note"]) for file in summary.files] == [("contacts", "1 names"), ("table", "")]


@pytest.mark.parametrize("me", [[], ["小明"]])
def test_who_is_me_must_be_known(tmp_path: Path, me: list[str]) -> None:
    path = write(tmp_path, "export.txt", text_export(old=False))
    if me:
        assert not read_chats([path], ImportSettings(me=me)).logs[0].is_group
    else:
        with pytest.raises(DataError, match=r"does not say which speaker you are; there are: 小红, 小明.*--me NAME"):
            read_chats([path], ImportSettings())
    with pytest.raises(DataError, match="has no speaker named 小强"):
        read_chats([path], ImportSettings(me=["小强"]))


def test_gb18030_is_read_when_it_is_declared(tmp_path: Path) -> None:
    path = write(tmp_path, "小红_utf8.csv", old_table(), "gb18030")
    assert read_chats([path], ImportSettings(encoding="gb18030")).logs[0].contact == "小红"
    with pytest.raises(DataError, match=r"小红_utf8.csv:2.*is not utf-8-sig.*--encoding gb18030"):
        read_chats([path], ImportSettings())


# --- Times -----------------------------------------------------------------------------------------------------------


def test_the_written_time_counts_and_seconds_are_beijing_time(tmp_path: Path) -> None:
    rows = [old_row(0, False, "在吗"), old_row(1, True, "在")]
    rows[1][8] = ""
    convert(tmp_path, {"a.csv": table([*OLD, *NAMES], rows)})
    (row,) = rows_of(tmp_path / "out")
    assert (row["start"], row["end"]) == ("2023-05-01T20:00:00+08:00", "2023-05-01T20:01:00+08:00")
    rows[0][8] = "2023-05-01 12:00:00"  # written by a clock at UTC
    rows[1][8] = "2023-05-01 12:01:00"
    summary, _ = convert(tmp_path, {"a.csv": table([*OLD, *NAMES], rows)})
    assert rows_of(tmp_path / "out")[0]["start"] == "2023-05-01T12:00:00+08:00"
    assert any("differ by -8 h" in note for note in summary.notes)
    utc = ImportSettings(system="", held_out=0, utc_offset=0)
    summary, _ = convert(tmp_path, {"a.csv": table([*OLD, *NAMES], rows)}, utc)
    assert not summary.notes


def test_messages_are_put_in_order_of_time(tmp_path: Path) -> None:
    rows = [old_row(m, me, text) for m, me, text in reversed(DIALOGUE)]
    assert convert(tmp_path, {"a.csv": table([*OLD, *NAMES], rows)})[1] == [TURNS]


# --- Bad rows --------------------------------------------------------------------------------------------------------


def test_all_bad_rows_are_reported_at_once_with_file_and_line(tmp_path: Path) -> None:
    good = old_row(0, False, "两行\n的消息")
    text = table([*OLD, *NAMES], [good, good[:-1], [*old_row(1, True, "x")[:8], "gestern", "", "", ""]])
    text += table([*OLD, *NAMES], [[1, 7, "文本", "", 2, "", 2, "x", "", "", "", ""]]).partition("\n")[2]
    write(tmp_path, "a.csv", text)
    write(tmp_path, "b.csv", later_table().replace("文本", "诗", 1).replace(at(1), "2023-13-01 20:00:00"))
    write(tmp_path, "c.csv", table([*OLD, *NAMES], [good]) + '1,7,1,0,0,1,2,"offen')
    write(tmp_path, "d.txt", f"{at(0)} 小红\n在\n\n2023-02-30 20:00:00 小明\n在")
    write(tmp_path, "e.json", '[{"messages": [{"role": "user", "content": "在"}]}, 3, {"messages": [{"role": "x"}]}]')
    with pytest.raises(DataError) as raised:
        read_chats([tmp_path], ImportSettings(me=["小明"]))
    found = {(problem.source.removeprefix(f"{tmp_path}/"), problem.field) for problem in raised.value.problems}
    assert found == {
        ("a.csv:4", "row"),
        ("a.csv:6", "StrTime"),
        ("a.csv:7", "Type"),
        ("a.csv:7", "IsSender"),
        ("a.csv:7", "CreateTime"),
        ("b.csv:2", "类型"),
        ("b.csv:3", "时间"),
        ("c.csv:4", "row"),
        ("d.txt:4", "time"),
        ("e.json:row 2", "row"),
        ("e.json:row 3", "messages[0]"),
    }


def test_what_is_no_export_is_named_and_an_error_when_given_by_name(tmp_path: Path) -> None:
    write(tmp_path, "in/小红.csv", later_table())
    write(tmp_path, "in/readme.txt", "hello")
    write(tmp_path, "in/empty.csv", "")
    write(tmp_path, "in/photo.jpg", "x")
    chats = read_chats([tmp_path / "in"], ImportSettings())
    notes = {Path(file.path).name: file.note for file in chats.files if file.note}
    assert notes == {
        "readme.txt": "is no chat log that is known",
        "empty.csv": "is empty",
        "photo.jpg": "is no .csv, .txt, .json, .jsonl file",
    }
    with pytest.raises(DataError, match=r"readme.txt cannot be imported: it is no chat log that is known"):
        read_chats([tmp_path / "in/readme.txt"], ImportSettings())
    with pytest.raises(DataError, match="does not exist"):
        read_chats([tmp_path / "nowhere"], ImportSettings())
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="There are no messages in"):
        read_chats([tmp_path / "bare"], ImportSettings())
