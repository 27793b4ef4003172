"""The weights in a checkpoint's folder: found, checked against their index, then handed out one tensor at a time.

Files are mapped into memory, so a tensor that is never touched costs nothing and one that is used as it is costs its
pages once. Old ``.bin`` files that are no archive cannot be mapped and are held in memory until they are handed out.

Pickled files are read with ``weights_only``: code in them is named, never run.

Knows files and tensors; what a tensor is for, `original.py` says.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ModelError
from .sources import first_line

_KINDS = ("model.safetensors", "pytorch_model.bin")
"""Names of a whole checkpoint in one file, best first; in pieces it has an index of that name and ``.index.json``."""

_OTHER_FILES = ("adapter_", "prefix_encoder", "optimizer", "scheduler", "training_args", "rng_state", "scaler")
"""How files begin that are no part of the model's weights."""

_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.(?:safetensors|bin))")
_LFS = b"version https://git-lfs"
_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"

_MAPPED_BYTES = 64 << 20
"""After so many bytes a file is mapped anew: the pages of what was read leave memory only with their mapping."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """One tensor of a checkpoint, not read yet."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Its size in memory."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Shards:
    """All tensors of a checkpoint by name."""

    stored: Mapping[str, Stored]
    _unmapped: dict[Path, dict[str, Tensor]] = field(default_factory=dict)
    """What files hold that could not be mapped; each tensor leaves with its reading."""

    def held_bytes(self, dtype: torch.dtype, *, bits: int | None, without: Collection[str] = ()) -> int:
        """The memory of all tensors but `without` once floats are `dtype` and, with `bits`, layers' matrices packed."""
        total = 0
        for name, stored in self.stored.items():
            numbers = stored.num_bytes // stored.dtype.itemsize
            if name in without:
                continue
            if not stored.dtype.is_floating_point or name.endswith(".weight_scale"):
                total += stored.num_bytes
            elif bits and len(stored.shape) == 2 and ".layers." in name:
                total += numbers * bits // 8 + 2 * stored.shape[0]  # a float16 scale for every row
            else:
                total += numbers * dtype.itemsize
        return total

    def stream(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Each tensor of `names` once, files with the largest tensors first and in a file the largest first.

        So the largest is converted while little else is in memory. Who converts a tensor should let go of it before
        asking for the next; who keeps it keeps its mapping.
        """
        by_file: dict[Path, list[str]] = {}
        for name in sorted(names, key=lambda name: -self.stored[name].num_bytes):
            by_file.setdefault(self.stored[name].file, []).append(name)
        for file, wanted in by_file.items():
            yield from self._unmapped_of(file, wanted) if file in self._unmapped else self._mapped_of(file, wanted)

    def _unmapped_of(self, file: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, self._unmapped[file].pop(name)

    def _mapped_of(self, file: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        tensors: dict[str, Tensor] = {}
        num_read = 0
        for name in names:
            if not tensors or num_read > _MAPPED_BYTES:
                tensors, num_read = {}, 0  # the old mapping goes before the new one comes
                tensors = _read(file)
            num_read += self.stored[name].num_bytes
            yield name, tensors.pop(name)


def open_shards(folder: Path) -> Shards:
    """The weights in `folder`, their names, shapes and dtypes known, none of them read.

    Raises:
        ModelError: there are no weights, files are missing (all are named) or cut, a file holds code besides weights, a
            name is there twice, or a file lacks weights that the index promises.
    """
    files, promised = _weight_files(folder)
    stored: dict[str, Stored] = {}
    unmapped: dict[Path, dict[str, Tensor]] = {}
    for file in files:
        tensors = _read(file)
        for name, tensor in tensors.items():
            if name in stored and not is_rotary_table(name):
                raise ModelError(
                    f"{name} is in {stored[name].file.name} and in {file.name} of {folder}. Two checkpoints are mixed "
                    f"up there: keep the files of one."
                )
            stored[name] = Stored(file=file, shape=tuple(tensor.shape), dtype=tensor.dtype)
        if not _can_be_mapped(file):
            unmapped[file] = tensors
    lost = sorted(promised - stored.keys())
    if lost:
        raise ModelError(
            f"The files in {folder} lack weights that their index names: {len(lost)} ({', '.join(lost[:3])}"
            f"{' …' if len(lost) > 3 else ''}). Index and files are of two versions: download the model again."
        )
    return Shards(stored=stored, _unmapped=unmapped)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of one file, in memory. Raises ModelError as `open_shards` does."""
    return {name: tensor.clone() for name, tensor in _read(file).items()}


def is_rotary_table(name: str) -> bool:
    """Whether `name` is the table of rotary frequencies that original files hold and no model reads."""
    return name.endswith(("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq"))


def _weight_files(folder: Path) -> tuple[list[Path], set[str]]:
    """The files of the weights in `folder`, and the names that an index promises."""
    for name in _KINDS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name], set()
        if index.is_file():
            return _indexed_files(index)
    for suffix in (".safetensors", ".bin"):
        files = sorted(
            file for file in folder.glob(f"*{suffix}") if file.is_file() and not file.name.startswith(_OTHER_FILES)
        )
        if files:
            _require_files(folder, _numbered_files(files), "their numbers")
            return files, set()
    raise ModelError(f"The folder {folder} holds no weights: no .safetensors and no .bin file.")


def _indexed_files(index: Path) -> tuple[list[Path], set[str]]:
    try:
        told: Any = json.loads(index.read_text(encoding="utf-8"))
        places = {str(name): str(file) for name, file in told["weight_map"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise ModelError(f"{index} is not an index of weights. Download it again.") from None
    outside = sorted(name for name in set(places.values()) if Path(name).name != name)
    if outside:
        raise ModelError(f"{index} names files outside of its folder ({', '.join(outside[:3])}). They were not read.")
    names = sorted(set(places.values()))
    _require_files(index.parent, names, index.name)
    return [index.parent / name for name in names], set(places)


def _numbered_files(files: list[Path]) -> list[str]:
    """The names that numbered files such as ``pytorch_model-00001-of-00008.bin`` say are there."""
    names = {file.name for file in files}
    for file in files:
        if found := _NUMBERED.fullmatch(file.name):
            count = int(found["count"])
            names |= {f"{found['stem']}-{n:05}-of-{count:05}{found['suffix']}" for n in range(1, count + 1)}
    return sorted(names)


def _require_files(folder: Path, names: Collection[str], told_by: str) -> None:
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ModelError(
            f"{len(missing)} of the {len(names)} files of weights that {told_by} tells of are missing in {folder}: "
            f"{', '.join(missing)}. Download them."
        )


def _can_be_mapped(file: Path) -> bool:
    return file.suffix == ".safetensors" or _begins_with(file, _ZIP)


def _begins_with(file: Path, first: bytes) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(first)) == first


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of `file`, mapped where that can be."""
    if _begins_with(file, _LFS):
        raise ModelError(f"{file} only points to the weights, which Git LFS keeps elsewhere. Fetch them: git lfs pull.")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as weights:
                return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise _cut(file, error) from None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            found: Any = torch.load(file, map_location="cpu", mmap=_can_be_mapped(file), weights_only=True)
    except pickle.UnpicklingError as error:
        raise _code_or_garbage(file, error) from None
    except Exception as error:  # noqa: BLE001 - a cut file raises EOFError, IndexError, RuntimeError, OSError …
        raise _cut(file, error) from None
    strange = [] if isinstance(found, dict) else [type(found).__name__]
    if not strange:
        strange = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    if strange:
        raise ModelError(
            f"{file} holds something besides named weights ({', '.join(strange[:3])}). Give the checkpoint as "
            f"save_pretrained writes it, or as safetensors."
        )
    return {str(name): value.detach() for name, value in found.items()}


def _code_or_garbage(file: Path, error: Exception) -> ModelError:
    """What to say of a pickled file that is more than weights."""
    if not _begins_with(file, _PICKLE) and not _begins_with(file, _ZIP):
        return ModelError(f"{file} is not a file of weights. Download it again.")
    named = re.search(r"GLOBAL (\S+)", str(error))
    what = f" ({named[1]})" if named else ""
    return ModelError(
        f"{file} holds code besides weights{what}. It was not run. Get the model as safetensors, or from a source that "
        f"saved its weights alone."
    )


def _cut(file: Path, error: Exception) -> ModelError:
    return ModelError(f"{file} cannot be read ({first_line(error)}): it may be cut short. Download it again.")
