"""Linear layers with packed 4- or 8-bit weights, in the layout of the ChatGLM int4 and int8 checkpoints.

A weight ``W[out, in]`` is kept as whole numbers and one float16 scale per row, ``W[i, j] = q[i, j] · scale[i]``:

    8 bits   weight int8 [out, in]
    4 bits   weight int8 [out, in / 2]: an even column in the high half of a byte, the odd one behind it in the low
             half, both in two's complement
    both     weight_scale float16 [out]; the bias stays what it was

A product unpacks one block of the weight after the other into the dtype of its input, forward and backward, so that no
float copy of a whole weight ever exists. The packed numbers are frozen: what learns is an adapter beside them.

Packed are the linear layers inside the decoder layers, never embeddings, head or norms. That is what the quantised
checkpoints of the GLM family hold, and it is right for any other decoder: most weights are there.

Source of the layout: the quantised checkpoints of ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError
from .sources import first_line

Bits = Literal[4, 8]

_BLOCK_CPU = 2**20
"""Unpacked numbers at a time: 4 MiB of float32, which stays in the cache. On one AMX core, 256 rows times 8192 × 4096
in 4 bits take 66 ms forward and 82 ms back so, 76 and 86 with blocks four times as large, 156 and 163 with eight."""
_BLOCK_GPU = 2**24
"""32 MiB of float16: enough to fill a GPU with one kernel, little beside the activations."""

Unpack = Callable[[Tensor, Tensor, int, torch.dtype], Tensor]


def quantize_weight(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`weight` ``[out, in]`` as packed int8 and float16 scales ``[out]``, as the originals pack it.

    All of it is float16 arithmetic: ``scale = max|w| / (2^(bits-1) - 1)`` per row, ``q = w / scale`` rounded to the
    nearest whole number, halves to the even one. So float16, bfloat16 and float32 copies of the same float16 numbers
    give the same bytes. A row of zeros has scale 0.

    Raises:
        ModelError: `bits` is neither 4 nor 8, the columns are odd in number where two share a byte, or a number is not
            finite as float16.
    """
    _check_bits(bits)
    num_rows, num_columns = weight.shape
    if bits == 4 and num_columns % 2:
        raise ModelError(
            f"A weight with {num_columns} columns cannot be packed into 4 bits, where two columns share a byte. "
            f"Use 8 bits, or leave this layer as it is."
        )
    limit = 2 ** (bits - 1) - 1
    packed = torch.empty(num_rows, num_columns * bits // 8, dtype=torch.int8, device=weight.device)
    scale = torch.empty(num_rows, dtype=torch.float16, device=weight.device)
    for a, b in row_blocks(num_rows, num_columns, weight.device):
        block = weight[a:b].detach().to(torch.float16)
        largest = block.abs().amax(dim=1)
        if not torch.isfinite(largest).all():
            raise ModelError(
                f"Row {a + int((~torch.isfinite(largest)).nonzero()[0])} of a weight holds a number that float16 "
                f"cannot (65504 at most), so it cannot be quantised."
            )
        scale[a:b] = largest / limit
        # A scale can round to 0 under a row that is not: the quotient is then infinite, or 0 / 0.
        quotient = (block / scale[a:b, None]).nan_to_num(nan=0.0).round().clamp(-limit, limit).to(torch.int8)
        packed[a:b] = (quotient[:, 0::2] << 4) | (quotient[:, 1::2] & 0x0F) if bits == 4 else quotient
    return packed, scale


def dequantize_weight(packed: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The float weight ``[out, in]`` of `packed` and `scale`: the exact products, rounded once to `dtype`.

    Plain tensor operations that `torch.compile` can fuse into one.
    """
    if bits == 4:
        packed = torch.stack((packed >> 4, (packed << 4) >> 4), dim=-1).flatten(-2)
    # 18 bits hold q · scale; float16 times float16 is rounded once, bfloat16 would have rounded the scale as well
    exact = torch.float16 if dtype == torch.float16 else torch.float32
    return packed.to(exact).mul_(scale.to(exact)[:, None]).to(dtype)


def _check_bits(bits: int) -> None:
    if bits not in (4, 8):
        raise ModelError(f"Weights are quantised to 4 or 8 bits, not to {bits}.")


def row_blocks(num_long: int, num_across: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Even ranges over `num_long` rows of `num_across` numbers, each within the block size of `device`."""
    size = _BLOCK_GPU if device.type == "cuda" else _BLOCK_CPU
    step = max(16, size // max(num_across, 1) // 16 * 16)
    for start in range(0, num_long, step):
        yield start, min(start + step, num_long)


@functools.cache
def _unpack_on(device_type: str) -> Unpack:
    """`dequantize_weight`, fused into one kernel where a GPU's compiler is there and proves right.

    The compiled function is compared with the plain one on all bytes before it is used at all.
    """
    if device_type != "cuda" or importlib.util.find_spec("triton") is None or shutil.which("cc") is None:
        return dequantize_weight
    return checked_compiled(device_type)


def checked_compiled(device_type: str) -> Unpack:
    """`dequantize_weight` compiled for `device_type`; the plain one, with a warning, where that fails or differs."""
    compiled: Unpack = torch.compile(dequantize_weight, dynamic=True)
    packed = torch.arange(-128, 128, dtype=torch.int8, device=device_type).repeat(3, 2)
    scale = torch.tensor([0.1, 3.3e-4, 6e-8], device=device_type).to(torch.float16)
    try:
        for bits in (4, 8):
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                theirs = compiled(packed, scale, bits, dtype)
                if not torch.equal(theirs, dequantize_weight(packed, scale, bits, dtype)):
                    warnings.warn(
                        f"Compiled unpacking of {bits}-bit weights differs on this device; the plain one is used.",
                        stacklevel=2,
                    )
                    return dequantize_weight
    except Exception as error:  # noqa: BLE001 - compilers raise all kinds of types; the plain function does the same
        warnings.warn(
            f"Unpacking of weights cannot be compiled here ({first_line(error)}); it runs uncompiled.", stacklevel=2
        )
        return dequantize_weight
    return compiled


@torch.library.custom_op("weitiao::quantized_linear", mutates_args=())
def quantized_linear(x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``x Wᵀ`` of x ``[..., in]`` as ``[..., out]`` in the dtype of x; W unpacked in blocks of rows."""
    rows = x.reshape(-1, x.shape[-1])
    unpack = _unpack_on(x.device.type)
    out = torch.empty(rows.shape[0], packed.shape[0], dtype=x.dtype, device=x.device)
    for a, b in row_blocks(packed.shape[0], x.shape[-1], x.device):
        out[:, a:b] = rows @ unpack(packed[a:b], scale[a:b], bits, x.dtype).t()
    return out.view(*x.shape[:-1], packed.shape[0])


@quantized_linear.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


@torch.library.custom_op("weitiao::quantized_linear_backward", mutates_args=())
def quantized_linear_backward(grad: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``grad W`` of grad ``[..., out]`` as ``[..., in]``; W unpacked in blocks of columns, so that no sum is cut."""
    rows = grad.reshape(-1, grad.shape[-1])
    unpack = _unpack_on(grad.device.type)
    num_columns = packed.shape[1] * 8 // bits
    out = torch.empty(rows.shape[0], num_columns, dtype=grad.dtype, device=grad.device)
    for a, b in row_blocks(num_columns, packed.shape[0], grad.device):
        out[:, a:b] = rows @ unpack(packed[:, a * bits // 8 : b * bits // 8], scale, bits, grad.dtype)
    return out.view(*grad.shape[:-1], num_columns)


@quantized_linear_backward.register_fake
def _(grad: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], packed.shape[1] * 8 // bits)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor
) -> None:
    _, packed, scale, bits = inputs
    ctx.save_for_backward(packed, scale)
    ctx.bits = bits  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    packed, scale = ctx.saved_tensors  # type: ignore[attr-defined]
    return quantized_linear_backward(grad, packed, scale, ctx.bits), None, None, None  # type: ignore[attr-defined]


quantized_linear.register_autograd(_backward, setup_context=_setup_context)


class QuantizedLinear(nn.Linear):
    """``x Wᵀ + bias`` with a packed, frozen W. An `nn.Linear` to whatever looks for linear layers.

    `weight` (int8, packed) and `weight_scale` (float16) keep their dtypes under ``.to(dtype)``, ``.half()`` and the
    like; the bias follows, and the product has the dtype of its input.
    """

    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            in_features: the true number of columns, not that of the packed weight.
            out_features: rows.
            bits: 4 or 8.
            bias: whether there is a bias.
            device: where the zeros of an empty layer are made; ``meta`` makes none.
            dtype: of the bias.
        """
        _check_bits(bits)
        if bits == 4 and in_features % 2:
            raise ModelError(
                f"A layer of {in_features} inputs cannot be packed into 4 bits, where two columns share a byte. "
                f"Use 8 bits, or leave this layer as it is."
            )
        super().__init__(in_features, out_features, bias=bias, device="meta", dtype=dtype)
        self.bits = bits
        zeros = torch.zeros(out_features, in_features * bits // 8, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(zeros, requires_grad=False)
        self.register_buffer("weight_scale", torch.zeros(out_features, dtype=torch.float16, device=device))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device))

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int) -> QuantizedLinear:
        """`linear` with its weight packed; the bias is the same parameter."""
        layer = cls(linear.in_features, linear.out_features, bits=bits, bias=False, device="meta")
        packed, layer.weight_scale = quantize_weight(linear.weight, bits)
        layer.weight = nn.Parameter(packed, requires_grad=False)
        layer.bias = linear.bias
        return layer.train(linear.training)

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """A plain frozen layer with the unpacked weight in `dtype`; the bias is a copy in `dtype`."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.float_weight(dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype).clone(), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def float_weight(self, dtype: torch.dtype) -> Tensor:
        """The whole weight ``[out, in]`` unpacked."""
        out = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight.device)
        for a, b in row_blocks(self.out_features, self.in_features, out.device):
            out[a:b] = dequantize_weight(self.weight[a:b], self.weight_scale[a:b], self.bits, dtype)
        return out

    def forward(self, input: Tensor) -> Tensor:
        """``[..., out]`` in the dtype of `input`, or of autocast where that is on."""
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        out: Tensor = quantized_linear(input, self.weight, self.weight_scale, self.bits)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def reset_parameters(self) -> None:
        """Nothing: packed numbers are loaded, never drawn."""

    def extra_repr(self) -> str:
        """As that of `nn.Linear`, and the bits."""
        return f"{super().extra_repr()}, bits={self.bits}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        scale = self.weight_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != scale.dtype:
            # bfloat16 would drop three of the scale's bits for good
            device = self.weight_scale.device
            self.weight_scale = torch.empty_like(scale, device=device) if scale.is_meta else scale.to(device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: Any, *rest: Any
    ) -> None:
        missing, unexpected, errors = rest[1:4]
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and weight.dtype != torch.int8:
            # int8 takes floats of the same shape without a word, and cuts them
            errors.append(f"{prefix}weight is {weight.dtype}, and packed weights are torch.int8: quantise it first.")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, rest[0], missing, unexpected, errors)


def use_quantized_layers(model: PreTrainedModel, bits: int, *, skip: Sequence[str] = ()) -> list[str]:
    """Put empty packed layers where the decoder's linear layers stand, on the same device (``meta`` included).

    Args:
        model: a model without adapters.
        bits: 4 or 8.
        skip: last parts of the names of layers that stay as they are, such as ``down_proj``.

    Returns:
        The full names of the layers that were replaced.

    Raises:
        ModelError: `model` has no decoder layers that can be told, is quantised or has adapters.
    """

    def empty(linear: nn.Linear) -> QuantizedLinear:
        bias = linear.bias
        return QuantizedLinear(
            linear.in_features,
            linear.out_features,
            bits=bits,
            bias=bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        ).train(linear.training)

    return replace_linears(model, empty, skip=skip)


def quantize_model(model: PreTrainedModel, bits: int, *, skip: Sequence[str] = ()) -> list[str]:
    """Pack the weights of the decoder's linear layers one by one, each float weight freed before the next is packed.

    Arguments, result and errors as of `use_quantized_layers`; ModelError too where a weight cannot be packed.
    """
    return replace_linears(model, lambda linear: QuantizedLinear.from_linear(linear, bits), skip=skip)


def quantized_bits(model: nn.Module) -> int | None:
    """The bits of the packed layers of `model`; None when there are none."""
    return next((module.bits for module in model.modules() if isinstance(module, QuantizedLinear)), None)


def replace_linears(
    model: PreTrainedModel, make: Callable[[nn.Linear], nn.Linear], *, skip: Sequence[str] = ()
) -> list[str]:
    """Put what `make` makes of each in the place of the decoder's linear layers.

    Arguments, result and errors as of `use_quantized_layers`.
    """
    names = [name for name in _decoder_linears(model) if name.rsplit(".", 1)[-1] not in skip]
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        try:
            model.set_submodule(name, make(linear))
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from None
    return names


def _decoder_linears(model: PreTrainedModel) -> Iterator[str]:
    """Full names of the linear layers inside the decoder layers."""
    layers = set(model._no_split_modules or ())
    decoder = model.get_decoder()
    inside = {id(part) for each in decoder.modules() if type(each).__name__ in layers for part in each.modules()}
    if not inside:
        raise ModelError(f"The layers of a {type(model).__name__} cannot be told, so it cannot be quantised here.")
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            raise ModelError(f"This {type(model).__name__} is quantised already ({module.bits} bits).")
        if isinstance(module, BaseTunerLayer):
            raise ModelError("This model has an adapter. Quantise the model first, then put the adapter on it.")
    for name, module in list(model.named_modules()):
        if id(module) in inside and isinstance(module, nn.Linear):
            yield name
