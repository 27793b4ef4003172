"""The command line: each verb parses its arguments, makes one library call and prints the result.

Libraries that load torch are imported inside the verbs that need them, so that `check` answers in a blink.
"""

from __future__ import annotations

from . import data, models, runs, search, serving  # they add their verbs to the program
from .base import app

__all__ = ["app", "data", "main", "models", "runs", "search", "serving"]


def main() -> None:
    """Entry point of the command `weitiao`."""
    app()
