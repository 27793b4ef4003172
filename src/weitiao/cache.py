"""Where weitiao keeps what it makes once and can make again: the starter model, tokenised rows, rows being read."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where weitiao keeps what it makes once: $WEITIAO_CACHE, else $XDG_CACHE_HOME/weitiao, else ~/.cache/weitiao."""
    if "WEITIAO_CACHE" in os.environ:
        return Path(os.environ["WEITIAO_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "weitiao"
