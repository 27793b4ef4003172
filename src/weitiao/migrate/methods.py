"""Which weights an original tunes: LoRA, P-Tuning v2, or a method that weitiao does not have."""

from __future__ import annotations

from typing import Literal

from .ledger import Ledger, Wishes

Method = Literal["lora", "ptuning_v2"]


def choose_method(ledger: Ledger, wishes: Wishes, original: Method | Literal["full", "freeze"] | str) -> Method | None:
    """The method of the recipe: `original` where weitiao has it, else what the user wishes; None when it is asked for.

    A wish for another method than the original's own is obeyed, and noted.
    """
    own: Method | None = "lora" if original == "lora" else "ptuning_v2" if original == "ptuning_v2" else None
    wish = wishes.method
    told = {
        "full": "tunes every weight of the model (full fine-tuning)",
        "freeze": "tunes some layers of the model and freezes the others",
        "both": "tunes by LoRA and P-Tuning v2 at once",
    }.get(original, f"tunes by {original}")
    if own is None and wish is None:
        ledger.ask(
            f"The original {told}. weitiao has no such method yet. The nearest is LoRA on all linear layers: "
            f"--method lora writes a recipe with it."
        )
        return None
    if wish is not None and wish != own:
        ledger.note(
            f"The original {told if own is None else f'tunes by {own}'}; the recipe tunes by {wish}, as --method says. "
            f"What fits the one may not fit the other: look at train.learning_rate above all."
        )
    chosen = wish or own
    if chosen is not None:
        ledger.imply("method.name", chosen, "" if wish is None else "--method")
    return chosen
