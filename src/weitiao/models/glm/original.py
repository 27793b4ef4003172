"""Checkpoints of ChatGLM-6B, ChatGLM2, ChatGLM3 and GLM-4 as their makers released them, as models.

The model is built without memory; then each weight comes from its file straight to its place: renamed, the rows of
``query_key_value`` given to the three projections, cast where the dtype differs, moved to the device. Where nothing
has to be changed, the mapped file itself is the weight. Python files beside the weights are never looked at.

    transformer.embedding.word_embeddings             model.embed_tokens
    transformer.encoder.layers.N.self_attention
        .query_key_value   rows [Q | K | V]           model.layers.N.self_attn.{q,k,v}_proj
        .dense                                        .o_proj
    transformer.encoder.layers.N.mlp
        .dense_h_to_4h     rows [gate | up]           model.layers.N.mlp.gate_up_proj
        .dense_4h_to_h                                .down_proj
    transformer.encoder.final_layernorm               model.norm
    transformer.output_layer                          lm_head

ChatGLM-6B's modules have their original names in its own class. The way back is `original_files.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GlmConfig, GlmForCausalLM, PreTrainedModel
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding

from ...errors import ModelError
from ..quantized import QuantizedLinear, quantize_weight, use_quantized_layers
from ..shards import Shards, Stored, is_rotary_table, open_shards, read_tensors
from ..sources import first_line
from .chatglm import ChatGlmForCausalLM
from .chatglm_config import ChatGlmConfig
from .config import glm_config
from .layouts import GlmLayout, glm_layout

_PREFIX = "prefix_encoder."
_PREFIX_FILES = ("prefix_encoder.safetensors", "prefix_encoder.bin")
_SAMPLED_ROWS = 256
_WORTH_MAPPING = 1 << 20
"""Bytes. A smaller weight is copied: as part of a mapped file it would keep the pages of all that was read with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModulePart:
    """One of our modules, and which rows of an original module's weight and bias it holds, in their order."""

    name: str
    rows: tuple[slice, ...]

    @property
    def num_rows(self) -> int:
        """How many rows."""
        return sum(part.stop - part.start for part in self.rows)

    def take(self, whole: Tensor) -> Tensor:
        """Its rows of `whole`; a view where they lie together."""
        return whole[self.rows[0]] if len(self.rows) == 1 else torch.cat([whole[part] for part in self.rows])

    def put(self, own: Tensor, whole: Tensor) -> None:
        """Write `own` to its rows of `whole`."""
        for part, rows in zip(self.rows, own.split([part.stop - part.start for part in self.rows]), strict=True):
            whole[part].copy_(rows)


def original_name_map(model: PreTrainedModel) -> dict[str, tuple[ModulePart, ...]]:
    """The name of every original module with weights, and which of our modules hold its rows.

    For ChatGLM3: ``transformer.encoder.layers.0.self_attention.query_key_value`` →
    ``model.layers.0.self_attn.q_proj`` rows 0…4096, ``…k_proj`` rows 4096…4352, ``…v_proj`` rows 4352…4608.

    Args:
        model: a model without adapters of a class that `open_original` returns.
    """
    if isinstance(model, ChatGlmForCausalLM):
        modules = [*model.transformer.named_modules(prefix="transformer"), ("lm_head", model.lm_head)]
        return {name: (_whole(name, module),) for name, module in modules if _has_weight(module)}
    if not isinstance(model, GlmForCausalLM):
        raise ModelError(f"A {type(model).__name__} has no original layout: only ChatGLM and GLM-4 models have one.")
    names = {
        "transformer.embedding.word_embeddings": "model.embed_tokens",
        "transformer.encoder.final_layernorm": "model.norm",
        "transformer.output_layer": "lm_head",
    }
    for number in range(model.config.num_hidden_layers):
        theirs, ours = f"transformer.encoder.layers.{number}", f"model.layers.{number}"
        names |= {
            f"{theirs}.input_layernorm": f"{ours}.input_layernorm",
            f"{theirs}.post_attention_layernorm": f"{ours}.post_attention_layernorm",
            f"{theirs}.self_attention.dense": f"{ours}.self_attn.o_proj",
            f"{theirs}.mlp.dense_h_to_4h": f"{ours}.mlp.gate_up_proj",
            f"{theirs}.mlp.dense_4h_to_h": f"{ours}.mlp.down_proj",
        }
    parts: dict[str, tuple[ModulePart, ...]] = {
        theirs: (_whole(ours, model.get_submodule(ours)),) for theirs, ours in names.items()
    }
    for number in range(model.config.num_hidden_layers):
        projections = _projections(model.config, f"model.layers.{number}.self_attn")
        parts[f"transformer.encoder.layers.{number}.self_attention.query_key_value"] = projections
    return parts


def _has_weight(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _whole(name: str, module: nn.Module) -> ModulePart:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return ModulePart(name=name, rows=(slice(0, len(weight)),))


def _projections(config: GlmConfig, attention: str) -> tuple[ModulePart, ...]:
    """The rows of an original ``query_key_value``: three blocks, or a block of three for each head.

    The latter where an original has no groups of heads, `multi_query_attention` being false.
    """
    size, heads, groups = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    assert size is not None and groups is not None
    if getattr(config, "multi_query_attention", True):
        bounds = (0, heads * size, (heads + groups) * size, (heads + 2 * groups) * size)
        rows: list[tuple[slice, ...]] = [(slice(a, b),) for a, b in pairwise(bounds)]
    else:
        each_head = range(0, 3 * heads * size, 3 * size)
        rows = [tuple(slice(at + start, at + start + size) for at in each_head) for start in (0, size, 2 * size)]
    return tuple(ModulePart(name=f"{attention}.{which}_proj", rows=own) for which, own in zip("qkv", rows, strict=True))


def open_original(
    folder: Path,
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    bits: int | None = None,
) -> PreTrainedModel:
    """The model of the original checkpoint in `folder`, in evaluation mode.

    A prefix encoder in the files is left out: see `read_prefix`.

    Args:
        folder: weights, sharded or not, ``.safetensors`` or ``.bin``.
        config: what its config.json holds.
        dtype: of all weights but packed ones.
        device: where the weights go as they are read.
        bits: pack the weights of the layers into so many bits, each as it is read; None: leave them as they are.

    Raises:
        ModelError: the configuration cannot be computed here, or the files are damaged, incomplete or do not fit it.
    """
    layout = glm_layout(config, folder)
    if layout is None:
        raise ModelError(f"{folder} holds no original ChatGLM or GLM-4 checkpoint: its model_type is not chatglm.")
    packed_bits = _packed_bits(folder, config, bits)
    shards = open_shards(folder)
    head = "lm_head.weight" if layout == "chatglm" else "transformer.output_layer.weight"
    model = _build(layout, config, dtype=dtype, folder=folder, has_head=head in shards.stored)
    if packed_bits or bits:
        use_quantized_layers(model, packed_bits or bits or 0)
    places = _places(model, shards, folder=folder, head=head, packed=packed_bits is not None)
    for name, tensor in shards.stream([name for name in shards.stored if name in places]):
        _load(model, name, places[name], tensor, dtype=dtype, device=torch.device(device))
    if model.config.tie_word_embeddings:
        _warn_of_another_head(model, shards, head)
        model.tie_weights()
    nn.Module.to(model, device)  # what is computed rather than stored: the rotary tables
    model.generation_config = _generation_config(folder, model)
    model.eval()
    return model


def _packed_bits(folder: Path, config: Mapping[str, Any], bits: int | None) -> int | None:
    """In how many bits the checkpoint is packed, if it is."""
    packed = config.get("quantization_bit") or None
    if packed and bits and packed != bits:
        raise ModelError(
            f"The model in {folder} is stored in {packed} bits, so it cannot be held in {bits}. Take the model that "
            f"is not quantised."
        )
    if packed and config.get("quantization_embeddings"):
        raise ModelError(
            f"The model in {folder} has packed embeddings (quantization_embeddings is true), which cannot be read "
            f"here. Take the checkpoint without, or the one that is not quantised."
        )
    return packed


def _build(
    layout: GlmLayout, config: Mapping[str, Any], *, dtype: torch.dtype, folder: Path, has_head: bool
) -> PreTrainedModel:
    """The model without memory for its weights; rotary tables, which no file holds, are real."""
    if layout == "chatglm":
        told = {key: value for key, value in config.items() if key not in ("auto_map", "torch_dtype", "dtype")}
        own = ChatGlmConfig.from_dict({**told, "dtype": dtype})
        own.name_or_path = str(folder)
        with torch.device("meta"):
            return ChatGlmForCausalLM(own)
    # The originals never tie; a config that says so is believed where there is nothing else to take.
    tied = bool(config.get("tie_word_embeddings", False)) and not has_head
    glm = glm_config(config, layout, dtype=dtype, tie_word_embeddings=tied)
    glm.name_or_path = str(folder)
    with torch.device("meta"):
        model = GlmForCausalLM(glm)
    model.model.rotary_emb = GlmRotaryEmbedding(glm)
    # The originals' embedding learns in every row. GLM-4 pads with a token that also ends texts.
    model.model.embed_tokens.padding_idx = None
    return model


Place = tuple[tuple[ModulePart, ...], str]
"""The modules that a stored tensor goes to, and what it is there: weight, bias or weight_scale."""


def _places(model: PreTrainedModel, shards: Shards, *, folder: Path, head: str, packed: bool) -> dict[str, Place]:
    """Where every stored tensor goes. Raises ModelError naming weights that lack, do not fit or have no place."""
    places: dict[str, Place] = {}
    for original, parts in original_name_map(model).items():
        module = model.get_submodule(parts[0].name)
        kinds = [kind for kind, _ in module.named_parameters(recurse=False)]
        kinds += ["weight_scale"] if packed and isinstance(module, QuantizedLinear) else []
        places |= {f"{original}.{kind}": (parts, kind) for kind in kinds}
    if model.config.tie_word_embeddings:
        del places[head]
    missing = sorted(places.keys() - shards.stored.keys())
    known = {name for name in shards.stored if is_rotary_table(name) or _is_prefix(name) or name == head}
    strange = sorted(shards.stored.keys() - places.keys() - known)
    wrong = [
        f"{name} is {list(found.shape)} where {list(wanted)} is wanted"
        for name, found in sorted(shards.stored.items())
        if name in places and (wanted := _wanted_shape(model, places[name], found)) != found.shape
    ]
    told = []
    if missing and len(missing) == len(places) and any(map(_is_prefix, shards.stored)):
        told = [
            "the files hold a P-Tuning prefix alone. Open the model it was tuned on, and give this folder as adapter"
        ]
    elif any(name.endswith(".weight_scale") for name in strange):
        told = ["the weights are packed, but config.json has no quantization_bit. Take the config.json of these files"]
    else:
        told += [f"{len(missing)} weights are not there ({_some(missing)})"] if missing else []
        told += [f"{len(strange)} weights have no place in the model ({_some(strange)})"] if strange else []
        told += [f"{len(wrong)} weights have another shape ({'; '.join(wrong[:3])})"] if wrong else []
    if told:
        raise ModelError(
            f"The files in {folder} and its config.json do not belong together: {'; '.join(told)}. Download the model "
            f"again."
        )
    return places


def _wanted_shape(model: PreTrainedModel, place: Place, found: Stored) -> tuple[int, ...]:
    parts, kind = place
    module = model.get_submodule(parts[0].name)
    rows = sum(part.num_rows for part in parts)
    if kind == "weight" and isinstance(module, QuantizedLinear) and found.dtype.is_floating_point:
        return rows, module.in_features
    tensor = getattr(module, kind)
    return rows, *tensor.shape[1:]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def _load(
    model: PreTrainedModel, name: str, place: Place, tensor: Tensor, *, dtype: torch.dtype, device: torch.device
) -> None:
    """Give the stored `tensor` to the modules at its place."""
    parts, kind = place
    for part in parts:
        module = model.get_submodule(part.name)
        own = part.take(tensor)
        if kind == "weight_scale":
            module.weight_scale = own.to(device=device, dtype=torch.float16).contiguous()
        elif not isinstance(module, QuantizedLinear) or kind != "weight":
            if not own.is_floating_point():
                raise ModelError(f"{name} is {own.dtype}, where numbers with a fraction are wanted.")
            real = own.to(device=device, dtype=dtype).contiguous()
            small = real.numel() * real.itemsize < _WORTH_MAPPING
            setattr(module, kind, nn.Parameter(real.clone() if small else real))
        elif own.is_floating_point():
            packed, module.weight_scale = quantize_weight(own.to(device), module.bits)
            module.weight = nn.Parameter(packed, requires_grad=False)
        else:
            module.weight = nn.Parameter(own.to(device).contiguous(), requires_grad=False)


def _warn_of_another_head(model: PreTrainedModel, shards: Shards, head: str) -> None:
    """Warn where a file's output layer is not the embedding that the model, as the original, uses in its place.

    Some rows are looked at: an output layer that was trained apart differs in all of them.
    """
    if head not in shards.stored:
        return
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    ((_, own),) = shards.stream([head])
    rows = torch.linspace(0, len(embedding) - 1, min(_SAMPLED_ROWS, len(embedding))).long()
    if own.shape != embedding.shape or not torch.equal(
        own[rows].to(embedding.dtype), embedding[rows.to(embedding.device)].cpu()
    ):
        warnings.warn(
            f"{head} differs from the embedding. The model is tied, as the original: the embedding is used for both.",
            stacklevel=2,
        )


def _generation_config(folder: Path, model: PreTrainedModel) -> GenerationConfig:
    """That of the folder, its special tokens completed from the model's configuration."""
    told = GenerationConfig.from_model_config(model.config)
    if not (folder / "generation_config.json").is_file():
        return told
    try:
        own: GenerationConfig = GenerationConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{folder}/generation_config.json cannot be read: {first_line(error)}.") from None
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(own, key) is None:
            setattr(own, key, getattr(told, key))
    return own


def _is_prefix(name: str) -> bool:
    return f".{name}".find(f".{_PREFIX}") >= 0


def read_prefix(folder: Path) -> dict[str, Tensor] | None:
    """The P-Tuning prefix encoder in `folder`, by its original names from ``embedding`` or ``trans`` on; None without.

    It lies among the weights, or in ``prefix_encoder.safetensors`` or ``prefix_encoder.bin`` beside them.

    Raises:
        ModelError: the files cannot be read.
    """
    beside = next((folder / name for name in _PREFIX_FILES if (folder / name).is_file()), None)
    if beside is not None:
        found = read_tensors(beside)
        return {name.rpartition(_PREFIX)[2]: tensor for name, tensor in found.items()}
    shards = open_shards(folder)
    names = [name for name in shards.stored if _is_prefix(name)]
    return {name.rpartition(_PREFIX)[2]: tensor.clone() for name, tensor in shards.stream(names)} or None
