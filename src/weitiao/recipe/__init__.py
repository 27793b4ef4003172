"""The recipe: one YAML file that says what to tune, on what, how; read strictly, every mistake named at once.

The recipe knows names and numbers only. What they mean lives where they are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ..errors import RecipeError
from .methods import (
    AnyMethod,
    Freeze,
    Full,
    Ia3,
    Lora,
    Method,
    PromptTuning,
    PTuning,
    PTuningV1,
    learning_rate_of,
)
from .model import Model
from .monitor import Monitors
from .part import Part
from .problems import complaints
from .text import apply_override, deep_copy
from .text import read_yaml as read_yaml
from .training import Train

__all__ = [
    "AnyMethod",
    "Data",
    "DeclaredTask",
    "Evaluate",
    "Freeze",
    "Full",
    "Generate",
    "Ia3",
    "Lora",
    "Model",
    "PTuning",
    "PTuningV1",
    "PromptTuning",
    "Recipe",
    "Source",
    "Train",
    "load_recipe",
    "make_recipe",
    "recipe_schema",
]


class Source(Part):
    """One file of rows, or several that belong together."""

    path: str = Field(
        description="A file (.jsonl, .json, .csv, .tsv, .parquet, .xlsx; text also as .gz or .zst), a folder of them, "
        "a pattern such as data/*.jsonl, dataset_info.json#NAME, hf:OWNER/NAME:SPLIT or modelscope:OWNER/NAME:SPLIT. "
        "Relative to the folder weitiao is started in."
    )
    weight: float = Field(1.0, gt=0, description="How often its rows are seen per epoch: 2 = twice, 0.5 = every other.")
    limit: int | None = Field(None, ge=1, description="At most so many of its rows, chosen by the seed.")
    format: str | None = Field(
        None, description="Name of its rows' format, such as alpaca or sharegpt. Left out: told from each row's keys."
    )
    prompt: str | None = Field(
        None,
        min_length=1,
        description='How a question is written from a row\'s fields, such as "Which class?\\n\\n{text}". '
        "Left out: as the format does.",
    )
    system: str | None = Field(None, min_length=1, description="The system message of rows that have none.")
    encoding: Literal["utf-8", "gb18030"] = Field(
        "utf-8", description="How the bytes of a text file are read. gb18030 also reads GBK and GB2312."
    )
    sheet: str | None = Field(None, description="Name of a spreadsheet's sheet. Left out: the first.")


def _as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _as_sources(value: Any) -> Any:
    return [value] if isinstance(value, str | Mapping) else value


OneSource = Annotated[Source, BeforeValidator(_as_source, json_schema_input_type=str | Source)]
Sources = Annotated[
    tuple[OneSource, ...],
    BeforeValidator(_as_sources, json_schema_input_type=str | Source | tuple[str | Source, ...]),
]


def _as_model(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class Data(Part):
    """Rows to learn from and rows to score on."""

    train: Sources = Field(min_length=1, description="Files of rows to learn from.")
    dev: Sources = Field((), description="Files of rows to score on while training; never trained on.")
    held_out: float = Field(
        0.1, ge=0, lt=1, description="Share of the train rows kept apart for scoring when no dev files are given."
    )
    seed: int | None = Field(
        None, ge=0, description="Seed of which rows are held out and which stay under a limit. Left out: train.seed."
    )
    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Learn from this share of the train rows only, of each task and label alike, chosen by train.seed; "
        "a smaller share lies within a larger one. The dev rows stay the same.",
    )
    turns: Literal["flagged", "all", "last"] = Field(
        "flagged",
        description="Which replies of a conversation are learnt: all but those whose own flag says no (loss, weight), "
        "all whatever their flag says, or only the last.",
    )
    placeholders: dict[str, Annotated[str, Field(min_length=1)] | None] = Field(
        {},
        description="What stands for {{name}}, {{author}}, <NAME> and <AUTHOR> in rows, by name; null keeps such a "
        "place as text.",
    )
    loss_mask: Literal["family", "answer"] = Field(
        "family",
        description="Which tokens of a reply count in the loss. family: as the model family's own trainer has it (the "
        "ChatGLM formats learn a token or two more around the answer). answer: the answer and its end token.",
    )
    max_length: int = Field(2048, gt=8, description="Longest example in tokens, prompt and answer together.")
    overlong: Literal["error", "drop", "shorten_input"] = Field(
        "error",
        description="What to do with a longer example. shorten_input cuts the input text only, never the question, "
        "the answer or the chat template.",
    )
    retrieve: int = Field(
        0,
        ge=0,
        le=32,
        description="How many of the nearest train rows of its task stand before each row as answered examples, in "
        "training and in use; 0: none. They are kept with the run.",
    )

    @field_validator("retrieve")
    @classmethod
    def _examples_are_not_learnt(cls, retrieve: int, info: ValidationInfo) -> int:
        if retrieve and info.data.get("turns") == "all":
            raise PydanticCustomError(
                "retrieve", "with turns: all the answers of the examples would be learnt too; set turns: flagged."
            )
        return retrieve


class DeclaredTask(Part):
    """A task declared by hand instead of inferred from the labels."""

    name: str = Field(description="Name of the task, as in the rows' task field or as inferred.")
    shape: Literal["object list", "object", "label list", "string list", "label", "text"] | None = Field(
        None,
        description="What an answer is: a list of objects, one object, a list of labels, a list of any strings, one "
        "label, or free text. Left out: an object where keys are given, one label where labels are, else as inferred.",
    )
    keys: tuple[str, ...] = Field((), description="Keys of the objects, in order.")
    labels: tuple[str, ...] = Field((), description="The closed set of labels, the choices.")
    json_schema: dict[str, Any] | str | None = Field(
        None, description="A JSON Schema that answers follow: written out here, or the path of a .json file."
    )
    regex: str | None = Field(None, min_length=1, description="A regular expression that the whole answer matches.")
    lark: str | None = Field(
        None, min_length=1, description="A Lark grammar, in llguidance's dialect, that the whole answer follows."
    )
    fence: str | None = Field(None, description="Language of the code fence around the JSON, such as json.")
    min_items: int | None = Field(None, ge=0, description="Fewest items of a list. Left out: as the labels show.")
    max_items: int | None = Field(None, ge=1, description="Most items of a list. Left out: as the labels show.")
    ground: bool = Field(
        True,
        description="Whether values that all labels copy from the text must be copied from the text in answers too.",
    )
    wordings: tuple[str, ...] = Field((), description="Questions by which rows of this task are recognised.")


class Generate(Part):
    """How answers are generated when scoring and predicting."""

    max_new_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Longest answer in tokens; a cut answer is reported as cut. auto: half as long again as the "
        "longest labelled answer of the row's task.",
    )
    temperature: float = Field(0.0, ge=0, description="0: always the most likely token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the smallest set with this much probability.")
    top_k: int = Field(0, ge=0, description="Sample from this many tokens; 0: all.")
    seed: int = Field(0, ge=0, description="Seed of sampling.")
    batch_rows: int = Field(48, ge=1, description="Rows generated together.")
    constrain: bool = Field(
        True,
        description="Hold every answer to its task's form while it is written, copied values to the row's text: what "
        "cannot be given so is refused, with the reason. false: the model writes freely.",
    )


class Evaluate(Part):
    """How a run is scored and reported."""

    base: bool = Field(True, description="Score the base model beside the tuned one.")
    shots: tuple[Annotated[int, Field(ge=0, le=32)], ...] = Field(
        (),
        description="Also score the base model as it can be prompted, once for each number: told the form of the "
        "answer and shown so many train rows as examples, such as [0, 4].",
    )
    unconstrained: bool = Field(
        False, description="Score the tuned model without the constraint of generate.constrain too: what it changed."
    )
    resamples: int = Field(1000, ge=0, description="Bootstrap resamples for the 95 % intervals.")
    metrics: tuple[str, ...] = Field(
        (),
        description="Metrics of your own, each FILE.py:FUNCTION, the file seen from the recipe's folder. "
        "function(gold, answer, row) gives a number or several by name.",
    )
    best_by: str = Field(
        "overall",
        min_length=1,
        description="The dev figure that chooses the best checkpoint: overall (the mean of the tasks' own), or "
        "TASK.METRIC such as triples.f1_relaxed; with a minus before it where less is better.",
    )


class Recipe(Part):
    """Everything a run depends on."""

    name: str = Field(pattern=r"^[^/\\\s][^/\\]*$", description="Name of the run: its folder is runs/NAME.")
    model: Annotated[Model, BeforeValidator(_as_model, json_schema_input_type=str | Model)]
    data: Data
    tasks: tuple[DeclaredTask, ...] = Field((), description="Tasks declared by hand; those left out are inferred.")
    method: Method = Lora()
    train: Train = Train()
    generate: Generate = Generate()
    evaluate: Evaluate = Evaluate()
    monitor: Monitors = Field(
        (),
        description="Where else the run's figures are shown: swanlab, tensorboard, wandb, mlflow, trackio, by name or "
        "with options.",
    )

    @property
    def rows_seed(self) -> int:
        """The seed of which rows are held out and which stay under a limit."""
        return self.train.seed if self.data.seed is None else self.data.seed

    @model_validator(mode="before")
    @classmethod
    def _learning_rate_by_method(cls, values: Any) -> Any:
        """Fill in the learning rate that suits the method, where the recipe says none."""
        rate = learning_rate_of(values.get("method")) if isinstance(values, Mapping) else None
        train = values.get("train", {}) if rate is not None else None
        if isinstance(train, Mapping) and "learning_rate" not in train:
            return {**values, "train": {**train, "learning_rate": rate}}
        if isinstance(train, Train) and "learning_rate" not in train.model_fields_set:
            return {**values, "train": train.model_copy(update={"learning_rate": rate})}
        return values

    def to_yaml(self) -> str:
        """The whole recipe, defaults included, as YAML that `load_recipe` reads back equal."""
        return yaml.safe_dump(self.model_dump(mode="json"), allow_unicode=True, sort_keys=False)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the file `path`, changed by `overrides` such as ``train.epochs=5``.

    `name` defaults to the file's name without its ending.

    Raises:
        RecipeError: no such file, not YAML, unknown keys, wrong values: all of them in one message.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"There is no recipe {path}. Write one with: weitiao init ROWS.jsonl -o {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error}.") from None
    try:
        values = read_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"The recipe {path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"The recipe {path} must hold keys such as model: and data:, but holds {values!r:.80}.")
    values.setdefault("name", path.stem)
    _anchor_metrics(values, path.parent)
    return make_recipe(values, overrides, where=str(path))


def _anchor_metrics(values: dict[str, Any], folder: Path) -> None:
    """Make the files of `evaluate.metrics` absolute: the copy of a recipe in its run names the same files."""
    evaluate = values.get("evaluate")
    metrics = evaluate.get("metrics") if isinstance(evaluate, dict) else None
    if isinstance(evaluate, dict) and isinstance(metrics, list):
        anchored = [str(folder.resolve() / metric) if isinstance(metric, str) else metric for metric in metrics]
        values["evaluate"] = {**evaluate, "metrics": anchored}


def make_recipe(values: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "recipe") -> Recipe:
    """The recipe made of plain `values` and `overrides`. Raises RecipeError as `load_recipe` does."""
    merged: dict[str, Any] = deep_copy(values)
    for override in overrides:
        apply_override(merged, override)
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        lines = [f"  {complaint}" for complaint in complaints(error, Recipe)]
        raise RecipeError(f"{where} cannot be used as written:\n" + "\n".join(lines)) from None


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors that complete and check YAML."""
    schema = Recipe.model_json_schema()
    schema["required"].remove("name")  # a file's name stands in for it
    method = schema["properties"]["method"]
    method["anyOf"] = method.pop("oneOf")  # without a name it is LoRA, whose keys others may have too
    del method["discriminator"]
    return schema
