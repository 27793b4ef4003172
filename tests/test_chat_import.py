"""What an import gives out: split by time, personal data replaced, counted, never read again.

Every person, message and number here is invented.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from chat_exports import (
    MIXED,
    NAMES,
    OLD,
    chat,
    convert,
    old_row,
    old_table,
    rows_of,
    table,
    turns_of,
    write,
)
from weitiao.cli import app
from weitiao.data.chatlogs import ImportSettings
from weitiao.data.chatlogs.folder import read_chats
from weitiao.data.chatlogs.splitting import split_chat
from weitiao.data.chatlogs.turns import Tally, build_conversations
from weitiao.data.records import read_records
from weitiao.errors import DataError

# --- Splitting -------------------------------------------------------------------------------------------------------


def test_the_latest_part_of_each_chat_is_held_out(tmp_path: Path) -> None:
    blue = ("小蓝", "蓝", "wxid_blue000")
    rows = []
    for day in range(20):
        rows += [old_row(day * 1440, False, f"红{day}"), old_row(day * 1440 + 1, True, "嗯")]
        if day < 10:
            rows += [
                old_row(day * 1440, False, f"蓝{day}", talker=8, names=blue),
                old_row(day * 1440 + 1, True, "哦", talker=8),
            ]
    summary, _ = convert(
        tmp_path, {"messages.csv": table([*OLD, *NAMES], rows)}, ImportSettings(system="", held_out=0.2)
    )
    train, dev = rows_of(tmp_path / "out"), rows_of(tmp_path / "out", "dev.jsonl")
    assert (len(train), len(dev)) == (summary.train, summary.dev) == (24, 6)
    for contact, num_dev in (("小红", 4), ("小蓝", 2)):
        ends = [row["end"] for row in train if row["contact"] == contact]
        starts = [row["start"] for row in dev if row["contact"] == contact]
        assert len(starts) == num_dev
        assert max(ends) < min(starts)


def test_a_session_is_never_cut_by_the_split(tmp_path: Path) -> None:
    entries = [(number, f"{'>' if number % 2 else ''}第{number}句") for number in range(40)]
    options = ImportSettings(system="", held_out=0.1, max_turns=4)
    summary, _ = convert(tmp_path, {"a.csv": chat(*entries)}, options)
    assert (summary.train, summary.dev) == (10, 0)
    assert any("nothing of it was held out" in note for note in summary.notes)
    summary, _ = convert(tmp_path, {"a.csv": chat(*entries, *((m + 900, text) for m, text in entries))}, options)
    assert (summary.train, summary.dev) == (10, 10)


def windows(num: int, size: int = 10, step: int = 3) -> list[dict[str, Any]]:
    """Windows over a chat as the exporters' sliding strategy cuts it, turns merged by commas."""
    said = [("user" if number % 3 else "assistant", f"第{number}句") for number in range(num)]
    made = []
    for start in range(0, num - size, step):
        turns: list[dict[str, str]] = []
        for role, text in said[start : start + size]:
            if turns and turns[-1]["role"] == role:
                turns[-1]["content"] += "，" + text
            elif turns or role == "user":
                turns.append({"role": role, "content": text})
        while turns[-1]["role"] == "user":
            turns.pop()
        made.append({"messages": turns})
    return made


@pytest.mark.parametrize("order", ["in order", "shuffled"])
def test_windows_that_overlap_never_stand_on_both_sides(tmp_path: Path, order: str) -> None:
    rows = windows(300)
    if order == "shuffled":
        rows = [rows[index * 37 % len(rows)] for index in range(len(rows))]
    summary, _ = convert(
        tmp_path, {"小红.json": json.dumps(rows, ensure_ascii=False)}, ImportSettings(system="", held_out=0.1)
    )

    def pieces(name: str) -> set[str]:
        return {
            piece
            for row in rows_of(tmp_path / "out", name)
            for message in row["messages"]
            for piece in message["content"].split("，")
        }

    assert summary.dev >= 9
    assert summary.train >= 70
    shared = pieces("train.jsonl") & pieces("dev.jsonl")
    assert len(shared) <= 2, "two windows may touch in a message at their edge, not in more"
    assert summary.dropped["shares messages with the held-out part"] > 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 1, 1, 2, 30, 61, 500]), st.booleans(), st.sampled_from([1, 1, 1, 3, 47, 10000, 49])
        ),
        min_size=1,
        max_size=60,
    ),
    st.sampled_from(["me", "contact"]),
    st.sampled_from([2, 4]),
    st.sampled_from([0, 4, 6]),
    st.sampled_from([0.0, 0.1, 0.5]),
)
def test_every_message_is_accounted_for_whatever_the_chat(
    tmp_path_factory: pytest.TempPathFactory,
    entries: list[tuple[int, bool, int]],
    assistant: Any,
    min_turns: int,
    max_turns: int,
    held_out: float,
) -> None:
    options = ImportSettings(
        system="", assistant=assistant, min_turns=min_turns, max_turns=max_turns, held_out=held_out
    )
    minutes, rows = 0, []
    for number, (wait, me, type_) in enumerate(entries):
        minutes += wait
        rows.append(old_row(minutes, me, f"第{number}句", type_=type_))
    path = write(tmp_path_factory.mktemp("chat"), "a.csv", table([*OLD, *NAMES], rows))
    (log,) = read_chats([path], options).logs
    tally = Tally()
    conversations = build_conversations(log, options, tally)
    split = split_chat(conversations, held_out=held_out, tally=tally)
    assert tally.total == len(rows)
    assert tally.used == sum(len(each.turns) for each in conversations)
    assert [*split.train, *split.dev] == conversations
    for each in conversations:
        assert [turn.role for turn in each.turns] == ["user", "assistant"] * (len(each.turns) // 2)
        assert len(each.turns) >= min_turns
    if split.train and split.dev:
        assert split.train[-1].end < split.dev[0].start


# --- Privacy ---------------------------------------------------------------------------------------------------------

SECRETS = ["13812345678", "138-1234-5678", "zhang.san@example.com", "110101199003071234", "qwe12345", "13900001111"]


def test_personal_data_is_replaced_consistently_and_nowhere_in_clear(tmp_path: Path) -> None:
    text = chat(
        (0, "我的电话13812345678，邮箱zhang.san@example.com"),
        (1, ">记下138-1234-5678了"),
        (2, "身份证 110101199003071234，wifi密码是qwe12345"),
        (3, ">qwe12345对吧"),
        (500, "在吗"),
        (501, ">在，qwe12345"),
    ).replace("小红", "小红13900001111")
    summary, conversations = convert(tmp_path, {"13900001111_utf8.csv": text}, ImportSettings(held_out=0.3))
    assert conversations[0][0].startswith("s:你是小明，正在微信上和小红[电话1]聊天。")
    assert conversations[0][1:] == [
        "u:我的电话[电话2]，邮箱[邮箱1]",
        "a:记下[电话2]了",
        "u:身份证 [身份证1]，wifi密码是[密码1]",
        "a:[密码1]对吧",
    ]
    assert turns_of(rows_of(tmp_path / "out", "dev.jsonl")[0])[1:] == ["u:在吗", "a:在，[密码1]"]
    assert summary.redacted == {"phone": 4, "password": 3, "email": 1, "id_card": 1}
    assert summary.canaries == 5
    for path in (tmp_path / "out").iterdir():
        written = path.read_text(encoding="utf-8")
        assert not [secret for secret in SECRETS if secret in written]
        assert path.stat().st_mode & 0o077 == 0


def test_without_redaction_only_the_conversations_hold_secrets(tmp_path: Path) -> None:
    text = chat((0, "我的电话13812345678"), (1, ">好"))
    _, conversations = convert(tmp_path, {"小红13900001111.csv": text})
    assert conversations == [["u:我的电话13812345678", "a:好"]]
    for name in ("summary.json", "canaries.json"):
        written = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert not [secret for secret in SECRETS if secret in written]


# --- What comes out --------------------------------------------------------------------------------------------------


def test_the_output_can_be_trained_on(tmp_path: Path) -> None:
    convert(tmp_path, {"小红_utf8.csv": old_table()}, ImportSettings(held_out=0))
    records = read_records(tmp_path / "out/train.jsonl")
    assert records[-1].target == "八点吧\n别迟到"
    assert [message.role for message in records[-1].messages] == ["system", "user", "assistant", "user"]


def test_the_summary_on_disk_is_the_one_returned(tmp_path: Path) -> None:
    summary, _ = convert(tmp_path, {"小红_utf8.csv": old_table()}, ImportSettings(held_out=0))
    on_disk = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))
    assert on_disk == summary.to_json()
    assert on_disk["messages"] == on_disk["used"] + on_disk["merged"] + sum(on_disk["dropped"].values())


def test_nothing_left_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No conversation is left of 2 messages. Dropped: trailing question 2"):
        convert(tmp_path, {"小红.csv": chat((0, "在吗"), (1, "喂"))})
    assert not (tmp_path / "out").exists()


# --- The command -----------------------------------------------------------------------------------------------------


def run_cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["import-chats", *(str(each) for each in arguments)], catch_exceptions=False)


def test_the_command_prints_the_counts_and_the_files_it_skipped(tmp_path: Path) -> None:
    write(tmp_path, "in/小红_utf8.csv", MIXED)
    write(tmp_path, "in/readme.txt", "hello")
    result = run_cli(tmp_path / "in", "-o", tmp_path / "out", "--held-out", "0", "--map", "image=〔图〕", "--join", "/")
    assert result.exit_code == 0, result.stderr
    counts = {
        line.split("│")[1].strip(): line.split("│")[2].strip() for line in result.stdout.splitlines() if "│" in line
    }
    assert counts == {
        "messages read": "8",
        "used": "4",
        "merged": "2",
        "dropped: recall": "1",
        "dropped: empty": "1",
        "conversations to learn from": "1",
        "conversations held out": "0",
    }
    assert "readme.txt: is no chat log that is known" in result.stdout
    assert turns_of(rows_of(tmp_path / "out")[0])[1:] == ["u:〔图〕/好看吗", "a:〔图〕/好看", "u:[表情]", "a:哈哈"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--assistant", "you"], "assistant is 'you'; choose me or contact."),
        (["--redact", "fr"], "redact is 'fr'; choose zh, en or off."),
        (["--gap", "0"], "the gap is 0.0 minutes"),
        (["--drop", "lied"], "'lied' is no kind of message."),
        (["--encoding", "gb18030"], "not gb18030"),
    ],
)
def test_the_command_refuses_what_makes_no_sense_in_a_sentence(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    write(tmp_path, "小红_utf8.csv", old_table() + "\u20ac\u2028\U0001f600")
    result = run_cli(tmp_path, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_the_example_of_the_page_comes_out_as_shown(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs/chat-logs.md").read_text(encoding="utf-8")
    cells = [
        line.strip("| ").split(" | ")
        for line in page.split("## An example")[1].split("\n")
        if line[:3] in ("| 0", "| 1")
    ]
    rows = []
    for mine, type_, when, content in cells:
        row = old_row(0, mine == "1", content.strip("`"), type_=int(type_))
        row[5], row[8] = "", when
        rows.append(row)
    options = ImportSettings(system="你是{{name}}", held_out=0)
    summary, _ = convert(tmp_path, {"小红_utf8.csv": table([*OLD, *NAMES], rows)}, options)
    shown = page.split("```json\n")[1].split("```")[0]
    assert (tmp_path / "out/train.jsonl").read_text(encoding="utf-8") == shown
    assert (summary.messages, summary.used, summary.merged) == (6, 2, 2)
    assert summary.dropped == {"leading reply": 1, "trailing question": 1}
