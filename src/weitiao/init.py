"""Rows in, a commented recipe out: looks at the data, says what it understood, and writes it down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from .dataset import Dataset, describe_wordings, load_dataset
from .errors import RecipeError
from .recipe import Data, Generate, Lora, Recipe, Train, make_recipe
from .runs import write_text

HELD_OUT = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A recipe about to be written, and the data it describes."""

    recipe: Recipe
    dataset: Dataset
    text: str
    path: Path


def init_recipe(
    rows: Sequence[str],
    *,
    model: str,
    dev: Sequence[str] = (),
    out: str | Path = "recipe.yaml",
    overwrite: bool = False,
) -> Draft:
    """Write a commented recipe for `rows` to `out`.

    Args:
        rows: files to learn from.
        model: folder or id of the base model.
        dev: files to score on; without them a tenth of the rows is set apart.
        out: where the recipe goes; its name names the run.
        overwrite: replace a recipe that is there.

    Raises:
        DataError: the rows have problems (all are named); RecipeError: `out` exists.
    """
    path = Path(out)
    if path.exists() and not overwrite:
        raise RecipeError(f"{path} exists already. Choose another file with -o, or replace it with --force.")
    name = Path(rows[0]).stem if path.stem == "recipe" else path.stem
    data = {"train": list(rows)} | ({"dev": list(dev)} if dev else {"held_out": HELD_OUT})
    recipe = make_recipe({"name": name, "model": model, "data": data})
    dataset = load_dataset(recipe)
    text = _text(recipe, dataset)
    write_text(path.resolve(), text)
    return Draft(recipe=recipe, dataset=dataset, text=text, path=path)


def _text(recipe: Recipe, dataset: Dataset) -> str:
    """The recipe as YAML with a comment wherever a user may want to change something."""
    data, train, method = recipe.data, recipe.train, recipe.method
    rows = "\n".join(f"  #   {line}" for line in describe_tasks(dataset))
    sources = "".join(f"    - {_quote(source.path)}\n" for source in data.train)
    held = (
        "  dev:\n" + "".join(f"    - {_quote(source.path)}\n" for source in data.dev)
        if data.dev
        else f"  held_out: {data.held_out}          # share of the rows kept apart for scoring\n"
    )
    return f"""# What to tune, on what, and how. Every key and its meaning: weitiao schema
# Any key can be changed on the command line: weitiao train recipe.yaml train.epochs=5
name: {_quote(recipe.name)}              # the run's folder is runs/{recipe.name}
model: {_quote(recipe.model.path)}             # a folder, a Hugging Face id, modelscope:OWNER/NAME, or starter

data:
  # Understood from the labels:
{rows}
  train:
{sources}{held}  max_length: {data.max_length}      # {_meaning(Data, "max_length")}
  overlong: {data.overlong}       # a longer row: error, drop, or shorten_input (cuts nothing but its text)

method:
  name: {method.name}
  rank: {method.rank}              # {_meaning(Lora, "rank")}
  alpha: {method.alpha}
  dropout: {method.dropout:g}
  targets: {method.targets}

train:
  epochs: {train.epochs:g}
  batch_size: {train.batch_size}        # {_meaning(Train, "batch_size")}
  learning_rate: {train.learning_rate:g}
  schedule: {train.schedule}      # linear, cosine or constant
  evaluate_every: {train.evaluate_every}  # score the dev rows by generation: a number of steps, epoch, or never
  save_every: {train.save_every}        # steps between checkpoints
  tokens_per_pass: {train.tokens_per_pass} # {_meaning(Train, "tokens_per_pass")}
  seed: {train.seed}

generate:
  max_new_tokens: {recipe.generate.max_new_tokens}   # {_meaning(Generate, "max_new_tokens")}
"""


def describe_tasks(dataset: Dataset) -> list[str]:
    """One line per task: its name, rows, form and the questions it is known by."""
    lines = []
    for task in dataset.tasks:
        num_train, num_dev = dataset.count_rows()[task.name]
        asked = f" Asked as {describe_wordings(task)}." if task.wordings else ""
        counts = f"{num_train} train, {num_dev} dev rows"
        lines.append(f"{task.name} ({counts}): {task.form.describe()}.{asked}".replace("\n", "⏎"))
    return lines


def _meaning(part: type[Data] | type[Lora] | type[Train] | type[Generate], key: str) -> str:
    description = part.model_fields[key].description or ""
    return description.rstrip(".")


def _quote(text: str) -> str:
    """`text` as a YAML scalar on one line."""
    return yaml.safe_dump(text, allow_unicode=True, width=1000).removesuffix("\n").removesuffix("\n...")
