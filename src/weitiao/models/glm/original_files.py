"""A model of the GLM family written as its makers wrote theirs, so that tools made for the originals read it.

The way back of `original.py`: original names, queries, keys and values fused, the rotary table that original files
hold, the original config.json, and beside the weights the files of the folder that the model came from. Python files
among those are copied as files; nothing here runs them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import ModelError
from ..ptuning import prefix_encoder_of
from ..quantized import quantized_bits
from .chatglm import ChatGlmForCausalLM
from .original import ModulePart, original_name_map

_SHARD_BYTES = 2 << 30
_COMPANIONS = ("*.py", "*.model", "*.json", "*.jinja", "*.txt", "*.md", "LICENSE*", "MODEL_LICENSE*")
"""Files of a checkpoint that are not its weights."""
_NOT_COPIED = ("config.json", "*.index.json", "adapter_*")
_ROPE_BASE = 10_000.0


def save_original(
    model: PreTrainedModel,
    folder: Path,
    *,
    config: Mapping[str, Any],
    source: Path | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write `model` to `folder` in its original layout, as safetensors of at most `shard_bytes` each.

    Packed weights stay packed, and a P-Tuning prefix goes with the weights. No more than one file of weights is ever
    copied in memory.

    Args:
        model: of `open_original`, without adapters.
        folder: is made; must be empty if it is there.
        config: the config.json that the model was opened with. What it says of dtype, packed bits and prefix is set to
            what is written; all else stays.
        source: the folder that the model was opened from, for tokenizer, code and licences.
        shard_bytes: the largest file of weights; only a single tensor may be larger.

    Raises:
        ModelError: the folder is not empty, or the model has no original layout.
    """
    modules = original_name_map(model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} is there already and not empty. Name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    extra = {**_rotary_tables(model), **_prefix(model)}
    plan = {**{name: _outline(model, *place) for name, place in _tensors(model, modules)}, **extra}
    split = split_torch_state_dict_into_shards(
        {name: tensor.to("meta") for name, tensor in plan.items()},
        max_shard_size=shard_bytes,
        filename_pattern="model{suffix}.safetensors",
    )
    places = dict(_tensors(model, modules))
    for file, names in split.filename_to_tensors.items():
        shard = {name: extra[name] if name in extra else _fused(model, *places[name]) for name in names}
        save_file(_apart(shard), folder / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    told = json.dumps(_config(model, config), indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(told + "\n", encoding="utf-8")
    if source is not None:
        copy_companions(source, folder)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what lies beside the weights in `source`: vocabulary, code, licences. What `folder` has already stays."""
    files = {file for pattern in _COMPANIONS for file in source.glob(pattern) if file.is_file()}
    for file in sorted(files):
        if not any(file.match(pattern) for pattern in _NOT_COPIED) and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


_Place = tuple[tuple[ModulePart, ...], str]


def _tensors(model: PreTrainedModel, modules: Mapping[str, tuple[ModulePart, ...]]) -> Iterator[tuple[str, _Place]]:
    """Every original tensor's name, the modules that hold it, and what it is there; in the modules' order."""
    for original, parts in modules.items():
        module = model.get_submodule(parts[0].name)
        kinds = [*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))]
        yield from ((f"{original}.{kind}", (parts, kind)) for kind in kinds)


def _outline(model: PreTrainedModel, parts: tuple[ModulePart, ...], kind: str) -> Tensor:
    """Shape and dtype of what `_fused` gives, without its memory."""
    first = getattr(model.get_submodule(parts[0].name), kind)
    return torch.empty(sum(part.num_rows for part in parts), *first.shape[1:], dtype=first.dtype, device="meta")


def _fused(model: PreTrainedModel, parts: tuple[ModulePart, ...], kind: str) -> Tensor:
    """The original tensor, on the CPU; the model's own where one module holds all of it."""
    own: list[Tensor] = [getattr(model.get_submodule(part.name), kind).detach().cpu() for part in parts]
    if len(parts) == 1:
        return own[0]
    whole = torch.empty(sum(map(len, own)), *own[0].shape[1:], dtype=own[0].dtype)
    for part, rows in zip(parts, own, strict=True):
        part.put(rows, whole)
    return whole


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, each in memory of its own: safetensors refuses two names for one memory, which tied weights have."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor.contiguous()
        seen.add(place)
    return apart


def _rotary_tables(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tables of frequencies that original files hold, though nothing reads them: without any ratio."""
    dtype = model.get_input_embeddings().weight.dtype
    num_rotated = model.config.head_dim // 2
    table = 1.0 / _ROPE_BASE ** (torch.arange(0, num_rotated, 2, dtype=torch.float32) / num_rotated)
    if not isinstance(model, ChatGlmForCausalLM):
        return {"transformer.rotary_pos_emb.inv_freq": table.to(dtype)}
    layers = range(model.config.num_layers)
    half = table.half().to(dtype)
    return {f"transformer.layers.{number}.attention.rotary_emb.inv_freq": half.clone() for number in layers}


def _prefix(model: PreTrainedModel) -> dict[str, Tensor]:
    encoder = prefix_encoder_of(model)
    own = {} if encoder is None else encoder.tensors()
    return {f"transformer.prefix_encoder.{name}": tensor.cpu() for name, tensor in own.items()}


def _config(model: PreTrainedModel, config: Mapping[str, Any]) -> dict[str, Any]:
    """The original config.json, true of what is written."""
    told = dict(config)
    for key in {"torch_dtype", "dtype"} & told.keys():
        told[key] = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    bits = quantized_bits(model)
    if bits or told.get("quantization_bit"):
        told["quantization_bit"] = bits or 0
    encoder = prefix_encoder_of(model)
    if encoder is not None:
        told |= {"pre_seq_len": encoder.num_virtual_tokens, "prefix_projection": encoder.projection}
    elif told.get("pre_seq_len"):
        told["pre_seq_len"] = None
    return told
