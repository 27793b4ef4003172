"""Chat formats: what is trained is what is asked, and no text can step out of its message."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from conftest import CORPUS, make_tokenizer
from weitiao.data.formats import row_to_record
from weitiao.data.records import Record
from weitiao.errors import DataError, RenderError
from weitiao.messages import Message
from weitiao.render.fitting import fit_rows, shorten_record
from weitiao.render.preview import colour_example
from weitiao.render.template import TemplateRenderer
from weitiao.tasks.base import Task, infer_tasks

TURNS_TEMPLATE = (  # trims what people write, names the assistant otherwise, knows no system: as Gemma's does
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
INST_TEMPLATE = (  # blanks around the answer and no control token of its own: as Llama 2's
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }} {{ eos_token }}"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)


def metaspace_tokenizer(scheme: str, template: str | None, *, newlines: bool) -> PreTrainedTokenizerBase:
    """A SentencePiece-like tokenizer: ▁ for blanks, one put before a text as `scheme` says, bytes for rare characters.

    With `newlines`, line breaks are common enough in its training text to be merged with their neighbours.
    """
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    corpus = [f"{line}\n\n{line}\n" if newlines else line.replace("\n", " ") for line in CORPUS]
    special = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=700, special_tokens=special + bytes_, show_progress=False)
    )
    state = json.loads(
        backend.to_str()
    )  # the bytes are ordinary tokens, the trainer only knows how to add special ones
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


@dataclass(frozen=True)
class Case:
    """A tokenizer, its renderer, and every string that it would read as a control token."""

    tokenizer: PreTrainedTokenizerBase
    renderer: TemplateRenderer
    control: dict[str, int]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def control_in(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self.control.values()]

    def reference(self, messages: Sequence[Message]) -> list[int]:
        """The ids that transformers itself makes of a prompt."""
        turns = [{"role": m.role, "content": m.text} for m in messages]
        ids = self.tokenizer.apply_chat_template(
            turns, tokenize=True, add_generation_prompt=True, return_dict=False, enable_thinking=False
        )
        return list(ids)


def make_case(tokenizer: PreTrainedTokenizerBase, *extra_control: str) -> Case:
    control = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    control |= {text: tokenizer.convert_tokens_to_ids(text) for text in extra_control}
    return Case(tokenizer=tokenizer, renderer=TemplateRenderer(tokenizer), control=control)


BASE = ("starter", "tiny base", "metaspace first base", "metaspace always base")
CHAT = ("starter turns", "qwen3", "tiny chatml", "metaspace first", "metaspace always", "metaspace newlines")


def _make(name: str, request: pytest.FixtureRequest) -> Case:
    if name == "starter turns":
        tokenizer = copy(request.getfixturevalue("cases")("starter").tokenizer)
        tokenizer.chat_template = TURNS_TEMPLATE
        return make_case(tokenizer)
    if name == "starter":
        return make_case(AutoTokenizer.from_pretrained(str(request.getfixturevalue("starter_folder_or_skip"))))
    if name == "qwen3":
        folder: Path = request.getfixturevalue("shared_or_skip") / "golden" / "tokenizers" / "qwen3"
        return make_case(AutoTokenizer.from_pretrained(str(folder)), "<think>", "</think>", "<tool_call>")
    if name.startswith("tiny"):
        fixture = "tiny_llama_folder" if name == "tiny base" else "tiny_qwen2_folder"
        return make_case(AutoTokenizer.from_pretrained(str(request.getfixturevalue(fixture))))
    scheme = "always" if "always" in name else "first"
    template = None if "base" in name else INST_TEMPLATE
    return make_case(metaspace_tokenizer(scheme, template, newlines="newlines" in name))


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest) -> Callable[[str], Case]:
    """Gives the case of a name, made when first asked for; skips where its files are absent."""
    return cache(lambda name: _make(name, request))


@pytest.fixture(scope="module", params=BASE + CHAT)
def any_case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


@pytest.fixture(scope="module", params=BASE)
def base_case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


@pytest.fixture(scope="module", params=CHAT)
def chat_case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


@pytest.fixture
def chatml(tiny_qwen2_folder: Path) -> TemplateRenderer:
    return TemplateRenderer(AutoTokenizer.from_pretrained(str(tiny_qwen2_folder)))


# ---- texts -----------------------------------------------------------------------------------------------------

CHARACTERS = st.characters(exclude_categories=("Cs", "Cn"), exclude_characters="\ufffd▁")
WORDS = st.sampled_from(
    ["你好", " Hello", "world", "，", "\n", "\n\n", " ", '```json\n[{"a": "é"}]\n```', "Answer: ", "🙂"]
)
ORDINARY = st.lists(WORDS | st.text(st.characters(categories=("L", "N", "P", "Zs"), exclude_characters="▁<>[]|"),
                                    max_size=8), max_size=8).map("".join)  # fmt: skip
PRIVATE = st.sampled_from(["\ue000", "\ue001", "\ue002", "\ue003", "\ue0020\ue003", "\ue00299999\ue003"])
QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


def hostile(case: Case) -> st.SearchStrategy[str]:
    """Texts full of control strings, whole, cut and nested in each other."""
    names = [name for name in case.control if not name.startswith("<unused")]
    whole = st.sampled_from(names)
    cut = st.tuples(whole, st.integers(1, 6)).flatmap(lambda c: st.sampled_from([c[0][: c[1]], c[0][c[1] :]]))
    nested = st.tuples(whole, whole, st.integers(1, 4)).map(lambda c: c[0][: c[2]] + c[1] + c[0][c[2] :])
    return st.lists(whole | cut | nested | PRIVATE | WORDS | st.text(CHARACTERS, max_size=6), max_size=8).map("".join)


def same(left: str, right: str) -> bool:
    """Equal but for what a tokenizer's own normalisation changes: Qwen's composes characters (NFC)."""
    return _normal(left) == _normal(right)


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def user(text: str) -> tuple[Message, ...]:
    return (Message(role="user", text=text),)


# ---- prompts and examples --------------------------------------------------------------------------------------


def test_a_prompt_is_the_beginning_of_its_training_example(any_case: Case) -> None:
    @QUICK
    @given(text=hostile(any_case), answer=hostile(any_case))
    def check(text: str, answer: str) -> None:
        prompt = any_case.renderer.render_prompt(user(text))
        example = any_case.renderer.render_example(user(text), answer)
        assert example.token_ids[: len(prompt)] == prompt
        assert example.token_ids[len(prompt) :] == any_case.renderer.render_answer(answer)
        assert example.loss_mask == (False,) * len(prompt) + (True,) * (len(example) - len(prompt))

    check()


def test_learnt_tokens_are_the_answer_exactly_and_then_its_end_token(any_case: Case) -> None:
    @QUICK
    @given(text=ORDINARY, answer=hostile(any_case))
    def check(text: str, answer: str) -> None:
        example = any_case.renderer.render_example(user(text), answer)
        learnt = [i for i, counts in zip(example.token_ids, example.loss_mask, strict=True) if counts]
        assert learnt[-1] == any_case.renderer.stop_ids[0]
        assert any_case.control_in(learnt[:-1]) == []
        assert same(any_case.renderer.read_answer(learnt), answer)
        assert example.num_supervised == len(learnt)

    check()


def test_message_text_cannot_create_control_tokens(any_case: Case) -> None:
    harmless = any_case.control_in(any_case.renderer.render_prompt(user("a")))

    @QUICK
    @given(text=hostile(any_case))
    def check(text: str) -> None:
        ids = any_case.renderer.render_prompt(user(text))
        assert any_case.control_in(ids) == harmless
        assert _normal(text.strip()) in _normal(any_case.decode(ids))

    check()


def test_earlier_turns_cannot_create_control_tokens_either(chat_case: Case) -> None:
    def turns(text: str) -> list[Message]:
        return [*user(text), Message(role="assistant", text=text), *user(text)]

    harmless = chat_case.control_in(chat_case.renderer.render_prompt(turns("a")))

    @QUICK
    @given(text=hostile(chat_case))
    def check(text: str) -> None:
        ids = chat_case.renderer.render_prompt(turns(text))
        assert chat_case.control_in(ids) == harmless
        assert _normal(chat_case.decode(ids)).count(_normal(text.strip())) >= 3

    check()


def test_every_control_string_of_the_tokenizer_is_plain_text_in_a_message(any_case: Case) -> None:
    everything = "".join(name for name in any_case.control if not re.match(r"<unused\d\d", name))
    harmless = any_case.control_in(any_case.renderer.render_prompt(user("a")))
    assert any_case.control_in(any_case.renderer.render_prompt(user(everything))) == harmless
    assert any_case.renderer.read_answer(any_case.renderer.render_answer(everything)) == everything


def test_ordinary_text_is_tokenised_as_the_chat_template_alone_would(chat_case: Case) -> None:
    @QUICK
    @given(texts=st.lists(ORDINARY, min_size=1, max_size=4))
    def check(texts: list[str]) -> None:
        turns = list(zip(("user", "assistant", "user", "assistant"), texts, strict=False))
        messages = [Message(role=role, text=text) for role, text in turns[: len(turns) - (len(turns) + 1) % 2]]
        assert list(chat_case.renderer.render_prompt(messages)) == chat_case.reference(messages)

    check()


def test_a_base_model_reads_what_its_tokenizer_makes_of_the_text(base_case: Case) -> None:
    @QUICK
    @given(text=ORDINARY)
    def check(text: str) -> None:
        ids = base_case.renderer.render_prompt(user(text))
        assert list(ids) == base_case.tokenizer(text)["input_ids"]
        assert ids[0] == base_case.tokenizer.bos_token_id

    check()


def test_a_base_model_is_told_a_conversation_turn_by_turn(tiny_llama_folder: Path) -> None:
    case = make_case(AutoTokenizer.from_pretrained(str(tiny_llama_folder)))
    messages = [
        Message(role="system", text="Be brief."),
        Message(role="user", text="Hi"),
        Message(role="assistant", text="Hello"),
        Message(role="user", text="Bye"),
    ]
    told = "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: Bye\n\nAssistant: "
    assert case.decode(case.renderer.render_prompt(messages)) == "<bos>" + told


@pytest.mark.parametrize("name", ["qwen3", "tiny chatml", "metaspace first"])
def test_a_system_message_and_several_turns_follow_the_template(name: str, cases: Callable[[str], Case]) -> None:
    case = cases(name)
    messages = [
        Message(role="system", text="你是一个助手。"),
        Message(role="user", text="一加一？"),
        Message(role="assistant", text="二"),
        Message(role="user", text="二加二？"),
    ]
    assert list(case.renderer.render_prompt(messages)) == case.reference(messages)


def test_qwen3_is_asked_without_thinking(cases: Callable[[str], Case]) -> None:
    case = cases("qwen3")
    prompt = case.decode(case.renderer.render_prompt(user("你好")))
    assert prompt == "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


# ---- reading back ----------------------------------------------------------------------------------------------


def test_shown_tokens_joined_are_the_decoded_text(any_case: Case) -> None:
    @QUICK
    @given(text=hostile(any_case), answer=ORDINARY)
    def check(text: str, answer: str) -> None:
        ids = any_case.renderer.render_example(user(text), answer).token_ids
        shown = any_case.renderer.show_tokens(ids)
        assert len(shown) == len(ids)
        assert "".join(shown) == any_case.decode(ids)

    check()


def test_an_answer_cut_by_the_length_limit_keeps_its_last_words(any_case: Case) -> None:
    ids = any_case.renderer.render_answer("你好 world\n")
    num_end = len(any_case.renderer.render_answer(""))
    assert any_case.renderer.read_answer(ids[: len(ids) - num_end]) == "你好 world\n"


def test_any_stop_token_is_left_out_of_the_answer(tiny_qwen2_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_qwen2_folder))
    renderer = TemplateRenderer(tokenizer, extra_stop_ids=[0])
    assert renderer.stop_ids == (2, 0)
    body = renderer.render_answer("good")[:-1]
    assert (
        renderer.read_answer([*body, 0]) == renderer.read_answer([*body, 2, 0]) == renderer.read_answer(body) == "good"
    )


def test_the_end_token_is_what_the_template_writes_behind_an_answer(cases: Callable[[str], Case]) -> None:
    expected = {
        "starter": "<eos>",  # a base model without a template
        "starter turns": "<end_of_turn>",
        "qwen3": "<|im_end|>",
        "tiny base": "<eos>",
        "metaspace first": "</s>",
    }
    for name, end in expected.items():
        case = cases(name)
        assert case.tokenizer.convert_ids_to_tokens(case.renderer.stop_ids[0]) == end
        assert case.tokenizer.eos_token_id in case.renderer.stop_ids


def test_a_prepended_blank_stands_before_the_prompt_and_not_before_the_answer() -> None:
    case = make_case(metaspace_tokenizer("first", None, newlines=False))
    example = case.renderer.render_example(user("What is it?"), "sport")
    prompt, answer = example.token_ids[: -example.num_supervised], example.token_ids[-example.num_supervised :]
    assert "".join(case.tokenizer.convert_ids_to_tokens(list(prompt))) == "<s>▁What▁is▁it?"
    assert "".join(case.tokenizer.convert_ids_to_tokens(list(answer))) == "sport</s>"


def test_learnt_tokens_are_green_and_read_ones_grey(chatml: TemplateRenderer) -> None:
    example = chatml.render_example(user("问题\n"), "答案")
    text = colour_example(example, chatml)
    assert text.plain == "<|im_start|>user⏎\n问题⏎\n<|im_end|>⏎\n<|im_start|>assistant⏎\n答案<|im_end|>"
    learnt = {text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)}
    assert "<|im_end|>" in learnt
    assert not any("grey" in str(span.style) for span in text.spans if text.plain[span.start :] == "答案<|im_end|>")


# ---- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", [(), (Message(role="user", text="a"), Message(role="assistant", text="b"))])
def test_a_prompt_that_does_not_end_with_the_user_is_refused(
    chatml: TemplateRenderer, messages: tuple[Message, ...]
) -> None:
    with pytest.raises(RenderError, match=r"^A prompt must end with a message of the user, or with what a tool gave"):
        chatml.render_prompt(messages)


def test_a_role_that_the_template_refuses_is_named() -> None:
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    renderer = TemplateRenderer(make_tokenizer(special, bos="<bos>", eos="<eos>", template=TURNS_TEMPLATE))
    with pytest.raises(RenderError, match=r"refuses a conversation of system, user: no system turns\.$"):
        renderer.render_prompt([Message(role="system", text="s"), *user("u")])


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = make_tokenizer(["<pad>", "<eos>"], bos=None, eos="<eos>", template=None)
    tokenizer.eos_token = None
    with pytest.raises(RenderError, match="no end-of-sequence token, so answers could never end"):
        TemplateRenderer(tokenizer)


def test_several_templates_without_a_default_are_refused() -> None:
    tokenizer = make_tokenizer(["<pad>", "<eos>"], bos=None, eos="<eos>", template=None)
    tokenizer.chat_template = {"tools": "a", "rag": "b"}
    with pytest.raises(RenderError, match="chat templates tools, rag, but none is called default"):
        TemplateRenderer(tokenizer)


def test_a_tokenizer_that_cannot_encode_in_parts_is_refused() -> None:
    tokenizer = make_tokenizer(["<pad>", "<eos>"], bos=None, eos="<eos>", template=None)
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()  # puts a blank between any two tokens
    with pytest.raises(RenderError, match="cannot encode a prompt and an answer in parts"):
        TemplateRenderer(tokenizer)


def test_a_control_token_of_one_character_cannot_be_written_as_text() -> None:
    renderer = TemplateRenderer(make_tokenizer(["<pad>", "<eos>", "■"], bos=None, eos="<eos>", template=None))
    with pytest.raises(RenderError, match="holds '■', a control token of one character"):
        renderer.render_answer("a ■ b")


# ---- the length policy -----------------------------------------------------------------------------------------


def row(text: str, answer: str, number: int) -> Record:
    context = f"Instruction: Be exact.\nInput: Which label fits?\n\n{text}\nAnswer: "
    record = row_to_record({"context": context, "target": answer}, f"rows.jsonl:{number}", require_target=True)
    assert isinstance(record, Record)
    return record


@pytest.fixture
def long_rows() -> list[Record]:
    texts = ["短。", "很长的一段文字，" * 20, "一句。", "Another long text. " * 20]
    return [row(text, '["sport"]' if number % 2 else '["money"]', number) for number, text in enumerate(texts, 1)]


def tasks_of(records: Sequence[Record]) -> list[Task]:
    (task,) = infer_tasks(records)
    return [task] * len(records)


def test_rows_within_the_limit_are_left_alone(chatml: TemplateRenderer, long_rows: list[Record]) -> None:
    tasks = tasks_of(long_rows)
    fitted = fit_rows(long_rows, tasks, chatml, max_length=2000, overlong="error")
    whole = [chatml.render_example(r.messages, t.write_target(r)) for r, t in zip(long_rows, tasks, strict=True)]
    assert list(fitted.examples) == whole
    assert (fitted.kept, fitted.dropped, fitted.shortened) == ((0, 1, 2, 3), (), ())


def test_too_long_rows_are_all_named_with_their_sizes_and_the_fix(
    chatml: TemplateRenderer, long_rows: list[Record]
) -> None:
    with pytest.raises(DataError, match=r"^2 of 4 rows are longer than 100 tokens\.") as caught:
        fit_rows(long_rows, tasks_of(long_rows), chatml, max_length=100, overlong="error")
    assert [problem.source for problem in caught.value.problems] == ["rows.jsonl:2", "rows.jsonl:4"]
    for problem, record in zip(caught.value.problems, (long_rows[1], long_rows[3]), strict=True):
        example = chatml.render_example(record.messages, str(record.target))
        num_prompt = len(chatml.render_prompt(record.messages))
        assert problem.message == (
            f"{len(example)} tokens: {num_prompt} of prompt, {len(example) - num_prompt} of answer; limit 100."
        )
        assert f"data.max_length={len(example)}" in problem.fix
        assert "data.overlong=shorten_input" in problem.fix


def test_dropped_rows_are_counted(chatml: TemplateRenderer, long_rows: list[Record]) -> None:
    fitted = fit_rows(long_rows, tasks_of(long_rows), chatml, max_length=100, overlong="drop")
    assert fitted.dropped == ("rows.jsonl:2", "rows.jsonl:4")
    assert fitted.kept == (0, 2)
    assert len(fitted.examples) == 2
    assert fitted.shortened == ()


def test_shortening_keeps_question_cue_answer_and_end_whole(chatml: TemplateRenderer, long_rows: list[Record]) -> None:
    tasks = tasks_of(long_rows)
    fitted = fit_rows(long_rows, tasks, chatml, max_length=100, overlong="shorten_input")
    assert fitted.shortened == ("rows.jsonl:2", "rows.jsonl:4")
    assert fitted.kept == (0, 1, 2, 3)
    for example, record in zip(fitted.examples, long_rows, strict=True):
        assert len(example) <= 100
        text = "".join(chatml.show_tokens(example.token_ids))
        found = re.fullmatch(
            r"<\|im_start\|>user\nInstruction: Be exact\.\nInput: Which label fits\?\n\n(.*)\nAnswer: <\|im_end\|>\n"
            r"<\|im_start\|>assistant\n" + re.escape(str(record.target)) + r"<\|im_end\|>",
            text,
            flags=re.DOTALL,
        )
        assert found is not None
        assert record.text.startswith(found.group(1))


def test_a_shortened_text_fits_and_one_more_character_would_not(chatml: TemplateRenderer) -> None:
    @QUICK
    @given(text=st.text(CHARACTERS, min_size=1, max_size=80), room=st.integers(1, 120), num_answer=st.integers(1, 9))
    def check(text: str, room: int, num_answer: int) -> None:
        record = row(f"x{text}x", '["sport"]', 1)
        limit = len(chatml.render_prompt(record.with_text("").messages)) + num_answer + room
        if len(chatml.render_prompt(record.messages)) + num_answer <= limit:
            return
        shorter = shorten_record(record, chatml, num_answer=num_answer, max_length=limit)
        length = 0 if shorter is None else len(shorter.text)
        if shorter is not None:
            assert shorter == record.with_text(record.text[:length])
            assert len(chatml.render_prompt(shorter.messages)) + num_answer <= limit
        longer = record.with_text(record.text[: length + 1])
        assert len(chatml.render_prompt(longer.messages)) + num_answer > limit

    check()


def test_a_row_that_cannot_be_shortened_enough_is_named(chatml: TemplateRenderer) -> None:
    records = [row("短。", '["sport"]', 1), row("长" * 90, json.dumps(["sport"] * 40), 2)]
    whole = Message(role="user", text="no parts to tell apart " * 20)
    records.append(
        Record(
            messages=(whole,),
            target='["sport"]',
            source="rows.jsonl:3",
            task=None,
            instruction="",
            question="",
            text=whole.text,
            text_span=None,
            raw={},
        )
    )
    with pytest.raises(DataError) as caught:
        fit_rows(records, tasks_of(records), chatml, max_length=100, overlong="shorten_input")
    assert [(p.source, p.field) for p in caught.value.problems] == [("rows.jsonl:2", "text"), ("rows.jsonl:3", "text")]
    assert all("cannot be shortened enough" in problem.fix for problem in caught.value.problems)
