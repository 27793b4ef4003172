"""Opening a model: weights, tokenizer, chat format and adapter in one object."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import ModelError
from ..render.base import Renderer
from ..render.glm import glm_renderer
from ..render.template import TemplateRenderer
from .adapters import load_adapter
from .families import Family, family_of
from .glm import templates
from .glm.layouts import GlmLayout
from .glm.original import open_original, read_prefix
from .glm.tokenizers import glm_tokenizer
from .native import load_native, weight_bytes
from .ptuning import attach_original_prefix
from .quantizing import (
    Packing,
    adopt,
    loading_config,
    pack_model,
    packing_named,
    require_packing,
    require_stored,
    stored_packing,
)
from .shards import open_shards
from .sources import fingerprint, first_line, model_folder, read_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED_BITS = {"int8": "in 8 bits", "int4": "in 4 bits"}
_LAYOUTS: dict[str, GlmLayout] = {
    templates.CHATGLM: "chatglm",
    templates.CHATGLM2: "chatglm2",
    templates.CHATGLM3: "chatglm3",
}
"""The formats of tokenizers that weitiao made, by the template it gives them; a template cannot write SentencePiece's
blank before an answer apart from the prompt."""
_VOCABULARY_FILES = ("tokenizer*", "*.model", "vocab.*", "*.tiktoken", "merges.txt", "spiece*")


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """An opened model: what training, generation and evaluation work with."""

    model: PreTrainedModel | PeftModel
    family: Family
    folder: Path
    fingerprint: str
    """Of the base model, adapter aside."""
    notes: tuple[str, ...] = ()
    """What a user should know of how it was opened, as sentences."""
    text: Renderer | None = None
    """The chat format; None for a folder of weights without a vocabulary."""

    @property
    def renderer(self) -> Renderer:
        """The chat format. Raises ModelError for a folder of weights without a vocabulary."""
        if self.text is None:
            raise ModelError(
                f"The folder {self.folder} holds weights but no tokenizer, so the model can compute and cannot be "
                f"asked anything. Copy the tokenizer's files from where the model comes from."
            )
        return self.text

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beneath the chat format. Raises ModelError as `renderer` does."""
        tokenizer: PreTrainedTokenizerBase = self.renderer.tokenizer
        return tokenizer


def open_model(
    path: str,
    *,
    adapter: str | Path | None = None,
    dtype: str = "auto",
    device: str | None = None,
    quantize: str = "none",
    must_speak: bool = False,
) -> OpenModel:
    """Open the causal language model `path`, with `adapter` on it where one is given.

    Args:
        path: a folder, a Hugging Face id, ``modelscope:OWNER/NAME``, or ``starter``.
        adapter: folder of an adapter: a run's, PEFT's, or a P-Tuning checkpoint of the ChatGLM originals.
        dtype: ``auto`` (bfloat16 where the processor computes it natively, else float32), ``float32``, ``bfloat16``
            or ``float16``.
        device: torch device; by default the GPU when there is one.
        quantize: how the matrices of the layers are held: ``none``, or a name in `quantizing.PACKINGS`.
        must_speak: refuse a folder of weights without a vocabulary, before the weights are read.

    Raises:
        ModelError: the checkpoint is missing, incomplete, needs code of its own, or cannot be read.
    """
    folder = model_folder(path)
    family = family_of(folder)
    config = read_json(folder / "config.json")
    text = None
    if must_speak or any(file for pattern in _VOCABULARY_FILES for file in folder.glob(pattern)):
        text = _renderer_of(folder, family, config)
    where = torch.device(device or default_device())
    base, notes = _load(folder, family, config, dtype=resolve_dtype(dtype), device=where, quantize=quantize)
    model = base if adapter is None else load_adapter(base, Path(adapter))
    torch.nn.Module.to(model, where)
    model.eval()
    return OpenModel(
        model=model,
        family=family,
        folder=folder,
        fingerprint=fingerprint(folder),
        notes=(*_notes_on_code(config, family), *notes),
        text=text,
    )


def _load(
    folder: Path, family: Family, config: dict[str, Any], *, dtype: torch.dtype, device: torch.device, quantize: str
) -> tuple[PreTrainedModel, list[str]]:
    """The weights in `folder`, quantised as asked, and what there is to say of them."""
    packing = packing_named(quantize)
    stored = _stored_as(family, config)
    if packing and stored and packing.name != stored:
        kind = _STORED_BITS.get(stored, f"quantised ({stored})")
        raise ModelError(
            f"The model in {folder} is stored {kind}, so it cannot be held as model.quantize: {quantize} says. Leave "
            f"model.quantize out, or take the model that is not quantised."
        )
    if packing:
        require_packing(packing, device)
    if family.layout is None:
        return _load_native(folder, config, dtype=dtype, device=device, packing=packing), []
    own = packing.bits if packing is not None and packing.library == "weitiao" else None
    model = open_original(folder, config, dtype=dtype, device=device, bits=own)
    if packing is not None and own is None:
        pack_model(model, packing)
    if not config.get("pre_seq_len"):
        return model, []
    prefix = read_prefix(folder)
    if prefix is None:
        length = config["pre_seq_len"]
        return model, [f"config.json tells of a prefix of {length} tokens, but no file holds it; opened without."]
    return attach_original_prefix(model, config, prefix), []


def _stored_as(family: Family, config: dict[str, Any]) -> str | None:
    """How the checkpoint is stored packed, by the names of packings where it is one of them; None where it is not."""
    if family.layout is None:
        return stored_packing(config)
    bits = config.get("quantization_bit")
    return f"int{bits}" if bits else None


def _load_native(
    folder: Path, config: dict[str, Any], *, dtype: torch.dtype, device: torch.device, packing: Packing | None
) -> PreTrainedModel:
    """The weights that transformers reads, packed as they are read, as they are stored, or afterwards by ourselves."""
    require_stored(folder, config, device)
    stored = stored_packing(config) is not None
    if packing is None or packing.library == "weitiao" or stored:
        model = load_native(folder, dtype, device=device if stored else None)
        if packing is not None and not stored:
            pack_model(model, packing)
        return adopt(model)
    return adopt(load_native(folder, dtype, device=device, packing=loading_config(packing, dtype)))


def _notes_on_code(config: dict[str, Any], family: Family) -> list[str]:
    """What to say of Python files that a checkpoint wants run."""
    if "auto_map" not in config:
        return []
    files = sorted({str(name).rpartition("--")[2].partition(".")[0] + ".py" for name in config["auto_map"].values()})
    return [
        f"config.json asks for {', '.join(files)} to be run. That was not done and is not needed: "
        f"{family.models.partition(',')[0]} is computed by weitiao and transformers themselves."
    ]


def default_device() -> str:
    """``cuda`` when there is a GPU, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def native_dtype() -> str:
    """The fastest dtype that this machine computes natively without losing range."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    capabilities = torch.cpu.get_capabilities()
    return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("bf16") else "float32"


def resolve_dtype(name: str) -> torch.dtype:
    """The dtype that a recipe's `model.dtype` means on this machine."""
    return DTYPES[native_dtype() if name == "auto" else name]


def load_tokenizer(folder: Path, kind: Any = AutoTokenizer) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, padding on the left. Raises ModelError when it cannot be read."""
    try:
        tokenizer = kind.from_pretrained(str(folder), padding_side="left", trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - tokenizers raise bare Exception on broken files
        raise ModelError(f"The tokenizer in {folder} cannot be loaded: {first_line(error)}.") from None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _renderer_of(folder: Path, family: Family, config: dict[str, Any]) -> Renderer:
    """The chat format of the model in `folder`."""
    stops = _generation_stop_ids(folder)
    saved = (folder / "tokenizer.json").is_file() and not any(folder.glob("*.model"))
    if family.layout is None or saved:
        # ChatGLM-6B's config.json is read as it was made, which AutoTokenizer wonders at
        tokenizer = load_tokenizer(folder, AutoTokenizer if family.layout is None else PreTrainedTokenizerFast)
        layout = _LAYOUTS.get(str(tokenizer.chat_template))
        return glm_renderer(layout, tokenizer, stops) if layout else TemplateRenderer(tokenizer, extra_stop_ids=stops)
    renderer = _glm_renderer(folder, family.layout, stops, _stamp(folder))
    tokenizer = renderer.tokenizer
    size = config.get("padded_vocab_size") or config.get("vocab_size") or 0
    if len(tokenizer) > size:
        raise ModelError(
            f"The tokenizer in {folder} has {len(tokenizer)} tokens, the model only {size}: they do not belong "
            f"together. Copy the tokenizer's files from where the model comes from."
        )
    return renderer


@lru_cache(maxsize=4)
def _glm_renderer(
    folder: Path, layout: GlmLayout, stops: tuple[int, ...], stamp: tuple[tuple[str, int, int], ...]
) -> Renderer:
    """The chat format of an original GLM checkpoint; kept, since its vocabulary takes seconds to convert."""
    return glm_renderer(layout, glm_tokenizer(folder, layout), extra_stop_ids=stops)


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of the vocabulary's files: others are read anew."""
    files = sorted(file for pattern in _VOCABULARY_FILES for file in folder.glob(pattern))
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


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
    return _renderer_of(folder, family_of(folder), read_json(folder / "config.json"))


def loaded_bytes(path: str, *, dtype: str, quantize: str = "none") -> int:
    """The memory that opening the model `path` so takes for its weights.

    Models that are packed here once they are loaded need what they take before.
    """
    folder = model_folder(path)
    layout, packing = family_of(folder).layout, packing_named(quantize)
    ours = packing is not None and packing.library == "weitiao"
    if layout is None:
        each = packing.bytes_per_weight if packing is not None and not ours else None
        return weight_bytes(folder, resolve_dtype(dtype), packed_bytes=each)
    tied = ("lm_head.weight",) if layout == "chatglm" else ()
    bits = packing.bits if packing is not None and ours else None
    return open_shards(folder).held_bytes(resolve_dtype(dtype), bits=bits, without=tied)
