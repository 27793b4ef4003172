"""What people read for a metric: its name in words and what it counts. Knows no figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class MetricText(NamedTuple):
    """What people read for a metric."""

    label: str
    meaning: str
    less_is_better: bool = False


METRICS: Mapping[str, MetricText] = {
    "f1": MetricText(
        "Strict F1",
        "a fact counts as found only when all its content fields equal the label (subject, predicate and object of a "
        "triple; key and value of an attribute); the balance of precision and recall over the facts of all rows.",
    ),
    "precision": MetricText("Precision", "of the facts that the answers give, the share that the labels hold."),
    "recall": MetricText("Recall", "of the facts that the labels hold, the share that the answers give."),
    "f1_typed": MetricText("F1 with types", "strict F1 where the types of subject and object must be equal too."),
    "f1_relaxed": MetricText(
        "Relaxed F1",
        "F1 where a fact that equals a labelled one but for spelling counts as found, and one whose values overlap "
        "with a labelled one's counts as half found.",
    ),
    "precision_relaxed": MetricText("Relaxed precision", "precision with the credit of relaxed F1."),
    "recall_relaxed": MetricText("Relaxed recall", "recall with the credit of relaxed F1."),
    "absence_accuracy": MetricText(
        "Absence", "of the fields that the labels leave empty, the share that the answers leave empty too."
    ),
    "accuracy": MetricText("Accuracy", "share of rows whose label, or whole set of labels, is right."),
    "macro_f1": MetricText(
        "Macro F1",
        "F1 of each label, averaged over the labels that occur: a rare label counts as much as a frequent one.",
    ),
    "micro_f1": MetricText("Micro F1", "F1 over all labels of all rows together: a frequent label counts for more."),
    "balanced_accuracy": MetricText(
        "Balanced accuracy", "recall of each label, averaged over the labels that occur in the rows."
    ),
    "jaccard": MetricText(
        "Jaccard", "labels that label and answer share, as a share of those that either has, averaged over rows."
    ),
    "rouge_l": MetricText(
        "ROUGE-L",
        "longest common run of characters in order, gaps allowed, averaged over rows (a run of Latin letters or digits "
        "is one character).",
    ),
    "rouge_1": MetricText("ROUGE-1", "F1 of shared characters, averaged over rows."),
    "rouge_2": MetricText("ROUGE-2", "F1 of shared pairs of characters, averaged over rows."),
    "bleu_4": MetricText(
        "BLEU-4", "shared runs of 1 to 4 characters over all rows together, less where answers are too short."
    ),
    "chrf": MetricText("chrF", "shared character sequences of length 1 to 6, averaged over rows."),
    "rouge_l_words": MetricText("ROUGE-L, words", "the same as ROUGE-L, on words."),
    "rouge_1_words": MetricText("ROUGE-1, words", "the same as ROUGE-1, on words."),
    "rouge_2_words": MetricText("ROUGE-2, words", "the same as ROUGE-2, on words."),
    "bleu_4_words": MetricText("BLEU-4, words", "the same as BLEU-4, on words."),
    "repetition": MetricText(
        "Repetition",
        "share of an answer's runs of four characters that it repeats, averaged over rows; less is better.",
        less_is_better=True,
    ),
    "looping": MetricText(
        "Looping",
        "share of answers that end in a loop, one piece four times over; less is better.",
        less_is_better=True,
    ),
    "distinct_1": MetricText("Distinct-1", "different characters as a share of all characters of all answers."),
    "distinct_2": MetricText("Distinct-2", "different pairs of characters as a share of all pairs of all answers."),
    "valid": MetricText(
        "In the labelled form", "share of answers that have the form of the labels; the others earn nothing."
    ),
    "exact": MetricText("Exact", "share of answers equal to the label; only spacing and key order of JSON are free."),
}


def metric_text(name: str) -> MetricText:
    """The words for the metric `name`; a user's own metric is called by its name."""
    return METRICS.get(name, MetricText(name, "a metric of your own, averaged over rows."))
