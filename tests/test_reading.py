"""New rows are asked as the rows were that the run learnt from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from test_formats import ROWS
from weitiao.contract import Contract
from weitiao.data.formats import FORMATS
from weitiao.data.options import ReadOptions
from weitiao.data.reading import Said, describe_sources, read_like
from weitiao.data.records import Record, read_records
from weitiao.errors import DataError

WHICH = "哪一类？\n\n{text}"
LABEL = {"text": "球队赢了", "label": "体育"}
CHAT = {"messages": [{"role": "user", "content": "在吗"}, {"role": "assistant", "content": "在"}]}
IDENTITY = {"instruction": "你是谁？", "input": "", "output": "我是{{name}}。"}

# The answer of each format's row in test_formats: the key without which it is a row to be answered.
ANSWERS = {
    "context_target": "target", "alpaca": "output", "prompt_response": "response", "content_summary": "summary",
    "text_category_output": "output", "question_answer": "answer", "doccano_relations": "relations",
    "doccano_entities": "entities", "text_entities": "entities", "text_spans": "label", "text_label": "label",
    "uie": "result_list", "spo_list": "spo_list", "label_studio": "annotations",
}  # fmt: skip
LAST_TURN = {"messages": "messages", "conversations": "conversations", "sharegpt": "conversations"}


def asked(name: str) -> dict[str, Any]:
    """The row of test_formats without its answer, as someone would write it to have it answered."""
    row = dict(ROWS[name])
    if name in ANSWERS:
        return {key: value for key, value in row.items() if key not in (ANSWERS[name], "entities")}
    if name == "turn_pairs":
        *before, last = row["conversation"]
        return {"conversation": [*before, {"input": last["input"]}]}
    if name == "client_dialogue":
        return {"dialogue": row["dialogue"][:1]}
    key = LAST_TURN[name]
    return {**row, key: row[key][:-1]}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def source(path: Path, *rows: dict[str, Any], **options: Any) -> tuple[str, ReadOptions]:
    return write(path, *rows), ReadOptions(**options)


def shown(records: list[Record]) -> list[list[tuple[str, str]]]:
    return [[(message.role, message.text) for message in record.messages] for record in records]


@pytest.mark.parametrize("name", [one.name for one in FORMATS])
def test_a_row_without_its_answer_is_asked_as_the_labelled_row_was(name: str, tmp_path: Path) -> None:
    kept = describe_sources([source(tmp_path / "train.jsonl", ROWS[name], format=name)])
    kept = json.loads(json.dumps(kept))  # as the contract gives it back
    [learnt] = read_records(tmp_path / "train.jsonl")
    [record] = read_like(kept, write(tmp_path / "new.jsonl", asked(name)), require_target=False)
    assert record.target is None
    assert shown([record]) == shown([learnt])


@pytest.mark.parametrize("name", [one.name for one in FORMATS if "text" not in one.keys and one.name != "label_studio"])
def test_most_rows_without_their_answer_are_recognised_without_being_told(name: str, tmp_path: Path) -> None:
    kept = describe_sources([source(tmp_path / "train.jsonl", ROWS[name])])
    [record] = read_like(kept, write(tmp_path / "new.jsonl", asked(name)), require_target=False)
    assert record.target is None


def test_prompt_system_and_placeholders_are_those_of_training(tmp_path: Path) -> None:
    kept = describe_sources([source(tmp_path / "train.jsonl", LABEL, prompt=WHICH, system="你是编辑。")])
    new = write(tmp_path / "new.jsonl", {"text": "股票跌了", "label": "财经"})
    assert shown(read_like(kept, new)) == [[("system", "你是编辑。"), ("user", "哪一类？\n\n股票跌了")]]
    kept = describe_sources([source(tmp_path / "train.jsonl", IDENTITY, placeholders={"name": "小微"})])
    [record] = read_like(kept, write(tmp_path / "new.jsonl", IDENTITY))
    assert record.target == "我是小微。"


def test_the_user_may_say_otherwise_and_empty_texts_mean_none(tmp_path: Path) -> None:
    kept = describe_sources([source(tmp_path / "train.jsonl", LABEL, prompt=WHICH, system="你是编辑。")])
    new = write(tmp_path / "new.jsonl", LABEL)
    [plain] = read_records(new)
    assert shown(read_like(kept, new, said=Said(prompt="", system=""))) == shown([plain])
    said = Said(prompt="类别：{text}", system="S", format="text_label")
    assert shown(read_like(kept, new, said=said)) == [[("system", "S"), ("user", "类别：球队赢了")]]


def test_a_mixed_run_asks_each_row_as_the_sources_of_its_format_were_asked(tmp_path: Path) -> None:
    kept = describe_sources([
        source(tmp_path / "labels.jsonl", LABEL, prompt=WHICH),
        source(tmp_path / "chats.jsonl", CHAT, system="你是小微。"),
    ])  # fmt: skip
    new = write(tmp_path / "new.jsonl", {"text": "股票跌了", "label": "财经"}, CHAT)
    assert shown(read_like(kept, new)) == [
        [("user", "哪一类？\n\n股票跌了")],
        [("system", "你是小微。"), ("user", "在吗")],
    ]


def test_what_a_mixed_run_leaves_open_is_asked_not_guessed(tmp_path: Path) -> None:
    kept = describe_sources([
        source(tmp_path / "a.jsonl", LABEL, prompt=WHICH),
        source(tmp_path / "b.jsonl", LABEL),
        source(tmp_path / "c.jsonl", CHAT),
    ])  # fmt: skip
    new = write(tmp_path / "new.jsonl", CHAT, LABEL)
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be used") as raised:
        read_like(kept, new)
    [problem] = raised.value.problems
    assert problem.source.endswith("new.jsonl:2") and problem.field == "prompt" and "--prompt" in problem.fix
    assert "none" in problem.message and "哪一类" in problem.message
    assert len(read_like(kept, write(tmp_path / "labels.jsonl", LABEL), said=Said(prompt=WHICH))) == 1


def test_sources_that_differ_in_their_system_message_only_are_told_by_it(tmp_path: Path) -> None:
    kept = describe_sources([
        source(tmp_path / "a.jsonl", CHAT, system="你是小微。"),
        source(tmp_path / "b.jsonl", CHAT, system="你是小红。"),
    ])  # fmt: skip
    own = {"messages": [{"role": "system", "content": "S"}, *CHAT["messages"]]}
    assert len(read_like(kept, write(tmp_path / "own.jsonl", own))) == 1, "a row with its own has nothing to choose"
    with pytest.raises(DataError) as raised:
        read_like(kept, write(tmp_path / "new.jsonl", CHAT))
    assert "--system" in raised.value.problems[0].fix and "小红" in raised.value.problems[0].message


def test_bad_rows_are_all_reported_in_a_mixed_run_too(tmp_path: Path) -> None:
    kept = describe_sources([
        source(tmp_path / "a.jsonl", LABEL, prompt=WHICH),
        source(tmp_path / "b.jsonl", CHAT),
    ])  # fmt: skip
    path = tmp_path / "new.jsonl"
    path.write_text('{"text": "T", "label": "L"}\n{"text": 1, "label": 2}\nno json\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"2 of 3 rows cannot be used") as raised:
        read_like(kept, path)
    assert {problem.source for problem in raised.value.problems} == {f"{path}:2", f"{path}:3"}


def test_the_encoding_is_the_files_own_not_the_runs(tmp_path: Path) -> None:
    old = tmp_path / "old.jsonl"
    old.write_bytes(json.dumps(LABEL, ensure_ascii=False).encode("gb18030"))
    kept = describe_sources([(str(old), ReadOptions(encoding="gb18030"))])
    assert read_like(kept, write(tmp_path / "new.jsonl", LABEL))[0].text == "球队赢了"
    with pytest.raises(DataError, match="gb18030"):
        read_like(kept, old)
    assert read_like(kept, old, said=Said(encoding="gb18030"))[0].text == "球队赢了"


def test_a_contract_that_says_nothing_of_reading_was_plain(tmp_path: Path) -> None:
    from test_runs import CONTRACT

    path = tmp_path / "contract.json"
    CONTRACT.write(path)
    values = json.loads(path.read_text(encoding="utf-8"))
    del values["reading"]
    path.write_text(json.dumps(values), encoding="utf-8")
    read = Contract.read(path)
    assert read == CONTRACT and len(read_like(read.reading, write(tmp_path / "new.jsonl", CHAT, LABEL))) == 2
