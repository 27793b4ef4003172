"""Answers held to a grammar: always in form or refused, canonical tokens, the same whatever the batch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tiny_models import TOKENIZERS, ask, in_order, renderer_of, setting
from weitiao.data.records import Record, read_records
from weitiao.errors import GrammarError, ModelError
from weitiao.generate.chat import reply_all, token_spans
from weitiao.generate.constraint import Constraint, ConstraintCompiler, compiler_of
from weitiao.generate.engine import Sampling, generate
from weitiao.models.opening import open_renderer
from weitiao.render.base import Renderer
from weitiao.render.template import TemplateRenderer
from weitiao.tasks.base import Task, assign_task, infer_tasks
from weitiao.tasks.fields import Field
from weitiao.tasks.forms import AnswerForm
from weitiao.tasks.grammar import form_grammar

EXAMPLES = Path(__file__).parents[1] / "examples"
SHARED = Path(__file__).parents[2] / "shared"


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- canonical tokens -------------------------------------------------------------------------------------------


def replay(renderer: Renderer, constraint: Constraint, answer: str) -> tuple[int, int]:
    """Walk the tokens of training through the constraint; how many were forced, of how many that were walked."""
    gold = list(renderer.render_answer(answer))
    place = num_forced = 0
    while place < len(gold):
        if num_forced and _begins_inside_character(renderer, gold[place]):
            break  # what no tokenizer of text can be asked for; only the tiny one of bytes has merged such tokens
        forced = constraint.forced()
        if forced:
            assert gold[place : place + len(forced)] == forced, f"{answer!r} is forced to other tokens"
        else:
            assert gold[place] in constraint.allowed(), (
                f"{constraint.why()} before {renderer.show_tokens(gold[place:])}"
            )
        for token in gold[place : place + max(1, len(forced))]:
            if token in renderer.stop_ids:
                assert constraint.accepting
            else:
                assert constraint.advance(token)
        place += max(1, len(forced))
        num_forced += len(forced)
    return num_forced, place


def _begins_inside_character(renderer: Renderer, token: int) -> bool:
    """Whether it ends one character's bytes and begins another's."""
    spelled = compiler_of(renderer, len(renderer.tokenizer)).text_bytes([token])
    return len(spelled) > 1 and 0x80 <= spelled[0] < 0xC0 and spelled[-1] >= 0xC0


def labelled(*paths: Path) -> list[tuple[Record, Task]]:
    """The rows whose answers have a form."""
    rows = [row for path in paths for row in read_records(path)]
    tasks = infer_tasks(rows)
    owned = [(row, assign_task(row, tasks)) for row in rows]
    return [(row, task) for row, task in owned if isinstance(task, Task) and task.form.shape != "text"]


def check_canonical(renderer: Renderer, rows: Sequence[tuple[Record, Task]]) -> None:
    compiler = compiler_of(renderer, len(renderer.tokenizer))
    counts = []
    for row, task in rows:
        target = task.write_target(row)
        # a label that is not in its text, which two in a thousand are, cannot be written when grounded
        free = compiler.compile(form_grammar(task.form, ground=False) or "")
        counts.append(replay(renderer, free, target))
        values = [item[one.key] for item in _items(task, row) for one in task.form.fields if one.copied]
        if all(value in row.text for value in values if isinstance(value, str)):
            counts.append(replay(renderer, compiler.compile(form_grammar(task.form, row.text) or ""), target))
    assert sum(forced for forced, _ in counts) > 0.25 * sum(total for _, total in counts), "most structure is forced"


def _items(task: Task, row: Record) -> list[Any]:
    gold = task.gold(row)
    return gold if isinstance(gold, list) and task.form.shape == "object list" else [gold] if task.form.fields else []


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_gold_answers_of_the_examples_are_allowed_and_forced_tokens_are_those_of_training(tokenizer: str) -> None:
    rows = labelled(EXAMPLES / "starter/train.jsonl", EXAMPLES / "starter/heldout.jsonl")[::7]
    check_canonical(renderer_of(tokenizer), rows)
    check_canonical(renderer_of(tokenizer), labelled(EXAMPLES / "classification/rows.jsonl"))


def shared_rows() -> list[tuple[Record, Task]]:
    folder = SHARED / "data/spo_and_topics"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return labelled(folder / "train.jsonl", folder / "dev.jsonl")


def test_gold_answers_of_the_shared_rows_are_canonical_for_the_starter_model(starter_folder_or_skip: Path) -> None:
    check_canonical(open_renderer("starter"), shared_rows()[::25])


@pytest.mark.slow
def test_all_gold_answers_of_the_shared_rows_are_canonical(starter_folder_or_skip: Path) -> None:
    qwen3 = SHARED / "golden/tokenizers/qwen3"
    for renderer in [open_renderer("starter"), *map(renderer_of, TOKENIZERS)]:
        check_canonical(renderer, shared_rows())
    if qwen3.is_dir():
        check_canonical(TemplateRenderer(AutoTokenizer.from_pretrained(str(qwen3))), shared_rows())


def test_a_vocabulary_that_is_not_bytes_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
    backend.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    with pytest.raises(ModelError, match="WordPiece"):
        ConstraintCompiler(tokenizer, vocab_size=3, stop_ids=[2])
    backend.decoder = decoders.ByteLevel()
    with pytest.raises(ModelError, match="cannot be read as bytes"):
        ConstraintCompiler(
            PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"),
            vocab_size=3,
            stop_ids=[2],
        )


# ---- the constraint itself --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_stop_tokens_stand_exactly_where_the_grammar_may_end(tokenizer: str) -> None:
    renderer = renderer_of(tokenizer)
    end_text = renderer.read_answer(renderer.render_answer("")[:-1])
    constraint = compiler_of(renderer, len(renderer.tokenizer)).compile('start: "a" "b"?')
    [a], [b] = renderer.render_answer("a")[:1], renderer.render_answer("b")[:1]
    stops = set(renderer.stop_ids)
    assert not constraint.accepting and not stops & set(constraint.allowed())
    assert constraint.advance(a)
    if not end_text:
        assert constraint.accepting and stops < set(constraint.allowed().tolist()) and constraint.forced() == []
    other = constraint.fork()
    assert other.advance(b)
    for token in renderer.render_answer("")[:-1]:  # the blank that Llama 2 writes before its end token
        assert not other.accepting and other.forced()[0] == token and other.advance(token)
    assert other.ended and other.forced() == [renderer.stop_ids[0]] and set(other.allowed().tolist()) == stops
    assert not constraint.ended, "a fork goes its own way"
    assert (
        not other.advance(a) and len(other.allowed()) == 0 and "gave up (" in other.why() and "after 'ab" in other.why()
    )


def test_control_tokens_and_ids_beyond_the_vocabulary_are_never_text() -> None:
    for name in TOKENIZERS:
        renderer = renderer_of(name)
        anything = compiler_of(renderer, len(renderer.tokenizer) + 13).compile("start: /(?s:.{1,50})/")
        allowed = set(anything.allowed().tolist())
        control = {i for i, token in renderer.tokenizer.added_tokens_decoder.items() if token.special}
        assert control and not control & allowed and max(allowed) < len(renderer.tokenizer)
        assert len(allowed) > 256
        for text in (token.content for token in renderer.tokenizer.added_tokens_decoder.values()):
            if name == "inst":  # a text that may end in blanks swallows the one before this format's end token
                continue
            replay(renderer, anything.fork(), text)  # the spelling of a control token is text like any other


@pytest.mark.parametrize(
    ("lark", "words"),
    [
        ('start: "a', r"1\(\d+\): lexer error"),
        ("start: foo", 'unknown name: "foo"'),
        ('begin: "x"', "no start rule"),
        ("start: /[/", "unclosed character class"),
        ("", "Empty grammar"),
    ],
)
def test_a_grammar_that_cannot_be_compiled_is_refused_with_the_place(lark: str, words: str) -> None:
    _, renderer, compile_ = setting("chatml")
    with pytest.raises(GrammarError, match=words):
        compile_(lark)
    with pytest.raises(GrammarError, match=words):
        reply_all(setting("chatml")[0], renderer, [ask("a")], sampling=Sampling(), grammars=[lark])


# ---- the engine ---------------------------------------------------------------------------------------------------

TRIPLES = r"""start: "```json\n[" item (", " item){0,3} "]\n```"
item: "{\"predicate\": \"" P "\", \"object\": \"" V "\"}"
P: "作者" | "导演" | "country"
V: %regex {"substring_chars": "九玄珠是 a novel by 龙马 🙂"}"""


def reference(
    model: PreTrainedModel, prompt: Sequence[int], constraint: Constraint, limit: int, stops: Sequence[int]
) -> tuple[list[int], list[float]]:
    """The simple version: the whole text through the model for every token, and only allowed tokens compared."""
    constraint, tokens, logprobs = constraint.fork(), [], []
    while len(tokens) < limit:
        forced = constraint.forced()
        allowed = torch.tensor(forced[:1] or constraint.allowed().tolist())
        with torch.no_grad():
            scores = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1, allowed].log_softmax(0)
        token = int(allowed[scores.argmax()])
        logprobs.append(float(scores.max()))
        if token in stops:
            return tokens, logprobs
        tokens.append(token)
        assert constraint.advance(token)
    return tokens, logprobs


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("tokenizer", ["chatml", "inst"])
def test_chunks_give_the_tokens_and_logprobs_of_one_token_at_a_time(family: str, tokenizer: str) -> None:
    model, renderer, compile_ = setting(tokenizer, family)
    prompts = [renderer.render_prompt(ask("问题 " * n)) for n in (1, 5, 2, 9, 3)]
    constraint = compile_(TRIPLES)
    options = {"stop_ids": renderer.stop_ids, "sampling": Sampling(max_new_tokens=150)}
    expected = [reference(model, prompt, constraint, 150, renderer.stop_ids) for prompt in prompts]
    for exact in (False, True):
        rows = generate(model, prompts, constraints=[constraint] * 5, max_rows=3, exact=exact, **options)
        for found, (tokens, logprobs) in zip(in_order(rows), expected, strict=True):
            assert list(found.token_ids) == tokens
            assert found.finish in ("stop", "refused")
            stop = [found.stop_logprob] if found.finish == "stop" else []
            assert [*found.token_logprobs, *stop] == pytest.approx(logprobs, abs=1e-3)
            assert found.logprob == pytest.approx(sum(logprobs), abs=1e-2)
            assert found.num_steps < len(tokens) if exact else found.num_steps < 0.8 * len(tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_rows_with_and_without_constraints_share_a_batch_and_do_not_change_each_other(temperature: float) -> None:
    model, renderer, compile_ = setting("chatml", "gemma3")
    prompts = [renderer.render_prompt(ask(f"{n} " * (1 + n % 4))) for n in range(14)]
    grammars = [TRIPLES, None, 'start: "a" | "bc" | "[1, 2]"', "start: /[a-z]{2,30}/", None, 'start: "x" " "{1,9} "y"']
    constraints = [None if (g := grammars[n % 6]) is None else compile_(g) for n in range(14)]
    sampling = Sampling(max_new_tokens=40, temperature=temperature, seed=3)
    options: dict[str, Any] = {"stop_ids": renderer.stop_ids, "sampling": sampling}
    answers = []
    for max_rows in (1, 3, 14):
        found = in_order(generate(model, prompts, constraints=constraints, max_rows=max_rows, **options))
        answers.append([(g.token_ids, g.finish, g.reason, g.num_steps) for g in found])
    assert answers[0] == answers[1] == answers[2]
    free = in_order(generate(model, prompts, **options))
    for n in range(14):
        if constraints[n] is None:
            assert (free[n].token_ids, free[n].finish) == answers[0][n][:2]


def test_forced_answers_cost_no_call_of_the_model() -> None:
    model, renderer, compile_ = setting("chatml")
    options: dict[str, Any] = {"stop_ids": renderer.stop_ids, "sampling": Sampling(max_new_tokens=50)}
    answer = '```json\n["你好"]\n```'
    constraint = compile_(f"start: {json.dumps(answer)}")
    [found] = generate(model, [[3, 4]], constraints=[constraint], **options)
    assert (found.finish, found.num_steps, found.logprob) == ("stop", 0, 0.0)
    assert found.token_ids == renderer.render_answer(answer)[:-1]
    assert found.token_logprobs == (0.0,) * len(found.token_ids)
    for limit in (len(found.token_ids), 3, 1):
        [cut] = generate(model, [[3, 4]], constraints=[constraint], limits=[limit], **options)
        assert len(cut.token_ids) == limit
        if limit == 3:
            assert cut.finish == "refused"
            assert cut.reason.startswith(
                "The limit of 3 tokens was reached inside the answer: it cannot end after '```"
            )


def test_a_limit_inside_an_answer_is_a_refusal_and_where_it_may_end_a_cut() -> None:
    model, renderer, compile_ = setting("chatml")
    options: dict[str, Any] = {"stop_ids": renderer.stop_ids, "sampling": Sampling(max_new_tokens=6)}
    for lark in ('start: "[" " "* "]"', 'start: "[" ("1" ", ")* "1]"'):  # white space and lists without end
        found = list(generate(model, [[n] for n in range(3, 30)], constraints=[compile_(lark)] * 27, **options))
        refused = [g for g in found if g.finish == "refused"]
        assert refused and all("cannot end after '[" in g.reason and len(g.token_ids) == 6 for g in refused)
        whole = [renderer.read_answer(g.token_ids) for g in found if g.finish != "refused"]
        assert all(text.startswith("[") and text.endswith("]") for text in whole)
    found = list(
        generate(model, [[n] for n in range(3, 30)], constraints=[compile_("start: /[a-z]+/")] * 27, **options)
    )
    assert {g.finish for g in found} <= {"stop", "length"} and any(g.finish == "length" for g in found)
    assert all(re.fullmatch("[a-z]+", renderer.read_answer(g.token_ids)) for g in found)


def test_a_grammar_without_any_answer_is_refused() -> None:
    model, renderer, compile_ = setting("chatml")
    [found] = generate(
        model,
        [[3]],
        stop_ids=renderer.stop_ids,
        sampling=Sampling(),
        constraints=[compile_('start: "a" never\nnever: never "b"')],
    )
    assert (found.finish, renderer.read_answer(found.token_ids)) == ("refused", "a")
    assert found.reason == "No token can follow: the grammar has no way on after 'a'."


@pytest.mark.parametrize("broken", [float("nan"), float("-inf"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_not_numbers_are_a_refusal(broken: float, temperature: float) -> None:
    renderer = renderer_of("chatml")
    vocab_size = len(renderer.tokenizer)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(config).eval()
    model.lm_head = torch.nn.Linear(8, vocab_size)
    torch.nn.init.constant_(model.lm_head.bias, broken)
    constraint = compiler_of(renderer, vocab_size).compile('start: "a" | "b"')
    found = generate(
        model,
        [[3], [4]],
        stop_ids=renderer.stop_ids,
        sampling=Sampling(max_new_tokens=4, temperature=temperature),
        constraints=[None, constraint],
    )
    for each in found:
        assert (each.finish, each.token_ids, each.num_steps) == ("refused", (), 0)
        assert "not numbers" in each.reason


def test_there_must_be_a_constraint_or_none_for_each_prompt() -> None:
    model, renderer, _ = setting("chatml")
    with pytest.raises(ValueError, match="constraints holds 1 for 2 prompts"):
        generate(model, [[3], [4]], stop_ids=renderer.stop_ids, sampling=Sampling(), constraints=[None])


# ---- messages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_replies_say_which_characters_each_token_wrote(tokenizer: str) -> None:
    model, renderer, _ = setting(tokenizer)
    form = AnswerForm(shape="object", fields=(Field(key="名", kind="string", copied_share=1.0),))
    text = "马龙 naïve 🙂 龘"
    grammar = form_grammar(form, text)
    talks = [ask(f"{n} {text}") for n in range(12)]
    limits = [60] * 11 + [1]
    replies = in_order(
        reply_all(model, renderer, talks, sampling=Sampling(max_new_tokens=60), grammars=[grammar] * 12, limits=limits)
    )
    assert {reply.finish for reply in replies[:11]} == {"stop"}
    for reply in replies[:11]:
        form.parse(reply.text)
        assert len(reply.tokens) == reply.num_tokens + 1, "the stop token is the last"
        assert reply.tokens[0][0] == 0 and reply.tokens[-1][1] == len(reply.text)
        for (_, end, _), following in zip(reply.tokens, reply.tokens[1:]):
            assert following[0] in (end, following[0]) and (following[0] == end or following[1] == end)
    [refused] = replies[11:]
    assert (refused.finish, refused.text, refused.tokens) == ("refused", "", ())
    assert "limit of 1 tokens" in refused.refusal


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("text", ["你好", "a🙂b", '["é", "龘龘"]\n', " b", ""])
def test_tokens_that_make_one_character_share_its_span(tokenizer: str, text: str) -> None:
    renderer = renderer_of(tokenizer)
    num_end = len(renderer.render_answer(""))
    token_ids = renderer.render_answer(text)[:-num_end]
    spans = token_spans(renderer, token_ids, text)
    assert len(spans) == len(token_ids)
    assert "".join(text[start:end] for start, end in dict.fromkeys(spans)) == text


def test_replies_without_a_grammar_are_as_before() -> None:
    model, renderer, _ = setting("chatml")
    talks = [ask(f"问 {n}") for n in range(4)]
    sampling = Sampling(max_new_tokens=12)
    free = in_order(reply_all(model, renderer, talks, sampling=sampling))
    mixed = in_order(reply_all(model, renderer, talks, sampling=sampling, grammars=[None, 'start: "a"', None, None]))
    assert [mixed[n] for n in (0, 2, 3)] == [free[n] for n in (0, 2, 3)]
    assert (mixed[1].text, mixed[1].num_steps) == ("a", 0)
    assert all(reply.num_steps == reply.num_tokens - (reply.finish == "length") for reply in free)
