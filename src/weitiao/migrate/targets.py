"""Which model an original tunes, and what its layers are called once weitiao has opened it.

ChatGLM2, ChatGLM3 and GLM-4 are opened as transformers' own Glm classes, where the fused ``query_key_value`` of the
original checkpoints stands as three layers. ChatGLM-6B keeps its original names.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .ledger import Ledger, Wishes
from .rows import lies_here

if TYPE_CHECKING:
    from ..models.glm.layouts import GlmLayout

_SPLIT = {
    "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "dense": ("o_proj",),
    "dense_h_to_4h": ("gate_up_proj",),
    "dense_4h_to_h": ("down_proj",),
}

_NAMES: dict[str, GlmLayout] = {"chatglm3": "chatglm3", "chatglm2": "chatglm2", "glm4": "glm4", "chatglm6b": "chatglm"}


def carry_model(ledger: Ledger, wishes: Wishes, keys: tuple[str, ...], path: str | None, *, own: str = "") -> None:
    """``model.path``: the user's wish, else what the original says, else its `own` model; asked for without any."""
    if wishes.model is not None:
        ledger.carry(keys, "model.path", wishes.model, "as --model says")
    elif path:
        ledger.carry(keys, "model.path", path)
        if path.startswith(("/", ".", "~")) and not lies_here(path):
            ledger.note(f"{path} does not lie here. Change model.path in the recipe, or give --model.")
    elif own:
        ledger.imply("model.path", own, "the original's own; no setting names it")
    else:
        ledger.ask("The file does not say which model is tuned. Say it: --model FOLDER or a Hugging Face id.")


def layout_of(ledger: Ledger, *, hint: GlmLayout | None) -> GlmLayout | None:
    """The original layout of the model in `ledger`: told by its config.json or name, else `hint`; None for others."""
    from ..models.glm.layouts import glm_layout

    path = ledger.lines["model.path"].value if "model.path" in ledger.lines else ""
    config = Path(path) / "config.json"
    if config.is_file():
        try:
            found = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return hint
        return glm_layout(found, config.parent) if isinstance(found, dict) else hint
    name = re.sub(r"[-_.]", "", path.replace("\\", "/").rstrip("/").rpartition("/")[2].lower())
    return next((layout for sign, layout in _NAMES.items() if sign in name), hint)


def carry_targets(
    ledger: Ledger, keys: tuple[str, ...], names: list[str], layout: GlmLayout | None, *, note: str = ""
) -> None:
    """``method.targets``: `names`, written as the layers are called in the opened model."""
    if [name.lower() for name in names] in (["all"], ["all-linear"]):
        ledger.carry(keys, "method.targets", "all-linear", note)
        return
    plain = [name.rpartition(".")[2] for name in names]
    if layout in ("chatglm2", "chatglm3", "glm4") and any(name in _SPLIT for name in plain):
        split = [layer for name in plain for layer in _SPLIT.get(name, (name,))]
        told = "the same layers by the names that they have here"
        ledger.carry(keys, "method.targets", split, f"{note}: {told}" if note else told)
        if "query_key_value" in plain:
            ledger.note(
                "query_key_value is three layers here, each with an update of its own, where the original has one "
                "for all three: as many matrices B, two matrices A more."
            )
        return
    ledger.carry(keys, "method.targets", plain, note)
