"""Recipe in, forecast out: the model is loaded, three real steps are taken, a few answers generated, nothing is kept.

`weitiao check recipe.yaml --plan`. Rows, model, steps and answers are made by the code that training makes them with;
the adapter that learns from the three steps is thrown away, and nothing is written anywhere.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import torch
from rich.console import Console
from transformers import PreTrainedModel

from .check.checkup import Checkup
from .check.examine import Subject
from .check.plan import Forecast, Memory, Plan, Times, Workload, memory_finding
from .data.findings import by_grade
from .data.order import step_rows
from .dev_scoring import scoring_bytes
from .errors import RecipeError
from .generate.chat import reply_all
from .generate.engine import Sampling
from .models.adapters import base_model
from .models.opening import default_device, loaded_bytes
from .preparation import Prepared, prepare
from .recipe import Recipe, Train
from .render.example_store import lengths_of
from .train.batches import make_probe
from .train.memory import limit_bytes, peak_bytes
from .train.model import check_head
from .train.plan import COMPILE_SECONDS, COMPILED_SPEEDUP, later_bytes, make_plan, may_compile, will_compile
from .train.scoring import dev_loss
from .train.shared_prompts import groups_of, may_share
from .train.step import Setup, pass_sizes, set_up, step_batches, take_step

_NEW_TOKENS = 5
"""Tokens that the probe generates in each row but one: four steps are timed."""


def add_forecast(subject: Subject, checkup: Checkup) -> Checkup:
    """`checkup` with what a probe of its recipe foretells; too little memory is a finding like any other.

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
    plan = foretell(recipe, checkup.plan or unknown)
    found = memory_finding(plan, recipe.train)
    return replace(checkup, plan=plan, findings=tuple(by_grade([*checkup.findings, *([found] if found else [])])))


def foretell(recipe: Recipe, plan: Plan) -> Plan:
    """`plan` with what a probe foretells: memory at the peak, times, and so the cost.

    Where there is no room for a step, or even for the model, only the memory is foretold, by an estimate.

    Raises:
        DataError, ModelError, RecipeError, RunError: the recipe cannot be trained.
    """
    device = torch.device(default_device())
    limit = limit_bytes(device)
    needed = loaded_bytes(recipe.model.path, dtype=recipe.model.dtype, quantize=recipe.model.quantize)
    if needed > limit:
        return replace(plan, forecast=_no_room(device, needed, limit))
    try:
        return _probe(recipe, plan, device, limit)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):  # so torch says it, of a GPU or not
            raise
        return replace(plan, forecast=_no_room(device, limit + 1, limit))


def _no_room(device: torch.device, needed: int, limit: int) -> Forecast:
    return Forecast(device=_name(device), memory=Memory(bytes=needed, limit=limit, measured=False), times=None)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _probe(recipe: Recipe, plan: Plan, device: torch.device, limit: int) -> Plan:
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
    if estimate.memory_bytes > limit:
        return replace(plan, work=work, forecast=_no_room(device, estimate.memory_bytes, limit))
    setup = set_up(prepared.model, settings, steps=estimate.steps)
    check_head(setup.trained, make_probe(examples, row_prefix=setup.trained.row_prefix).to(device))
    steps = _time_steps(setup, prepared, settings) * estimate.steps
    compiles = will_compile(settings, estimate.seconds)
    peak = peak_bytes(device) + scoring_bytes(recipe, prepared) + later_bytes(device, steps=estimate.steps)
    scorings = _count_scorings(settings, estimate.steps) if prepared.scored(settings) else 0
    times = Times(
        steps=steps,
        compiled_steps=COMPILE_SECONDS + steps / COMPILED_SPEEDUP if may_compile(settings) else None,
        compiles=compiles,
        scorings=scorings,
        scoring=scorings * _time_scoring(setup, prepared, recipe),
    )
    memory = Memory(bytes=max(peak, peak_bytes(device)), limit=limit, measured=True)
    return replace(plan, work=work, forecast=Forecast(device=_name(device), memory=memory, times=times))


def _time_steps(setup: Setup, prepared: Prepared, settings: Train) -> float:
    """Seconds of an optimiser step on average, from two usual ones.

    Before them the step with the largest pass is taken: it shows the most memory, and it takes upon itself what happens
    in a first step only.
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
    take(max(range(len(steps)), key=lambda number: (max(passes[number]), sizes[number])))
    usual = heapq.nsmallest(2, range(len(steps)), key=lambda number: abs(sizes[number] - mean))
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
