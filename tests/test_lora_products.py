"""A LoRA layer's products, added in place, against the same layer written as separate operations."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from weitiao.models.lora_layers import LoraLinear, use_lean_layers
from weitiao.models.lora_products import lora_linear, lora_linear_backward

pytestmark = pytest.mark.usefixtures("one_thread")


def make_layer(*, dtype: torch.dtype = torch.float32, bias: bool = True, dropout: float = 0.0) -> LoraLinear:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(24, 40, bias=bias)).to(dtype)
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, target_modules=["0"])
    use_lean_layers(config)
    layer = get_peft_model(model, config).base_model.model[0]  # type: ignore[arg-type]
    assert isinstance(layer, LoraLinear)
    layer.lora_A["default"].weight.data = torch.randn(4, 24)
    layer.lora_B["default"].weight.data = torch.randn(40, 4)
    return layer


def separately(layer: LoraLinear, x: Tensor) -> Tensor:
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    base = layer.get_base_layer()
    low = nn.functional.linear(x, a.to(x.dtype))
    return base(x) + nn.functional.linear(low, (b * layer.scaling["default"]).to(x.dtype))


def results(layer: LoraLinear, x: Tensor, y: Tensor) -> list[Tensor]:
    learnt = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    torch.manual_seed(4)
    return [y.detach(), *torch.autograd.grad(y, learnt, torch.randn(y.shape).to(y.dtype))]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 24), (1, 9, 24), (2, 3, 24)])
def test_output_and_gradients_equal_separate_operations_in_float32(shape: tuple[int, ...], bias: bool) -> None:
    layer = make_layer(bias=bias)
    x = torch.randn(shape, requires_grad=True)
    for one, other in zip(results(layer, x, layer(x)), results(layer, x, separately(layer, x)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), separately(layer, x), rtol=1e-5, atol=1e-5)


def test_in_bfloat16_it_is_nearer_to_float32_than_separate_operations() -> None:
    half, exact = make_layer(dtype=torch.bfloat16), make_layer()
    for place, parameter in half.get_base_layer().named_parameters():
        exact.get_base_layer().get_parameter(place).data = parameter.detach().float()
    x = torch.randn(64, 24).bfloat16().requires_grad_()
    wide = x.detach().float().requires_grad_()
    reference = results(exact, wide, exact(wide))
    fused, apart = results(half, x, half(x)), results(half, x, separately(half, x))
    for one, other, right in zip(fused, apart, reference, strict=True):
        assert (one.float() - right).norm() <= 1.02 * (other.float() - right).norm()
    assert (fused[0].float() - reference[0]).norm() < 0.95 * (apart[0].float() - reference[0]).norm()
    assert fused[1].dtype == torch.bfloat16
    assert fused[2].dtype == fused[3].dtype == torch.float32


def test_an_input_that_does_not_learn_gets_no_gradient() -> None:
    layer = make_layer()
    x = torch.randn(5, 24)
    layer(x).sum().backward()
    expected = [layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
    a, b = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
    weight = layer.get_base_layer().weight.detach()
    low = x @ a.t()
    none, *found = lora_linear_backward(torch.ones(5, 40), x, low, weight, a, b, layer.scaling["default"], False)
    assert none.numel() == 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_operators_keep_what_torch_asks_of_operators() -> None:
    layer = make_layer(dtype=torch.bfloat16)
    base, a, b = layer.get_base_layer(), layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 6, 24).bfloat16().requires_grad_()
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(lora_linear, (x, base.weight, base.bias, a, b, 1.5), test_utils=checks)
    parts = (x.detach(), torch.randn(12, 4).bfloat16(), base.weight.detach(), a.detach(), b.detach(), 1.5)
    for grad in (torch.randn(2, 6, 40).bfloat16(), torch.randn(40, 6, 2).bfloat16().permute(2, 1, 0)):
        for learns in (True, False):
            torch.library.opcheck(lora_linear_backward, (grad, *parts, learns), test_utils=checks)


def test_compiled_it_is_one_graph_and_the_same() -> None:
    layer = make_layer().train()
    x = torch.randn(5, 24, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for one, other in zip(results(layer, x, compiled(x)), results(layer, x, layer(x)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("change", ["dropout", "hook", "cast", "learning", "merged"])
def test_a_layer_that_is_more_than_a_frozen_matrix_is_called_as_it_is(change: str) -> None:
    layer = make_layer(dropout=0.5 if change == "dropout" else 0.0).train()
    base = layer.get_base_layer()
    x = torch.randn(3, 24)
    if change == "hook":
        base.register_forward_hook(lambda _module, _inputs, output: output + 1)
        torch.testing.assert_close(layer(x), separately(layer, x))
        return
    if change == "cast":
        base.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    if change == "learning":
        base.weight.requires_grad_(True)
        layer(x).sum().backward()
        assert base.weight.grad is not None
    if change == "dropout":
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        torch.testing.assert_close(layer(x), separately(layer, x))
    if change == "merged":
        expected = layer(x)
        layer.merge()
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
