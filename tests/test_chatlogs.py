"""Messages become conversations: kinds, turns, groups, and several exports of one chat; every message is counted.

Every person, message and number here is invented.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from chat_exports import (
    MIXED,
    NAMES,
    OLD,
    TURNS,
    ai_text,
    chat,
    convert,
    old_row,
    old_table,
    samples,
    table,
    text_export,
    write,
)
from weitiao.data.chatlogs import ImportSettings, import_chats
from weitiao.data.chatlogs.kinds import read_labelled, read_named, read_numbered
from weitiao.data.chatlogs.settings import change_rules
from weitiao.errors import DataError

# --- Kinds of messages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (read_numbered(1, 0, "在吗"), ("text", "在吗")),
        (read_numbered(3, 0, "<msg><img/></msg>"), ("image", "")),
        (read_numbered(49, 57, "<?xml?><msg><title>好&amp;行</title><refermsg/></msg>"), ("quote", "好&行")),
        (read_numbered(49, 57, ""), ("quote", "")),
        (read_numbered(49, 999, "?"), ("unknown", "")),
        (read_numbered(10000, 0, '"小红" 撤回了一条消息'), ("recall", "")),
        (read_numbered(10000, 0, "以上是打招呼的内容"), ("system", "")),
        (read_numbered(10000, 4, "拍了拍"), ("pat", "")),
        (read_named("引用消息", "好的\n引用：小红: 在吗\n在"), ("quote", "好的")),
        (read_named("语音", "【语音】我到了"), ("voice", "我到了")),
        (read_named("诗", "x"), None),
        (read_labelled("[图片]"), ("image", "")),
        (read_labelled("[图片]好看吗"), ("text", "[图片]好看吗")),
        (read_labelled("好的\n引用:小红:在吗"), ("quote", "好的")),
        (read_labelled("            [链接]:title:标题\n            url:x"), ("link", "")),
        (read_labelled("【分享链接】\n标题：x\n描述：y"), ("link", "")),
        (read_labelled("【红包】: 恭喜发财"), ("red_packet", "")),
        (read_labelled("【表情包】 开心"), ("sticker", "")),
        (read_labelled("【重要】明天开会"), ("text", "【重要】明天开会")),
    ],
)
def test_what_was_sent_is_told_from_the_names_of_each_export(read: object, expected: object) -> None:
    assert read == expected


def test_the_rules_say_what_becomes_of_each_kind_and_all_are_counted(tmp_path: Path) -> None:
    summary, conversations = convert(tmp_path, {"a.csv": MIXED})
    assert conversations == [["u:[图片]\n好看吗", "a:好看", "u:[表情]", "a:哈哈"]]
    assert summary.dropped == {"image": 1, "recall": 1, "empty": 1}
    assert (summary.messages, summary.used, summary.merged) == (8, 4, 1)


def test_rules_can_be_changed(tmp_path: Path) -> None:
    rules = change_rules(["image=〔图〕", "recall=[撤回]"], ["sticker", "quote"])
    options = ImportSettings(system="", held_out=0, rules=rules)
    summary, conversations = convert(tmp_path, {"a.csv": MIXED}, options)
    assert conversations == [["u:〔图〕\n好看吗", "a:〔图〕\n好看"]]
    assert summary.dropped == {"empty": 1, "sticker": 1, "quote": 1, "trailing question": 1}
    with pytest.raises(DataError, match=r"'foto=x' does not map.*'lied' is no kind.*The kinds are: text, quote"):
        change_rules(["foto=x"], ["lied"])


# --- Conversations ---------------------------------------------------------------------------------------------------


def test_silence_ends_a_conversation_also_before_my_own_messages(tmp_path: Path) -> None:
    text = chat((0, "在吗"), (5, ">在"), (66, ">忘了说"), (67, "什么"), (68, ">没事"), (400, "早"), (401, ">早"))
    summary, conversations = convert(tmp_path, {"a.csv": text})
    assert conversations == [["u:在吗", "a:在"], ["u:什么", "a:没事"], ["u:早", "a:早"]]
    assert summary.dropped == {"leading reply": 1}
    _, conversations = convert(tmp_path, {}, ImportSettings(system="", held_out=0, gap_minutes=61))
    assert conversations == [["u:在吗", "a:在\n忘了说", "u:什么", "a:没事"], ["u:早", "a:早"]]


def test_leading_replies_and_trailing_questions_are_dropped_and_counted(tmp_path: Path) -> None:
    summary, conversations = convert(
        tmp_path, {"a.csv": chat((0, ">早"), (1, "在吗"), (2, ">在"), (3, "哦"), (4, "好"))}
    )
    assert conversations == [["u:在吗", "a:在"]]
    assert summary.dropped == {"leading reply": 1, "trailing question": 2}


def test_length_has_limits_and_long_conversations_go_on_in_another(tmp_path: Path) -> None:
    entries = [(number, f"{'>' if number % 2 else ''}第{number}句") for number in range(12)]
    options = ImportSettings(system="", held_out=0, min_turns=4, max_turns=4)
    summary, conversations = convert(tmp_path, {"a.csv": chat(*entries, (200, "在吗"), (201, ">在"))}, options)
    assert [len(each) for each in conversations] == [4, 4, 4]
    assert conversations[1][0] == "u:第4句"
    assert summary.dropped == {"too short": 2}
    _, conversations = convert(tmp_path, {"a.csv": chat(*entries[:10])}, options)
    assert [len(each) for each in conversations] == [4, 6]  # two turns alone would be too short
    _, conversations = convert(tmp_path, {}, ImportSettings(system="", held_out=0, max_turns=0))
    assert [len(each) for each in conversations] == [10]


def test_merged_messages_are_joined_as_asked(tmp_path: Path) -> None:
    _, conversations = convert(tmp_path, {"a.csv": old_table()}, ImportSettings(system="", held_out=0, joiner="，"))
    assert conversations[0][0] == "u:在吗，周末去爬山吗"


def test_the_contact_may_be_the_assistant(tmp_path: Path) -> None:
    system = "你是{{name}}，在和{{ remark }}说话"
    options = ImportSettings(assistant="contact", system=system, held_out=0)
    for name, text in (("小红.csv", old_table()), ("小红.json", samples("messages"))):
        folder = tmp_path / name
        summary, conversations = convert(folder, {name: text}, options)
        assert conversations == [["s:你是小红，在和小明说话", "u:去啊", "a:几点"]]
        assert summary.dropped["trailing question"] == 1
        assert summary.dropped["leading reply"] >= 1


def test_the_default_system_prompt_names_both(tmp_path: Path) -> None:
    _, conversations = convert(tmp_path, {"小红_utf8.csv": old_table()}, ImportSettings(held_out=0))
    assert conversations[0][0].startswith("s:你是小明，正在微信上和小红聊天。")
    with pytest.raises(DataError, match=r"\{\{name\}\}.*--me"):
        convert(tmp_path / "x", {"小红_utf8.csv": old_table(names=False)}, ImportSettings(held_out=0))


def test_settings_that_make_no_sense_are_named_together() -> None:
    with pytest.raises(DataError) as raised:
        ImportSettings(gap_minutes=0, held_out=1, min_turns=1, max_turns=3, encoding="latin-1", system="{{you}}")
    for word in ("gap", "held_out", "min_turns", "max_turns", "encoding", "{{you}}"):
        assert word in str(raised.value)


# --- Groups ----------------------------------------------------------------------------------------------------------

GROUP = table(
    [*OLD, *NAMES],
    [
        old_row(0, False, "今晚聚吗", names=("小红", "红", "wxid_red0000")),
        old_row(1, False, "去哪", names=("小蓝", "蓝", "wxid_blue000")),
        old_row(2, False, "我都行", names=("小蓝", "蓝", "wxid_blue000")),
        old_row(3, True, "老地方"),
        old_row(4, False, "好", names=("小红", "红", "wxid_red0000")),
        old_row(5, True, "七点"),
    ],
)


def test_in_a_group_the_others_are_named(tmp_path: Path) -> None:
    options = ImportSettings(system="{{name}}在{{remark}}", held_out=0)
    summary, conversations = convert(tmp_path, {"饭友_utf8.csv": GROUP}, options)
    assert conversations == [
        ["s:小明在饭友", "u:小红：今晚聚吗\n小蓝：去哪\n我都行", "a:老地方", "u:小红：好", "a:七点"]
    ]
    assert summary.contacts[0].is_group
    _, conversations = convert(tmp_path, {}, ImportSettings(system="", held_out=0, group_names=False))
    assert conversations[0][0] == "u:今晚聚吗\n去哪\n我都行"


def test_a_member_of_a_group_may_be_the_assistant(tmp_path: Path) -> None:
    options = ImportSettings(system="{{name}}", held_out=0, member="小红")
    summary, conversations = convert(tmp_path, {"饭友_utf8.csv": GROUP}, options)
    assert conversations == [["s:小红", "u:小蓝：去哪\n我都行\n小明：老地方", "a:好"]]
    assert summary.dropped == {"leading reply": 1, "trailing question": 1}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (ImportSettings(system="", assistant="contact"), "group chat, no member chosen"),
        (ImportSettings(system="", member="小绿"), "group chat without the chosen member"),
        (ImportSettings(system="", contacts=["小红"]), "chat not asked for"),
    ],
)
def test_groups_and_chats_that_are_left_out_are_counted(tmp_path: Path, options: ImportSettings, reason: str) -> None:
    files = {"饭友_utf8.csv": GROUP, "小红_utf8.csv": old_table()}
    summary, _ = convert(tmp_path, files, options)
    assert summary.dropped[reason] == 6
    assert summary.messages == 11


# --- Several exports -------------------------------------------------------------------------------------------------


def test_a_chat_exported_in_many_ways_is_read_once(tmp_path: Path) -> None:
    files = {
        "小红/小红_utf8.csv": old_table(),
        "messages.csv": old_table(),
        "小红/小红.txt": text_export(old=True),
        "小红/小红_chat.txt": ai_text(old=True),
        "小红/小红_train.json": samples("conversations"),
        "train.json": samples("conversations"),
    }
    summary, conversations = convert(tmp_path, files)
    assert conversations == [TURNS]
    assert summary.messages == 5 + 5 + 6 + 5 + 4 + 4
    assert summary.dropped == {
        "in a fuller export of the chat": 15,
        "repeated": 5,
        "in a merged file beside its chats": 4,
    }
    assert sum("was left out" in note for note in summary.notes) == 4


def test_exports_of_one_chat_that_overlap_in_time_are_joined_without_repeats(tmp_path: Path) -> None:
    entries = [(0, "在吗"), (1, ">在"), (2, "哈哈"), (2, "哈哈"), (3, ">笑啥"), (4, "没啥"), (5, ">哦")]
    summary, conversations = convert(tmp_path, {"2023.csv": chat(*entries[:5]), "2024.csv": chat(*entries[2:])})
    assert conversations == [["u:在吗", "a:在", "u:哈哈\n哈哈", "a:笑啥", "u:没啥", "a:哦"]]
    assert summary.dropped == {"repeated": 3}


def test_merged_files_of_ready_made_conversations_count_once(tmp_path: Path) -> None:
    summary, conversations = convert(
        tmp_path, {"小红_train.json": samples("conversations"), "train.json": samples("conversations")}
    )
    assert conversations == [TURNS]
    assert summary.dropped == {"repeated": 4}


def test_its_own_output_is_never_read_again(tmp_path: Path) -> None:
    write(tmp_path, "小红_utf8.csv", old_table() + chat((500, "早"), (501, ">早")).partition("\n")[2])
    options = ImportSettings()
    first = import_chats([tmp_path], tmp_path / "chats", options, salt="s")
    before = {path.name: path.read_bytes() for path in (tmp_path / "chats").iterdir()}
    assert set(before) == {"train.jsonl", "dev.jsonl", "summary.json", "canaries.json"}
    again = import_chats([tmp_path], tmp_path / "chats", options, overwrite=True, salt="s")
    assert (again.messages, again.train, again.dev) == (first.messages, first.train, first.dev) == (7, 1, 1)
    skipped = {Path(file["path"]).name for file in again.files if file["note"] == "is the result of an earlier import"}
    assert skipped == set(before)
    for name in ("train.jsonl", "dev.jsonl", "canaries.json"):
        assert (tmp_path / "chats" / name).read_bytes() == before[name]
    with pytest.raises(DataError, match=r"already holds train.jsonl.*--force"):
        import_chats([tmp_path], tmp_path / "chats", options)
    with pytest.raises(DataError, match="result of an earlier import"):
        import_chats([tmp_path / "chats/train.jsonl"], tmp_path / "other", options)
