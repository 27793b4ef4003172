"""LoRA adapters that were trained on the original code of ChatGLM and GLM-4, by PEFT 0.3 and before or by newer ones.

They name the originals' modules, ``transformer.encoder.layers.0.self_attention.query_key_value`` for one. Where our
model holds such a module as several, each gets the same A and its own rows of B, which computes exactly the same:

    query_key_value → q_proj, k_proj, v_proj     dense_h_to_4h → gate_up_proj
    dense           → o_proj                     dense_4h_to_h → down_proj

PEFT 0.2 put on a single target an adapter of several blocks (``enable_lora``, ``[true, false, true]`` by default): B is
a grouped convolution ``[rows of the enabled blocks, r, 1]``. It is one LoRA whose B has zeros between the blocks, of
rank ``r`` times the number of groups.

On the way back, A is written once where q, k and v share theirs. Where they do not, as after further training, the
three become one LoRA of their ranks together, A one above the other and B in blocks: exact, and larger.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GlmForCausalLM, PreTrainedModel

from ...errors import ModelError
from ..lora_layers import LoraLinear, ignoring_peft_warnings, use_lean_layers
from ..shards import read_tensors
from ..sources import read_json
from .chatglm import ChatGlmForCausalLM
from .original import ModulePart, original_name_map

_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.(?P<kind>lora_[AB](?=(?:\.[^.]+)?\.weight$)|lora_magnitude_vector)"
    r"(?:\.[^.]+)??(?:\.weight)?"
)
"""The name of the adapter, such as ``default``, may stand before ``weight``."""

_READ = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "enable_lora", "modules_to_save", "peft_type"),
    *("use_rslora", "use_dora", "init_lora_weights"),
}
_WITHOUT_EFFECT = {
    *("merge_weights", "inference_mode", "task_type", "base_model_name_or_path", "revision", "auto_mapping"),
    *("peft_version", "layers_to_transform", "layers_pattern", "exclude_modules"),
    "fan_in_fan_out",  # of layers that hold their weight transposed, which none of these models has
}


@dataclass(kw_only=True, slots=True)
class _Pair:
    """The adapter of one original module: A ``[r, in]``, B ``[out, r]`` and, for DoRA, magnitudes ``[out]``."""

    a: Tensor
    b: Tensor
    magnitudes: Tensor | None = None


def has_original_names(model: PreTrainedModel, folder: Path) -> bool:
    """Whether the adapter in `folder` is for the original code of `model`, so that `load_old_adapter` reads it.

    Raises:
        ModelError: the file of its weights cannot be read, or holds code.
    """
    if isinstance(model, ChatGlmForCausalLM):
        return _weights_of(folder).suffix == ".bin"  # the names are the same, and PEFT reads newer files
    if not isinstance(model, GlmForCausalLM):
        return False
    ours = dict(model.named_modules())
    theirs = original_name_map(model).keys() - ours.keys()
    names = read_tensors(_weights_of(folder)).keys()
    return any((found := _NAME.fullmatch(name)) and found["module"] in theirs for name in names)


def load_old_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """`model` with the adapter in `folder` on it, frozen, for inference.

    Args:
        model: of a class that `open_original` returns, without adapters.
        folder: ``adapter_config.json`` and ``adapter_model.bin`` or ``.safetensors``.

    Raises:
        ModelError: a file is missing, damaged or holds code, the adapter does not fit the model, or it has parts that
            are not carried over, each by its name.
    """
    told = read_json(folder / "adapter_config.json")
    _refuse_other_kinds(told, folder)
    parts = original_name_map(model)
    pairs = _pairs_of(read_tensors(_weights_of(folder)), told, folder)
    _refuse_missing(pairs.keys(), parts.keys(), told, folder)
    rank = _rank_of(pairs, told, folder)
    own: dict[str, _Pair] = {}
    for name, pair in pairs.items():
        out_rows = sum(part.num_rows for part in parts[name])
        module = model.get_submodule(parts[name][0].name)
        in_columns = module.in_features if isinstance(module, nn.Linear) else 0
        if pair.a.shape != (rank, in_columns) or pair.b.shape != (out_rows, rank):
            raise ModelError(
                f"The adapter in {folder} does not fit this model: {name} has A {list(pair.a.shape)} and B "
                f"{list(pair.b.shape)} where {[rank, in_columns]} and {[out_rows, rank]} are wanted. Open the model "
                f"that it was trained on."
            )
        for part in parts[name]:
            magnitudes = None if pair.magnitudes is None else part.take(pair.magnitudes)
            own[part.name] = _Pair(a=pair.a, b=part.take(pair.b), magnitudes=magnitudes)
    alpha: Any = _alpha_for(rank, told)  # PEFT divides it, whole or not
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=told.get("lora_dropout") or 0.0,
        target_modules=_targets(model, own),
        use_rslora=bool(told.get("use_rslora")),
        use_dora=bool(told.get("use_dora")),
        inference_mode=True,
        task_type="CAUSAL_LM",
    )
    use_lean_layers(config)
    with ignoring_peft_warnings():
        tuned = get_peft_model(model, config)
    for name, pair in own.items():
        _fill(model.get_submodule(name), pair)
    tuned.eval()
    return tuned


def save_old_adapter(model: PeftModel, folder: Path) -> list[str]:
    """Write the LoRA of `model` into `folder` as PEFT 0.3 on the original code would; returns what there is to say.

    ``adapter_model.bin`` and an ``adapter_config.json`` of that time, with the originals' names. The result computes
    exactly what `model` does.

    Raises:
        ModelError: the adapter is not plain LoRA in one piece, or the model has no original layout.
    """
    name, config = _only_adapter(model)
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    layers = {key: module for key, module in base.named_modules() if isinstance(module, LoraLinear)}
    pairs: dict[str, _Pair] = {}
    scaling = next(layer.scaling[name] for layer in layers.values())
    for original, parts in _parts_of_tuned(base, layers).items():
        present = [(part, layers[part.name]) for part in parts if part.name in layers]
        if present:
            pairs[original] = _fused(present, sum(part.num_rows for part in parts), name, scaling)
    rank = max(len(pair.a) for pair in pairs.values())
    own_rank = max(layer.r[name] for layer in layers.values())
    tensors = {}
    for original, pair in pairs.items():
        missing = rank - len(pair.a)  # the configuration of that time has one rank for all
        tensors[f"base_model.model.{original}.lora_A.weight"] = nn.functional.pad(pair.a, (0, 0, 0, missing))
        tensors[f"base_model.model.{original}.lora_B.weight"] = nn.functional.pad(pair.b, (0, missing))
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, folder / "adapter_model.bin")
    alpha = scaling * rank
    written = {
        "base_model_name_or_path": base.config.name_or_path,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted({original.rsplit(".", 1)[-1] for original in pairs}),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    if rank == own_rank:
        return []
    return [
        f"The query, key and value projections have learnt apart, and the originals hold them as one: the adapter of "
        f"rank {own_rank} is written with rank {rank}. It computes exactly the same."
    ]


def _weights_of(folder: Path) -> Path:
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    raise ModelError(f"The adapter in {folder} has no weights: neither {_FILES[0]} nor {_FILES[1]} is there.")


def _refuse_other_kinds(told: Mapping[str, Any], folder: Path) -> None:
    """Raise ModelError naming every setting of `told` that would be lost."""
    wrong = [] if told.get("peft_type", "LORA") == "LORA" else [f"peft_type {told['peft_type']!r}"]
    wrong += [] if told.get("bias", "none") == "none" else [f"bias {told['bias']!r}"]
    wrong += [f"modules_to_save {told['modules_to_save']!r}"] if told.get("modules_to_save") else []
    start = told.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in ("gaussian", "orthogonal"):
        wrong.append(f"init_lora_weights {start!r}, which changes the base weights")
    usual = {field.name: field.default for field in fields(LoraConfig)}
    for key, value in told.items():
        empty = value is None or value is False or value == [] or value == {}
        if key not in _READ | _WITHOUT_EFFECT and not empty and usual.get(key) != value:
            wrong.append(f"{key} {value!r}")
    if wrong:
        raise ModelError(
            f"The adapter in {folder} has parts that cannot be carried over to this model: {'; '.join(wrong)}. Only "
            f"LoRA on linear layers can, with bias none."
        )


def _pairs_of(tensors: Mapping[str, Tensor], told: Mapping[str, Any], folder: Path) -> dict[str, _Pair]:
    """The adapters in a file by their original modules."""
    found: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name, tensor in tensors.items():
        if match := _NAME.fullmatch(name):
            found.setdefault(match["module"], {})[match["kind"]] = tensor
        else:
            strange.append(name)
    if strange:
        raise ModelError(
            f"The adapter in {folder} holds {len(strange)} weights besides LoRA on linear layers "
            f"({', '.join(strange[:3])}), which cannot be carried over to this model."
        )
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if told.get("use_dora") else set())
    pairs = {}
    for module, kinds in found.items():
        if kinds.keys() != wanted:
            lacking, extra = wanted - kinds.keys(), kinds.keys() - wanted
            what = f"lacks {', '.join(sorted(lacking))}" if lacking else f"has {', '.join(sorted(extra))}"
            raise ModelError(f"The adapter in {folder} {what} of {module}. The file is incomplete: get it again.")
        b = kinds["lora_B"]
        if b.ndim == 3:
            b = _one_matrix(b, told.get("enable_lora"), kinds["lora_A"].shape[0], f"{module} in {folder}")
        pairs[module] = _Pair(a=kinds["lora_A"], b=b, magnitudes=kinds.get("lora_magnitude_vector"))
    if not pairs:
        raise ModelError(f"The adapter in {folder} has no weights. The file is incomplete: get it again.")
    return pairs


def _one_matrix(grouped: Tensor, enabled: Any, num_low: int, what: str) -> Tensor:
    """B ``[out, num_low]`` of an adapter in blocks: `grouped` ``[rows of the enabled blocks, r, 1]``.

    Each of ``num_low / r`` groups of rows takes its own r of the `num_low` results of A.
    """
    rows, rank, width = grouped.shape
    fits = isinstance(enabled, list) and any(enabled) and width == 1 and num_low % rank == 0
    if not fits or rows % (num_low // rank) or rows % sum(map(bool, enabled)):
        raise ModelError(
            f"The adapter of {what} is in blocks that cannot be told: enable_lora is {enabled!r}, A has {num_low} rows "
            f"and B is {list(grouped.shape)}."
        )
    block = torch.block_diag(*grouped[:, :, 0].split(rows // (num_low // rank)))
    size = rows // sum(map(bool, enabled))
    whole = grouped.new_zeros(size * len(enabled), num_low)
    places = torch.cat([torch.arange(i * size, (i + 1) * size) for i, on in enumerate(enabled) if on])
    whole[places] = block
    return whole


def _refuse_missing(names: Set[str], known: Set[str], told: Mapping[str, Any], folder: Path) -> None:
    """Raise ModelError when `names` has modules that the model has not, or lacks some that `told` names."""
    strange = sorted(names - known)
    if strange:
        raise ModelError(
            f"The adapter in {folder} does not fit this model, which has no {strange[0]}"
            f"{f' and {len(strange) - 1} others' if len(strange) > 1 else ''}. Open the model that it was trained on."
        )
    targets = told.get("target_modules")
    if not isinstance(targets, list) or told.get("layers_to_transform") is not None or told.get("exclude_modules"):
        return
    wanted = {name for name in known if any(f".{name}".endswith(f".{target}") for target in targets)}
    missing = sorted(wanted - names)
    if missing:
        raise ModelError(
            f"The adapter in {folder} lacks the weights of {missing[0]}"
            f"{f' and {len(missing) - 1} others' if len(missing) > 1 else ''}, which its target_modules "
            f"{targets} name. The file is incomplete, or it was trained on a smaller model."
        )


def _rank_of(pairs: Mapping[str, _Pair], told: Mapping[str, Any], folder: Path) -> int:
    """The rank of all modules, of which an adapter in blocks has several times the one in its configuration."""
    ranks = {len(pair.a) for pair in pairs.values()}
    own = told.get("r")
    blocks = sum(map(bool, told.get("enable_lora") or [])) or 1
    if not isinstance(own, int) or len(ranks) > 1 or ranks - {own, own * blocks}:
        raise ModelError(
            f"The adapter in {folder} has weights of rank {sorted(ranks)}, its configuration says r={own}."
        )
    return ranks.pop()


def _alpha_for(rank: int, told: Mapping[str, Any]) -> float:
    """The lora_alpha that scales an adapter of `rank` as `told` says; one in blocks is scaled as a single block is."""
    alpha = told.get("lora_alpha")
    if not isinstance(alpha, int | float):
        raise ModelError(f"The adapter's configuration has no number for lora_alpha, but {alpha!r}.")
    return alpha if rank == told["r"] else alpha / told["r"] * rank


def _targets(model: PreTrainedModel, own: Mapping[str, _Pair]) -> list[str]:
    """What names exactly the modules in `own`: their last parts where these name no others, else all names."""
    short = {name.rsplit(".", 1)[-1] for name in own}
    meant = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in short}
    return sorted(short if meant == own.keys() else own.keys())


@torch.no_grad()
def _fill(layer: nn.Module, pair: _Pair) -> None:
    assert isinstance(layer, LoraLinear)
    (name,) = layer.lora_A
    for module, values in ((layer.lora_A[name], pair.a), (layer.lora_B[name], pair.b)):
        assert isinstance(module, nn.Linear)
        module.weight.copy_(values)
    if pair.magnitudes is not None:
        magnitudes = layer.lora_magnitude_vector[name].weight
        assert isinstance(magnitudes, Tensor)
        magnitudes.copy_(pair.magnitudes)


def _only_adapter(model: PeftModel) -> tuple[str, LoraConfig]:
    """The adapter's name and settings. Raises ModelError unless it is plain LoRA, alone, in one piece."""
    name, *others = model.peft_config
    config = model.peft_config[name]
    wrong = ["several adapters"] if others else []
    if not isinstance(config, LoraConfig):
        wrong.append(f"an adapter of the kind {config.peft_type}")
    else:
        wrong += ["DoRA"] if config.use_dora else []
        wrong += ["learnt biases"] if config.bias != "none" or config.lora_bias else []
        wrong += [f"modules_to_save {config.modules_to_save}"] if config.modules_to_save else []
        strange = [
            key
            for key, module in model.named_modules()
            if hasattr(module, "lora_A") and not (isinstance(module, LoraLinear) and not module.lora_variant)
        ]
        wrong += [f"adapters of other kinds ({strange[0]})"] if strange and not config.use_dora else []
    if wrong:
        raise ModelError(
            f"This model has {', '.join(wrong)}, which PEFT 0.3 and the original code do not know. Only LoRA on linear "
            f"layers can be written with the originals' names."
        )
    assert isinstance(config, LoraConfig)
    return str(name), config


def _parts_of_tuned(base: PreTrainedModel, layers: Mapping[str, LoraLinear]) -> dict[str, tuple[ModulePart, ...]]:
    """As `original_name_map`, for a model with adapter layers."""
    if isinstance(base, ChatGlmForCausalLM):
        return {key: (ModulePart(name=key, rows=(slice(0, layer.out_features),)),) for key, layer in layers.items()}
    return original_name_map(base)


@torch.no_grad()
def _fused(present: list[tuple[ModulePart, LoraLinear]], num_rows: int, name: str, scaling: float) -> _Pair:
    """One adapter of the whole original module from those of its parts; a part without one has rows of zeros."""
    low: list[Tensor] = []
    high: list[tuple[ModulePart, Tensor]] = []
    for part, layer in present:
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        ratio = layer.scaling[name] / scaling
        low.append(a.float().cpu())
        high.append((part, b.float().cpu() if math.isclose(ratio, 1) else b.float().cpu() * ratio))
    shared = all(torch.equal(each, low[0]) for each in low[1:])
    a = low[0] if shared else torch.cat(low)
    whole = torch.zeros(num_rows, len(a))
    column = 0
    for part, b in high:
        place = torch.zeros(part.num_rows, len(a))
        place[:, column : column + b.shape[1]] = b
        part.put(place, whole)
        column += 0 if shared else b.shape[1]
    return _Pair(a=a, b=whole)
