"""Checksums of a folder's files, by which a damaged one is found before anything is built on it.

A disk that loses bits, a copy that was broken off and a hand that changed a file look alike: the file is not what was
written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ..runs import write_folder, write_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write ``manifest.json``: size and SHA-256 of every other file in `folder`. Folders in it have their own."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    described = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    write_json(folder / MANIFEST, {"files": described})


def damage_in(folder: Path) -> str:
    """What is wrong with the files of `folder`, such as ``optimiser.pt is missing``; "" when they are as written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (int(one["bytes"]), str(one["sha256"])) for name, one in manifest["files"].items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name, (size, digest) in files.items():
        path = folder / name
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
            if _sha256(path) != digest:
                return f"{name} is not what was written, by its checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    return ""


def link_files(source: Path, folder: Path) -> None:
    """Put the files of `source` into `folder`, without taking room for them where the file system can."""
    for file in source.iterdir():
        try:
            os.link(file, folder / file.name)
        except OSError:  # another disk, or one that knows no links
            shutil.copyfile(file, folder / file.name)


def write_checked_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """As `write_folder`, with a manifest of what `fill` wrote."""

    def fill_and_check(folder: Path) -> None:
        fill(folder)
        write_manifest(folder)

    write_folder(path, fill_and_check)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
