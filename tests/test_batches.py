"""Order and layout of training rows: nothing is lost, resuming changes nothing, cutting into passes changes nothing."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from weitiao.data.order import epoch_order, epoch_sizes, num_steps, share_passes, step_rows
from weitiao.recipe import Lora
from weitiao.render.base import Example
from weitiao.train.batches import Batch, make_batches
from weitiao.train.model import TrainedModel
from weitiao.tuning.methods import add_adapter


def example(num_prompt: int, num_answer: int, first: int = 3) -> Example:
    ids = tuple(first + place % 50 for place in range(num_prompt + num_answer))
    return Example(token_ids=ids, loss_mask=(False,) * num_prompt + (True,) * num_answer)


any_example = st.builds(example, st.integers(1, 30), st.integers(1, 20), st.integers(3, 9))
examples = st.lists(any_example, min_size=1, max_size=12)
weights_lists = st.lists(st.sampled_from([1.0, 1.0, 2.0, 0.5, 1.5, 0.25]), min_size=1, max_size=30)


pytestmark = pytest.mark.usefixtures("one_thread")


# --- The order -------------------------------------------------------------------------------------------------------


def first_steps(
    count: int, weights: Sequence[float], *, batch_size: int, seed: int, first_step: int = 0
) -> list[list[int]]:
    steps = step_rows(weights, batch_size=batch_size, seed=seed, first_step=first_step)
    return [rows for _, rows in itertools.islice(steps, count)]


@given(num_rows=st.integers(1, 50), batch_size=st.integers(1, 16), seed=st.integers(0, 5), epochs=st.integers(1, 4))
def test_every_epoch_holds_every_row_once(num_rows: int, batch_size: int, seed: int, epochs: int) -> None:
    weights = [1.0] * num_rows
    steps = num_steps(weights, batch_size=batch_size, seed=seed, epochs=epochs)
    seen: dict[int, list[int]] = {}
    for epoch, rows in itertools.islice(step_rows(weights, batch_size=batch_size, seed=seed, first_step=0), steps):
        assert 1 <= len(rows) <= batch_size
        seen.setdefault(epoch, []).extend(rows)
    assert sorted(seen) == list(range(epochs))
    assert all(sorted(rows) == list(range(num_rows)) for rows in seen.values())


@given(weights=weights_lists, seed=st.integers(0, 5), first=st.integers(0, 7))
def test_a_row_of_weight_2_is_seen_twice_an_epoch_and_one_of_one_half_in_every_other(
    weights: list[float], seed: int, first: int
) -> None:
    counts = [Counter(epoch_order(weights, seed=seed, epoch=epoch)) for epoch in range(first, first + 4)]
    for row, weight in enumerate(weights):
        assert sum(count[row] for count in counts) == 4 * weight
        assert all(count[row] in (math.floor(weight), math.ceil(weight)) for count in counts)
        if weight == 0.5:
            assert counts[0][row] != counts[1][row]


def test_rows_of_weight_one_half_are_spread_over_both_epochs() -> None:
    halves = [set(epoch_order([0.5] * 200, seed=3, epoch=epoch)) for epoch in (0, 1)]
    assert halves[0] | halves[1] == set(range(200))
    assert 60 < len(halves[0]) < 140


@given(weights=weights_lists, batch_size=st.integers(1, 9), seed=st.integers(0, 3), first_step=st.integers(0, 40))
def test_resuming_at_any_step_continues_the_same_order(
    weights: list[float], batch_size: int, seed: int, first_step: int
) -> None:
    whole = first_steps(first_step + 10, weights, batch_size=batch_size, seed=seed)
    rest = first_steps(10, weights, batch_size=batch_size, seed=seed, first_step=first_step)
    assert rest == whole[first_step:]


def test_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    weights = [1.0] * 40
    random.seed(1)
    torch.manual_seed(1)
    order = epoch_order(weights, seed=7, epoch=2)
    random.seed(2)
    torch.manual_seed(2)
    assert epoch_order(weights, seed=7, epoch=2) == order
    assert epoch_order(weights, seed=8, epoch=2) != order
    assert epoch_order(weights, seed=7, epoch=3) != order


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "epochs", "steps"),
    [(10, 4, 1, 3), (10, 4, 3, 9), (10, 10, 2, 2), (3, 16, 5, 5), (40, 4, 0.5, 5), (40, 4, 1.5, 15), (3, 16, 0.01, 1)],
)
def test_number_of_steps_counts_the_last_smaller_step_of_every_epoch(
    num_rows: int, batch_size: int, epochs: float, steps: int
) -> None:
    assert num_steps([1.0] * num_rows, batch_size=batch_size, seed=0, epochs=epochs) == steps


# --- The layout ------------------------------------------------------------------------------------------------------


def rows_of(batch: Batch) -> list[tuple[int, ...]]:
    bounds = batch.row_starts.tolist()
    return [tuple(batch.token_ids[0, a:b].tolist()) for a, b in itertools.pairwise(bounds)]


def test_the_layout_is_the_one_in_the_docstring() -> None:
    short = Example(token_ids=(2, 7, 5), loss_mask=(False, False, True))
    long = Example(token_ids=(2, 9, 8, 1), loss_mask=(False, False, True, True))
    [batch] = make_batches([short, long], tokens_per_pass=100)
    assert batch.token_ids.tolist() == [[2, 9, 8, 1, 2, 7, 5]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.row_starts.tolist() == [0, 4, 7]
    assert batch.predictors.tolist() == [1, 2, 5]
    assert batch.targets.tolist() == [8, 1, 5]
    assert batch.weights.tolist() == pytest.approx([1 / 3] * 3)


@given(rows=examples, tokens_per_pass=st.integers(1, 120))
def test_no_row_is_lost_and_no_pass_exceeds_its_tokens_unless_one_row_does(
    rows: list[Example], tokens_per_pass: int
) -> None:
    batches = make_batches(rows, tokens_per_pass=tokens_per_pass)
    assert Counter(ids for batch in batches for ids in rows_of(batch)) == Counter(row.token_ids for row in rows)
    for batch in batches:
        assert batch.num_tokens <= tokens_per_pass or len(rows_of(batch)) == 1
        assert batch.row_starts[-1] == batch.num_tokens


@given(rows=examples, tokens_per_pass=st.integers(1, 120))
def test_every_learnt_token_is_predicted_from_the_token_before_it(rows: list[Example], tokens_per_pass: int) -> None:
    batches = make_batches(rows, tokens_per_pass=tokens_per_pass)
    for batch in batches:
        assert batch.token_ids[0, batch.predictors + 1].tolist() == batch.targets.tolist()
        starts = set(batch.row_starts.tolist())
        assert not any(place + 1 in starts for place in batch.predictors.tolist()), "a row predicts the next row"
    assert sum(len(batch.targets) for batch in batches) == sum(row.num_supervised for row in rows)


@given(rows=examples, row_balance=st.sampled_from([0.0, 0.3, 1.0]), tokens_per_pass=st.integers(1, 120))
def test_weights_of_a_step_sum_to_one_for_any_row_balance(
    rows: list[Example], row_balance: float, tokens_per_pass: int
) -> None:
    batches = make_batches(rows, tokens_per_pass=tokens_per_pass, row_balance=row_balance)
    assert sum(batch.weights.double().sum().item() for batch in batches) == pytest.approx(1, rel=1e-5)


@given(weights=st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0]), max_size=20), seed=st.integers(0, 9))
def test_epochs_are_counted_without_drawing_them(weights: list[float], seed: int) -> None:
    drawn = [len(epoch_order(weights, seed=seed, epoch=epoch)) for epoch in range(4)]
    assert epoch_sizes(weights, seed=seed, epochs=4) == drawn


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), tokens_per_pass=st.integers(1, 90))
def test_every_row_has_one_pass_and_no_two_passes_could_be_one(lengths: list[int], tokens_per_pass: int) -> None:
    passes = share_passes(lengths, tokens_per_pass=tokens_per_pass)
    assert sorted(place for places in passes for place in places) == list(range(len(lengths)))
    sizes = [sum(lengths[place] for place in places) for places in passes]
    assert all(size <= tokens_per_pass or len(places) == 1 for size, places in zip(sizes, passes, strict=True))
    assert all(one + other > tokens_per_pass for one, other in itertools.combinations(sizes, 2))


@settings(max_examples=30)
@given(rows=examples)
def test_row_balance_0_weighs_tokens_equally_and_1_weighs_rows_equally(rows: list[Example]) -> None:
    tokens = torch.cat([batch.weights for batch in make_batches(rows, tokens_per_pass=20, row_balance=0)])
    torch.testing.assert_close(tokens, torch.full_like(tokens, 1 / len(tokens)))
    for batch in make_batches(rows, tokens_per_pass=20, row_balance=1):
        bounds = batch.row_starts.tolist()
        for a, b in itertools.pairwise(bounds):
            inside = (batch.predictors >= a) & (batch.predictors < b)
            assert batch.weights[inside].sum().item() == pytest.approx(1 / len(rows), rel=1e-5)


# --- The gradient ----------------------------------------------------------------------------------------------------


def loss_and_gradient(
    rows: list[Example], tokens_per_pass: int, *, packing: bool, row_balance: float, round_to: int = 1
) -> tuple[float, Tensor]:
    torch.manual_seed(4)
    config = Gemma3TextConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=9, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    model = add_adapter(Gemma3ForCausalLM(config).float(), Lora(rank=4), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    trained = TrainedModel(model.get_base_model(), packing=packing)
    total = 0.0
    for batch in make_batches(rows, tokens_per_pass=tokens_per_pass, row_balance=row_balance, round_to=round_to):
        loss = trained(batch)
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("row_balance", [0.0, 0.5, 1.0])
def test_batching_accumulation_and_packing_leave_loss_and_gradient_unchanged(row_balance: float) -> None:
    draw = random.Random(5)
    rows = [example(draw.randint(1, 25), draw.randint(1, 12), draw.randint(3, 9)) for _ in range(7)]
    loss, gradient = loss_and_gradient(rows, 10_000, packing=True, row_balance=row_balance)
    assert loss > 1
    for tokens_per_pass, packing in ((70, True), (40, True), (1, True), (1, False)):
        other, same = loss_and_gradient(rows, tokens_per_pass, packing=packing, row_balance=row_balance)
        assert other == pytest.approx(loss, rel=1e-6)
        assert (same - gradient).norm().item() < 1e-6 * gradient.norm().item()


def test_passes_filled_to_round_lengths_leave_loss_and_gradient_unchanged() -> None:
    draw = random.Random(6)
    rows = [example(draw.randint(1, 25), draw.randint(1, 12), draw.randint(3, 9)) for _ in range(7)]
    loss, gradient = loss_and_gradient(rows, 70, packing=True, row_balance=0.0)
    other, same = loss_and_gradient(rows, 70, packing=True, row_balance=0.0, round_to=64)
    assert other == pytest.approx(loss, rel=1e-6)
    assert (same - gradient).norm().item() < 1e-6 * gradient.norm().item()


@given(rows=examples, round_to=st.integers(1, 50))
def test_filled_passes_are_round_and_count_real_tokens_only(rows: list[Example], round_to: int) -> None:
    batches = make_batches(rows, tokens_per_pass=40, round_to=round_to)
    assert sum(batch.num_tokens for batch in batches) == sum(map(len, rows))
    for batch in batches:
        assert batch.token_ids.shape[1] % round_to == 0
        assert batch.row_starts[-1] == batch.token_ids.shape[1] == batch.positions.shape[1]
        assert batch.token_ids.shape[1] - batch.num_tokens < round_to


@given(rows=examples, tokens_per_pass=st.integers(1, 120))
def test_owners_say_whose_token_is_learnt(rows: list[Example], tokens_per_pass: int) -> None:
    counted = Counter(place for b in make_batches(rows, tokens_per_pass=tokens_per_pass) for place in b.owners.tolist())
    assert [counted[place] for place in range(len(rows))] == [row.num_supervised for row in rows]


@given(rows=examples, heavy=st.floats(0.1, 10))
def test_a_row_weight_is_a_factor_on_its_tokens(rows: list[Example], heavy: float) -> None:
    factors = [heavy if place == 0 else 1.0 for place in range(len(rows))]
    [batch] = make_batches(rows, tokens_per_pass=10**6, row_weights=factors)
    mine = batch.owners == 0
    assert batch.weights.double().sum().item() == pytest.approx(1, rel=1e-5)
    if 0 < int(mine.sum()) < len(mine):
        assert (batch.weights[mine][0] / batch.weights[~mine][0]).item() == pytest.approx(heavy, rel=1e-4)


def test_row_balance_changes_the_loss_of_rows_of_unequal_length() -> None:
    rows = [example(3, 1, 3), example(3, 20, 9)]
    even = loss_and_gradient(rows, 100, packing=True, row_balance=1.0)[0]
    assert even != pytest.approx(loss_and_gradient(rows, 100, packing=True, row_balance=0.0)[0], rel=1e-3)
