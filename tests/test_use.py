"""A tuned run put to use through the command line: every side scored, confidences told, runs compared, models asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from command_line import light_training, read_lines, refuse, run_cli, succeed, write_rows
from weitiao.apply import RunInUse, open_run
from weitiao.data.records import read_records
from weitiao.evaluate import predict as predict_module
from weitiao.tasks.base import Task

NAMES = ("王安", "李白川", "赵东", "钱方", "孙光", "周海", "吴江", "郑林", "陈明", "卫宁", "蒋平", "沈清")
TOWNS = ("北京", "上海", "成都", "西安")


def rows_of(names: tuple[str, ...], towns: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {
            "context": f"Instruction: 回答。\nInput: 谁搬到了哪里？\n\n去年{name}搬到了{town}。\nAnswer: ",
            "target": json.dumps([{"人": name, "城": town}], ensure_ascii=False),
        }
        for name in names
        for town in towns
    ]


@pytest.fixture(scope="module", autouse=True)
def lighter_work() -> Iterator[None]:
    with light_training():
        yield


def train(folder: Path, model: Path, *more: str) -> None:
    write_rows(folder / "train.jsonl", rows_of(NAMES[:9], TOWNS))
    write_rows(folder / "dev.jsonl", rows_of(NAMES[9:], TOWNS))
    settings = ["model.dtype=float32", "train.epochs=1", "train.learning_rate=1e-3", "train.compile=never"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        succeed("init", "train.jsonl", "--dev", "dev.jsonl", "--model", model, "--force")
        succeed("train", "recipe.yaml", *settings, *more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("use")
    train(folder, tiny_qwen2_folder, "train.evaluate_every=never")
    return folder


@pytest.fixture
def work(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "work"
    shutil.copytree(trained, copy)
    monkeypatch.chdir(copy)
    return copy


def test_a_hardly_tuned_model_answers_in_the_form_and_with_values_of_its_text(work: Path) -> None:
    succeed("predict", "runs/train", "dev.jsonl", "-o", "answers.jsonl")
    for line in read_lines(work / "answers.jsonl"):
        assert line["valid"] or line["finish"] == "refused", line["reason"]
        for item in line["answer"] or []:
            assert list(item) == ["人", "城"]
            assert all(value and value in line["context"] for value in item.values())


def test_without_the_constraint_such_a_model_has_no_form(work: Path) -> None:
    printed = succeed("evaluate", "runs/train", "--unconstrained", "--no-base")
    assert "tuned, unconstrained" in " ".join(printed.split()) or "unconstrained" in printed
    report = json.loads((work / "runs/train/evaluations/dev/report.json").read_text("utf-8"))
    valid = {side: one["scores"][0]["metrics"]["valid"] for side, one in report["sides"].items()}
    assert valid["tuned, unconstrained"] < valid["tuned"]
    assert report["constraint"], "the report says what the constraint changed"


def test_the_base_model_is_scored_as_it_can_be_prompted(work: Path) -> None:
    succeed("evaluate", "runs/train", "--shots", "0,2")
    folder = work / "runs/train/evaluations/dev"
    report = json.loads((folder / "report.json").read_text("utf-8"))
    assert list(report["sides"]) == ["base", "zero-shot", "2-shot", "tuned"]
    scored = {side: read_lines(folder / one["file"]) for side, one in report["sides"].items()}
    assert {len(lines) for lines in scored.values()} == {12}
    assert any(turn[0] == "assistant" for turn in scored["2-shot"][0]["before"]), "examples stand before the question"
    assert all(line["loss"] > 0 for line in scored["tuned"]), "what its label costs stands beside every row"


def test_shots_that_are_no_numbers_are_refused(work: Path) -> None:
    assert "--shots is 'many'" in refuse("evaluate", "runs/train", "--shots", "many")


def test_keys_of_rows_that_answers_hide_are_named(work: Path) -> None:
    write_rows(work / "own.jsonl", [{**row, "confidence": "high", "id": 7} for row in rows_of(NAMES[:1], TOWNS[:1])])
    result = run_cli("predict", "runs/train", "own.jsonl", "-o", "answers.jsonl")
    assert "note: rows have confidence of their own" in result.stderr
    [line] = read_lines(work / "answers.jsonl")
    assert line["id"] == 7


def test_a_figure_that_can_choose_nothing_is_refused(work: Path) -> None:
    sentence = refuse("train", "recipe.yaml", "name=never", "train.evaluate_every=never", "evaluate.best_by=objects.f1")
    assert "no rows are scored while training" in sentence
    assert not (work / "runs/never").exists()


def test_rows_made_ready_in_parts_get_the_same_answers(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    succeed("predict", "runs/train", "dev.jsonl", "-o", "whole.jsonl")
    monkeypatch.setattr(predict_module, "CHUNK_ROWS", 5)
    succeed("predict", "runs/train", "dev.jsonl", "-o", "parts.jsonl")
    whole, parts = (read_lines(work / f"{name}.jsonl") for name in ("whole", "parts"))
    assert [line["prediction"] for line in parts] == [line["prediction"] for line in whole]
    assert [line["source"] for line in parts] == [line["source"] for line in whole]


def test_low_confidences_go_to_a_person(work: Path) -> None:
    printed = succeed("predict", "runs/train", "dev.jsonl", "-o", "answers.jsonl", "--threshold", "1")
    lines = read_lines(work / "answers.jsonl")
    assert {line["route"] for line in lines} == {"person"}
    assert f"{len(lines)} of them are for a person" in printed
    succeed("predict", "runs/train", "dev.jsonl", "-o", "answers.jsonl", "--threshold", "0")
    lines = read_lines(work / "answers.jsonl")
    assert [line["route"] == "model" for line in lines] == [line["valid"] for line in lines]
    assert all(0 <= line["confidence"] <= 1 for line in lines if line["valid"])


def test_a_run_is_compared_with_its_base(work: Path) -> None:
    succeed("evaluate", "runs/train")
    printed = succeed("compare", "runs/train", "runs/train", "--side-a", "base", "-o", "compared")
    assert "objects" in printed
    assert {path.name for path in (work / "compared").iterdir()} == {"compare.html", "compare.json"}
    assert "nope" in refuse("compare", "runs/train", "runs/train", "--side-a", "nope")


def test_a_probe_is_asked_before_and_after(work: Path) -> None:
    questions = [{"question": f"{n}+{n}=?", "choices": [str(2 * n), str(n)], "answer": 0} for n in (1, 2)]
    write_rows(work / "probe.jsonl", questions)
    printed = succeed("evaluate", "runs/train", "--no-base", "--probe", "probe.jsonl")
    assert "right before tuning" in printed
    kept = json.loads((work / "runs/train/evaluations/dev/forgetting.json").read_text("utf-8"))
    assert kept["before"]["overall"]["rows"] == 2


def test_a_model_is_asked_without_training(work: Path) -> None:
    printed = succeed("prompt", "recipe.yaml", "model.dtype=float32", "--shots", "1", "-o", "asked.jsonl")
    lines = read_lines(work / "asked.jsonl")
    assert len(lines) == 12
    assert f"{len(lines)} answers in asked.jsonl" in printed
    assert all(line["valid"] or line["reason"] for line in lines)


def test_a_run_that_looks_up_its_neighbours_keeps_them(work: Path, tiny_qwen2_folder: Path) -> None:
    train(work, tiny_qwen2_folder, "data.retrieve=1", "train.evaluate_every=epoch", "name=near")
    assert (work / "runs/near/neighbours.jsonl").exists()
    succeed("predict", "runs/near", "dev.jsonl", "-o", "answers.jsonl")
    assert len(read_lines(work / "answers.jsonl")) == 12
    (work / "runs/near/neighbours.jsonl").unlink()
    assert "neighbours.jsonl is missing" in refuse("predict", "runs/near", "dev.jsonl", "-o", "again.jsonl")
    shown = succeed("show", "recipe.yaml", "data.retrieve=1", "-n", "1")
    assert shown.count("谁搬到了哪里") == 2, "the nearest row's question and its own"


def test_a_metric_of_ones_own_may_choose_the_best_step(work: Path, tiny_qwen2_folder: Path) -> None:
    (work / "mine.py").write_text("def short(gold, answer, row):\n    return float(len(row['prediction']) < 40)\n")
    recipe = (work / "recipe.yaml").read_text("utf-8") + "\nevaluate:\n  metrics: [mine.py:short]\n"
    (work / "recipe.yaml").write_text(recipe.replace("\nevaluate:\n  base: true\n", "\n"), "utf-8")
    sentence = refuse("train", "recipe.yaml", "name=mine", "evaluate.best_by=objects.tall")
    assert "objects.tall" in sentence and "objects.short" in sentence
    assert not (work / "runs/mine").exists(), "told before anything is written"
    more = ["model.dtype=float32", "train.epochs=1", "train.compile=never", "evaluate.best_by=objects.short"]
    succeed("train", "recipe.yaml", "name=mine", *more)
    assert (work / "runs/mine/metric_files/mine.py").exists()
    scores = [json.loads(line) for line in (work / "runs/mine/metrics.jsonl").read_text("utf-8").splitlines()]
    assert any("short" in line["scores"]["objects"] for line in scores if line["kind"] == "dev")


def test_a_row_without_anything_to_copy_is_refused_and_the_others_are_answered(work: Path) -> None:
    run = RunInUse.of(open_run("runs/train"))
    first, second = read_records(work / "dev.jsonl")[:2]
    empty = replace(first, text="", text_span=None)
    replies = {reply.index: reply for reply in run.answerer().answer([empty, second], run.assign([empty, second]))}
    assert replies[0].finish == "refused"
    assert "copied" in replies[0].refusal
    assert replies[1].text


def test_the_form_that_is_kept_is_the_one_that_answers_are_held_to(work: Path) -> None:
    contract = json.loads((work / "runs/train/contract.json").read_text("utf-8"))
    assert contract["constrain"] is True
    task = Task.from_json(contract["tasks"][0])
    for record in read_records(work / "dev.jsonl"):
        assert task.write_target(record) == record.target
