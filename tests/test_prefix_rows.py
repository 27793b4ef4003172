"""Packed rows with contexts (ChatGLM-6B) and learnt prefixes (P-Tuning v2) against each row alone; their training."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefix_models import EOP, GMASK, SOP, a_row, tiny
from weitiao.errors import ModelError
from weitiao.models import attention
from weitiao.models.attention import PACKED
from weitiao.models.prefix_lm import row_prefix
from weitiao.models.ptuning import prefix_states
from weitiao.models.row_attention import row_attention
from weitiao.recipe import Train
from weitiao.render.base import Example
from weitiao.train.batches import Batch, make_batches, make_probe
from weitiao.train.model import TrainedModel, check_head
from weitiao.train.packing import check_packing
from weitiao.train.scoring import dev_loss
from weitiao.train.step import step_batches

FAMILIES = ["chatglm", "glm", "qwen2", "llama"]


def an_example(draw: random.Random, family: str, *, context: int, answer: int) -> Example:
    tokens = a_row(draw, family, context=context, answer=answer)
    return Example(token_ids=tuple(tokens), loss_mask=(False,) * (context + 1) + (True,) * answer)


def some_examples(family: str, count: int = 5, seed: int = 0) -> list[Example]:
    draw = random.Random(seed)
    return [an_example(draw, family, context=draw.randint(1, 40), answer=draw.randint(1, 20)) for _ in range(count)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    assert ours.keys() == reference.keys() and reference
    whole = torch.cat([grad.flatten() for grad in reference.values()]).norm()
    for name, grad in reference.items():
        assert (ours[name] - grad).norm() <= 1e-5 * max(grad.norm(), 0.01 * whole), name


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- packed rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 70), st.integers(0, 20)), min_size=1, max_size=4),
    past=st.sampled_from([0, 1, 5]),
    checkpointing=st.booleans(),
    seed=st.integers(0, 99),
)
def test_packed_rows_have_the_hidden_states_and_gradients_of_rows_alone(
    family: str, lengths: list[tuple[int, int]], past: int, checkpointing: bool, seed: int
) -> None:
    """Alone: the model's own forward, which makes masks and positions itself and takes a prefix by its hooks."""
    draw, model = random.Random(seed), tiny(family, past=past).requires_grad_(True)
    rows = [a_row(draw, family, context=context, answer=answer) for context, answer in lengths]
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    alone = torch.cat([model.get_decoder()(torch.tensor([r]), use_cache=False).last_hidden_state[0] for r in rows])
    upstream = torch.randn(alone.shape, generator=torch.Generator().manual_seed(seed))
    alone.backward(upstream)
    expected = gradients(model)

    prefixes = [row_prefix(model, row) for row in rows]
    kept = [prefix for prefix in prefixes if prefix is not None]
    positions = [[*range(len(row))] for row in rows]
    channels = [prefix.positions(0, len(row)) for prefix, row in zip(kept, rows)]
    model.set_attn_implementation(PACKED)
    together = model.get_decoder()(
        input_ids=torch.tensor([[token for row in rows for token in row]]),
        position_ids=torch.cat([torch.tensor([c]) for c in (channels or positions)], dim=-1),
        row_starts=torch.tensor([0, *torch.tensor([len(row) for row in rows]).cumsum(0).tolist()]),
        row_prefixes=torch.tensor([prefix.num_tokens for prefix in kept]) if kept else None,
        past_states=prefix_states(model),
        use_cache=False,
    ).last_hidden_state[0]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    together.backward(upstream)
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_learnt_keys_and_values_have_the_gradients_of_a_plain_formula(family: str, checkpointing: bool) -> None:
    """Keys and values straight from a leaf, several rows that share them, filler behind; the loss in the loop's way."""
    examples, model = some_examples(family), tiny(family)
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    heads = 4 if family == "chatglm" else 2
    leaves = [torch.randn(3, heads, 6, 8, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in (1, 2)]
    weight = 1 / sum(row.num_supervised for row in examples)
    losses = []
    model.set_attn_implementation("plain_formula")
    for row in examples:
        prefix = row_prefix(model, row.token_ids)
        positions = [*range(len(row))] if prefix is None else prefix.positions(0, len(row))
        logits = model(
            torch.tensor([row.token_ids]),
            position_ids=torch.tensor([positions]),
            use_cache=False,
            past_states=leaves,
            context=0 if prefix is None else prefix.num_tokens,
        ).logits[0]
        learnt = torch.tensor(row.loss_mask)[1:]
        wanted = torch.tensor(row.token_ids)[1:][learnt]
        losses.append(nn.functional.cross_entropy(logits[:-1][learnt], wanted, reduction="sum") * weight)
    expected = torch.autograd.grad(sum(losses), leaves)  # type: ignore[arg-type]

    trained = TrainedModel(model, packing=True)
    total = torch.zeros(())
    for batch in make_batches(examples, tokens_per_pass=120, round_to=64, row_prefix=trained.row_prefix):
        hidden = trained.body(
            input_ids=batch.token_ids, position_ids=batch.positions, use_cache=False, past_states=tuple(leaves),
            **trained.rows_of(batch),
        ).last_hidden_state[0]  # fmt: skip
        logits = model.lm_head(hidden[batch.predictors])
        total = total + (nn.functional.cross_entropy(logits, batch.targets, reduction="none") * batch.weights).sum()
    assert float(total.detach()) == pytest.approx(sum(float(loss.detach()) for loss in losses), rel=1e-5)
    for one, other in zip(torch.autograd.grad(total, leaves), expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


# ---- training -----------------------------------------------------------------------------------------------------


def loss_and_gradients(model: PreTrainedModel, batches: list[Batch], trained: TrainedModel) -> tuple[float, Any]:
    losses = [trained(batch) for batch in batches]
    sum(losses).backward()  # type: ignore[union-attr]
    return float(sum(float(loss.detach()) for loss in losses)), gradients(model)


@pytest.mark.parametrize(("family", "past"), [("chatglm", 0), ("chatglm", 4), ("glm", 4), ("gemma3", 4)])
def test_packing_filler_and_passes_change_neither_loss_nor_gradients(family: str, past: int) -> None:
    examples, model = some_examples(family, count=6), tiny(family, past=past)
    trained = TrainedModel(model, packing=False)
    batches = make_batches(examples, tokens_per_pass=1, row_prefix=trained.row_prefix)
    loss, expected = loss_and_gradients(model, batches, trained)
    assert loss > 1
    assert bool(past) == any("prefix_encoder" in name for name in expected)
    trained = TrainedModel(model, packing=True)
    for tokens_per_pass, round_to in ((1000, 1), (1000, 128), (90, 32), (1, 1)):
        batches = make_batches(
            examples, tokens_per_pass=tokens_per_pass, round_to=round_to, row_prefix=trained.row_prefix
        )
        found, ours = loss_and_gradients(model, batches, trained)
        assert found == pytest.approx(loss, rel=1e-5)
        assert_same_gradients(ours, expected)


@pytest.mark.parametrize("packing", [False, True])
def test_checks_steps_and_dev_loss_know_contexts(packing: bool) -> None:
    examples, model = some_examples("chatglm"), tiny("chatglm", past=3)
    check_packing(model, examples)
    assert (model.config._attn_implementation, model.training) == ("sdpa", False)
    run, trained = Train(batch_size=2, row_balance=0.0, packing=packing), TrainedModel(model, packing=packing)
    check_head(trained, make_probe(examples, row_prefix=trained.row_prefix))
    batches = step_batches(examples, [""] * 5, run, torch.device("cpu"), row_prefix=trained.row_prefix)
    with torch.no_grad():
        loss = sum(float(trained(batch)) for batch in batches)
    found, _ = dev_loss(trained, examples, [""] * 5, run)
    assert found == pytest.approx(loss, rel=1e-5)


def test_rows_that_see_each_other_are_found_in_prefix_language_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_row(q: Tensor, k: Tensor, v: Tensor, _pk: Tensor, _pv: Tensor, *rest: Any) -> Tensor:
        contexts, scaling = rest[1], rest[2]
        return row_attention(q, k, v, scaling, context=int(contexts[0])).transpose(1, 2)

    monkeypatch.setattr(attention, "prefixed_attention", one_row)
    with pytest.raises(ModelError, match="Rows laid end to end see each other in this model"):
        check_packing(tiny("chatglm"), some_examples("chatglm"))


def test_filler_has_no_context_and_contexts_stay_on_the_cpu() -> None:
    row = Example(token_ids=(5, GMASK, SOP, 8, EOP), loss_mask=(False, False, True, True, True))
    [batch] = make_batches([row], tokens_per_pass=9, round_to=8, row_prefix=tiny("chatglm").row_prefix)
    assert batch.positions.tolist() == [[[0, 1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 2, 3, 1, 2, 3]]]
    assert batch.row_prefixes is not None
    assert batch.row_prefixes.tolist() == [2, 0]
    moved = batch.to(torch.device("meta"))
    assert (moved.positions.device.type, moved.row_prefixes.device.type) == ("meta", "cpu")  # type: ignore[union-attr]


def test_a_causal_model_is_called_as_if_there_were_no_contexts() -> None:
    trained = TrainedModel(tiny("llama"), packing=True)
    [batch] = make_batches(some_examples("llama", 2), tokens_per_pass=500, row_prefix=trained.row_prefix)
    assert batch.row_prefixes is None and batch.positions.ndim == 2
    assert list(trained.rows_of(batch)) == ["row_starts"]


def test_rows_without_their_context_are_refused() -> None:
    row = Example(token_ids=(5, 6, 7, 8), loss_mask=(False, False, True, True))
    trained = TrainedModel(tiny("chatglm"), packing=True)
    with pytest.raises(ModelError, match="no <sop>"):
        make_batches([row], tokens_per_pass=9, row_prefix=trained.row_prefix)
    with pytest.raises(AssertionError, match="row_prefix"):
        trained(make_batches([row], tokens_per_pass=9)[0])
