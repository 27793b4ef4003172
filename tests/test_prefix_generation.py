"""Generation and likelihoods of rows with contexts (ChatGLM-6B) and learnt prefixes (P-Tuning v2)."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from prefix_models import SOP, a_row, tiny
from tiny_models import in_order, renderer_of
from weitiao.generate.attention import Chunk
from weitiao.generate.cache import cache_bytes
from weitiao.generate.constraint import Constraint, compiler_of
from weitiao.generate.engine import Sampling, generate
from weitiao.generate.likelihood import log_likelihoods
from weitiao.models.glm.chatglm import ChatGlmForCausalLM
from weitiao.models.prefix_lm import row_prefix
from weitiao.models.ptuning import prefix_encoder_of, prefix_states

pytestmark = pytest.mark.usefixtures("one_thread")


def prompts_for(family: str, count: int = 11, seed: int = 1) -> list[list[int]]:
    draw = random.Random(seed)
    return [a_row(draw, family, context=draw.randint(1, 40), answer=0) for _ in range(count)]


def one_row(model: PreTrainedModel, prompt: list[int], stop_ids: list[int], max_new_tokens: int) -> list[int]:
    """transformers' own greedy answer, stop token cut off."""
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids or None,
        pad_token_id=0,
    )
    answer: list[int] = output[0, len(prompt) :].tolist()
    return answer[:-1] if answer[-1] in stop_ids else answer


def slow(
    model: PreTrainedModel, prompt: list[int], stops: list[int], limit: int, constraint: Constraint | None = None
) -> list[int]:
    """The simple version: the whole row through the model for every token, by the plain formula, nothing cached."""
    constraint, tokens = constraint.fork() if constraint else None, []
    own, states = model.config._attn_implementation, prefix_states(model)
    empty = torch.zeros(3, 4 if isinstance(model, ChatGlmForCausalLM) else 2, 0, 8)
    known: dict[str, Any] = {"past_states": states or (empty, empty), "row_starts": torch.tensor(0)}
    model.set_attn_implementation("plain_formula")
    while len(tokens) < limit:
        row = [*prompt, *tokens]
        prefix = row_prefix(model, row)
        positions = [*range(len(row))] if prefix is None else prefix.positions(0, len(row))
        known["context"] = 0 if prefix is None else prefix.num_tokens
        with torch.no_grad():
            logits = model(torch.tensor([row]), position_ids=torch.tensor([positions]), use_cache=False, **known).logits
        allowed = (
            torch.tensor(constraint.forced()[:1] or constraint.allowed())
            if constraint
            else torch.arange(logits.shape[-1])
        )
        token = int(allowed[logits[0, -1, allowed].argmax()])
        if token in stops:
            break
        tokens.append(token)
        assert constraint is None or constraint.advance(token)
    model.set_attn_implementation(own)
    return tokens


@pytest.mark.parametrize(("family", "past"), [("chatglm", 0), ("chatglm", 5), ("glm", 5), ("llama", 5), ("gemma3", 5)])
def test_greedy_answers_equal_one_row_at_a_time(family: str, past: int) -> None:
    """Rows of mixed lengths leave and join; a cache that grows keeps the prefix in all rows."""
    model, prompts = tiny(family, past=past, std=0.3), prompts_for(family)
    stop_ids = [one_row(model, prompts[n], [], 20)[place] for n, place in ((0, 6), (1, 11), (3, 2))]
    expected = [one_row(model, prompt, stop_ids, 20) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 2, "some rows must stop early and some not"
    for max_rows, exact in ((1, False), (3, False), (3, True), (64, False), (64, True)):
        rows = generate(
            model, prompts, stop_ids=stop_ids, sampling=Sampling(max_new_tokens=20), max_rows=max_rows, exact=exact
        )
        assert [list(row.token_ids) for row in in_order(rows)] == expected


@pytest.mark.parametrize(("family", "past"), [("chatglm", 0), ("chatglm", 5), ("glm", 5), ("gemma3", 5)])
def test_exact_answers_in_bfloat16_are_those_of_a_row_alone(family: str, past: int) -> None:
    """Where rounding decides: without `exact` some of these answers differ."""
    model, prompts = tiny(family, past=past, std=0.3).bfloat16(), prompts_for(family, count=12)
    expected = [one_row(model, prompt, [5], 30) for prompt in prompts]
    rows = generate(model, prompts, stop_ids=[5], sampling=Sampling(max_new_tokens=30), exact=True)
    assert [list(row.token_ids) for row in in_order(rows)] == expected


@pytest.mark.parametrize("family", ["chatglm", "qwen2"])
def test_greedy_answers_with_a_prefix_equal_a_slow_reference(family: str) -> None:
    model, prompts = tiny(family, past=4, projection=True, std=0.3), prompts_for(family, count=5)
    expected = [slow(model, prompt, [5, 9], 12) for prompt in prompts]
    rows = generate(model, prompts, stop_ids=[5, 9], sampling=Sampling(max_new_tokens=12), max_rows=2)
    assert [list(row.token_ids) for row in in_order(rows)] == expected
    encoder = prefix_encoder_of(model)
    assert encoder is not None
    encoder.on = False
    rows = generate(model, prompts, stop_ids=[5, 9], sampling=Sampling(max_new_tokens=12), max_rows=2)
    assert [list(row.token_ids) for row in in_order(rows)] != expected, "the prefix must matter"


GRAMMAR = r"""start: "```json\n[" item (", " item){0,3} "]\n```"
item: "{\"predicate\": \"" P "\", \"object\": \"" V "\"}"
P: "作者" | "导演" | "country"
V: %regex {"substring_chars": "九玄珠是 a novel by 龙马"}"""


@pytest.mark.parametrize("past", [0, 3])
def test_forced_tokens_stand_where_the_answer_stands(past: int) -> None:
    """With a constraint several tokens are fed at once, behind the prompt's context as well as later."""
    renderer = renderer_of("chatml")
    vocab_size = len(renderer.tokenizer) + 13
    ids = {"mask_token_id": vocab_size - 1, "gmask_token_id": vocab_size - 2, "bos_token_id": vocab_size - 3}
    model = tiny("chatglm", past=past, vocab_size=vocab_size, std=0.3, **ids)
    draw = random.Random(4)
    prompts = [
        [*(draw.randrange(4, 90) for _ in range(draw.randint(0, 20))), vocab_size - 2, vocab_size - 3] for _ in range(5)
    ]
    constraint, stops = compiler_of(renderer, vocab_size).compile(GRAMMAR), list(renderer.stop_ids)
    expected = [slow(model, prompt, stops, 90, constraint) for prompt in prompts]
    assert len({tuple(answer) for answer in expected}) > 1
    for exact in (False, True):
        rows = generate(
            model, prompts, stop_ids=stops, constraints=[constraint] * 5, sampling=Sampling(max_new_tokens=90),
            max_rows=2, exact=exact,
        )  # fmt: skip
        found = in_order(rows)
        assert [list(row.token_ids) for row in found] == expected
        assert all(row.num_steps < len(row.token_ids) for row in found), "forced tokens must be fed together"


@pytest.mark.parametrize(("family", "past"), [("chatglm", 0), ("chatglm", 4), ("glm", 4)])
def test_likelihoods_equal_those_of_rows_alone(family: str, past: int) -> None:
    model, draw = tiny(family, past=past), random.Random(2)
    rows = [a_row(draw, family, context=draw.randint(1, 30), answer=draw.randint(1, 9)) for _ in range(9)]
    pairs = [(row[: n + 1], row[n + 1 :]) for row in rows for n in [row.index(SOP) if SOP in row else 0]]
    expected = []
    for row, (prompt, follows) in zip(rows, pairs, strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([row])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected.append(float(logprobs.gather(1, torch.tensor(follows)[:, None]).sum()))
    for batch_tokens in (4096, 70, 1):
        assert log_likelihoods(model, pairs, batch_tokens=batch_tokens) == pytest.approx(expected, abs=1e-3)


def test_a_context_comes_whole_in_a_rows_first_chunk() -> None:
    Chunk(start=0, num_tokens=4, prefix=4)
    Chunk(start=4, num_tokens=1, prefix=4)
    with pytest.raises(ValueError, match="A context of 5 tokens is cut: 0 are cached and 4 come"):
        Chunk(start=0, num_tokens=4, prefix=5)
    with pytest.raises(ValueError, match="3 are cached"):
        Chunk(start=3, num_tokens=4, prefix=5)


def test_the_memory_of_a_prefix_is_counted() -> None:
    sizes = {"longest_prompt": 10, "max_new_tokens": 5, "num_rows": 2}
    without, with_prefix = (cache_bytes(tiny("glm", past=past), **sizes) for past in (0, 6))
    assert with_prefix - without == 2 * 3 * 2 * 8 * 4 * 2 * 6, "keys and values, layers, heads, size, bytes, rows, P"
