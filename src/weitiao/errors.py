"""Every error a user can cause, each a sentence with the values seen and the fix.

    WeitiaoError
    ├── RecipeError          the recipe: unknown key, wrong value, missing file
    ├── DataError            rows: carries every problem found, not only the first
    ├── FormError            an answer that does not have the labelled form
    ├── GrammarError         a grammar of answers that cannot be compiled
    ├── RenderError          a conversation that the model's chat format cannot express
    ├── ModelError           a checkpoint that cannot be found, read or used
    ├── RunError             a run directory: exists, is missing a part, cannot be written
    │   ├── DivergedError    the loss or its gradient is no finite number any more
    │   ├── LostProcessError one of several processes that train together has ended
    │   └── ResumeError      data, recipe or base model changed since the checkpoint
    └── ContractError        a contract broken: another base model, unknown task, other version

The command line prints the sentence and exits with code 2; anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class WeitiaoError(Exception):
    """Root of the tree; its text is what the user reads."""


class RecipeError(WeitiaoError):
    """The recipe cannot be used as written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing wrong with one row: where, in which field, what, and how to mend it."""

    source: str
    """File and line, such as ``rows.jsonl:37``."""
    field: str
    """The field at fault, or ``row`` for the row as a whole."""
    message: str
    """What was seen."""
    fix: str
    """What to do about it."""

    def __str__(self) -> str:
        return f"{self.source}: {self.field}: {self.message} Fix: {self.fix}"


class DataError(WeitiaoError):
    """Rows that cannot be used; `problems` holds all of them."""

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join([message, *(f"  {problem}" for problem in self.problems)]))


class FormError(WeitiaoError):
    """A text that is not an answer in the labelled form; the text says at which place and why."""


class GrammarError(WeitiaoError):
    """A grammar of answers that cannot be compiled; the text says at which place and why."""


class RenderError(WeitiaoError):
    """A conversation that cannot be written in the model's chat format."""


class ModelError(WeitiaoError):
    """A model, tokenizer or adapter that cannot be found, read or used."""


class RunError(WeitiaoError):
    """A run directory that cannot be used as asked."""


class DivergedError(RunError):
    """Training has diverged: no step of this run can be learnt from any more."""


class LostProcessError(RunError):
    """One of the processes that train a run together has ended, so none of them can go on."""


class ResumeError(RunError):
    """The run cannot go on where it stopped, because what it depends on has changed."""


class ContractError(WeitiaoError):
    """A tuned model was asked for something its contract does not promise."""
