"""Answers to very many rows by the workers of a Ray cluster, each row exactly once. Memory does not grow with the rows.

`apply.predict_file` does the same in one process: the same rows are refused, the same lines are written.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as BarTask
from rich.text import Text

from ..apply import Predicted, tell_hidden
from ..contract import Contract
from ..data.reading import LikeReader, Said
from ..errors import DataError, RunError
from ..evaluate.calibration import CALIBRATION_FILE
from ..runs import RunFolder
from ..tasks.base import Task
from .answering import Assignment, answering_key
from .pool import answer_shards
from .session import joined_cluster, machines_of, require_ray, share_machines
from .shards import RAY_SAID, LaidAside, Manifest, Parts, Shard, find_damage, join, lay_aside

ROWS_PER_SHARD = 1000

_NOTES_SHOWN = 20


def predict_on_ray(
    path: str | Path,
    rows: str | Path,
    out: str | Path,
    *,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
    keep_shards: bool = False,
    address: str | None = None,
    threshold: float | None = None,
    base_model: str | None = None,
    said: Said | None = None,
    console: Console | None = None,
) -> Predicted:
    """Answer every row of `rows` with the run at `path` by workers on a Ray cluster, writing JSON lines to `out`.

    Rows are read and checked here, once, then laid in shards under ``OUT.parts``, which the workers read and write. The
    same command goes on with the shards that are missing, whatever ended it.

    Args:
        path: the run folder, on storage that all machines see.
        rows: a file of rows, which this machine alone needs to see.
        out: the file of answers, on storage that all machines see.
        workers: how many; None: one for each GPU, or for each machine without any.
        gpus_per_worker: None: one where there are GPUs.
        rows_per_shard: how many rows are answered together and are lost when a worker dies; `MAX_SHARD_ROWS` at most.
        keep_shards: leave the answers in ``OUT.parts/shard-*.jsonl`` instead of joining them to `out`.
        address: of the cluster; None: see `joined_cluster`.
        threshold, base_model, said, console: as for `predict_file`.

    Raises:
        DataError, RunError, ContractError, ModelError: the run or the rows cannot be used, or workers die.
    """
    require_ray()
    console = console or Console(stderr=True, markup=False, emoji=False, highlight=False)
    run, out = Path(path).resolve(), Path(out).resolve()
    key = answering_key(run, threshold=threshold)
    contract = Contract.read(RunFolder.open(run).contract)
    if base_model is not None and Path(base_model).is_dir():
        base_model = str(Path(base_model).resolve())
    reader = LikeReader(contract.reading, rows, said=said, require_target=False)
    parts = Parts(out.with_name(out.name + ".parts"))
    with parts.locked():
        tasks = [Task.from_json(task) for task in contract.tasks]
        try:
            laid = lay_aside(reader, parts, tasks, name=str(rows), key=key, rows_per_shard=rows_per_shard)
        except DataError:
            parts.remove_unused()
            raise
        tell_hidden(laid.keys, out, console, threshold=threshold)
        if parts.remove_beyond(len(laid.shards)):
            console.print("note: shards of an earlier, longer file were removed.", soft_wrap=True)
        assignment = Assignment(
            run=run, parts=parts, reader=reader, key=key, threshold=threshold, base_model=base_model
        )
        _answer_missing(laid, assignment, console, workers=workers, gpus_per_worker=gpus_per_worker, address=address)
        predicted = _told(laid.shards, parts, calibrated=(run / CALIBRATION_FILE).exists(), threshold=threshold)
        if keep_shards:
            parts.remove_rows()
        else:
            join(parts, laid.shards, out)
            parts.remove()
    return predicted


def _answer_missing(
    laid: LaidAside,
    assignment: Assignment,
    console: Console,
    *,
    workers: int | None,
    gpus_per_worker: float | None,
    address: str | None,
) -> None:
    """Have all shards answered that are not, and see that then each row has one answer.

    Raises as `answer_shards`; RunError also when rows lack an answer in the end.
    """
    parts, by_number = assignment.parts, {shard.number: shard for shard in laid.shards}
    damage = find_damage(parts, laid.shards)
    if len(damage) < len(laid.shards):
        there = sum(shard.rows for shard in laid.shards if shard.number not in damage)
        console.print(f"{there} of {laid.rows} rows are answered already; going on with the others.", soft_wrap=True)
    if not damage:
        return
    with (
        joined_cluster(address, workers=workers, said=parts.folder / RAY_SAID) as ray,
        _Progress(laid, damage.keys(), console) as progress,
    ):
        share = share_machines(machines_of(ray), workers=workers, gpus_per_worker=gpus_per_worker)
        todo = [by_number[number] for number in damage]
        for number in damage:
            parts.manifest_file(number).unlink(missing_ok=True)  # else a damaged one would pass as finished
        try:
            answer_shards(ray, todo, assignment, share, on_done=progress.advance, say=progress.say)
        except BaseException:
            progress.say(f"{progress.done} of {laid.rows} rows are answered and kept; the same command goes on.")
            raise
    damage = find_damage(parts, todo)
    if damage:
        number, wrong = next(iter(damage.items()))
        raise RunError(
            f"{len(damage)} of {len(laid.shards)} shards are not as they should be; {parts.answers_file(number)} "
            f"({by_number[number]}): {wrong}. The same command does them again."
        )


def _told(shards: Sequence[Shard], parts: Parts, *, calibrated: bool, threshold: float | None) -> Predicted:
    """What became of the rows, as the manifests say."""
    manifests = [manifest for shard in shards if (manifest := parts.finished(shard)) is not None]
    assert len(manifests) == len(shards)
    return Predicted(
        rows=sum(manifest.rows for manifest in manifests),
        valid=sum(manifest.valid for manifest in manifests),
        calibrated=calibrated,
        for_people=None if threshold is None else sum(manifest.for_people for manifest in manifests),
    )


class _RowsPerSecond(ProgressColumn):
    """How many rows are answered in a second."""

    def render(self, task: BarTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g} rows/s")


class _Progress:
    """A bar over rows with their speed and the time that is left, and lines above it."""

    def __init__(self, laid: LaidAside, missing: Container[int], console: Console) -> None:
        self._console, self._notes = console, 0
        self.done = sum(shard.rows for shard in laid.shards if shard.number not in missing)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(
            *columns,
            _RowsPerSecond(),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=600,
            redirect_stdout=False,  # which would show what joined_cluster put aside
        )
        self._task = self._bar.add_task("predicting", total=laid.rows, completed=self.done)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._notes > _NOTES_SHOWN:
            self._console.print(f"… and {self._notes - _NOTES_SHOWN} more notes, in the shards' own .json files.")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(text, soft_wrap=True)

    def advance(self, shard: Shard, manifest: Manifest) -> None:
        """A shard is answered."""
        self.done += shard.rows
        self._bar.update(self._task, completed=self.done)
        for note in manifest.notes:
            self._notes += 1
            if self._notes <= _NOTES_SHOWN:
                self.say(f"{shard}: {note}")
