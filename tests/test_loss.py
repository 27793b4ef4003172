"""The chunked, supervised-only loss against plain cross-entropy over all logits, on tiny random models in fp32."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from weitiao.errors import ModelError
from weitiao.recipe import Lora
from weitiao.render.base import Example
from weitiao.train import loss as loss_module
from weitiao.train.batches import Batch, make_batches
from weitiao.train.loss import Head, head_of, supervised_loss
from weitiao.train.model import TrainedModel, check_head
from weitiao.tuning.methods import add_adapter

VOCABULARY = 97
SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def gemma2() -> PreTrainedModel:
    # Packed attention has no score softcap; the head's softcap is what is tested here.
    return Gemma2ForCausalLM(
        Gemma2Config(**SHARED, head_dim=8, sliding_window=5, final_logit_softcapping=3.0, attn_logit_softcapping=None)
    )


def gemma3() -> PreTrainedModel:
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHARED, head_dim=8, sliding_window=5))


def gemma3_softcapped() -> PreTrainedModel:
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHARED, head_dim=8, sliding_window=5, final_logit_softcapping=2.0))


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SHARED, tie_word_embeddings=False))


def qwen2_tied() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SHARED, tie_word_embeddings=True))


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SHARED))


MODELS = [gemma2, gemma3, gemma3_softcapped, qwen2, qwen2_tied, llama]
MakeModel = Callable[[], PreTrainedModel]


pytestmark = pytest.mark.usefixtures("one_thread")


def make(model: MakeModel) -> PreTrainedModel:
    torch.manual_seed(11)
    return model().float().eval()


def some_rows(count: int = 5, seed: int = 0) -> list[Example]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        num_prompt, num_answer = draw.randint(1, 12), draw.randint(1, 9)
        ids = tuple(draw.randrange(3, VOCABULARY) for _ in range(num_prompt + num_answer))
        rows.append(Example(token_ids=ids, loss_mask=(False,) * num_prompt + (True,) * num_answer))
    return rows


def packed(rows: list[Example]) -> Batch:
    [batch] = make_batches(rows, tokens_per_pass=10_000)
    return batch


def plain_loss(model: nn.Module, rows: list[Example]) -> Tensor:
    """The mean cross-entropy of the answers' tokens from the model's full logits, one row at a time."""
    total, count = torch.zeros(()), 0
    for row in rows:
        ids = torch.tensor([row.token_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        wanted = torch.tensor(row.loss_mask)[1:]
        total = total + cross_entropy(logits[:-1][wanted], ids[0, 1:][wanted], reduction="sum")
        count += int(wanted.sum())
    return total / count


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    """Equal names, and differences of at most 1e-6 of the whole gradient's length, parameter by parameter."""
    assert ours.keys() == reference.keys()
    assert reference, "nothing learns"
    length = math.sqrt(sum(float(grad.double().square().sum()) for grad in reference.values()))
    for name, grad in reference.items():
        assert float((ours[name] - grad).double().norm()) <= 1e-6 * length, name


def set_chunks(monkeypatch: pytest.MonkeyPatch, logit_rows: int, softmax_rows: int) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", logit_rows * VOCABULARY * 4)
    monkeypatch.setattr(loss_module, "_SOFTMAX_BYTES", softmax_rows * VOCABULARY * 4)


@pytest.mark.parametrize("make_model", MODELS)
@pytest.mark.parametrize("chunks", [(1, 1), (7, 3), (1000, 1000)])
def test_loss_and_adapter_gradients_equal_plain_cross_entropy(
    make_model: MakeModel, chunks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_chunks(monkeypatch, *chunks)
    model = add_adapter(make(make_model), Lora(rank=4), seed=1)
    with torch.no_grad():  # B starts at zero, and so would A's gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.eval()
    rows = some_rows()
    reference = plain_loss(model, rows)
    reference.backward()
    expected = gradients(model)
    ours = TrainedModel(model.get_base_model(), packing=True)(packed(rows))
    ours.backward()
    assert ours.item() == pytest.approx(reference.item(), rel=1e-6)
    assert_same_gradients(gradients(model), expected)
    assert len(expected) == 2 * 2 * 7, "A and B of seven linear layers in each of two layers"


@pytest.mark.parametrize("make_model", MODELS)
def test_gradients_of_head_and_embedding_equal_plain_cross_entropy(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_chunks(monkeypatch, 6, 4)
    model = make(make_model)
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    model.get_output_embeddings().weight.requires_grad_(True)
    rows = some_rows()
    reference = plain_loss(model, rows)
    reference.backward()
    expected = gradients(model)
    ours = TrainedModel(model, packing=True)(packed(rows))
    ours.backward()
    assert ours.item() == pytest.approx(reference.item(), rel=1e-6)
    assert_same_gradients(gradients(model), expected)
    tied = model.config.tie_word_embeddings
    assert len(expected) == (1 if tied else 2)


def test_all_weights_learn_as_with_plain_cross_entropy() -> None:
    model, rows = make(gemma3_softcapped), some_rows()
    plain_loss(model, rows).backward()
    expected = gradients(model)
    TrainedModel(model, packing=True)(packed(rows)).backward()
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_bias_scale_and_weights_of_positions_enter_loss_and_gradient(
    softcap: float | None, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_chunks(monkeypatch, chunk_rows, 3)
    torch.manual_seed(5)
    hidden, weight = torch.randn(11, 16), torch.randn(VOCABULARY, 16)
    bias, targets, shares = torch.randn(VOCABULARY), torch.randint(VOCABULARY, (11,)), torch.rand(11)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    head = Head(weight=weight, bias=bias, softcap=softcap, scale=0.25)
    told = torch.empty(11)
    ours = supervised_loss(hidden, targets, shares, head, out=told)
    found = torch.autograd.grad(3.0 * ours, leaves)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    logits = 0.25 * (wide[0] @ wide[1].t() + wide[2])
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(told.double(), losses.detach(), rtol=1e-5, atol=1e-6)
    reference = (losses * shares).sum()
    expected = torch.autograd.grad(3.0 * reference, wide)
    assert float(ours.detach()) == pytest.approx(float(reference.detach()), rel=1e-6)
    for one, other in zip(found, expected, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < 1e-6


@pytest.mark.parametrize("gap", [20.0, 89.0, 97.0, 103.0, 300.0])
def test_loss_is_exact_where_the_target_probability_underflows(gap: float) -> None:
    """exp(-89) is a denormal number, exp(-103) its last bit and exp(-300) zero."""
    weight = torch.zeros(VOCABULARY, 1)
    weight[4] = gap
    hidden, targets = torch.ones(2, 1, requires_grad=True), torch.tensor([7, 4])
    loss = supervised_loss(hidden, targets, torch.tensor([1.0, 1e-9]), Head(weight=weight))
    assert float(loss.detach()) == pytest.approx(gap, rel=1e-6)
    loss.backward()
    assert hidden.grad is not None
    assert float(hidden.grad[0]) == pytest.approx(gap, rel=1e-6)


def test_bfloat16_loss_stays_near_the_loss_in_float64() -> None:
    torch.manual_seed(2)
    hidden = torch.randn(40, 32, dtype=torch.bfloat16)
    weight = (torch.randn(500, 32) / 8).bfloat16()
    targets = torch.randint(500, (40,))
    ours = supervised_loss(hidden, targets, torch.full((40,), 1 / 40), Head(weight=weight))
    reference = cross_entropy(hidden.double() @ weight.double().t(), targets)
    assert ours.dtype == torch.float32
    assert float(ours) == pytest.approx(float(reference), rel=2e-3)


def test_no_gradient_is_computed_for_what_does_not_learn() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(VOCABULARY, 4)
    supervised_loss(hidden, torch.tensor([1, 2, 3]), torch.ones(3), Head(weight=weight)).backward()
    assert hidden.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("make_model", MODELS)
@pytest.mark.parametrize("packing", [True, False])
def test_check_head_accepts_every_known_head(make_model: MakeModel, packing: bool) -> None:
    trained = TrainedModel(make(make_model), packing=packing)
    check_head(trained, packed(some_rows(1)))


def test_check_head_refuses_a_model_that_changes_its_logits_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(llama)
    forward = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: 3.0 * forward(hidden) + 1.0)
    with pytest.raises(ModelError, match=r"logits give a loss of \d.*config\.json"):
        check_head(TrainedModel(model, packing=True), packed(some_rows(1)))


def test_check_head_refuses_a_softcap_that_the_model_does_not_apply() -> None:
    model = make(llama)
    model.config.final_logit_softcapping = 0.5
    assert head_of(model).softcap == 0.5
    with pytest.raises(ModelError, match="output layer does something weitiao does not know"):
        check_head(TrainedModel(model, packing=True), packed(some_rows(1)))
