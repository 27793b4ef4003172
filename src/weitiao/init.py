"""Rows in, a commented recipe out: looks at the data, says what it understood, and writes it down."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import yaml

from .data.formats import recognise_format
from .data.reading import Said
from .data.records import Record, iter_records_or_problems
from .dataset import Dataset, describe_wordings, load_dataset, read_options
from .errors import DataError, Problem, RecipeError
from .recipe import Data, Generate, Lora, Recipe, Source, Train, make_recipe
from .runs import write_text

HELD_OUT = 0.1

_LOOKED_AT = 1000
"""Rows of a source whose format is looked at for the comment beside it."""


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
    said: Said | None = None,
    placeholders: Mapping[str, str | None] | None = None,
    out: str | Path = "recipe.yaml",
    overwrite: bool = False,
) -> Draft:
    """Write a commented recipe for `rows` to `out`.

    Args:
        rows: files to learn from.
        model: folder or id of the base model.
        dev: files to score on; without them a tenth of the rows is set apart.
        said: how all these files are to be read and asked, as far as their rows do not say it.
        placeholders: what stands for ``{{name}}`` and the like; None keeps one as text.
        out: where the recipe goes; its name names the run.
        overwrite: replace a recipe that is there.

    Raises:
        DataError: the rows have problems (all are named), or placeholders that nothing fills (each is named once).
        RecipeError: `out` exists.
    """
    path = Path(out)
    if path.exists() and not overwrite:
        raise RecipeError(f"{path} exists already. Choose another file with -o, or replace it with --force.")
    name = Path(rows[0]).stem if path.stem == "recipe" else path.stem
    options = _options(said or Said())
    data: dict[str, object] = {"train": [{"path": path, **options} for path in rows]}
    data |= {"dev": [{"path": path, **options} for path in dev]} if dev else {"held_out": HELD_OUT}
    data |= {"placeholders": dict(placeholders)} if placeholders else {}
    recipe = make_recipe({"name": name, "model": model, "data": data})
    try:
        dataset = load_dataset(recipe)
    except DataError as error:
        raise _about_placeholders(error) or error from None
    text = _text(recipe, dataset)
    write_text(path.resolve(), text)
    return Draft(recipe=recipe, dataset=dataset, text=text, path=path)


def _options(said: Said) -> dict[str, str]:
    """The keys of a source that say what `said` does."""
    given = {"format": said.format, "prompt": said.prompt, "system": said.system, "sheet": said.sheet}
    options = {key: value for key, value in given.items() if value}
    return options | ({} if said.encoding == "utf-8" else {"encoding": said.encoding})


def _about_placeholders(error: DataError) -> DataError | None:
    """One problem for each placeholder where nothing else is wrong; None where something is."""
    if not error.problems or any(problem.field != "placeholders" for problem in error.problems):
        return None
    found: defaultdict[str, list[Problem]] = defaultdict(list)
    for problem in error.problems:
        found[problem.message].append(problem)
    problems = []
    for message, them in found.items():
        told = message.replace("holds", f"{len(them):,} rows hold", 1) if len(them) > 1 else message
        name = "".join(re.findall(r"\{\{\s*(\w+)|<(\w+)>", message)[0]).lower()
        fix = f"Say what stands for it: --placeholder {name}=…; --placeholder {name}= keeps it as text."
        problems.append(Problem(source=them[0].source, field="placeholders", message=told, fix=fix))
    return DataError("The rows hold places to be filled in before a model learns from them.", problems)


def _formats(source: Source, data: Data) -> str:
    """The formats of the first rows of a source, for people: ``alpaca``."""
    rows = islice(iter_records_or_problems(source.path, options=read_options(source, data)), _LOOKED_AT)
    names = (source.format or recognise_format(row.raw) for row in rows if isinstance(row, Record))
    return ", ".join(dict.fromkeys(name or "by dataset_info.json" for name in names))


def _sources(sources: Sequence[Source], data: Data) -> str:
    """The sources as a YAML list, each with the format that its rows were recognised to have."""
    lines = []
    for source in sources:
        kept = source.model_dump(mode="json", exclude_defaults=True)
        path = _quote(kept.pop("path"))
        lines.append(f"    - {'path: ' if kept else ''}{path}   # {_formats(source, data)}\n")
        lines += [f"      {key}: {_quote(value)}\n" for key, value in kept.items()]
    return "".join(lines)


def _text(recipe: Recipe, dataset: Dataset) -> str:
    """The recipe as YAML with a comment wherever a user may want to change something."""
    data, train, method = recipe.data, recipe.train, recipe.method
    assert isinstance(method, Lora), "a drafted recipe tunes by LoRA"
    rows = "\n".join(f"  #   {line}" for line in describe_tasks(dataset))
    held = (
        "  dev:\n" + _sources(data.dev, data)
        if data.dev
        else f"  held_out: {data.held_out}          # share of the rows kept apart for scoring\n"
    )
    if data.placeholders:
        held += (
            "  placeholders:            # what stands for {{name}} and the like in the rows; null keeps one as text\n"
        )
        held += "".join(f"    {_quote(name)}: {_quote(text)}\n" for name, text in data.placeholders.items())
    return f"""# What to tune, on what, and how. Every key and its meaning: weitiao schema
# Any key can be changed on the command line: weitiao train recipe.yaml train.epochs=5
name: {_quote(recipe.name)}              # the run's folder is runs/{recipe.name}
model: {_quote(recipe.model.path)}             # a folder, a Hugging Face id, modelscope:OWNER/NAME, or starter

data:
  # Understood from the labels:
{rows}
  train:                   # each with the format of its rows
{_sources(data.train, data)}{held}  max_length: {data.max_length}      # {_meaning(Data, "max_length")}
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


def _quote(text: str | None) -> str:
    """`text` as a YAML scalar on one line."""
    if text is not None and "\n" in text:
        return json.dumps(text, ensure_ascii=False)
    return yaml.safe_dump(text, allow_unicode=True, width=1000).removesuffix("\n").removesuffix("\n...")
