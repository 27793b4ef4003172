"""One worker of a prediction: opens the run once, then answers shard after shard. Knows nothing of Ray."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from ..apply import RunInUse, finish_line, open_run, read_calibration
from ..contract import Contract
from ..data.reading import LikeReader
from ..errors import DataError, Problem, WeitiaoError
from ..evaluate.calibration import CALIBRATION_FILE
from ..evaluate.predict import read_reply
from ..runs import RunFolder
from .shards import Manifest, Parts, Shard

_SEED_STEP = 1_000_003
"""Between the seeds of two shards, so that their rows draw differently."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """What a worker is to do; the same for all of them, and sent to them."""

    run: Path
    parts: Parts
    reader: LikeReader
    key: str
    """What `answering_key` gives where the rows were read."""
    threshold: float | None
    base_model: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a shard: a manifest, or why there is none."""

    manifest: Manifest | None = None
    error: str = ""
    """The sentence of what went wrong with the worker or the run."""
    problems: tuple[Problem, ...] = ()
    """What is wrong with rows of the shard."""


def answering_key(run: Path, *, threshold: float | None) -> str:
    """Identifies what a run answers rows with: model, decoding, calibration, threshold.

    Raises RunError when there is no finished run, ContractError when its contract cannot be read.
    """
    folder = RunFolder.open(run)
    contract = Contract.read(folder.contract)
    calibration = folder.path / CALIBRATION_FILE
    parts = [
        contract.base_fingerprint,
        contract.adapter_fingerprint,
        contract.decoding,
        contract.answer_limits,
        contract.constrain,
        contract.retrieve,
        threshold,
        hashlib.sha256(calibration.read_bytes()).hexdigest() if calibration.exists() else None,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class ShardWorker:
    """An opened run that answers shards and writes what it answered."""

    def __init__(self, assignment: Assignment) -> None:
        """Opens nothing yet, so that whoever made it learns what goes wrong from `open`."""
        self._given = assignment
        self._run: RunInUse | None = None

    def where(self) -> str:
        """The worker's machine and process, for people."""
        return f"{platform.node()}, pid {os.getpid()}"

    def open(self) -> str:
        """Open the run; returns the sentence of what is wrong with it here, "" for nothing."""
        given = self._given
        try:
            if answering_key(given.run, threshold=given.threshold) != given.key:
                return (
                    f"{given.run} on {platform.node()} is another run than where the rows were read. Workers on "
                    f"several machines need the run on storage that all of them see under the same path."
                )
            self._run = RunInUse.of(open_run(given.run, base_model=given.base_model))
        except WeitiaoError as error:
            return f"On {platform.node()}: {error}"
        return ""

    def answer(self, shard: Shard) -> Outcome:
        """Answer the rows of `shard` and write the answers; one that is finished is left as it is."""
        given, run = self._given, self._run
        assert run is not None, "open comes first"
        done = given.parts.finished(shard)
        if done is not None:
            return Outcome(manifest=done)
        try:
            records = given.parts.read_rows(shard, given.reader, given.key)
            tasks = run.assign(records)
            said = io.StringIO()
            asked = run.prepare(records, tasks, Console(file=said, width=10_000, markup=False, highlight=False))
            answerer = run.answerer()
            seed = answerer.sampling.seed + shard.number * _SEED_STEP
            answerer = replace(answerer, sampling=replace(answerer.sampling, seed=seed))
            replies = {reply.index: reply for reply in answerer.answer(asked, tasks)}
            finish = partial(finish_line, calibration=read_calibration(run.folder), threshold=given.threshold)
            lines = [finish(read_reply(asked[place], tasks[place], replies[place])) for place in range(shard.rows)]
            return Outcome(manifest=given.parts.finish(shard, lines, notes=_lines_of(said.getvalue())))
        except DataError as error:
            return Outcome(error=str(error).partition("\n")[0], problems=error.problems)
        except WeitiaoError as error:
            return Outcome(error=f"On {platform.node()}, {shard}: {error}")


def _lines_of(text: str) -> Sequence[str]:
    return [line for line in text.splitlines() if line]
