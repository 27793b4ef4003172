"""The command line from raw rows to predictions on a tiny model, and what each verb prints and leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.main import get_command

from command_line import light_training, read_lines, refuse, run_cli, succeed, write_rows
from weitiao.cli import app
from weitiao.evaluate import predict as predict_module
from weitiao.generate.chat import Reply
from weitiao.recipe import load_recipe

VERBS = {
    "init": "write a commented recipe",
    "check": "Name every problem of the data at once",
    "show": "Show rendered examples",
    "train": "Ctrl-C saves and leaves, twice leaves at once",
    "evaluate": "Score the tuned model against its base model",
    "predict": "Answer every row with the tuned model",
    "compare": "better than A by more than chance",
    "prompt": "without training",
    "import-chats": "every message is accounted for",
    "check-leaks": "Count which secrets of a chat log",
    "migrate": "every setting carried or named",
    "schema": "JSON Schema of recipes",
    "models": "List the model families",
    "export": "its adapter merged in",
    "runs": "how far each is",
    "watch": "Ends with the training",
    "sweep": "those that score best on the dev rows",
    "learning-curve": "does labelling more pay?",
    "serve": "held to the labelled form unless a request says otherwise",
    "chat": "ask its tasks about texts",
    "verify": "asks the model the same tokens and gets the same answers",
}
TEXTS = ("球", "门", "网", "队", "星", "光", "芯", "电", "钱", "股", "税", "账")
LABELS = ("体育", "科技", "财经")
NUM_DEV = 2


def context(text: str) -> str:
    return f"Instruction: 回答。\nInput: 选一个标签。\n\n{text}\nAnswer: "


@pytest.fixture(scope="module", autouse=True)
def lighter_work() -> Iterator[None]:
    with light_training():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_folder: Path) -> Path:
    """A folder with rows.jsonl, recipe.yaml and a finished run in runs/rows, all made through the command line."""
    folder = tmp_path_factory.mktemp("cli")
    rows = [
        {"context": context(f"{a}{b}"), "target": json.dumps([LABELS[i // 4]], ensure_ascii=False), "id": f"{i}-{b}"}
        for i, a in enumerate(TEXTS)
        for b in "甲乙"
    ]
    write_rows(folder / "rows.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        succeed("init", "rows.jsonl", "--model", tiny_qwen2_folder)
        settings = ["model.dtype=float32", "train.epochs=30", "train.batch_size=11", "train.learning_rate=1e-2"]
        assert succeed("train", "recipe.yaml", *settings, "train.compile=never", "train.evaluate_every=30") == ""
    return folder


@pytest.fixture
def work(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the trained folder, as the current folder."""
    copy = tmp_path / "work"
    shutil.copytree(trained, copy)
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def unlabelled(work: Path) -> list[dict[str, Any]]:
    """rows of questions.jsonl, with fields of their own and no answer."""
    rows = [{"context": context(f"{text}丙" * (1 + i % 3)), "number": i} for i, text in enumerate(TEXTS[:9])]
    write_rows(work / "questions.jsonl", rows)
    return rows


# --- Before training -------------------------------------------------------------------------------------------------


def test_init_writes_a_commented_recipe_that_loads(
    sample_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = succeed("init", "rows.jsonl", "--model", "some/model")
    assert "Wrote recipe.yaml. Next: weitiao check recipe.yaml, then weitiao train recipe.yaml" in printed
    assert "out of 3: 体育, 科技, 财经" in printed
    text = Path("recipe.yaml").read_text(encoding="utf-8")
    assert text.count("#") > 10
    recipe = load_recipe("recipe.yaml")
    assert (recipe.name, recipe.model.path) == ("rows", "some/model")
    assert [source.path for source in recipe.data.train] == ["rows.jsonl"]


def test_init_replaces_a_recipe_only_when_told_to(
    sample_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("name: precious\n", encoding="utf-8")
    assert "mine.yaml exists already" in refuse("init", "rows.jsonl", "-o", "mine.yaml")
    assert Path("mine.yaml").read_text(encoding="utf-8") == "name: precious\n"
    succeed("init", "rows.jsonl", "-o", "mine.yaml", "--force")
    assert load_recipe("mine.yaml").name == "mine"


def test_init_takes_dev_rows_from_a_file_of_their_own(
    sample_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = sample_rows.read_text(encoding="utf-8").splitlines(keepends=True)
    Path("train.jsonl").write_text("".join(lines[:20]), encoding="utf-8")
    Path("dev.jsonl").write_text("".join(lines[20:]), encoding="utf-8")
    succeed("init", "train.jsonl", "--dev", "dev.jsonl")
    assert [source.path for source in load_recipe("recipe.yaml").data.dev] == ["dev.jsonl"]
    assert "No problems in 20 train and 4 dev rows." in succeed("check", "recipe.yaml")


def test_check_counts_the_rows_of_a_recipe_and_of_a_file(work: Path) -> None:
    assert "No problems in 22 train and 2 dev rows." in succeed("check", "recipe.yaml")
    assert "No problems in 24 train and 0 dev rows." in succeed("check", "rows.jsonl")
    assert "No problems in 12 train and 12 dev rows." in succeed("check", "rows.jsonl", "data.held_out=0.5")


def test_check_prints_json_for_good_rows_and_for_bad_ones(work: Path) -> None:
    found = json.loads(succeed("check", "recipe.yaml", "--json"))
    assert (found["ok"], found["rows"], found["accepted"], found["rejected"]) == (True, 24, 24, 0)
    assert found["format"] == "context_target"
    assert [(task["name"], task["train"], task["dev"]) for task in found["tasks"]] == [("labels", 22, 2)]
    assert [finding["code"] for finding in found["findings"]] == ["unused-key"]
    write_rows(work / "bad.jsonl", [{"context": "a"}, {"context": "b", "target": "c"}, {"context": 3, "target": "c"}])
    result = run_cli("check", "bad.jsonl", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["ok"], found["rows"], found["accepted"], found["rejected"]) == (False, 3, 1, 2)
    assert found["findings"][0]["sources"] == ["bad.jsonl:1", "bad.jsonl:3"]
    assert [detail.partition(":")[0] for detail in found["findings"][0]["details"]] == ["target", "context"]
    assert all("Fix: " in detail for detail in found["findings"][0]["details"])


def test_show_prints_prompt_and_answer_of_as_many_rows_as_asked_for(work: Path) -> None:
    printed = succeed("show", "recipe.yaml", "data.held_out=0", "-n", 2)
    assert printed.count("<|im_start|>assistant") == 2
    assert printed.count("选一个标签。") == 2
    assert printed.count("<|im_end|>") == 4, "the user's turn and the answer"
    assert "labels · rows.jsonl:1 · " in printed


# --- After training --------------------------------------------------------------------------------------------------


def test_training_leaves_every_file_of_a_run(work: Path) -> None:
    run = Path("runs/rows")
    names = {path.name for path in run.iterdir()}
    assert names == {
        "adapter", "best", "checkpoints", "contract.json", "curve.png", "data.json", "environment.json",
        "label_counts.json", "metrics.jsonl", "recipe.yaml", "samples.jsonl", "state.json",
    }  # fmt: skip
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= {
        path.name for path in (run / "adapter").iterdir()
    }
    recipe = load_recipe(run / "recipe.yaml")
    assert (recipe.train.epochs, recipe.train.batch_size) == (30, 11), "the overrides are in the resolved recipe"


def test_evaluate_scores_base_and_tuned_model_and_writes_three_reports(work: Path) -> None:
    printed = succeed("evaluate", "runs/rows")
    folder = Path("runs/rows/evaluations/dev")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert "体育" in json.dumps(report, ensure_ascii=False)
    assert (folder / "report.md").read_text(encoding="utf-8").startswith("# rows on dev")
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")
    for name in ("report.json", "report.md", "report.html"):
        assert str(folder / name) in printed.splitlines(), "a path is printed on a line of its own"
    for side in ("base", "tuned"):
        assert len(read_lines(folder / f"predictions-{side}.jsonl")) == NUM_DEV
    assert "accuracy" in printed
    assert "base" in printed
    valid = [line["valid"] for line in read_lines(folder / "predictions-tuned.jsonl")]
    assert valid == [True] * NUM_DEV, "thirty epochs teach even this model the form"


def test_evaluate_scores_another_file_and_only_the_tuned_model_when_asked(work: Path) -> None:
    rows = [{"context": context(f"{text}丁"), "target": '["科技"]'} for text in TEXTS[:5]]
    write_rows(work / "later.jsonl", rows)
    printed = succeed("evaluate", "runs/rows", "--data", "later.jsonl", "--no-base")
    folder = Path("runs/rows/evaluations/later")
    assert {path.name for path in folder.iterdir()} == {
        "predictions-tuned.jsonl", "scored-tuned.jsonl", "suspects.jsonl", "report.json", "report.md", "report.html"
    }  # fmt: skip
    assert [line["source"] for line in read_lines(folder / "predictions-tuned.jsonl")] == [
        f"later.jsonl:{number}" for number in range(1, 6)
    ]
    assert " 5 " in printed


def test_evaluate_refuses_rows_whose_label_the_run_does_not_know(work: Path) -> None:
    write_rows(work / "later.jsonl", [{"context": context("云"), "target": '["天气"]'}])
    sentences = refuse("evaluate", "runs/rows", "--data", "later.jsonl")
    assert "later.jsonl:1: target:" in sentences
    assert '"天气" is not one of the 3 labels' in sentences
    assert not Path("runs/rows/evaluations").exists()


def test_evaluate_refuses_dev_rows_that_changed_since_training(work: Path) -> None:
    text = Path("rows.jsonl").read_text(encoding="utf-8")
    Path("rows.jsonl").write_text(text.replace("球甲", "球癸"), encoding="utf-8")
    assert "have changed since it was trained" in refuse("evaluate", "runs/rows")


def test_evaluate_and_predict_refuse_another_base_model(
    work: Path, unlabelled: list[dict[str, Any]], tiny_qwen2_folder: Path
) -> None:
    other = work / "other"
    shutil.copytree(tiny_qwen2_folder, other)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-4:] = b"\x00\x00\x00\x40"  # one weight is now 2.0
    (other / "model.safetensors").write_bytes(data)
    for verb in (["evaluate", "runs/rows"], ["predict", "runs/rows", "questions.jsonl", "-o", "out.jsonl"]):
        sentences = refuse(*verb, "--base-model", other)
        assert f"{other} is not the base model this run was tuned on" in sentences
        assert "Point to the original model." in sentences
    assert not Path("out.jsonl").exists()


def test_a_base_model_that_was_moved_is_found_with_base_model(
    work: Path, unlabelled: list[dict[str, Any]], tiny_qwen2_folder: Path
) -> None:
    moved = shutil.copytree(tiny_qwen2_folder, work / "moved")
    contract = Path("runs/rows/contract.json")
    contract.write_text(contract.read_text(encoding="utf-8").replace(str(tiny_qwen2_folder), "/gone"), encoding="utf-8")
    assert "/gone" in refuse("predict", "runs/rows", "questions.jsonl", "-o", "out.jsonl")
    succeed("predict", "runs/rows", "questions.jsonl", "-o", "out.jsonl", "--base-model", moved)
    assert len(read_lines(Path("out.jsonl"))) == 9


def test_predict_answers_rows_in_order_and_echoes_their_fields(work: Path, unlabelled: list[dict[str, Any]]) -> None:
    printed = succeed("predict", "runs/rows", "questions.jsonl", "-o", "answers/out.jsonl")
    lines = read_lines(Path("answers/out.jsonl"))
    assert [line["number"] for line in lines] == list(range(9))
    assert [line["context"] for line in lines] == [row["context"] for row in unlabelled]
    num_valid = sum(line["valid"] for line in lines)
    assert num_valid > 4, "the model has learnt the form"
    assert f"9 answers in answers/out.jsonl, {num_valid} of them" in printed
    for line in lines:
        assert line["task"] == "labels"
        assert line["finish"] in ("stop", "length")
        assert (line["answer"] is not None) == line["valid"] == (line["reason"] == "")
        if line["valid"]:
            assert json.loads(line["prediction"]) == line["answer"]
            assert set(line["answer"]) <= set(LABELS)
    assert not Path("answers/out.jsonl.partial").exists()


def interrupt_after(count: int, asked: list[int], patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when `count` replies have come; `asked` gets how many rows were asked for."""
    original = predict_module.reply_all

    def reply_all(model: Any, renderer: Any, conversations: Any, **settings: Any) -> Iterator[Reply]:
        asked.append(len(conversations))
        for number, reply in enumerate(original(model, renderer, conversations, **settings)):
            if number == count:
                raise KeyboardInterrupt
            yield reply

    patch.setattr(predict_module, "reply_all", reply_all)


@pytest.mark.parametrize("tail", ["", '{"place": 8, "line": {"predic', '{"place": 8, "line": {"prediction": "体'])
def test_a_broken_off_prediction_goes_on_where_it_stopped(
    tail: str, work: Path, unlabelled: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last line of the partial file may be cut anywhere: here also in the middle of a character."""
    succeed("predict", "runs/rows", "questions.jsonl", "-o", "whole.jsonl")
    asked: list[int] = []
    with monkeypatch.context() as patch:
        interrupt_after(4, asked, patch)
        result = run_cli("predict", "runs/rows", "questions.jsonl", "-o", "out.jsonl")
    assert result.exit_code == 130
    assert not Path("out.jsonl").exists()
    partial = Path("out.jsonl.partial")
    assert len(read_lines(partial)) == 1 + 4
    with partial.open("ab") as stream:
        stream.write(tail.encode()[: -1 if tail.endswith("体") else None])
    with monkeypatch.context() as patch:
        interrupt_after(99, asked, patch)
        succeed("predict", "runs/rows", "questions.jsonl", "-o", "out.jsonl")
    assert asked == [9, 5]
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert not partial.exists()


def test_answers_of_other_rows_are_not_taken_for_these(
    work: Path, unlabelled: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    with monkeypatch.context() as patch:
        interrupt_after(4, asked, patch)
        assert run_cli("predict", "runs/rows", "questions.jsonl", "-o", "out.jsonl").exit_code == 130
    write_rows(work / "questions.jsonl", [{**row, "context": row["context"].replace("丙", "戊")} for row in unlabelled])
    with monkeypatch.context() as patch:
        interrupt_after(99, asked, patch)
        succeed("predict", "runs/rows", "questions.jsonl", "-o", "out.jsonl")
    assert asked == [9, 9]
    assert all("戊" in line["context"] for line in read_lines(Path("out.jsonl")))


@pytest.mark.parametrize("verb", [["evaluate"], ["predict", "rows.jsonl", "-o", "out.jsonl"]])
def test_a_run_that_is_missing_or_not_finished_is_refused(verb: list[str], work: Path) -> None:
    assert "There is no run folder runs/none." in refuse(verb[0], "runs/none", *verb[1:])
    Path("runs/rows/contract.json").unlink()
    sentence = refuse(verb[0], "runs/rows", *verb[1:])
    assert "holds no finished run" in sentence
    assert "--resume" in sentence


# --- Help and schema -------------------------------------------------------------------------------------------------


def test_help_lists_every_verb_and_a_first_run() -> None:
    printed = succeed("--help")
    assert "weitiao init rows.jsonl --model starter" in printed
    assert {name for name in VERBS if f" {name} " in printed} == set(VERBS)
    assert set(get_command(app).commands) == set(VERBS), "a new verb needs a line above"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("verb", "does"), VERBS.items())
def test_help_of_a_verb_says_what_it_does(verb: str, does: str) -> None:
    printed = " ".join(succeed(verb, "--help").split())
    assert does in printed
    assert f"weitiao {verb}" in printed or f" {verb} [OPTIONS]" in printed


def test_schema_describes_every_key_and_accepts_what_init_wrote(work: Path) -> None:
    schema = json.loads(succeed("schema"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(Path("runs/rows/recipe.yaml").read_text(encoding="utf-8")), schema)
    with pytest.raises(jsonschema.ValidationError, match="epoch"):
        jsonschema.validate({"name": "a", "model": {"path": "b"}, "data": {"train": []}, "train": {"epoch": 1}}, schema)
    for part in schema["$defs"].values():
        for key, value in part["properties"].items():
            assert "description" in value or "const" in value or "$ref" in json.dumps(value), key


def test_check_answers_without_loading_torch(work: Path) -> None:
    code = (
        "import sys\nfrom weitiao.cli import app\n"
        "try:\n    app(['check', 'recipe.yaml'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'transformers', 'peft', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "No problems in 22 train" in done.stdout


def test_the_module_and_the_command_are_the_same_program() -> None:
    command = Path(sys.executable).with_name("weitiao")
    environment = {**os.environ, "COLUMNS": "100"}
    printed = [
        subprocess.run([*start, "schema"], stdout=subprocess.PIPE, timeout=120, env=environment, check=True).stdout
        for start in ([sys.executable, "-m", "weitiao"], [str(command)])
    ]
    assert printed[0] == printed[1]
    assert json.loads(printed[0])["title"] == "Recipe"
