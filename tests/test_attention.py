"""Packed attention against dense attention with a block-diagonal mask, and packed models against rows alone."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from weitiao.errors import ModelError
from weitiao.models import attention, row_attention
from weitiao.models.attention import PACKED, packed_attention, prefixed_attention
from weitiao.render.base import Example
from weitiao.train.batches import make_batches

SHARED = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def gemma3() -> PreTrainedModel:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHARED, head_dim=16, sliding_window=5, layer_types=layers))


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SHARED))


def qwen2_sliding() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SHARED, use_sliding_window=True, sliding_window=6, max_window_layers=1))


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SHARED))


MakeModel = Callable[[], PreTrainedModel]
MODELS = [gemma3, qwen2, qwen2_sliding, llama]


def make(model: MakeModel) -> PreTrainedModel:
    torch.manual_seed(11)
    return model().float().eval()


pytestmark = pytest.mark.usefixtures("one_thread")


def dense_attention_behind(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, rows: list[tuple[int, int]], window: int
) -> Tensor:
    """The same for rows of (length, context) behind learnt keys; scores times 0.3."""
    lengths, contexts = (torch.tensor(each) for each in zip(*rows, strict=True))
    row, past = torch.repeat_interleave(torch.arange(len(rows)), lengths), past_k.shape[1]
    place = torch.cat([torch.arange(length) for length in lengths])
    earlier = place[None, :] <= place[:, None]
    if window:
        earlier &= place[:, None] - place[None, :] < window
    own = (row[:, None] == row[None, :]) & (earlier | (place < contexts[row])[None, :])
    allowed = torch.cat([torch.ones(len(row), past, dtype=torch.bool), own], dim=1)
    groups = q.shape[1] // k.shape[1]
    k, v = (torch.cat([p[None], x], dim=2).repeat_interleave(groups, dim=1) for p, x in ((past_k, k), (past_v, v)))
    out = scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=allowed, scale=0.3)
    return out.transpose(1, 2)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scaling: float, window: int) -> Tensor:
    """The reference: one attention over everything, masked to each row's own past, in float64."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    allowed = (row[:, None] == row[None, :]) & (place[None, :] <= place[:, None])
    if window:
        allowed &= place[:, None] - place[None, :] < window
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    out = scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=allowed, scale=scaling)
    return out.transpose(1, 2)


def random_inputs(lengths: list[int], *, heads: int, kv_heads: int, size: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths) + heads)
    total = sum(lengths)
    shapes = [(1, heads, total, size), (1, kv_heads, total, size), (1, kv_heads, total, size)]
    qkv = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    return qkv, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


@pytest.mark.parametrize("lengths", [[1], [7], [5, 1, 12, 3], [1, 1, 1], [40, 9, 33]])
@pytest.mark.parametrize("window", [0, 1, 4, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("block", [8, 256])
def test_packed_attention_equals_dense_block_diagonal_attention(
    lengths: list[int], window: int, heads: int, kv_heads: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocks of 8 queries most rows are longer than a block; 12 and 40 are whole blocks and a rest."""
    monkeypatch.setattr(row_attention, "BLOCK", block)
    qkv, starts = random_inputs(lengths, heads=heads, kv_heads=kv_heads, size=16)
    ours = packed_attention(*qkv, starts, 0.3, window)
    reference = dense_attention(*qkv, lengths, 0.3, window)
    torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=2e-6)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(ours, qkv, upstream)
    expected = torch.autograd.grad(reference, qkv, upstream.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=5e-6)


ROWS_WITH_CONTEXTS = [[(1, 0)], [(7, 3), (1, 1)], [(12, 12), (9, 0), (20, 1)], [(40, 33), (9, 2), (33, 16)]]


@pytest.mark.parametrize("rows", ROWS_WITH_CONTEXTS)
@pytest.mark.parametrize("past", [0, 1, 5])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("block", [8, 256])
def test_prefixed_attention_equals_dense_attention_with_the_mask_written_out(
    rows: list[tuple[int, int]], past: int, window: int, kv_heads: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_attention, "BLOCK", block)
    rows = [(length, 0) for length, _ in rows] if window else rows  # contexts have no window
    qkv, starts = random_inputs([length for length, _ in rows], heads=4, kv_heads=kv_heads, size=16)
    learnt = [torch.randn(kv_heads, past, 16, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
    inputs = [*qkv, *(x.requires_grad_() for x in learnt)]
    ours = prefixed_attention(*inputs, starts, torch.tensor([context for _, context in rows]), 0.3, window)
    reference = dense_attention_behind(*inputs, rows, window)
    torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=2e-6)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(ours, inputs, upstream)
    expected = torch.autograd.grad(reference, inputs, upstream.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_contexts_and_learnt_keys_not_a_bit_changes(dtype: torch.dtype) -> None:
    qkv, starts = random_inputs([300, 2, 40], heads=4, kv_heads=2, size=16)
    qkv = [x.detach().to(dtype).requires_grad_() for x in qkv]
    plain = packed_attention(*qkv, starts, 0.3, 0)
    none = torch.zeros(2, 0, 16, dtype=dtype)
    other = prefixed_attention(*qkv, none, none, starts, torch.tensor([0, 0, 0]), 0.3, 0)
    assert torch.equal(plain, other)
    upstream = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    both = (torch.autograd.grad(out, qkv, upstream) for out in (plain, other))
    assert all(torch.equal(one, same) for one, same in zip(*both, strict=True))


def test_contexts_that_cannot_be_are_refused() -> None:
    qkv, starts = random_inputs([3, 2], heads=2, kv_heads=2, size=8)
    none = torch.zeros(2, 0, 8)
    with pytest.raises(ValueError, match="A row of 2 tokens cannot have 3 tokens of context"):
        prefixed_attention(*qkv, none, none, starts, torch.tensor([1, 3]), 0.3, 0)
    with pytest.raises(ModelError, match="sliding window of 4 tokens would hide a part of the context"):
        prefixed_attention(*qkv, none, none, starts, torch.tensor([1, 2]), 0.3, 4)


def test_rows_longer_than_a_real_block_have_the_gradients_of_dense_attention() -> None:
    lengths = [300, 2, 600]
    qkv, starts = random_inputs(lengths, heads=2, kv_heads=1, size=8)
    ours = packed_attention(*qkv, starts, 0.3, 270)
    reference = dense_attention(*qkv, lengths, 0.3, 270)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(ours, qkv, upstream)
    expected = torch.autograd.grad(reference, qkv, upstream.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-5)


def test_inputs_as_models_give_them_need_not_be_contiguous() -> None:
    qkv, starts = random_inputs([9, 4], heads=4, kv_heads=2, size=8)
    expected = packed_attention(*qkv, starts, 0.3, 0)
    expected.square().sum().backward()
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in qkv]
    assert not strided[0].is_contiguous()
    ours = packed_attention(*strided, starts, 0.3, 0)
    ours.square().sum().backward()
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    for one, other in zip(strided, qkv, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [0, 3])
def test_torch_accepts_the_operator(window: int) -> None:
    """Schema, fake shapes and autograd registration; the tracing test compiles, which takes too long here."""
    qkv, starts = random_inputs([6, 3], heads=4, kv_heads=2, size=8)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(packed_attention, (*qkv, starts, 0.3, window), test_utils=tests)
    plain = [x.detach() for x in qkv]
    grad = torch.randn(1, 9, 4, 8)
    arguments = (grad, *plain, starts, 0.3, window)
    torch.library.opcheck(attention.packed_attention_backward, arguments, test_utils=tests)


@pytest.mark.parametrize("past", [0, 2])
def test_torch_accepts_the_operator_with_contexts(past: int) -> None:
    qkv, starts = random_inputs([6, 3], heads=4, kv_heads=2, size=8)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    learnt = [torch.randn(2, past, 8).requires_grad_() for _ in "kv"]
    rest = (starts, torch.tensor([4, 0]), 0.3, 0)
    torch.library.opcheck(prefixed_attention, (*qkv, *learnt, *rest), test_utils=tests)
    arguments = (torch.randn(1, 9, 4, 8), *(x.detach() for x in (*qkv, *learnt)), *rest)
    torch.library.opcheck(attention.prefixed_attention_backward, arguments, test_utils=tests)


def hidden_states(model: PreTrainedModel, rows: list[Example]) -> Tensor:
    """``[tokens, hidden]`` of all rows packed into one batch, in the order of the rows."""
    [batch] = make_batches(rows, tokens_per_pass=10_000)
    output = model.get_decoder()(
        input_ids=batch.token_ids, position_ids=batch.positions, row_starts=batch.row_starts, use_cache=False
    )
    return output.last_hidden_state[0]


@pytest.mark.parametrize("make_model", MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_packed_rows_have_the_hidden_states_they_have_alone(make_model: MakeModel, seed: int) -> None:
    draw, model = random.Random(seed), make(make_model)
    lengths = sorted((draw.randint(2, 30) for _ in range(6)), reverse=True)  # the order in which rows are packed
    rows = [
        Example(token_ids=tuple(draw.randrange(3, 61) for _ in range(n)), loss_mask=(False,) * (n - 1) + (True,))
        for n in lengths
    ]
    with torch.no_grad():
        alone = [
            model.get_decoder()(input_ids=torch.tensor([row.token_ids]), use_cache=False).last_hidden_state[0]
            for row in rows
        ]
        model.set_attn_implementation(PACKED)
        together = hidden_states(model, rows)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=2e-5)


def test_a_row_does_not_notice_what_stands_before_and_behind_it() -> None:
    model = make(gemma3)
    model.set_attn_implementation(PACKED)
    row = Example(token_ids=(5, 9, 13, 8), loss_mask=(False, False, True, True))
    others = [tuple(range(a, a + 4)) for a in (3, 20, 40)]
    with torch.no_grad():
        found = [hidden_states(model, [Example(token_ids=other, loss_mask=row.loss_mask), row])[4:] for other in others]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=0)


def test_packed_attention_without_row_starts_is_refused() -> None:
    model = make(llama)
    model.set_attn_implementation(PACKED)
    with pytest.raises(ModelError, match="without row_starts"):
        model(input_ids=torch.tensor([[3, 4, 5]]))


def test_score_softcap_and_attention_dropout_are_refused_with_the_setting_that_helps() -> None:
    qkv, starts = random_inputs([3], heads=2, kv_heads=2, size=8)
    forward = attention._attention_forward
    for what in ({"softcap": 50.0}, {"dropout": 0.1}):
        with pytest.raises(ModelError, match=r"cannot honour.*train\.packing=false"):
            forward(torch.nn.Identity(), *qkv, None, row_starts=starts, **what)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="explicit mask"):
        forward(torch.nn.Identity(), *qkv, torch.zeros(1, 1, 3, 3), row_starts=starts)
