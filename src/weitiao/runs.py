"""The run directory: the names of its files, writing them so that a crash never leaves half a file.

runs/NAME/
├── recipe.yaml         the resolved recipe
├── environment.json    machine and versions
├── data.json           rows, tasks and fingerprints of the data
├── label_counts.json   how often each label stands in the train rows
├── metric_files/       copies of the user's own metrics, never run from here
├── neighbours.jsonl    the train rows shown as examples, where the recipe says so
├── metrics.jsonl       one line per log, one per scoring
├── samples.jsonl       some dev rows with their answers, one line per scoring
├── state.json          which process trains the run, how far it is, how it ended
├── monitors.json       by what monitors know the run again
├── curve.png           loss and scores
├── output.txt          what a training said after its terminal was closed
├── checkpoints/        step-000123/ …, everything needed to go on
├── best/               the adapter with the best dev score so far
├── adapter/            the tuned adapter, its tokenizer
├── contract.json       what the tuned model promises
├── calibration.json    from confidence to how often right, once evaluated
└── evaluations/SET/    predictions and reports
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import RunError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What a run's model answered to one dev row while it was trained."""

    task: str
    source: str
    """Where the row came from, such as ``dev.jsonl:37``."""
    question: str
    """The input as the model was asked it."""
    gold: str
    """The labelled answer as the model was trained to write it."""
    answer: str


class RunFolder:
    """Paths and careful writing inside one run directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.environment = self.path / "environment.json"
        self.data = self.path / "data.json"
        self.metrics = self.path / "metrics.jsonl"
        self.curve = self.path / "curve.png"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best"
        self.adapter = self.path / "adapter"
        self.contract = self.path / "contract.json"
        self.evaluations = self.path / "evaluations"
        self.label_counts = self.path / "label_counts.json"
        self.neighbours = self.path / "neighbours.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.state = self.path / "state.json"
        self.monitors = self.path / "monitors.json"

    @classmethod
    def create(cls, path: str | Path, *, resume: bool) -> RunFolder:
        """The run folder at `path`, made when it is new.

        Raises:
            RunError: it holds a run already and `resume` is False, or it cannot be written.
        """
        run = cls(path)
        if run.recipe.exists() and not resume:
            raise RunError(
                f"{run.path} already holds a run. Continue it with --resume, give another name with name=OTHER, "
                f"or delete the folder."
            )
        if resume and not run.recipe.exists():
            raise RunError(f"There is no run to resume in {run.path}. Start it without --resume.")
        with writing(run.path):
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            clear_leftovers(run.path)
            clear_leftovers(run.checkpoints)
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The finished run at `path`. Raises RunError when there is none."""
        run = cls(path)
        if not run.path.is_dir():
            raise RunError(f"There is no run folder {run.path}. Runs are made by: weitiao train RECIPE.yaml")
        if not run.contract.exists() or not run.adapter.is_dir():
            raise RunError(
                f"{run.path} holds no finished run (contract.json or adapter/ is missing). "
                f"Finish it with: weitiao train RECIPE.yaml --resume"
            )
        return run

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        _append_line(self.metrics, line)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line cut by a crash is left out."""
        return _read_lines(self.metrics)

    def append_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Add to samples.jsonl what the model answers at `step`."""
        _append_line(self.samples, {"step": step, "samples": [asdict(sample) for sample in samples]})

    def read_samples(self) -> list[tuple[int, tuple[Sample, ...]]]:
        """What samples.jsonl holds, by step; a last line cut by a crash is left out."""
        lines = _read_lines(self.samples)
        return [(line["step"], tuple(Sample(**sample) for sample in line["samples"])) for line in lines]

    def rewind_metrics(self, step: int, *, scored: bool = True) -> None:
        """Drop the metrics and samples after `step`: a resumed run measures them again.

        Those of the scoring at `step` itself are dropped too where it is still to be done, `scored` being False.
        """
        for file in (self.metrics, self.samples):
            if file == self.metrics or file.exists():
                lines = _read_lines(file)
                kept = [
                    one for one in lines if one["step"] < step or (one["step"] == step and (scored or _is_log(one)))
                ]
                write_text(file, "".join(map(_as_line, kept)))


def _is_log(line: Mapping[str, Any]) -> bool:
    return line.get("kind") == "train"


def _as_line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _append_line(path: Path, value: Mapping[str, Any]) -> None:
    # a lone surrogate in a row's text cannot be UTF-8; as its escape it is JSON and reads back equal
    with writing(path), path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(_as_line(value))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().split(b"\n"):  # bytes: a crash may cut a character in two
        with contextlib.suppress(ValueError):  # only the last line can be cut, and resuming writes the others anew
            lines.append(json.loads(line))
    return lines


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write `path` into a RunError with the fix."""
    try:
        yield
    except PermissionError as error:
        raise RunError(
            f"No permission to write {error.filename or path}. Choose another place or its rights."
        ) from None
    except OSError as error:
        if error.errno == 28:  # ENOSPC
            raise RunError(
                f"The disk is full: {path} could not be written. What was saved before is whole. "
                f"Free some space, then continue with --resume."
            ) from None
        raise RunError(f"{path} could not be written: {error}.") from None


def write_text(path: Path, text: str) -> None:
    """Write `path` whole or not at all: temporary name, fsync, rename."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, whole or not at all."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_bytes(path: Path, data: bytes) -> None:
    """Write `path` whole or not at all: temporary name, fsync, rename."""
    with replacing(path) as stream:
        stream.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A stream whose content is in `path`, whole, when the block is left without an exception; else nothing changes."""
    with writing(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=path.name)
        try:
            with os.fdopen(handle, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `path` whole or not at all: `fill` writes into a temporary one, which is then renamed.

    A folder of that name is replaced: for the length of one rename neither stands under the name, and the old one
    is kept as ``.old-NAME`` until the new one is in place.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=".tmp-"))
        old = path.parent / f".old-{path.name}"
        try:
            fill(temporary)
            for file in temporary.rglob("*"):
                sync(file)
            sync(temporary)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            temporary.rename(path)
            path.chmod(0o755)
            sync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if old.exists() and not path.exists():
                old.rename(path)
            raise


def clear_leftovers(folder: Path) -> None:
    """Remove what a crash left half-written in `folder`, and put back a folder whose replacement never came."""
    for old in folder.glob(".old-*"):
        whole = folder / old.name.removeprefix(".old-")
        if whole.exists():
            shutil.rmtree(old)
        else:
            old.rename(whole)
    for leftover in folder.glob(".tmp-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def sync(path: Path) -> None:
    """Flush `path`, a file or a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
