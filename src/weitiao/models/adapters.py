"""Adapters on a model: read from a folder of any kind, written, switched off.

An adapted model is a `PeftModel` around the transformers model; or the transformers model itself with something learnt
before its rows (learnt_prefix.py) or with weights of its own that were tuned (own_weights.py). Which of these it is
matters here and in few other places.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from ..errors import ModelError
from .glm.old_adapters import has_original_names, load_old_adapter
from .glm.original import read_prefix
from .learnt_prefix import learnt_prefix_of, without_prefix
from .lora_layers import ignoring_peft_warnings, use_lean_layers
from .own_weights import WEIGHTS_FILE, changed_weights_of, holds_weights, load_weights, save_weights, with_base_weights
from .prefix_files import PREFIX_FILE, holds_prefix, load_original_prefix, load_prefix, save_prefix
from .prompt_tuning import holds_prompt, load_prompt, prompt_encoder_of, save_prompt
from .sources import first_line


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside `model`, or `model` itself; adapter layers and prefix stay in place."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def has_adapter(model: PreTrainedModel | PeftModel) -> bool:
    """Whether `model` computes with an adapter of any kind."""
    own = learnt_prefix_of(model) is not None or changed_weights_of(model) is not None
    return own or isinstance(model, PeftModel)


@contextlib.contextmanager
def without_adapter(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Within this `model` computes as the model that was tuned: PEFT's adapter is off, or else what was learnt instead.

    A prefix under a PEFT adapter, or under weights that were tuned, belongs to the model that was tuned and stays on.

    Raises:
        ModelError: the model's own weights are learning at the moment.
    """
    if isinstance(model, PeftModel):
        off: contextlib.AbstractContextManager[None] = model.disable_adapter()
    elif changed_weights_of(model) is not None:
        off = with_base_weights(model)
    else:
        off = without_prefix(model)
    with off:
        yield


def save_adapter(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Write the adapter of `model` into `folder`: in PEFT's format, or as `save_prefix` or `save_weights` does."""
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder), save_embedding_layers=False)
    elif changed_weights_of(model) is not None:
        save_weights(model, folder)
    elif prompt_encoder_of(model) is not None:
        save_prompt(model, folder)
    else:
        save_prefix(model, folder)


def load_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel | PeftModel:
    """`model` with the adapter in `folder` on it, frozen, for inference.

    The folder is PEFT's, of any version, prompt tuning too; a P-Tuning prefix or changed weights that `save_adapter`
    wrote; or a P-Tuning checkpoint of the ChatGLM originals.

    Raises:
        ModelError: the folder holds no adapter, a damaged one, or one that does not fit the model.
    """
    if not (folder / "adapter_config.json").is_file():
        if not any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
            raise ModelError(f"The folder {folder} holds no adapter: it has no adapter_config.json.")
        return load_original_prefix(model, folder)
    if holds_prefix(folder):
        return load_prefix(model, folder)
    if holds_prompt(folder):
        return load_prompt(model, folder)
    if holds_weights(folder):
        return load_weights(model, folder)
    if has_original_names(model, folder):
        return load_old_adapter(model, folder)
    return _load_peft_adapter(model, folder)


def _load_peft_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    with _telling_what_is_wrong(folder):
        config = PeftConfig.from_pretrained(str(folder))
        use_lean_layers(config)
        with ignoring_peft_warnings():
            tuned = PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=False)
            # Loaded once more, because only this tells which weights were lacking and which had no place.
            found = tuned.load_adapter(str(folder), "default", is_trainable=False)
    _require_whole(found, folder)
    return tuned


def add_peft_adapter(tuned: PeftModel, folder: Path, name: str) -> None:
    """Put the adapter in `folder` beside those that `tuned` has, as `name`, frozen; the active one stays active.

    Raises:
        ModelError: as `load_adapter` says, or it is of another method than those.
    """
    with _telling_what_is_wrong(folder):
        config = PeftConfig.from_pretrained(str(folder), inference_mode=True)
        use_lean_layers(config)
        with ignoring_peft_warnings():
            tuned.add_adapter(name, config)
            found = tuned.load_adapter(str(folder), name, is_trainable=False)
    _require_whole(found, folder)


@contextlib.contextmanager
def _telling_what_is_wrong(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a cut file or wrong shapes raise many types
        raise ModelError(f"The adapter in {folder} cannot be put on this model ({first_line(error)}).") from None


def _require_whole(found: Any, folder: Path) -> None:
    """Raise ModelError where PEFT `found` weights lacking, or some that have no place."""
    lacking, strange = found.missing_keys, found.unexpected_keys
    if lacking or strange:
        what = "it has no weights" if lacking else "the model has no place"
        name, count = (lacking or strange)[0], len(lacking or strange)
        raise ModelError(
            f"The adapter in {folder} cannot be put on this model ({what} for {name}, and {count - 1} others like it)."
        )


def adapter_fingerprint(folder: Path) -> str:
    """SHA-256 of the weights of the adapter in `folder`, which `load_adapter` reads."""
    for name in ("adapter_model.safetensors", "adapter_model.bin", PREFIX_FILE, WEIGHTS_FILE):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for name, tensor in sorted((read_prefix(folder) or {}).items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
