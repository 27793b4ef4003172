"""P-Tuning prefixes on the disk: a folder of our own for each, and the ChatGLM originals' checkpoints, both ways.

    ours          adapter_config.json (`peft_type` PTUNING_V2), prefix_encoder.safetensors
    originals'    config.json (`pre_seq_len`, `prefix_projection`), pytorch_model.bin with the prefix alone, or among
                  the weights of a whole model; prefix_encoder.safetensors and .bin are read as well

In both the tensors have the original names, ``transformer.prefix_encoder.embedding.weight`` and so on, and are float32.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ModelError
from .glm.original import read_prefix
from .ptuning import PrefixEncoder, attach_original_prefix, prefix_encoder_of
from .shards import read_tensors
from .sources import adapter_type, read_json

PEFT_TYPE = "PTUNING_V2"
"""What adapter_config.json says of a prefix; PEFT, which has no such method, refuses it by this name."""

PREFIX_FILE = "prefix_encoder.safetensors"
_CONFIG_FILE = "adapter_config.json"
_NAME = "transformer.prefix_encoder."


def save_prefix(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Write the prefix of `model` into `folder`, which exists, as an adapter that `load_prefix` reads.

    Raises:
        ModelError: the model has no prefix.
    """
    encoder = _encoder(model)
    save_file(_tensors(encoder), folder / PREFIX_FILE, metadata={"format": "pt"})
    shape = encoder.shape
    config = {
        "peft_type": PEFT_TYPE,
        "num_virtual_tokens": encoder.num_virtual_tokens,
        "projection": encoder.projection,
        "dropout": encoder.dropout,
        "num_layers": shape.num_layers,
        "num_key_value_heads": shape.num_heads,
        "head_dim": shape.head_size,
        "hidden_size": shape.hidden_size,
    }
    (folder / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def holds_prefix(folder: Path) -> bool:
    """Whether `folder` is an adapter that `save_prefix` wrote. Raises ModelError when its configuration is broken."""
    return adapter_type(folder) == PEFT_TYPE


def load_prefix(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`model` itself with the prefix that `save_prefix` wrote into `folder`, frozen; one it had before is replaced.

    Raises:
        ModelError: files are missing or damaged, or the prefix was tuned on a model of other sizes.
    """
    file = folder / PREFIX_FILE
    if not file.is_file():
        raise ModelError(f"The adapter in {folder} is incomplete: {PREFIX_FILE} is missing. Copy it there.")
    said = read_json(folder / _CONFIG_FILE)
    config = {"pre_seq_len": said.get("num_virtual_tokens"), "prefix_projection": said.get("projection")}
    return attach_original_prefix(model, config, read_tensors(file), where=str(folder))


def load_original_prefix(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`model` itself with the prefix of the ChatGLM originals' P-Tuning checkpoint in `folder`, frozen.

    Raises:
        ModelError: there is no prefix in the files, they are damaged or hold code, or it does not fit the model.
    """
    tensors = read_prefix(folder)
    if tensors is None:
        raise ModelError(f"The files in {folder} hold no P-Tuning prefix (transformer.prefix_encoder.*).")
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return attach_original_prefix(model, config, tensors, where=str(folder))


def export_original_prefix(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Write the prefix of `model` into `folder` as the originals' trainer does: pytorch_model.bin and config.json.

    A config.json that is there keeps its other keys. The originals' code loads the file's tensors into
    ``model.transformer.prefix_encoder`` when the model was opened with the same `pre_seq_len` and `prefix_projection`.

    Raises:
        ModelError: the model has no prefix.
    """
    encoder = _encoder(model)
    folder.mkdir(parents=True, exist_ok=True)
    archive = io.BytesIO()  # into a file, torch would hide that the disk is full
    torch.save(_tensors(encoder), archive)
    (folder / "pytorch_model.bin").write_bytes(archive.getbuffer())
    file = folder / "config.json"
    config: dict[str, Any] = read_json(file) if file.is_file() else {}
    config |= {"pre_seq_len": encoder.num_virtual_tokens, "prefix_projection": encoder.projection}
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _encoder(model: PreTrainedModel | PeftModel) -> PrefixEncoder:
    encoder = prefix_encoder_of(model)
    if encoder is None:
        raise ModelError("The model has no P-Tuning prefix, so none can be written.")
    return encoder


def _tensors(encoder: PrefixEncoder) -> dict[str, Tensor]:
    return {f"{_NAME}{name}": tensor.cpu().contiguous() for name, tensor in encoder.tensors().items()}
