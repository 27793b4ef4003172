"""Which checkpoint a run goes on from: the one that was asked for, or the newest that is whole.

`wanted` is what ``--resume`` was given: ``yes``, the number of a step, or the folder of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import RunError
from ..runs import RunFolder
from .checkpoint import list_checkpoints, step_of
from .manifest import damage_in

LATEST = "yes"
"""``--resume`` alone: the newest checkpoint that is whole."""

_MOST_LISTED = 12


def named_checkpoint(run: RunFolder, wanted: str) -> Path | None:
    """The checkpoint of `run` that `wanted` names; None for `LATEST`.

    Raises:
        RunError: it names none; the sentence lists those there are.
    """
    if wanted == LATEST:
        return None
    there = list_checkpoints(run)
    if wanted.isdecimal():
        found = [path for path in there if step_of(path) == int(wanted)]
        if found:
            return found[0]
        raise RunError(f"{run.path} has no checkpoint of step {int(wanted)}. {_list(there)}")
    folder = Path(wanted)
    if folder.is_dir():
        found = [path for path in there if path.resolve() == folder.resolve()]
        if found:
            return found[0]
        raise RunError(
            f"--resume {wanted}: that folder is no checkpoint of the run {run.path}, which cannot go on from there. "
            f"{_list(there)} To start a new run from another run's adapter, set model.adapter=FOLDER."
        )
    raise RunError(
        f"--resume {wanted}: there is no such folder. Write --resume alone or yes for the newest checkpoint, auto to "
        f"start or go on, the number of a step, or a checkpoint's folder. {_list(there)}"
    )


def _list(checkpoints: list[Path]) -> str:
    if not checkpoints:
        return "It has none yet: --resume alone starts it from the first step."
    steps = [str(step_of(path)) for path in checkpoints]
    more = f" and {len(steps) - _MOST_LISTED} before them" if len(steps) > _MOST_LISTED else ""
    return f"There are those of the steps {', '.join(steps[-_MOST_LISTED:])}{more}, in {checkpoints[0].parent}."


def checkpoint_to_go_on_from(run: RunFolder, wanted: str, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to load, every file of it as it was written; None when there is none yet.

    `say` is told of damaged ones passed over, and of later ones that training will overtake.

    Raises:
        RunError: the one asked for is damaged, or all there are.
    """
    named, there = named_checkpoint(run, wanted), list_checkpoints(run)
    if named is not None:
        if damage := damage_in(named):
            whole = [path for path in there if path != named and not damage_in(path)]
            raise RunError(
                f"The checkpoint {named} is damaged: {damage}. Go on from another with --resume NUMBER. {_list(whole)}"
            )
        _tell_later(named, there, say)
        return named
    damaged: list[str] = []
    for path in reversed(there):
        damage = damage_in(path)
        if not damage:
            if damaged:
                _tell_passed_over(path, there[-1], damaged, say)
            return path
        damaged.append(f"  {path}: {damage}")
    if damaged:
        raise RunError(
            "No checkpoint of this run is whole:\n" + "\n".join(damaged) + "\nBring back one of them from a copy, or "
            "delete them all, and --resume starts from the first step."
        )
    return None


def _tell_passed_over(chosen: Path, newest: Path, damaged: list[str], say: Callable[[str], None]) -> None:
    lost = step_of(newest) - step_of(chosen)
    say("Damaged, so passed over and removed when the next checkpoint is saved:\n" + "\n".join(damaged))
    steps = "1 step is" if lost == 1 else f"{lost} steps are"
    say(f"Going back from step {step_of(newest)} to step {step_of(chosen)}: {steps} lost and taken again.")


def _tell_later(chosen: Path, there: list[Path], say: Callable[[str], None]) -> None:
    later = [str(step_of(path)) for path in there if step_of(path) > step_of(chosen)]
    if later:
        say(
            f"The checkpoints of later steps ({', '.join(later)}) stay until the next one is saved, and are then "
            f"removed; figures of later steps are measured again."
        )
