"""The GLM family as first released, from rows to answers, on tiny models: opened without remote code, tuned, asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import weitiao
from command_line import light_training, read_lines, refuse, run_cli, succeed, write_rows
from glm_folders import LAYOUTS, write_glm_folder
from weitiao.errors import ModelError
from weitiao.messages import Message
from weitiao.models.ptuning import prefix_encoder_of
from weitiao.models.quantized import quantized_bits


@pytest.fixture(scope="session", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, shared_or_skip: Path) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("glm")
    return {name: write_glm_folder(place / name, name, shared_or_skip) for name in LAYOUTS}


@pytest.fixture(autouse=True)
def _light(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with light_training():
        yield


def write_recipe(folder: Path, rows: Path, **changes: Any) -> Path:
    recipe: dict[str, Any] = {
        "name": "glm",
        "model": {"path": str(folder), "dtype": "float32", **changes.pop("model", {})},
        "data": {"train": str(rows), "held_out": 0.25, **changes.pop("data", {})},
        "method": {"rank": 4, "alpha": 8},
        "train": {"epochs": 1, "batch_size": 6, "learning_rate": 1e-2, "compile": "never", "evaluate_every": "never"},
        "generate": {"max_new_tokens": 24},
        "evaluate": {"resamples": 10},
        **changes,
    }
    path = Path("recipe.yaml")
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return path


# ---- opening ---------------------------------------------------------------------------------------------------


def test_a_folder_opens_as_its_family_and_says_that_its_code_is_not_run(folders: dict[str, Path], layout: str) -> None:
    folder = folders[layout]
    (folder / "modeling_chatglm.py").write_text("raise SystemExit('the remote code ran')\n", encoding="utf-8")
    opened = weitiao.open_model(str(folder), dtype="float32")
    assert opened.family.name == layout
    [note] = opened.notes
    assert "configuration_chatglm.py, modeling_chatglm.py" in note and "not needed" in note
    prompt = opened.renderer.render_prompt([Message(role="user", text="你好")])
    logits = opened.model(torch.tensor([prompt])).logits
    assert logits.shape[:2] == (1, len(prompt)) and torch.isfinite(logits).all()


def test_weights_without_a_vocabulary_compute_but_are_not_asked(tmp_path: Path, shared_or_skip: Path) -> None:
    folder = write_glm_folder(tmp_path / "bare", "chatglm3", shared_or_skip, vocabulary=False)
    opened = weitiao.open_model(str(folder), dtype="float32")
    assert opened.model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, 65024)
    with pytest.raises(ModelError, match="holds weights but no tokenizer"):
        _ = opened.renderer
    with pytest.raises(ModelError):
        weitiao.open_model(str(folder), must_speak=True)


def test_another_models_vocabulary_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(folders["chatglm3"], folder)
    shutil.copyfile(folders["glm4"] / "tokenizer.model", folder / "tokenizer.model")
    with pytest.raises(ModelError, match=r"tokenizer\.model"):
        weitiao.open_model(str(folder))


@pytest.mark.parametrize("name", ["chatglm", "chatglm3"])
def test_weights_are_packed_at_loading(folders: dict[str, Path], name: str) -> None:
    whole = weitiao.open_model(str(folders[name]), dtype="float32")
    ids = torch.tensor([whole.renderer.render_prompt([Message(role="user", text="今天天气怎么样？")])])
    differences = []
    for bits in (8, 4):
        packed = weitiao.open_model(str(folders[name]), dtype="float32", quantize=f"int{bits}")
        assert quantized_bits(packed.model) == bits
        with torch.no_grad():
            a, b = whole.model(ids).logits, packed.model(ids).logits
        differences.append(float((a - b).norm() / a.norm()))
    assert 0 < differences[0] < differences[1] < 0.7


# ---- tuning and use --------------------------------------------------------------------------------------------


@pytest.fixture
def rows(sample_rows: Path) -> Path:
    return sample_rows


def check_run(folder: Path, rows: Path) -> None:
    """The run at `folder` is scored with its base model beside it and answers new rows in the labelled form."""
    succeed("evaluate", folder)
    report = json.loads((folder / "evaluations" / "dev" / "report.json").read_text(encoding="utf-8"))
    assert len(report["sides"]) == 2
    texts = [{key: value for key, value in row.items() if key != "target"} for row in read_lines(rows)[:6]]
    printed = succeed("predict", folder, write_rows(Path("new.jsonl"), texts), "-o", "answers.jsonl")
    lines = read_lines(Path("answers.jsonl"))
    assert len(lines) == 6 and "6 answers" in printed
    for line in lines:
        assert line["valid"] or line["refusal"], "held to the form, or refused with the reason"


def test_lora_from_rows_to_answers(folders: dict[str, Path], layout: str, rows: Path) -> None:
    printed = run_cli("train", write_recipe(folders[layout], rows))
    assert printed.exit_code == 0, printed.output
    assert "not needed" in printed.stderr, "the user is told that no remote code runs"
    check_run(Path("runs/glm"), rows)


@pytest.mark.parametrize(
    ("name", "projection"), [("chatglm", True), ("chatglm3", False), ("chatglm2", True), ("glm4", False)]
)
def test_p_tuning_from_rows_to_answers(folders: dict[str, Path], name: str, rows: Path, projection: bool) -> None:
    method = {"name": "ptuning_v2", "num_virtual_tokens": 6, "projection": projection}
    succeed("train", write_recipe(folders[name], rows, method=method))
    opened = weitiao.open_run("runs/glm")[2]
    assert prefix_encoder_of(opened.model) is not None
    check_run(Path("runs/glm"), rows)


@pytest.mark.parametrize("name", ["chatglm", "chatglm3"])
def test_lora_on_four_bits(folders: dict[str, Path], name: str, rows: Path) -> None:
    succeed("train", write_recipe(folders[name], rows, model={"quantize": "int4"}))
    assert quantized_bits(weitiao.open_run("runs/glm")[2].model) == 4
    check_run(Path("runs/glm"), rows)


def test_a_run_goes_on_after_an_interruption_to_the_same_adapter(folders: dict[str, Path], rows: Path) -> None:
    recipe = write_recipe(folders["chatglm"], rows)
    succeed("train", recipe, "train.epochs=2", "train.save_every=1", "train.keep_checkpoints=9")
    whole = (Path("runs/glm/adapter/adapter_model.safetensors")).read_bytes()
    for leftover in ("adapter", "best", "contract.json"):
        path = Path("runs/glm") / leftover
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for checkpoint in sorted(Path("runs/glm/checkpoints").iterdir())[2:]:
        shutil.rmtree(checkpoint)
    succeed("train", recipe, "--resume", "train.epochs=2", "train.save_every=1", "train.keep_checkpoints=9")
    assert Path("runs/glm/adapter/adapter_model.safetensors").read_bytes() == whole


# ---- what can be wrong -----------------------------------------------------------------------------------------


def test_missing_shards_are_all_named(folders: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(folders["chatglm3"], folder)
    (folder / "model.safetensors").unlink()
    files = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": files}), encoding="utf-8")
    told = refuse("train", write_recipe(folder, rows))
    assert all(name in told for name in files.values())


def test_check_counts_tokens_as_training_renders_them(folders: dict[str, Path], layout: str, rows: Path) -> None:
    from weitiao.dataset import load_dataset
    from weitiao.models.opening import open_renderer
    from weitiao.render.fitting import render_record

    path = write_recipe(folders[layout], rows)
    recipe = weitiao.load_recipe(path)
    dataset, renderer = load_dataset(recipe), open_renderer(recipe.model.path)
    pairs = [*zip(dataset.train, dataset.train_tasks), *zip(dataset.dev, dataset.dev_tasks)]
    longest = max(
        len(example) for row, task in pairs for example in render_record(row, task, renderer, turns="flagged")
    )
    printed = json.loads(run_cli("check", path, "--json").stdout)
    [counted] = [lengths for lengths in printed["lengths"] if lengths["unit"] == "tokens"]
    assert abs(counted["max"] - longest) <= 3
