"""Confidence of answers and values: which tokens count, at the edges above all; which values are right."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weitiao.errors import FormError
from weitiao.evaluate.confidence import Token, answer_confidence, field_confidences
from weitiao.evaluate.right_values import right_values
from weitiao.generate.chat import reply_all
from weitiao.generate.engine import Sampling
from weitiao.messages import Message
from weitiao.models.opening import open_model
from weitiao.tasks.fields import Bounds
from weitiao.tasks.forms import AnswerForm, Field
from weitiao.tasks.grammar import form_grammar
from weitiao.tasks.value_spans import value_spans

PEOPLE = AnswerForm(
    shape="object list",
    fields=(Field(key="name", kind="null|string"), Field(key="age", kind="number")),
)
TOPICS = AnswerForm(shape="label list", labels=("手机", "水果"))
TOPIC = AnswerForm(shape="label", labels=("手", "手机"))


def tokens_of(*pieces: tuple[str, float]) -> tuple[str, list[Token]]:
    """The text of the pieces, each a token of the given probability, and the tokens."""
    text, tokens = "", []
    for piece, probability in pieces:
        tokens.append((len(text), len(text) + len(piece), math.log(probability)))
        text += piece
    return text, tokens


def by_path(form: AnswerForm, text: str, tokens: list[Token]) -> dict[str, float]:
    return {one.path: one.confidence for one in field_confidences(form, text, tokens)}


def test_a_value_counts_every_token_with_a_character_of_it() -> None:
    text, tokens = tokens_of(
        ('[{"', 1.0), ("name", 1.0), ('": "张', 0.5), ("三", 0.8), ('", "', 0.9), ("age", 1.0), ('": ', 1.0),
        ("4", 0.7), ("2", 0.6), ("}", 0.75), ("]", 0.3), ("", 1.0),
    )  # fmt: skip
    found = by_path(PEOPLE, text, tokens)
    assert found == {
        "[0].name": pytest.approx(0.5 * 0.8 * 0.9),
        "[0].age": pytest.approx(0.7 * 0.6 * 0.75),  # "}" and no third digit
    }
    assert [one.value for one in field_confidences(PEOPLE, text, tokens)] == ["张三", "42"]
    whole = 0.5 * 0.8 * 0.9 * 0.7 * 0.6 * 0.75 * 0.3
    assert answer_confidence(tokens) == pytest.approx(whole)  # "]", no second person, too


def test_a_token_that_closes_more_than_the_value_counts_whole() -> None:
    text, tokens = tokens_of(('["', 1.0), ("手机", 0.9), ('", "', 0.8), ("水果", 0.7), ('"]', 0.6), ("", 0.5))
    assert by_path(TOPICS, text, tokens) == {"[0]": pytest.approx(0.9 * 0.8), "[1]": pytest.approx(0.7 * 0.6)}
    assert answer_confidence(tokens) == pytest.approx(0.9 * 0.8 * 0.7 * 0.6 * 0.5)


def test_an_opening_quotation_mark_decides_something_only_where_there_need_be_none() -> None:
    text, tokens = tokens_of(
        ('{"a":', 1.0), (' "', 0.5), ("x", 0.9), ('", "b": ["', 0.8), ("y", 0.7), ('"', 0.6), ("]}", 1.0)
    )  # fmt: skip
    for kind, opened in (("string", 1.0), ("null|string", 0.5)):
        form = AnswerForm(shape="object", fields=(Field(key="a", kind=kind), Field(key="b", kind="list of strings")))
        assert by_path(form, text, tokens) == {"a": pytest.approx(opened * 0.9 * 0.8), "b[0]": pytest.approx(0.7 * 0.6)}


def test_an_empty_string_is_its_closing_quotation_mark() -> None:
    text, tokens = tokens_of(('["', 0.5), ('"', 0.9), ("]", 0.8))
    assert by_path(AnswerForm(shape="string list"), text, tokens) == {"[0]": pytest.approx(0.9)}


def test_whether_a_list_goes_on_is_no_business_of_its_values() -> None:
    text, tokens = tokens_of(('["', 1.0), ("手机", 0.9), ('"', 0.8), ("]", 0.1), ("", 1.0))
    assert by_path(TOPICS, text, tokens) == {"[0]": pytest.approx(0.9 * 0.8)}


def test_null_instead_of_a_string_is_decided_by_its_first_token_and_ends_itself() -> None:
    text, tokens = tokens_of(
        ('[{"name":', 1.0), (" null", 0.2), (",", 0.9), (' "age": ', 1.0), ("7", 0.5), ("}]", 0.4), ("", 1.0)
    )
    assert by_path(PEOPLE, text, tokens) == {"[0].name": pytest.approx(0.2), "[0].age": pytest.approx(0.5 * 0.4)}


def test_a_label_ends_where_the_answer_does() -> None:
    text, tokens = tokens_of(("手", 0.9), ("", 0.25))
    [field] = field_confidences(TOPIC, text, tokens)
    assert (field.path, field.value) == ("", "手") and field.confidence == pytest.approx(0.9 * 0.25)
    assert field.confidence == answer_confidence(tokens)


def test_free_text_is_as_probable_as_the_answer() -> None:
    text, tokens = tokens_of(("你", 0.5), ("好。", 0.5), ("", 0.5))
    [field] = field_confidences(AnswerForm(shape="text"), text, tokens)
    assert field.confidence == answer_confidence(tokens) == pytest.approx(0.125)
    assert by_path(AnswerForm(shape="text"), "", [(0, 0, math.log(0.5))]) == {"": pytest.approx(0.5)}


def test_tokens_that_spell_one_character_together_all_count() -> None:
    shared = [(0, 2, 0.0), (2, 3, math.log(0.9)), (2, 3, math.log(0.8)), (2, 3, math.log(0.7)), (3, 4, 0.0)]
    tokens = [*shared, (4, 5, 0.0), (5, 6, 0.0), (6, 6, 0.0)]
    assert by_path(TOPICS, '["手机"]', tokens)["[0]"] == pytest.approx(0.9 * 0.8 * 0.7)
    bare = [(start, start if number in (1, 2) else end, logprob) for number, (start, end, logprob) in enumerate(tokens)]
    assert by_path(TOPICS, '["手机"]', bare)["[0]"] == pytest.approx(0.9 * 0.8 * 0.7)


@given(st.lists(st.sampled_from(["手机", "水果"]), max_size=4), st.data())
def test_any_cut_of_a_text_into_tokens_counts_what_a_plain_search_counts(
    labels: list[str], data: st.DataObject
) -> None:
    text = TOPICS.write(labels)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text) - 1)))) if len(text) > 1 else []
    edges = [0, *cuts, len(text)]
    logprobs = data.draw(st.lists(st.floats(-9, 0), min_size=len(edges), max_size=len(edges)))
    tokens = [(start, end, logprob) for start, end, logprob in zip(edges, [*edges[1:], len(text)], logprobs)]
    found = field_confidences(TOPICS, text, tokens)
    assert [(one.path, one.value) for one in found] == [(f"[{number}]", label) for number, label in enumerate(labels)]
    for one, span in zip(found, value_spans(TOPICS, text), strict=True):
        decided = range(span.start + 1, span.end)  # from the first letter to the quotation mark that closes
        touching = [lp for start, end, lp in tokens if any(start <= place < end for place in decided)]
        assert one.confidence == pytest.approx(math.exp(sum(touching)))
        assert one.confidence >= answer_confidence(tokens) * (1 - 1e-12)


def test_probabilities_stay_within_0_and_1() -> None:
    assert answer_confidence([(0, 1, 1e-7)]) == 1.0
    assert answer_confidence([(place, place + 1, -80.0) for place in range(50)]) == 0.0


def test_tokens_of_another_text_are_refused() -> None:
    text, tokens = tokens_of(('["', 1.0), ("手机", 0.9), ('"]', 0.6))
    with pytest.raises(ValueError, match="No token holds character 5 of 6"):
        field_confidences(TOPICS, text, tokens[:-1])
    with pytest.raises(ValueError, match="order"):
        field_confidences(TOPICS, text, tokens[::-1])
    with pytest.raises(ValueError, match="No token holds character 2 of 6"):
        field_confidences(TOPICS, text, [(0, 1, 0.0), *tokens[1:]])
    with pytest.raises(ValueError, match="without tokens"):
        answer_confidence([])


def test_an_answer_without_the_form_has_no_values() -> None:
    with pytest.raises(FormError):
        field_confidences(TOPICS, '["手', tokens_of(('["手', 1.0))[1])


def test_the_chance_of_a_value_is_that_of_drawing_it_again() -> None:
    """Labels drawn token by token: among all draws, the confidence of a label is how often it was drawn."""
    draw, counts, confidence = random.Random(0), {"手": 0, "手机": 0}, {}
    for _ in range(4000):
        going_on = draw.random() < 0.3
        text, tokens = tokens_of(("手", 1.0), ("机", 0.3), ("", 1.0)) if going_on else tokens_of(("手", 1.0), ("", 0.7))
        [field] = field_confidences(TOPIC, text, tokens)
        counts[field.value] += 1
        confidence[field.value] = field.confidence
    assert all(confidence[label] == pytest.approx(count / 4000, abs=0.03) for label, count in counts.items())


def test_replies_of_a_model_held_to_a_form_have_confidences(tiny_llama_folder: Path) -> None:
    """Byte by byte, with forced tokens, characters of several tokens and tokens across the edges of values."""
    opened = open_model(str(tiny_llama_folder))
    names = Field(key="名字", kind="string", copied_share=1.0, bounds=Bounds(max_length=8))
    form = AnswerForm(shape="object list", fields=(names, Field(key="age", kind="number")), min_items=1, max_items=3)
    texts = ["小王在北京上班。", "🙂 Ada lives in London.", "他喜欢读历史小说"] * 2
    replies = list(
        reply_all(
            opened.model,
            opened.renderer,
            [[Message(role="user", text=f"{number} {text}")] for number, text in enumerate(texts)],
            sampling=Sampling(max_new_tokens=400, temperature=1.0),
            grammars=[form_grammar(form, text) for text in texts],
        )
    )
    values = []
    for reply in replies:
        assert reply.finish == "stop", reply.refusal
        assert answer_confidence(reply.tokens) == pytest.approx(math.exp(reply.logprob))
        found = field_confidences(form, reply.text, reply.tokens)
        assert len(found) == 2 * len(form.parse(reply.text))
        assert all(answer_confidence(reply.tokens) * (1 - 1e-9) <= one.confidence <= 1 for one in found)
        values += [one.confidence for one in found]
    assert len(set(values)) > len(values) / 2, "a random model is never sure"


# ---- which values are right -----------------------------------------------------------------------------------


def test_an_object_is_held_against_the_gold_object_most_like_it() -> None:
    gold = [{"name": "张三", "age": 42}, {"name": "李四", "age": 7}, {"name": None, "age": 1}]
    text = '[{"name": "李四", "age": 8}, {"age": 42, "name": "张三"}, {"name": "王五", "age": 42}]'
    assert right_values(PEOPLE, gold, text) == {
        "[0].name": True, "[0].age": False, "[1].age": True, "[1].name": True, "[2].name": False, "[2].age": False,
    }  # fmt: skip


def test_objects_with_fewer_keys_than_the_gold_ones_are_held_against_them_too() -> None:
    form = AnswerForm(shape="object list", fields=(Field(key="name", kind="string"),))
    assert right_values(form, [{"name": "李四", "age": 7}], '[{"name": "张三"}, {"name": "李四"}]') == {
        "[0].name": False, "[1].name": True,
    }  # fmt: skip


def test_lists_inside_fields_are_sets() -> None:
    form = AnswerForm(
        shape="object",
        fields=(Field(key="skills", kind="list of strings"), Field(key="more", kind="list|list of strings|object")),
    )
    gold = {"skills": ["Go", "SQL"], "more": {"a": [1, {"b": 2}]}}
    text = '{"skills": ["SQL", "C"], "more": {"a": [1, {"b": 3, "c": 2}], "d": 0}}'
    assert right_values(form, gold, text) == {
        "skills[0]": True, "skills[1]": False, "more.a[0]": True, "more.a[1].b": False, "more.a[1].c": False,
        "more.d": False,
    }  # fmt: skip
    assert right_values(form, {"skills": [], "more": []}, '{"skills": [], "more": {}}') == {
        "skills": True, "more": False,
    }  # fmt: skip


def test_an_exact_answer_has_only_right_values() -> None:
    answer = [{"name": "张三", "age": 1}, {"name": "张三", "age": 1}, {"name": None, "age": 2}]
    assert set(right_values(PEOPLE, answer, PEOPLE.write(answer)).values()) == {True}
    assert right_values(TOPIC, "手机", "手机") == {"": True} and right_values(TOPIC, "手", "手机") == {"": False}
