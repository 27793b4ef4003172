"""Personal data beside Chinese characters: all of it found and replaced, nothing else changed; leaks found again.

Every person and number here is invented.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weitiao.data.leaks import canaries_to_json, check_predictions, collect_canaries, find_leaks, read_canaries
from weitiao.data.privacy import (
    KINDS,
    KnownData,
    find_personal_data,
    has_id_card_check_digit,
    normalise_personal_data,
    passes_luhn,
)
from weitiao.data.redaction import CHINESE, ENGLISH, RedactionStyle, Redactor
from weitiao.errors import DataError


def pieces(text: str) -> list[tuple[str, str]]:
    return [(piece.kind, text[piece.start : piece.end]) for piece in find_personal_data(text)]


# --- What the exporters' own filter lets through or spoils -----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("我的电话13812345678", "我的电话[电话1]"),
        ("邮箱abc@qq.com", "邮箱[邮箱1]"),
        ("身份证 110101199003071234", "身份证 [身份证1]"),
        ("身份证 11010119900307123X", "身份证 [身份证1]"),
        ("密码是abc123", "密码是[密码1]"),
        ("QQ是123456789", "QQ是[QQ1]"),
        ("我是wxid_a1b2c3d4e5f6g7", "我是[微信1]"),
        ("passenger list", "passenger list"),
    ],
)
def test_what_word_boundaries_get_wrong_beside_chinese_is_right(text: str, redacted: str) -> None:
    assert Redactor().redact(text) == redacted


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("打13812345678给我", "phone", "13812345678"),
        ("打+8613812345678吧", "phone", "+8613812345678"),
        ("打86-138-1234-5678吧", "phone", "86-138-1234-5678"),
        ("打0086 138 1234 5678吧", "phone", "0086 138 1234 5678"),
        ("打（+86）13812345678吧", "phone", "（+86）13812345678"),
        ("打138 123 45678吧", "phone", "138 123 45678"),
        ("电话１３８１２３４５６７８。", "phone", "１３８１２３４５６７８"),
        ("电话138\u200b1234\u200b5678。", "phone", "138\u200b1234\u200b5678"),
        ("电话1️⃣3️⃣8️⃣1️⃣2️⃣3️⃣4️⃣5️⃣6️⃣7️⃣8️⃣哦", "phone", "1️⃣3️⃣8️⃣1️⃣2️⃣3️⃣4️⃣5️⃣6️⃣7️⃣8️⃣"),
        ("电话幺三八零零一三八零零零哦", "phone", "幺三八零零一三八零零零"),
        ("我在国外+1 415 555 0132找我", "phone", "+1 415 555 0132"),
        ("vx13812345678", "phone", "13812345678"),
        ("座机010-62345678转123，", "landline", "010-62345678转123"),
        ("座机（0571）87654321", "landline", "（0571）87654321"),
        ("写给a.b+c@mail.example.com.cn谢谢", "email", "a.b+c@mail.example.com.cn"),
        ("写给ａｂｃ＠ｑｑ．ｃｏｍ谢谢", "email", "ａｂｃ＠ｑｑ．ｃｏｍ"),
        ("写给abc（at）qq.com谢谢", "email", "abc（at）qq.com"),
        ("证号110101 19900307 1234吧", "id_card", "110101 19900307 1234"),
        ("证号110101900307123吧", "id_card", "110101900307123"),
        ("身份证号是999999999999999999啊", "id_card", "999999999999999999"),
        ("卡6222021234567890128收", "bank_card", "6222021234567890128"),
        ("卡4111 1111 1111 1111收", "bank_card", "4111 1111 1111 1111"),
        ("卡号是6222021234567890123收", "account", "6222021234567890123"),
        ("扣扣：12345678", "qq", "12345678"),
        ("q号 10001 加我", "qq", "10001"),
        ("微信号是hello_world", "wechat", "hello_world"),
        ("vx: xiaoming", "wechat", "xiaoming"),
        ("我的微信是xiaoming哦", "wechat", "xiaoming"),
        ("加微信 xiao_ming8", "wechat", "xiao_ming8"),
        ("密码：P@ss!word，别忘了", "password", "P@ss!word"),
        ("wifi密码88888888", "password", "88888888"),
        ("password: hunter2.", "password", "hunter2"),
        ("验证码 482913，五分钟内有效", "password", "482913"),
        ("账号abc_123登录", "account", "abc_123"),
        ("账号：zhangsan", "account", "zhangsan"),
    ],
)
def test_each_kind_is_found_whole_and_alone(text: str, kind: str, value: str) -> None:
    assert pieces(text) == [(kind, value)]


@pytest.mark.parametrize(
    "text",
    [
        "passenger list",
        "password is wrong",
        "密码是什么",
        "忘记密码了",
        "account balance",
        "微信android版本",
        "微信支付2023年账单",
        "今天是2023-05-01 20:00:00",
        "圆周率3.14159265358979",
        "0.13812345678",
        "订单1381234567890123",
        "价格12345元",
        "版本1.2.3",
        "@小红 在吗",
        "我在Q1完成",
        "第1234567890123456789012号",
        "",
    ],
)
def test_what_is_no_personal_data_stays(text: str) -> None:
    assert pieces(text) == []
    assert Redactor().redact(text) == text


def test_check_digits_grade_how_certain_a_find_is() -> None:
    def certain(text: str) -> list[bool]:
        return [piece.certain for piece in find_personal_data(text)]

    assert has_id_card_check_digit("11010519491231002X")  # the example of the standard
    assert not has_id_card_check_digit("110105194912310021")
    assert certain("号码11010519491231002X") == [True]
    assert certain("号码110105194912310021") == [False]
    assert certain("身份证110105194912310021") == [True]  # the keyword speaks for it
    assert certain("号码110101900307123") == [False]
    assert certain("01062345678") == [False]
    assert certain("010-62345678") == [True]
    assert passes_luhn("4111111111111111")
    assert not passes_luhn("4111111111111112")
    assert pieces("卡4111111111111112") == []


def test_plates_are_looked_for_when_asked() -> None:
    text = "车牌京A88888和沪AD12345"
    assert pieces(text) == []
    found = find_personal_data(text, kinds=["plate"])
    assert [text[piece.start : piece.end] for piece in found] == ["京A88888", "沪AD12345"]


def test_finds_that_overlap_become_one() -> None:
    text = "密码是abc@qq.com!x"
    assert pieces(text) == [("password", "abc@qq.com!x")]


@pytest.mark.parametrize(
    "piece",
    ["1", "a", "密码", "1 ", "@", "微信", "a@", "账号 ", " ", "@a.", "密码  ", "+1 ", "1-", "138 ", "QQ", "0571"],
)
def test_time_is_linear_in_the_text(piece: str) -> None:
    text = piece * (60_000 // len(piece))
    start = time.process_time()
    find_personal_data(text, kinds=KINDS)
    assert time.process_time() - start < 1.0


# --- 100 % found, everything else byte for byte ----------------------------------------------------------------------

CHINESE_CHARS = "我你他的在是有不吃饭去哪里好啊吗呢吧，。！？；…～爬山周末明天😀\n"
chinese = st.text(CHINESE_CHARS, max_size=8)
inside = st.sampled_from(["", "OK", "3点半", "2023年5月1日", "passenger", "100%", "a/b", "No.1", "iPhone 15", "5-6个"])
plain = st.builds(
    lambda before, middle, after: f"嗯{before}{middle}{after}好", chinese, inside, chinese
)  # begins and ends with Chinese, so that what stands beside a secret is Chinese
digits = st.text("0123456789", min_size=20, max_size=20)


def id_card(head: str, date: str, tail: str) -> str:
    body = f"11{head[:4]}{date}{tail[:3]}"
    return next(body + last for last in "0123456789X" if has_id_card_check_digit(body + last))


def card(number: str, length: int) -> str:
    body = f"62{number}"[: length - 1]
    return next(body + last for last in "0123456789" if passes_luhn(body + last))


phone = st.builds(
    lambda second, rest, shape: shape(f"1{second}{rest[0]}", rest[1:5], rest[5:9]),
    st.sampled_from("3456789"),
    digits,
    st.sampled_from(
        [
            lambda a, b, c: f"{a}{b}{c}",
            lambda a, b, c: f"{a}-{b}-{c}",
            lambda a, b, c: f"{a} {b} {c}",
            lambda a, b, c: f"+86{a}{b}{c}",
            lambda a, b, c: f"86{a}{b}{c}",
            lambda a, b, c: f"+86 {a} {b} {c}",
            lambda a, b, c: f"{a}{b}{c}".translate({48 + n: 0xFF10 + n for n in range(10)}),
        ]
    ),
)
date = st.dates().map(lambda day: f"19{day.year % 100:02}{day.month:02}{day.day:02}")
name = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=3, max_size=12)
secret = st.one_of(
    phone.map(lambda value: ("", value)),
    phone.map(lambda value: ("电话", value)),
    st.builds(id_card, digits, date, digits).map(lambda value: ("", value)),
    st.builds(lambda head, day, tail: f"11{head[:4]}{day[2:]}{tail[:3]}", digits, date, digits).map(
        lambda value: ("身份证", value)
    ),
    st.builds(card, digits, st.sampled_from([16, 19])).map(lambda value: ("", value)),
    st.builds(lambda local, host: ("", f"{local}@{host}.com"), name, name),
    digits.map(lambda value: ("座机", f"010-8{value[:7]}")),
    digits.map(lambda value: ("QQ", f"1{value[:8]}")),
    name.map(lambda value: ("密码是", f"{value}7")),
    name.map(lambda value: ("微信号：", f"a{value}_8")),
    name.map(lambda value: ("", f"wxid_{value}abc")),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(plain, secret), min_size=1, max_size=5), plain)
def test_every_secret_is_replaced_and_nothing_else_is_changed(parts: list, last: str) -> None:
    text, expected = "", []
    for before, (keyword, value) in parts:
        text += before + keyword
        expected.append((len(text), len(text) + len(value)))
        text += value
    text += last
    found = find_personal_data(text)
    assert [(piece.start, piece.end) for piece in found] == expected

    redacted = Redactor(style=RedactionStyle(names=CHINESE.names, template="⟦{name}{number}⟧")).redact(text)
    kept = [piece.partition("⟧")[2] for piece in ("⟧" + redacted).split("⟦")]
    assert kept == [before + keyword for before, (keyword, _) in parts] + [last]
    assert find_personal_data(redacted) == ()


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_keeps_what_is_not_found(text: str) -> None:
    found = find_personal_data(text, kinds=KINDS)
    assert all(0 <= piece.start < piece.end <= len(text) for piece in found)
    assert all(left.end <= right.start for left, right in itertools.pairwise(found))
    if not found:
        assert Redactor(kinds=KINDS).redact(text) == text


# --- Placeholders ----------------------------------------------------------------------------------------------------


def test_one_number_has_one_placeholder_in_a_conversation_however_it_is_written() -> None:
    redactor = Redactor()
    assert redactor.redact("13812345678") == "[电话1]"
    assert redactor.redact("换号了，13912345678") == "换号了，[电话2]"
    assert redactor.redact("旧的+86 138-1234-5678不用了") == "旧的[电话1]不用了"
    assert redactor.redact("QQ也是１３９１２３４５６７８") == "QQ也是[电话2]"
    assert redactor.counts == {"phone": 4}
    assert Redactor().redact("13912345678") == "[电话1]"


def test_the_style_of_placeholders_is_a_choice() -> None:
    text = "我的电话13812345678，密码是abc123"
    assert Redactor(style=ENGLISH).redact(text) == "我的电话[phone 1]，密码是[password 1]"
    stars = RedactionStyle(names=CHINESE.names, template="***{name}{number}***")
    assert Redactor(style=stars).redact(text) == "我的电话***电话1***，密码是***密码1***"
    assert Redactor(kinds=["phone"]).redact(text) == "我的电话[电话1]，密码是abc123"


def test_a_secret_announced_once_is_found_where_nothing_announces_it() -> None:
    texts = ["wifi密码是qwe12345", "qwe12345对吧", "qwe123456不是", "口令：letmein", "letmein是什么"]
    known = KnownData.collect(texts)
    redactor = Redactor(known=known)
    assert [redactor.redact(text) for text in texts] == [
        "wifi密码是[密码1]",
        "[密码1]对吧",
        "qwe123456不是",
        "口令：[密码2]",
        "letmein是什么",  # a plain word is not looked for: it may be one
    ]
    assert KnownData.collect(["没有"]) is None


def test_spellings_are_compared_as_one() -> None:
    for spelling in ("13812345678", "+86 138-1234-5678", "１３８１２３４５６７８", "(86)13812345678"):
        assert normalise_personal_data(spelling) == "13812345678"
    assert normalise_personal_data("ABC（at）QQ.com") == "abc@qq.com"
    assert normalise_personal_data("11010119900307123X") == "11010119900307123x"


# --- Leaks -----------------------------------------------------------------------------------------------------------

LOG = [
    ["我的电话13812345678", "好的", "再说一遍138-1234-5678"],
    ["邮箱zhang.san@example.com", "密码是S3cret!x", "QQ 123456789", "口令：opensesame"],
]


def test_canaries_are_each_secret_of_the_log_once() -> None:
    canaries = collect_canaries(LOG, salt="s")
    assert [(canary.kind, canary.text) for canary in canaries] == [
        ("phone", "13812345678"),
        ("email", "zhang.san@example.com"),
        ("password", "s3cret!x"),
        ("qq", "123456789"),
        ("password", "opensesame"),
    ]
    assert "13812345678" not in repr(canaries)
    assert [canary.digest for canary in collect_canaries(LOG, salt="t")] != [canary.digest for canary in canaries]
    salts = {collect_canaries(LOG[:1])[0].salt for _ in range(2)}
    assert len(salts) == 2


REPLIES = [
    "没有什么",
    "打１３８ １２３４ ５６７８",
    "写Zhang.San@example.com，用S3cret!x",
    "123 456 789",
    "138123456789",
    "opensesame，123456789",
]


@pytest.mark.parametrize("from_file", [False, True])
def test_leaks_name_the_secrets_that_replies_repeat(tmp_path: Path, from_file: bool) -> None:
    canaries = collect_canaries(LOG, salt="s")
    if from_file:
        path = tmp_path / "canaries.json"
        path.write_text(json.dumps(canaries_to_json(canaries, made_by="test")), encoding="utf-8")
        canaries = read_canaries(path)
        assert all(canary.text is None for canary in canaries)
    leaks = {leak.canary.digest: leak.replies for leak in find_leaks(REPLIES, canaries)}
    found = [leaks.get(canary.digest) for canary in canaries]
    assert found[:4] == [(1,), (2,), (2,), (3, 5)]
    assert found[4] == (None if from_file else (5,))  # a word without a digit cannot be guessed from its hash
    assert find_leaks(REPLIES, []) == []


def test_a_file_of_canaries_holds_no_secret(tmp_path: Path) -> None:
    text = json.dumps(canaries_to_json(collect_canaries(LOG), made_by="test"), ensure_ascii=False)
    for value in ("13812345678", "zhang", "example.com", "S3cret", "s3cret", "123456789", "opensesame"):
        assert value not in text


def test_predictions_are_checked_against_the_file_and_echoes_are_told_apart(tmp_path: Path) -> None:
    canaries, answers = tmp_path / "canaries.json", tmp_path / "answers.jsonl"
    canaries.write_text(json.dumps(canaries_to_json(collect_canaries(LOG), made_by="test")), encoding="utf-8")
    asked = [{"role": "user", "content": "13812345678是谁"}, {"role": "assistant", "content": "13812345678"}]
    rows = [
        {"messages": asked[:1], "prediction": "13812345678是我"},
        {"context": "你的电话？", "prediction": "13812345678"},
        {"messages": [{"role": "user", "content": "你好"}, asked[1]], "prediction": "138 1234 5678"},
        {"context": "QQ？", "prediction": "不告诉你"},
    ]
    answers.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    (leak,) = check_predictions(answers, canaries)
    assert (leak.canary.kind, leak.replies, leak.echoed) == ("phone", (1, 2, 3), (1,))


@pytest.mark.parametrize(
    ("answers", "canaries", "message"),
    [
        ("{}", None, "answers.jsonl:1 has no text under prediction"),
        ("{", None, "answers.jsonl:1 is not JSON"),
        ("", "{}", "is no file of canaries"),
        ("", '{"salt": "s", "hash": {"n": 2}, "canaries": []}', "was hashed in another way"),
        (None, None, "cannot be read"),
    ],
)
def test_files_that_cannot_be_compared_are_named(
    tmp_path: Path, answers: str | None, canaries: str | None, message: str
) -> None:
    known = json.dumps(canaries_to_json(collect_canaries(LOG), made_by="test")) if canaries is None else canaries
    (tmp_path / "canaries.json").write_text(known, encoding="utf-8")
    if answers is not None:
        (tmp_path / "answers.jsonl").write_text(answers, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        check_predictions(tmp_path / "answers.jsonl", tmp_path / "canaries.json")
