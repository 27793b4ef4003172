"""What all verbs share: the program, its consoles, options that several verbs have, and how errors are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from ..data.reading import Said
from ..errors import DataError, WeitiaoError
from ..launch import require_alone
from ..stopping import Stopped

app = typer.Typer(
    name="weitiao",
    help="Fine-tune open language models on your own labelled rows; the tuned model answers in their form.\n\n"
    "A first run: weitiao init rows.jsonl --model starter, then weitiao train recipe.yaml, "
    "then weitiao evaluate runs/rows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Rows' texts, labels and paths are printed as they are: "[b]" is no markup, ":cat:" no emoji.
out = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
err = Console(markup=False, emoji=False, highlight=False, stderr=True)  # shows progress bars, which need the width

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, as written by: weitiao init")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes to the recipe, such as train.epochs=5 name=second-try")
]
RunArgument = Annotated[Path, typer.Argument(help="A finished run, such as runs/rows")]
BaseModel = Annotated[
    str | None, typer.Option("--base-model", help="Where the base model lies now, if it was moved since training.")
]
RowFormatName = Annotated[
    str | None, typer.Option("--format", help="Name of the rows' format; by default told from the rows.")
]
Prompt = Annotated[
    str | None,
    typer.Option(help='How a question is written from a row\'s fields, such as "Which class?\\n\\n{text}".'),
]
System = Annotated[str | None, typer.Option(help="The system message of rows that have none.")]
Encoding = Literal["utf-8", "gb18030"]
FileEncoding = Annotated[Encoding, typer.Option(help="Of text files; gb18030 also reads GBK and GB2312.")]
Sheet = Annotated[str | None, typer.Option(help="Name of a spreadsheet's sheet; by default the first.")]

MAX_PROBLEMS = 200
"""Problems printed at most; the count is always whole."""


@app.callback()
def _require_alone(context: typer.Context) -> None:
    # a comment, since a docstring here would be the program's help: all verbs but one are done by one process
    if context.invoked_subcommand not in (None, "train"):
        with reporting_errors():
            require_alone(str(context.invoked_subcommand))


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Print a user's error as its sentence and leave with code 2; Ctrl-C leaves with code 130, see `Stopped`."""
    try:
        yield
    except DataError as error:
        err.print(summary_of(error), style="bold red", soft_wrap=True)
        for problem in error.problems[:MAX_PROBLEMS]:
            err.print(f"  {problem}", soft_wrap=True)
        if len(error.problems) > MAX_PROBLEMS:
            err.print(f"  … and {len(error.problems) - MAX_PROBLEMS} more.")
        raise typer.Exit(2) from None
    except WeitiaoError as error:
        err.print(str(error), style="bold red", soft_wrap=True)
        raise typer.Exit(2) from None
    except Stopped as stopped:
        err.print(str(stopped), soft_wrap=True)
        raise typer.Exit(stopped.exit_code) from None
    except KeyboardInterrupt:
        err.print("Stopped.")
        raise typer.Exit(130) from None


def summary_of(error: DataError) -> str:
    """What `error` says before its list of problems: one sentence, or one for each file that cannot be used."""
    return str(error).removesuffix("".join(f"\n  {problem}" for problem in error.problems))


def said_of(
    row_format: str | None, prompt: str | None, system: str | None, encoding: Encoding, sheet: str | None
) -> Said:
    """What the options say of a file of rows; a shell's \\n in a prompt is a line end."""
    prompt = prompt.replace("\\n", "\n") if prompt is not None else None
    return Said(format=row_format, prompt=prompt, system=system, encoding=encoding, sheet=sheet)
