"""Rounds of ChatGLM-6B and ChatGLM2: the originals' own ids, one <sop> a row, no text that becomes a control token."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from made_glm import LAYOUTS, real_renderer, renderer_named, vocabulary_folder
from test_conversation import CALL, TALK, TALK_REPLY, TOOL_TALK, WEATHER, learnt_runs, say
from weitiao.check.examine import check_subject, find_subject
from weitiao.data.formats import row_to_record
from weitiao.data.records import Record
from weitiao.errors import RenderError
from weitiao.generate.constraint import compiler_of
from weitiao.models.opening import open_renderer
from weitiao.render.base import Renderer
from weitiao.render.rounds import RoundsRenderer
from weitiao.render.spelling import respelled_characters, spelling_note
from weitiao.render.tools import tools_as_text
from weitiao.tasks.base import infer_tasks

GetRenderer = Callable[[str], RoundsRenderer]
CASES = ("chatglm made", "chatglm2 made", "chatglm real", "chatglm2 real")
CHARACTERS = st.characters(exclude_categories=("Cs",), exclude_characters="\ufffd▁")
CONTROL = ("<sop>", "<eop>", "[gMASK]", "[MASK]", "sop", "eop", "</s>", "<s>", "<pad>", "<unk>", "<|user|>")
TEXTS = st.lists(st.one_of(st.text(CHARACTERS, max_size=8), st.sampled_from(CONTROL)), max_size=6).map("".join)


@pytest.fixture
def named(request: pytest.FixtureRequest) -> GetRenderer:
    return lambda name: renderer_named(name, request)  # type: ignore[no-any-return]


@pytest.fixture(params=CASES)
def renderer(request: pytest.FixtureRequest, named: GetRenderer) -> RoundsRenderer:
    return named(request.param)


def goldens(layout: Any, shared: Path) -> Any:
    return json.loads((vocabulary_folder(layout, shared) / "goldens.json").read_text(encoding="utf-8"))


def control_ids(renderer: Renderer) -> dict[str, int]:
    return {
        token.content.removeprefix("▁"): i
        for i, token in renderer.tokenizer.added_tokens_decoder.items()
        if token.special
    }


# ---- the originals' ids ----------------------------------------------------------------------------------------------


def test_chatglm2_prompts_are_the_original_ones(named: GetRenderer, shared_or_skip: Path) -> None:
    renderer = named("chatglm2 real")
    for case in goldens("chatglm2", shared_or_skip)["prompts"]:
        talk = [say(role, text) for pair in case["history"] or () for role, text in zip(("user", "assistant"), pair)]
        assert list(renderer.render_prompt([*talk, say("user", case["query"])])) == case["ids"]


def test_a_row_of_the_first_seed_has_the_ids_printed_there(named: GetRenderer, shared_or_skip: Path) -> None:
    """The row that the seed prints: question, [gMASK] <sop>, answer <eop>, labels from <sop> on."""
    row = goldens("chatglm", shared_or_skip)["seed_example"]
    question, answer = say("user", row["prompt"] + " "), say("assistant", row["answer"])
    (example,) = named("chatglm real").render_conversation([question], answer)
    assert list(example.token_ids) == [*row["prompt_ids"], 130001, 130004, *row["answer_ids"], 130005]
    assert example.token_ids[: len(row["ids"])] == tuple(i for i in row["ids"] if i != 3)
    assert list(example.loss_mask).index(True) == example.token_ids.index(130004)


def test_chatglm_counts_rounds_from_0_and_asks_a_first_question_as_it_is(named: GetRenderer) -> None:
    renderer = named("chatglm made")
    talk = [say("user", "在吗"), say("assistant", "在"), say("user", "好")]
    written = renderer.read_inside(renderer.render_prompt(talk))
    assert written == " [Round 0]\n问：在吗\n答：在\n[Round 1]\n问：好\n答：[gMASK]<sop>"
    assert renderer.read_inside(renderer.render_prompt(talk[:1])) == " 在吗[gMASK]<sop>"


def test_chatglm_rounds_have_the_original_ids(named: GetRenderer, shared_or_skip: Path) -> None:
    golden = goldens("chatglm", shared_or_skip)["texts"]["round"]
    first, second = golden["text"].split("\n[Round 1]\n问：")
    question, answer = first.removeprefix("[Round 0]\n问：").split("\n答：")
    talk = [say("user", question), say("assistant", answer), say("user", second.removesuffix("\n答："))]
    assert list(named("chatglm real").render_prompt(talk)) == golden["ids"]


# ---- what is learnt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "opening"), [("chatglm made", ["<sop>"]), ("chatglm2 made", [])])
def test_the_family_learns_sop_with_the_answer_and_chatglm2_the_answer_alone(
    named: GetRenderer, name: str, opening: list[str]
) -> None:
    renderer = named(name)
    question, answer = [say("user", "什么颜色？")], say("assistant", "绿色")
    (family,) = renderer.render_conversation(question, answer)
    (bare,) = renderer.render_conversation(question, answer, masks="answer")
    assert family.token_ids == bare.token_ids == renderer.render_prompt(question) + renderer.render_answer("绿色")
    assert bare.num_supervised == bare.num_answer == len(renderer.render_answer("绿色"))
    extra = [i for i, one, other in zip(family.token_ids, family.loss_mask, bare.loss_mask) if one != other]
    assert extra == [control_ids(renderer)[token] for token in opening]


def test_each_learnt_reply_makes_an_example_behind_the_very_prompt_that_asks_for_it(renderer: RoundsRenderer) -> None:
    """And a row has exactly one <sop>, which is where ChatGLM-6B's context ends."""
    whole = (*TALK, TALK_REPLY)
    examples = renderer.render_conversation(TALK, TALK_REPLY, turns="all", masks="answer")
    expected = [(renderer.render_prompt(whole[:at]), renderer.render_reply(whole[:at], whole[at])) for at in (2, 4, 6)]
    assert [run for example in examples for run in learnt_runs([example])] == expected
    start = control_ids(renderer).get("<sop>", control_ids(renderer).get("sop"))
    assert all(example.token_ids.count(start) == 1 for example in examples)


def test_a_system_message_stands_before_the_rounds_and_tools_are_told_in_text(named: GetRenderer) -> None:
    renderer = named("chatglm2 made")
    asked = [say("system", "你是助手。"), say("user", "在吗")]
    assert renderer.read_inside(renderer.render_prompt(asked)) == (
        "[gMASK]sop 你是助手。\n\n[Round 1]\n\n问：在吗\n\n答："
    )
    told = tools_as_text(TOOL_TALK, [WEATHER])
    assert renderer.render_prompt(TOOL_TALK, [WEATHER]) == renderer.render_prompt(told)
    reply = renderer.render_reply(TOOL_TALK[:1], say("assistant", "好。", CALL), [WEATHER])
    assert renderer.read_answer(reply, [WEATHER]) == tools_as_text([say("assistant", "好。", CALL)], ())[0].text


def test_what_is_no_round_is_refused(named: GetRenderer) -> None:
    with pytest.raises(RenderError, match="must end with a message of the user"):
        named("chatglm made").render_prompt([say("user", "a"), say("assistant", "b")])
    with pytest.raises(RenderError, match="a question and an answer in turn, not user, user"):
        named("chatglm made").render_prompt([say("user", "a"), say("user", "b")])


def test_another_models_vocabulary_is_refused(named: GetRenderer) -> None:
    with pytest.raises(RenderError, match=r"no token '<eop>'.*download the model's own tokenizer files"):
        RoundsRenderer(named("chatglm2 made").tokenizer, layout="chatglm")


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_a_tokenizer_saved_in_transformers_layout_is_asked_as_the_original(
    layout: Any, shared_or_skip: Path, tmp_path: Path
) -> None:
    renderer = real_renderer(layout, shared_or_skip)
    renderer.tokenizer.save_pretrained(tmp_path)
    config = {"model_type": "chatglm" if layout == "chatglm" else "glm"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(renderer.stop_ids)}))
    saved = open_renderer(str(tmp_path))
    for talk in (TALK, TALK[:2]):
        assert saved.render_prompt(talk) == renderer.render_prompt(talk)
    assert saved.render_answer("好 b")[:-1] == renderer.render_answer("好 b")[:-1]
    assert set(saved.stop_ids) == set(renderer.stop_ids)


# ---- texts -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=TEXTS, earlier=TEXTS, answer=TEXTS)
def test_no_text_becomes_a_control_token(renderer: RoundsRenderer, question: str, earlier: str, answer: str) -> None:
    talk = [say("user", question), say("assistant", earlier), say("user", answer)]
    (example,) = renderer.render_conversation(talk, say("assistant", answer), turns="last")
    control = control_ids(renderer)
    found = [i for i in example.token_ids if i in control.values() and i != control.get("<unk>")]
    start, end = ("<sop>", "<eop>") if "<eop>" in control and "<sop>" in control else ("sop", "</s>")
    assert found == [control["[gMASK]"], control[start], control[end]]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answer=TEXTS)
@pytest.mark.parametrize("name", ["chatglm made", "chatglm2 made", "chatglm2 real"])
def test_every_answer_reads_back_as_it_was_written(named: GetRenderer, name: str, answer: str) -> None:
    renderer = named(name)
    assert renderer.read_answer(renderer.render_answer(answer)) == answer


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('```json\n[{"主语": "九玄珠", "n": 1.5}]\n```', None),
        ("😀🎉 a  b\t\tc\n\n  d", None),
        ("“引号”、《书》。", None),
        ("你好，世界！（是？）：；", "你好,世界!(是?):;"),
        ("ＡＢＣ１２３", "ABC123"),
        ("…½", "...1⁄2"),
        (" 一个空格 ", "一个空格"),
        ("<n><|tab|><|blank_3|>", "\n\t   "),
    ],
)
def test_chatglms_vocabulary_normalises_answers(named: GetRenderer, written: str, read: str | None) -> None:
    renderer = named("chatglm real")
    assert renderer.read_answer(renderer.render_answer(written)) == (written if read is None else read)


def test_answers_that_are_learnt_in_another_spelling_are_told(named: GetRenderer) -> None:
    rows = [{"context": "问题", "target": target} for target in ("你好。", "好，好（一）", "是，不")]
    records = [
        row_to_record(row, f"rows.jsonl:{place}", require_target=True) for place, row in enumerate(rows, start=1)
    ]
    assert all(isinstance(record, Record) for record in records)
    (task,) = infer_tasks(records)  # type: ignore[arg-type]
    note = spelling_note(records, [task] * 3, named("chatglm real"))  # type: ignore[arg-type]
    assert "writes '（' as '(', '）' as ')', '，' as ','. 2 answers are learnt" in note
    assert "rows.jsonl:2, rows.jsonl:3" in note and "rows.jsonl:1" not in note
    assert spelling_note(records, [task] * 3, named("chatglm2 real")) == ""  # type: ignore[arg-type]
    assert respelled_characters(named("chatglm2 real"), "，（ａ\n\t ") == {}


def test_check_names_answers_that_the_models_tokenizer_spells_otherwise(named: GetRenderer, tmp_path: Path) -> None:
    backend = deepcopy(named("chatglm2 made").tokenizer.backend_tokenizer)
    backend.normalizer = normalizers.Sequence([normalizers.Replace("，", ","), normalizers.Prepend(" ")])
    backend.save(str(tmp_path / "tokenizer.json"))
    rows = [{"context": f"问题{number}", "target": target} for number, target in enumerate(["好，好", "好", "是，"])]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    found = check_subject(find_subject([str(tmp_path / "rows.jsonl"), f"model={tmp_path}"]))
    (finding,) = [one for one in found.findings if one.code == "tokenizer-spelling"]
    assert finding.grade == "note" and "writes '，' as ','" in finding.message
    assert [source.rpartition(":")[2] for source in finding.sources] == ["1", "3"]


# ---- answers that are held to a grammar ------------------------------------------------------------------------------

HELD = (
    ('start: "```json\\n[" A "]\\n```"\nA: "\\"水果\\"" | "\\"手机\\""', '```json\n["手机"]\n```'),
    ("start: A\nA: /[^\\n]{1,30}/", "😀 你好 b"),
    ('start: "水果" | "手机"', "手机"),
)


@pytest.mark.parametrize(("grammar", "answer"), HELD)
def test_a_grammar_holds_the_answer_behind_the_blank_of_its_first_token(
    renderer: RoundsRenderer, grammar: str, answer: str
) -> None:
    ids = renderer.render_answer(answer)
    compiler = compiler_of(renderer, max(renderer.tokenizer.get_vocab().values()) + 1)
    constraint = compiler.compile(grammar, before=renderer.before_answer())
    for token in ids[:-1]:
        forced = constraint.forced()
        assert forced[:1] in ([], [token])
        assert token in constraint.allowed(), constraint.why()
        assert constraint.advance(token)
    assert constraint.accepting
    assert ids[-1] in constraint.allowed()
    assert renderer.read_answer(ids) == answer
