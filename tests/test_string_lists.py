"""Answers that are lists of any strings, as UIE's rows have: inferred, written, parsed, scored."""

from __future__ import annotations

import json

import pytest

from weitiao.data.formats import row_to_record
from weitiao.data.mixture import Mixture
from weitiao.data.record import Record
from weitiao.dataset import understand
from weitiao.errors import FormError
from weitiao.evaluate.score import Prediction, score_predictions
from weitiao.tasks.base import Task
from weitiao.tasks.forms import AnswerForm

FOUND = [["林遥"], ["苏晴", "陈舟"], [], ["周南"], ["吴桐", "郑言"], ["王朔川"]]
NONE: list[list[str]] = [[], []]


def uie(number: int, found: list[str]) -> Record:
    content = "、".join(found) + "来了。"
    results = [{"text": name, "start": content.index(name), "end": content.index(name) + len(name)} for name in found]
    row = {"content": content, "result_list": results, "prompt": "人物"}
    record = row_to_record(row, f"rows.jsonl:{number}", require_target=True)
    assert isinstance(record, Record), record
    return record


@pytest.mark.parametrize("as_text", [False, True])
def test_lists_of_ever_new_strings_are_a_form_of_their_own(as_text: bool) -> None:
    targets = [json.dumps(found, ensure_ascii=False) if as_text else found for found in FOUND]
    form = AnswerForm.infer(targets, texts=[""] * len(targets))
    assert (form.shape, form.min_items, form.max_items) == ("string list", 0, 2)
    assert form.describe() == "a JSON list of 0–2 string(s)"
    assert form.write(["任何人"]) == '["任何人"]' and form.parse('[ "任何人" ]') == ["任何人"]
    assert AnswerForm.from_json(json.loads(json.dumps(form.to_json()))) == form
    for wrong in ("任何人", '{"a": 1}', "[1]", '["没完'):
        with pytest.raises(FormError):
            form.parse(wrong)


@pytest.mark.parametrize("found", [FOUND, NONE])
def test_rows_of_uie_can_be_trained_on(found: list[list[str]]) -> None:
    records = tuple(uie(number, names) for number, names in enumerate(found, start=1))
    distinct = records if found is FOUND else records[:1]
    dataset = understand(Mixture(train=distinct, weights=(1.0,) * len(distinct), dev=(), left_out=()))
    [task] = dataset.tasks
    assert (task.form.shape, task.kind) == ("string list", "extraction")
    assert [task.write_target(record) for record in dataset.train] == [
        json.dumps(record.target, ensure_ascii=False) for record in distinct
    ]


def test_a_repeated_set_of_labels_stays_closed() -> None:
    form = AnswerForm.infer([["体育"], ["财经"], ["体育"], ["财经"], ["体育"]], texts=[""] * 5)
    assert (form.shape, form.labels) == ("label list", ("体育", "财经"))


def test_each_string_counts_as_a_fact() -> None:
    task = Task(name="strings", form=AnswerForm.infer(FOUND, texts=[""] * len(FOUND)))
    rows = [
        Prediction(source="dev.jsonl:1", task="strings", prompt="…", gold='["甲", "乙"]', answer='["甲", "丙"]'),
        Prediction(source="dev.jsonl:2", task="strings", prompt="…", gold="[]", answer="[]"),
        Prediction(source="dev.jsonl:3", task="strings", prompt="…", gold='["丁"]', answer="丁"),
    ]
    [score] = score_predictions(rows, [task], resamples=0)
    assert score.primary == "f1" and score.metrics["precision"] == 0.5
    assert score.metrics["recall"] == pytest.approx(1 / 3) and score.metrics["f1"] == pytest.approx(0.4)
    assert score.metrics["valid"] == pytest.approx(2 / 3)
