"""Learnt tokens before every row: prompt tuning (Lester et al. 2021, arXiv:2104.08691) and P-Tuning (Liu et al. 2021,
arXiv:2103.10385), which learns them through a small network.

Their embeddings stand before the row's, at the positions -P … -1; so the row's own tokens stay where they are. With
rotary positions, which know distances only, that is the same as P tokens at the row's start. The tokens see one another
as a text would, and never the row, so the model is run over them once for all rows: the keys and values that it makes
of them stand before every row as those of P-Tuning v2 do (learnt_prefix.py), packed, cached or padded on the left.

Two things follow. Layers with a sliding window see the learnt tokens from everywhere, where tokens at the row's start
would go out of sight. And in ChatGLM-6B, whose context tokens all see each other, they are a context of their own: in
channel 0 at -P … -1, in channel 1 at 0; the row's context sees them, they do not see it.

Shapes: P learnt tokens, H hidden size, L layers, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, PromptTuningConfig, TaskType
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ..errors import ModelError
from .glm.chatglm import ChatGlmModel
from .learnt_prefix import LearntPrefix, PrefixShape, learnt_prefix_of, prefix_shape, put_prefix, unit_of
from .shards import read_tensors
from .sources import adapter_type, read_json

Network = Literal["none", "lstm", "mlp"]

_FILE = "adapter_model.safetensors"
_CONFIG_FILE = "adapter_config.json"
_NAME = "prompt_embeddings"
_PEFT_TYPES = ("PROMPT_TUNING", "P_TUNING")


class PromptEncoder(LearntPrefix):
    """The learnt tokens; a call gives their embeddings ``[P, H]`` in float32.

    They are learnt in units of `scale`, a power of two near the spread of the vocabulary's embeddings, so that one
    learning rate suits models whose embeddings are large or small.
    """

    def __init__(
        self,
        shape: PrefixShape,
        *,
        num_virtual_tokens: int,
        scale: float,
        network: Network = "none",
        network_size: int | None = None,
        residual: bool = False,
    ) -> None:
        """
        Args:
            shape: the model's sizes.
            num_virtual_tokens: P.
            scale: what the parameters, or what the network gives, are multiplied by.
            network: what the embeddings come through.
            network_size: its hidden size, in each direction; half of H by default.
            residual: the network's output is added to what it is given, in the place of standing for itself.
        """
        super().__init__(shape)
        self.scale = scale
        self.network = network
        self.residual = residual
        hidden = shape.hidden_size
        size = network_size or hidden // 2
        self.embedding = nn.Embedding(num_virtual_tokens, hidden)
        if network == "lstm":
            self.lstm = nn.LSTM(hidden, size, num_layers=2, bidirectional=True, batch_first=True)
            self.head = nn.Sequential(nn.Linear(2 * size, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        elif network == "mlp":
            self.head = nn.Sequential(
                nn.Linear(hidden, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, hidden)
            )

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        return self.embedding.num_embeddings

    def forward(self) -> Tensor:
        """The embeddings ``[P, H]``, float32."""
        given = learnt = self.embedding.weight
        if self.network == "lstm":
            learnt = self.lstm(learnt[None])[0][0]
        if self.network != "none":
            learnt = self.head(learnt) + given if self.residual else self.head(learnt)
        return learnt * self.scale

    def states(self, decoder: PreTrainedModel) -> tuple[Tensor, Tensor]:
        """Keys and values, both ``[L, K, P, D]``, that `decoder` makes of the learnt tokens."""
        cache = DynamicCache()
        with _undisturbed(decoder, self), torch.compiler.set_stance("force_eager"):
            decoder(
                inputs_embeds=self()[None].to(decoder.dtype),
                position_ids=_positions(decoder, self.num_virtual_tokens),
                past_key_values=cache,
                use_cache=True,
            )
        if len(cache.layers) != self.shape.num_layers:
            raise ModelError(
                f"{len(cache.layers)} of {self.shape.num_layers} layers of {type(decoder).__name__} kept the keys of "
                f"learnt tokens, so they cannot be used with this model. Use LoRA."
            )
        return tuple(  # type: ignore[return-value]
            torch.cat([getattr(layer, kind) for layer in cache.layers]) for kind in ("keys", "values")
        )


def _positions(decoder: PreTrainedModel, count: int) -> Tensor:
    """Where the learnt tokens stand: before position 0, or from there on where no position is before it."""
    places = torch.arange(-count, 0, device=decoder.device)
    if not _is_rotary(decoder):
        return places[None] + count
    if isinstance(decoder, ChatGlmModel):
        return torch.stack([places, torch.zeros_like(places)])[None]
    return places[None]


@contextmanager
def _undisturbed(decoder: PreTrainedModel, encoder: PromptEncoder) -> Iterator[None]:
    """Within this `decoder` runs over one plain row: without its prefix, recomputing nothing, by an attention of its
    own. Layers that are recomputed in the backward pass would drop the cache.
    """
    before = decoder.config._attn_implementation
    layers: list[Any] = [module for module in decoder.modules() if getattr(module, "gradient_checkpointing", False)]
    on = encoder.on
    try:
        encoder.on = False
        for layer in layers:
            layer.gradient_checkpointing = False
        if before not in ("sdpa", "eager"):
            decoder.set_attn_implementation("sdpa")
        yield
    finally:
        if before not in ("sdpa", "eager"):
            decoder.set_attn_implementation(before)
        for layer in layers:
            layer.gradient_checkpointing = True
        encoder.on = on


def attach_prompt(
    model: PreTrainedModel,
    *,
    num_virtual_tokens: int,
    network: Network = "none",
    network_size: int | None = None,
    vocabulary: bool = True,
    seed: int = 0,
) -> PreTrainedModel:
    """`model` itself with fresh learnt tokens before every row; everything else is frozen.

    Args:
        model: a model with rotary positions.
        num_virtual_tokens: P.
        network: what their embeddings come through.
        network_size: its hidden size.
        vocabulary: start from the embeddings of words drawn at random, to which what a network makes of them is added
            (Razdaibiedina et al. 2023, arXiv:2305.03937); else from N(0, 1), and the network's output stands alone.
        seed: what they start from, whatever random numbers were drawn before.

    Raises:
        ModelError: the model has no rotary positions, or its layers cannot take learnt keys.
    """
    _require_rotary(model)
    encoder = _fresh_encoder(
        model,
        num_virtual_tokens=num_virtual_tokens,
        network=network,
        network_size=network_size,
        vocabulary=vocabulary,
        seed=seed,
    )
    model.requires_grad_(False)
    put_prefix(model, encoder)
    return model


def states_of_words(model: PreTrainedModel, *, num_words: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys and values, both ``[L, K, P, D]``, that `model` makes of P words drawn from its vocabulary by `seed`."""
    encoder = _fresh_encoder(model, num_virtual_tokens=num_words, vocabulary=True, seed=seed).to(model.device)
    with torch.no_grad():
        return encoder.states(model.get_decoder())


def _fresh_encoder(
    model: PreTrainedModel,
    *,
    num_virtual_tokens: int,
    network: Network = "none",
    network_size: int | None = None,
    vocabulary: bool,
    seed: int,
) -> PromptEncoder:
    """Tokens that nothing was learnt of yet, as `attach_prompt` describes them."""
    embedding: Any = model.get_input_embeddings()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        words = torch.randint(embedding.num_embeddings, (num_virtual_tokens,))
        encoder = PromptEncoder(
            prefix_shape(model),
            num_virtual_tokens=num_virtual_tokens,
            scale=_unit(model),
            network=network,
            network_size=network_size,
            residual=vocabulary,
        )
        if vocabulary:
            encoder.embedding.weight.copy_(embedding(words.to(model.device)).float() / encoder.scale)
    return encoder


@torch.no_grad()
def _unit(model: PreTrainedModel) -> float:
    """The power of two next to the spread of the vocabulary's embeddings."""
    embedding: Any = model.get_input_embeddings()
    some = torch.arange(0, embedding.num_embeddings, max(1, embedding.num_embeddings // 256), device=model.device)
    return float(unit_of(embedding(some).float().std()))


def _is_rotary(decoder: PreTrainedModel) -> bool:
    """Whether positions turn queries and keys, so that distances alone count."""
    return isinstance(decoder, ChatGlmModel) or bool(getattr(decoder.config.get_text_config(), "rope_parameters", None))


def _require_rotary(model: PreTrainedModel) -> None:
    """Raise ModelError where positions are learnt or added, of which there are none before 0."""
    if not _is_rotary(model.get_decoder()):
        raise ModelError(
            f"Learnt tokens stand before position 0, which {type(model).__name__} has no place for: its positions are "
            f"not rotary. Use LoRA or P-Tuning v2."
        )


def prompt_encoder_of(model: PreTrainedModel | PeftModel) -> PromptEncoder | None:
    """The learnt tokens of `model`, switched on or off; None where it has none."""
    found = learnt_prefix_of(model)
    return found if isinstance(found, PromptEncoder) else None


# --- Files -----------------------------------------------------------------------------------------------------------


def save_prompt(model: PreTrainedModel, folder: Path) -> None:
    """Write the learnt tokens of `model` into `folder`, which exists, as PEFT's adapter of prompt tuning.

    A network is not written, only the embeddings that it gives: they are all that use needs.
    """
    encoder = prompt_encoder_of(model)
    if encoder is None:
        raise ModelError("The model has no learnt tokens, so none can be written.")
    shape = encoder.shape
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=encoder.num_virtual_tokens,
        token_dim=shape.hidden_size,
        num_transformer_submodules=1,
        num_attention_heads=shape.num_heads,
        num_layers=shape.num_layers,
        inference_mode=True,
    )
    with torch.no_grad():
        save_file({_NAME: encoder().cpu().contiguous()}, folder / _FILE, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def holds_prompt(folder: Path) -> bool:
    """Whether `folder` is an adapter of learnt tokens, ours or PEFT's. Raises ModelError when its JSON is broken."""
    return adapter_type(folder) in _PEFT_TYPES


def load_prompt(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`model` itself with the learnt tokens in `folder` before every row, frozen; those it had are replaced.

    Raises:
        ModelError: files are missing or damaged, or the tokens are those of a model of another size.
    """
    file = next((folder / name for name in (_FILE, "adapter_model.bin") if (folder / name).is_file()), None)
    if file is None:
        raise ModelError(f"The adapter in {folder} is incomplete: {_FILE} is missing. Copy it there.")
    tensors = read_tensors(file)
    shape = prefix_shape(model)
    said = read_json(folder / _CONFIG_FILE).get("num_virtual_tokens")
    found = tensors.get(_NAME)
    if found is None or found.ndim != 2 or found.shape[1] != shape.hidden_size or said not in (None, len(found)):
        what = "lacks" if found is None else f"has, of shape {list(found.shape)},"
        raise ModelError(
            f"The adapter in {folder} cannot be put on this model: it {what} {_NAME}, where {said or 'some'} tokens "
            f"of {shape.hidden_size} numbers are wanted. Take the model that it was tuned on."
        )
    _require_rotary(model)
    encoder = PromptEncoder(shape, num_virtual_tokens=len(found), scale=_unit(model))
    with torch.no_grad():
        encoder.embedding.weight.copy_(found.float() / encoder.scale)
    put_prefix(model, encoder)
    model.requires_grad_(False)
    return model
