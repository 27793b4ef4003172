"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint holds the trainable weights, the optimiser, the schedule and the random number generators, the best adapter
so far, and checksums of all that. The data order is a function of seed and step, so the step is enough. What must not
change between sittings (data, recipe, base model) is written down once per run. Tensors are read back with
`weights_only`.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import ResumeError, RunError
from ..runs import RunFolder, write_folder, write_json
from .manifest import MANIFEST, damage_in, link_files, write_checked_folder
from .ranks import ALONE, Ranks
from .sharding import learns_spread
from .spread_states import load_spread, parts_of, without_parts, write_parts

_STATE, _WEIGHTS, _OPTIMISER, _BEST = "state.json", "weights.safetensors", "optimiser.pt", "best"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a run stands after `step` optimiser steps."""

    step: int
    best_score: float | None = None
    best_step: int = 0
    scorings_since_best: int = 0
    last_score: float | None = None
    """The figure of the last scoring."""
    unscored: bool = False
    """Whether the scoring due at this step is still to be done: it was broken off."""
    ended: str = ""
    """Why training ended at this step, where who watched its scores ended it."""
    seconds: float = 0.0
    """Time spent training so far, all sittings together."""
    scoring_seconds: float = 0.0
    """The same for scoring the dev rows."""
    compiled: bool = False
    fitted: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the recipe's `train` part that were changed so that memory suffices, as `halving.with_fitted` takes
    them; the run keeps them."""
    window: tuple[float, ...] = ()
    """Losses of the steps since the last log line."""
    task_window: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """For each task, the sum of its tokens' losses since the last log line, and how many tokens they were."""


def save_checkpoint(
    run: RunFolder,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    progress: Progress,
    *,
    keep: int,
    overtaken: Collection[Path] = (),
    ranks: Ranks = ALONE,
) -> Path:
    """Write ``checkpoints/step-NNNNNN`` whole or not at all; returns it.

    Then the oldest beyond `keep` are removed, and those `overtaken`, which training has gone back behind.

    Called by the first process alone, but by all `ranks` where weights that learn are spread over them: each writes its
    part.
    """
    path, parts = run.checkpoints / f"step-{progress.step:06}", parts_of(model, optimiser)
    if not ranks.is_first:
        write_parts(ranks.by_first(Path), parts)
        return path

    def fill(folder: Path) -> None:
        if parts:
            write_parts(ranks.by_first(lambda: folder), parts)
        else:
            weights = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
            with rust_os_errors():
                save_file(weights, folder / _WEIGHTS)
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            rng["cuda"] = torch.cuda.get_rng_state()
        states = io.BytesIO()  # into a file, torch would hide that the disk is full
        torch.save({"optimiser": without_parts(optimiser), "scheduler": scheduler.state_dict(), "rng": rng}, states)
        (folder / _OPTIMISER).write_bytes(states.getbuffer())
        write_json(folder / _STATE, asdict(progress))
        if progress.best_score is not None:
            (folder / _BEST).mkdir()
            link_files(run.best, folder / _BEST)

    write_checked_folder(path, fill)
    there = list_checkpoints(run)
    kept = [one for one in there if one == path or one not in overtaken][-keep:]
    for old in there:
        if old not in kept:
            _remove(old)
    return path


def _remove(folder: Path) -> None:
    """Remove `folder` so that a crash meanwhile leaves a leftover, not half a checkpoint."""
    gone = folder.with_name(f".tmp-gone-{folder.name}")
    folder.rename(gone)
    shutil.rmtree(gone)


@contextmanager
def rust_os_errors() -> Iterator[None]:
    """Give the operating system's errors back their type: libraries in Rust raise their own, with the number in it."""
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def list_checkpoints(run: RunFolder) -> list[Path]:
    """The run's checkpoints, oldest first, damaged ones too."""
    found = (path for path in run.checkpoints.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step whose state `checkpoint` holds, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def restore_best(run: RunFolder, checkpoint: Path) -> str:
    """Make ``run.best`` what it was when `checkpoint`, of a run that had a best one, was saved.

    Returns what is damaged of it, "" when it is whole.
    """
    saved, there = checkpoint / _BEST, run.best / MANIFEST
    if damage := damage_in(saved):
        return damage
    if not there.is_file() or there.read_bytes() != (saved / MANIFEST).read_bytes() or damage_in(run.best):
        write_folder(run.best, lambda folder: link_files(saved, folder))
    return ""


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> Progress:
    """Put model, optimiser, schedule and random number generators into the state saved in `path`.

    Where several processes train together, all call it, with any number of those that saved it.

    Raises:
        RunError: the checkpoint cannot be read.
    """
    in_parts = learns_spread(model) or not (path / _WEIGHTS).exists()
    try:
        weights = {} if in_parts else load_file(path / _WEIGHTS)
        states = torch.load(path / _OPTIMISER, map_location="cpu", weights_only=True)
    except (OSError, EOFError, SafetensorError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise RunError(
            f"The checkpoint {path} cannot be read ({type(error).__name__}: {str(error).partition(chr(10))[0]}), "
            f"though its files are what was written. Delete it to resume from the one before."
        ) from None
    if in_parts:
        load_spread(path, model, optimiser, states["optimiser"])
    else:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(weights[name])
        optimiser.load_state_dict(states["optimiser"])
    scheduler.load_state_dict(states["scheduler"])
    torch.set_rng_state(states["rng"]["cpu"])
    if "cuda" in states["rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["rng"]["cuda"])
    return read_progress(path)


def read_progress(path: Path) -> Progress:
    """The progress stored in checkpoint `path`."""
    data = json.loads((path / _STATE).read_text(encoding="utf-8"))
    tasks = {task: (float(total), int(count)) for task, (total, count) in data["task_window"].items()}
    return Progress(**{**data, "window": tuple(data["window"]), "task_window": tasks})


def require_same(run: RunFolder, depends_on: Mapping[str, Any]) -> None:
    """Write down what the run depends on; when that was done before, nothing may have changed.

    Raises:
        ResumeError: names everything that changed, old value and new.
    """
    if not run.data.exists():
        write_json(run.data, depends_on)
        return
    saved = json.loads(run.data.read_text(encoding="utf-8"))
    changes = _differences(saved, json.loads(json.dumps(depends_on)))
    if changes:
        listed = "\n".join(f"  {place}: was {old!r:.80}, is {new!r:.80}" for place, old, new in changes)
        raise ResumeError(
            f"The run in {run.path} cannot go on, because what it depends on has changed:\n{listed}\n"
            f"Undo the change, or start a new run with name=OTHER."
        )


def _differences(old: Any, new: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            found
            for key in keys
            for found in _differences(old.get(key), new.get(key), f"{place}.{key}" if place else str(key))
        ]
    return [] if old == new else [(place, old, new)]
