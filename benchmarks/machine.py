"""Where and when a figure was measured: one line for the head of every benchmark's output."""

from __future__ import annotations

import datetime
import subprocess
import time
from pathlib import Path

import torch

from weitiao.environment import environment


def describe_machine() -> str:
    """Processor, cores, versions, date and commit (marked when files differ from it)."""
    here = environment()
    root = Path(__file__).parent.parent
    commit = _git(root, "rev-parse", "--short", "HEAD")
    changed = " with changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else ""
    versions = ", ".join(f"{name} {version}" for name, version in here.versions.items())
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return f"{here.processor}, {here.cores} cores, {here.gpu}; {versions}; {today}; commit {commit}{changed}"


def seconds() -> float:
    """A clock: of the processor's time where torch has one thread, so that other programs do not count; else as usual.

    On a GPU the usual one, and what it was given is awaited.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (
        time.process_time() if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter()
    )


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()
