"""Cross-entropies block of words by block of words, against all logits at once in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from weitiao.train import loss as loss_module
from weitiao.train import vocabulary_blocks
from weitiao.train.loss import Head, supervised_loss
from weitiao.train.vocabulary_blocks import loss_by_blocks

pytestmark = pytest.mark.usefixtures("one_thread")


def some_positions(count: int, *, words: int = 100, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(count)
    hidden, weight = scale * torch.randn(count, 24), torch.randn(words, 24)
    return hidden, torch.randint(words, (count,)), torch.rand(count), weight


def reference(hidden: Tensor, targets: Tensor, weights: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    wide = hidden.double().requires_grad_()
    losses = cross_entropy(wide @ weight.double().t(), targets, reduction="none")
    (losses * weights).sum().backward()
    assert wide.grad is not None
    return losses.detach(), wide.grad


@pytest.mark.parametrize("block_words", [1, 7, 32, 1024])
@pytest.mark.parametrize("chunk_rows", [1, 32, 640])
@pytest.mark.parametrize("count", [1, 33, 80])
def test_losses_and_gradient_do_not_depend_on_how_words_and_positions_are_cut(
    count: int, chunk_rows: int, block_words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary_blocks, "BLOCK_WORDS", block_words)
    monkeypatch.setattr(vocabulary_blocks, "_CHUNK_ROWS", chunk_rows)
    given = some_positions(count)
    expected_losses, expected_grad = reference(*given)
    found = loss_by_blocks(*given, learn=True)
    assert found is not None
    assert found[1] is not None
    torch.testing.assert_close(found[0].double(), expected_losses, rtol=1e-5, atol=1e-6)
    assert float((found[1].double() - expected_grad).norm() / expected_grad.norm()) < 1e-6


def test_without_learning_there_is_no_gradient_and_the_same_losses() -> None:
    given = some_positions(12)
    learnt, read = loss_by_blocks(*given, learn=True), loss_by_blocks(*given, learn=False)
    assert learnt is not None
    assert read is not None
    assert torch.equal(learnt[0], read[0])
    assert read[1] is None


def test_in_bfloat16_loss_and_gradient_are_nearer_to_float64_than_those_of_all_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, targets, weights, weight = some_positions(200, words=3000, scale=2.0)
    half = (hidden.bfloat16(), targets, weights, weight.bfloat16())
    # as a model that knows what it does not know would have it; of losses of 16 and more the other way knows more
    targets = (half[0].float() @ half[3].float().t()).softmax(-1).multinomial(1)[:, 0]
    losses, grad = reference(half[0], targets, weights, half[3])
    errors = []
    for blocks in (True, False):
        if not blocks:
            monkeypatch.setattr(loss_module, "_BLOCKED", ())
        learnt, told = half[0].clone().requires_grad_(), torch.empty(200)
        supervised_loss(learnt, targets, weights, Head(weight=half[3]), out=told).backward()
        assert learnt.grad is not None
        errors.append((float((told - losses).abs().mean()), float((learnt.grad - grad).norm() / grad.norm())))
    assert errors[0][0] < errors[1][0]
    assert errors[0][1] < errors[1][1]


def test_a_token_that_is_nearly_certain_keeps_its_small_gradient_in_bfloat16() -> None:
    """1 - p is 2e-4 here; a probability rounded to bfloat16 would be 1, and the gradient of the target's word 0."""
    weight = torch.zeros(64, 8).bfloat16()
    weight[5, 0], weight[6, 1] = 1.0, 1.0
    hidden = torch.tensor([[12.75, 0, 0, 0, 0, 0, 0, 0]]).bfloat16()
    given = (hidden, torch.tensor([5]), torch.ones(1), weight)
    expected_losses, expected_grad = reference(*given)
    found = loss_by_blocks(*given, learn=True)
    assert found is not None
    assert found[1] is not None
    assert float(found[0]) == pytest.approx(float(expected_losses), rel=2**-8)
    torch.testing.assert_close(found[1].double(), expected_grad, rtol=1e-2, atol=0)


@pytest.mark.parametrize("trouble", [100.0, 1000.0, float("nan"), float("inf")])
def test_a_loss_beyond_its_range_is_left_to_the_other_way(trouble: float) -> None:
    hidden, targets, weights, weight = some_positions(40)
    hidden[3], weight[8], targets[3] = 0, 0, 9
    hidden[3, 0], weight[8, 0], weight[9] = 1.0, trouble, 0
    assert loss_by_blocks(hidden, targets, weights, weight, learn=True) is None
    loss = supervised_loss(hidden, targets, weights, Head(weight=weight))
    assert torch.isfinite(loss) == (trouble < 2000)
