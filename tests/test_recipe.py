"""Recipes: read strictly, every mistake named at once with the nearest right word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from weitiao.errors import RecipeError
from weitiao.init import init_recipe
from weitiao.recipe import Recipe, load_recipe, make_recipe, recipe_schema

LEAST: dict[str, Any] = {"name": "try", "model": "starter", "data": {"train": "rows.jsonl"}}


def refused(values: dict[str, Any], *overrides: str) -> list[str]:
    """The complaints about a recipe, one a line."""
    with pytest.raises(RecipeError) as caught:
        make_recipe(values, overrides)
    first, *complaints = str(caught.value).split("\n")
    assert first == "recipe cannot be used as written:"
    return [complaint.removeprefix("  ") for complaint in complaints]


def written(tmp_path: Path, text: str, name: str = "my-run.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


# ---- what is accepted ------------------------------------------------------------------------------------------


def test_three_lines_are_a_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, "model: starter\ndata:\n  train: rows.jsonl\n"))
    assert recipe.name == "my-run"
    assert recipe.model.path == "starter"
    assert [(source.path, source.weight) for source in recipe.data.train] == [("rows.jsonl", 1.0)]


def test_sources_may_be_a_name_a_list_or_weighted() -> None:
    mixed = make_recipe({**LEAST, "data": {"train": ["a.jsonl", {"path": "b.jsonl", "weight": 2}], "dev": "c.jsonl"}})
    assert [(source.path, source.weight) for source in mixed.data.train] == [("a.jsonl", 1.0), ("b.jsonl", 2.0)]
    assert [source.path for source in mixed.data.dev] == ["c.jsonl"]


def test_a_number_in_scientific_notation_is_a_number(tmp_path: Path) -> None:
    text = "model: starter\ndata: {train: rows.jsonl}\ntrain: {learning_rate: 5e-4}\n"  # YAML 1.1 reads a string
    assert load_recipe(written(tmp_path, text)).train.learning_rate == 5e-4


def test_a_byte_order_mark_is_no_part_of_the_recipe(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, "\ufeffmodel: starter\ndata: {train: rows.jsonl}\n")).model.path == "starter"


def test_yaml_of_a_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = make_recipe(
        {
            **LEAST,
            "data": {"train": [{"path": "数据.jsonl", "weight": 0.5}], "overlong": "drop"},
            "tasks": [{"name": "话题", "shape": "label list", "labels": ["体育", "no"], "fence": ""}],
            "method": {"targets": ["q_proj", "v_proj"]},
            "train": {"learning_rate": 1e-5, "evaluate_every": 20},
        }
    )
    assert load_recipe(written(tmp_path, recipe.to_yaml())) == recipe
    assert set(yaml.safe_load(recipe.to_yaml())["train"]) == set(type(recipe.train).model_fields)


@pytest.mark.parametrize("change", [lambda r: setattr(r, "name", "b"), lambda r: setattr(r.train, "epochs", 9)])
def test_a_recipe_cannot_be_changed(change: Any) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        change(make_recipe(LEAST))


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "place", "hint"),
    [
        ({"modle": "x"}, "modle", "Did you mean model?"),
        ({"train": {"learning_rat": 1}}, "train.learning_rat", "Did you mean learning_rate?"),
        ({"train": {"lr": 1}}, "train.lr", "Known keys: epochs, batch_size,"),
        ({"data": {"train": [{"path": "a", "wieght": 2}]}}, "data.train.0.wieght", "Did you mean weight?"),
        ({"data": {"train": "a", "devs": "b"}}, "data.devs", "Did you mean dev?"),
        ({"model": {"pth": "x", "path": "y"}}, "model.pth", "Did you mean path?"),
        ({"method": {"rnak": 4}}, "method.rnak", "Did you mean rank?"),
        ({"tasks": [{"name": "t", "shape": "label", "label": ["a"]}]}, "tasks.0.label", "Did you mean labels?"),
        ({"generate": {"top_kk": 1}}, "generate.top_kk", "Did you mean top_k?"),
        ({"evaluate": {"bass": True}}, "evaluate.bass", "Did you mean base?"),
    ],
)
def test_an_unknown_key_anywhere_suggests_the_nearest(values: dict[str, Any], place: str, hint: str) -> None:
    (found,) = refused({**LEAST, **values})
    assert found.startswith(f"{place}: there is no such key. {hint}")


def test_all_mistakes_are_named_in_one_message() -> None:
    found = refused(
        {
            "name": "try",
            "model": {"dtype": "float8"},
            "data": {"train": [], "held_out": 1.5},
            "train": {"epochs": -1, "epoch": 3, "evaluate_every": "sometimes"},
        }
    )
    assert [complaint.split(": ")[0] for complaint in found] == [
        "model.path",
        "model.dtype",
        "data.train",
        "data.held_out",
        "train.epochs",
        "train.evaluate_every",
        "train.epoch",
    ]
    assert found[0] == "model.path: this key is required."
    assert "'float32', 'bfloat16'" in found[1]
    assert found[3].endswith("(found 1.5).")


def test_a_value_that_may_be_a_number_or_a_word_gets_one_complaint() -> None:
    (found,) = refused({**LEAST, "train": {"evaluate_every": "sometimes"}})
    assert found.startswith("train.evaluate_every: ")
    assert "'epoch'" in found
    assert found.endswith("(found 'sometimes').")
    (found,) = refused({**LEAST, "method": {"targets": 7}})
    assert found.startswith("method.targets: ")


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", "", " a"])
def test_a_name_that_is_no_folder_name_is_refused(name: str) -> None:
    assert refused({**LEAST, "name": name})[0].startswith("name: ")


@pytest.mark.parametrize("number", [".nan", ".inf", "-1", "0"])
def test_a_learning_rate_must_be_a_positive_finite_number(number: str) -> None:
    assert refused(LEAST, f"train.learning_rate={number}")[0].startswith("train.learning_rate: ")


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "model: starter\ndata: {train: a.jsonl}\ntrain: {epochs: 1}\ntrain:\n  seed: 2\n")
    with pytest.raises(RecipeError, match=r"(?s)the key train stands twice.*line 4"):
        load_recipe(path)


def test_a_key_that_is_no_word_is_refused() -> None:
    assert refused({**LEAST, True: 1})  # `on:` in YAML 1.1


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words", "null"])
def test_yaml_that_holds_no_keys_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="must hold keys such as model: and data:, but holds"):
        load_recipe(written(tmp_path, text))


def test_text_that_is_not_yaml_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"(?s)is not YAML: .*line \d") as caught:
        load_recipe(written(tmp_path, "model: starter\ndata: [a\n"))
    assert "my-run.yaml" in str(caught.value)


def test_files_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"There is no recipe .*weitiao init ROWS\.jsonl"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "gbk.yaml").write_bytes("model: 模型".encode("gb18030"))
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "gbk.yaml")


def test_complaints_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"^\S*my-run\.yaml cannot be used as written:\n  data: this key is required\.$"
    ):
        load_recipe(written(tmp_path, "model: starter\n"))


# ---- overrides -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.epochs=5", ("train", "epochs"), 5.0),
        ("train.learning_rate=5e-4", ("train", "learning_rate"), 5e-4),
        ("train.learning_rate=1E-05", ("train", "learning_rate"), 1e-5),
        ("train.evaluate_every=never", ("train", "evaluate_every"), "never"),
        ("train.packing=false", ("train", "packing"), False),
        ("method.targets=[q_proj, v_proj]", ("method", "targets"), ("q_proj", "v_proj")),
        ("model=Qwen/Qwen3-0.6B", ("model", "path"), "Qwen/Qwen3-0.6B"),
        ("model.path=/models/x=y", ("model", "path"), "/models/x=y"),
        ("name=第二次", ("name",), "第二次"),
        ("name=infinity", ("name",), "infinity"),
        ("name=1e5", ("name",), "1e5"),
        ("data.held_out=0", ("data", "held_out"), 0.0),
    ],
)
def test_an_override_changes_one_value(override: str, path: tuple[str, ...], value: object) -> None:
    found: Any = make_recipe(LEAST, [override])
    for part in path:
        found = getattr(found, part)
    assert found == value


def test_overrides_leave_their_neighbours_and_the_given_values_alone() -> None:
    values = {**LEAST, "model": "starter", "train": {"epochs": 9, "seed": 1}, "method": None}
    recipe = make_recipe({**values, "method": {}}, ["train.seed=2", "model.dtype=float32", "train.seed=3"])
    assert (recipe.train.epochs, recipe.train.seed) == (9, 3)
    assert (recipe.model.path, recipe.model.dtype) == ("starter", "float32")
    assert values["train"] == {"epochs": 9, "seed": 1}


def test_an_override_may_change_the_train_files() -> None:
    assert [s.path for s in make_recipe(LEAST, ["data.train=[a.jsonl, b.jsonl]"]).data.train] == ["a.jsonl", "b.jsonl"]
    values = {**LEAST, "data": {"train": ["a.jsonl", {"path": "b.jsonl"}]}}
    changed = make_recipe(values, ["data.train.1.weight=2", "data.train.0.weight=3"]).data.train
    assert [(source.path, source.weight) for source in changed] == [("a.jsonl", 3), ("b.jsonl", 2)]
    with pytest.raises(RecipeError, match=r"'data\.train\.2\.weight=2'.*2 entries"):
        make_recipe(values, ["data.train.2.weight=2"])


@pytest.mark.parametrize(("override", "complaint"), [
    ("train.epoch=5", "train.epoch: there is no such key. Did you mean epochs?"),
    ("tarin.epochs=5", "tarin: there is no such key. Did you mean train?"),
    ("train.epochs.x=5", "train.epochs: "),
])  # fmt: skip
def test_a_misspelt_override_is_refused_like_a_misspelt_key(override: str, complaint: str) -> None:
    assert refused(LEAST, override)[0].startswith(complaint)


@pytest.mark.parametrize("override", ["train.epochs", "=5", "5"])
def test_an_override_without_a_value_is_refused(override: str) -> None:
    with pytest.raises(RecipeError, match=r"is not of the form part\.key=value"):
        make_recipe(LEAST, [override])


def test_an_override_whose_value_is_not_yaml_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"The value of the override 'data\.train=\[a' is not YAML"):
        make_recipe(LEAST, ["data.train=[a"])


# ---- the schema ------------------------------------------------------------------------------------------------


@pytest.fixture
def schema() -> jsonschema.protocols.Validator:
    found = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


@pytest.mark.parametrize(
    "values",
    [
        LEAST,
        {"model": "starter", "data": {"train": ["a.jsonl", {"path": "b.jsonl", "weight": 2}]}},
        yaml.safe_load(make_recipe(LEAST).to_yaml()),
    ],
)
def test_the_schema_accepts_what_recipes_accept(values: Any, schema: jsonschema.protocols.Validator) -> None:
    schema.validate(values)


@pytest.mark.parametrize(
    "values",
    [
        {**LEAST, "modle": 1},
        {**LEAST, "train": {"epoch": 1}},
        {**LEAST, "train": {"epochs": -1}},
        {**LEAST, "data": {"train": [{"path": "a", "weigth": 1}]}},
        {"name": "try", "model": "starter"},
    ],
)
def test_the_schema_refuses_what_recipes_refuse(values: Any, schema: jsonschema.protocols.Validator) -> None:
    with pytest.raises(jsonschema.ValidationError):
        schema.validate(values)


def test_the_schema_explains_every_key() -> None:
    parts = {"Recipe": recipe_schema(), **recipe_schema()["$defs"]}
    unexplained = [
        f"{name}.{key}"
        for name, part in parts.items()
        for key, entry in part["properties"].items()
        if "description" not in entry and "$ref" not in entry and "const" not in entry and name != "Recipe"
    ]
    assert unexplained == []


# ---- init ------------------------------------------------------------------------------------------------------


def test_init_writes_a_recipe_that_loads_and_fits_the_schema(
    sample_rows: Path, tmp_path: Path, schema: jsonschema.protocols.Validator
) -> None:
    draft = init_recipe([str(sample_rows)], model="starter", out=tmp_path / "try.yaml")
    assert load_recipe(tmp_path / "try.yaml") == draft.recipe
    schema.validate(yaml.safe_load(draft.text))
    assert "labels (11 train, 1 dev rows)" in draft.text
    assert draft.recipe.name == "try"


@pytest.mark.parametrize("name", ["行 rows.jsonl", "a: b.jsonl", "yes.jsonl", "#1.jsonl", "it's.jsonl", "1e5"])
def test_init_writes_any_file_name_so_that_it_reads_back(name: str, sample_rows: Path, tmp_path: Path) -> None:
    rows = tmp_path / name
    rows.write_bytes(sample_rows.read_bytes())
    draft = init_recipe([str(rows)], model="Some/Model: 2 # x", dev=(), out=tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == draft.recipe
    assert draft.recipe == make_recipe(
        {"name": rows.stem, "model": "Some/Model: 2 # x", "data": {"train": str(rows), "held_out": 0.1}}
    )


def test_init_with_dev_rows_holds_nothing_out(sample_rows: Path, tmp_path: Path) -> None:
    lines = sample_rows.read_text(encoding="utf-8").splitlines(keepends=True)
    train, dev = tmp_path / "train.jsonl", tmp_path / "dev.jsonl"
    train.write_text("".join(lines[::2] + lines[1:-2:2]), encoding="utf-8")
    dev.write_text(lines[-1], encoding="utf-8")
    draft = init_recipe([str(train)], model="starter", dev=[str(dev)], out=tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml") == draft.recipe
    assert [source.path for source in draft.recipe.data.dev] == [str(dev)]
    assert len(draft.dataset.dev) == 1


def test_init_replaces_a_recipe_only_when_told_to(sample_rows: Path, tmp_path: Path) -> None:
    path = written(tmp_path, "mine", "recipe.yaml")
    with pytest.raises(RecipeError, match="exists already"):
        init_recipe([str(sample_rows)], model="starter", out=path)
    assert path.read_text(encoding="utf-8") == "mine"
    assert isinstance(init_recipe([str(sample_rows)], model="starter", out=path, overwrite=True).recipe, Recipe)
    assert load_recipe(path).name == "rows"
