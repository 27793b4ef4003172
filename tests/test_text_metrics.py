"""Free text compared: against rouge_score and sacrebleu, on characters and on words, safe on empty text."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from weitiao.tasks import text
from weitiao.tasks.base import Task, add_counts
from weitiao.tasks.forms import AnswerForm
from weitiao.tasks.words import split_characters, split_words

CHAT = Task(name="chat", form=AnswerForm(shape="text"))

vocabulary = ["the", "cat", "sat", "on", "mats", "今", "天", "好", "。", "3"]
sentences = st.lists(st.sampled_from(vocabulary), max_size=12).map(" ".join)


class OurUnits:
    """The tokenizer rouge_score is given, so that only the algorithm is compared."""

    def tokenize(self, text_: str) -> list[str]:
        return text_.split("|") if text_ else []


# ---- cutting --------------------------------------------------------------------------------------------------


def test_characters_are_cjk_signs_and_runs_of_letters() -> None:
    assert split_characters("GPT-4 说：你好，world_wide！") == ["gpt", "4", "说", "你", "好", "world", "wide"]


def test_words_are_those_of_jieba_where_there_is_chinese() -> None:
    assert split_words("GPT-4 说：北京的一家书店。") == ["gpt", "4", "说", "北京", "的", "一家", "书店"]
    assert split_words("한국어 단어, カナ") == ["한국어", "단어", "カ", "ナ"]


@settings(deadline=None)
@given(st.text(alphabet="abc é.-_\n3", max_size=20))
def test_without_chinese_words_and_characters_are_the_same(text_: str) -> None:
    assert split_words(text_) == split_characters(text_)


def test_signs_are_compared_where_there_is_nothing_else() -> None:
    assert split_characters("？！ ?") == split_words("？！ ?") == ["？", "！", "?"]
    assert split_characters(" \n") == split_words("") == []


def test_the_dictionary_loads_late_without_a_warning_and_leaves_no_file(tmp_path: Any) -> None:
    code = (
        "import sys, tempfile; from weitiao.tasks import base\n"
        "assert 'jieba' not in sys.modules\n"
        "from weitiao.tasks.words import split_words\n"
        "split_words('plain words'); assert 'jieba' not in sys.modules\n"
        "print(split_words('小王在北京'))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env={"TMPDIR": str(tmp_path)}
    )
    assert (run.stdout, run.stderr, run.returncode) == ("['小王', '在', '北京']\n", "", 0)
    assert list(tmp_path.iterdir()) == []


# ---- against the reference programs ---------------------------------------------------------------------------


@settings(deadline=None)
@given(sentences, sentences)
def test_rouge_equals_rouge_score(reference: str, answer: str) -> None:
    a, b = split_characters(reference), split_characters(answer)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=OurUnits())
    theirs = scorer.score("|".join(a), "|".join(b))
    if a and b:
        assert text.rouge_l(a, b) == pytest.approx(theirs["rougeL"].fmeasure)
        assert text.rouge_n(a, b, 1) == pytest.approx(theirs["rouge1"].fmeasure)
    if len(a) > 1 and len(b) > 1:
        assert text.rouge_n(a, b, 2) == pytest.approx(theirs["rouge2"].fmeasure)


def quadratic(a: list[str], b: list[str]) -> int:
    """The textbook's longest common subsequence."""
    row = [0] * (len(b) + 1)
    for item in a:
        before = 0
        for place, other in enumerate(b, start=1):
            before, row[place] = row[place], before + 1 if item == other else max(row[place], row[place - 1])
    return row[-1]


@given(st.lists(st.sampled_from("abc"), max_size=90), st.lists(st.sampled_from("abc"), max_size=90))
def test_the_longest_common_subsequence_by_bits_is_the_one_by_table(a: list[str], b: list[str]) -> None:
    assert text.longest_common_subsequence(a, b) == quadratic(a, b)


@settings(deadline=None)
@given(st.text(alphabet="abc 今天", max_size=30), st.text(alphabet="abc 今天", max_size=30))
def test_chrf_equals_sacrebleu(reference: str, answer: str) -> None:
    if reference.split() and answer.split():
        theirs = CHRF().sentence_score(answer, [reference]).score / 100
        assert text.chrf(reference, answer) == pytest.approx(theirs, abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.tuples(sentences, sentences), min_size=1, max_size=6))
def test_bleu_of_a_set_is_the_corpus_bleu_of_sacrebleu(pairs: list[tuple[str, str]]) -> None:
    cut = [(split_characters(reference), split_characters(answer)) for reference, answer in pairs]
    figures = CHAT.summarise(add_counts([CHAT.score(reference, answer).counts for reference, answer in pairs]))
    if any(reference for reference, _ in cut) and any(answer for _, answer in cut):
        theirs = BLEU(tokenize="none", smooth_method="exp", effective_order=True).corpus_score(
            [" ".join(answer) for _, answer in cut], [[" ".join(reference) for reference, _ in cut]]
        )
        assert figures["bleu_4"] == pytest.approx(theirs.score / 100)


@settings(deadline=None)
@given(sentences, sentences)
def test_bleu_of_a_row_is_the_smoothed_sentence_bleu_of_sacrebleu(reference: str, answer: str) -> None:
    a, b = split_characters(reference), split_characters(answer)
    if a and b:
        theirs = BLEU(tokenize="none", effective_order=True).sentence_score(" ".join(b), [" ".join(a)])
        assert text.bleu(text.bleu_counts(a, b)) == pytest.approx(theirs.score / 100)


def test_bleu_of_a_set_is_not_the_mean_of_its_rows() -> None:
    rows = [CHAT.score("a b c d e f", "a b c d e f").counts, CHAT.score("u v w x y z", "r s t").counts]
    alone = [CHAT.summarise(row)["bleu_4"] for row in rows]
    together = CHAT.summarise(add_counts(rows))["bleu_4"]
    assert alone == [1, 0]
    assert together == pytest.approx(2.718281828 ** (1 - 12 / 9) * (6 / 9 * 5 / 7 * 4 / 5 * 3 / 3) ** 0.25)


# ---- one scale, safe everywhere -------------------------------------------------------------------------------


strings = st.text(alphabet="ab 今天气。!\n", max_size=24)


@settings(deadline=None)
@given(st.lists(st.tuples(strings, strings), min_size=1, max_size=4))
def test_every_figure_of_any_text_is_a_share(pairs: list[tuple[str, str]]) -> None:
    rows = [CHAT.score(gold, answer).counts for gold, answer in pairs]
    for counts in (*rows, add_counts(rows)):
        assert all(-1e-12 <= value <= 1 + 1e-12 for value in CHAT.summarise(counts).values())


@settings(deadline=None)
@given(strings)
def test_equal_texts_are_worth_one_and_nothing_is_worth_nothing(text_: str) -> None:
    closeness = [name for name in CHAT.metric_names if name.startswith(("rouge", "bleu", "chrf"))]
    same = CHAT.summarise(CHAT.score(text_, text_).counts)
    assert {name: same[name] for name in closeness} == {name: pytest.approx(1) for name in closeness}
    if text_.strip():
        for gold, answer in ((text_, ""), ("", text_)):
            other = CHAT.summarise(CHAT.score(gold, answer).counts)
            assert {name: other[name] for name in closeness} == dict.fromkeys(closeness, 0)


def test_a_refused_answer_is_no_empty_one() -> None:
    counts = {"rows": 1.0, "valid": 0.0, "exact": 0.0, **text.count(CHAT.form, "", None)}
    assert CHAT.summarise(counts)["rouge_l"] == CHAT.summarise(counts)["chrf"] == 0
    assert text.count(CHAT.form, "a b", None)["bleu_reference"] == 2  # it weighs on the BLEU of its set


def test_words_and_characters_differ_in_chinese() -> None:
    figures = CHAT.summarise(CHAT.score("我在北京大学读书", "我在北京读书").counts)
    assert figures["rouge_l"] == pytest.approx(2 * 6 / (8 + 6))
    assert figures["rouge_l_words"] < figures["rouge_l"]


# ---- loops and variety ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "share", "hangs"),
    [
        ("", 0, False),
        ("好的好的", 0, False),
        ("ha ha ha ha", 0, False),
        ("今天天气很好" * 8, 1 - 6 / 45, True),
        ("好" * 20, 1 - 1 / 17, True),
        ("好" * 20 + "。我们走吧", 1 - 5 / 21, False),
        ("the cat sat on the mat and the dog lay by the door", 0, False),
    ],
)
def test_repetition_is_the_share_of_four_grams_said_before(answer: str, share: float, hangs: bool) -> None:
    figures = CHAT.summarise(CHAT.score("x", answer).counts)
    assert figures["repetition"] == pytest.approx(share)
    assert figures["looping"] == hangs


def test_variety_counts_each_unit_of_the_set_once() -> None:
    answers = [split_characters(answer) for answer in ("a b a", "a b", "")]
    assert text.distinct(answers, 1) == 2 / 5
    assert text.distinct(answers, 2) == 2 / 3
    assert text.distinct([], 1) == 0
