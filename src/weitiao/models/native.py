"""Models as transformers stores them: their weights read, and how much memory they take."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.utils import logging

from ..errors import ModelError
from .sources import first_line

_LAYER_MATRIX = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+\..*\.weight")
_PACKED_BYTES = {"I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1}


def weight_bytes(folder: Path, dtype: torch.dtype, *, packed_bytes: float | None = None) -> int:
    """The memory that the weights in `folder` take once they are loaded as `dtype`, by their files' headers.

    Packed integers, as quantised checkpoints hold them, stay what they are. With `packed_bytes` a number of the layers'
    matrices takes so many, being packed as it is read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return sum(file.stat().st_size for file in folder.glob("*.bin"))
    total = 0.0
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - no mapping
                    tensor = weights.get_slice(name)
                    shape, stored = tensor.get_shape(), _PACKED_BYTES.get(tensor.get_dtype())
                    to_pack = packed_bytes is not None and len(shape) == 2 and _LAYER_MATRIX.search(name)
                    each = stored or (packed_bytes if to_pack else None) or dtype.itemsize
                    total += math.prod(shape) * each
        except SafetensorError as error:
            raise ModelError(f"{file} cannot be read ({first_line(error)}). Download the model again.") from None
    return round(total)


def load_native(
    folder: Path,
    dtype: torch.dtype,
    *,
    device: torch.device | None = None,
    packing: BitsAndBytesConfig | TorchAoConfig | None = None,
) -> PreTrainedModel:
    """The causal model in `folder`.

    Args:
        folder: config.json and weights.
        dtype: of all weights but packed ones.
        device: where the weights go as they are read; the CPU by default.
        packing: how transformers packs each matrix as it is read; None: as they are stored.

    Raises:
        ModelError: it is incomplete, or needs code of its own or a package that is missing.
    """
    more: dict[str, Any] = {} if device is None else {"device_map": {"": device}}
    if packing is not None:
        more["quantization_config"] = packing
    try:
        with warnings.catch_warnings(), _without_bars():
            warnings.simplefilter("ignore")
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=dtype, trust_remote_code=False, output_loading_info=True, **more
            )
        model, info = loaded
    except Exception as error:  # noqa: BLE001 - a cut file, an unknown architecture, a wrong shape: all kinds of types
        raise ModelError(
            f"The model in {folder} cannot be loaded ({first_line(error)}). A file may be cut short or missing: "
            f"compare its size with the original or download it again. Models that need code of their own are not run."
        ) from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"The model in {folder} lacks {len(missing)} of its weights ({', '.join(missing[:3])} …). "
            f"A file is missing or cut: download it again."
        )
    assert isinstance(model, PreTrainedModel)
    return model


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide transformers' bar over the tensors of a checkpoint: reading a local file takes a moment."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
