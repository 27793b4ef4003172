"""What originals say of several processes: DeepSpeed's and FSDP's configurations, which the recipe has one key for."""

from __future__ import annotations

import re

from .ledger import OFF, Ledger

STARTED_BY_A_LAUNCHER = "torchrun starts the processes, and train.shard is all that the recipe says of them"

_SPREAD = "the weights are spread over the processes that torchrun starts, as ZeRO-3 does; the file itself is not read"
_WHOLE = (
    "with ZeRO-1 and ZeRO-2 each process holds the whole model, as it does under torchrun with train.shard none; fsdp "
    "spreads it"
)
_DIVIDED = (
    "what learns is divided among the processes that torchrun starts; what the recipe decides must be auto in the "
    "file, and training says where it is not"
)
_STAGE = re.compile(r"(?:zero|stage|z)[_-]?([0-3])", re.IGNORECASE)
"""As files are called: ``ds_zero_3.json``, ``ds_z2_config.json``, ``ds_zero2_no_offload.json``."""


def carry_sharding(ledger: Ledger, keys: tuple[str, ...], *, with_numbers: bool = False) -> None:
    """``train.shard`` or ``train.deepspeed`` from those of `keys` that name a DeepSpeed or an FSDP configuration.

    `with_numbers`: the original's own files say what the recipe decides, so that they cannot be taken.
    """
    for key in keys:
        value = ledger.settings.get(key)
        if value in OFF:
            continue
        stage = _STAGE.search(str(value))
        if stage is not None and stage[1] != "3":
            if stage[1] == "0" or with_numbers or not isinstance(value, str):
                ledger.leave(key, _WHOLE)
            else:
                ledger.carry(key, "train.deepspeed", value, _DIVIDED)
        elif value is True:  # DeepSpeed is on, and another setting says how
            ledger.needs_no_key(key, STARTED_BY_A_LAUNCHER)
        elif "train.shard" in ledger.lines:
            ledger.carry_into(key, "train.shard", _SPREAD)
        else:
            ledger.carry(key, "train.shard", "fsdp", _SPREAD)
