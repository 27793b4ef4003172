"""A finished run put to use: opened as its contract says, answering new rows. Reads the contract, nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .contract import Contract
from .data.neighbours import load_index
from .data.reading import Said, read_like
from .data.records import Record, digest_records
from .dataset import assign_tasks
from .errors import DataError, Problem, RunError
from .evaluate.abstain import route
from .evaluate.calibration import CALIBRATION_FILE, RunCalibration
from .evaluate.predict import OWN_KEYS, Answerer, OnReply, predict_rows
from .generate.engine import Sampling
from .models.adapters import adapter_fingerprint, has_adapter, without_adapter
from .models.opening import OpenModel, open_model
from .render.fitting import shorten_record
from .render.shots import add_neighbours
from .runs import RunFolder
from .tasks.base import Task


def open_run(path: str | Path, *, base_model: str | None = None) -> tuple[RunFolder, Contract, OpenModel]:
    """The run at `path` ready to use: its folder, its contract, its model with the adapter on.

    Args:
        path: the run folder.
        base_model: where the base model lies now, if it was moved; the contract's fingerprint must still match.

    Raises:
        RunError, ContractError, ModelError: nothing finished is there, or the base model or the adapter is another one.
    """
    run = RunFolder.open(path)
    contract = Contract.read(run.contract)
    contract.require_adapter(adapter_fingerprint(run.adapter), folder=run.adapter)
    source = base_model or contract.base
    opened = open_model(source, adapter=run.adapter, dtype=contract.dtype, quantize=contract.quantize, must_speak=True)
    contract.require_base(opened.fingerprint, path=source)
    contract.require_format(template=opened.renderer.template, stop_ids=opened.renderer.stop_ids)
    return run, contract, opened


@dataclass(frozen=True, kw_only=True)
class RunInUse:
    """An opened run, and how rows are asked of it."""

    folder: RunFolder
    contract: Contract
    opened: OpenModel

    @classmethod
    def of(cls, opened_run: tuple[RunFolder, Contract, OpenModel]) -> RunInUse:
        """What `open_run` opened."""
        folder, contract, opened = opened_run
        return cls(folder=folder, contract=contract, opened=opened)

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks the run was trained on."""
        return tuple(Task.from_json(task) for task in self.contract.tasks)

    def assign(self, records: Sequence[Record]) -> list[Task]:
        """The task of every record. Raises DataError naming every record that fits none."""
        return assign_tasks(records, self.tasks)

    def answerer(self, *, constrain: bool | None = None) -> Answerer:
        """The model as the contract says, or held to the forms of answers or not as `constrain` says."""
        return Answerer(
            model=self.opened.model,
            renderer=self.opened.renderer,
            sampling=Sampling(**self.contract.decoding),
            answer_limits=self.contract.answer_limits,
            batch_rows=self.contract.batch_rows,
            constrain=self.contract.constrain if constrain is None else constrain,
        )

    def untuned(self) -> AbstractContextManager[None]:
        """Within this, the model is the base model: its adapter is switched off."""
        assert has_adapter(self.opened.model), "a run's model has an adapter"
        return without_adapter(self.opened.model)

    def prepare(self, records: Sequence[Record], tasks: Sequence[Task], console: Console) -> list[Record]:
        """`records` as the run asks them: behind their nearest train rows, overlong texts shortened, if it learnt so.

        Raises:
            DataError: rows are too long for the run; names them all.
            RunError: the train rows that were kept with the run are not there.
        """
        asked = self._shorten(records, tasks, console)
        if not self.contract.retrieve:
            return asked
        try:
            index = load_index(self.folder.neighbours.read_bytes(), where=str(self.folder.neighbours))
        except FileNotFoundError:
            raise RunError(
                f"{self.folder.neighbours} is missing: the train rows that this run shows as examples. Copy it from "
                f"where the run was trained."
            ) from None
        room = {name: self.contract.max_length - limit for name, limit in self.contract.answer_limits.items()}
        shown = add_neighbours(
            asked,
            tasks,
            index,
            self.contract.retrieve,
            exclude_self=False,
            renderer=self.opened.renderer,
            room=room,
        )
        for note in shown.notes():
            console.print(f"note: {note}", soft_wrap=True)
        return shown.records

    def _shorten(self, records: Sequence[Record], tasks: Sequence[Task], console: Console) -> list[Record]:
        """`records`, the texts of overlong ones shortened, where the run was trained so; what was done is said."""
        if not self.contract.shorten_input:
            return list(records)
        renderer = self.opened.renderer
        fitted, shortened, problems = [], [], []
        for record, task in zip(records, tasks, strict=True):
            room = self.contract.max_length - self.contract.answer_limits[task.name]
            if len(renderer.render_prompt(record.messages, record.tools)) > room:
                shorter = shorten_record(record, renderer, num_answer=0, max_length=room)
                if shorter is None:
                    message = f"The prompt does not fit into {room} tokens, however much of its text is left out."
                    problems.append(Problem(source=record.source, field="text", message=message, fix="Shorten it."))
                    continue
                shortened.append(record.source)
                record = shorter
            fitted.append(record)
        if problems:
            raise DataError(f"{len(problems)} of {len(records)} rows are too long for the run.", problems)
        if shortened:
            console.print(f"note: {len(shortened)} texts shortened: {', '.join(shortened[:10])}", soft_wrap=True)
        return fitted

    def key(self, records: Sequence[Record], side: str) -> str:
        """Identifies the answers of one side to `records`: model, rows and decoding."""
        contract = self.contract
        parts = [side, contract.base_fingerprint, contract.adapter_fingerprint, digest_records(records)]
        decoding = [contract.decoding, contract.answer_limits, contract.constrain, contract.retrieve]
        return hashlib.sha256(json.dumps([*parts, *decoding]).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """What became of a file of rows."""

    rows: int
    valid: int
    """Answers in the labelled form."""
    calibrated: bool
    """Whether their confidence says how often such answers are right."""
    for_people: int | None
    """Answers that go to a person; None when none were to."""


def predict_file(
    path: str | Path,
    rows: str | Path,
    out: str | Path,
    *,
    threshold: float | None = None,
    base_model: str | None = None,
    said: Said | None = None,
    console: Console | None = None,
) -> Predicted:
    """Answer every row of the file `rows` with the run at `path`, writing JSON lines to `out`.

    Rows need no answer of their own. They are read and asked as those the run learnt from, or as `said`. Where the run
    was evaluated on its dev rows, confidences are calibrated by them.

    Args:
        path: the run folder.
        rows: a file of rows.
        out: the file of answers.
        threshold: answers of a lower confidence get ``"route": "person"``, the others ``"model"``; None: no such key.
        base_model: where the base model lies now, if it was moved.
        said: how the rows are to be read and asked, where otherwise than those the run learnt from.
        console: where progress is shown.

    Raises:
        DataError, RunError, ContractError, ModelError: the run or the rows cannot be used.
    """
    console = console or Console(stderr=True, markup=False, emoji=False, highlight=False)
    kept = Contract.read(RunFolder.open(path).contract).reading
    records = read_like(kept, rows, said=said, require_target=False)  # bad rows show before the model takes its seconds
    run = RunInUse.of(open_run(path, base_model=base_model))
    tasks = run.assign(records)
    calibration = read_calibration(run.folder)

    finish = partial(finish_line, calibration=calibration, threshold=threshold)
    tell_hidden({key for record in records for key in record.raw}, out, console, threshold=threshold)
    asked = run.prepare(records, tasks, console)
    with counting(console, "predicting") as on_reply:
        key = run.key(asked, "predict")
        lines = predict_rows(run.answerer(), asked, tasks, Path(out), key=key, finish=finish, on_reply=on_reply)
    return Predicted(
        rows=len(lines),
        valid=sum(line["valid"] for line in lines),
        calibrated=calibration is not None,
        for_people=None if threshold is None else sum(line["route"] == "person" for line in lines),
    )


def finish_line(
    line: Mapping[str, Any], *, calibration: RunCalibration | None, threshold: float | None
) -> dict[str, Any]:
    """The line of a file of answers, its confidences calibrated, saying who takes it where a threshold was given."""
    told = calibrated(line, calibration)
    if threshold is None:
        return told
    who = route(confidence=told["confidence"], valid=told["valid"], threshold=threshold)
    return {**told, "route": who}


def tell_hidden(keys: AbstractSet[str], out: str | Path, console: Console, *, threshold: float | None) -> None:
    """Name those of the rows' `keys` whose values are not seen in `out`, where answers have such keys of their own."""
    written = OWN_KEYS if threshold is not None else OWN_KEYS - {"route"}
    if hidden := sorted(keys & written):
        console.print(
            f"note: rows have {', '.join(hidden)} of their own; in {out} these keys hold what is said of the answers.",
            soft_wrap=True,
        )


def read_calibration(folder: RunFolder) -> RunCalibration | None:
    """What an evaluation on the dev rows left in the run; None when there was none."""
    path = folder.path / CALIBRATION_FILE
    return RunCalibration.read(path) if path.exists() else None


def calibrated(line: Mapping[str, Any], calibration: RunCalibration | None) -> dict[str, Any]:
    """The line of a file of predictions with its confidences calibrated, as far as its task has a calibration."""
    if calibration is None or line["confidence"] is None:
        return dict(line)
    whole, single = calibration.answers.get(line["task"]), calibration.fields.get(line["task"])
    values = line["value_confidence"]
    if single is not None:
        values = [{**one, "confidence": single.apply(one["path"], one["confidence"])} for one in values]
    sure = line["confidence"] if whole is None else whole.apply(line["confidence"])
    return {**line, "confidence": sure, "value_confidence": values}


@contextlib.contextmanager
def counting(console: Console, name: str) -> Iterator[OnReply]:
    """A progress bar over replies, moved by the function it yields."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
