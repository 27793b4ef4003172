"""The table of model families: how a checkpoint is recognised, and what differs from the common case.

New families are new rows. Nothing here loads torch; opening a model is `opening.py`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .glm.layouts import GlmLayout, glm_layout
from .sources import read_json

_GLU = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_GLM = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One row of the table."""

    name: str
    models: str
    """The models that belong to it, for people."""
    model_types: tuple[str, ...]
    """Values of `model_type` in config.json."""
    layout: GlmLayout | None = None
    """The original layout of the GLM family in which such a checkpoint is stored; None: as transformers stores it."""
    targets: tuple[str, ...] = ()
    """The linear layers in a decoder layer: what ``targets: all-linear`` means."""
    stops: tuple[str, ...] = ()
    """The tokens that end an answer, where the family and not the tokenizer says so; the first is the one learnt."""
    asked: str = "the tokenizer's chat template"
    """How a conversation is written."""

    def told(self) -> list[tuple[str, str]]:
        """The row in words: pairs of what is told and what it is."""
        sign = _SIGNS[self.layout] if self.layout else f"model_type {' or '.join(self.model_types)}"
        return [
            ("models", self.models),
            ("recognised by", sign if self.model_types else "none of the above"),
            ("linear layers", ", ".join(self.targets) or "found by themselves"),
            ("asked by", self.asked),
            ("answers end with", " or ".join(self.stops) or "what the template ends a turn with, else the end token"),
        ]


_SIGNS: dict[GlmLayout, str] = {
    "chatglm": "model_type chatglm, no padded_vocab_size",
    "chatglm2": "model_type chatglm and its name, else 32768 positions that are not stretched",
    "chatglm3": "model_type chatglm and its name or role tokens, else 8192 positions or a rope_ratio",
    "glm4": "model_type chatglm and its name, 151552 tokens or several end tokens",
}

FAMILIES = (
    Family(name="gemma", models="Gemma 1–3", model_types=("gemma", "gemma2", "gemma3_text"), targets=_GLU),
    Family(
        name="qwen",
        models="Qwen2, Qwen2.5, Qwen3",
        model_types=("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
        targets=_GLU,
    ),
    Family(
        name="llama",
        models="Llama, Mistral, Phi-3, SmolLM3",
        model_types=("llama", "mistral", "phi3", "smollm3"),
        targets=_GLU,
    ),
    Family(
        name="chatglm",
        models="ChatGLM-6B, also -int4 and -int8",
        model_types=("chatglm",),
        layout="chatglm",
        targets=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        stops=("<eop>",),
        asked="rounds from 0, then [gMASK] <sop>",
    ),
    Family(
        name="chatglm2",
        models="ChatGLM2-6B, also -int4 and -32k",
        model_types=("chatglm",),
        layout="chatglm2",
        targets=_GLM,
        stops=("</s>",),
        asked="rounds from 1 behind [gMASK] sop",
    ),
    Family(
        name="chatglm3",
        models="ChatGLM3-6B, -base, -32k, -128k",
        model_types=("chatglm",),
        layout="chatglm3",
        targets=_GLM,
        stops=("</s>", "<|user|>", "<|observation|>"),
        asked="roles behind [gMASK] sop",
    ),
    Family(
        name="glm4",
        models="GLM-4-9B, -chat, -1m as first released",
        model_types=("chatglm",),
        layout="glm4",
        targets=_GLM,
        stops=("<|user|>", "<|endoftext|>", "<|observation|>"),
        asked="roles behind [gMASK] <sop>",
    ),
    Family(name="glm", models="GLM-4 in -hf form, GLM-4-0414", model_types=("glm", "glm4"), targets=_GLM),
)
OTHER = Family(name="other", models="any other causal model that transformers loads", model_types=())
"""Nothing special is known about it."""


def family_of(folder: Path) -> Family:
    """The family of the checkpoint in `folder`, by its config.json. Raises ModelError when that is broken."""
    config = read_json(folder / "config.json")
    layout = glm_layout(config, folder)
    model_type = config.get("model_type", "")
    found = (family for family in FAMILIES if model_type in family.model_types and family.layout == layout)
    return next(found, OTHER)
