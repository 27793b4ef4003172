"""Rows read as records, and every way in which a row or a file can be bad."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weitiao.data import compression, formats
from weitiao.data.formats import recognise_format, row_to_record
from weitiao.data.record import Record
from weitiao.data.records import digest_records, iter_records_or_problems, read_records
from weitiao.errors import DataError, Problem
from weitiao.messages import Message

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
ANSWER = {"role": "assistant", "content": "A"}
GOOD = {"context": "Instruction: I\nInput: Q\n\nT\nAnswer: ", "target": "A"}
quick = settings(max_examples=60, deadline=None, database=None)
# Letters that trip a reader: line ends of every kind, spaces, the grammar's own punctuation, two- to four-byte UTF-8.
texts = st.lists(
    st.sampled_from(
        ["a", "文", "😀", "é", " ", "\n", "\n\n", "\r\n", "\t", "\u2028", "\\", '"', "Input:", "\nAnswer:"]
    ),
    max_size=12,
).map("".join)


def convert(row: dict[str, Any], *, require_target: bool = True) -> Record:
    record = row_to_record(row, "rows.jsonl:1", require_target=require_target)
    assert isinstance(record, Record), record
    return record


def from_context(context: str) -> Record:
    return convert({"context": context, "target": "A"})


def chat(*turns: tuple[str, object], **others: object) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **others}


def write(folder: Path, content: str | bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def problems_of(path: Path, *, require_target: bool = True) -> list[Problem]:
    with pytest.raises(DataError) as caught:
        read_records(path, require_target=require_target)
    assert all(str(problem) in str(caught.value) for problem in caught.value.problems)
    return list(caught.value.problems)


def only_problem(folder: Path, content: str | bytes, name: str = "rows.jsonl") -> Problem:
    (problem,) = problems_of(write(folder, content, name))
    assert problem.message.endswith(".") and problem.fix.endswith((".", "?", '"'))
    return problem


# --- Context and target ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "instruction", "question", "text"),
    [
        ("Instruction: I\nInput: Q\n\nT\nAnswer: ", "I", "Q", "T"),
        ("Instruction: I\nInput: Q\n\nT\nAnswer:", "I", "Q", "T"),
        ("Instruction:I\nInput:Q\n\nT\nAnswer: ", "I", "Q", "T"),
        ("Instruction: I1\nI2\nInput: Q1\nQ2\n\nT\nAnswer: ", "I1\nI2", "Q1\nQ2", "T"),
        ("Instruction: I\nInput: Q\n\nT1\n\nT2\nAnswer: ", "I", "Q", "T1\n\nT2"),
        ("Instruction: I\nInput: Q\n \t\n\n  T\nAnswer: ", "I", "Q", "  T"),
        ("Instruction: I\nInput: Q\n\nInput: a\nAnswer: b\nAnswer: ", "I", "Q", "Input: a\nAnswer: b"),
        ("Instruction: I\r\nInput: Q\r\n\r\nT\r\nAnswer: ", "I", "Q", "T"),
        ("Instruction: I\nInput: T\nAnswer: ", "I", "", "T"),
        ("Instruction: I\nInput: \n\nT\nAnswer: ", "I", "", "T"),
        ("Instruction: I\nInput: \nAnswer: ", "I", "", ""),
    ],
)
def test_a_context_is_split_into_instruction_question_and_text(
    context: str, instruction: str, question: str, text: str
) -> None:
    record = from_context(context)
    assert (record.instruction, record.question, record.text) == (instruction, question, text)
    assert record.text_span is not None and context[slice(*record.text_span)] == text


def test_a_context_without_an_input_line_has_an_instruction_and_nothing_to_shorten() -> None:
    record = from_context("Instruction: write a poem\nAnswer: ")
    assert (record.instruction, record.question, record.text, record.text_span) == ("write a poem", "", "", None)


@pytest.mark.parametrize(
    "context", ["Tell me a story.\n\nPlease.", "Instruction: I\nInput: T", "Instruction: I\nAnswer: b\nc", "\nAnswer: "]
)
def test_a_context_outside_the_grammar_is_taken_whole_and_is_not_to_be_shortened(context: str) -> None:
    record = from_context(context)
    assert (record.text, record.text_span, record.instruction, record.question) == (context, None, "", "")
    with pytest.raises(ValueError, match=r"^rows\.jsonl:1: .*stays whole"):
        record.with_text("x")


@quick
@given(context=texts)
def test_a_context_is_kept_verbatim(context: str) -> None:
    if context.strip():
        assert from_context(context).messages == (Message(role="user", text=context),)


@quick
@given(text=texts.filter(lambda text: text == text.lstrip() and not text.endswith("\r")), new_text=texts)
def test_replacing_the_text_changes_no_character_outside_it(text: str, new_text: str) -> None:
    before, after = "Instruction: I\nInput: Q1\nQ2\n\n", "\nAnswer: "
    record = from_context(before + text + after)
    assert (record.question, record.text) == ("Q1\nQ2", text)
    changed = record.with_text(new_text)
    assert changed.prompt == before + new_text + after
    assert changed.text == new_text and changed.with_text(text) == record


# --- Messages --------------------------------------------------------------------------------------------------------


def test_the_last_message_is_the_target_and_the_others_are_the_conversation() -> None:
    row = chat(("system", "S"), ("user", "U1"), ("assistant", "A1"), ("user", "Q\n\nT1\n\nT2"), ("assistant", "A2"))
    record = convert(row | {"task": "news", "label": "x"})
    assert [message.text for message in record.messages] == ["S", "U1", "A1", "Q\n\nT1\n\nT2"]
    assert (record.target, record.task, record.instruction) == ("A2", "news", "S")
    assert (record.question, record.text, record.text_span) == ("Q", "T1\n\nT2", (3, 9))
    assert record.raw == row | {"task": "news", "label": "x"}


def test_a_user_message_without_a_blank_line_is_all_text() -> None:
    record = convert(chat(("user", "one\ntwo"), ("assistant", "A")))
    assert (record.instruction, record.question, record.text, record.text_span) == ("", "", "one\ntwo", (0, 7))
    assert record.with_text("one").prompt == "one"


def test_prediction_input_may_lack_its_answer() -> None:
    unlabelled: list[dict[str, Any]] = [{"context": "C"}, {"context": "C", "target": None}, chat(("user", "U"))]
    for row in unlabelled:
        assert convert(row, require_target=False).target is None
        assert isinstance(row_to_record(row, "rows.jsonl:1", require_target=True), list)
    assert convert(GOOD, require_target=False).target == "A"
    assert convert(chat(("user", "U"), ("assistant", "A")), require_target=False).target == "A"


@pytest.mark.parametrize("target", ["A", [], [{"a": 1}], {}, {"a": None}])
def test_texts_lists_and_objects_are_targets(target: object) -> None:
    assert convert({"context": "C", "target": target}).target == target
    assert convert(chat(("user", "U"), ("assistant", target))).target == target


def test_a_format_is_recognised_by_the_rows_own_keys() -> None:
    assert recognise_format({"context": "C", "target": "T", "id": 1}) == "context_target"
    assert recognise_format({"context": "C"}) == "context_target"
    assert recognise_format({"messages": [], "context": "a note"}) == "messages"
    assert recognise_format({"messages": [], "context": "C", "target": "T"}) is None
    assert recognise_format({"prompt": "P"}) == "prompt_response"
    assert recognise_format({"text": "T"}) is None
    assert recognise_format({"query": "Q"}) is None


def test_every_format_of_the_table_has_its_own_name_and_its_own_keys_or_values() -> None:
    assert len({one.name for one in formats.FORMATS}) == len(formats.FORMATS)
    for keys in {one.keys for one in formats.FORMATS}:
        sharing = [one for one in formats.FORMATS if one.keys == keys]
        assert len(sharing) == 1 or all(one.fits is not None for one in sharing), keys


# --- Bad rows --------------------------------------------------------------------------------------------------------

BAD_ROWS: list[tuple[object, str, str]] = [
    ({"contxt": "C", "target": "T"}, "row", "`contxt`, `target`"),
    ({"contxt": "C", "target": "T"}, "row", "Did you mean `context` instead of `contxt`?"),
    ({"Messages": []}, "row", "Did you mean `messages` instead of `Messages`?"),
    ({"query": "C"}, "row", "context_target (`context` + `target`); alpaca (`instruction` + `output`)"),
    ({"text": "C"}, "row", "name one in the recipe: format: doccano_relations"),
    ({"prompt": "C"}, "response", "is missing"),
    ({}, "row", "has no keys"),
    ({"messages": [], **GOOD}, "row", "context_target and messages"),
    ({"context": "C"}, "target", "is missing"),
    ({"context": "C", "tagret": "T"}, "target", "Did you mean `target` instead of `tagret`?"),
    ({"context": "C", "target": " \n"}, "target", "is empty"),
    ({"context": "C", "target": 3.5}, "target", 'Write it as a string: "3.5".'),
    ({"context": "C", "target": True}, "target", 'Write it as a string: "true".'),
    ({"context": "C", "target": None}, "target", "is nothing (`null`), not text"),
    ({"context": "", "target": "T"}, "context", "is empty"),
    ({"context": ["C"], "target": "T"}, "context", "is a list, not text"),
    (GOOD | {"task": 3}, "task", "is a number"),
    (GOOD | {"task": ""}, "task", "is empty"),
    ({"messages": []}, "messages", "is an empty list"),
    ({"messages": "hi"}, "messages", "is text"),
    ({"messages": [{"role": "user", "content": "U"}, "hi"]}, "messages[1]", "is text, not an object"),
    ({"messages": ["hi"]}, "messages[0]", "is text, not an object"),
    (chat(("human", "U"), ("assistant", "A")), "messages[0].role", "Did you mean `user`?"),
    (chat(("user", "U"), ("gpt", [])), "messages[1].role", "Did you mean `assistant`?"),
    (chat(("User", "U"), ("assistant", "A")), "messages[0].role", "Did you mean `user`?"),
    (chat(("user", "U"), ("tool", "A"), ("assistant", "A")), "messages", "messages[1] is a tool's, but after the"),
    (chat(("user", "U"), ("judge", "A")), "messages[1].role", "Write system, user, assistant or tool."),
    (chat(("user", ""), ("assistant", "A")), "messages[0].content", "is empty"),
    (chat(("user", [{"type": "text"}]), ("assistant", "A")), "messages[0].content", "is a list, not text"),
    (chat(("user", "U"), ("assistant", 3)), "messages[1].content", 'Write it as a string: "3".'),
    (chat(("user", "U")), "messages", "no answer to learn"),
    (chat(("user", "U"), ("user", "V"), ("assistant", "A")), "messages", "messages[1] is the user's"),
    (chat(("assistant", "A")), "messages", "starts with the user's"),
    ({"messages": [{"role": "user", "contnet": "U"}, ANSWER]}, "messages[0].content", "instead of `contnet`"),
    ({"messages": [{"rle": "user", "content": "U"}]}, "messages[0].role", "is missing"),
    ({"messages": [{"role": "user", "content": "U"}, ANSWER | {"loss": 0}]}, "messages", "no reply that may be learnt"),
    ({"messages": [{"role": "user", "content": "U"}, ANSWER | {"loss": 2}]}, "messages[1].loss", "not true or false"),
    ({"messages": [{"role": "user", "content": "U", "loss": True}, ANSWER]}, "messages[0].loss", "only replies"),
    ([1, 2], "row", "is a list, not an object"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "field", "words"), BAD_ROWS)
def test_a_bad_row_is_told_by_field_cause_and_fix(row: object, field: str, words: str, tmp_path: Path) -> None:
    problem = only_problem(tmp_path, lines(GOOD, row))
    assert (problem.source, problem.field) == (f"{tmp_path}/rows.jsonl:2", field)
    assert words in str(problem)


def test_all_problems_of_all_rows_are_reported_at_once(tmp_path: Path) -> None:
    bad_chat = chat(("usr", ""), ("assistant", None), task=1)
    path = write(tmp_path, "\n" + lines(GOOD, {"context": 1, "target": 2}) + "\n{oops\n" + lines(GOOD, bad_chat))
    found = [(problem.source.removeprefix(f"{path}:"), problem.field) for problem in problems_of(path)]
    chat_fields = ["task", "messages[0].role", "messages[0].content", "messages[1].content"]
    assert found == [("3", "context"), ("3", "target"), ("5", "row"), *[("7", field) for field in chat_fields]]
    with pytest.raises(DataError, match="3 of 5 rows cannot be used"):
        read_records(path)


BAD_LINES: list[tuple[bytes, str, str]] = [
    (b'{"context": "C", "target": "T"', "row", "Expecting ',' delimiter, at column 31, where the line ends"),
    (b"{'context': 'C'}", "row", "at column 2, where `'context': 'C'}` stands"),
    (b'{"context": "C"} {"context": "D"}', "row", "one JSON object per line"),
    (b'{"context": "C\t", "target": "T"}', "row", "Invalid control character"),
    (b'{"context": "C", "target": "\\q"}', "row", "write a backslash twice"),
    (b'{"context": "C\x00", "target": "T"}', "row", "the byte at offset 14 of the line is NUL"),
    (b'{"context": "C\\u0000", "target": "T"}', "context", "NUL character"),
    (b'{"context": "\xe6\x96\x87\xb5", "target": "T"}', "row", "the byte at offset 16 of the line 0xb5 is not UTF-8"),
    (b'{"context": "C", "target": ["T", NaN]}', "target[1]", "is nan"),
    (b'{"context": "C", "target": {"a": -Infinity}}', "target.a", "is -inf"),
    (b'{"context": "C", "target": [1e999]}', "target[0]", "is inf"),
    (b'{"context": "C", "target": "T", "context": "D"}', "context", "stands twice"),
    (b'{"context": "C", "target": {"a": 1, "a": 2}}', "a", "stands twice"),
    (b'{"context": "C", "target": "\\ud83d"}', "target", "half a character"),
    (b'{"context": "C", "target": {"\\ud83d": 1}}', "\\ud83d", "half a character"),
    (b'{"context": "C", "target": [' + b"9" * 5000 + b"]}", "row", "too many digits"),
    (b'{"context": ' + b"[" * 100_000, "row", "inside each other"),
    (b'{"context": "C", "target": ' + b"[" * 150 + b"]" * 150 + b"}", "target", "more than 100 lists or objects"),
    (b"\xef\xbb\xbf{}", "row", "where `\\ufeff{}` stands"),
]


@pytest.mark.parametrize(("line", "field", "words"), BAD_LINES)
def test_a_line_that_is_not_strict_json_is_refused_with_its_place(
    line: bytes, field: str, words: str, tmp_path: Path
) -> None:
    problem = only_problem(tmp_path, lines(GOOD).encode() + line + b"\r\n" + lines(GOOD).encode())
    assert (problem.source, problem.field) == (f"{tmp_path}/rows.jsonl:2", field)
    assert words in str(problem)


# --- Files -----------------------------------------------------------------------------------------------------------


def test_rows_know_their_physical_line_and_the_path_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "\n" + lines(GOOD) + " \n\r\n" + lines(GOOD))
    monkeypatch.chdir(tmp_path)
    assert [record.source for record in read_records("rows.jsonl")] == ["rows.jsonl:2", "rows.jsonl:5"]


def test_byte_order_mark_windows_line_ends_and_a_missing_last_line_end_change_nothing(tmp_path: Path) -> None:
    row = {"context": "Instruction: I\nInput: Q\r\n\r\nT\u2028\nAnswer: ", "target": "文"}
    plain = lines(row, row).encode()
    expected = read_records(write(tmp_path, plain))
    for content in (b"\xef\xbb\xbf" + plain, plain.replace(b"\n", b"\r\n"), plain.rstrip(b"\n")):
        assert read_records(write(tmp_path, content)) == expected
    assert expected[0].prompt == row["context"]


@pytest.mark.parametrize("prefix", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_json_file_may_hold_one_array_of_rows(prefix: bytes, tmp_path: Path) -> None:
    found = read_records(write(tmp_path, prefix + json.dumps([GOOD, GOOD], indent=2).encode(), "rows.json"))
    assert [record.source for record in found] == [f"{tmp_path}/rows.json:row 1", f"{tmp_path}/rows.json:row 2"]
    assert [record.raw for record in found] == [GOOD, GOOD]
    assert len(read_records(write(tmp_path, prefix + lines(GOOD, GOOD).encode(), "rows.json"))) == 2


@pytest.mark.parametrize(
    ("content", "source", "words"),
    [
        (b'[\n{"context": "C",\n "context": "D", "target": "T"}]', "rows.json:row 1", "stands twice"),
        (b"[\n3]", "rows.json:row 1", "not an object"),
        (b'[\n\n{"context": }]', "rows.json:3", "at column 13, where `}]` stands"),
        (b'[\n{"context": "C", "target": "T"}\n{}]', "rows.json:3", "Expecting ',' delimiter"),
        (b'[{"context": "C", "target": "T"},\n]', "rows.json:2", "where `]` stands"),
        (b'[{"context": "C", "target": "T"}', "rows.json:1", "the line ends"),
        (b'[{"context": "C", "target": "T"}]\n\n]', "rows.json:3", "Extra data"),
        (b'[\n"\xff"]', "rows.json:2", "offset 1 of the line 0xff is not UTF-8"),
        (b'{\n"context": "C"\n}', "rows.json:1", "spread over several lines"),
    ],
)
def test_a_broken_array_is_told_by_row_or_line(content: bytes, source: str, words: str, tmp_path: Path) -> None:
    problem = only_problem(tmp_path, content, "rows.json")
    assert problem.source == f"{tmp_path}/{source}" and words in str(problem)


def test_an_array_written_over_lines_in_a_jsonl_file_is_one_problem_not_one_per_line(tmp_path: Path) -> None:
    assert "name the file .json" in only_problem(tmp_path, json.dumps([GOOD] * 9, indent=1)).fix


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n", b"\xef\xbb\xbf\n"])
def test_a_file_without_rows_is_an_error(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        read_records(write(tmp_path, content))
    with pytest.raises(DataError, match="holds no rows"):
        read_records(write(tmp_path, "[ ]", "rows.json"))


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"\xff\xfe{\0}\0", "UTF-16"),
        (b"\x1f\x8b\x08", "damaged gzip"),
        (b"PK\x03\x04", r"\.xlsx"),
        (b"PAR1", r"\.parquet"),
    ],
)
def test_other_kinds_of_files_are_named(start: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        read_records(write(tmp_path, start))


def test_a_missing_file_brings_up_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path, lines(GOOD), "train.jsonl")
    with pytest.raises(DataError, match=r"tarin\.jsonl does not exist\. Did you mean .*train\.jsonl\?"):
        read_records(tmp_path / "tarin.jsonl")
    with pytest.raises(DataError, match=r"nor does its folder"):
        read_records(tmp_path / "nowhere" / "train.jsonl")


def test_a_file_that_may_not_be_read_is_an_error_with_the_command_that_mends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:  # root, who runs tests in containers, may read everything
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(compression, "open", refuse, raising=False)
    with pytest.raises(DataError, match=r"may not be read by this user.*chmod u\+r rows\.jsonl"):
        read_records("rows.jsonl")


def test_streaming_yields_records_and_problems_in_file_order(tmp_path: Path) -> None:
    path = write(tmp_path, lines(GOOD, {"context": 1, "target": 2}, GOOD))
    kinds = [type(item).__name__ for item in iter_records_or_problems(path)]
    assert kinds == ["Record", "Problem", "Problem", "Record"]


def test_streaming_holds_one_row_in_memory(tmp_path: Path) -> None:
    path = write(tmp_path, lines({"context": "x" * 20_000, "target": "T"}) * 200)
    tracemalloc.start()
    try:
        assert sum(1 for _ in iter_records_or_problems(path)) == 200
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < path.stat().st_size / 4


# --- Fingerprint and the shared sets ---------------------------------------------------------------------------------


def test_the_digest_is_of_what_is_learnt_and_in_which_order() -> None:
    first, second = convert(GOOD), convert(chat(("system", "S"), ("user", "U"), ("assistant", {"a": 1, "b": 2})))
    digest = digest_records([first, second])
    assert len(digest) == 64 and digest == digest_records(iter([first, second]))
    moved = row_to_record(dict(reversed(GOOD.items())), "elsewhere.jsonl:9", require_target=True)
    assert isinstance(moved, Record) and digest_records([moved, second]) == digest
    swapped = convert(chat(("system", "S"), ("user", "U"), ("assistant", {"b": 2, "a": 1})))
    named = convert(GOOD | {"task": "news"})
    others = [[second, first], [first], [first, swapped], [named, second], [first.with_text("文"), second]]
    assert len({digest, *map(digest_records, others)}) == 1 + len(others)


@pytest.mark.parametrize(("name", "num_rows"), [("train", 802), ("dev", 100)])
def test_the_shared_triples_and_topics_load_with_question_and_text(name: str, num_rows: int) -> None:
    path = SHARED / "spo_and_topics" / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"the shared data set {path} is not on this machine")
    found = read_records(path)
    assert len(found) == num_rows
    assert len({record.instruction for record in found}) == 1 and len({record.question for record in found}) <= 15
    for record in found:
        assert record.question and record.text and "\n\n" not in record.question
        assert record.prompt == record.raw["context"] and record.prompt.endswith(record.text + "\nAnswer: ")


def test_the_shared_news_messages_load_with_system_question_and_text() -> None:
    path = SHARED / "news_messages" / "train.jsonl"
    if not path.exists():
        pytest.skip(f"the shared data set {path} is not on this machine")
    found = read_records(path)
    assert len(found) == 320
    for record in found:
        assert record.instruction and record.question and record.text
        assert [message.role for message in record.messages] == ["system", "user"]
        assert record.target == record.raw["messages"][-1]["content"] and "record_id" in record.raw
