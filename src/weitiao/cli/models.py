"""Verbs about models: train, evaluate, compare, predict, prompt."""

from __future__ import annotations

import math
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table
from typer.core import TyperCommand

from ..errors import RecipeError
from ..stopping import Stopped, StopSignals
from .base import (
    BaseModel,
    FileEncoding,
    Overrides,
    Prompt,
    RecipeArgument,
    RowFormatName,
    RunArgument,
    Sheet,
    System,
    app,
    err,
    out,
    reporting_errors,
    said_of,
)
from .spread import Address, GpusPerWorker, Ray, Spread, Workers, require_with_ray
from .training import own_console, train_recipe

if TYPE_CHECKING:
    from ..evaluation import Evaluation


class ResumableCommand(TyperCommand):
    """A command whose ``--resume`` may stand alone or have a value behind it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As every command, once ``--resume`` and its value have become one word."""
        return super().parse_args(ctx, join_resume(args))


def join_resume(args: list[str]) -> list[str]:
    """`args` with ``--resume`` and its value as one word, which is ``--resume=yes`` where it stands alone.

    ``--resume 20 epochs=3`` is ``--resume=20 epochs=3``; ``--resume epochs=3`` is ``--resume=yes epochs=3``. What is no
    value: another option, an override ``key=value``, a recipe's file, the end.
    """
    joined: list[str] = []
    for number, word in enumerate(args):
        if joined and joined[-1] == "--resume":
            taken = Path(word).is_dir() or not (word.startswith("-") or "=" in word or word.endswith((".yaml", ".yml")))
            joined[-1:] = [f"--resume={word}"] if taken else ["--resume=yes", word]
        else:
            joined.append(word)
        if word == "--":
            return [*joined, *args[number + 1 :]]
    return ["--resume=yes" if word == "--resume" else word for word in joined]


@app.command(cls=ResumableCommand)
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[yes|auto|STEP|FOLDER]",
            help="Go on from a checkpoint of the run: the newest (yes, or --resume alone), that of a step, or the one "
            "in a folder. auto: go on where the run has begun, else begin it.",
        ),
    ] = None,
    ray: Ray = False,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    address: Address = None,
) -> None:
    """Tune the model; the result goes to runs/NAME. Ctrl-C saves and leaves, twice leaves at once.

    SIGTERM and SIGUSR1 do the same, and the code to exit with is 75: run again with --resume, the training goes on.
    """
    with reporting_errors(), StopSignals(partial(own_console().print, soft_wrap=True)) as stops:
        require_with_ray(ray, workers=workers, gpus_per_worker=gpus_per_worker, address=address)
        spread = Spread(workers=workers, gpus_per_worker=gpus_per_worker, address=address) if ray else None
        try:
            train_recipe(recipe, overrides or [], resume, stops, spread)
        except Stopped as stopped:
            from ..recipe import load_recipe
            from ..runs import RunFolder

            begun = RunFolder(Path("runs") / load_recipe(recipe, overrides or ()).name).recipe.exists()
            words = ["weitiao", "train", str(recipe), *(overrides or ()), *(["--resume"] if begun else [])]
            words += spread.words() if spread is not None else []
            raise Stopped(stopped.signal_name, go_on=shlex.join(words)) from None


@app.command()
def evaluate(
    run: RunArgument,
    data: Annotated[
        str | None, typer.Option(help="Another file of labelled rows; by default the run's dev rows.")
    ] = None,
    base: Annotated[
        bool | None,
        typer.Option("--base/--no-base", help="Score the base model as well; by default as the recipe says."),
    ] = None,
    shots: Annotated[
        str | None,
        typer.Option(help="Score the base model as it can be prompted too, with so many examples: 0,4. none: not."),
    ] = None,
    unconstrained: Annotated[
        bool | None,
        typer.Option(
            "--unconstrained/--constrained-only",
            help="Score the tuned model with nothing held to the form too: what the constraint changed.",
        ),
    ] = None,
    probe: Annotated[
        Path | None,
        typer.Option(help="Multiple-choice questions (JSONL), asked before and after: what tuning made it forget."),
    ] = None,
    base_model: BaseModel = None,
    row_format: RowFormatName = None,
    prompt: Prompt = None,
    system: System = None,
    encoding: FileEncoding = "utf-8",
    sheet: Sheet = None,
) -> None:
    """Score the tuned model against its base model, task by task; write JSON, Markdown and an HTML page.

    The rows of --data are asked as the rows that the run learnt from, with its prompt, system message and placeholders,
    unless --prompt, --system and the like say otherwise; --prompt "" and --system "" ask without any.
    """
    with reporting_errors():
        said = said_of(row_format, prompt, system, encoding, sheet)
        numbers = None if shots is None else _numbers(shots)
        from ..evaluation import evaluate_run

        evaluation = evaluate_run(
            run,
            data=data,
            base=base,
            shots=numbers,
            unconstrained=unconstrained,
            probe=probe,
            base_model=base_model,
            said=said,
            console=err,
        )
    _print_scores(evaluation)
    for file in evaluation.files:
        out.print(str(file))


def _numbers(text: str) -> tuple[int, ...]:
    """The numbers in ``0,4``; none in ``none``."""
    words = [] if text == "none" else text.split(",")
    if not all(word.strip().isdigit() for word in words):
        raise RecipeError(f"--shots is {text!r}. Write numbers of examples with commas between them, such as 0,4.")
    return tuple(int(word) for word in words)


def _down(share: float) -> str:
    """To two digits, never upwards: what reaches `share` must reach what is shown."""
    return f"{math.floor(share * 100) / 100:.2f}"


def _print_scores(evaluation: Evaluation) -> None:
    table = Table("task", "rows", "metric", "model", "score", "95 %", "in form")
    for tuned in evaluation.tuned:
        if not tuned.rows:
            continue
        first = (tuned.task, str(tuned.rows), tuned.primary)
        for side, scores in evaluation.sides.items():
            score = next(one for one in scores if one.task == tuned.task)
            low, high = score.intervals.get(score.primary, (float("nan"), float("nan")))
            figure, valid = f"{score.metrics[score.primary]:.3f}", f"{score.metrics['valid']:.1%}"
            table.add_row(*first, side, figure, f"{low:.3f}–{high:.3f}", valid)
            first = ("", "", "")
        table.add_section()
    out.print(table, soft_wrap=False)
    for task, calibration in evaluation.calibration.items():
        kept = [row for row in calibration.table if row.precision_kept >= 0.95]
        best = max(kept, key=lambda row: row.share_kept, default=None)
        if best is not None:
            out.print(
                f"{task}: the {best.share_kept:.0%} of answers with a confidence from {_down(best.threshold)} on are "
                f"{best.precision_kept:.0%} right; weitiao predict --threshold sends the others to a person."
            )
    if evaluation.probe is not None:
        before, after = evaluation.probe.before.overall.accuracy, evaluation.probe.after.overall.accuracy
        low, high = evaluation.probe.interval
        verdict = "the model has forgotten" if evaluation.probe.forgotten else "no more than chance"
        out.print(f"probe: {before:.1%} right before tuning, {after:.1%} after ({low:+.1%} to {high:+.1%}): {verdict}.")


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="A run, an evaluation's folder, or a file scored-SIDE.jsonl in it.")],
    b: Annotated[Path, typer.Argument(help="Another one, of the same rows.")],
    data: Annotated[
        str | None, typer.Option(help="Name of the set, where runs were evaluated on several; by default dev.")
    ] = None,
    side_a: Annotated[str | None, typer.Option(help="Which side of A, such as base; by default the tuned one.")] = None,
    side_b: Annotated[str | None, typer.Option(help="Which side of B.")] = None,
    any_prompt: Annotated[
        bool, typer.Option("--any-prompt", help="Let inputs differ: the same rows, asked or shortened differently.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A folder for compare.html and compare.json.")
    ] = None,
) -> None:
    """Say whether B is better than A by more than chance, and which rows flipped: a paired bootstrap over the rows."""
    from ..evaluate.compare import compare_runs, write_comparison
    from ..evaluate.compare_shown import show_comparison

    with reporting_errors():
        comparison = compare_runs(a, b, data=data, side_a=side_a, side_b=side_b, any_prompt=any_prompt)
        show_comparison(comparison, out)
        for file in write_comparison(comparison, output) if output is not None else ():
            out.print(str(file))


@app.command()
def predict(
    run: RunArgument,
    rows: Annotated[str, typer.Argument(help="A file of rows, as for training; they need no answer of their own.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the answers, one JSON line per row.")],
    threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Mark answers of a lower confidence for a person: route is person or model."),
    ] = None,
    base_model: BaseModel = None,
    row_format: RowFormatName = None,
    prompt: Prompt = None,
    system: System = None,
    encoding: FileEncoding = "utf-8",
    sheet: Sheet = None,
    ray: Ray = False,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    rows_per_shard: Annotated[
        int | None, typer.Option(min=1, max=4096, help="With --ray: rows answered by a worker at a time; else 1000.")
    ] = None,
    keep_shards: Annotated[
        bool, typer.Option("--keep-shards", help="With --ray: leave the answers in OUTPUT.parts/shard-*.jsonl.")
    ] = False,
    address: Address = None,
) -> None:
    """Answer every row with the tuned model. A broken-off prediction goes on where it stopped.

    Rows are asked as those that the run learnt from, with its prompt, system message and placeholders, unless --prompt,
    --system and the like say otherwise; --prompt "" and --system "" ask without any.
    """
    with reporting_errors():
        said = said_of(row_format, prompt, system, encoding, sheet)
        require_with_ray(
            ray,
            workers=workers,
            gpus_per_worker=gpus_per_worker,
            rows_per_shard=rows_per_shard,
            keep_shards=keep_shards,
            address=address,
        )
        if ray:
            from ..cluster.predict import ROWS_PER_SHARD, predict_on_ray

            done = predict_on_ray(
                run,
                rows,
                output,
                workers=workers,
                gpus_per_worker=gpus_per_worker,
                rows_per_shard=rows_per_shard or ROWS_PER_SHARD,
                keep_shards=keep_shards,
                address=address,
                threshold=threshold,
                base_model=base_model,
                said=said,
                console=err,
            )
        else:
            from ..apply import predict_file

            done = predict_file(run, rows, output, threshold=threshold, base_model=base_model, said=said, console=err)
    share = f"{done.valid / done.rows:.1%}"
    where = f"{output}.parts/shard-*.jsonl" if keep_shards else str(output)
    out.print(f"{done.rows} answers in {where}, {done.valid} of them ({share}) in the labelled form.")
    if done.for_people is not None:
        out.print(f"{done.for_people} of them are for a person: their confidence is below {threshold}.")
        if not done.calibrated:
            err.print("note: the confidences are not calibrated: evaluate the run on its dev rows first.")


@app.command()
def prompt(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the answers, one JSON line per row.")],
    overrides: Overrides = None,
    rows: Annotated[
        str | None, typer.Option(help="A file of rows, labelled or not; by default the recipe's dev rows.")
    ] = None,
    shots: Annotated[int, typer.Option(min=0, max=32, help="How many labelled rows are shown as examples.")] = 4,
    nearest: Annotated[
        bool, typer.Option("--nearest", help="Show each row those nearest to it, not the same to all.")
    ] = False,
) -> None:
    """Ask the recipe's model as it is, without training: the form described, a few labelled rows shown.

    Tasks, forms and examples are taken from the recipe's train rows; answers are held to the form.
    """
    from ..recipe import load_recipe

    with reporting_errors():
        loaded = load_recipe(recipe, overrides or ())
        from ..prompting import prompt_model

        side = prompt_model(loaded, out=output, shots=shots, nearest=nearest, rows=rows, console=err)
    count = len(side.lines)
    share = f"{side.num_valid / count:.1%}"
    out.print(f"{count} answers in {output}, {side.num_valid} of them ({share}) in the labelled form.")


@app.command()
def models(
    path: Annotated[
        str | None, typer.Argument(help="A model's folder or id: only its own row, with what it was recognised by.")
    ] = None,
) -> None:
    """List the model families: how a checkpoint is recognised, which layers LoRA updates, what ends an answer."""
    from ..models.families import FAMILIES, OTHER, family_of
    from ..models.sources import model_folder

    with reporting_errors():
        shown = [*FAMILIES, OTHER] if path is None else [family_of(model_folder(path))]
    table = Table("family", "", "")
    for family in shown:
        for row, (what, value) in enumerate(family.told()):
            table.add_row("" if row else family.name, what, value)
        table.add_section()
    out.print(table, soft_wrap=False)


@app.command()
def export(
    run: RunArgument,
    folder: Annotated[Path, typer.Argument(help="Where to write the model; must be empty if it is there.")],
    layout: Annotated[
        Literal["native", "original"],
        typer.Option(help="For transformers, or as ChatGLM and GLM-4 were released, for tools made for those."),
    ] = "native",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the weights; by default that which the run computed in."),
    ] = None,
    onto: Annotated[
        Literal["unpacked", "float"],
        typer.Option(
            help="Where the base model was packed (model.quantize): merge onto what the packed weights stand for, as "
            "the run computed, or onto the base model's own weights, read again."
        ),
    ] = "unpacked",
    base_model: BaseModel = None,
) -> None:
    """Write the tuned model as a whole model, its adapter merged in, and prove that it computes the same.

    A P-Tuning prefix cannot be merged: with --layout original it is written as the originals' own trainer does.
    """
    with reporting_errors():
        from ..export import export_run

        done = export_run(run, folder, layout=layout, dtype=dtype, base_model=base_model, onto=onto, console=err)
    what = f"the merged model in {done.dtype}" if done.merged else "the prefix, for use with its base model"
    out.print(f"{done.folder}: {what}, {done.layout} layout.")
    explained = f"rounding explains {done.tolerance:g}"
    if done.moved is not None:
        explained = (
            f"the base model's own by {done.moved:.2g}, having float weights now; {done.tolerance:.2g} is allowed"
        )
    out.print(
        f"Compared with the run on {done.num_tokens} tokens: the logits differ by {done.difference:.2g} of their "
        f"standard deviation ({explained}), and at {done.same_choice:.1%} of them the same "
        f"token is the likeliest."
    )
    if not done.same_prompts:
        err.print("note: the written chat template asks a question in other tokens than the run was asked in.")
