"""A batch stepped from outside: rows that come and go, prompts in parts, beginnings that are shared."""

from __future__ import annotations

import random
from random import Random

import pytest
import torch
from torch import Tensor

import weitiao.generate.batch as batching
from prefix_models import a_row, tiny
from test_engine import in_order, one_row, random_prompts, tiny_model
from weitiao.generate.batch import Batch
from weitiao.generate.engine import generate
from weitiao.generate.heads import BLOCK, HeadStore, num_alike
from weitiao.generate.row import Generation, Row
from weitiao.generate.sampling import Chooser, Sampling
from weitiao.models.prefix_lm import row_prefix
from weitiao.models.ptuning import attach_prefix, prefix_states

pytestmark = pytest.mark.usefixtures("one_thread")


def a_prompt(index: int, prompt: list[int], *, limit: int = 12, temperature: float = 0.0) -> Row:
    return Row(
        index=index,
        prompt=tuple(prompt),
        limit=limit,
        stop_ids=frozenset([5, 9]),
        chooser=Chooser(sampling=Sampling(temperature=temperature), random=Random(f"0/{index}")),
    )


def run_out(batch: Batch, waiting: list[Row], *, rows: int, most_tokens: int | None = None) -> dict[int, Generation]:
    """Run all, a row joining wherever there is room."""
    done: dict[int, Generation] = {}
    while waiting or batch.rows:
        while waiting and len(batch.rows) < rows:
            batch.join(waiting.pop(0))
        done |= {one.index: one for one in batch.step(capacity=rows, most_tokens=most_tokens)}
    return done


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("most_tokens", [1, 7, 30])
def test_prompts_in_parts_give_the_same_answers(family: str, most_tokens: int) -> None:
    model, prompts = tiny_model(family), random_prompts(9, longest=60)
    rows = [a_prompt(index, prompt) for index, prompt in enumerate(prompts)]
    done = run_out(Batch(model), rows, rows=4, most_tokens=most_tokens)
    assert [list(done[index].token_ids) for index in range(9)] == [one_row(model, p, [5, 9], 12) for p in prompts]


def test_a_short_prompt_is_not_kept_waiting_by_a_long_one() -> None:
    batch = Batch(tiny_model("llama"))
    long, short = a_prompt(0, [3] * 120), a_prompt(1, [4] * 8)
    short.stop_ids = frozenset()
    batch.join(long)
    batch.step(capacity=2, most_tokens=16)
    batch.join(short)
    batch.step(capacity=2, most_tokens=16)
    assert (long.num_cached, len(short.tokens)) == (24, 1)
    batch.step(capacity=2, most_tokens=16)
    assert (long.num_cached, len(short.tokens)) == (39, 2), "a row that writes takes one token, the prompt the rest"


def test_rows_that_leave_change_nothing_for_the_others() -> None:
    model, draw = tiny_model("gemma3"), random.Random(4)
    prompts = random_prompts(14, longest=30)
    expected = [one_row(model, prompt, [5, 9], 12) for prompt in prompts]
    batch, waiting = Batch(model, heads=HeadStore(1 << 20)), [a_prompt(i, p) for i, p in enumerate(prompts)]
    done: dict[int, Generation] = {}
    left = set()
    while waiting or batch.rows:
        while waiting and len(batch.rows) < 5:
            batch.join(waiting.pop(0))
        if batch.rows and draw.random() < 0.2:
            gone = draw.choice(batch.rows)
            left.add(gone.index)
            batch.leave(gone)
        if batch.rows:
            done |= {one.index: one for one in batch.step(capacity=5, most_tokens=20)}
        batch.trim(capacity=len(batch.rows))
    assert 2 <= len(left) < 12
    assert done.keys() | left == set(range(14))
    assert all(list(done[index].token_ids) == expected[index] for index in done)


def logits_seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every row of scores that tokens are chosen by from now on."""
    seen: list[Tensor] = []

    def choose(logits: Tensor, **kwargs: object) -> object:
        seen.extend(logits.clone())
        return own(logits, **kwargs)

    own = batching.choose_tokens
    monkeypatch.setattr(batching, "choose_tokens", choose)
    return seen


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
@pytest.mark.parametrize("alive", [True, False])
def test_shared_beginnings_leave_scores_and_answers_equal(
    family: str, alive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, draw = tiny_model(family), random.Random(1)
    head = [draw.randrange(3, 61) for _ in range(50)]
    prompts = [[*head, *tail] for tail in random_prompts(4, longest=12, seed=5)]
    seen = logits_seen(monkeypatch)
    for index, prompt in enumerate(prompts):
        run_out(Batch(model), [a_prompt(index, prompt)], rows=1)
    apart, store = list(seen), HeadStore(1 << 20)
    seen.clear()
    batch = Batch(model, heads=store)
    rows = [a_prompt(index, prompt) for index, prompt in enumerate(prompts)]
    done: dict[int, Generation] = {}
    for row in rows:
        batch.join(row)
        for _ in range(1 if alive else 99):
            if batch.rows:
                done |= {one.index: one for one in batch.step(capacity=4)}
    done |= run_out(batch, [], rows=4)
    assert [row.num_shared for row in rows] == [0] + [50 if alive else 50 // BLOCK * BLOCK] * 3
    assert store.num_hits == 3
    assert len(seen) == len(apart)
    if not alive:  # then in the same order
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(seen, apart, strict=True))
    expected = [one_row(model, prompt, [5, 9], 12) for prompt in prompts]
    assert [list(done[index].token_ids) for index in range(4)] == expected


def test_the_same_prompt_is_computed_but_for_its_last_token() -> None:
    model, prompt = tiny_model("llama"), random_prompts(1, longest=40)[0]
    batch = Batch(model, heads=HeadStore(1 << 20))
    first = a_prompt(0, prompt, temperature=1.0)
    batch.join(first)
    batch.step(capacity=3)
    rows = [first, *(a_prompt(index, prompt, temperature=1.0) for index in (1, 2))]
    for row in rows[1:]:
        batch.join(row)
        assert row.num_shared == len(prompt) - 1
    done = run_out(batch, [], rows=3)
    sampling = Sampling(temperature=1.0, max_new_tokens=12)
    drawn = in_order(generate(model, [prompt] * 3, stop_ids=[5, 9], sampling=sampling))
    assert [done[index].token_ids for index in range(3)] == [one.token_ids for one in drawn]


def test_contexts_that_see_what_follows_are_never_shared() -> None:
    model, draw = tiny("chatglm"), random.Random(0)
    prompt = a_row(draw, "chatglm", context=40, answer=0)
    batch = Batch(model, heads=HeadStore(1 << 20))
    answers = []
    for index in range(2):
        row = a_prompt(index, prompt)
        row.prefix = row_prefix(model, prompt)
        batch.join(row)
        assert row.num_shared == 0
        answers.append(run_out(batch, [], rows=1, most_tokens=3)[index].token_ids)  # and the context stays whole
    assert answers[0] == answers[1]
    expected = next(iter(generate(model, [prompt], stop_ids=[5, 9], sampling=Sampling(max_new_tokens=12))))
    assert answers[0] == expected.token_ids


def test_rows_behind_a_learnt_prefix_share_beginnings() -> None:
    model = attach_prefix(tiny_model("llama"), num_virtual_tokens=6, projection=False, seed=3)
    with torch.no_grad():
        states = prefix_states(model)
    prompt = random_prompts(1, longest=40, seed=8)[0] * 2
    expected = next(iter(generate(model, [prompt], stop_ids=[5, 9], sampling=Sampling(max_new_tokens=12))))
    store = HeadStore(1 << 20)
    for _ in range(2):
        batch = Batch(model, past_states=states, heads=store)
        assert run_out(batch, [a_prompt(0, prompt)], rows=1)[0].token_ids == expected.token_ids
    assert store.num_hits == 1


def test_the_store_keeps_to_its_bound_and_forgets_what_was_used_longest_ago() -> None:
    def states(tokens: tuple[int, ...]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.float32).expand(1, 2, 1, -1)[..., None]

    block_bytes = states(tuple(range(BLOCK))).nbytes
    store = HeadStore(6 * block_bytes)
    head = tuple(range(2 * BLOCK))
    tails = [tuple(range(100 * n, 100 * n + 2 * BLOCK)) for n in range(1, 6)]
    for tail in tails:
        tokens = head + tail
        store.keep("a", tokens, lambda start, end, tokens=tokens: states(tokens[start:end]))  # type: ignore[misc]
        assert store.num_bytes <= 6 * block_bytes
    found = [BLOCK * len(store.find("a", head + tail, most=999)) for tail in tails]
    assert found == [32, 32, 32, 64, 64], "what all begin with stays, of the rest the last two"
    blocks = store.find("a", head + tails[-1] + (7,), most=4 * BLOCK)
    assert torch.equal(store.take(blocks), states(head + tails[-1]))
    assert store.find("b", head, most=99) == [], "another adapter's keys are other keys"
    assert len(store.find("a", head, most=31)) == 1
    long = tuple(range(5000, 5000 + 20 * BLOCK))
    store.keep("a", long, lambda start, end: states(long[start:end]))
    assert BLOCK * len(store.find("a", long, most=999)) == 6 * BLOCK, "of what is longer than the memory, the beginning"
    nothing = HeadStore(0)
    nothing.keep("a", head, lambda start, end: states(head[start:end]))
    assert nothing.find("a", head, most=99) == []


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 200])
def test_num_alike_counts_to_the_first_difference(length: int) -> None:
    one, other = [1] * length, [1] * length
    assert num_alike(one, tuple(other)) == length
    assert num_alike([*one, 2], [*other, 3, 4]) == length
    assert num_alike([*one, 2, 5], [*other, 2]) == length + 1


def test_cache_shrinks_when_long_rows_are_gone() -> None:
    model = tiny_model("llama")
    batch = Batch(model)
    long, short = a_prompt(0, [3] * 140, limit=20), a_prompt(1, [4] * 5, limit=60)
    short.stop_ids = frozenset()
    batch.join(long)
    batch.join(short)
    expected = one_row(model, [4] * 5, [], 60)
    batch.step(capacity=8)
    most = batch.cache.num_bytes
    batch.leave(long)
    batch.trim(capacity=2)
    assert 0 < batch.cache.num_bytes < most / 4
    done = run_out(batch, [], rows=2)
    assert list(done[1].token_ids) == expected
    batch.trim(capacity=0)
    assert batch.cache.num_bytes == 0
    batch.join(a_prompt(2, [4] * 5))
    assert run_out(batch, [], rows=1).keys() == {2}, "and fills again"
