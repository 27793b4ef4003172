"""The prompt format of an original ChatGLM checkpoint, by the name of its layout (`models/glm/layouts.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from .base import Renderer
from .roles import RolesRenderer
from .rounds import RoundsRenderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def glm_renderer(
    layout: Literal["chatglm", "chatglm2", "chatglm3", "glm4"],
    tokenizer: PreTrainedTokenizerBase,
    extra_stop_ids: Sequence[int] = (),
) -> Renderer:
    """The format of ``chatglm``, ``chatglm2`` (rounds), ``chatglm3`` or ``glm4`` (roles).

    Args:
        layout: which of them.
        tokenizer: the model's fast tokenizer.
        extra_stop_ids: further tokens that end an answer, such as those of generation_config.json.

    Raises:
        RenderError: the vocabulary lacks a control token of the format.
    """
    if layout == "chatglm" or layout == "chatglm2":
        return RoundsRenderer(tokenizer, layout=layout, extra_stop_ids=extra_stop_ids)
    return RolesRenderer(tokenizer, layout=layout, extra_stop_ids=extra_stop_ids)
