"""The configuration of ChatGLM-6B: the keys of its original config.json."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ...errors import ModelError
from .chatglm_positions import SpecialIds

_UNSAID: dict[str, Any] = {
    "quantization_bit": 0,
    "quantization_embeddings": False,
    "pre_seq_len": None,
    "prefix_projection": False,
    "residual_layers": 28,
    "tie_word_embeddings": True,
}
"""Keys that a config.json holds only where they differ from this."""


class ChatGlmConfig(PreTrainedConfig):
    """The keys of an original config.json, with the released checkpoint's values; unknown ones are kept."""

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' name and type)
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "max_sequence_length",
        "intermediate_size": "inner_hidden_size",
        "num_key_value_heads": "num_attention_heads",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    position_encoding_2d: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 130004
    eos_token_id: int | list[int] | None = 130005
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    pad_token_id: int | None = 3
    quantization_bit: int | None = 0
    quantization_embeddings: bool | None = False
    pre_seq_len: int | None = None
    prefix_projection: bool | None = False
    tie_word_embeddings: bool = True
    residual_layers: int = 28
    """The n of the residual factor √(2n): the released code has 28 there, whatever the number of layers."""

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def special_ids(self) -> SpecialIds:
        """The token ids that divide a row."""
        if self.bos_token_id is None:
            raise ModelError("The ChatGLM configuration has no bos_token_id; set it to the id of <sop> (130004).")
        return SpecialIds(bos=self.bos_token_id, gmask=self.gmask_token_id, mask=self.mask_token_id)

    def to_dict(self) -> dict[str, Any]:
        """All keys as config.json holds them."""
        keys: dict[str, Any] = super().to_dict()
        return {key: value for key, value in keys.items() if key not in _UNSAID or value != _UNSAID[key]}
