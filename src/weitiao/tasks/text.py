"""Comparing free text: ROUGE, BLEU, chrF, repetition and variety, each 0–1, each safe on empty text.

ROUGE-1, -2 and -L (Lin 2004) are F1 scores of shared units, of pairs of units and of the longest common subsequence.
BLEU-4 (Papineni et al. 2002) is the corpus figure: shared 1- to 4-grams are added up over the rows before anything is
divided, so it is a function of sums as every other metric here. Units are characters (`rouge_l`) or words
(`rouge_l_words`), see `words.py`. chrF (Popović 2015) is the F-score, β = 2, of character 1- to 6-grams without
blanks. All are checked against `rouge_score` and `sacrebleu` in the tests.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from .forms import Answer, AnswerForm
from .words import has_chinese, split_characters, split_words

PRIMARY_METRIC = "rouge_l"

ROUGE = ("rouge_1", "rouge_2", "rouge_l")
BLEU_ORDERS = (1, 2, 3, 4)
LEAST_LOOP = 16
"""Units that a loop at the end of an answer takes up at least; "ha ha ha ha" is none."""

Units = Sequence[str]


def rouge_n(reference: Units, answer: Units, order: int) -> float:
    """F1 (0–1) of shared n-grams. Where a text is too short for one: 1 when the two are equal, else 0."""
    a, b = _ngrams(reference, order), _ngrams(answer, order)
    if not a or not b:
        return float(list(reference) == list(answer))
    return _f1((a & b).total(), b.total(), a.total())


def rouge_l(reference: Units, answer: Units) -> float:
    """F1 (0–1) of the longest common subsequence; 1 when both are empty, 0 when one is."""
    if not reference or not answer:
        return float(list(reference) == list(answer))
    return _f1(longest_common_subsequence(reference, answer), len(answer), len(reference))


def longest_common_subsequence(a: Units, b: Units) -> int:
    """Its length, by bits (Hyyrö 2004): a zero in `row` for each unit of `a` that is matched so far."""
    places: dict[str, int] = {}
    for place, unit in enumerate(a):
        places[unit] = places.get(unit, 0) | 1 << place
    full = (1 << len(a)) - 1
    row = full
    for unit in b:
        match = row & places.get(unit, 0)
        row = (row + match | row - match) & full
    return len(a) - row.bit_count()


def bleu_counts(reference: Units, answer: Units) -> dict[str, float]:
    """What BLEU is made of: the lengths, and for each order the n-grams of the answer and those shared."""
    counts = {"bleu_reference": float(len(reference)), "bleu_answer": float(len(answer))}
    for order in BLEU_ORDERS:
        a, b = _ngrams(reference, order), _ngrams(answer, order)
        counts |= {f"bleu_ngrams_{order}": float(b.total()), f"bleu_shared_{order}": float((a & b).total())}
    return counts


def bleu(counts: Mapping[str, float], suffix: str = "") -> float:
    """BLEU-4 (0–1) of summed `bleu_counts`, smoothed as sacrebleu does ("exp", effective order).

    An order without any shared n-gram counts as half a match, the next one as a quarter, and so on; orders that the
    answers are too short for are left out. Over a set of rows neither occurs, as a rule; over one row it is what
    keeps a good short answer from being worth nothing. 1 when nothing is written and nothing was to be.
    """
    reference, answer = counts.get(f"bleu_reference{suffix}", 0.0), counts.get(f"bleu_answer{suffix}", 0.0)
    if not reference or not answer:
        return float(reference == answer)
    pairs = [(counts[f"bleu_shared_{n}{suffix}"], counts[f"bleu_ngrams_{n}{suffix}"]) for n in BLEU_ORDERS]
    if not any(shared for shared, _ in pairs):
        return 0.0
    logs, halves = [], 1.0
    for shared, ngrams in pairs:
        if not ngrams:
            break
        if not shared:
            halves *= 2
        logs.append(math.log((shared or 1 / halves) / ngrams))
    brevity = min(0.0, 1 - reference / answer)
    return math.exp(brevity + sum(logs) / len(logs))


def chrf(reference: str, answer: str, *, max_order: int = 6, beta: float = 2.0) -> float:
    """ChrF (0–1) of one pair; 1 when both are empty. Orders that neither text is long enough for do not count."""
    a, b = ("".join(text.split()) for text in (reference, answer))
    if not a or not b:
        return float(a == b)
    precisions, recalls = [], []
    for order in range(1, max_order + 1):
        grams_a, grams_b = _grams(a, order), _grams(b, order)
        if not grams_a or not grams_b:
            continue
        common = (grams_a & grams_b).total()
        precisions.append(common / grams_b.total())
        recalls.append(common / grams_a.total())
    precision, recall = (sum(scores) / len(scores) for scores in (precisions, recalls))
    weighted = beta**2 * precision + recall
    return (1 + beta**2) * precision * recall / weighted if weighted else 0.0


def repetition(answer: Units) -> float:
    """Share (0–1) of an answer's 4-grams that stand in it a second time; 0 where it has none.

    >>> repetition("a b c d e".split()), repetition("a b c d a b c d".split())
    (0.0, 0.2)
    """
    grams = _ngrams(answer, 4)
    return 1 - len(grams) / grams.total() if grams else 0.0


def ends_in_loop(answer: Units) -> bool:
    """Whether the answer ends with a piece four times over, `LEAST_LOOP` units or more: it hangs."""
    return any(
        list(answer[-4 * size : -size]) == list(answer[-3 * size :])
        for size in range(LEAST_LOOP // 4, len(answer) // 4 + 1)
    )


def distinct(answers: Sequence[Units], order: int) -> float:
    """Distinct n-grams among all n-grams of a set of answers (Li et al. 2016); 0 where there are none.

    It falls as a set grows, so it compares models on the same rows only. It is no sum over rows and has no interval.
    """
    grams: Counter[Hashable] = Counter()
    for answer in answers:
        grams += _ngrams(answer, order)
    return len(grams) / grams.total() if grams else 0.0


def set_figures(answers: Sequence[str]) -> dict[str, float]:
    """Figures of a whole set of answers: `distinct_1` and `distinct_2`, on characters."""
    units = [split_characters(answer) for answer in answers]
    return {"distinct_1": distinct(units, 1), "distinct_2": distinct(units, 2)}


# ---- the scorer of text tasks -----------------------------------------------------------------------------------


def count(form: AnswerForm, gold: Answer, answer: Answer | None) -> dict[str, float]:
    """Sums of one row; `exact` is counted by the task itself. `answer` None (refused) earns nothing at all."""
    given = answer or ""
    characters = split_characters(gold), split_characters(given)
    words = (split_words(gold), split_words(given)) if has_chinese(gold + given) else characters
    counts: dict[str, float] = {}
    for suffix, (reference, units) in (("", characters), ("_words", words)):
        counts[f"rouge_1{suffix}"] = rouge_n(reference, units, 1)
        counts[f"rouge_2{suffix}"] = rouge_n(reference, units, 2)
        counts[f"rouge_l{suffix}"] = rouge_l(reference, units)
        counts |= {f"{name}{suffix}": value for name, value in bleu_counts(reference, units).items()}
    counts["chrf"] = chrf(gold, given)
    counts["repetition"] = repetition(characters[1])
    counts["looping"] = float(ends_in_loop(characters[1]))
    # An answer that was refused is not an empty one: where nothing was to be said it is not right either.
    return counts if answer is not None else {k: v if k.startswith("bleu_") else 0.0 for k, v in counts.items()}


def summarise(form: AnswerForm, counts: Mapping[str, float]) -> dict[str, float]:
    """Means over rows; BLEU of the rows together."""
    rows = counts["rows"]
    figures = {name: counts.get(name, 0.0) / rows for name in ("rouge_l", "rouge_1", "rouge_2")}
    figures |= {"bleu_4": bleu(counts), "chrf": counts.get("chrf", 0.0) / rows}
    figures |= {f"{name}_words": counts.get(f"{name}_words", 0.0) / rows for name in ("rouge_l", "rouge_1", "rouge_2")}
    figures["bleu_4_words"] = bleu(counts, "_words")
    return figures | {name: counts.get(name, 0.0) / rows for name in ("repetition", "looping")}


def main_metrics(form: AnswerForm) -> tuple[str, ...]:
    """The metrics that a reader is shown first."""
    return ("rouge_l", "bleu_4", "chrf", "repetition")


def _f1(common: float, given: float, wanted: float) -> float:
    return 2 * common / (given + wanted)


def _ngrams(units: Units, order: int) -> Counter[Hashable]:
    return Counter(zip(*(units[start:] for start in range(order))))


def _grams(text: str, order: int) -> Counter[str]:
    return Counter(text[i : i + order] for i in range(len(text) - order + 1))
