"""Which weights an original tunes: by LoRA, P-Tuning v2, some layers, all, or a method that weitiao does not have."""

from __future__ import annotations

from typing import Literal, get_args

from .ledger import Ledger, Wishes

Method = Literal["lora", "ptuning_v2", "freeze", "full"]

_COMMENTS = {"full": "every weight learns, as in the original", "freeze": "some layers learn, as in the original"}


def choose_method(ledger: Ledger, wishes: Wishes, original: str) -> Method | None:
    """The method of the recipe: `original` where weitiao has it, else what the user wishes; None when it is asked for.

    A wish for another method than the original's own is obeyed, and noted.
    """
    own = next((method for method in get_args(Method) if method == original), None)
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
            f"The original {told}; the recipe tunes by {wish}, as --method says. What fits the one may not fit the "
            f"other: look at train.learning_rate above all."
        )
    chosen: Method | None = wish or own
    if chosen is not None:
        ledger.imply("method.name", chosen, _COMMENTS.get(chosen, "") if wish is None else "--method")
    return chosen
