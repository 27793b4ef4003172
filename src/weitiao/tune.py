"""Recipe in, tuned model out: rows, model, training and contract brought together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from .contract import Contract
from .data.reading import describe_sources
from .dataset import Dataset, read_options
from .decoding import sampling_of
from .dev_scoring import make_on_eval, scoring_bytes
from .environment import environment
from .errors import RecipeError
from .evaluate.best import OVERALL, rehearse
from .evaluate.slices import count_labels
from .evaluate.user_metrics import UserMetric, copy_metric_files, load_metrics
from .launch import Launch, read_launch
from .models.adapters import adapter_fingerprint, base_model
from .models.opening import OpenModel, default_device
from .models.own_weights import computing_dtype
from .monitor.choosing import require_packages
from .monitor.following import following
from .monitor.state import require_idle
from .preparation import Prepared, prepare
from .recipe import Recipe
from .runs import RunFolder, write_bytes, write_json, write_text, writing
from .stopping import Stopped, StopSignals
from .train.checkpoint import require_same, rust_os_errors
from .train.loop import Outcome, train
from .train.ranks import Ranks, joined
from .train.resuming import LATEST, named_checkpoint
from .train.scoring import OnScore
from .train.sharding import require_spreadable, spreads
from .train.switches import require_switches

_VOLATILE = {
    "train": (
        "shard",
        "deepspeed",
        "log_every",
        "keep_checkpoints",
        "save_every",
        "save_minutes",
        "price_per_hour",
        "currency",
        "fit_memory",
        "tokens_per_pass",
        "gradient_checkpointing",
        "offload_activations",
    ),
    "generate": ("batch_rows",),
    "evaluate": ("base", "shots", "unconstrained", "resamples", "metrics"),
}
"""Settings that may change between the sittings of one run, because the tuned weights do not depend on them: on how a
step is cut into passes, and what these keep, no more than by rounding."""


def tune_model(
    recipe: Recipe,
    *,
    resume: bool | int | str | Path = False,
    runs: str | Path = "runs",
    console: Console | None = None,
    dataset: Dataset | None = None,
    on_score: OnScore | None = None,
    stops: StopSignals | None = None,
    ranks: Ranks | None = None,
) -> RunFolder:
    """Train as `recipe` says; the run folder ``runs/NAME`` then holds the adapter and its contract.

    Where torchrun or accelerate launched several processes, each calls this with the same arguments, and the first
    writes. Those that were started anew after one had ended go on from the newest checkpoint by themselves.

    Args:
        recipe: what to train, on what and how.
        resume: False to begin a run; else where one goes on: True or "yes" at its newest checkpoint, a number at that
            of a step, a path at the checkpoint there. "auto": True where the run has begun, else False.
        runs: the folder of run folders.
        console: where progress is shown.
        dataset: what `load_dataset` made of the recipe, where that was read already.
        on_score: told of each scoring of the dev rows; may end the training there.
        stops: the signals that ask for the end, where the caller catches them already.
        ranks: the processes that train together, where the caller has joined them already.

    Raises:
        DataError, ModelError, RunError, ResumeError: before anything is written, or with what was written whole.
        Stopped: a signal asked for the end, such as Ctrl-C; after the first one the step was finished and saved.
        LostProcessError: another one of the processes has ended.
    """
    launch, run = read_launch(), RunFolder(Path(runs) / recipe.name)
    with joined(launch) if ranks is None else nullcontext(ranks) as together:
        if console is None or not together.is_first:
            console = Console(stderr=True, markup=False, emoji=False, highlight=False, quiet=not together.is_first)
        with stops or StopSignals(partial(console.print, soft_wrap=True)) as catching:
            wanted = together.by_first(lambda: _wanted(resume, run, launch))
            return _tune(recipe, wanted, run, console, dataset, on_score, catching, together)


def _wanted(resume: bool | int | str | Path, run: RunFolder, launch: Launch | None) -> str:
    """Where the run goes on, as `named_checkpoint` reads it; "" for one that begins.

    One that this very launch has begun, before it was started anew, goes on from its newest checkpoint.

    Raises RunError when there is no such run or checkpoint.
    """
    if launch is not None and launch.restarts and launch.key and _begun_by(run) == launch.key:
        return LATEST
    if resume is False or (resume == "auto" and not run.recipe.exists()):
        return ""
    wanted = LATEST if resume is True or resume == "auto" else str(resume)
    if not run.recipe.exists():
        RunFolder.create(run.path, resume=True)  # which refuses to
    named_checkpoint(run, wanted)
    return wanted


def _begun_by(run: RunFolder) -> str:
    """The key of the launch that last trained `run`; "" where none did."""
    if not (run.recipe.exists() and run.environment.exists()):
        return ""
    return str(json.loads(run.environment.read_text(encoding="utf-8")).get("launch", ""))


def _tune(
    recipe: Recipe,
    wanted: str,
    run: RunFolder,
    console: Console,
    dataset: Dataset | None,
    on_score: OnScore | None,
    stops: StopSignals,
    ranks: Ranks,
) -> RunFolder:
    """`tune_model`, with what it was given read."""
    require_packages(recipe.monitor)
    require_idle(run)
    require_switches(recipe.train, ranks)
    if (idle := ranks.size - recipe.train.batch_size) > 0:
        console.print(
            f"note: train.batch_size is {recipe.train.batch_size}, and {ranks.size} processes share the rows of a "
            f"step: {idle} of them have none.",
            soft_wrap=True,
        )
    if recipe.train.shard != "none" and ranks.size == 1:
        console.print(
            "note: train.shard spreads the weights over several processes; this one, alone, holds them all. Start "
            "several with torchrun (docs/many-processes.md).",
            soft_wrap=True,
        )
    if recipe.train.deepspeed is not None and ranks.size == 1:
        console.print(
            "note: train.deepspeed divides what learns among several processes; this one, alone, keeps all of it. "
            "Start several with torchrun (docs/many-processes.md).",
            soft_wrap=True,
        )
    # a model that is to be spread may not fit onto one GPU: each process takes its part of it from there
    device = "cpu" if spreads(recipe.train, ranks) else None
    prepared = prepare(recipe, console=console, dataset=dataset, device=device)
    if spreads(recipe.train, ranks):
        require_spreadable(base_model(prepared.model), recipe.train, torch.device(default_device()))
    dataset, opened = prepared.dataset, prepared.opened
    reading = describe_sources([(source.path, read_options(source, recipe.data)) for source in recipe.data.train])
    metrics = load_metrics(recipe.evaluate.metrics)
    scored = prepared.scored(recipe.train)
    if not scored and recipe.evaluate.best_by != OVERALL:
        raise RecipeError(
            f"evaluate.best_by is {recipe.evaluate.best_by!r}, but no rows are scored while training: it could choose "
            f"nothing. Give dev rows and a rhythm (train.evaluate_every), or leave best_by out."
        )
    if scored:
        rehearse(
            [prepared.dev_rows.records[place] for place in scored],
            [prepared.dev_task(place) for place in scored],
            dataset.tasks,
            best_by=recipe.evaluate.best_by,
            metrics=metrics,
        )
    ranks.require_same({"rows": dataset.fingerprint, "weights of the base model": opened.fingerprint})
    if ranks.is_first:
        RunFolder.create(run.path, resume=bool(wanted))
        require_same(run, _depends_on(recipe, dataset, opened))
    say = partial(console.print, soft_wrap=True)
    with following(recipe, run, resume=bool(wanted), say=say) as followers, ranks.noticing_loss():
        if ranks.is_first:
            _describe_run(recipe, prepared, run, metrics, ranks)
        outcome = train(
            prepared.model,
            prepared.train_rows.examples,
            prepared.weights,
            prepared.dev_rows.examples,
            settings=recipe.train,
            run=run,
            tasks=prepared.train_tasks,
            dev_tasks=prepared.dev_tasks,
            on_eval=make_on_eval(recipe, prepared, metrics, ranks=ranks, say=partial(console.print, soft_wrap=True)),
            on_score=on_score,
            scoring_bytes=scoring_bytes(recipe, prepared),
            followers=followers,
            resume_from=wanted or LATEST,
            name_row=prepared.train_source,
            stops=stops,
            ranks=ranks,
            console=console,
        )
        if not outcome.finished:
            console.print(f"Saved at step {outcome.step} of {outcome.steps}. Continue with --resume.", soft_wrap=True)
            raise Stopped(stops.asked or "SIGTERM")  # else it was another process that was asked
        if ranks.is_first:
            with writing(run.adapter), rust_os_errors():
                opened.tokenizer.save_pretrained(str(run.adapter))
            _contract(recipe, prepared, run, reading).write(run.contract)
    _say_done(console, run, outcome)
    return run


def _describe_run(
    recipe: Recipe, prepared: Prepared, run: RunFolder, metrics: Sequence[UserMetric], ranks: Ranks
) -> None:
    """Write what the run is and where it is trained; the recipe only the first time."""
    dataset, launch = prepared.dataset, read_launch()
    if not run.recipe.exists():
        write_text(run.recipe, recipe.to_yaml())
    together = {"processes": ranks.size, "launch": launch.key} if launch is not None else {}
    write_json(run.environment, {**environment().to_json(), **together})
    write_json(run.label_counts, count_labels(dataset.train, dataset.train_tasks))
    copy_metric_files(metrics, run.path)
    if prepared.neighbours is not None:
        write_bytes(run.neighbours, prepared.neighbours.to_bytes())


def _say_done(console: Console, run: RunFolder, outcome: Outcome) -> None:
    score = "" if outcome.best_score is None else f" (dev score {outcome.best_score:.3f})"
    console.print(
        f"Done in {outcome.seconds / 60:.1f} minutes of training. The adapter of step {outcome.best_step}{score} "
        f"is in {run.adapter}.\nNext: weitiao evaluate {run.path}",
        soft_wrap=True,
    )


def _depends_on(recipe: Recipe, dataset: Dataset, opened: OpenModel) -> dict[str, object]:
    """What must stay the same for a run to go on."""
    settings = recipe.model_dump(mode="json")
    for part, keys in _VOLATILE.items():
        for key in keys:
            del settings[part][key]
    del settings["monitor"]  # who looks on changes nothing
    # where rows, model and adapter lie may change, what they hold may not
    del settings["data"], settings["model"]["path"], settings["model"]["adapter"]
    settings["data"] = {
        key: getattr(recipe.data, key) for key in ("max_length", "overlong", "turns", "loss_mask", "retrieve")
    }
    rows = {name: {"train": train, "dev": dev} for name, (train, dev) in dataset.count_rows().items()}
    start = recipe.model.adapter
    return {
        "data": dataset.fingerprint,
        "rows": rows,
        "base model": opened.fingerprint,
        "starting adapter": None if start is None else adapter_fingerprint(Path(start)),
        "recipe": settings,
    }


def _contract(recipe: Recipe, prepared: Prepared, run: RunFolder, reading: Mapping[str, object]) -> Contract:
    opened, limits = prepared.opened, prepared.answer_limits
    local = Path(recipe.model.path).expanduser()
    return Contract(
        base=str(local.resolve()) if local.is_dir() else recipe.model.path,
        base_fingerprint=opened.fingerprint,
        adapter_fingerprint=adapter_fingerprint(run.adapter),
        family=opened.family.name,
        template=opened.renderer.template,
        stop_ids=opened.renderer.stop_ids,
        tasks=tuple(task.to_json() for task in prepared.dataset.tasks),
        decoding=asdict(sampling_of(recipe.generate, limits)),
        answer_limits=limits,
        batch_rows=recipe.generate.batch_rows,
        constrain=recipe.generate.constrain,
        retrieve=recipe.data.retrieve,
        max_length=recipe.data.max_length,
        shorten_input=recipe.data.overlong == "shorten_input",
        data_fingerprint=prepared.rows_fingerprint,
        dtype=str(computing_dtype(opened.model)).removeprefix("torch."),
        quantize=recipe.model.quantize,
        reading=reading,
        versions=environment().versions,
    )
