"""One base model in memory with several adapters, of which one computes at a time.

A server answers for several runs on one base. PEFT's adapters stand beside each other in the model's layers, and
choosing one moves no weights; learnt prefixes are kept apart as the keys and values that they are; weights that were
tuned themselves are exchanged for those of the base model, by reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapters import add_peft_adapter, load_adapter
from .learnt_prefix import LearntPrefix, learnt_prefix_of, prefix_states, put_prefix
from .own_weights import changed_weights_of, holds_weights, take_weights_off
from .prefix_files import holds_prefix
from .prompt_tuning import holds_prompt
from .sources import adapter_type

PastStates = tuple[Tensor, Tensor]
"""Keys and values that stand before every row, both ``[L, K, P, D]``."""


class AdapterSet:
    """A base model and its adapters by name; the name None is the base model itself."""

    def __init__(self, base: PreTrainedModel, folders: Mapping[str, Path] | None = None) -> None:
        """
        Args:
            base: the opened base model, without an adapter; it belongs to the set from then on.
            folders: for each name, the folder of an adapter.

        Raises:
            ModelError: an adapter cannot be put on the model, or two are of kinds that cannot stand beside each other.
        """
        self.base = base
        self._peft: PeftModel | None = None
        self._past: dict[str | None, PastStates | None] = {None: _states(base)}
        self._weights: dict[str | None, list[tuple[nn.Parameter, Tensor, Tensor]]] = {}
        """For those that tuned weights themselves, each parameter with the base model's values and with its own."""
        self._peft_names: dict[str | None, str] = {}
        self._chosen: str | None = None
        self.num_switches = 0
        """How often another one was chosen."""
        for name, folder in sorted((folders or {}).items(), key=lambda each: _is_pefts(each[1])):
            if _is_pefts(folder):  # they come last: PEFT renames the model's parameters and layers
                self._add_peft(name, folder)
            else:
                self._add_own(name, folder)
        self._switch(None)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names."""
        return tuple(name for name in self._past if name is not None)

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """What computes as the name that was chosen last; always the same object."""
        return self.base if self._peft is None else self._peft

    def past_states(self, name: str | None) -> PastStates | None:
        """The learnt keys and values before every row of `name`; None where there are none."""
        return self._past[name]

    def choose(self, name: str | None) -> None:
        """Make `model` compute as `name` does, its `past_states` aside. Raises KeyError for an unknown name."""
        if name not in self._past:
            raise KeyError(name)
        if name != self._chosen:
            self.num_switches += 1
            self._switch(name)

    def _switch(self, name: str | None) -> None:
        for parameter, base_values, _ in self._weights.get(self._chosen, ()):
            parameter.data = base_values
        for parameter, _, own_values in self._weights.get(name, ()):
            parameter.data = own_values
        if self._peft is not None:
            tuner: Any = self._peft.base_model
            if name not in self._peft_names:
                tuner.disable_adapter_layers()
            else:
                if self._chosen not in self._peft_names:
                    tuner.enable_adapter_layers()
                self._peft.set_adapter(self._peft_names[name], inference_mode=True)
        self._chosen = name

    def _add_own(self, name: str, folder: Path) -> None:
        """A learnt prefix, of which only keys and values are kept, or tuned weights."""
        before = learnt_prefix_of(self.base)
        load_adapter(self.base, folder)
        if changed_weights_of(self.base) is None:
            self._past[name] = _states(self.base)
            _put_back(self.base, before)
            return
        self._weights[name] = take_weights_off(self.base)
        self._past[name] = self._past[None]

    def _add_peft(self, name: str, folder: Path) -> None:
        self._past[name] = self._past[None]
        if self._peft is None:
            tuned = load_adapter(self.base, folder)
            assert isinstance(tuned, PeftModel)
            self._peft, self._peft_names[name] = tuned, "default"
        else:
            inner = f"adapter{len(self._peft_names)}"
            add_peft_adapter(self._peft, folder, inner)
            self._peft_names[name] = inner


def _states(model: PreTrainedModel) -> PastStates | None:
    with torch.no_grad():
        return prefix_states(model)


def _put_back(model: PreTrainedModel, encoder: LearntPrefix | None) -> None:
    """Give `model` the prefix back that it had before the last one was put on it."""
    if encoder is not None:
        put_prefix(model, encoder)
        return
    last = learnt_prefix_of(model)
    for hook in last.hooks if last is not None else []:
        hook.remove()
    del model.prefix_encoder


def _is_pefts(folder: Path) -> bool:
    """Whether PEFT puts the adapter in `folder` into the model's layers."""
    kind = adapter_type(folder)
    return kind is not None and not (holds_prefix(folder) or holds_prompt(folder) or holds_weights(folder))
