"""Verbs about rows and recipes: init, check, show, import-chats, check-leaks, migrate, schema.

Torch is loaded by `check --plan` alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from ..data.formats import FORMATS
from ..errors import DataError
from .base import (
    FileEncoding,
    Overrides,
    Prompt,
    RecipeArgument,
    RowFormatName,
    Sheet,
    System,
    app,
    err,
    out,
    reporting_errors,
    said_of,
    summary_of,
)


@app.command(
    help="Look at your rows, say what was understood, and write a commented recipe.\n\n"
    "Rows are told by their keys, file by file. Known formats, each shown in docs/formats.md: "
    f"{', '.join(one.name for one in FORMATS)}."
)
def init(
    rows: Annotated[list[str], typer.Argument(help="Files of labelled rows, folders of them, or ids of data sets.")],
    model: Annotated[
        str, typer.Option(help="A folder, a Hugging Face id, modelscope:OWNER/NAME, or starter (Gemma 3 270M).")
    ] = "starter",
    dev: Annotated[
        list[str] | None, typer.Option(help="A file of rows to score on; without it a tenth of the rows is set apart.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the recipe.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a recipe that is there.")] = False,
    placeholder: Annotated[
        list[str] | None,
        typer.Option(help="What stands for {{name}}, <NAME> and the like in rows: name=小微; name= keeps it as text."),
    ] = None,
    row_format: RowFormatName = None,
    prompt: Prompt = None,
    system: System = None,
    encoding: FileEncoding = "utf-8",
    sheet: Sheet = None,
) -> None:
    """Look at rows and write a recipe; the help above names the formats that the table knows."""
    from ..init import describe_tasks, init_recipe

    with reporting_errors():
        said = said_of(row_format, prompt, system, encoding, sheet)
        filled = {name: text or None for name, _, text in (word.partition("=") for word in placeholder or ())}
        draft = init_recipe(
            rows, model=model, dev=dev or (), said=said, placeholders=filled, out=output, overwrite=force
        )
    for line in describe_tasks(draft.dataset):
        out.print(f"• {line}")
    for note in draft.dataset.notes:
        out.print(f"note: {note}")
    out.print(f"Wrote {draft.path}. Next: weitiao check {draft.path}, then weitiao train {draft.path}")


@app.command()
def check(
    what: Annotated[
        list[str],
        typer.Argument(help="A recipe, or files or folders of rows; then changes such as data.max_length=1024."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything found as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write everything found as a page to this file.")] = None,
    fix: Annotated[
        Path | None,
        typer.Option(help="Write mended copies to this file, or into this folder, with lists of what was done."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Count the rows longer than this, in tokens, else in characters.")
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Load the recipe's model as well, take three training steps and throw them away: foretells memory, "
            "time and, with train.price_per_hour, cost on this machine.",
        ),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(help="Plan for a machine with so much memory to be had, such as 8GB; implies --plan."),
    ] = None,
) -> None:
    """Name every problem of the data at once, in seconds, without loading a model.

    Bad rows, contradictions, repeats and near-repeats, dev rows that are trained on, answers without their task's form,
    values that are not in the text, wrongly decoded texts, personal data, labels out of balance, lengths.

    Of several files those named dev, valid, test or eval are scored on.
    Ends with code 0 when the data can be trained on, 1 when it has errors, 2 when it cannot be read.
    """
    from ..check.examine import check_subject, find_subject

    with reporting_errors():
        try:
            subject = find_subject(what)
            checkup = check_subject(subject, max_length=max_length)
            if plan or memory is not None:
                from ..check.plan import read_bytes
                from ..probe import add_forecast

                checkup = add_forecast(subject, checkup, room=None if memory is None else read_bytes(memory))
                if checkup.plan is None or checkup.plan.forecast is None:
                    err.print("No steps were taken, for these rows cannot be trained on: mend the errors first.")
        except DataError as error:
            if as_json:
                found = [
                    {"source": p.source, "field": p.field, "message": p.message, "fix": p.fix} for p in error.problems
                ]
                print(json.dumps({"ok": False, "message": summary_of(error), "problems": found}, ensure_ascii=False))
            raise
        if as_json:
            print(json.dumps(checkup.to_json(), ensure_ascii=False))
        else:
            from ..check.terminal import print_checkup

            print_checkup(checkup, out)
        if html is not None:
            from ..check.page import write_page

            write_page(checkup, html)
            err.print(f"Wrote {html}.")
        if fix is not None:
            from ..check.fix import describe_changes, mend_files

            for mended in mend_files(subject, checkup, fix):
                done = f"{mended.rows} rows, {describe_changes(mended)}; listed in {mended.list_of_changes}"
                err.print(f"Wrote {mended.copy}: {done}.", soft_wrap=True)
    if not checkup.ok:
        raise typer.Exit(1)


@app.command()
def show(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="How many examples of each task.")] = 3,
) -> None:
    """Show rendered examples: grey is what the model reads, green is what it learns to write."""
    from ..dataset import load_dataset
    from ..models.opening import open_renderer
    from ..recipe import load_recipe
    from ..render.fitting import render_record
    from ..render.preview import colour_example

    with reporting_errors():
        loaded = load_recipe(recipe, overrides or ())
        dataset = load_dataset(loaded)
        renderer = open_renderer(loaded.model.path)
        if loaded.data.retrieve:
            from ..lookup import look_up

            dataset, _, _ = look_up(loaded, dataset, renderer)
        for task in dataset.tasks:
            rows = [record for record, its in zip(dataset.train, dataset.train_tasks, strict=True) if its is task]
            for record in rows[:number]:
                for example in render_record(
                    record, task, renderer, turns=loaded.data.turns, masks=loaded.data.loss_mask
                ):
                    out.rule(f"{task.name} · {record.source} · {len(example)} tokens, {example.num_supervised} learnt")
                    out.print(colour_example(example, renderer))


@app.command("import-chats")
def import_chats(
    exports: Annotated[
        list[Path], typer.Argument(help="Chats as MemoTrace exports them: folders, or .csv, .txt and .json files.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder for the conversations.")] = Path("chats"),
    assistant: Annotated[str, typer.Option(help="Who is the assistant: me or contact.")] = "me",
    me: Annotated[list[str] | None, typer.Option(help="Your name in the chats; the first is the prompt's.")] = None,
    contact: Annotated[list[str] | None, typer.Option(help="Take this chat only; again for more.")] = None,
    member: Annotated[str | None, typer.Option(help="The member of a group who is the assistant there.")] = None,
    members: Annotated[str | None, typer.Option(help="All names, A,B,C, for AI-TXT exports that need them.")] = None,
    group_names: Annotated[bool, typer.Option(help="Write the others' names before what they say in groups.")] = True,
    gap: Annotated[float, typer.Option(help="Minutes of silence that end a conversation.")] = 60.0,
    join: Annotated[str, typer.Option(help="What stands between merged messages; \\n is a line end.")] = "\\n",
    min_turns: Annotated[int, typer.Option(help="Shorter conversations are dropped.")] = 2,
    max_turns: Annotated[int, typer.Option(help="Longer conversations go on in another one; 0: never.")] = 40,
    system: Annotated[
        str | None, typer.Option(help='The system prompt, with {{name}} and {{remark}}; "" for none.')
    ] = None,
    map_kind: Annotated[
        list[str] | None, typer.Option("--map", help="Write a text for a kind of message, such as sticker=[表情].")
    ] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Drop a kind of message, such as quote.")] = None,
    held_out: Annotated[float, typer.Option(help="Share of the replies held out, the latest of each chat.")] = 0.1,
    redact: Annotated[str, typer.Option(help="Placeholders for personal data: zh, en, or off.")] = "zh",
    encoding: Annotated[str, typer.Option(help="Of the files: utf-8-sig or gb18030.")] = "utf-8-sig",
    utc_offset: Annotated[float, typer.Option(help="Hours by which the exports' clock is ahead of UTC.")] = 8.0,
    samples_assistant: Annotated[str, typer.Option(help="The assistant of JSON exports: me or contact.")] = "me",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result.")] = False,
) -> None:
    """Turn exported chats into conversations for a persona: train.jsonl, dev.jsonl, summary.json, canaries.json.

    Personal data is replaced, the latest part of each chat is held out, and every message is accounted for.
    """
    from ..data.chatlogs import import_chats as import_exports
    from ..data.chatlogs.settings import make_settings

    with reporting_errors():
        settings = make_settings(
            assistant=assistant,
            me=me or (),
            contacts=contact or (),
            member=member,
            members=tuple(name for name in (members or "").split(",") if name),
            group_names=group_names,
            gap_minutes=gap,
            joiner=join.replace("\\n", "\n"),
            min_turns=min_turns,
            max_turns=max_turns,
            system=system,
            mapped=map_kind or (),
            dropped=drop or (),
            held_out=held_out,
            redact=redact,
            encoding=encoding,
            utc_offset=utc_offset,
            samples_assistant=samples_assistant,
        )
        summary = import_exports(exports, output, settings, overwrite=force)
    table = Table("what", "how many", title="Messages and conversations")
    for what, count in summary.to_rows():
        table.add_row(what, count)
    out.print(table, soft_wrap=False)
    for file in summary.files:
        if not file["kind"]:
            out.print(f"skipped: {file['path']}: {file['note']}")
    for note in summary.notes:
        out.print(f"note: {note}", style="yellow")
    out.print(f"Wrote {output}. Next: weitiao init {output}/train.jsonl --dev {output}/dev.jsonl")


@app.command("check-leaks")
def check_leaks(
    predictions: Annotated[Path, typer.Argument(help="Answers as weitiao predict writes them.")],
    canaries: Annotated[Path, typer.Option(help="The canaries.json that import-chats wrote with the rows.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Count which secrets of a chat log a tuned model repeats; no secret is shown.

    Telephone numbers, addresses and the like of the log, however they are spelled. What stands in a row's own prompt is
    read there, not remembered. Ends with code 1 when a secret is remembered.
    """
    from ..data.leaks import report_leaks

    with reporting_errors():
        report = report_leaks(predictions, canaries)
    if as_json:
        print(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        table = Table("kind", "in the log", "remembered", "read in the prompt")
        for kind in report.secrets:
            table.add_row(kind, *map(str, report.count(kind)))
        out.print(table, soft_wrap=False)
        for leak in report.remembered:
            out.print(f"{predictions}: {leak.canary.kind} on line {', '.join(map(str, leak.remembered))}")
        verdict = f"{len(report.remembered)} of {sum(report.secrets.values())} secrets remembered"
        out.print(f"{verdict} in {report.answers} answers.")
    if report.remembered:
        raise typer.Exit(1)


@app.command()
def migrate(
    file: Annotated[
        Path,
        typer.Argument(
            help="lora.yaml and the like of ChatGLM3's or GLM-4's finetune_demo, a file of LLaMA-Factory, a shell "
            "script with a training command, or a Python class ProjectConfig."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the recipe.")] = Path("recipe.yaml"),
    model: Annotated[
        str | None, typer.Option(help="The base model, where the file does not say it, or another.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Train rows, where the file does not say them: files, or the folder of those that it names."),
    ] = None,
    dev: Annotated[list[str] | None, typer.Option(help="A file of rows to score on.")] = None,
    method: Annotated[
        Literal["lora", "ptuning_v2"] | None, typer.Option(help="Tune by this instead of the original's own method.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="How many train rows there are, where they do not lie here.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="On how many devices the original ran, where the file does not say it.")
    ] = None,
    command: Annotated[int | None, typer.Option(min=1, help="Which command of a script with several.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a recipe that is there.")] = False,
) -> None:
    """Turn another program's training settings into a recipe, every setting carried or named with the reason.

    Known are ChatGLM3's and GLM-4's finetune_demo, the trainers of ChatGLM-6B (HarderThenHarder, THUDM's ptuning,
    liucongg) and LLaMA-Factory with its Board. The file is told by what it holds, and nothing in it is run.
    """
    from ..migrate import Wishes, migrate_file

    wishes = Wishes(
        model=model, data=tuple(data or ()), dev=tuple(dev or ()), method=method, rows=rows, devices=devices
    )
    with reporting_errors():
        done = migrate_file(file, wishes=wishes, command=command, out=output, overwrite=force)
    out.print(f"{file} is of {done.told}. What became of its settings:")
    for entry in done.carried:
        became = f"{entry.place}: {done.values[entry.place]}" if entry.place in done.values else entry.place
        out.print(f"  • {entry.setting} → {became}{f' ({entry.words})' if entry.words else ''}")
    for title, entries in (("Needs no key:", done.needless), ("Could not be carried:", done.left)):
        if entries:
            out.print(title)
        for entry in entries:
            out.print(f"  • {entry.setting} — {entry.words}")
    for note in done.notes:
        out.print(f"note: {note}", style="yellow")
    out.print(f"Wrote {done.path}. Next: weitiao check {done.path}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes: every key, its meaning and default; editors complete and check with it."""
    from ..recipe import recipe_schema

    print(json.dumps(recipe_schema(), ensure_ascii=False, indent=2))
