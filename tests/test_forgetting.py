"""The forgetting probe: reading questions, likelihoods of choices, accuracy by category, before and after."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from weitiao.errors import DataError, ModelError
from weitiao.evaluate.forgetting import ProbeScore, compare_probe, probe_change, score_probe, wilson_interval
from weitiao.evaluate.probe_questions import Question, read_probe
from weitiao.messages import Message
from weitiao.models.opening import OpenModel, open_model
from weitiao.recipe import Lora
from weitiao.tuning.methods import add_adapter

QUESTIONS = (
    Question(source="q:1", category="sums", text="What is 7 × 8?", choices=("54", "fifty-six", "a number"), right=1),
    Question(
        source="q:2", category="towns", text="小王住在哪里？\nA. 北京\nB. 上海\n答案：", choices=("A", "B"), right=0
    ),
    Question(source="q:3", category="towns", text="谁住在北京？", choices=("小王", "小王和老李的女儿", "李"), right=0),
    Question(source="q:4", category="sums", text="1 + 1 =", choices=("2", "11"), right=0),
)


@pytest.fixture(scope="module", params=["tiny_llama_folder", "tiny_qwen2_folder", "tiny_gemma3_folder"])
def opened(request: pytest.FixtureRequest) -> OpenModel:
    return open_model(str(request.getfixturevalue(request.param)), dtype="float32", device="cpu")


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- reading --------------------------------------------------------------------------------------------------


def test_three_spellings_of_a_question_are_understood(tmp_path: Path) -> None:
    path = write(
        tmp_path / "probe.jsonl",
        {"question": "7 × 8?", "choices": ["54", "56"], "answer": 1, "category": "sums", "source": "x"},
        {"question": "7 × 8?", "choices": ["54", "56"], "answer": "B"},
        {"question": "7 × 8?", "choices": ["54", "56"], "answer": " 56 "},
        {"id": 3, "question": "哪个更大？", "A": "一", "B": "二", "C": "三", "answer": "C", "subject": "数"},
        {"question": "Which?", "A": 1, "B": 2.5, "answer": "A"},
        {"question": "哪一项？\nA. 木头\nB．狗\n（C）云\n答案：", "answer": "B", "source": "zh"},
        {"question": "哪一项？\\nA. 木头\\nB. 狗\\n答案：", "answer": "B"},
    )
    with path.open("a", encoding="utf-8") as file:
        file.write("\n  \n")
    found = read_probe(path)
    assert [(question.choices, question.right, question.category) for question in found] == [
        (("54", "56"), 1, "sums"),
        (("54", "56"), 1, "all"),
        (("54", "56"), 1, "all"),
        (("A", "B", "C"), 2, "数"),
        (("A", "B"), 0, "all"),
        (("A", "B", "C"), 1, "zh"),
        (("A", "B"), 1, "all"),
    ]
    assert found[3].text == "哪个更大？\nA. 一\nB. 二\nC. 三\n答案："
    assert found[4].text == "Which?\nA. 1\nB. 2.5\nAnswer:"
    assert found[6].text == "哪一项？\\nA. 木头\\nB. 狗\\n答案："
    assert found[6].source == "probe.jsonl:7"


def test_every_line_that_is_no_question_is_named_with_field_and_fix(tmp_path: Path) -> None:
    path = write(
        tmp_path / "probe.jsonl",
        {"question": "?", "choices": ["a", "b"], "answer": "a"},
        ["?"],
        {"question": " ", "choices": ["a", "b"], "answer": "a"},
        {"question": "?", "choices": ["a", "b"]},
        {"question": "?", "answer": "A"},
        {"question": "?", "choices": ["a"], "answer": "a"},
        {"question": "?", "choices": ["a", "a "], "answer": "a"},
        {"question": "?", "choices": ["a", 3], "answer": "a"},
        {"question": "?", "choices": ["a", "b"], "answer": 2},
        {"question": "?", "choices": ["a", "b"], "answer": True},
        {"question": "?", "choices": ["B", "A"], "answer": "A"},
        {"question": "?", "A": "x", "B": "y", "answer": "C"},
        {"question": "?", "A": "x", "B": None, "answer": "A"},
    )
    with path.open("a", encoding="utf-8") as file:
        file.write("{\n")
    with pytest.raises(DataError) as error:
        read_probe(path)
    problems = error.value.problems
    assert [(problem.source.rpartition(":")[2], problem.field) for problem in problems] == [
        ("2", "row"), ("3", "question"), ("4", "answer"), ("5", "choices"), ("6", "choices"), ("7", "choices"),
        ("8", "choices"), ("9", "answer"), ("10", "answer"), ("11", "answer"), ("12", "answer"), ("13", "B"),
        ("14", "row"),
    ]  # fmt: skip
    assert str(problems[9]) == (
        "probe.jsonl:11: answer: 'A' may mean two of the choices. "
        "Fix: Give its text, its letter (A–B) or its number from 0 (at most 1)."
    )


def test_a_file_without_questions_or_without_a_place_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read"):
        read_probe(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"holds no questions"):
        read_probe(write(tmp_path / "empty.jsonl"))


def test_the_shared_probe_is_read_whole() -> None:
    path = Path(__file__).parents[2] / "shared" / "data" / "forgetting_probe" / "questions.jsonl"
    if not path.is_file():
        pytest.skip(f"the shared probe {path} is absent")
    found = read_probe(path)
    assert len(found) == len(path.read_text(encoding="utf-8").splitlines())
    assert all(2 <= len(question.choices) <= 4 for question in found)


# ---- likelihoods ----------------------------------------------------------------------------------------------


def alone(opened: OpenModel, question: Question, choice: str) -> float:
    """The log-likelihood of a choice, from the logits of all positions of one sequence without padding."""
    prompt = opened.renderer.render_prompt([Message(role="user", text=question.text)])
    end = len(opened.renderer.render_answer(""))
    blank = " " if not opened.renderer.template and question.text[-1] in "?=" else ""
    ids = list(opened.renderer.render_answer(blank + choice))[:-end]
    with torch.inference_mode():
        logits = opened.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].float().log_softmax(-1)
    return sum(float(logits[len(prompt) + place - 1, token]) for place, token in enumerate(ids))


@pytest.mark.parametrize("batch_tokens", [1, 100, 4096])
def test_batched_likelihoods_are_those_of_each_choice_alone(opened: OpenModel, batch_tokens: int) -> None:
    score = score_probe(opened.model, opened.renderer, QUESTIONS, batch_tokens=batch_tokens)
    for question, answer in zip(QUESTIONS, score.answers, strict=True):
        expected = [alone(opened, question, choice) for choice in question.choices]
        assert answer.log_likelihoods == pytest.approx(expected, abs=1e-4)
        by_length = [value / len(choice.encode()) for value, choice in zip(expected, question.choices, strict=True)]
        assert answer.chosen == by_length.index(max(by_length))
        assert answer.chosen_raw == expected.index(max(expected))
        assert answer.right_probability == pytest.approx(
            math.exp(expected[question.right]) / sum(map(math.exp, expected)), rel=1e-3
        )


def test_letters_share_one_sequence_and_progress_is_told(opened: OpenModel) -> None:
    told: list[tuple[int, int]] = []
    score_probe(opened.model, opened.renderer, QUESTIONS[1:2], on_questions=lambda done, of: told.append((done, of)))
    assert told == [(1, 1)]


def test_accuracy_is_counted_by_category(opened: OpenModel) -> None:
    score = score_probe(opened.model, opened.renderer, QUESTIONS)
    assert [(part.name, part.rows) for part in (score.overall, *score.categories)] == [
        ("all", 4), ("sums", 2), ("towns", 2)
    ]  # fmt: skip
    right = [answer.chosen == answer.right for answer in score.answers]
    assert score.overall.accuracy == sum(right) / 4
    assert score.categories[0].accuracy == (right[0] + right[3]) / 2
    assert score.categories[0].chance == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert score.overall.interval == wilson_interval(sum(right), 4)
    assert json.loads(json.dumps(score.to_json()))["overall"]["rows"] == 4


def test_a_model_that_was_taught_an_answer_gives_it(opened: OpenModel) -> None:
    """The figure follows what the model knows: a head that favours one token makes its letter the answer."""
    letter = opened.renderer.render_answer("B")[0]
    direction = torch.zeros(opened.model.config.vocab_size)
    direction[letter] = 50.0
    hook = opened.model.get_output_embeddings().register_forward_hook(  # type: ignore[operator]
        lambda _module, _args, logits: logits + direction
    )
    try:
        score = score_probe(opened.model, opened.renderer, QUESTIONS[1:2])
    finally:
        hook.remove()
    assert score.answers[0].chosen == 1
    assert score.overall.right_probability < 0.01


def test_questions_that_do_not_fit_the_model_are_named_before_anything_runs(opened: OpenModel) -> None:
    long = Question(source="q:9", category="all", text="字" * 2000, choices=("a", "b"), right=0)
    with pytest.raises(DataError, match=r"1 of 2 questions cannot be asked of this model\.\n  q:9: question: It takes"):
        score_probe(opened.model, opened.renderer, [QUESTIONS[0], long])


def test_a_model_in_training_mode_is_refused(opened: OpenModel) -> None:
    opened.model.train()
    try:
        with pytest.raises(ModelError, match="training mode"):
            score_probe(opened.model, opened.renderer, QUESTIONS)
    finally:
        opened.model.eval()


# ---- before and after -----------------------------------------------------------------------------------------


def test_before_is_the_model_without_its_adapter(tiny_qwen2_folder: Path) -> None:
    opened = open_model(str(tiny_qwen2_folder), dtype="float32", device="cpu")
    plain = score_probe(opened.model, opened.renderer, QUESTIONS)
    with pytest.raises(ModelError, match="has no adapter"):
        compare_probe(opened.model, opened.renderer, QUESTIONS)
    model = add_adapter(opened.model, Lora(rank=4), seed=0)  # type: ignore[arg-type]
    assert isinstance(model, PeftModel)
    model.eval()
    fresh = compare_probe(model, opened.renderer, QUESTIONS)
    assert fresh.before == plain
    assert (fresh.change, fresh.interval, fresh.lost, fresh.gained, fresh.forgotten) == (0, (0, 0), (), (), False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(1))
    changed = compare_probe(model, opened.renderer, QUESTIONS)
    assert changed.before == plain
    assert changed.after.answers != plain.answers
    assert changed.change == changed.after.overall.accuracy - plain.overall.accuracy
    assert changed.change == (len(changed.gained) - len(changed.lost)) / 4


def scored(opened: OpenModel, right: list[bool]) -> ProbeScore:
    """A score of so many two-choice questions, answered as `right` says."""
    from weitiao.evaluate.forgetting import _answer, _part

    questions = [
        Question(source=f"q:{n}", category="c", text="?", choices=("A", "B"), right=0) for n in range(len(right))
    ]
    answers = tuple(_answer(q, (-1.0, -2.0) if ok else (-2.0, -1.0)) for q, ok in zip(questions, right, strict=True))
    part = _part("all", questions, answers)
    return ProbeScore(overall=part, categories=(part,), answers=answers)


def test_a_loss_beyond_chance_is_called_forgotten(opened: OpenModel) -> None:
    before = scored(opened, [True] * 60 + [False] * 40)
    worse = probe_change(before, scored(opened, [True] * 35 + [False] * 65))
    assert worse.change == pytest.approx(-0.25)
    assert len(worse.lost) == 25
    assert worse.interval == pytest.approx((-0.335, -0.165), abs=0.01)
    assert worse.forgotten
    swapped = probe_change(before, scored(opened, [True] * 57 + [False] * 3 + [True, True] + [False] * 38))
    assert (len(swapped.lost), len(swapped.gained), swapped.forgotten) == (3, 2, False)
    with pytest.raises(DataError, match="different questions"):
        probe_change(before, scored(opened, [True] * 99))


def test_wilsons_interval_stays_within_bounds_and_holds_the_share() -> None:
    assert wilson_interval(0, 5)[0] == 0
    assert wilson_interval(5, 5)[1] == 1
    low, high = wilson_interval(50, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
