"""Comparing free text: exact match, ROUGE-L and chrF, safe on empty text.

ROUGE-L (Lin 2004) is the F1 of the longest common subsequence over words, where every CJK character is a word of
its own. chrF (Popović 2015) is the F-score, β = 2, of character 1- to 6-grams without spaces, as sacrebleu computes
it for one sentence. Both are checked against `rouge_score` and `sacrebleu` in the tests.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from .forms import Answer, AnswerForm

PRIMARY_METRIC = "rouge_l"

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af]|[^\W_]+", re.UNICODE)
_CJK_SPLIT = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af])")


def words(text: str) -> list[str]:
    """Lower-case words of `text`; each CJK character is one word, punctuation is left out."""
    return _WORD.findall(_CJK_SPLIT.sub(r" \1 ", text.lower()))


def rouge_l(reference: str, answer: str) -> float:
    """F1 (0–1) of the longest common subsequence of words; 1 when both are empty, 0 when one is."""
    a, b = words(reference), words(answer)
    if not a or not b:
        return float(a == b)
    common = _longest_common_subsequence(a, b)
    precision, recall = common / len(b), common / len(a)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for item in a:
        before = 0
        for place, other in enumerate(b, start=1):
            before, row[place] = row[place], before + 1 if item == other else max(row[place], row[place - 1])
    return row[-1]


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


def _grams(text: str, order: int) -> Counter[str]:
    return Counter(text[i : i + order] for i in range(len(text) - order + 1))


def count(form: AnswerForm, gold: Answer, answer: Answer | None) -> dict[str, float]:
    """Sums of the row's scores; `exact` is counted by the task itself."""
    given = answer or ""
    return {"rouge_l": rouge_l(gold, given), "chrf": chrf(gold, given)}


def summarise(counts: Mapping[str, float]) -> dict[str, float]:
    """Means over rows."""
    return {name: counts.get(name, 0.0) / counts["rows"] for name in ("rouge_l", "chrf")}
