"""The training loop. Read `train` from top to bottom: that is all there is.

Knows examples, batches and a model; knows nothing of tasks' meaning or generation: scoring comes in as `on_eval`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from peft import PeftModel
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from ..data.order import num_steps, step_rows
from ..errors import DivergedError, RunError, WeitiaoError
from ..models.adapters import base_model
from ..models.out_of_memory import ran_out_of_memory
from ..models.sources import first_line
from ..recipe import Train
from ..render.base import Example
from ..render.example_store import lengths_of
from ..runs import RunFolder, write_folder
from ..stopping import Stopped, StopSignals
from .activations import checkpoint_layers
from .batches import Batch, make_probe
from .checkpoint import (
    Progress,
    list_checkpoints,
    load_checkpoint,
    restore_best,
    save_checkpoint,
    step_of,
)
from .fitting import fit_to_memory
from .halving import Halving, fitted_of, with_fitted
from .manifest import MANIFEST, damage_in
from .memory import peak_bytes
from .model import check_head
from .optimisers import weights_in_use
from .plan import make_plan, will_compile
from .progress import Follower, TrainingDisplay
from .ranks import ALONE, Ranks
from .resuming import LATEST, checkpoint_to_go_on_from
from .scoring import OnEval, OnScore, draw, save_best, score_dev_rows
from .sharding import check_order, is_spread, learns_spread, whole_weights
from .shared_prompts import PromptSharing, groups_of
from .step import Setup, StepResult, seed_dropout, set_up, step_batches, sum_losses, take_step
from .switches import notes_on_switches
from .task_losses import TaskSums, add_sums, mean_by_task, sum_by_row, sum_by_task
from .trouble import NameRow, SpikeWatch, describe_spike, explain_divergence, worst_rows
from .watchdog import Watchdog


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a training ended."""

    finished: bool
    """False when a signal ended it: continue with --resume."""
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
    resume_from: str = LATEST,
    name_row: NameRow | None = None,
    stops: StopSignals | None = None,
    ranks: Ranks = ALONE,
    console: Console | None = None,
) -> Outcome:
    """Tune the trainable parameters of `model`; on return ``run.adapter`` holds the best adapter.

    Goes on from a checkpoint where there is one, to bit-identical weights on a CPU.

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
        resume_from: the checkpoint to go on from, as ``--resume`` names it; by default the newest that is whole.
        name_row: tells where an example came from, for rows that must be named; by default its number.
        stops: the signals that ask for the end, where the caller catches them already.
        ranks: the processes that train together, each with the same arguments; only the first writes into `run`.
        console: where progress is shown.

    Raises:
        DivergedError: the loss is no finite number any more; the checkpoints stand.
        RunError: no checkpoint can be read, or something cannot be written.
        Stopped: a signal came, and another one before what the first one asked for was done.
        LostProcessError: another one of `ranks` has ended.
    """
    console = console or Console(stderr=True, markup=False, emoji=False, highlight=False)
    base = base_model(model)
    plan = make_plan(base, examples, weights, settings, scoring_bytes=scoring_bytes, processes=ranks.size)
    console.print(plan.describe(), soft_wrap=True)
    setup = set_up(model, settings, steps=plan.steps, ranks=ranks)
    trained, optimiser, scheduler = setup.trained, setup.optimiser, setup.scheduler
    device = setup.accelerator.device
    for note in notes_on_switches(settings, lengths_of(examples).tolist(), device):
        console.print(f"note: {note}", soft_wrap=True)
    probe = make_probe(examples, row_prefix=trained.row_prefix).to(device)
    check_head(trained, probe)
    if is_spread(trained):
        check_order(trained, base, probe)

    whole_step = not is_spread(trained) and setup.divided is None
    compiles = whole_step and ranks.by_first(lambda: will_compile(settings, plan.seconds))
    progress = Progress(step=0, compiled=compiles)
    say = partial(console.print, soft_wrap=True)
    if checkpoint := ranks.by_first(lambda: checkpoint_to_go_on_from(run, resume_from, say)):
        progress = _load(run, checkpoint, setup, say)
        seed_dropout(settings, ranks, step=progress.step, resumed=True)
    elif run.metrics.exists():
        say("No checkpoint was saved yet: starting from the first step.")
    fitted = with_fitted(settings, progress.fitted)
    if checkpoint:
        checkpoint_layers(base, fitted)
    else:
        fitted = fit_to_memory(setup, examples, weights, settings, plan, say=say, extra=scoring_bytes)
    overtaken = [path for path in list_checkpoints(run) if step_of(path) > progress.step]
    if ranks.is_first:
        run.rewind_metrics(progress.step, scored=not progress.unscored)
    if progress.compiled:
        console.print("Compiling the layers: the first step takes about a minute.", soft_wrap=True)
        trained.compile_layers()

    trained.train()
    epoch_ends = {
        num_steps(weights, batch_size=settings.batch_size, seed=settings.seed, epochs=number)
        for number in range(1, math.ceil(settings.epochs) + 1)
    }
    drawn = {"batch_size": settings.batch_size, "seed": settings.seed, "first_step": progress.step}
    order = step_rows(weights, **drawn, groups=groups_of(examples, settings))
    display = TrainingDisplay(
        run if ranks.is_first else None,
        total_steps=plan.steps,
        first_step=progress.step,
        console=console,
        followers=followers,
    )
    name_row, spikes, saved_at = name_row or _number, SpikeWatch(), time.monotonic()
    stops = stops or StopSignals(display.say)
    obstacle = "with gradients divided among processes, all of them would have to share alike" if setup.divided else ""
    sharing = PromptSharing(trained, settings, display.say, obstacle=obstacle)
    halving = Halving(fitted, device, say=display.say, ranks=ranks)

    def take(rows: Sequence[Example], row_tasks: Sequence[str], settings: Train) -> tuple[list[Batch], StepResult]:
        """The passes of a step over `rows`, and what came of them."""
        make_passes = partial(
            step_batches, rows, row_tasks, settings, device, row_prefix=trained.row_prefix, ranks=ranks
        )
        why = ""
        try:
            batches = sharing.lay_out(rows, make_passes)
        except (MemoryError, RuntimeError) as error:  # in the proof that sharing changes nothing
            if not ran_out_of_memory(error):
                raise
            batches, why = make_passes(share=False), first_line(error)
        if why:
            sum_losses(setup, 0.0, batches, why)  # raises, here and in the other processes
        return batches, take_step(setup, batches, settings)

    def settle(progress: Progress) -> Progress:
        """With the scoring done that is due; still due when a signal breaks it off."""
        if progress.unscored:
            dog.enter("scoring the dev rows", step=progress.step)
            with weights_in_use(optimiser, settings):
                progress = score_dev_rows(
                    setup, dev_examples, dev_tasks, on_eval, halving.settings, run, model, progress, display, stops
                )
            score = progress.last_score
            if on_score is not None and score is not None and not progress.unscored:
                why = ranks.by_first(lambda: on_score(progress.step, plan.steps, score))
                progress = replace(progress, ended=why)
        return progress

    def save() -> None:
        dog.enter("saving", step=progress.step)
        if setup.divided is not None:
            setup.divided.gather(keep=ranks.is_first)
        if ranks.is_first or learns_spread(trained):
            write = partial(save_checkpoint, keep=settings.keep_checkpoints, overtaken=overtaken, ranks=ranks)
            write(run, trained, optimiser, scheduler, progress)
        overtaken.clear()

    with display, Watchdog(display.say) as dog, stops, stops.deferring():
        first_step = progress.step + 1
        if progress.unscored:  # a signal broke this scoring off
            progress = settle(progress)
            if ranks.agree_to_stop(stops.asked):
                return _outcome(progress, plan.steps, finished=False)
            save()
        stopped_early = _is_to_stop(settings, progress)  # when a stopped run is resumed
        for step in range(first_step, first_step if stopped_early else plan.steps + 1):
            started = time.monotonic()
            dog.enter("reading rows", step=step)
            _, rows = next(order)
            row_tasks = [tasks[row] for row in rows] if tasks else [""] * len(rows)
            step_examples = [examples[row] for row in rows]
            compiling = progress.compiled and step == first_step
            dog.enter("compiling and training" if compiling else "training", step=step)
            try:
                # nothing is lost by leaving before the first step is done, and compiling takes a minute
                with stops.breaking_off() if compiling else nullcontext():
                    batches, taken = halving.take(step, partial(take, step_examples, row_tasks))
                loss, grad_norm, token_losses = taken
            except DivergedError as error:
                at_fault, why = explain_divergence(trained, examples, rows, settings, name_row)
                what = "the loss of the step is not finite." if at_fault else str(error)
                raise DivergedError(f"Step {step}: {what}\n{why}\n{_what_stands(run, progress)}") from None
            except Exception as error:
                if not stops.asked or isinstance(error, WeitiaoError):
                    raise
                # the signal has reached a compiler's process too; what was learnt since the checkpoint is lost
                display.say(f"Step {step} was broken off by the signal ({type(error).__name__}); nothing is saved.")
                raise Stopped(stops.asked) from error
            row_sums = sum_by_row(batches, token_losses, len(rows), ranks)
            if (median := spikes.jumped_from(loss)) is not None:
                worst = worst_rows(row_sums, rows)
                display.say(describe_spike(step, loss, median, worst, name_row))
            if not math.isfinite(grad_norm):
                display.say(
                    f"Step {step}: the gradient overflowed float16. Nothing was learnt; the loss scale is halved."
                )
            progress = _advance(progress, step, loss, sum_by_task(row_sums, row_tasks), started)
            progress = replace(progress, fitted=fitted_of(settings, halving.settings))
            display.advance(step, sum(len(example) for example in step_examples))

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
            scoring_due = _is_due(settings.evaluate_every, step, ends_epoch=ends_epoch, last=last)
            progress = settle(replace(progress, unscored=scoring_due and bool(dev_examples)))
            stopped_early, asked = _is_to_stop(settings, progress), ranks.agree_to_stop(stops.asked)
            save_due = _is_due(settings.save_every, step, ends_epoch=ends_epoch, last=last)
            if save_due or asked or stopped_early or _is_old(saved_at, settings.save_minutes):
                save()
                saved_at = time.monotonic()
            if stopped_early:
                why = progress.ended or f"No better score in {settings.patience} scorings: stopping at step {step}."
                display.say(why)
                break
            if asked and (progress.unscored or not last):
                return _outcome(progress, plan.steps, finished=False)
    whole = None if progress.best_score is not None else whole_weights(base, ranks)
    if ranks.is_first:
        with weights_in_use(optimiser, settings):
            _keep_best(run, model, progress, whole)
        draw(run, display, progress)
    return _outcome(progress, plan.steps, finished=True)


def _load(run: RunFolder, checkpoint: Path, setup: Setup, say: Callable[[str], None]) -> Progress:
    """Everything as it was when `checkpoint` was saved, ``run.best`` included; says so."""
    progress = load_checkpoint(checkpoint, setup.trained, setup.optimiser, setup.scheduler)
    has_best = progress.best_score is not None
    if has_best and (damage := setup.ranks.by_first(lambda: restore_best(run, checkpoint))):
        say(
            f"The best adapter so far, of step {progress.best_step}, is damaged ({damage} in {checkpoint}/best). The "
            f"best of the scorings from here on is kept."
        )
        progress = replace(progress, best_score=None, best_step=0, scorings_since_best=0)
    say(f"Going on from step {progress.step} ({checkpoint}).")
    return progress


def _what_stands(run: RunFolder, progress: Progress) -> str:
    """What a diverged run leaves."""
    steps = [step_of(path) for path in list_checkpoints(run)]
    saved = f"The checkpoint of step {steps[-1]} stands." if steps else "No checkpoint was saved yet."
    if progress.best_score is None:
        return saved
    return (
        f"{saved} So does the best adapter so far, of step {progress.best_step}: a new run starts from it with "
        f"model.adapter={run.best}."
    )


def _number(row: int) -> str:
    return f"example {row + 1}"


def _is_old(moment: float, minutes: float | None) -> bool:
    return minutes is not None and time.monotonic() - moment >= 60 * minutes


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


def _keep_best(
    run: RunFolder, model: PreTrainedModel | PeftModel, progress: Progress, whole: Mapping[str, Tensor] | None
) -> None:
    """Put the best adapter (the last one when nothing was scored) into ``run.adapter``; `whole` as in `save_best`.

    Raises:
        RunError: the best one is not what was written.
    """
    if progress.best_score is not None and (damage := damage_in(run.best)):
        raise RunError(
            f"The best adapter, of step {progress.best_step}, is damaged ({damage} in {run.best}), so the run cannot "
            f"be finished with it. --resume NUMBER goes back to an earlier step and makes a new one."
        )

    def fill(folder: Path) -> None:
        if progress.best_score is None:
            save_best(model, folder, whole)
            return
        for file in run.best.iterdir():
            if file.name != MANIFEST:
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
