"""ChatGLM-6B as a transformers model, written from its mathematics; parameters have the released checkpoint's names.

    b, s   rows and new tokens            a = LN1(x);  x = √(2·28) · a + attention(a)
    H, D   heads and their size           b = LN2(x);  x = √(2·28) · b + mlp(b)

What is unusual: the residual stream takes the LayerNorm's output; the factor √(2·28) stands for the released model's
28 layers; queries, keys and values lie together head by head; positions have two channels and tokens of the context
see each other (chatglm_positions.py). Sources: Du et al. 2022, "GLM"; Zeng et al. 2023, "GLM-130B"; the checkpoint.

Nothing here is registered under the name "chatglm", which ChatGLM2, ChatGLM3 and GLM-4 folders have as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple, is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...errors import ModelError
from ..prefix_lm import RowPrefix
from .chatglm_config import ChatGlmConfig
from .chatglm_flash import stretches
from .chatglm_layers import ChatGlmAttention, ChatGlmBlock
from .chatglm_positions import (
    context_blocks,
    over_all_columns,
    places_of,
    positions_of,
    real_tokens,
    refuse_divided_context,
    rotation,
    visible,
)


class ChatGlmPreTrainedModel(PreTrainedModel):
    """What transformers must know of the architecture."""

    config: ChatGlmConfig
    config_class = ChatGlmConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "word_embeddings"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGlmBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": ChatGlmBlock, "attentions": ChatGlmAttention}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"attention\.rotary_emb\.inv_freq$"]  # noqa: RUF012


class ChatGlmModel(ChatGlmPreTrainedModel):
    """Token ids → hidden states."""

    def __init__(self, config: ChatGlmConfig) -> None:
        super().__init__(config)
        if not config.position_encoding_2d:
            raise ModelError(
                "position_encoding_2d is false in the ChatGLM configuration; only the two-channel positions of the "
                "released checkpoints are known. Use a checkpoint that has them."
            )
        if config.hidden_size % (4 * config.num_attention_heads):
            raise ModelError(
                f"hidden_size {config.hidden_size} cannot be divided among {config.num_attention_heads} attention "
                "heads of a size that is a multiple of 4, which two-channel rotary positions need."
            )
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ChatGlmBlock(config, index) for index in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states ``[b, s, hidden]``.

        Args:
            input_ids: ``[b, s]``.
            attention_mask: ``[b, s]`` or ``[b, p + s]``, 1 at tokens and 0 at padding; or, as the original tokenizer
                makes it, boolean ``[b, 1, s, …]``, True where a token must not look. Cached columns that it does not
                reach are visible.
            position_ids: ``[b, 2, s]``, see chatglm_positions.py; plain positions ``[b, s]`` of whole rows are
                understood as well. Without them they are read off `input_ids`, which must be whole rows.
            past_key_values: the cached tokens.
            inputs_embeds: ``[b, s, hidden]`` in the place of `input_ids`; needs `position_ids`.
            use_cache: make a cache where there is none.
            kwargs: handed on to the attention function.

        Raises:
            ModelError: a row without ``<sop>`` or mask token, positions or masks that do not fit the rows.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ModelError("Give either input_ids or inputs_embeds.")
        hidden_states = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        batch, length = hidden_states.shape[:2]
        real = None if attention_mask is None else real_tokens(attention_mask, length)
        positions = self.read_positions(input_ids, real, position_ids).expand(batch, 2, length)
        mask = self._mask(attention_mask, real, positions, past_key_values, hidden_states)
        rotations = rotation(positions, self.config.head_dim, hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                rotations,
                attention_mask=mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_layernorm(hidden_states), past_key_values=past_key_values
        )

    def read_positions(self, input_ids: Tensor | None, real: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Positions ``[b or 1, 2, s]``: as given, or read off whole rows ``[b, s]``; `real` is False at padding."""
        if position_ids is not None and position_ids.ndim == 3 and position_ids.shape[1] == 2:
            return position_ids
        if input_ids is None:
            raise ModelError("With inputs_embeds ChatGLM needs position_ids of shape [batch, 2, length].")
        if position_ids is not None:
            counted = torch.ones_like(input_ids, dtype=torch.bool) if real is None else real
            plain = position_ids.ndim == 2 and position_ids.shape[-1] == input_ids.shape[-1]
            if not plain or not torch.equal(position_ids.expand_as(input_ids)[counted], places_of(counted)[counted]):
                raise ModelError(
                    f"position_ids of shape {list(position_ids.shape)} do not count the tokens of each row from 0, "
                    "padding left out. ChatGLM's positions have two channels: give [batch, 2, length] for parts of "
                    "rows and for packed rows."
                )
        return positions_of(input_ids, real, self.config.special_ids)

    def _mask(
        self,
        attention_mask: Tensor | None,
        real: Tensor | None,
        position_ids: Tensor,
        past_key_values: Cache | None,
        embeds: Tensor,
    ) -> Any:
        """The mask as the chosen attention function wants it; None where it needs none."""
        implementation, length = self.config._attn_implementation, embeds.shape[1]
        flash = is_flash_attention_requested(self.config)
        if implementation not in ("eager", "sdpa") and not flash:  # a function that knows the rows by itself
            return create_causal_mask(self.config, embeds, attention_mask, past_key_values)
        num_cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if num_cached:
            refuse_divided_context(position_ids, real)
        if attention_mask is not None:
            attention_mask = over_all_columns(attention_mask, num_cached + length).to(embeds.device)
            if attention_mask.ndim == 4 and flash:
                raise ModelError(
                    f"Attention {implementation!r} takes no attention_mask of four dimensions. Give 1 and 0 in "
                    "[batch, length], or load the model with attn_implementation='sdpa'."
                )
            if attention_mask.ndim == 4:
                return ~attention_mask if implementation == "sdpa" else _added_to_scores(attention_mask, embeds.dtype)
        if length == 1:  # the new token sees all there is
            return create_causal_mask(self.config, embeds, attention_mask, past_key_values)
        if flash:
            return stretches(position_ids, attention_mask, num_cached)
        blocks = context_blocks(position_ids, num_cached)
        return create_causal_mask(self.config, embeds, attention_mask, past_key_values, block_sequence_ids=blocks)


def _added_to_scores(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, of the type `dtype`, so that columns with True in `hidden` get no weight."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)


class ChatGlmForCausalLM(ChatGlmPreTrainedModel, GenerationMixin):
    """Token ids → logits; generates as transformers' other models do."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}  # noqa: RUF012
    _supported_generation_modes = [  # noqa: RUF012 (an assistant's candidates would be given positions of one channel)
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
    ]

    def __init__(self, config: ChatGlmConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGlmModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def row_prefix(self, token_ids: Sequence[int]) -> RowPrefix:
        """The context of the row `token_ids`, without padding; ModelError where it has none."""
        return self.config.special_ids.row_prefix(token_ids)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[b, s, vocabulary]`` or those of `logits_to_keep`; see `ChatGlmModel.forward` for the rest.

        Args:
            input_ids: see there.
            attention_mask: see there.
            position_ids: see there.
            past_key_values: see there.
            inputs_embeds: see there.
            labels: ``[b, s]``, -100 where nothing is learnt; token i is predicted from what it sees before.
            use_cache: see there.
            logits_to_keep: how many tokens from the end, or which; 0 for all.
            kwargs: see there.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `generate`; takes the original tokenizer's boolean mask ``[b, 1, s, s]`` as well."""
        attention_mask = kwargs.get("attention_mask")
        if attention_mask is not None and attention_mask.ndim != 2:
            input_ids = kwargs.get("input_ids") if inputs is None else inputs
            cached = kwargs.get("past_key_values")
            plain = self._plain_mask(attention_mask, input_ids, kwargs.get("position_ids"))
            num_columns = plain.shape[1] + (0 if cached is None else int(cached.get_seq_length()))
            kwargs["attention_mask"] = over_all_columns(plain, num_columns)
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def _plain_mask(self, attention_mask: Tensor, input_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """``[b, s]``, 1 and 0, of a mask ``[b, 1, s, s]``, which must be the one that the model makes itself."""
        real = real_tokens(attention_mask, attention_mask.shape[-1])
        positions = self.transformer.read_positions(input_ids, real, position_ids)
        same = visible(positions, real) == ~attention_mask[:, 0]
        if not same[real.expand(same.shape[:2])].all():
            raise ModelError(
                "The attention_mask [batch, 1, length, length] is not that of a context and an answer, which "
                "generation goes on with. Give 1 and 0 in [batch, length]."
            )
        return real.long()

    def create_masks_for_generate(self, attention_mask: Tensor | None = None, **_: object) -> Tensor | None:
        """The mask as it is: the model makes its own from it, whatever the cache."""
        return attention_mask

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """Positions ``[b, 2, s]`` of the prompts."""
        input_ids = model_kwargs.get("input_ids", inputs_tensor)
        if input_ids.is_floating_point() or input_ids.shape[1] == 0:
            input_ids = None  # there are embeddings instead
        mask = model_kwargs.get("attention_mask")
        real = None if mask is None or input_ids is None else mask[:, -input_ids.shape[1] :].bool()
        return self.transformer.read_positions(input_ids, real, None)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Any = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Several answers to each row; transformers takes the first dimension of such positions for another one."""
        position_ids = model_kwargs.pop("position_ids")
        inputs, others = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return inputs, {**others, "position_ids": position_ids.repeat_interleave(expand_size, dim=0)}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]:
        """The next tokens stand where the mask token is and count on in the second channel."""
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        position_ids = updated["position_ids"]
        position_ids[:, 0, -num_new_tokens:] = position_ids[:, 0, -num_new_tokens - 1 : -num_new_tokens]
        return updated
