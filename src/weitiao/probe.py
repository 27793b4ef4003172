"""Recipe in, forecast out: the model is loaded, three real steps are taken, a few answers generated, nothing is kept.

`weitiao check recipe.yaml --plan`. Rows, model, steps and answers are made by the code that training makes them with;
the adapter that learns from the three steps is thrown away, and nothing is written anywhere.
"""

from __future__ import annotations

import heapq
import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from .check.checkup import Checkup
from .check.examine import Subject
from .check.plan import Choice, Forecast, Memory, Plan, Times, Workload, memory_finding
from .data.findings import by_grade
from .data.order import step_rows
from .dev_scoring import scoring_bytes
from .errors import RecipeError
from .generate.chat import reply_all
from .generate.engine import Sampling
from .models.adapters import base_model
from .models.opening import default_device, loaded_bytes
from .models.out_of_memory import ran_out_of_memory
from .preparation import Prepared, prepare
from .recipe import Freeze, Full, Recipe, Train
from .render.example_store import lengths_of
from .train.batches import ROUND_TOKENS, make_probe
from .train.fitting import Fit, largest_pass, set_checkpointing, try_settings
from .train.footprint import measure_footprint
from .train.memory import limit_bytes, peak_bytes
from .train.memory_needs import later_bytes, state_bytes
from .train.model import check_head
from .train.plan import COMPILE_SECONDS, COMPILED_SPEEDUP, make_plan, may_compile, will_compile
from .train.scoring import dev_loss
from .train.shared_prompts import groups_of, may_share
from .train.step import Setup, pass_sizes, set_up, step_batches, take_step

_NEW_TOKENS = 5
"""Tokens that the probe generates in each row but one: four steps are timed."""

_LEAST_LARGER, _LEAST_GAIN = 1.5, 0.95
"""Larger passes are tried where they can be so many times as large, and told where they take at most so much time."""

_LEAST_SAVED = 0.05
"""What saves a smaller share of the memory is not proposed."""


def add_forecast(subject: Subject, checkup: Checkup, *, room: int | None = None) -> Checkup:
    """`checkup` with what a probe of its recipe foretells; too little memory is a finding like any other.

    `room` is the memory of the machine that the training is planned for, in bytes; by default what is to be had here.
    A checkup with errors comes back as it is: its rows cannot be trained on.

    Raises:
        RecipeError: files of rows were checked instead of a recipe.
        DataError, ModelError, RunError: the recipe cannot be trained.
    """
    recipe = subject.recipe
    if not subject.is_recipe:
        raise RecipeError("A plan needs a recipe, which says what is trained and how: weitiao check recipe.yaml --plan")
    if not checkup.ok:
        return checkup
    unknown = Plan(price_per_hour=recipe.train.price_per_hour, currency=recipe.train.currency)
    plan = foretell(recipe, checkup.plan or unknown, room=room)
    found = memory_finding(plan, recipe.train)
    return replace(checkup, plan=plan, findings=tuple(by_grade([*checkup.findings, *([found] if found else [])])))


def foretell(recipe: Recipe, plan: Plan, *, room: int | None = None) -> Plan:
    """`plan` with what a probe foretells: memory at the peak, times, and so the cost.

    Where there is no room for a step, or even for the model, only the memory is foretold, by an estimate.

    Raises:
        DataError, ModelError, RecipeError, RunError: the recipe cannot be trained.
    """
    device = torch.device(default_device())
    here = limit_bytes(device)
    limit = here if room is None else room
    needed = loaded_bytes(recipe.model.path, dtype=recipe.model.dtype, quantize=recipe.model.quantize)
    if needed > min(here, limit):
        return replace(plan, forecast=_no_room(device, needed, limit))
    try:
        return _probe(recipe, plan, device, here=here, limit=limit)
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        return replace(plan, forecast=_no_room(device, here + 1, here))


def _no_room(device: torch.device, needed: int, limit: int, choices: Sequence[Choice] = ()) -> Forecast:
    memory = Memory(bytes=needed, limit=limit, measured=False)
    return Forecast(device=_name(device), memory=memory, times=None, choices=tuple(choices))


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _probe(recipe: Recipe, plan: Plan, device: torch.device, *, here: int, limit: int) -> Plan:
    """`plan` for a machine with `limit` bytes to be had, probed on this one, which has `here`."""
    settings = recipe.train
    prepared = prepare(recipe, console=Console(quiet=True))
    examples = prepared.train_rows.examples
    estimate = make_plan(base_model(prepared.model), examples, prepared.weights, settings)
    work = Workload(
        rows=len(examples),
        tokens_per_epoch=estimate.tokens_per_epoch,
        learnt_per_epoch=estimate.supervised_per_epoch,
        longest=estimate.longest,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        steps=estimate.steps,
        exact=True,
    )
    setup = set_up(prepared.model, settings, steps=estimate.steps)
    check_head(setup.trained, make_probe(examples, row_prefix=setup.trained.row_prefix).to(device))
    extra = scoring_bytes(recipe, prepared)

    def tried_in(room: int) -> list[Fit]:
        return try_settings(setup, examples, prepared.weights, settings, room=room, steps=estimate.steps, extra=extra)

    tried = tried_in(limit)
    written = replace(tried[0], settings=settings, bytes=tried[0].as_written)
    running = tried[-1] if tried[-1].fits and settings.fit_memory == "auto" else written
    if running.bytes > here:
        choices = (_as_written(written), *_others(tried, settings), *_proposals(prepared, recipe, tried[-1]))
        return replace(plan, work=work, forecast=_no_room(device, written.bytes, limit, choices))
    set_checkpointing(base_model(prepared.model), running.settings)
    seconds = _time_steps(setup, prepared, running.settings) * estimate.steps
    compiles = will_compile(settings, estimate.seconds)
    peak = peak_bytes(device) + extra + later_bytes(device, steps=estimate.steps)
    scorings = _count_scorings(settings, estimate.steps) if prepared.scored(settings) else 0
    times = Times(
        steps=seconds,
        compiled_steps=COMPILE_SECONDS + seconds / COMPILED_SPEEDUP if may_compile(settings) else None,
        compiles=compiles,
        scorings=scorings,
        scoring=scorings * _time_scoring(setup, prepared, recipe),
    )
    peak, measured = max(peak, peak_bytes(device)), running.settings == settings
    if measured:
        if peak > limit:  # more was taken than foretold, so that what is tried instead has as much less room
            tried = tried_in(limit - max(0, peak - written.bytes))
        written = replace(written, bytes=peak)
    memory = Memory(bytes=written.bytes, limit=limit, measured=measured)

    def time_steps(those: Train) -> float:
        set_checkpointing(base_model(prepared.model), those)
        return _time_steps(setup, prepared, those, largest_first=False) * estimate.steps

    def timed(one: Fit) -> float | None:
        if one.settings == running.settings:
            return seconds
        return time_steps(one.settings) if one.fits and one.bytes <= here else None

    choices = (_as_written(written, seconds if measured else None), *_others(tried, settings, timed))
    if not written.fits:
        choices += _proposals(prepared, recipe, tried[-1])
    elif settings.fit_memory == "auto":
        choices += _larger(setup, prepared, written, min(here, limit), time_steps)
    forecast = Forecast(device=_name(device), memory=memory, times=times, choices=choices)
    return replace(plan, work=work, forecast=forecast)


def _as_written(fit: Fit, seconds: float | None = None) -> Choice:
    return Choice(changes=(), bytes=fit.bytes, fits=fit.fits, seconds=seconds)


def _others(
    tried: Sequence[Fit], written: Train, timed: Callable[[Fit], float | None] = lambda _: None
) -> tuple[Choice, ...]:
    """What was tried and is not as `written`; `timed` gives the seconds of all steps of one."""
    return tuple(
        Choice(
            changes=tuple(changes),
            bytes=one.bytes,
            fits=one.fits,
            seconds=timed(one),
            applied=one.fits and written.fit_memory == "auto",
        )
        for one in tried
        if (changes := one.changes(written))
    )


def _larger(
    setup: Setup, prepared: Prepared, written: Fit, room: int, time_steps: Callable[[Train], float]
) -> tuple[Choice, ...]:
    """Passes up to four times as large, where steps have several, there is room for them, and they are faster."""
    examples, settings = prepared.train_rows.examples, written.settings
    if not settings.packing:
        return ()
    whole = settings.model_copy(update={"tokens_per_pass": 4 * settings.tokens_per_pass})
    now, largest = (largest_pass(setup, examples, prepared.weights, one) for one in (settings, whole))
    if largest < _LEAST_LARGER * now:
        return ()
    per_token = measure_footprint(setup.trained, examples, keeping=setup.offloading).per_token
    tokens = int(min(largest, now + (room - written.bytes) / per_token)) // ROUND_TOKENS * ROUND_TOKENS
    if tokens < _LEAST_LARGER * now:
        return ()
    more = settings.model_copy(update={"tokens_per_pass": tokens})
    larger = replace(written, settings=more, bytes=round(written.bytes + per_token * (tokens - now)))
    before, seconds = time_steps(settings), time_steps(more)
    if seconds > _LEAST_GAIN * before:
        return ()
    changes = tuple(larger.changes(settings))
    return (Choice(changes=changes, bytes=larger.bytes, fits=True, seconds=seconds, faster=True),)


def _proposals(prepared: Prepared, recipe: Recipe, least: Fit) -> tuple[Choice, ...]:
    """What would take less still, beside what `least` changes, and changes what is learnt."""
    base, changes = base_model(prepared.model), tuple(least.changes(recipe.train))
    found = []
    light = recipe.train.model_copy(update={"optimiser": "adamw_8bit"})
    if recipe.train.optimiser == "adamw" and importlib.util.find_spec("bitsandbytes") is not None:
        saved = state_bytes(base, recipe.train) - state_bytes(base, light)
        found.append(("train.optimiser=adamw_8bit", saved))
    if recipe.model.quantize == "none" and not isinstance(recipe.method, Full | Freeze):
        layers = [one for one in base.get_decoder().modules() if isinstance(one, nn.Linear)]
        weights = [one.weight for one in layers if not one.weight.requires_grad]
        found.append(("model.quantize=int4", sum(one.nbytes - one.numel() // 2 for one in weights)))
    return tuple(
        Choice(
            changes=(*changes, change),
            bytes=least.bytes - saved,
            fits=least.bytes - saved <= least.room,
            same_result=False,
        )
        for change, saved in found
        if saved > _LEAST_SAVED * least.bytes
    )


def _time_steps(setup: Setup, prepared: Prepared, settings: Train, *, largest_first: bool = True) -> float:
    """Seconds of an optimiser step on average, from two usual ones.

    Before them the step with the largest pass is taken: it shows the most memory, and it takes upon itself what happens
    in a first step only. Without `largest_first` it is a usual one.
    """
    examples, tasks = prepared.train_rows.examples, prepared.train_tasks
    drawn = {"batch_size": settings.batch_size, "seed": settings.seed, "first_step": 0}
    order = step_rows(prepared.weights, **drawn, groups=groups_of(examples, settings))
    share = may_share(setup.trained, settings)
    first_epoch, first_rows = next(order)
    steps = [first_rows, *(rows for _, rows in takewhile(lambda found: found[0] == first_epoch, order))]
    lengths = lengths_of(examples).tolist()
    passes = [pass_sizes([lengths[row] for row in rows], settings) for rows in steps]
    sizes = [sum(its) for its in passes]
    mean = sum(sizes) / len(sizes)

    def take(number: int) -> float:
        rows = steps[number]
        started = time.perf_counter()
        batches = step_batches(
            [examples[row] for row in rows],
            [tasks[row] for row in rows],
            settings,
            _device(setup),
            row_prefix=setup.trained.row_prefix,
            share=share,
        )
        take_step(setup, batches, settings)
        _wait(_device(setup))
        return time.perf_counter() - started

    setup.trained.train()
    usual = heapq.nsmallest(2, range(len(steps)), key=lambda number: abs(sizes[number] - mean))
    largest = max(range(len(steps)), key=lambda number: (max(passes[number]), sizes[number]))
    take(largest if largest_first else usual[0])
    return sum(take(number) for number in usual) / sum(sizes[number] for number in usual) * mean


def _time_scoring(setup: Setup, prepared: Prepared, recipe: Recipe) -> float:
    """Seconds of one scoring of the dev rows, were answers as long as the labelled ones.

    Found from the dev loss of a few rows and the first tokens of as many answers as are generated together.
    """
    dev, settings = prepared.dev_rows, recipe.train
    places = prepared.scored(settings)
    if not places:
        return 0.0
    few = range(0, len(dev.examples), max(1, len(dev.examples) // settings.batch_size))[: settings.batch_size]
    started = time.perf_counter()
    dev_loss(setup.trained, [dev.examples[n] for n in few], [prepared.dev_tasks[n] for n in few], settings)
    loss_seconds = time.perf_counter() - started
    loss_seconds *= int(lengths_of(dev.examples).sum()) / sum(len(dev.examples[n]) for n in few)

    examples = prepared.scored_examples(settings)
    prompts = [len(example) - example.num_answer for example in examples]
    together = min(recipe.generate.batch_rows, len(places))
    sample = range(0, len(places), len(places) // together)[:together]
    with setup.trained.generating() as generator:
        prefill, step = _time_answers(generator, prepared, [places[n] for n in sample], [prompts[n] for n in sample])
    prefill *= sum(prompts) / sum(prompts[n] for n in sample)
    longest_first = sorted(range(len(places)), key=lambda n: -prompts[n])
    steps = _count_decode_steps([examples[n].num_answer for n in longest_first], together)
    return loss_seconds + prefill + step * steps


def _time_answers(
    generator: PreTrainedModel, prepared: Prepared, places: Sequence[int], prompts: Sequence[int]
) -> tuple[float, float]:
    """Seconds to read the prompts of the dev rows at `places`, and of one further token for all of them.

    The shortest prompt is read last; its answer is over with its first token, which says when reading ended.
    """
    records = [prepared.dev_rows.records[place] for place in places]
    shortest = min(range(len(places)), key=lambda n: prompts[n])
    limits = [1 if n == shortest and len(places) > 1 else _NEW_TOKENS for n in range(len(places))]
    started = read = time.perf_counter()
    for reply in reply_all(
        generator,
        prepared.opened.renderer,
        [record.messages for record in records],
        sampling=Sampling(max_new_tokens=_NEW_TOKENS),
        tools=[record.tools for record in records],
        limits=limits,
        max_rows=len(records),
    ):
        if reply.index == shortest and len(places) > 1:
            read = time.perf_counter()
    return read - started, (time.perf_counter() - read) / (_NEW_TOKENS - 1)


def _count_decode_steps(answers: Sequence[int], together: int) -> int:
    """Steps until all `answers`, of so many tokens, are there when a row that ends leaves its place to the next."""
    ends = [0] * together
    for length in answers:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def _count_scorings(settings: Train, steps: int) -> int:
    """How often the dev rows are scored, were training never stopped early; the last step is always followed by one."""
    if settings.evaluate_every == "never":
        return 0
    if settings.evaluate_every == "epoch":
        return math.ceil(settings.epochs)
    return math.ceil(steps / settings.evaluate_every)


def _device(setup: Setup) -> torch.device:
    return setup.trained.model.device


def _wait(device: torch.device) -> None:
    """Return when the GPU has done what it was given; on a CPU that is so already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
