"""A Python configuration class → its settings, read as text: the file is parsed and never run.

    class ProjectConfig:
        def __init__(self):
            self.train_path = os.path.join(base_dir, "data/train.jsonl")     → "<folder of the file>/data/train.jsonl"
            self.lora_rank = 8                                                → 8

What Python would have to compute stays as source text.
"""

from __future__ import annotations

import ast
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RecipeError


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigClass:
    """The attributes that a class sets."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    computed: dict[str, str] = field(default_factory=dict)
    """Attributes whose value Python would have to compute, as source text."""


def read_config_classes(text: str, path: Path) -> list[ConfigClass]:
    """The classes of the Python file `path` that set attributes, in order.

    Raises:
        RecipeError: `text` is no Python.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise RecipeError(f"{path} is no Python that can be read: {error}.") from None
    return [read for node in ast.walk(tree) if isinstance(node, ast.ClassDef) if (read := _read(node, path)).settings]


def _read(node: ast.ClassDef, path: Path) -> ConfigClass:
    read = ConfigClass(name=node.name)
    for statement in ast.walk(node):
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
            continue
        for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
            own = isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
            name = target.attr if own and isinstance(target, ast.Attribute) else getattr(target, "id", None)
            if name is None or (not own and statement not in node.body):
                continue
            try:
                read.settings[name] = _value(statement.value, path)
            except (ValueError, TypeError):
                read.computed[name] = ast.unparse(statement.value)
                read.settings[name] = read.computed[name]
    return read


def _value(node: ast.expr, path: Path) -> Any:
    """A literal, or a path joined from the file's own folder. Raises ValueError for anything else."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("path.join") and node.args:
        first, *rest = node.args
        parts = [ast.literal_eval(part) for part in rest]
        base = str(path.parent) if isinstance(first, ast.Name) else ast.literal_eval(first)
        return os.path.normpath(os.path.join(base, *parts))
    if isinstance(node, ast.IfExp) and "is_available" in ast.unparse(node.test):
        return ast.literal_eval(node.body)
    return ast.literal_eval(node)
