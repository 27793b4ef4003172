"""How much memory this process has taken at its peak, and how much it may come to take: for plans, in bytes."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says what a container may take, version 2 and 1."""

_OWN_STATUS = Path("/proc/self/status")


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has taken so far: of the GPU for a GPU, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if (peak := _kilobytes(_OWN_STATUS, "VmHWM")) is not None:
        return peak * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes(device: torch.device) -> int:
    """The memory that this process takes now: on a GPU what its tensors hold, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _own_bytes("VmRSS") or peak_bytes(device)


def limit_bytes(device: torch.device, *, sharing: int = 1) -> int:
    """The memory that this process may come to take while everything else on the machine stays as it is now.

    With `sharing` processes of about its size on this machine, each gets a part of what none has taken yet.
    """
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += [int(text) for path in _CGROUP_LIMITS if (text := _read(path)).isdecimal()]
    own, addressed = _own_bytes("VmRSS"), _own_bytes("VmSize")
    others_leave = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    limits += [others_leave * 1024 // sharing + own] if others_leave is not None and own else []
    soft, _hard = resource.getrlimit(resource.RLIMIT_AS)
    limits += [max(0, soft - addressed + own)] if soft != resource.RLIM_INFINITY and own and addressed else []
    return min(limits)


def _own_bytes(key: str) -> int:
    """A figure of this process that Linux tells; 0 on another system."""
    return (_kilobytes(_OWN_STATUS, key) or 0) * 1024


def _kilobytes(file: Path, key: str) -> int | None:
    """The figure under `key` in one of Linux's files of figures in kB; None on another system."""
    lines = [line for line in _read(file).splitlines() if line.startswith(f"{key}:")]
    return int(lines[0].split()[1]) if lines else None


def _read(file: Path) -> str:
    """The text of a file of the system's, such as ``max``; empty where the system has no such file."""
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""
