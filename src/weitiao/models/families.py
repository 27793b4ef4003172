"""The table of model families, and opening a model: weights, tokenizer, chat format and adapter in one object.

A family says how to recognise a checkpoint and what differs from the common case. New families are new rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import ModelError
from ..render.base import Renderer
from ..render.template import TemplateRenderer
from .adapters import load_adapter
from .sources import fingerprint, first_line, model_folder, read_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One row of the table."""

    name: str
    model_types: tuple[str, ...]
    """Values of `model_type` in config.json."""


FAMILIES = (
    Family(name="gemma", model_types=("gemma", "gemma2", "gemma3_text")),
    Family(name="qwen", model_types=("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")),
    Family(name="llama", model_types=("llama", "mistral", "phi3", "smollm3")),
    Family(name="glm", model_types=("glm", "glm4")),
)
OTHER = Family(name="other", model_types=())
"""Any other causal model that transformers itself can load: nothing special is known about it."""


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """An opened model: what training, generation and evaluation work with."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    family: Family
    folder: Path
    fingerprint: str
    """Of the base model, adapter aside."""


def open_model(
    path: str, *, adapter: str | Path | None = None, dtype: str = "auto", device: str | None = None
) -> OpenModel:
    """Open the causal language model `path`, with `adapter` (a PEFT folder) on it where one is given.

    Args:
        path: a folder, a Hugging Face id, ``modelscope:OWNER/NAME``, or ``starter``.
        adapter: folder of a PEFT adapter, such as ``runs/NAME/adapter``.
        dtype: ``auto`` (bfloat16 where the processor computes it natively, else float32), ``float32``, ``bfloat16``
            or ``float16``.
        device: torch device; by default the GPU when there is one.

    Raises:
        ModelError: the checkpoint is missing, incomplete, needs code of its own, or cannot be read.
    """
    folder = model_folder(path)
    family = family_of(folder)
    tokenizer = load_tokenizer(folder)
    base = _load_weights(folder, _resolve_dtype(dtype))
    renderer = TemplateRenderer(tokenizer, extra_stop_ids=_generation_stop_ids(folder))
    model = base if adapter is None else load_adapter(base, Path(adapter))
    torch.nn.Module.to(model, torch.device(device or default_device()))
    model.eval()
    return OpenModel(
        model=model,
        tokenizer=tokenizer,
        renderer=renderer,
        family=family,
        folder=folder,
        fingerprint=fingerprint(folder),
    )


def default_device() -> str:
    """``cuda`` when there is a GPU, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def native_dtype() -> str:
    """The fastest dtype that this machine computes natively without losing range."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    capabilities = torch.cpu.get_capabilities()
    return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("bf16") else "float32"


def _resolve_dtype(name: str) -> torch.dtype:
    return DTYPES[native_dtype() if name == "auto" else name]


def family_of(folder: Path) -> Family:
    """The family of the checkpoint in `folder`, by the `model_type` of its config.json."""
    model_type = read_json(folder / "config.json").get("model_type", "")
    return next((family for family in FAMILIES if model_type in family.model_types), OTHER)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, padding on the left. Raises ModelError when it cannot be read."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), padding_side="left", trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - tokenizers raise bare Exception on broken files
        raise ModelError(f"The tokenizer in {folder} cannot be loaded: {first_line(error)}.") from None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def weight_bytes(folder: Path, *, dtype: str) -> int:
    """The memory that the weights in `folder` take once they are loaded as `dtype`, by their files' headers."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return sum(file.stat().st_size for file in folder.glob("*.bin"))
    count = 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise ModelError(f"{file} cannot be read ({first_line(error)}). Download the model again.") from None
    return count * _resolve_dtype(dtype).itemsize


def _load_weights(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
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


def _generation_stop_ids(folder: Path) -> tuple[int, ...]:
    """The end-of-sequence ids in generation_config.json: instruct models list their end-of-turn token there."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return ()
    ids = read_json(path).get("eos_token_id")
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def open_renderer(path: str) -> Renderer:
    """The chat format of the model `path` alone, without its weights."""
    folder = model_folder(path)
    return TemplateRenderer(load_tokenizer(folder), extra_stop_ids=_generation_stop_ids(folder))
