"""Where and when a figure was measured: one line for the head of every benchmark's output."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path

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


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()
