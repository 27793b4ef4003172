"""The space of a search: which keys of a recipe vary and over what, read strictly and held against the recipe itself.

Knows recipes and values; knows nothing of how values are chosen or trained.
"""

from __future__ import annotations

import difflib
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from ..errors import RecipeError
from ..recipe import Recipe, make_recipe, read_yaml
from ..recipe.part import Part
from ..recipe.problems import complaints

Value = Any
"""What one key of a recipe may hold: whatever YAML can say."""
Scale = Literal["linear", "log"]

MOST_TRIED = 500
"""Combinations of values that are held against the recipe before anything runs, where there are more."""

_SCORED_OTHERWISE = (
    "evaluate",
    "data.dev",
    "data.held_out",
    "data.seed",
    "train.evaluate_rows",
    "train.evaluate_every",
)
_NOT_OF_TRAINING = ("name", "monitor", "generate.batch_rows", "train.log_every", "train.save_every",
                    "train.keep_checkpoints", "train.price_per_hour", "train.currency")  # fmt: skip
_CHOOSE_ROWS = ("data.train", "data.placeholders", "train.seed")
"""Where rows are held out of the train rows, these choose which."""


class Range(Part):
    """All values between two."""

    low: float = Field(description="The least value.")
    high: float = Field(description="The greatest value.")
    scale: Scale = Field("linear", description="log: as many values between 1 and 10 as between 10 and 100.")
    step: float | None = Field(None, gt=0, description="Only values so far apart, counted from the least.")


class Space(Part):
    """A search as it stands in its YAML file."""

    search: Literal["grid", "random", "tpe"] = Field(
        "random", description="How values are chosen: all combinations; by chance; where trials were good (Optuna)."
    )
    trials: int | None = Field(None, ge=1, description="How many trainings: 20, or of a grid all.")
    parameters: dict[str, list[Any] | Range] = Field(
        min_length=1, description="For each key of the recipe, a list of values or a range {low: …, high: …}."
    )
    prune: Literal["median", "halving", "none"] = Field(
        "median", description="How poor trials are stopped: below the median of the others; successive halving; never."
    )
    prune_after: int = Field(4, ge=1, description="No trial is stopped before so many others were scored as often.")
    prune_from: float = Field(
        0.3, ge=0, le=1, description="Nor before this share of its own training: first scores are mostly chance."
    )
    seed: int = Field(0, ge=0, description="Seed of the choice of values.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One key of the recipe that varies: over `choices`, or from `low` to `high`."""

    key: str
    choices: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    scale: Scale = "linear"
    step: float | None = None
    whole: bool = False
    """Whether a range holds whole numbers only."""

    @property
    def grid(self) -> tuple[Value, ...]:
        """All values; empty for a range with no steps."""
        if self.choices or self.step is None:
            return self.choices
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(self.rounded(self.low + number * self.step) for number in range(count))

    def draw(self, chance: random.Random) -> Value:
        """A value by chance."""
        if self.grid:
            return chance.choice(self.grid)
        if self.scale == "log":
            return self.rounded(math.exp(chance.uniform(math.log(self.low), math.log(self.high))))
        if self.whole:
            return chance.randint(int(self.low), int(self.high))
        return self.rounded(chance.uniform(self.low, self.high))

    def rounded(self, value: float) -> int | float:
        """`value` in the range, as a whole number or with the four digits that matter."""
        within = min(max(value, self.low), self.high)
        if self.whole:
            return round(within)
        return min(max(float(f"{within:.4g}"), self.low), self.high) if self.step is None else round(within, 10)

    def ends(self) -> tuple[Value, ...]:
        """What is held against the recipe: all choices, the ends of a range."""
        return self.choices or (self.rounded(self.low), self.rounded(self.high))


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """A space held against its recipe: what is to be tried, and how it is chosen."""

    parameters: tuple[Parameter, ...]
    space: Space

    @property
    def num_trials(self) -> int:
        """How many trials there are to be at most."""
        return self.space.trials or (self.grid_size if self.space.search == "grid" else 20)

    @property
    def grid_size(self) -> int:
        """How many combinations there are; 0 where they cannot be counted."""
        return math.prod(len(parameter.grid) for parameter in self.parameters)

    def grid(self) -> Iterator[dict[str, Value]]:
        """All combinations, the last key varying fastest."""
        for values in itertools.product(*(parameter.grid for parameter in self.parameters)):
            yield {parameter.key: value for parameter, value in zip(self.parameters, values, strict=True)}

    def to_json(self) -> dict[str, Any]:
        """What the trials depend on, JSON-ready."""
        return self.space.model_dump(mode="json", exclude={"trials"})


def load_space(path: str | Path) -> Space:
    """The space in the YAML file `path`.

    Raises:
        RecipeError: no such file, not YAML, unknown keys, wrong values: all of them in one message.
    """
    path = Path(path)
    try:
        values = read_yaml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise RecipeError(
            f"There is no space {path}. Write one, such as: parameters: {{train.learning_rate: "
            f"{{low: 1e-5, high: 1e-3, scale: log}}, method.rank: [8, 16, 32]}}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The space {path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"The space {path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"The space {path} must hold the key parameters:, but holds {values!r:.80}.")
    try:
        return Space.model_validate(values)
    except ValidationError as error:
        lines = [f"  {complaint}" for complaint in complaints(error, Space)]
        raise RecipeError(f"The space {path} cannot be used as written:\n" + "\n".join(lines)) from None


def make_search(recipe: Recipe, space: Space) -> Search:
    """`space` with every value held against `recipe`.

    Raises:
        RecipeError: keys that no recipe has or that may not vary, values that the recipe refuses, ranges that are none:
            all of them in one message.
    """
    problems = [
        f"{key}: it is a part of {other}, which varies too. Vary one of them."
        for key in space.parameters
        for other in space.parameters
        if key.startswith(f"{other}.")
    ]
    parameters: list[Parameter] = []
    for key, over in space.parameters.items():
        try:
            parameters.append(_parameter(recipe, key, over))
        except RecipeError as error:
            problems.append(str(error))
    if not problems:
        search = Search(parameters=tuple(parameters), space=space)
        problems = [*_size_problems(search), *_refused_combinations(recipe, search)]
    if problems:
        raise RecipeError("The space cannot be used as written:\n" + "\n".join(f"  {line}" for line in problems))
    return search


def apply_values(recipe: Recipe, values: Mapping[str, Value], *, name: str) -> Recipe:
    """The recipe of a trial: `recipe` with `values` in their places, under another name.

    Raises RecipeError when the recipe refuses the values.
    """
    plain = {**recipe.model_dump(mode="json"), "name": name}
    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in values.items()]
    return make_recipe(plain, overrides, where="The recipe of this trial")


def _parameter(recipe: Recipe, key: str, over: list[Any] | Range) -> Parameter:
    """The key `key` over what the user wrote. Raises RecipeError."""
    _require_known(recipe, key)
    _require_may_vary(recipe, key)
    if isinstance(over, Range):
        return _range(recipe, key, over)
    if len(over) < 2:
        raise RecipeError(f"{key}: {over!r} leaves no choice. List two values or more, or set it in the recipe.")
    held = [_held(recipe, key, value) for value in over]
    twice = [value for place, value in enumerate(over) if held[place] in held[:place]]
    if twice:
        raise RecipeError(f"{key}: {twice[0]!r} stands twice in {over!r}.")
    # parts, such as one method among others, stay as they were written: all their defaults would fill a page
    return Parameter(key=key, choices=tuple(_shorter(value, whole) for value, whole in zip(over, held, strict=True)))


def _shorter(written: Value, held: Value) -> Value:
    return written if isinstance(held, dict) else held


def _range(recipe: Recipe, key: str, over: Range) -> Parameter:
    low, high = over.low, over.high
    if low >= high:
        raise RecipeError(f"{key}: from {low:g} to {high:g} is no range: low must be less than high.")
    if over.scale == "log" and low <= 0:
        raise RecipeError(f"{key}: scale: log needs values above 0, but the range begins at {low:g}.")
    if over.scale == "log" and over.step is not None:
        raise RecipeError(f"{key}: step goes with scale: linear. List the values instead, such as [1e-5, 1e-4, 1e-3].")
    between = low + (high - low) * 0.4142135  # no whole number, however long the range
    whole = not _accepts(recipe, key, between)
    for end in (low, high):
        _held(recipe, key, int(end) if whole and end.is_integer() else end)
    step = over.step
    if whole and step is not None and not step.is_integer():
        raise RecipeError(f"{key} takes whole numbers: step: {step:g} leaves them.")
    if whole and step is None and over.scale == "linear":
        step = 1.0
    return Parameter(key=key, low=low, high=high, scale=over.scale, step=step, whole=whole)


def _require_may_vary(recipe: Recipe, key: str) -> None:
    def under(names: Sequence[str]) -> bool:
        return any(key == name or key.startswith(f"{name}.") for name in names)

    if under(_SCORED_OTHERWISE):
        raise RecipeError(f"{key}: trials must be scored alike to be compared, so this cannot vary. Set it for all.")
    if under(_NOT_OF_TRAINING):
        raise RecipeError(f"{key}: this changes nothing about the tuned model, so it cannot be searched.")
    chooses = under(_CHOOSE_ROWS) and not (key == "train.seed" and recipe.data.seed is not None)
    if chooses and not recipe.data.dev:
        raise RecipeError(
            f"{key}: the dev rows are held out of the train rows, so they would be others in each trial. Give files of "
            f"dev rows (data.dev){' or data.seed' if key == 'train.seed' else ''}."
        )
    if key in ("data.max_length", "data.overlong") and recipe.data.overlong == "drop":
        raise RecipeError(f"{key}: with overlong: drop the dev rows would be others in each trial. Shorten or forbid.")


def _require_known(recipe: Recipe, key: str) -> None:
    """Raise RecipeError, with the nearest key that there is, when the recipe has no `key`."""
    try:
        _find(recipe.model_dump(mode="json"), key)
        return
    except (KeyError, IndexError, ValueError, TypeError):
        known = sorted(_keys(recipe.model_dump(mode="json")))
    if any(key.startswith(f"{name}.") for name in known if name.endswith(("weights", "placeholders"))):
        return  # named by the user
    near = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]][:1]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    here = [name for name in known if name.startswith(f"{key.split('.')[0]}.")] or list(Recipe.model_fields)
    hint = f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(here)}."
    raise RecipeError(f"{key}: there is no such key in this recipe. {hint}")


def _find(held: Any, key: str) -> Any:
    """What stands under the dotted `key`. Raises KeyError, IndexError, ValueError or TypeError when nothing does."""
    for step in key.split("."):
        held = held[int(step)] if isinstance(held, list) else held[step]
    return held


def _keys(values: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all values."""
    inner = enumerate(values) if isinstance(values, list) else values.items()
    for name, value in inner:
        yield f"{prefix}{name}"
        if isinstance(value, dict | list):
            yield from _keys(value, f"{prefix}{name}.")


def _accepts(recipe: Recipe, key: str, value: Value) -> bool:
    try:
        _held(recipe, key, value)
    except RecipeError:
        return False
    return True


def _held(recipe: Recipe, key: str, value: Any) -> Value:
    """`value` as the recipe holds it under `key`: 1e-4 for "1e-4". Raises RecipeError with the recipe's own reason."""
    try:
        made = apply_values(recipe, {key: value}, name="trial")
    except RecipeError as error:
        raise RecipeError(_reason(error)) from None
    return _find(made.model_dump(mode="json"), key)


def _reason(error: RecipeError) -> str:
    """What `make_recipe` found, less the line above it."""
    return " ".join(str(error).partition("\n")[2].split()) or str(error)


def _size_problems(search: Search) -> list[str]:
    if search.space.search != "grid":
        return []
    endless = [parameter.key for parameter in search.parameters if not parameter.grid]
    if endless:
        return [f"{key}: a grid needs a list of values, or a range with a step." for key in endless]
    if search.space.trials is not None and search.space.trials < search.grid_size:
        return [f"trials: {search.space.trials} is less than the {search.grid_size} of the grid. Try search: random."]
    return []


def _refused_combinations(recipe: Recipe, search: Search) -> list[str]:
    """What the recipe says against values that it accepts one by one, but not together."""
    ends = [parameter.ends() for parameter in search.parameters]
    keys = [parameter.key for parameter in search.parameters]
    combinations: Iterator[tuple[Value, ...]] = itertools.product(*ends)
    if math.prod(map(len, ends)) > MOST_TRIED:
        chance = random.Random(f"combinations/{search.space.seed}")
        combinations = (tuple(chance.choice(values) for values in ends) for _ in range(MOST_TRIED))
    for values in combinations:
        together = dict(zip(keys, values, strict=True))
        try:
            apply_values(recipe, together, name="trial")
        except RecipeError as error:
            shown = ", ".join(f"{key}={value}" for key, value in together.items())
            return [f"{shown}: {_reason(error)}"]
    return []
