"""The optimiser of an original, as transformers' Trainer names it → ``train.optimiser``."""

from __future__ import annotations

from collections.abc import Callable

from .ledger import Ledger, Line

_PLAIN = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused")
_CARRIED = {
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw",
    "paged_adamw_32bit": "paged_adamw",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "schedule_free_adamw": "schedule_free_adamw",
}
_PLACE = "train.optimiser"


def carry_optimiser(ledger: Ledger, key: Callable[[str], str]) -> None:
    """``train.optimiser``, from the argument ``optim`` or those that stand for one of its values.

    Call it when ``train.schedule`` is carried: Schedule-Free has one of its own.
    """
    name = ledger.text(key("optim"))
    if ledger.flag(key("use_muon")):
        ledger.carry(key("use_muon"), _PLACE, "muon")
        ledger.leave(key("optim"), "use_muon overrides it")
    elif ledger.flag(key("adafactor")):
        ledger.carry(key("adafactor"), _PLACE, "adafactor")
        ledger.leave(key("optim"), "adafactor overrides it")
    elif name in _CARRIED:
        note = "of bitsandbytes, not torchao" if name == "adamw_torch_8bit" else ""
        ledger.carry(key("optim"), _PLACE, _CARRIED[name], note)
    elif name in _PLAIN:
        ledger.needs_no_key(key("optim"), "the optimiser is AdamW")
    ledger.leave(key("use_muon"), "off")
    optimisers = "adamw, adamw_8bit, paged_adamw, paged_adamw_8bit, adafactor, muon and schedule_free_adamw"
    ledger.leave(key("optim"), f"optimisers are {optimisers}; the recipe has adamw")
    if ledger.lines.get(_PLACE, Line(value="", comment="")).value == "schedule_free_adamw":
        _settle_schedule(ledger)


def _settle_schedule(ledger: Ledger) -> None:
    line = ledger.lines.get("train.schedule")
    if line is not None and line.value != "constant":
        ledger.lines["train.schedule"] = Line(value="constant", comment="Schedule-Free averages the weights instead")
        ledger.note(
            f"The original's learning rate falls too ({line.value}), though Schedule-Free averages the weights "
            f"instead; here it stays constant."
        )
