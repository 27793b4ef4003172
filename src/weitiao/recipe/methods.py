"""The recipe's part on methods: which parameters learn, one group of settings for each way of tuning.

Knows names and numbers only; what they do to a model is `tuning/`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from .part import Part

_RANGE = re.compile(r"(\d+)-(\d+)")


class Lora(Part):
    """LoRA: low-rank updates beside frozen weights (Hu et al. 2021)."""

    name: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, description="Rank of the update.")
    alpha: int = Field(32, ge=1, description="Scale of the update: alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    targets: str | tuple[str, ...] = Field(
        "all-linear",
        description="Layers that get an update: all-linear, names such as [q_proj, v_proj], or a regular expression "
        "that their whole names match, such as .*\\.self_attn\\..*",
    )
    layers: str | tuple[int, ...] = Field(
        "all",
        description="Decoder layers that get an update: all, a range such as 12-17, or numbers such as [0, 5, -1], "
        "from the end where negative.",
    )
    rslora: bool = Field(
        False, description="Scale by alpha / sqrt(rank), so that large ranks learn as fast (Kalajdzievski 2023)."
    )
    dora: bool = Field(
        False, description="Learn each matrix's direction by LoRA and its magnitudes apart (Liu et al. 2024); slower."
    )
    init: Literal["default", "pissa"] = Field(
        "default",
        description="What the update starts from. default: nothing. pissa: the strongest directions of the weight, "
        "which then learn themselves (Meng et al. 2024); the saved adapter has twice the rank.",
    )
    b_learning_rate: float = Field(
        1.0,
        gt=0,
        description="Learning rate of the matrices B, as a multiple of train.learning_rate: LoRA+ has 16 (Hayou et "
        "al. 2024).",
    )

    @field_validator("layers")
    @classmethod
    def _layers_are_known(cls, layers: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if layers in ("", ()):
            raise PydanticCustomError("layers", "no layer would learn; leave it out for all of them.")
        if isinstance(layers, str) and layers != "all":
            found = _RANGE.fullmatch(layers)
            if found is None or int(found[1]) > int(found[2]):
                raise PydanticCustomError("layers", "say all, a range such as 12-17, or numbers such as [0, 5, -1].")
        return layers

    @model_validator(mode="after")
    def _one_start(self) -> Lora:
        if self.init == "pissa" and self.dora:
            raise PydanticCustomError("init", "init: pissa and dora: true exclude each other; leave one of them out.")
        return self

    def layer_numbers(self, num_layers: int) -> frozenset[int]:
        """The decoder layers that learn, of a model that has `num_layers`; those that it lacks are among them too."""
        if self.layers == "all":
            return frozenset(range(num_layers))
        if isinstance(self.layers, str):
            first, last = self.layers.split("-")
            return frozenset(range(int(first), int(last) + 1))
        return frozenset(layer + num_layers if layer < 0 else layer for layer in self.layers)


class PTuning(Part):
    """P-Tuning v2: learnt keys and values before every row, in every layer (Liu et al. 2021)."""

    name: Literal["ptuning_v2"] = "ptuning_v2"
    num_virtual_tokens: int = Field(128, ge=1, description="Length of the learnt prefix (pre_seq_len).")
    projection: bool = Field(
        False, description="Learn the prefix through a two-layer network (prefix_projection) instead of directly."
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout on the prefix while training.")
    init: Literal["vocabulary", "random"] = Field(
        "vocabulary",
        description="What it starts from, where there is no projection: keys and values of words drawn by the seed, or "
        "random numbers.",
    )


class PTuningV1(Part):
    """P-Tuning: learnt tokens before every row, their embeddings made by a small network (Liu et al. 2021)."""

    name: Literal["ptuning_v1"] = "ptuning_v1"
    num_virtual_tokens: int = Field(20, ge=1, description="How many learnt tokens stand before every row.")
    encoder: Literal["lstm", "mlp"] = Field(
        "lstm", description="What makes the embeddings: two layers of LSTM both ways and two of perceptron, or these."
    )
    encoder_size: int | None = Field(
        None, ge=1, description="Hidden size of the network, in each direction. Left out: half the model's."
    )
    init: Literal["vocabulary", "random"] = Field(
        "vocabulary",
        description="What the network is given: embeddings of words drawn by the seed, to which its output is added; "
        "or random numbers, and its output stands alone.",
    )


class PromptTuning(Part):
    """Prompt tuning: learnt tokens before every row, nothing else (Lester et al. 2021)."""

    name: Literal["prompt_tuning"] = "prompt_tuning"
    num_virtual_tokens: int = Field(20, ge=1, description="How many learnt tokens stand before every row.")
    init: Literal["vocabulary", "random"] = Field(
        "vocabulary", description="What they start from: embeddings of words drawn by the seed, or random numbers."
    )


class Freeze(Part):
    """Some of the model's own weights learn, all others are frozen."""

    name: Literal["freeze"] = "freeze"
    layers: int = Field(2, ge=0, description="How many of the last decoder layers learn.")
    parameters: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (),
        description="Parts of the names of parameters that learn beside them, such as [layers.27., norm]; set layers: "
        "0 for these alone.",
    )

    @model_validator(mode="after")
    def _something_learns(self) -> Freeze:
        if not self.layers and not self.parameters:
            raise PydanticCustomError("layers", "layers is 0 and parameters names none, so nothing would learn.")
        return self


class Full(Part):
    """All of the model's own weights learn."""

    name: Literal["full"] = "full"


class Ia3(Part):
    """(IA)³: keys, values and inner activations are scaled by learnt factors (Liu et al. 2022)."""

    name: Literal["ia3"] = "ia3"
    targets: Literal["auto"] | tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        "auto", description="Layers whose output is scaled. auto: those that make keys and values."
    )
    feedforward: Literal["auto"] | tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        "auto", description="Layers whose input is scaled. auto: the last of each layer's perceptron."
    )


AnyMethod = Lora | PTuning | PTuningV1 | PromptTuning | Freeze | Full | Ia3


def _as_method(value: Any) -> Any:
    return {"name": "lora", **value} if isinstance(value, Mapping) else value


Method = Annotated[Annotated[AnyMethod, Field(discriminator="name")], BeforeValidator(_as_method)]

_LEARNING_RATES: dict[str, float] = {
    "ptuning_v2": 0.1,
    "ptuning_v1": 0.3,
    "prompt_tuning": 0.3,
    "freeze": 1e-4,
    "full": 3e-5,
    "ia3": 5e-2,
}
"""What `train.learning_rate` is where the recipe leaves it out, for methods that LoRA's does not suit."""

_PROJECTION_RATE = 2e-3
"""The same for P-Tuning v2 through a network."""


def learning_rate_of(method: Any) -> float | None:
    """The learning rate that suits `method`, as a recipe has it before it is read; None where that of `Train` does."""
    settings = method if isinstance(method, Mapping) else method.model_dump() if isinstance(method, Part) else {}
    if settings.get("projection"):
        return _PROJECTION_RATE
    return _LEARNING_RATES.get(str(settings.get("name")))
