"""The original checkpoint layouts of the GLM family, told from a config.json.

All of them call themselves ``"model_type": "chatglm"`` and name Python files that are to be run (``auto_map``). Nothing
of that is ever run: the weights are read by the layouts below.

    chatglm    ChatGLM-6B                  an architecture of its own (chatglm.py)
    chatglm2   ChatGLM2-6B                 transformers' Glm classes
    chatglm3   ChatGLM3-6B, -32k, -128k    the same; chat roles instead of rounds
    glm4       GLM-4-9B, -chat, -1m        the same; a byte-level vocabulary
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

GlmLayout = Literal["chatglm", "chatglm2", "chatglm3", "glm4"]

_GLM4_VOCABULARY = 100_000
"""ChatGLM2 and ChatGLM3 have 65,024 tokens, GLM-4 has 151,552."""


def glm_layout(config: Mapping[str, Any], folder: Path | None = None) -> GlmLayout | None:
    """The original layout of a checkpoint with this config.json; None when it is none of them.

    ChatGLM2 and ChatGLM3 compute the same and differ in how they are asked. Their configurations differ in nothing that
    must be so, so names and the files beside the configuration decide; the files are looked at as text, never run.

    Args:
        config: what config.json holds.
        folder: the checkpoint's folder, where there is one.
    """
    if config.get("model_type") != "chatglm":
        return None
    if "padded_vocab_size" not in config and "multi_query_attention" not in config:
        return "chatglm"
    names = " ".join(str(config.get(key, "")) for key in ("_name_or_path", "name_or_path"))
    code = ""
    if folder is not None:
        for file in ("tokenizer_config.json", "tokenization_chatglm.py"):
            path = folder / file
            code += path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if _is_glm4(config, names + code):
        return "glm4"
    if re.search(r"chatglm[-_]?2", names + code, re.IGNORECASE):
        return "chatglm2"
    if re.search(r"chatglm[-_]?3", names + code, re.IGNORECASE) or "<|observation|>" in code:
        return "chatglm3"
    # ChatGLM3-6B was made for 8,192 positions, its long variants stretch them; ChatGLM2 has 32,768 unstretched ones
    stretched = config.get("rope_ratio", 1) != 1
    return "chatglm3" if stretched or config.get("seq_length") == 8192 else "chatglm2"


def _is_glm4(config: Mapping[str, Any], told: str) -> bool:
    return (
        config.get("padded_vocab_size", 0) > _GLM4_VOCABULARY
        or isinstance(config.get("eos_token_id"), list)
        or "ChatGLM4Tokenizer" in told
        or re.search(r"glm[-_]?4", told, re.IGNORECASE) is not None
    )
