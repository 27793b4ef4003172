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
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, get_scheduler

from ..errors import RunError
from ..models.adapters import base_model
from ..recipe import Train
from ..render.base import Example
from ..runs import RunFolder, write_folder
from .batches import ROUND_TOKENS, Batch, make_batches, make_probe, num_steps, step_rows
from .checkpoint import Progress, list_checkpoints, load_checkpoint, rust_os_errors, save_checkpoint
from .model import TrainedModel, can_compile, check_head
from .plan import COMPILE_REPAYS_SECONDS, make_plan
from .progress import TrainingDisplay, draw_curve, format_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """What `on_eval` found on the dev rows."""

    overall: float
    """The figure that chooses the best checkpoint: higher is better."""
    tasks: dict[str, dict[str, float]]
    """For each task its metrics, the chosen one under ``primary`` as well."""


_DEAD_LOSS = 0.1
"""Above this loss a gradient of exactly zero means that the model is broken, not that it has learnt everything."""

OnEval = Callable[[PreTrainedModel], Scoring]


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
    model: PeftModel,
    examples: Sequence[Example],
    weights: Sequence[float],
    dev_examples: Sequence[Example],
    *,
    settings: Train,
    run: RunFolder,
    on_eval: OnEval | None = None,
    console: Console | None = None,
) -> Outcome:
    """Tune the trainable parameters of `model`; on return ``run.adapter`` holds the best adapter.

    Goes on from the run's latest checkpoint where there is one, to bit-identical weights on a CPU.

    Args:
        model: a model with an adapter on it.
        examples: training examples.
        weights: for each example, how often it is seen per epoch.
        dev_examples: examples for the dev loss; may be empty.
        settings: the recipe's `train` part.
        run: where checkpoints, metrics and the adapter go.
        on_eval: scores the model on the dev rows by generation; without it the dev loss chooses the best step.
        console: where progress is shown.
    """
    console = console or Console(stderr=True, markup=False, emoji=False, highlight=False)
    base = base_model(model)
    if settings.gradient_checkpointing:
        base.activation_checkpointing_enable()
    plan = make_plan(base, examples, weights, settings)
    console.print(plan.describe(), soft_wrap=True)
    torch.manual_seed(settings.seed)
    accelerator = Accelerator(cpu=base.device.type == "cpu", mixed_precision=_mixed_precision(base))
    optimiser = _make_optimiser(model, settings)
    scheduler = _make_scheduler(optimiser, settings, plan.steps)
    trained = TrainedModel(base, packing=settings.packing)
    trained, optimiser = accelerator.prepare(trained, optimiser)
    check_head(trained, make_probe(examples).to(accelerator.device))

    progress = Progress(step=0, compiled=_should_compile(settings, plan.seconds))
    if checkpoints := list_checkpoints(run):
        progress = load_checkpoint(checkpoints[-1], trained, optimiser, scheduler)
        console.print(f"Going on from step {progress.step} ({checkpoints[-1]}).", soft_wrap=True)
    run.rewind_metrics(progress.step)
    if progress.compiled:
        console.print("Compiling the layers: the first step takes about a minute.", soft_wrap=True)
        trained.compile_layers()

    trained.train()
    order = step_rows(weights, batch_size=settings.batch_size, seed=settings.seed, first_step=progress.step)
    display = TrainingDisplay(run, total_steps=plan.steps, first_step=progress.step, console=console)
    stopped_early = 0 < settings.patience <= progress.scorings_since_best  # when a stopped run is resumed
    last_step = progress.step if stopped_early else plan.steps
    with display, _interruptible(display) as interrupted:
        for step in range(progress.step + 1, last_step + 1):
            started = time.monotonic()
            epoch, rows = next(order)
            batches = _step_batches([examples[row] for row in rows], settings, accelerator.device)
            loss, grad_norm = _take_step(trained, batches, optimiser, scheduler, accelerator, settings)
            progress = _advance(progress, step, loss, started)
            display.advance(step, sum(batch.num_tokens for batch in batches))

            last = step == plan.steps
            if step % settings.log_every == 0 or last:
                display.log(
                    step=step,
                    epoch=step / plan.steps * settings.epochs,
                    loss=math.fsum(progress.window) / len(progress.window),
                    learning_rate=float(scheduler.get_last_lr()[0]),
                    grad_norm=grad_norm,
                )
                progress = replace(progress, window=())
            ends_epoch = step == num_steps(weights, batch_size=settings.batch_size, seed=settings.seed,
                                           epochs=epoch + 1)  # fmt: skip
            if _is_due(settings.evaluate_every, step, ends_epoch=ends_epoch, last=last):
                progress = _score(trained, dev_examples, on_eval, settings, run, model, progress, display)
            stopped_early = 0 < settings.patience <= progress.scorings_since_best
            if _is_due(settings.save_every, step, ends_epoch=ends_epoch, last=last) or interrupted() or stopped_early:
                save_checkpoint(run, trained, optimiser, scheduler, progress, keep=settings.keep_checkpoints)
            if stopped_early:
                display.say(f"No better score in {settings.patience} scorings: stopping at step {step}.")
                break
            if interrupted() and not last:
                return _outcome(progress, plan.steps, finished=False)
    _keep_best(run, model, progress)
    draw_curve(run.curve, run.read_metrics())
    return _outcome(progress, plan.steps, finished=True)


def _take_step(
    trained: TrainedModel,
    batches: Sequence[Batch],
    optimiser: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    accelerator: Accelerator,
    settings: Train,
) -> tuple[float, float]:
    """One optimiser step over the passes in `batches`; returns the loss per token and the gradient's norm."""
    total = 0.0
    for batch in batches:
        loss = trained(batch)
        accelerator.backward(loss)
        total += loss.item()
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    norm = float(accelerator.clip_grad_norm_(parameters, settings.max_grad_norm))
    # weights so large that a norm layer's variance is infinite give hidden states of zero: no gradient, ever again
    dead = norm == 0 and total > _DEAD_LOSS
    if not math.isfinite(total) or not math.isfinite(norm) or dead:
        raise RunError(
            f"The loss is {total} and the gradient's norm {norm}: training has diverged. Lower train.learning_rate "
            f"(now {settings.learning_rate}) and start again under another name, with name=OTHER."
        )
    optimiser.step()
    scheduler.step()
    optimiser.zero_grad(set_to_none=True)
    return total, norm


def _step_batches(rows: Sequence[Example], settings: Train, device: torch.device) -> list[Batch]:
    limit, round_to = (settings.tokens_per_pass, ROUND_TOKENS) if settings.packing else (1, 1)
    batches = make_batches(rows, tokens_per_pass=limit, row_balance=settings.row_balance, round_to=round_to)
    return [batch.to(device) for batch in batches]


def _advance(progress: Progress, step: int, loss: float, started: float) -> Progress:
    return replace(
        progress,
        step=step,
        window=(*progress.window, loss),
        seconds=progress.seconds + time.monotonic() - started,
    )


def _is_due(rhythm: int | str, step: int, *, ends_epoch: bool, last: bool) -> bool:
    if rhythm == "never":
        return False
    return last or (ends_epoch if rhythm == "epoch" else step % int(rhythm) == 0)


def _score(
    trained: TrainedModel,
    dev_examples: Sequence[Example],
    on_eval: OnEval | None,
    settings: Train,
    run: RunFolder,
    model: PeftModel,
    progress: Progress,
    display: TrainingDisplay,
) -> Progress:
    """Dev loss and task scores; keeps the adapter in ``run.best`` when it is the best so far."""
    if not dev_examples:
        return progress
    started = time.monotonic()
    loss = _dev_loss(trained, dev_examples, settings)
    scoring = Scoring(overall=-loss, tasks={})
    if on_eval is not None:
        with trained.generating() as generator:
            scoring = on_eval(generator)
    better = progress.best_score is None or scoring.overall > progress.best_score
    if better:
        write_folder(run.best, lambda folder: save_adapter(model, folder))
        progress = replace(progress, best_score=scoring.overall, best_step=progress.step, scorings_since_best=0)
    else:
        progress = replace(progress, scorings_since_best=progress.scorings_since_best + 1)
    run.append_metrics({"kind": "dev", "step": progress.step, "loss": loss, "scores": scoring.tasks})
    draw_curve(run.curve, run.read_metrics())
    figures = "  ".join(f"{name} {scores['primary']:.3f}" for name, scores in scoring.tasks.items())
    seconds = time.monotonic() - started
    display.leave_out(seconds)
    mark = "best so far" if better else f"best was step {progress.best_step}"
    display.say(f"dev at step {progress.step}: loss {loss:.4f}  {figures}  ({mark}, {format_seconds(seconds)})")
    return progress


def _dev_loss(trained: TrainedModel, dev_examples: Sequence[Example], settings: Train) -> float:
    """Mean loss per supervised token of the dev rows."""
    device = trained.model.device
    trained.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(dev_examples), settings.batch_size):
            rows = dev_examples[start : start + settings.batch_size]
            supervised = sum(row.num_supervised for row in rows)
            batches = _step_batches(rows, settings.model_copy(update={"row_balance": 0.0}), device)
            total += sum(trained(batch).item() for batch in batches) * supervised
            count += supervised
    trained.train()
    return total / count


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter into `folder` in PEFT's format."""
    with rust_os_errors():
        model.save_pretrained(str(folder), save_embedding_layers=False)


def _keep_best(run: RunFolder, model: PeftModel, progress: Progress) -> None:
    """Put the best adapter (the last one when nothing was scored) into ``run.adapter``."""

    def fill(folder: Path) -> None:
        if progress.best_score is None:
            save_adapter(model, folder)
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


def _should_compile(settings: Train, seconds: float) -> bool:
    return settings.compile == "always" or (
        settings.compile == "auto" and can_compile() and seconds > COMPILE_REPAYS_SECONDS
    )


def _mixed_precision(model: PreTrainedModel) -> str:
    """float16 weights need a loss scale; bfloat16 and float32 need nothing."""
    return "fp16" if model.dtype == torch.float16 and model.device.type == "cuda" else "no"


def _make_optimiser(model: PeftModel, settings: Train) -> torch.optim.Optimizer:
    """AdamW; matrices decay, biases and norms do not."""
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in learnt if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in learnt if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.learning_rate)


def _make_scheduler(
    optimiser: torch.optim.Optimizer, settings: Train, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    warmup = math.ceil(settings.warmup * steps)
    scheduler: torch.optim.lr_scheduler.LRScheduler = get_scheduler(name, optimiser, warmup, steps)
    return scheduler


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
