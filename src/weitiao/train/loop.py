"""The training loop. Read `train` from top to bottom: that is all there is.

Knows examples, batches and a model; knows nothing of tasks' meaning or generation: scoring comes in as `on_eval`.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel

from ..data.order import num_steps, step_rows
from ..models.adapters import base_model, save_adapter
from ..recipe import Train
from ..render.base import Example
from ..runs import RunFolder, Sample, write_folder
from .batches import make_probe
from .checkpoint import Progress, list_checkpoints, load_checkpoint, rust_os_errors, save_checkpoint
from .memory import peak_bytes
from .model import TrainedModel, check_head
from .plan import make_plan, will_compile
from .progress import Follower, TrainingDisplay, draw_curve, format_seconds
from .step import set_up, step_batches, take_step
from .task_losses import TaskSums, add_sums, mean_by_task, sum_by_task


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a training ended."""

    finished: bool
    """False after Ctrl-C: continue with --resume."""
    step: int
    steps: int
    best_step: int
    best_score: float | None
    seconds: float


def train(
    model: PreTrainedModel | PeftModel,
    examples: Sequence[Example],
    weights: Sequence[float],
    dev_examples: Sequence[Example],
    *,
    settings: Train,
    run: RunFolder,
    tasks: Sequence[str] = (),
    dev_tasks: Sequence[str] = (),
    on_eval: OnEval | None = None,
    on_score: OnScore | None = None,
    scoring_bytes: int = 0,
    followers: Sequence[Follower] = (),
    console: Console | None = None,
) -> Outcome:
    """Tune the trainable parameters of `model`; on return ``run.adapter`` holds the best adapter.

    Goes on from the run's latest checkpoint where there is one, to bit-identical weights on a CPU.

    Args:
        model: a model with an adapter of any kind on it.
        examples: training examples.
        weights: for each example, how often it is seen per epoch.
        dev_examples: examples for the dev loss; may be empty.
        settings: the recipe's `train` part.
        run: where checkpoints, metrics and the adapter go.
        tasks: for each example, the name its loss is told under; none: the loss of all is told alone.
        dev_tasks: the same for `dev_examples`.
        on_eval: scores the model on the dev rows by generation; without it the dev loss chooses the best step.
        on_score: told of each scoring; may end the training there.
        scoring_bytes: memory that `on_eval` takes beside the model; for the plan that is shown first.
        followers: are told of every step, line of metrics, sample and curve.
        console: where progress is shown.
    """
    console = console or Console(stderr=True, markup=False, emoji=False, highlight=False)
    base = base_model(model)
    plan = make_plan(base, examples, weights, settings, scoring_bytes=scoring_bytes)
    console.print(plan.describe(), soft_wrap=True)
    setup = set_up(model, settings, steps=plan.steps)
    trained, optimiser, scheduler = setup.trained, setup.optimiser, setup.scheduler
    device = setup.accelerator.device
    check_head(trained, make_probe(examples, row_prefix=trained.row_prefix).to(device))

    progress = Progress(step=0, compiled=will_compile(settings, plan.seconds))
    if checkpoints := list_checkpoints(run):
        progress = load_checkpoint(checkpoints[-1], trained, optimiser, scheduler)
        console.print(f"Going on from step {progress.step} ({checkpoints[-1]}).", soft_wrap=True)
    run.rewind_metrics(progress.step)
    if progress.compiled:
        console.print("Compiling the layers: the first step takes about a minute.", soft_wrap=True)
        trained.compile_layers()

    trained.train()
    epoch_ends = {
        num_steps(weights, batch_size=settings.batch_size, seed=settings.seed, epochs=number)
        for number in range(1, math.ceil(settings.epochs) + 1)
    }
    order = step_rows(weights, batch_size=settings.batch_size, seed=settings.seed, first_step=progress.step)
    display = TrainingDisplay(
        run, total_steps=plan.steps, first_step=progress.step, console=console, followers=followers
    )
    stopped_early = _is_to_stop(settings, progress)  # when a stopped run is resumed
    last_step = progress.step if stopped_early else plan.steps
    with display, _interruptible(display) as interrupted:
        for step in range(progress.step + 1, last_step + 1):
            started = time.monotonic()
            _, rows = next(order)
            row_tasks = [tasks[row] for row in rows] if tasks else [""] * len(rows)
            step_examples = [examples[row] for row in rows]
            batches = step_batches(step_examples, row_tasks, settings, device, row_prefix=trained.row_prefix)
            loss, grad_norm, token_losses = take_step(setup, batches, settings)
            if not math.isfinite(grad_norm):
                display.say(
                    f"Step {step}: the gradient overflowed float16. Nothing was learnt; the loss scale is halved."
                )
            progress = _advance(progress, step, loss, sum_by_task(batches, token_losses, row_tasks), started)
            display.advance(step, sum(batch.num_tokens for batch in batches))

            last = step == plan.steps
            if step % settings.log_every == 0 or last:
                display.log(
                    step=step,
                    epoch=step / plan.steps * settings.epochs,
                    loss=math.fsum(progress.window) / len(progress.window),
                    task_losses=mean_by_task(progress.task_window),
                    learning_rate=float(scheduler.get_last_lr()[0]),
                    grad_norm=grad_norm,
                    seconds=progress.seconds + progress.scoring_seconds,
                    memory_bytes=peak_bytes(device),
                    price_per_hour=settings.price_per_hour,
                )
                progress = replace(progress, window=(), task_window={})
            ends_epoch = step in epoch_ends
            if _is_due(settings.evaluate_every, step, ends_epoch=ends_epoch, last=last):
                progress = _score(trained, dev_examples, dev_tasks, on_eval, settings, run, model, progress, display)
                if on_score is not None and progress.last_score is not None:
                    progress = replace(progress, ended=on_score(step, plan.steps, progress.last_score))
            stopped_early = _is_to_stop(settings, progress)
            if _is_due(settings.save_every, step, ends_epoch=ends_epoch, last=last) or interrupted() or stopped_early:
                save_checkpoint(run, trained, optimiser, scheduler, progress, keep=settings.keep_checkpoints)
            if stopped_early:
                why = progress.ended or f"No better score in {settings.patience} scorings: stopping at step {step}."
                display.say(why)
                break
            if interrupted() and not last:
                return _outcome(progress, plan.steps, finished=False)
    _keep_best(run, model, progress)
    draw_curve(run.curve, run.read_metrics())
    display.drew(progress.step)
    return _outcome(progress, plan.steps, finished=True)


def _advance(progress: Progress, step: int, loss: float, task_sums: TaskSums, started: float) -> Progress:
    return replace(
        progress,
        step=step,
        window=(*progress.window, loss),
        task_window=add_sums(progress.task_window, task_sums),
        seconds=progress.seconds + time.monotonic() - started,
    )


def _is_to_stop(settings: Train, progress: Progress) -> bool:
    """Whether training ends here before its last step."""
    return bool(progress.ended) or 0 < settings.patience <= progress.scorings_since_best


def _is_due(rhythm: int | str, step: int, *, ends_epoch: bool, last: bool) -> bool:
    if rhythm == "never":
        return False
    return last or (ends_epoch if rhythm == "epoch" else step % int(rhythm) == 0)


def _score(
    trained: TrainedModel,
    dev_examples: Sequence[Example],
    dev_tasks: Sequence[str],
    on_eval: OnEval | None,
    settings: Train,
    run: RunFolder,
    model: PreTrainedModel | PeftModel,
    progress: Progress,
    display: TrainingDisplay,
) -> Progress:
    """Dev loss and task scores; keeps the adapter in ``run.best`` when it is the best so far."""
    if not dev_examples:
        return progress
    started = time.monotonic()
    loss, task_losses = dev_loss(trained, dev_examples, dev_tasks, settings)
    scoring = Scoring(overall=-loss, tasks={})
    if on_eval is not None:
        with trained.generating() as generator:
            scoring = on_eval(generator)
    progress = replace(progress, last_score=scoring.overall)
    better = progress.best_score is None or scoring.overall > progress.best_score
    if better:
        write_folder(run.best, lambda folder: _save(model, folder))
        progress = replace(progress, best_score=scoring.overall, best_step=progress.step, scorings_since_best=0)
    else:
        progress = replace(progress, scorings_since_best=progress.scorings_since_best + 1)
    dev_figures = {"loss": loss, "task_losses": task_losses, "overall": scoring.overall, "scores": scoring.tasks}
    display.record({"kind": "dev", "step": progress.step, **dev_figures})
    if scoring.samples:
        display.show_samples(progress.step, scoring.samples)
    draw_curve(run.curve, run.read_metrics())
    display.drew(progress.step)
    figures = "  ".join(f"{name} {scores['primary']:.3f}" for name, scores in scoring.tasks.items())
    seconds = time.monotonic() - started
    display.leave_out(seconds)
    progress = replace(progress, scoring_seconds=progress.scoring_seconds + seconds)
    mark = "best so far" if better else f"best was step {progress.best_step}"
    display.say(f"dev at step {progress.step}: loss {loss:.4f}  {figures}  ({mark}, {format_seconds(seconds)})")
    return progress


def dev_loss(
    trained: TrainedModel, dev_examples: Sequence[Example], dev_tasks: Sequence[str], settings: Train
) -> tuple[float, dict[str, float]]:
    """Mean loss per learnt token of the dev rows, of all and by task."""
    device = trained.model.device
    even = settings.model_copy(update={"row_balance": 0.0, "task_weights": {}})
    trained.eval()
    sums: TaskSums = {}
    with torch.no_grad():
        for start in range(0, len(dev_examples), settings.batch_size):
            rows = dev_examples[start : start + settings.batch_size]
            row_tasks = dev_tasks[start : start + settings.batch_size] or [""] * len(rows)
            batches = step_batches(rows, row_tasks, even, device, row_prefix=trained.row_prefix)
            token_losses = [torch.empty(len(batch.targets), device=device) for batch in batches]
            for batch, losses in zip(batches, token_losses, strict=True):
                trained(batch, losses)
            sums = add_sums(sums, sum_by_task(batches, token_losses, row_tasks))
    trained.train()
    total, count = (math.fsum(part) for part in zip(*sums.values(), strict=True))
    return total / count, mean_by_task(sums)


def _save(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    with rust_os_errors():
        save_adapter(model, folder)


def _keep_best(run: RunFolder, model: PreTrainedModel | PeftModel, progress: Progress) -> None:
    """Put the best adapter (the last one when nothing was scored) into ``run.adapter``."""

    def fill(folder: Path) -> None:
        if progress.best_score is None:
            _save(model, folder)
            return
        for file in run.best.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())

    write_folder(run.adapter, fill)


def _outcome(progress: Progress, steps: int, *, finished: bool) -> Outcome:
    return Outcome(
        finished=finished,
        step=progress.step,
        steps=steps,
        best_step=progress.best_step or progress.step,
        best_score=progress.best_score,
        seconds=progress.seconds,
    )


@contextmanager
def _interruptible(display: TrainingDisplay) -> Iterator[Callable[[], bool]]:
    """Ctrl-C once: finish the step, save, leave. Ctrl-C twice: leave at once; the last checkpoint stands."""
    pressed = 0

    def handle(_signal: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        pressed += 1
        if pressed > 1:
            raise KeyboardInterrupt
        display.say("Ctrl-C: saving after this step. Press it again to leave at once.")

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: pressed > 0
    finally:
        signal.signal(signal.SIGINT, previous)
