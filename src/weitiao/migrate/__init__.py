"""Other programs' training settings → a recipe, every setting carried or named; nothing of theirs is ever run.

    lora.yaml, ptuning_v2.yaml, sft.yaml      ChatGLM3's and GLM-4's finetune_demo      finetune_demo.py
    train.sh, class ProjectConfig             the seeds' ChatGLM-6B trainers            seed_flags.py
    train.sh with main.py                     THUDM's ptuning                           ptuning_main.py
    train.sh with --train_type                liucongg's ChatGLM-Finetuning             glm_finetuning.py
    YAML, JSON, llamafactory-cli, a Board     LLaMA-Factory                             llama_factory.py

A file is told by what it holds (originals.py). Each original writes what becomes of its settings into a ledger
(ledger.py), and the ledger becomes the recipe's text (writing.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import RecipeError
from ..recipe import Recipe, make_recipe
from ..runs import write_text
from . import finetune_demo, glm_finetuning, llama_factory, ptuning_main, seed_flags
from .ledger import Entry, Ledger, Wishes
from .originals import Original, read_original
from .writing import recipe_text, recipe_values, shown

__all__ = ["Entry", "Migration", "Wishes", "migrate_file"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Migration:
    """A recipe made from another program's settings, and what became of each of these."""

    told: str
    """Which program's settings they are."""
    values: Mapping[str, str]
    """By dotted key, what stands in the recipe, for people."""
    recipe: Recipe
    text: str
    path: Path
    carried: tuple[Entry, ...]
    needless: tuple[Entry, ...]
    left: tuple[Entry, ...]
    notes: tuple[str, ...]


def migrate_file(
    file: str | Path,
    *,
    wishes: Wishes | None = None,
    command: int | None = None,
    out: str | Path = "recipe.yaml",
    overwrite: bool = False,
) -> Migration:
    """Write to `out` the recipe that the settings in `file` make.

    Args:
        file: a configuration, a shell script, or a Python class.
        wishes: what the user says beside it: model, rows, method.
        command: which command of a script is meant, counted from 1.
        out: where the recipe goes; its name names the run.
        overwrite: replace a recipe that is there.

    Raises:
        RecipeError: the file is of no known kind, asks for what weitiao cannot do, or leaves out what must be said:
            all of this in one message. Nothing is written then.
    """
    file, path = Path(file), Path(out)
    if path.exists() and not overwrite:
        raise RecipeError(f"{path} exists already. Choose another file with -o, or replace it with --force.")
    original = read_original(file, command=command)
    wishes = wishes or Wishes()
    ledger = Ledger(settings=original.settings, spell=original.spell, folder=file.parent)
    told = _carry(original, ledger, wishes, file)
    ledger.close(told)
    for name, source in original.computed.items():
        ledger.left.append(Entry(setting=f"{name} = {source}", place="", words="computed by Python, which is not run"))
    name = file.stem if path.stem == "recipe" else path.stem
    recipe = make_recipe(recipe_values(ledger, name), where=f"What {file} says")
    text = recipe_text(ledger, name, file=file, told=told)
    write_text(path.resolve(), text)
    return Migration(
        told=told,
        values={place: shown(line.value) for place, line in ledger.lines.items()},
        recipe=recipe,
        text=text,
        path=path,
        carried=tuple(ledger.carried),
        needless=tuple(ledger.needless),
        left=tuple(ledger.left),
        notes=tuple(ledger.notes),
    )


def _carry(original: Original, ledger: Ledger, wishes: Wishes, file: Path) -> str:
    """Write down what becomes of the settings; which program they are of, in words."""
    devices = wishes.devices or original.devices
    if original.kind == "finetune_demo":
        finetune_demo.carry_finetune_demo(ledger, wishes, devices=devices)
        return finetune_demo.TOLD
    if original.kind == "llama_factory":
        llama_factory.carry_llama_factory(ledger, wishes, devices=devices)
        return llama_factory.TOLD
    if original.kind == "ptuning_main":
        ptuning_main.carry_ptuning_main(ledger, wishes, devices=devices)
        return ptuning_main.TOLD
    if original.kind == "glm_finetuning":
        glm_finetuning.carry_glm_finetuning(ledger, wishes, devices=devices)
        return glm_finetuning.TOLD
    is_class = original.kind == "project_config"
    seed_flags.carry_seed_flags(ledger, wishes, devices=devices, config_class=is_class)
    return f"{seed_flags.TOLD} ({original.told})" if original.told else seed_flags.TOLD
