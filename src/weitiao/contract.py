"""The contract: what a tuned model promises, and what it must be run with for the promise to hold.

Evaluation, prediction and serving read the contract and nothing else about how the model was tuned. It is plain
data: this module knows no model and no task, only how to write, read and compare.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import ContractError
from .runs import write_json

VERSION = 1

_ADDED = {"reading", "constrain", "retrieve", "quantize"}
"""What contracts of the first runs do not say: then rows were read plainly, answers free, no examples shown, and the
model was not quantised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contract:
    """Everything fixed by training that later use must repeat."""

    base: str
    """Where the base model came from: folder, id, or ``starter``."""
    base_fingerprint: str
    """`models.fingerprint` of the base weights and configuration."""
    adapter_fingerprint: str
    """SHA-256 of the adapter's weights."""
    family: str
    template: str
    """The chat template, byte for byte; empty for plain text continuation."""
    stop_ids: tuple[int, ...]
    tasks: tuple[Mapping[str, Any], ...]
    """`Task.to_json` of every task."""
    decoding: Mapping[str, Any]
    """The fields of `generate.engine.Sampling`."""
    answer_limits: Mapping[str, int]
    """For each task, the most tokens of an answer."""
    batch_rows: int
    max_length: int
    """Longest example in tokens, prompt and answer together, that was trained on."""
    shorten_input: bool
    """Whether the text of a longer input is shortened, as it was in training."""
    data_fingerprint: str
    dtype: str
    reading: Mapping[str, Any] = field(default_factory=dict)
    """How the rows were asked, as `data.reading.describe_sources` says it; empty: as their formats do."""
    versions: Mapping[str, str] = field(default_factory=dict)
    constrain: bool = False
    """Whether answers are held to their task's form while they are written."""
    retrieve: int = 0
    """How many of the nearest train rows stand before each row as answered examples."""
    quantize: str = "none"
    """In how many bits the matrices of the model's layers were held: the recipe's `model.quantize`."""
    version: int = VERSION

    def write(self, path: Path) -> None:
        """Write the contract to `path`, whole or not at all."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Contract:
        """The contract in `path`. Raises ContractError when it is missing, broken or of a newer version."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ContractError(f"There is no contract {path}. Only a finished run has one.") from None
        except (OSError, ValueError) as error:
            raise ContractError(f"The contract {path} cannot be read: {error}. Train the run again.") from None
        if not isinstance(data, dict):
            raise ContractError(f"The contract {path} cannot be read: it is no JSON object. Train the run again.")
        if data.get("version") != VERSION:
            raise ContractError(
                f"{path} is a contract of version {data.get('version')}, but this weitiao reads version {VERSION}. "
                f"Use the weitiao version that wrote it: {data.get('versions', {}).get('weitiao', 'unknown')}."
            )
        known = {part.name for part in fields(cls)}
        if data.keys() | _ADDED != known:
            odd = ", ".join(sorted((data.keys() | _ADDED) ^ known))
            raise ContractError(f"The contract {path} cannot be read: {odd} missing or unknown. Train the run again.")
        return cls(**{**data, "stop_ids": tuple(data["stop_ids"]), "tasks": tuple(data["tasks"])})

    def require_base(self, fingerprint: str, *, path: str) -> None:
        """Raise ContractError unless `fingerprint` is that of the base model the adapter was trained on."""
        if fingerprint != self.base_fingerprint:
            raise ContractError(
                f"{path} is not the base model this run was tuned on ({self.base}): its fingerprint is "
                f"{fingerprint[:12]}, the contract asks for {self.base_fingerprint[:12]}. Point to the original model."
            )

    def require_adapter(self, fingerprint: str, *, folder: Path) -> None:
        """Raise ContractError unless `fingerprint` is that of the adapter the contract was written for."""
        if fingerprint != self.adapter_fingerprint:
            raise ContractError(
                f"The adapter in {folder} is not the one this contract was written for: the fingerprint of its weights "
                f"is {fingerprint[:12]}, the contract has {self.adapter_fingerprint[:12]}. It was damaged or replaced. "
                f"Bring it back from a copy, or make it again with: weitiao train RECIPE.yaml --resume"
            )

    def require_format(self, *, template: str, stop_ids: tuple[int, ...]) -> None:
        """Raise ContractError unless the chat format of the opened model is the one trained with."""
        if template != self.template or stop_ids != self.stop_ids:
            what = "chat template" if template != self.template else "stop tokens"
            raise ContractError(
                f"The {what} of the base model {self.base} changed since this run was tuned, so it would be asked in "
                f"another format than it learnt. Restore the tokenizer files the run was trained with."
            )
