"""Rows that share what they begin with: same loss and gradients as rows computed whole; and when they do not share."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefix_models import GMASK, SOP, tiny
from weitiao.data.order import bring_together, step_rows
from weitiao.errors import ModelError
from weitiao.models import tree_attention as tree_module
from weitiao.models.attention import packed_attention
from weitiao.models.tree_attention import tree_attention
from weitiao.recipe import Lora, Train
from weitiao.render.base import Example
from weitiao.train.batches import Batch, make_batches
from weitiao.train.model import TrainedModel
from weitiao.train.prompt_trees import grow_trees, num_tokens, prompt_groups, share_trees
from weitiao.train.shared_prompts import PromptSharing, compare_layouts, why_not_shared
from weitiao.train.step import step_batches
from weitiao.tuning.methods import add_adapter

CPU = torch.device("cpu")
FAMILIES = ["llama", "qwen2", "glm", "gemma3"]


pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def rows_that_branch(draw: st.DrawFn, *, most: int = 6) -> list[tuple[int, ...]]:
    """Rows each of which takes over the beginning of an earlier one, or none, and goes on on its own."""
    seed = draw(st.integers(0, 999))
    source = random.Random(seed)
    rows: list[tuple[int, ...]] = []
    for _ in range(draw(st.integers(1, most))):
        origin = rows[source.randrange(len(rows))] if rows and source.random() < 0.8 else ()
        kept = origin[: source.randint(0, len(origin))]
        own = tuple(source.randrange(4, 90) for _ in range(source.choice([0, 3, 20, 45]) or (not kept)))
        rows.append(kept + own)
    return rows


def examples_of(rows: Sequence[tuple[int, ...]], seed: int = 0) -> list[Example]:
    """Learnt tokens anywhere, in what is shared too; at least one that has a token before it."""
    draw = random.Random(seed)
    return [
        Example(token_ids=(1, *row, 2), loss_mask=(*(draw.random() < 0.3 for _ in range(len(row) + 1)), True))
        for row in rows
    ]


def asked(num_rows: int = 5, *, shared: int = 60, seed: int = 0) -> list[Example]:
    """Questions over one document; the answers are learnt."""
    draw = random.Random(seed)
    document = tuple(draw.randrange(4, 90) for _ in range(shared))
    rests = [tuple(draw.randrange(4, 90) for _ in range(draw.randint(6, 20))) for _ in range(num_rows)]
    return [
        Example(token_ids=document + rest, loss_mask=(False,) * (shared + 3) + (True,) * (len(rest) - 3))
        for rest in rests
    ]


# --- trees ------------------------------------------------------------------------------------------------------------


@given(rows=rows_that_branch(most=12), limit=st.integers(20, 300))
def test_every_path_from_a_root_spells_its_row_and_no_row_is_lost(rows: list[tuple[int, ...]], limit: int) -> None:
    places = [place for place in range(len(rows)) if place % 4 != 3]  # as one of several processes
    seen: Counter[int] = Counter()
    for segments in share_trees(rows, places, tokens_per_pass=limit):
        spelt: dict[int, tuple[int, ...]] = {}
        for number, segment in enumerate(segments):
            assert len(segment) > 0 and segment.parent < number
            if segment.parent < 0:
                assert segment.start == 0
            else:
                assert segment.start == segments[segment.parent].stop
                assert set(segment.rows) < set(segments[segment.parent].rows) or len(segment.rows) == 1
            for place in segment.rows:
                assert rows[place][segment.start : segment.stop] == rows[segment.rows[0]][segment.start : segment.stop]
                assert len(spelt.get(place, ())) == segment.start
                spelt[place] = spelt.get(place, ()) + rows[place][segment.start : segment.stop]
        assert all(spelt[place] == rows[place] for place in spelt)
        seen.update(spelt.keys())
        assert num_tokens(segments) <= limit or len(spelt) == 1
    assert seen == Counter(places)


def test_what_is_shared_is_cut_at_blocks_of_eight_from_32_tokens_on() -> None:
    common = tuple(range(40))
    rows = [(*common, 7), (*common, 8), (*common[:33], 9), (*common[:20], 3)]
    segments = grow_trees(rows, range(4))
    assert [(s.start, s.stop, s.parent, s.rows) for s in segments] == [
        (0, 21, -1, (3,)),
        (0, 32, -1, (2, 0, 1)),
        (32, 34, 1, (2,)),
        (32, 41, 1, (0,)),
        (32, 41, 1, (1,)),
    ]


def test_a_longer_beginning_of_some_rows_grows_from_the_one_of_all() -> None:
    common, more = tuple(range(40)), tuple(range(100, 140))
    segments = grow_trees([(*common, *more, 1), (*common, *more, 2), (*common, 3), (*common, *more)], range(4))
    assert [(s.start, s.stop, s.parent, s.rows) for s in segments] == [
        (0, 40, -1, (2, 3, 0, 1)),
        (40, 41, 0, (2,)),
        (40, 80, 0, (3, 0, 1)),
        (80, 81, 2, (0,)),
        (80, 81, 2, (1,)),
    ]


@given(rows=rows_that_branch(most=12), batch_size=st.integers(1, 6))
def test_rows_of_a_group_have_half_their_tokens_in_common(rows: list[tuple[int, ...]], batch_size: int) -> None:
    groups = prompt_groups(rows, batch_size=batch_size)
    for group in set(groups) - {-1}:
        members = [row for row, own in zip(rows, groups, strict=True) if own == group]
        common = next((n for n, tokens in enumerate(zip(*members)) if len(set(tokens)) > 1), min(map(len, members)))
        assert len(members) > 1 and common >= 32
        assert 2 * common * len(members) >= sum(map(len, members))


def test_questions_over_one_document_meet_in_a_step_and_every_epoch_anew() -> None:
    rows = [example.token_ids for seed in range(12) for example in asked(4, seed=seed)]
    rows += [example.token_ids for seed in range(12, 20) for example in asked(1, seed=seed)]
    groups = prompt_groups([(*range(200, 240), *row) for row in rows], batch_size=8)  # one instruction before all
    assert groups[:48] == [groups[4 * place] for place in range(12) for _ in range(4)]
    assert len(set(groups[:48])) == 12 and set(groups[48:]) == {-1}
    weights = [1.0] * len(rows)
    steps = step_rows(weights, batch_size=8, seed=3, first_step=0, groups=groups)
    epochs = [[row for _, one in itertools.islice(steps, 7) for row in one] for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(len(rows)))
        places = {group: [n for n, row in enumerate(epoch) if groups[row] == group] for group in set(groups[:48])}
        assert all(own[-1] - own[0] == 3 for own in places.values())
    assert epochs[0] != epochs[1]
    resumed = step_rows(weights, batch_size=8, seed=3, first_step=7, groups=groups)
    assert [row for _, one in itertools.islice(resumed, 7) for row in one] == epochs[1]


def test_a_document_with_more_questions_than_a_step_holds_is_cut_at_random() -> None:
    groups = prompt_groups([example.token_ids for example in asked(10)], batch_size=4)
    assert len(set(groups)) == 1 and groups[0] >= 0
    order = bring_together([3, 10, 0, 9, 1, 2, 4, 11, 5, 6, 7, 8], [*groups, -1, -1], most=4)
    assert order == [3, 0, 9, 1, 10, 2, 4, 5, 6, 11, 7, 8]


# --- attention --------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    rows=rows_that_branch(),
    window=st.sampled_from([0, 0, 5, 40]),
    past=st.sampled_from([0, 3]),
    groups=st.sampled_from([1, 2]),
)
def test_tree_attention_gives_each_row_what_it_gets_alone(
    rows: list[tuple[int, ...]], window: int, past: int, groups: int
) -> None:
    """A token's query, key and value depend on its place and what came before it; here on the row's tokens so far."""
    segments = grow_trees(rows, range(len(rows)))
    starts = torch.tensor([0, *torch.tensor([len(s) for s in segments]).cumsum(0).tolist()])
    parents = torch.tensor([s.parent for s in segments])
    total, generator = int(starts[-1]), torch.Generator().manual_seed(1)
    leaves = [torch.randn(1, heads, total, 4, generator=generator, requires_grad=True) for heads in (2 * groups, 2, 2)]
    learnt = [torch.randn(2, past, 4, generator=generator, requires_grad=True) for _ in "kv"]
    paths: dict[int, list[int]] = {}
    for number, segment in enumerate(segments):
        for place in segment.rows:
            paths.setdefault(place, []).extend(range(int(starts[number]), int(starts[number + 1])))
    ours = tree_attention(*leaves, *learnt, starts, parents, 0.5, window)
    upstream = torch.randn(ours.shape, generator=generator)
    loss, expected = torch.zeros(()), torch.zeros(())
    for path in paths.values():
        q, k, v = (leaf[:, :, path] for leaf in leaves)
        whole = _plain(q, *(torch.cat([p[None], x], 2) for p, x in zip(learnt, (k, v), strict=True)), past, window)
        torch.testing.assert_close(ours[0, path], whole, rtol=1e-5, atol=1e-5)
        expected = expected + (whole * upstream[0, path]).sum()
        loss = loss + (ours[0, path] * upstream[0, path]).sum()
    inputs = [*leaves, *learnt]
    for one, other in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def _plain(q: Tensor, k: Tensor, v: Tensor, past: int, window: int) -> Tensor:
    """softmax(0.5 q kᵀ) v of one row, the mask written out: ``[S, H, D]``."""
    length = q.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    seen = torch.tensor(
        [
            [j < past or (j - past <= i and (not window or j - past > i - window)) for j in range(past + length)]
            for i in range(length)
        ]
    )
    scores = (0.5 * q @ k.transpose(2, 3)).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v)[0].transpose(0, 1)


def test_rows_that_share_nothing_are_those_of_packed_attention() -> None:
    q, k, v = (torch.randn(1, heads, 20, 8) for heads in (4, 2, 2))
    starts, none = torch.tensor([0, 7, 20]), torch.tensor([-1, -1])
    learnt = torch.zeros(2, 0, 8)
    ours = tree_attention(q, k, v, learnt, learnt, starts, none, 0.3, 0)
    assert torch.equal(ours, packed_attention(q, k, v, starts, 0.3, 0))


def test_a_segment_cannot_grow_from_one_behind_it() -> None:
    q = torch.randn(1, 1, 4, 2)
    with pytest.raises(ValueError, match="Segment 0 grows from segment 1"):
        tree_attention(q, q, q, q[0, :, :0], q[0, :, :0], torch.tensor([0, 2, 4]), torch.tensor([1, -1]), 1.0, 0)


def test_the_operators_keep_the_rules_that_compiling_needs() -> None:
    """Also for queries, keys and values that are views of other shapes, as models make them."""
    q, k, v = (torch.randn(1, 30, heads, 8).transpose(1, 2).requires_grad_() for heads in (4, 2, 2))
    past = [torch.randn(2, 3, 8, requires_grad=True) for _ in "kv"]
    given = (q, k, v, *past, torch.tensor([0, 12, 20, 30]), torch.tensor([-1, 0, 0]), 0.3, 9)
    torch.library.opcheck(tree_attention, given)


# --- loss and gradient ------------------------------------------------------------------------------------------------


def loss_and_gradients(trained: TrainedModel, batches: Sequence[Batch]) -> tuple[float, Tensor]:
    total = 0.0
    for batch in batches:
        loss = trained(batch)
        loss.backward()
        total += loss.item()
    found = torch.cat([p.grad.flatten() for p in trained.parameters() if p.grad is not None])
    trained.zero_grad(set_to_none=True)
    return total, found


def assert_the_same(trained: TrainedModel, rows: list[Example], *, limit: int = 150, round_to: int = 64) -> None:
    loss, gradient = loss_and_gradients(trained, make_batches(rows, tokens_per_pass=10_000))
    for passes in ((10_000, 1), (limit, round_to)):
        shared = make_batches(rows, tokens_per_pass=passes[0], round_to=passes[1], share=True)
        other, same = loss_and_gradients(trained, shared)
        assert other == pytest.approx(loss, rel=1e-5)
        assert (same - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None)
@given(rows=rows_that_branch(), past=st.sampled_from([0, 4]), checkpointing=st.booleans())
def test_all_parameters_have_the_gradient_of_rows_computed_whole(
    family: str, rows: list[tuple[int, ...]], past: int, checkpointing: bool
) -> None:
    model = tiny(family, past=past).requires_grad_(True)
    if checkpointing:
        model.activation_checkpointing_enable()
    assert_the_same(TrainedModel(model.train(), packing=True), examples_of(rows))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_have_the_gradient_of_rows_computed_whole(family: str, checkpointing: bool) -> None:
    model = add_adapter(tiny(family), Lora(rank=4), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    base = model.get_base_model()
    if checkpointing:
        base.activation_checkpointing_enable()
    trained = TrainedModel(base.train(), packing=True)
    assert_the_same(trained, asked())
    assert any(batch.row_parents is not None for batch in make_batches(asked(), tokens_per_pass=150, share=True))


@given(rows=rows_that_branch(most=10), limit=st.integers(30, 400), balance=st.sampled_from([0.0, 0.5]))
def test_every_learnt_token_keeps_its_weight_owner_and_predecessor(
    rows: list[tuple[int, ...]], limit: int, balance: float
) -> None:
    examples = examples_of(rows)
    plain, shared = (
        make_batches(examples, tokens_per_pass=limit, row_balance=balance, round_to=16, share=share)
        for share in (False, True)
    )
    learnt = []
    for batches in (plain, shared):
        assert sum(batch.num_tokens for batch in batches) == sum(map(len, examples))
        learnt.append(
            Counter(
                (owner, int(batch.token_ids[0, place]), int(batch.positions[0, place]), target, round(weight, 7))
                for batch in batches
                for owner, place, target, weight in zip(
                    batch.owners.tolist(), batch.predictors.tolist(), batch.targets.tolist(), batch.weights.tolist(),
                    strict=True,
                )
            )
        )  # fmt: skip
    assert learnt[0] == learnt[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks at it
def test_layers_can_be_compiled() -> None:
    """One of them, traced for forward and backward; the others stay as they are."""
    trained = TrainedModel(tiny("llama").requires_grad_(True).train(), packing=True)
    loss, gradient = loss_and_gradients(trained, make_batches(asked(), tokens_per_pass=10_000))
    trained.model.model.layers[1].compile(dynamic=True, backend="aot_eager")
    shared = make_batches(asked(), tokens_per_pass=10_000, share=True)
    other, same = loss_and_gradients(trained, shared)
    assert other == pytest.approx(loss, rel=1e-5)
    assert (same - gradient).norm() <= 1e-5 * gradient.norm()


# --- when rows share --------------------------------------------------------------------------------------------------


def lay_out(
    trained: TrainedModel, rows: list[Example], *, times: int = 2, **changes: str
) -> tuple[list[Batch], list[str]]:
    """What a training's second step gets, and what is said."""
    run, said = Train(tokens_per_pass=300, **changes), []  # type: ignore[arg-type]
    sharing = PromptSharing(trained, run, said.append)

    def make(*, share: bool) -> list[Batch]:
        return step_batches(rows, [""] * len(rows), run, CPU, row_prefix=trained.row_prefix, share=share)

    for _ in range(times):
        batches = sharing.lay_out(rows, make)
    return batches, said


def test_the_first_step_proves_that_nothing_changes_and_says_so_once() -> None:
    trained = TrainedModel(tiny("qwen2").requires_grad_(True).train(), packing=True)
    state = torch.get_rng_state()
    batches, said = lay_out(trained, asked())
    assert batches[0].row_parents is not None
    assert said == [
        "Rows begin alike: what they share is computed once, in this step 256 tokens instead of 512. Its loss and "
        "gradient are the same."
    ]
    assert all(parameter.grad is None for parameter in trained.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_never_is_never_and_rows_that_share_little_stay_whole() -> None:
    trained = TrainedModel(tiny("llama").requires_grad_(True).train(), packing=True)
    for rows, settings_ in ((asked(), {"shared_prompts": "never"}), (asked(shared=5), {}), (asked(1), {})):
        batches, said = lay_out(trained, rows, **settings_)
        assert said == []
        assert all(batch.row_parents is None for batch in batches)


def test_a_model_that_computes_something_else_keeps_its_rows_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here its segments do not see what they go on from."""
    trained = TrainedModel(tiny("llama").requires_grad_(True).train(), packing=True)
    path = tree_module._segments
    monkeypatch.setattr(tree_module, "_segments", lambda *known: [(span, []) for span, _ in path(*known)])
    batches, said = lay_out(trained, asked())
    assert all(batch.row_parents is None for batch in batches)
    assert len(said) == 1
    assert said[0].startswith("Rows begin alike, but each is computed whole: the loss would be ")


def test_a_gradient_that_differs_is_seen_where_the_loss_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = TrainedModel(tiny("llama").requires_grad_(True).train(), packing=True)
    plain, shared = (make_batches(asked(), tokens_per_pass=300, share=share) for share in (False, True))
    assert compare_layouts(trained, plain, shared) == ""
    monkeypatch.setattr(tree_module, "row_gradients", lambda grad, q, k, v, *_, **__: (0 * q, 0 * k, 0 * v))
    assert "the gradient would differ by" in compare_layouts(trained, plain, shared)


def test_dropout_keeps_rows_whole_and_says_why() -> None:
    model = add_adapter(tiny("llama"), Lora(rank=4, dropout=0.1), seed=1)
    trained = TrainedModel(model.get_base_model().train(), packing=True)
    batches, said = lay_out(trained, asked())
    assert all(batch.row_parents is None for batch in batches)
    assert said == ["Rows begin alike, but each is computed whole: with a dropout of 0.1 each row drops other numbers."]


def test_contexts_that_are_read_in_both_directions_are_never_shared() -> None:
    draw = random.Random(1)
    document = tuple(draw.randrange(4, 90) for _ in range(60))
    rests = [(*(draw.randrange(4, 90) for _ in range(5)), GMASK, SOP, 7, 8) for _ in range(4)]
    rows = [Example(token_ids=document + rest, loss_mask=(False,) * 67 + (True,) * 2) for rest in rests]
    trained = TrainedModel(tiny("chatglm").requires_grad_(True).train(), packing=True)
    batches, said = lay_out(trained, rows)
    assert all(batch.row_parents is None for batch in batches)
    assert len(said) == 1 and "every token of a context sees all of it" in said[0]
    with pytest.raises(ModelError, match="cannot share their beginnings"):
        make_batches(rows, tokens_per_pass=300, row_prefix=trained.row_prefix, share=True)


def test_a_process_without_rows_of_its_own_has_no_passes() -> None:
    assert make_batches(asked(), tokens_per_pass=300, places=[], share=True) == []
    [batch] = make_batches(asked(), tokens_per_pass=300, places=[1, 3], share=True)
    assert sorted(set(batch.owners.tolist())) == [1, 3]
    assert batch.row_parents is not None


def test_rows_taken_one_at_a_time_share_nothing() -> None:
    assert "train.packing=false" in why_not_shared(TrainedModel(tiny("llama").train(), packing=False))
