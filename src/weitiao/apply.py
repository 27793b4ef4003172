"""A finished run put to use: scored against its base model, or answering new rows. Reads the contract, nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .contract import Contract
from .data.reading import Said, read_like
from .data.records import Record, digest_records
from .dataset import load_dataset
from .environment import environment
from .errors import DataError, FormError, Problem
from .evaluate.predict import Answerer, OnReply, as_prediction, predict_rows
from .evaluate.report import Report, write_report
from .evaluate.score import Side, TaskScore, score_side
from .generate.engine import Sampling
from .models.families import OpenModel, open_model
from .recipe import load_recipe
from .render.fitting import shorten_record
from .runs import RunFolder
from .tasks.base import Task, assign_task


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of one run on one set, and the files that hold them."""

    base: tuple[TaskScore, ...]
    """Empty when the base model was not scored."""
    tuned: tuple[TaskScore, ...]
    files: tuple[Path, ...]


def open_run(path: str | Path, *, base_model: str | None = None) -> tuple[RunFolder, Contract, OpenModel]:
    """The run at `path` ready to use: its folder, its contract, its model with the adapter on.

    Args:
        path: the run folder.
        base_model: where the base model lies now, if it was moved; the contract's fingerprint must still match.

    Raises:
        RunError, ContractError, ModelError: nothing finished is there, or the base model is another one.
    """
    run = RunFolder.open(path)
    contract = Contract.read(run.contract)
    source = base_model or contract.base
    opened = open_model(source, adapter=run.adapter, dtype=contract.dtype)
    contract.require_base(opened.fingerprint, path=source)
    contract.require_format(template=opened.renderer.template, stop_ids=opened.renderer.stop_ids)
    return run, contract, opened


def evaluate_run(
    path: str | Path,
    *,
    data: str | Path | None = None,
    base: bool | None = None,
    base_model: str | None = None,
    said: Said | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Score the run at `path` on its dev rows, or on the rows of the file `data`, and write the reports.

    Args:
        path: the run folder.
        data: another file of labelled rows.
        base: score the base model as well; by default as the recipe says.
        base_model: where the base model lies now, if it was moved.
        said: how the rows of `data` are to be read and asked, where otherwise than those the run learnt from.
        console: where progress is shown.
    """
    if data is None and said not in (None, Said()):
        raise DataError(
            "--format, --prompt, --system, --encoding and --sheet say how the file of --data is read. Give one."
        )
    console = console or Console(stderr=True, markup=False, emoji=False, highlight=False)
    run, contract, opened = open_run(path, base_model=base_model)
    recipe = load_recipe(run.recipe)
    tasks = [Task.from_json(task) for task in contract.tasks]
    if data is None:
        dataset = load_dataset(recipe)
        if dataset.fingerprint != contract.data_fingerprint:
            raise DataError(
                f"The rows of {run.path} have changed since it was trained, so its dev rows may have been trained on. "
                f"Restore them, or score another file with --data FILE."
            )
        records, name = list(dataset.dev), "dev"
    else:
        records, name = read_like(contract.reading, data, said=said), Path(data).stem
    if not records:
        raise DataError(f"There are no dev rows to score: {run.path} held none apart. Give some with --data FILE.")
    assigned = _assign(records, tasks)
    _require_gold(records, assigned)
    asked = _shorten(records, assigned, contract, opened, console)
    folder = run.evaluations / name
    sides: dict[str, Side] = {}
    started = time.monotonic()
    for side in ("base", "tuned") if (recipe.evaluate.base if base is None else base) else ("tuned",):
        key = _key(contract, records, side)
        answerer = _answerer(contract, opened)
        which = opened.model.disable_adapter() if side == "base" else contextlib.nullcontext()  # type: ignore[operator]
        with which, _counting(console, side) as on_reply:
            lines = predict_rows(
                answerer, asked, assigned, folder / f"predictions-{side}.jsonl", key=key, on_reply=on_reply
            )
        predictions = [as_prediction(*row) for row in zip(asked, assigned, lines, strict=True)]
        sides[side] = score_side(predictions, tasks, resamples=recipe.evaluate.resamples)
    report = Report(
        title=f"{recipe.name} on {name}",
        created=time.strftime("%Y-%m-%d %H:%M"),
        run=recipe.name,
        models={"base": contract.base, "tuned": str(run.adapter)},
        data_file=str(data or "the run's dev rows"),
        data_fingerprint=digest_records(records),
        facts=_facts(contract, time.monotonic() - started),
        tasks=tuple(tasks),
        sides=sides,
    )
    files = write_report(report, folder)
    return Evaluation(
        base=sides["base"].scores if "base" in sides else (), tuned=sides["tuned"].scores, files=tuple(files)
    )


def predict_file(
    path: str | Path,
    rows: str | Path,
    out: str | Path,
    *,
    base_model: str | None = None,
    said: Said | None = None,
    console: Console | None = None,
) -> tuple[int, int]:
    """Answer every row of the file `rows` with the run at `path`, writing JSON lines to `out`.

    Rows need no answer of their own. They are read and asked as those the run learnt from, or as `said`.
    Returns (rows, answers in the labelled form).
    """
    console = console or Console(stderr=True, markup=False, emoji=False, highlight=False)
    kept = Contract.read(RunFolder.open(path).contract).reading
    records = read_like(kept, rows, said=said, require_target=False)  # bad rows show before the model takes its seconds
    _, contract, opened = open_run(path, base_model=base_model)
    tasks = [Task.from_json(task) for task in contract.tasks]
    assigned = _assign(records, tasks)
    with _counting(console, "predicting") as on_reply:
        lines = predict_rows(
            _answerer(contract, opened),
            _shorten(records, assigned, contract, opened, console),
            assigned,
            Path(out),
            key=_key(contract, records, "predict"),
            on_reply=on_reply,
        )
    return len(lines), sum(line["valid"] for line in lines)


def _answerer(contract: Contract, opened: OpenModel, *, constrain: bool | None = None) -> Answerer:
    """The opened model as the contract says, held to the forms of answers or not."""
    return Answerer(
        model=opened.model,
        renderer=opened.renderer,
        sampling=Sampling(**contract.decoding),
        answer_limits=contract.answer_limits,
        batch_rows=contract.batch_rows,
        constrain=contract.constrain if constrain is None else constrain,
    )


def _shorten(
    records: Sequence[Record], tasks: Sequence[Task], contract: Contract, opened: OpenModel, console: Console
) -> list[Record]:
    """`records` with the texts of overlong ones shortened, where the run was trained so; what was done is said."""
    if not contract.shorten_input:
        return list(records)
    fitted, shortened, problems = [], [], []
    for record, task in zip(records, tasks, strict=True):
        room = contract.max_length - contract.answer_limits[task.name]
        if len(opened.renderer.render_prompt(record.messages, record.tools)) > room:
            shorter = shorten_record(record, opened.renderer, num_answer=0, max_length=room)
            if shorter is None:
                message = f"The prompt does not fit into {room} tokens, however much of its text is left out."
                problems.append(Problem(source=record.source, field="text", message=message, fix="Shorten the row."))
                continue
            shortened.append(record.source)
            record = shorter
        fitted.append(record)
    if problems:
        raise DataError(f"{len(problems)} of {len(records)} rows are too long for the run.", problems)
    if shortened:
        console.print(f"note: {len(shortened)} texts shortened: {', '.join(shortened[:10])}", soft_wrap=True)
    return fitted


def _assign(records: Sequence[Record], tasks: Sequence[Task]) -> list[Task]:
    """The task of every record. Raises DataError naming every record that fits none."""
    found = [assign_task(record, tasks) for record in records]
    problems = [task for task in found if isinstance(task, Problem)]
    if problems:
        raise DataError(f"{len(problems)} of {len(records)} rows fit none of the run's tasks.", problems)
    return [task for task in found if isinstance(task, Task)]


def _require_gold(records: Sequence[Record], assigned: Sequence[Task]) -> None:
    """Raise DataError naming every record whose labelled answer does not have its task's form."""
    problems = []
    for record, task in zip(records, assigned, strict=True):
        try:
            task.gold(record)
        except FormError as error:
            message = f"The labelled answer does not have the form the run was trained on ({task.name}): {error}"
            fix = "Mend the label, or leave the row out."
            problems.append(Problem(source=record.source, field="target", message=message, fix=fix))
    if problems:
        raise DataError(f"{len(problems)} of {len(records)} rows cannot be scored.", problems)


def _key(contract: Contract, records: Sequence[Record], side: str) -> str:
    parts = [side, contract.base_fingerprint, contract.adapter_fingerprint, digest_records(records)]
    return hashlib.sha256(json.dumps([*parts, contract.decoding, contract.answer_limits]).encode()).hexdigest()


@contextlib.contextmanager
def _counting(console: Console, name: str) -> Iterator[OnReply]:
    """A progress bar over replies, moved by the function it yields."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _facts(contract: Contract, seconds: float) -> dict[str, str]:
    here = environment()
    return {
        "machine": f"{here.processor}, {here.cores} cores, {here.gpu}",
        "time": f"{seconds:.0f} s for all answers",
        "dtype": contract.dtype,
        **here.versions,
    }
