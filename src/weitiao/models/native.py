"""Models as transformers stores them: their weights read, and how much memory they take."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from ..errors import ModelError
from .sources import first_line


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """The memory that the weights in `folder` take once they are loaded as `dtype`, by their files' headers.

    Packed integers, as quantised checkpoints hold them, stay what they are.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return sum(file.stat().st_size for file in folder.glob("*.bin"))
    total = 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - no mapping
                    tensor = weights.get_slice(name)
                    packed = tensor.get_dtype() in ("I8", "U8")
                    total += math.prod(tensor.get_shape()) * (1 if packed else dtype.itemsize)
        except SafetensorError as error:
            raise ModelError(f"{file} cannot be read ({first_line(error)}). Download the model again.") from None
    return total


def load_native(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The causal model in `folder`. Raises ModelError when it is incomplete, or needs code of its own."""
    try:
        with warnings.catch_warnings(), _without_bars():
            warnings.simplefilter("ignore")
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=dtype, trust_remote_code=False, output_loading_info=True
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
