"""Lines of metrics.jsonl as flat figures by name, as monitors take them.

``{"kind": "dev", "step": 6, "loss": 0.5, "scores": {"triples": {"f1": 0.9}}}`` gives
``{"dev/loss": 0.5, "dev/score/triples/f1": 0.9}``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_GROUPS = {"task_losses": "task_loss", "scores": "score"}
"""Keys of a line that hold figures by task, and what their names begin with. No figure's name may be the path of
another's, since tools make folders of them: the task losses cannot stand below ``loss``."""


def flat_figures(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of `line` by name; places where there is none, such as an overflowed norm, are left out."""
    kind = line["kind"]
    return {
        f"{kind}/{name}": value
        for key, entry in line.items()
        if key not in ("kind", "step")
        for name, value in _leaves(_GROUPS.get(key, key), entry)
    }


def _leaves(name: str, entry: object) -> Iterator[tuple[str, float]]:
    if isinstance(entry, Mapping):
        for key, value in entry.items():
            yield from _leaves(f"{name}/{str(key).replace('/', '_')}", value)
    elif isinstance(entry, int | float) and not isinstance(entry, bool):
        yield name, float(entry)
