"""Calibration: known distortions are undone, nothing gets worse, figures are what counting gives."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weitiao.errors import RunError
from weitiao.evaluate.calibration import (
    CALIBRATION_FILE,
    MIN_ROWS,
    Calibration,
    FieldCalibration,
    RunCalibration,
    calibrate,
    calibrate_fields,
    calibrate_side,
    field_name,
)
from weitiao.evaluate.confidence_curve import (
    METHODS,
    Curve,
    Floats,
    fit_curve,
    log_loss,
    log_odds,
    pool_adjacent_violators,
)
from weitiao.evaluate.reliability import expected_calibration_error, reliability_bins
from weitiao.evaluate.score import FieldConfidence, Prediction, row_scores
from weitiao.tasks.base import Task
from weitiao.tasks.forms import AnswerForm, Field

TOPIC = Task(name="topic", form=AnswerForm(shape="label", labels=("手机", "水果")))
FIELDS = (Field(key="n", kind="string"), Field(key="kind", kind="string"))
FACTS = Task(name="facts", form=AnswerForm(shape="object list", fields=FIELDS))
GRID = np.linspace(0, 1, 501)


def sigmoid(values: Floats) -> Floats:
    return 1 / (1 + np.exp(-values))


def drawn(rows: int, truth: str, seed: int = 0) -> tuple[list[float], list[bool]]:
    """Confidences, and whether the answers were right by the known share of right answers at each."""
    generator = np.random.default_rng(seed)
    confidences = sigmoid(generator.normal(1.0, 2.0, rows))
    right = generator.random(rows) < TRUTHS[truth](confidences)
    return confidences.tolist(), right.tolist()


TRUTHS = {
    "as given": lambda c: c,
    "too sure": lambda c: sigmoid(0.4 * log_odds(c)),
    "too humble": lambda c: sigmoid(2.5 * log_odds(c)),
    "shifted": lambda c: sigmoid(0.6 * log_odds(c) + 1.5),
    "steps": lambda c: np.where(c < 0.5, 0.2, np.where(c < 0.9, 0.35, 0.95)),
    "no news": lambda c: np.full_like(c, 0.7),
    "upside down": lambda c: 1 - c,
}


@pytest.mark.parametrize("truth", [name for name in TRUTHS if name != "upside down"])
def test_a_known_distortion_is_undone(truth: str) -> None:
    confidences, right = drawn(4000, truth)
    made = calibrate(confidences, right)
    wanted = TRUTHS[truth](np.array(confidences))
    off = np.abs(made.curve.apply(np.array(confidences)) - wanted)
    assert off.mean() < 0.02 and made.ece < 0.03
    assert made.log_loss <= made.uncalibrated_log_loss
    if truth not in ("as given",):
        before = np.abs(np.array(confidences) - wanted).mean()
        assert off.mean() < before / 3 and made.ece < made.uncalibrated_ece / 2
        assert made.method != "none"


@pytest.mark.parametrize(
    ("truth", "slope", "offset"), [("too sure", 0.4, 0), ("too humble", 2.5, 0), ("shifted", 0.6, 1.5)]
)
def test_scaling_finds_the_numbers_that_distorted(truth: str, slope: float, offset: float) -> None:
    confidences, right = (np.array(column, dtype=np.float64) for column in drawn(20_000, truth))
    curve = fit_curve("logistic", confidences, right)
    assert curve.slope == pytest.approx(slope, rel=0.06) and curve.offset == pytest.approx(offset, abs=0.08)
    if not offset:
        assert fit_curve("temperature", confidences, right).slope == pytest.approx(slope, rel=0.05)


@pytest.mark.parametrize("method", ["temperature", "logistic"])
def test_scaling_stands_where_no_neighbour_is_better(method: str) -> None:
    confidences, right = (np.array(column, dtype=np.float64) for column in drawn(60, "shifted", seed=3))
    curve = fit_curve(method, confidences, right)
    num_right = right.sum()
    targets = np.where(right > 0, (num_right + 1) / (num_right + 2), 1 / (60 - num_right + 2))
    best = log_loss(curve.apply(confidences), targets)
    for slope, offset in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)):
        if offset and method == "temperature":
            continue
        moved = replace(curve, slope=curve.slope + slope, offset=curve.offset + offset)
        assert log_loss(moved.apply(confidences), targets) > best


some_confidence = st.sampled_from([0.0, 1e-12, 0.3, 0.5, 0.9, 0.999999, 1.0]) | st.floats(0, 1)
outcomes = st.lists(st.tuples(some_confidence, st.booleans()), min_size=1, max_size=60)


@settings(deadline=None)
@given(outcomes, st.sampled_from(METHODS))
def test_every_curve_rises_or_stays_within_0_and_1(pairs: list[tuple[float, bool]], method: str) -> None:
    confidences, right = (np.array(column, dtype=np.float64) for column in zip(*pairs))
    curve = fit_curve(method, confidences, right)
    fitted = curve.apply(np.sort(np.concatenate([GRID, confidences])))
    assert np.all(np.isfinite(fitted)) and fitted.min() >= 0 and fitted.max() <= 1
    assert np.all(np.diff(fitted) >= -1e-12)
    assert Curve.from_json(json.loads(json.dumps(curve.to_json()))) == curve
    if method != "none":
        assert fitted.min() > 0 and fitted.max() < 1, "certainty is never claimed"


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=MIN_ROWS, max_size=80),
    st.randoms(use_true_random=True),
)
def test_calibration_never_foretells_worse_and_does_not_ask_for_an_order(
    pairs: list[tuple[float, bool]], draw: random.Random
) -> None:
    made = calibrate(*zip(*pairs))
    assert made.log_loss <= made.uncalibrated_log_loss + 1e-12
    order = list(pairs)
    draw.shuffle(order)
    again = calibrate(*zip(*order))
    assert again.method == made.method and again.ece == pytest.approx(made.ece)
    assert np.allclose(again.curve.apply(GRID), made.curve.apply(GRID))


def test_confidences_that_mislead_end_up_saying_nothing() -> None:
    made = calibrate(*drawn(500, "upside down"))
    share_right = made.num_right / made.rows
    assert made.apply(0.01) == pytest.approx(share_right, abs=0.05) == made.apply(0.99)


def test_confidences_that_are_right_already_change_little() -> None:
    made = calibrate(*drawn(300, "as given", seed=5))
    assert np.abs(made.curve.apply(GRID) - GRID).max() < 0.1


# ---- isotonic -------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=12))
def test_pooling_gives_the_nearest_rising_sequence(pairs: list[tuple[int, int]]) -> None:
    """By the minimax formula: the level at i is the greatest, over starts to i, of the least mean reaching past i."""
    values, weights = (np.array(column, dtype=np.float64) for column in zip(*pairs))

    def mean(start: int, end: int) -> float:
        return float(np.average(values[start : end + 1], weights=weights[start : end + 1]))

    count = len(values)
    wanted = [max(min(mean(a, b) for b in range(i, count)) for a in range(i + 1)) for i in range(count)]
    assert pool_adjacent_violators(values, weights).tolist() == pytest.approx(wanted)


def test_the_logistic_curve_is_where_the_log_loss_has_its_minimum() -> None:
    confidences, right = (np.array(column, dtype=np.float64) for column in drawn(400, "shifted"))
    curve, odds = fit_curve("logistic", confidences, right), log_odds(confidences)
    num_right, num_wrong = right.sum(), (1 - right).sum()
    platt = np.where(right == 1, (num_right + 1) / (num_right + 2), 1 / (num_wrong + 2))
    error = 1 / (1 + np.exp(-(curve.slope * odds + curve.offset))) - platt
    assert abs(error.mean()) < 1e-5, "the loss falls with no other offset"
    assert abs((error * odds).mean()) < 1e-5, "nor with another slope"


def test_isotonic_ends_are_shares_with_one_answer_against() -> None:
    confidences = np.array([0.2] * 5 + [0.8] * 9)
    curve = fit_curve("isotonic", confidences, np.array([0.0] * 5 + [1.0] * 9))
    assert curve.points == ((0.2, pytest.approx(1 / 6)), (0.8, pytest.approx(9 / 10)))
    assert curve.apply(np.array([0.0, 0.5, 1.0])).tolist() == pytest.approx([1 / 6, (1 / 6 + 9 / 10) / 2, 9 / 10])


# ---- where nothing can be calibrated --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "note"),
    [
        ([True, False] * 9 + [True], "Not calibrated: 19 answers are too few, 20 are needed."),
        ([True] * 40, "Not calibrated: all 40 answers are right."),
        ([False] * 40, "Not calibrated: all 40 answers are wrong."),
    ],
)
def test_confidences_stay_as_they_are_where_nothing_can_be_learnt(right: list[bool], note: str) -> None:
    confidences = [0.5 + 0.01 * number for number in range(len(right))]
    made = calibrate(confidences, right)
    assert (made.method, made.note, made.rows, made.num_right) == ("none", note, len(right), sum(right))
    assert made.apply(0.37) == 0.37
    assert (made.ece, made.log_loss) == (made.uncalibrated_ece, made.uncalibrated_log_loss)
    assert sum(one.rows for one in made.bins) == len(right) and made.table[0].precision_kept == sum(right) / len(right)


def test_one_wrong_answer_is_enough_to_go_by() -> None:
    made = calibrate([0.99] * 39 + [0.2], [True] * 39 + [False])
    assert "Not calibrated" not in made.note and made.apply(0.2) < made.apply(0.99)


def test_what_is_no_confidence_is_refused() -> None:
    for wrong in ([], [1.1], [float("nan")]):
        with pytest.raises(ValueError, match="from 0 to 1"):
            calibrate(wrong, [True] * len(wrong))
    with pytest.raises(ValueError, match=r"from 0 to 1, not 1\.5"):
        calibrate([0.5], [True]).apply(1.5)


# ---- figures --------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=150))
def test_bins_and_ece_are_what_counting_gives(pairs: list[tuple[int, bool]]) -> None:
    confidences = [tenths / 12 for tenths, _ in pairs]
    right = [outcome for _, outcome in pairs]
    bins = reliability_bins(np.array(confidences), np.array(right, dtype=np.float64))
    total = len(pairs)
    num_bins = max(1, min(10, total // 10))
    members: dict[int, list[tuple[float, bool]]] = {}
    for confidence, outcome in zip(confidences, right):
        below, equal = sum(c < confidence for c in confidences), confidences.count(confidence)
        members.setdefault(math.floor((below + equal / 2) * num_bins / total), []).append((confidence, outcome))
    assert len(bins) == len(members)
    off = 0.0
    for one, number in zip(bins, sorted(members)):
        held = members[number]
        assert (one.low, one.high, one.rows) == (min(c for c, _ in held), max(c for c, _ in held), len(held))
        mean, accuracy = sum(c for c, _ in held) / len(held), sum(r for _, r in held) / len(held)
        assert (one.mean_confidence, one.accuracy) == pytest.approx((mean, accuracy))
        off += abs(sum(c - r for c, r in held))
    assert expected_calibration_error(bins) == pytest.approx(off / total)


def test_bins_hold_equally_many_answers_where_none_are_alike() -> None:
    confidences = np.random.default_rng(0).random(205)
    bins = reliability_bins(confidences, np.zeros(205))
    assert len(bins) == 10 and {one.rows for one in bins} <= {20, 21}
    assert all(one.high < other.low for one, other in pairwise(bins))


def test_figures_come_from_curves_that_have_not_seen_the_answer() -> None:
    """Confidences that say nothing cannot look useful, however closely a curve could follow them."""
    generator = np.random.default_rng(1)
    losses, fitted = [], []
    for _ in range(20):
        confidences, right = generator.random(60), generator.random(60) < 0.5
        made = calibrate(confidences.tolist(), right.tolist())
        losses.append(made.log_loss)
        curve = fit_curve("isotonic", confidences, right.astype(np.float64))
        fitted.append(log_loss(curve.apply(confidences), right.astype(np.float64)))
    assert np.mean(fitted) < math.log(2) - 0.03, "a curve judged by its own answers looks better than chance"
    assert np.mean(losses) > math.log(2) - 0.01


def test_values_of_one_answer_are_never_on_both_sides() -> None:
    """Fifty answers of ten equal values each: by itself, each value would be foretold by its copies."""
    generator = np.random.default_rng(2)
    confidences = np.repeat(generator.random(50), 10)
    right = np.repeat(generator.random(50) < 0.5, 10)
    groups = np.repeat(np.arange(50), 10).tolist()
    apart = calibrate(confidences.tolist(), right.tolist())
    together = calibrate(confidences.tolist(), right.tolist(), groups=groups)
    assert apart.log_loss < math.log(2) - 0.02 < together.log_loss
    few = calibrate(confidences.tolist()[:190], right.tolist()[:190], groups=groups[:190], things="values")
    assert few.note == "Not calibrated: 19 answers are too few, 20 are needed."


# ---- sides, fields, files -------------------------------------------------------------------------------------


def topic_rows(count: int) -> list[Prediction]:
    confidences, right = drawn(count, "too sure", seed=7)
    return [
        Prediction(
            source=f"dev.jsonl:{number}", task="topic", prompt="…", gold="手机", answer="手机" if is_right else "水果",
            confidence=confidence,
        )
        for number, (confidence, is_right) in enumerate(zip(confidences, right), start=1)
    ]  # fmt: skip


def test_a_side_is_calibrated_task_by_task_on_what_has_form_and_confidence() -> None:
    rows = topic_rows(200)
    rows[3] = replace(rows[3], confidence=None)
    rows[4] = replace(rows[4], answer="梨")
    rows[5] = replace(rows[5], answer="梨", confidence=None)
    others = [replace(row, task="facts", gold="[]", answer="[]", confidence=None) for row in rows[:30]]
    mixed = [*rows, *others]
    tasks = (FACTS, TOPIC)
    made = calibrate_side(mixed, row_scores(mixed, tasks), tasks)
    assert list(made) == ["topic"], "a task none of whose answers has a confidence has no calibration"
    kept = rows[:3] + rows[6:]
    alone = calibrate([row.confidence for row in kept], [row.answer == row.gold for row in kept])
    assert replace(made["topic"], note="") == replace(alone, note="")
    assert made["topic"].note.startswith(
        "2 answers without the labelled form left out. 1 answer without a confidence left out."
    )
    assert made["topic"].method in ("temperature", "logistic")


def fact_rows(count: int) -> list[Prediction]:
    """Three facts each. A name is right as often as its confidence cubed says; its kind, of which the model is always
    nearly certain, is right when the name is."""
    generator = np.random.default_rng(3)
    rows = []
    for number in range(1, count + 1):
        gold = [{"n": f"{name}{number}", "kind": "人"} for name in "甲乙丙"]
        given, fields = [], []
        for place, fact in enumerate(gold):
            confidence = float(generator.random())
            given.append(fact if generator.random() < confidence**3 else {"n": f"错{place}", "kind": "物"})
            for key, sure in (("n", confidence), ("kind", 0.9999)):
                fields.append(FieldConfidence(path=f"[{place}].{key}", value=given[-1][key], confidence=sure))
        rows.append(
            Prediction(
                source=f"dev.jsonl:{number}", task="facts", prompt="…", gold=FACTS.form.write(gold),
                answer=FACTS.form.write(given), fields=tuple(fields),
            )
        )  # fmt: skip
    return rows


def test_values_are_calibrated_field_by_field_against_the_gold_answer() -> None:
    rows = [*fact_rows(100), *topic_rows(30)]
    tasks = (FACTS, TOPIC)
    made = calibrate_fields(rows, row_scores(rows, tasks), tasks)
    assert list(made) == ["facts"], "a label is its answer"
    facts = made["facts"]
    assert set(facts.by_field) == {"n", "kind"} and facts.every.rows == 600 and facts.by_field["n"].rows == 300
    assert facts.apply("[0].n", 0.8) == pytest.approx(0.8**3, abs=0.1)
    share_right = facts.by_field["kind"].num_right / 300
    assert facts.apply("[7].kind", 0.9999) == pytest.approx(share_right, abs=0.03) and share_right < 0.4
    assert facts.apply("[0].other", 0.5) == facts.every.apply(0.5)
    joint = [facts.by_field[name] for name in ("n", "kind")]
    assert sum(one.log_loss for one in joint) / 2 < facts.every.log_loss - 0.03


def test_a_field_that_few_answers_hold_has_no_curve_of_its_own() -> None:
    rows = fact_rows(MIN_ROWS - 1)
    made = calibrate_fields(rows, row_scores(rows, (FACTS,)), (FACTS,))["facts"]
    assert made.by_field == {} and made.every.note == "Not calibrated: 19 answers are too few, 20 are needed."


@pytest.mark.parametrize(
    ("path", "name"),
    [("", ""), ("[12]", ""), ("[0].a", "a"), ("a[3].b[0]", "a.b"), ('[0]["x y"][1]', '["x y"]'), ("a.b", "a.b")],
)
def test_a_field_is_named_without_places_in_lists(path: str, name: str) -> None:
    assert field_name(path) == name


def test_calibrations_are_kept_with_a_run_and_read_back_equal(tmp_path: Path) -> None:
    answers = {truth: calibrate(*drawn(120, truth)) for truth in TRUTHS}
    answers["few"] = calibrate([0.5], [True])
    steps = calibrate(*drawn(60, "steps"))
    kept = RunCalibration(answers=answers, fields={"facts": FieldCalibration(every=steps, by_field={"n": steps})})
    assert {one.method for one in answers.values()} >= {"none", "temperature"}
    path = tmp_path / CALIBRATION_FILE
    kept.write(path)
    assert RunCalibration.read(path) == kept
    for truth in TRUTHS:
        assert RunCalibration.read(path).answers[truth].apply(0.3) == answers[truth].apply(0.3)
        assert Calibration.from_json(answers[truth].to_json()) == answers[truth]


@pytest.mark.parametrize("text", ["", "[]", '{"answers": {}}', '{"answers": {"t": {"curve": {}}}, "fields": {}}'])
def test_a_file_that_holds_no_calibration_is_told_in_a_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / CALIBRATION_FILE
    with pytest.raises(RunError, match="There is no"):
        RunCalibration.read(path)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match="holds no calibration"):
        RunCalibration.read(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "magic", "slope": 1.0, "offset": 0.0, "points": []},
        {"method": "logistic", "slope": -1.0, "offset": 0.0, "points": []},
        {"method": "logistic", "slope": 1.0, "offset": float("nan"), "points": []},
        {"method": "isotonic", "slope": 1.0, "offset": 0.0, "points": []},
        {"method": "none", "slope": 1.0, "offset": 0.0, "points": [[0.1, 0.2]]},
        {"method": "isotonic", "slope": 1.0, "offset": 0.0, "points": [[0.1, 0.9], [0.2, 0.8]]},
        {"method": "isotonic", "slope": 1.0, "offset": 0.0, "points": [[0.1, 0.9], [0.2, 1.8]]},
    ],
)
def test_a_curve_that_falls_or_leaves_0_to_1_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must be|is one of"):
        Curve.from_json(wrong)
