"""Scoring the dev rows while a model learns: their loss, the tasks' own figures, and the best adapter so far."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..models.adapters import base_model, save_adapter
from ..models.own_weights import save_weights
from ..recipe import Train
from ..render.base import Example
from ..runs import RunFolder, Sample
from ..stopping import Stopped, StopSignals
from .checkpoint import Progress, rust_os_errors
from .manifest import write_checked_folder
from .model import TrainedModel
from .progress import TrainingDisplay, draw_curve, format_seconds
from .ranks import ALONE, Ranks
from .sharding import whole_weights
from .step import Setup, step_batches
from .task_losses import TaskSums, add_sums, mean_by_task, sum_by_row, sum_by_task


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """What `on_eval` found on the dev rows."""

    overall: float
    """The figure that chooses the best checkpoint: higher is better."""
    tasks: dict[str, dict[str, float]]
    """For each task its metrics, the chosen one under ``primary`` as well."""
    samples: tuple[Sample, ...] = ()
    """Some of the rows with what the model answered, to look at."""


OnEval = Callable[[PreTrainedModel], Scoring]
OnScore = Callable[[int, int, float], str]
"""Told of each scoring: its step, the steps of the whole training, the figure that chooses the best checkpoint. Gives
back why training is to end there, a sentence, or "" for it to go on."""


def score_dev_rows(
    setup: Setup,
    dev_examples: Sequence[Example],
    dev_tasks: Sequence[str],
    on_eval: OnEval | None,
    settings: Train,
    run: RunFolder,
    model: PreTrainedModel | PeftModel,
    progress: Progress,
    display: TrainingDisplay,
    stops: StopSignals,
) -> Progress:
    """Dev loss and task scores; keeps the adapter in ``run.best`` when it is the best so far.

    A signal breaks it off: `progress` is returned as it was, and the scoring is still to be done. Not where several
    processes score together: they would break off at different places, and wait for each other.
    """
    started, trained, ranks = time.monotonic(), setup.trained, setup.ranks
    try:
        with stops.breaking_off() if ranks.size == 1 else nullcontext():
            loss, task_losses = dev_loss(trained, dev_examples, dev_tasks, settings, ranks)
            scoring = Scoring(overall=-loss, tasks={})
            if on_eval is not None:
                with trained.generating() as generator:
                    scoring = on_eval(generator)
    except Stopped as stopped:
        display.say(f"{stopped.signal_name}: the scoring of step {progress.step} is left for when the run goes on.")
        return progress
    progress = replace(progress, last_score=scoring.overall, unscored=False)
    better = progress.best_score is None or scoring.overall > progress.best_score
    if better:
        whole = whole_weights(base_model(model), ranks)
        if ranks.is_first:
            write_checked_folder(run.best, lambda folder: save_best(model, folder, whole))
        progress = replace(progress, best_score=scoring.overall, best_step=progress.step, scorings_since_best=0)
    else:
        progress = replace(progress, scorings_since_best=progress.scorings_since_best + 1)
    dev_figures = {"loss": loss, "task_losses": task_losses, "overall": scoring.overall, "scores": scoring.tasks}
    display.record({"kind": "dev", "step": progress.step, **dev_figures})
    if scoring.samples:
        display.show_samples(progress.step, scoring.samples)
    if ranks.is_first:
        draw(run, display, progress)
    figures = "  ".join(f"{name} {scores['primary']:.3f}" for name, scores in scoring.tasks.items())
    seconds = time.monotonic() - started
    display.leave_out(seconds)
    progress = replace(progress, scoring_seconds=progress.scoring_seconds + seconds)
    mark = "best so far" if better else f"best was step {progress.best_step}"
    display.say(f"dev at step {progress.step}: loss {loss:.4f}  {figures}  ({mark}, {format_seconds(seconds)})")
    return progress


def dev_loss(
    trained: TrainedModel,
    dev_examples: Sequence[Example],
    dev_tasks: Sequence[str],
    settings: Train,
    ranks: Ranks = ALONE,
) -> tuple[float, dict[str, float]]:
    """Mean loss per learnt token of the dev rows, of all and by task; each of `ranks` computes a share of them."""
    device = trained.model.device
    even = settings.model_copy(update={"row_balance": 0.0, "task_weights": {}})
    trained.eval()
    sums: TaskSums = {}
    with torch.no_grad():
        for start in range(0, len(dev_examples), settings.batch_size):
            rows = dev_examples[start : start + settings.batch_size]
            row_tasks = dev_tasks[start : start + settings.batch_size] or [""] * len(rows)
            batches = step_batches(rows, row_tasks, even, device, row_prefix=trained.row_prefix, ranks=ranks)
            token_losses = [torch.empty(len(batch.targets), device=device) for batch in batches]
            for batch, losses in zip(batches, token_losses, strict=True):
                trained(batch, losses)
            row_sums = sum_by_row(batches, token_losses, len(rows), ranks)
            sums = add_sums(sums, sum_by_task(row_sums, row_tasks))
    trained.train()
    total, count = (math.fsum(part) for part in zip(*sums.values(), strict=True))
    return total / count, mean_by_task(sums)


def save_best(model: PreTrainedModel | PeftModel, folder: Path, whole: Mapping[str, Tensor] | None = None) -> None:
    """Write the adapter on `model` into `folder`; `whole` are weights that learn, where they are spread in `model`."""
    with rust_os_errors():
        if whole is None:
            save_adapter(model, folder)
        else:
            save_weights(base_model(model), folder, whole)


def draw(run: RunFolder, display: TrainingDisplay, progress: Progress) -> None:
    """Draw the curve of what was recorded so far."""
    draw_curve(run.curve, run.read_metrics())
    display.drew(progress.step)
