"""Packed 4- and 8-bit layers against the originals' bytes, and against plain layers with the unpacked weights."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import GlmConfig, GlmForCausalLM, PreTrainedModel

from weitiao.errors import ModelError
from weitiao.models import quantized
from weitiao.models.packed_layers import model_packing, unpack_model
from weitiao.models.quantized import (
    QuantizedLinear,
    dequantize_weight,
    quantize_model,
    quantize_weight,
    quantized_bits,
    quantized_linear,
    use_quantized_layers,
)

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_up_proj")


@cache
def _glm() -> GlmForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GlmConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            attention_bias=True,
            initializer_range=0.3,
            pad_token_id=0,
        )
        return GlmForCausalLM(config).float().eval()


def glm() -> GlmForCausalLM:
    return copy.deepcopy(_glm())


def layers(bits: int, *, bias: bool = True, shape: tuple[int, int] = (24, 40)) -> tuple[QuantizedLinear, nn.Linear]:
    """A packed layer and the plain one with the same numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(bits)
        linear = nn.Linear(shape[1], shape[0], bias=bias)
    packed = QuantizedLinear.from_linear(linear, bits)
    return packed, packed.to_linear(torch.float32)


# The originals' bytes


@pytest.fixture(params=[4, 8])
def golden(request: pytest.FixtureRequest) -> tuple[int, Any, dict[str, Tensor]]:
    folder = GOLDEN / "chatglm_v1_int4" / f"int{request.param}"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}, which is not part of the repository")
    return request.param, np.load(folder / "goldens.npz"), load_file(folder / "model.safetensors")


def test_packing_gives_the_bytes_of_the_originals(golden: tuple[int, Any, dict[str, Tensor]]) -> None:
    bits, arrays, stored = golden
    names = [name.partition("/")[2] for name in arrays.files if name.startswith("source_fp16/")]
    assert names
    for name in names:
        source = torch.tensor(arrays[f"source_fp16/{name}"])
        for dtype in (torch.float16, torch.float32):
            packed, scale = quantize_weight(source.to(dtype), bits)
            assert torch.equal(packed, stored[f"{name}.weight"])
            assert torch.equal(scale, stored[f"{name}.weight_scale"])
        for dtype, kind in ((torch.float32, "dequant_fp32"), (torch.float16, "dequant_fp16")):
            assert torch.equal(dequantize_weight(packed, scale, bits, dtype), torch.tensor(arrays[f"{kind}/{name}"]))


# Packing


def test_an_even_column_is_the_high_half_of_a_byte() -> None:
    packed, scale = quantize_weight(torch.tensor([[7.0, -1.0, -7.0, 3.0]]), 4)
    assert [byte & 0xFF for byte in packed[0].tolist()] == [0x7F, 0x93]
    assert scale.tolist() == [1.0]
    assert dequantize_weight(packed, scale, 4, torch.float32).tolist() == [[7.0, -1.0, -7.0, 3.0]]


@pytest.mark.parametrize("bits", [4, 8])
def test_every_whole_number_comes_back(bits: int) -> None:
    limit = 2 ** (bits - 1) - 1
    numbers = torch.arange(-limit, limit + 2).clamp(max=limit).float()[None] * 0.25
    packed, scale = quantize_weight(numbers, bits)
    assert torch.equal(dequantize_weight(packed, scale, bits, torch.float32), numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_unpacked_numbers_are_within_half_a_step(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weight = torch.randn(30, 64).to(dtype)
    packed, scale = quantize_weight(weight, bits)
    error = (dequantize_weight(packed, scale, bits, torch.float32) - weight.float()).abs()
    # half a step, and what float16 rounds off the weight, the scale and the quotient (11 bits each)
    steps = 0.5 + 3 * (2 ** (bits - 1) - 1) / 2**11
    assert (error <= steps * scale.float()[:, None]).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_unpacked_numbers_are_rounded_once(bits: int) -> None:
    packed = torch.arange(-128, 128, dtype=torch.int8).repeat(5, 1)
    scale = torch.tensor([0.1, 0.0123, 3.3e-4, 6e-8, 77.7]).half()
    exact = dequantize_weight(packed, scale, bits, torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(dequantize_weight(packed, scale, bits, dtype), exact.to(dtype))
    assert torch.equal(exact, dequantize_weight(packed, scale, bits, torch.float32).double())


def test_rows_of_zeros_and_of_next_to_nothing_stay_finite() -> None:
    weight = torch.tensor([[0.0, 0.0], [6e-8, -6e-8], [1.2e-7, 0.0], [1.0, 0.5]])
    for bits in (4, 8):
        packed, scale = quantize_weight(weight, bits)
        unpacked = dequantize_weight(packed, scale, bits, torch.float32)
        assert torch.isfinite(scale).all()
        assert torch.allclose(unpacked, weight, atol=0.1)
        assert unpacked[0].tolist() == [0.0, 0.0]


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    weight, x = torch.randn(100, 70), torch.randn(3, 70)
    whole = quantize_weight(weight, 4)
    product = quantized_linear(x, *whole, 4)
    monkeypatch.setattr(quantized, "_BLOCK_CPU", 1)
    cut = quantize_weight(weight, 4)
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))
    torch.testing.assert_close(quantized_linear(x, *cut, 4), product, rtol=1e-6, atol=1e-5)


def test_what_cannot_be_packed_is_said() -> None:
    with pytest.raises(ModelError, match="7 columns cannot be packed into 4 bits"):
        quantize_weight(torch.ones(2, 7), 4)
    with pytest.raises(ModelError, match="layer of 7 inputs"):
        QuantizedLinear(7, 2, bits=4)
    with pytest.raises(ModelError, match="4 or 8 bits, not to 3"):
        quantize_weight(torch.ones(2, 8), 3)
    with pytest.raises(ModelError, match="Row 1 of a weight"):
        quantize_weight(torch.tensor([[1.0, 1.0], [1.0, 70000.0]]), 8)


# The layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_product_and_gradient_are_those_of_the_unpacked_layer(bits: int, bias: bool) -> None:
    packed, plain = layers(bits, bias=bias)
    for shape in ((40,), (3, 40), (2, 3, 40), (0, 40)):
        torch.manual_seed(5)
        x = torch.randn(*shape, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        ours, theirs = packed(x), plain(y)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        ours.square().sum().backward()
        theirs.square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)
    if bias:
        torch.testing.assert_close(packed.bias.grad, plain.bias.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(packed(x), ours)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_operator_is_registered_as_torch_demands(bits: int) -> None:
    packed, _ = layers(bits)
    x = torch.randn(2, 3, 40, requires_grad=True)
    torch.library.opcheck(
        quantized_linear,
        (x, packed.weight, packed.weight_scale, bits),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_backward_keeps_no_float_copy_of_the_weight(bits: int) -> None:
    packed, _ = layers(bits, shape=(256, 512))
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        packed(torch.randn(4, 512, requires_grad=True))
    sizes = {tensor.dtype: tensor.numel() * tensor.element_size() for tensor in kept}
    assert sizes == {torch.int8: 256 * 512 * bits // 8, torch.float16: 256 * 2}


def test_a_large_layer_holds_its_packed_bytes_alone() -> None:
    layer = QuantizedLinear(16384, 4096, bits=4, bias=False)
    held = [*layer.parameters(), *layer.buffers()]
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == 32 * 2**20 + 2 * 4096


@pytest.mark.parametrize("bits", [4, 8])
def test_casts_leave_packed_numbers_and_scales_alone(bits: int) -> None:
    packed, _ = layers(bits)
    cast = copy.deepcopy(packed).to(torch.bfloat16)
    assert (cast.weight.dtype, cast.weight_scale.dtype, cast.bias.dtype) == (
        torch.int8,
        torch.float16,
        torch.bfloat16,
    )
    assert torch.equal(cast.weight, packed.weight)
    assert torch.equal(cast.float().weight_scale, packed.weight_scale)
    assert cast.bfloat16()(torch.ones(2, 40, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_state_goes_round_and_floats_are_not_cut_to_integers() -> None:
    packed, plain = layers(8)
    assert set(packed.state_dict()) == {"weight", "weight_scale", "bias"}
    other = QuantizedLinear(40, 24, bits=8)
    other.load_state_dict(packed.state_dict())
    x = torch.randn(2, 40)
    assert torch.equal(other(x), packed(x))
    with pytest.raises(RuntimeError, match=r"weight is torch.float32, and packed weights are torch.int8"):
        other.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(other(x), packed(x))


def test_an_empty_layer_on_the_meta_device_takes_assigned_weights() -> None:
    packed, _ = layers(4)
    empty = QuantizedLinear(40, 24, bits=4, device="meta", dtype=torch.bfloat16).to(torch.float16)
    assert {tensor.device.type for tensor in (empty.weight, empty.weight_scale, empty.bias)} == {"meta"}
    empty.load_state_dict(packed.state_dict(), assign=True)
    x = torch.randn(2, 40)
    assert torch.equal(empty(x), packed(x))


def test_checkpointing_and_autocast_compute_the_same() -> None:
    packed, plain = layers(4)
    x = torch.randn(3, 40, requires_grad=True)
    packed(x).square().sum().backward()
    straight, x.grad = x.grad, None
    checkpoint(packed, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, straight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = packed(x), plain(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_graphs_trace_through_without_a_break() -> None:
    packed, _ = layers(4)
    traced = torch.compile(packed, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 7):
        x = torch.randn(rows, 40, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        traced(x).square().sum().backward()
        packed(y).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)


# Models


def test_the_layers_of_a_decoder_are_packed_and_nothing_else() -> None:
    model = glm()
    float_state = model.state_dict()
    names = quantize_model(model, 4)
    assert len(names) == 2 * 6
    assert {name.split(".", 3)[3] for name in names} == {*LAYERS, "mlp.down_proj"}
    assert model_packing(model) == "int4" and quantized_bits(model) == 4
    for name, tensor in model.state_dict().items():
        layer = name.rpartition(".")[0]
        if layer not in names:
            assert torch.equal(tensor, float_state[name])
        elif name.endswith(".weight"):
            packed, scale = quantize_weight(float_state[name], 4)
            assert torch.equal(tensor, packed)
            assert torch.equal(model.get_submodule(layer).weight_scale, scale)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_model_computes_what_its_unpacked_copy_does(bits: int) -> None:
    model = glm()
    quantize_model(model, bits)
    plain = copy.deepcopy(model)
    assert len(unpack_model(plain, torch.float32)) == 12 and model_packing(plain) is None
    ids = torch.randint(0, 64, (2, 9))
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)


def test_empty_layers_stand_where_the_float_ones_stood() -> None:
    with torch.device("meta"):
        model: PreTrainedModel = GlmForCausalLM(_glm().config)
    names = use_quantized_layers(model, 4, skip=("down_proj",))
    assert len(names) == 10 and not any(name.endswith("down_proj") for name in names)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    filled = glm()
    quantize_model(filled, 4, skip=("down_proj",))
    model.load_state_dict(filled.state_dict(), assign=True)
    assert model.model.layers[0].mlp.gate_up_proj.in_features == 32


def test_a_model_is_packed_once() -> None:
    model = glm()
    quantize_model(model, 8)
    with pytest.raises(ModelError, match="quantised already"):
        quantize_model(model, 4)
