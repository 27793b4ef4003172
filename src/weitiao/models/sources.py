"""Where a base model comes from: a local folder, the Hugging Face hub, ModelScope, or the starter model.

Turns the recipe's `model.path` into a folder on this disk, and gives a folder its fingerprint. Nothing here loads
weights, and nothing here ever runs code that came with a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .starter import starter_folder

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED_FILES = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.jinja", "*.txt", "LICENSE*", "*.bin")
_SAMPLED_BLOCKS, _BLOCK_BYTES = 64, 1 << 16


def model_folder(path: str) -> Path:
    """The local folder of the model `path` names, downloaded first where it is an id.

    Raises:
        ModelError: nothing is there; the sentence says what was looked for and what to do.
    """
    folder = _find_folder(path)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{path} holds no model: it has no config.json.")
    return folder


def _find_folder(path: str) -> Path:
    if path == "starter":
        return starter_folder()
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.startswith("modelscope:"):
        return _from_modelscope(path.removeprefix("modelscope:"))
    if path.startswith((".", "/", "~")) or path.count("/") != 1 or not _HUB_ID.fullmatch(path):
        raise ModelError(
            f"There is no model folder {path}. Give a folder with a config.json, a Hugging Face id such as "
            f"Qwen/Qwen2-0.5B-Instruct, a ModelScope id such as modelscope:Qwen/Qwen2-0.5B-Instruct, or starter."
        )
    return _from_hub(path)


def _from_hub(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(_WANTED_FILES)))
    except Exception as error:  # noqa: BLE001 - the hub's client raises a dozen unrelated types; each becomes the same sentence
        raise ModelError(
            f"{repo_id} is neither a folder here nor could it be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {first_line(error)}). "
            f"Check the spelling and the network, or give a local folder."
        ) from None


def _from_modelscope(repo_id: str) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise ModelError("ModelScope ids need its client: pip install 'weitiao[modelscope]'") from None
    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(_WANTED_FILES)))
    except Exception as error:  # noqa: BLE001 - as above
        raise ModelError(
            f"{repo_id} could not be fetched from ModelScope ({type(error).__name__}: {first_line(error)}). "
            f"Check the spelling and the network, or give a local folder."
        ) from None


def first_line(error: Exception) -> str:
    """What another library says went wrong, in one line; the error's type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next(filter(None, lines), type(error).__name__).rstrip(".:")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a checkpoint's `file`. Raises ModelError when it is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is not JSON: {error}. Download the model again.") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file} is not a JSON object. Download the model again.")
    return value


def adapter_type(folder: Path) -> str | None:
    """What adapter_config.json in `folder` calls its method; None where there is no such file.

    Raises:
        ModelError: the file is broken.
    """
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The adapter in {folder} cannot be put on this model ({file.name} is not JSON: {first_line(error)})."
        ) from None
    return str(config.get("peft_type")) if isinstance(config, dict) else None


def fingerprint(folder: Path) -> str:
    """SHA-256 over the model's configuration and a sample of its weights, to tell base models apart.

    Of every weight file: its name, its size, its first block and 64 evenly spaced blocks of 64 KiB. Fine-tuning
    moves nearly every weight, so a sample finds another model as surely as the whole file, in milliseconds.

    Raises:
        ModelError: the folder has no weights, or its config.json is broken.
    """
    digest = hashlib.sha256()
    config = read_json(folder / "config.json")
    for volatile in ("_name_or_path", "transformers_version"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    files = sorted([*folder.glob("*.safetensors")] or [*folder.glob("*.bin")])
    if not files:
        raise ModelError(f"The folder {folder} holds no weights: no .safetensors and no .bin file.")
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for number in range(_SAMPLED_BLOCKS + 1):
                stream.seek(number * max(0, size - _BLOCK_BYTES) // _SAMPLED_BLOCKS)
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()
