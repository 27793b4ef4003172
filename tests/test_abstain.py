"""Thresholds: what they keep, how sure their precision is, and who answers."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from weitiao.evaluate.abstain import MIN_KEPT, abstain_table, choose_threshold, lower_bound, route, route_lines


def drawn(rows: int, seed: int, *, lowest: float = 0.8) -> list[tuple[float, bool]]:
    """Confidences of which 80 % at the lowest, 98 % at the highest are right."""
    generator = np.random.default_rng(seed)
    confidences = generator.random(rows)
    return [(float(one), bool(generator.random() < lowest + (0.98 - lowest) * one)) for one in confidences]


def test_each_row_of_the_table_says_what_counting_says() -> None:
    pairs = [(round(confidence, 2), right) for confidence, right in drawn(300, 1)]
    table = abstain_table(*zip(*pairs))
    assert table[0].share_kept == 1.0 and table[0].threshold == min(confidence for confidence, _ in pairs)
    assert len(table) > 10 and all(one.threshold < two.threshold for one, two in pairwise(table))
    for number, row in enumerate(table):
        kept = [right for confidence, right in pairs if confidence >= row.threshold]
        assert row.share_kept == len(kept) / 300 and row.precision_kept == sum(kept) / len(kept)
        assert row.share_kept >= 1 - 0.05 * number - 1e-9 or len(table) < 20


def test_answers_of_one_confidence_stay_together() -> None:
    assert abstain_table([0.7] * 9 + [0.2], [True] * 8 + [False] * 2) == ((0.2, 1.0, 0.8), (0.7, 0.9, 8 / 9))
    assert abstain_table([], []) == ()


def test_the_chosen_threshold_keeps_the_most_answers_that_suffice() -> None:
    pairs = drawn(400, 2)
    chosen = choose_threshold(pairs, precision=0.93)
    assert chosen is not None
    enough = []
    for threshold, _ in pairs:
        kept = [right for confidence, right in pairs if confidence >= threshold]
        if len(kept) >= MIN_KEPT and sum(kept) / len(kept) >= 0.93:
            enough.append((len(kept), threshold))
    assert (chosen.rows_kept, chosen.threshold) == max(enough)
    assert chosen.share_kept == chosen.rows_kept / 400 and chosen.rows == 400
    assert chosen.lower_bound < 0.93 <= chosen.precision_kept


def test_no_threshold_is_chosen_where_none_suffices() -> None:
    assert choose_threshold(drawn(200, 3, lowest=0.3), precision=1.0) is None
    assert choose_threshold([(0.9, True)] * (MIN_KEPT - 1) + [(0.1, False)] * 50) is None
    assert choose_threshold([(0.9, True)] * MIN_KEPT + [(0.1, False)] * 50) is not None
    assert choose_threshold([]) is None
    with pytest.raises(ValueError, match="above 0 and up to 1, not 95"):
        choose_threshold([(0.9, True)], precision=95)


@pytest.mark.parametrize(("num_right", "rows"), [(1, 1), (3, 10), (95, 100), (100, 100), (1900, 2000)])
def test_the_lower_bound_is_where_so_many_right_answers_become_rare(num_right: int, rows: int) -> None:
    bound = lower_bound(num_right, rows)
    tail = math.fsum(
        math.comb(rows, k) * bound**k * (1 - bound) ** (rows - k) for k in range(num_right, rows + 1) if rows < 500
    )
    assert rows >= 500 or tail == pytest.approx(0.05, rel=1e-6)
    assert 0 < bound < num_right / rows and bound < lower_bound(num_right, rows, level=0.8)
    if num_right == rows:
        assert bound == pytest.approx(0.05 ** (1 / rows))


def test_the_bound_of_a_chosen_threshold_holds_on_other_answers() -> None:
    held = []
    for seed in range(200):
        chosen = choose_threshold(drawn(200, seed))
        if chosen is not None:
            held.append(0.8 + 0.18 * (1 + chosen.threshold) / 2 >= chosen.lower_bound)
    assert len(held) > 180 and sum(held) / len(held) >= 0.91


def test_what_is_unsure_unmeasured_or_formless_goes_to_a_person() -> None:
    assert route(confidence=0.9, valid=True, threshold=0.9) == "model"
    assert route(confidence=0.89, valid=True, threshold=0.9) == "person"
    assert route(confidence=0.99, valid=False, threshold=0.9) == "person"
    assert route(confidence=None, valid=True, threshold=0.0) == "person"
    assert route(confidence=1.0, valid=True, threshold=None) == "person"


def test_lines_of_predictions_get_their_route_and_keep_the_rest() -> None:
    lines = [
        {"task": "topics", "valid": True, "confidence": 0.8, "source": "a:1"},
        {"task": "triples", "valid": True, "confidence": 0.8, "source": "a:2"},
        {"task": "topics", "valid": False, "source": "a:3"},
    ]
    routed = route_lines(lines, {"topics": 0.7, "triples": 0.9})
    assert [line["route"] for line in routed] == ["model", "person", "person"]
    assert [{key: line[key] for key in line if key != "route"} for line in routed] == lines
    assert "route" not in lines[0]
    with pytest.raises(ValueError, match=r"no threshold for triples\. Thresholds: topics"):
        route_lines(lines, {"topics": 0.7})
