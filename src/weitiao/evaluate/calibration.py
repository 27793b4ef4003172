"""From how probable a model finds its answers to how often such answers are right: fitted, tried and kept with a run.

The kind of curve (confidence_curve.py) is the one with the smallest log loss in cross-validation; all figures about
the result are computed on cross-fitted confidences, each from a curve that has not seen the answer.

Knows confidences and scores; knows nothing of models and tokens.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import RunError
from ..runs import write_text
from ..tasks.base import RowScore, Task
from .abstain import AbstainRow, abstain_table
from .confidence_curve import METHODS, Curve, Floats, Method, fit_curve, log_loss
from .prediction import Prediction
from .reliability import Bin, expected_calibration_error, reliability_bins
from .right_values import right_values

CALIBRATION_FILE = "calibration.json"

MIN_ROWS = 20
"""Fewer answers calibrate nothing: a curve through them would follow chance."""
NUM_FOLDS = 10

_PLACE_IN_LIST = re.compile(r"\[\d+\]")

Groups = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """A curve from confidence to share right, and how well it does."""

    curve: Curve
    rows: int
    """Answers (or values) it was made from."""
    num_right: int
    note: str = ""
    """What people should know of it: why nothing was calibrated, what was left out; empty when there is nothing."""
    bins: tuple[Bin, ...]
    """The reliability diagram: equally filled bins of the cross-fitted confidences, rising."""
    ece: float
    """Expected calibration error of these bins: how far confidence and share right are apart on average (0–1)."""
    uncalibrated_ece: float
    """The same of the confidences as the model gives them."""
    log_loss: float
    """Mean negative log-likelihood (nats) of the outcomes under the cross-fitted confidences."""
    uncalibrated_log_loss: float
    table: tuple[AbstainRow, ...]
    """Thresholds on the calibrated confidence, and what is kept above them. A curve that never falls leaves the order
    of answers as it was, so the precision of a share kept owes nothing to the fit."""

    @property
    def method(self) -> Method:
        """The kind of curve; `none` when confidences stay as the model gives them."""
        return self.curve.method

    def apply(self, confidence: float) -> float:
        """The calibrated confidence (0–1): never lower for a higher `confidence`.

        Raises:
            ValueError: `confidence` is not a number from 0 to 1.
        """
        if not 0 <= confidence <= 1:
            raise ValueError(f"A confidence is a number from 0 to 1, not {confidence}.")
        return float(self.curve.apply(np.array([confidence]))[0])

    def tried_on(self, confidences: Sequence[float], right: Sequence[bool]) -> Calibration:
        """The same curve, and how well it does on other answers: of at least one, its confidence and whether right."""
        given, outcomes = np.array(confidences, dtype=np.float64), np.array(right, dtype=np.float64)
        told = self.curve.apply(given)
        bins = reliability_bins(told, outcomes)
        return Calibration(
            curve=self.curve,
            rows=len(given),
            num_right=int(outcomes.sum()),
            note="Calibrated on the run's dev rows, tried on these.",
            bins=bins,
            ece=expected_calibration_error(bins),
            uncalibrated_ece=expected_calibration_error(reliability_bins(given, outcomes)),
            log_loss=log_loss(told, outcomes),
            uncalibrated_log_loss=log_loss(given, outcomes),
            table=abstain_table(told.tolist(), [bool(one) for one in outcomes]),
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy; `from_json` reads it back equal."""
        return {
            "curve": self.curve.to_json(),
            "rows": self.rows,
            "num_right": self.num_right,
            "note": self.note,
            "bins": [one._asdict() for one in self.bins],
            "ece": self.ece,
            "uncalibrated_ece": self.uncalibrated_ece,
            "log_loss": self.log_loss,
            "uncalibrated_log_loss": self.uncalibrated_log_loss,
            "table": [one._asdict() for one in self.table],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Calibration:
        """The calibration that `to_json` wrote."""
        values = dict(data)
        values["curve"] = Curve.from_json(values["curve"])
        values["bins"] = tuple(Bin(**one) for one in values["bins"])
        values["table"] = tuple(AbstainRow(**one) for one in values["table"])
        return cls(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldCalibration:
    """The calibrations of the single values of a task's answers."""

    every: Calibration
    """Of all values together."""
    by_field: Mapping[str, Calibration]
    """Of the values of one field, by its name (`field_name`), where enough answers hold it. What a model writes first
    it weighs; what follows from that it is nearly certain of, right or wrong: one curve cannot serve both."""

    def apply(self, path: str, confidence: float) -> float:
        """The calibrated confidence of the value at `path`: by the curve of its field, else by that of all values."""
        return self.by_field.get(field_name(path), self.every).apply(confidence)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy; `from_json` reads it back equal."""
        by_field = {name: one.to_json() for name, one in self.by_field.items()}
        return {"every": self.every.to_json(), "by_field": by_field}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FieldCalibration:
        """The calibrations that `to_json` wrote."""
        by_field = {name: Calibration.from_json(one) for name, one in data["by_field"].items()}
        return cls(every=Calibration.from_json(data["every"]), by_field=by_field)


def field_name(path: str) -> str:
    """The field that the value at `path` belongs to: the path without the places in lists.

    >>> field_name("[3].subject"), field_name("skills[0]"), field_name("[1]")
    ('subject', 'skills', '')
    """
    return _PLACE_IN_LIST.sub("", path).removeprefix(".")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCalibration:
    """What a run folder keeps: for each task how its whole answers are calibrated, and how their values are."""

    answers: Mapping[str, Calibration] = field(default_factory=dict)
    fields: Mapping[str, FieldCalibration] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write `path` whole or not at all."""
        data = {
            "answers": {task: one.to_json() for task, one in self.answers.items()},
            "fields": {task: one.to_json() for task, one in self.fields.items()},
        }
        write_text(path, json.dumps(data, ensure_ascii=False, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> RunCalibration:
        """What `write` wrote to `path`. Raises RunError when there is no such file or it holds something else."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                answers={task: Calibration.from_json(one) for task, one in data["answers"].items()},
                fields={task: FieldCalibration.from_json(one) for task, one in data["fields"].items()},
            )
        except FileNotFoundError:
            raise RunError(f"There is no {path}. It is made when the run is evaluated on its dev rows.") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunError(f"{path} holds no calibration ({error}). Evaluate the run on its dev rows again.") from None


class WithConfidence(Protocol):
    """A prediction as far as whole answers are calibrated."""

    @property
    def task(self) -> str:
        """Name of its task."""

    @property
    def confidence(self) -> float | None:
        """How probable the model found its answer; None when that was not measured."""


# ---- a task's calibration -------------------------------------------------------------------------------------


def calibrate_side(
    predictions: Sequence[WithConfidence],
    row_scores: Sequence[RowScore],
    tasks: Sequence[Task],
    *,
    known: Mapping[str, Calibration] | None = None,
) -> dict[str, Calibration]:
    """For each task, the calibration of whole answers; an answer is right when it is exact.

    Answers without the labelled form need no confidence to be told from right ones and are left out, as are those
    without a confidence; a note counts them. A task of which nothing is left has no calibration.

    Args:
        predictions: of labelled rows that the model was not trained on.
        row_scores: of each prediction, its score.
        tasks: in the order of the result.
        known: calibrations made on other rows, by task: these are tried, not made anew.
    """
    found: dict[str, Calibration] = {}
    for task in tasks:
        own = [(row, score) for row, score in zip(predictions, row_scores, strict=True) if row.task == task.name]
        pairs = [(row.confidence, score.exact) for row, score in own if score.valid and row.confidence is not None]
        if pairs:
            notes = [_left_out(sum(not score.valid for _, score in own), "without the labelled form")]
            notes.append(_left_out(sum(s.valid and row.confidence is None for row, s in own), "without a confidence"))
            confidences, right = zip(*pairs)
            if known is not None and task.name in known:
                found[task.name] = known[task.name].tried_on(confidences, right)
            else:
                found[task.name] = calibrate(confidences, right, notes=notes)
    return found


def calibrate_fields(
    predictions: Sequence[Prediction], row_scores: Sequence[RowScore], tasks: Sequence[Task]
) -> dict[str, FieldCalibration]:
    """For each task whose answers hold several values, the calibrations of single values.

    A value is right when the gold answer holds it (right_values.py). The values of one answer stand or fall together,
    so they are never on both sides of a cross-validation. Only answers in the labelled form have values.
    """
    found: dict[str, FieldCalibration] = {}
    for task in tasks:
        if task.form.is_plain:
            continue  # one value, which is the answer
        values = [
            value
            for number, (row, score) in enumerate(zip(predictions, row_scores, strict=True))
            if row.task == task.name and score.valid and row.fields
            for value in _tried_values(task, row, number)
        ]
        if values:
            answers_with: dict[str, set[int]] = defaultdict(set)
            for value in values:
                answers_with[value.field].add(value.answer)
            by_field = {
                name: _calibrate_values([value for value in values if value.field == name])
                for name, answers in answers_with.items()
                if len(answers) >= MIN_ROWS
            }
            found[task.name] = FieldCalibration(every=_calibrate_values(values), by_field=by_field)
    return found


class _TriedValue(NamedTuple):
    field: str
    answer: int
    confidence: float
    right: bool


def _tried_values(task: Task, row: Prediction, number: int) -> Iterator[_TriedValue]:
    right = right_values(task.form, task.form.parse(row.gold), row.answer)
    for one in row.fields:
        yield _TriedValue(field_name(one.path), number, one.confidence, right[one.path])


def _calibrate_values(values: Sequence[_TriedValue]) -> Calibration:
    return calibrate(
        [value.confidence for value in values],
        [value.right for value in values],
        groups=[value.answer for value in values],
        things="values",
    )


def _left_out(count: int, what: str) -> str:
    return f"{count:,} {'answer' if count == 1 else 'answers'} {what} left out." if count else ""


def calibrate(
    confidences: Sequence[float],
    right: Sequence[bool],
    *,
    groups: Sequence[int] | None = None,
    things: str = "answers",
    notes: Sequence[str] = (),
    seed: int = 0,
) -> Calibration:
    """The curve that foretells best which answers are right, and what it is worth.

    With fewer than `MIN_ROWS` answers, or where all are right or all are wrong, confidences stay as they are and the
    note says so.

    Args:
        confidences: of at least one answer, 0–1.
        right: for each, whether it was right.
        groups: for each, which answers it stands or falls with; None: each by itself.
        things: what the note calls them.
        notes: sentences put before the note's own.
        seed: of the drawing of folds, which does not depend on the order of answers.
    """
    given = np.array(confidences, dtype=np.float64)
    if len(given) == 0 or not np.all((given >= 0) & (given <= 1)):
        raise ValueError("Calibration needs at least one confidence, and each must be a number from 0 to 1.")
    own_groups = np.arange(len(given)) if groups is None else np.unique(np.array(groups), return_inverse=True)[1]
    order = np.lexsort((own_groups, np.array(right), given))  # sums in another order would differ in their last digits
    given, outcomes, own_groups = given[order], np.array(right, dtype=np.float64)[order], own_groups[order]
    curve, fitted = Curve(), given
    reason = _why_not(outcomes, own_groups, things)
    if not reason:
        fold = _folds(given, outcomes, own_groups, seed)
        tried = {method: _cross_fit(method, given, outcomes, fold) for method in METHODS}
        best = min(METHODS, key=lambda method: log_loss(tried[method], outcomes))  # of equal ones the simplest
        curve, fitted = fit_curve(best, given, outcomes), tried[best]
        if best == "none":
            reason = "No curve foretells better than the confidences as they are."
    bins = reliability_bins(fitted, outcomes)
    return Calibration(
        curve=curve,
        rows=len(given),
        num_right=int(outcomes.sum()),
        note=" ".join(sentence for sentence in (*notes, reason) if sentence),
        bins=bins,
        ece=expected_calibration_error(bins),
        uncalibrated_ece=expected_calibration_error(reliability_bins(given, outcomes)),
        log_loss=log_loss(fitted, outcomes),
        uncalibrated_log_loss=log_loss(given, outcomes),
        table=abstain_table(curve.apply(given).tolist(), [bool(one) for one in outcomes]),
    )


def _why_not(right: Floats, groups: Groups, things: str) -> str:
    """Why nothing can be calibrated; empty when something can."""
    num_groups = int(groups.max()) + 1
    if num_groups < MIN_ROWS:
        return f"Not calibrated: {num_groups} answers are too few, {MIN_ROWS} are needed."
    if right.all() or not right.any():
        return f"Not calibrated: all {len(right):,} {things} are {'right' if right.all() else 'wrong'}."
    return ""


# ---- cross-fitting --------------------------------------------------------------------------------------------


def _folds(confidences: Floats, right: Floats, groups: Groups, seed: int) -> Groups:
    """For each answer its fold: wrong answers spread evenly over the folds, drawn otherwise, groups kept whole."""
    num_groups = int(groups.max()) + 1
    num_wrong = np.bincount(groups, weights=1 - right, minlength=num_groups)
    total = np.bincount(groups, weights=confidences, minlength=num_groups)
    draw = np.empty(num_groups)
    draw[np.lexsort((total, num_wrong))] = np.random.default_rng(seed).random(num_groups)
    fold_of_group = np.empty(num_groups, dtype=np.int64)
    fold_of_group[np.lexsort((draw, num_wrong))] = np.arange(num_groups) % NUM_FOLDS
    return np.asarray(fold_of_group[groups], dtype=np.int64)


def _cross_fit(method: Method, confidences: Floats, right: Floats, fold: Groups) -> Floats:
    """Each answer's confidence by a curve fitted to the other folds."""
    fitted = np.empty_like(confidences)
    for number in range(NUM_FOLDS):
        mine = fold == number
        fitted[mine] = fit_curve(method, confidences[~mine], right[~mine]).apply(confidences[mine])
    return fitted
