"""Machine and versions, for run folders and reports: facts that make a figure comparable, nothing about the user."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

_PACKAGES = ("weitiao", "torch", "transformers", "peft", "accelerate", "tokenizers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """Where a figure was measured."""

    python: str
    system: str
    processor: str
    cores: int
    gpu: str
    versions: dict[str, str]

    def to_json(self) -> dict[str, object]:
        """A JSON-ready copy."""
        return asdict(self)


def environment() -> Environment:
    """The machine and the versions of this process."""
    return Environment(
        python=platform.python_version(),
        system=platform.platform(),
        processor=_processor(),
        cores=os.cpu_count() or 1,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        versions={name: importlib.metadata.version(name) for name in _PACKAGES},
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
