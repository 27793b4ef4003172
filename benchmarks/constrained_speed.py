"""What holding answers to their form costs and saves: a tuned run's greedy answers, free and constrained.

    python benchmarks/constrained_speed.py RUN_FOLDER DATA [--rows 100] [--turns 2] [--batch 48] [--dtype float32]

Both sides answer the same rows and take turns in one process, so that a machine that slows down slows both. For each
task: calls of the model per answer (without the prompt's), the share of answers in the labelled form, the primary
score, answers refused; for all together the wall time. Then the constrained answers are replayed without a model, to
time the mask of every token that was asked for.

Exits with 1 when a target is missed: half the steps on extraction, less wall time, every answer in form, a score no
lower, 100 µs per mask in the median.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import torch
from machine import describe_machine

from weitiao.apply import open_run
from weitiao.data.reading import read_like
from weitiao.data.records import Record
from weitiao.errors import FormError
from weitiao.generate.chat import Reply, reply_all
from weitiao.generate.constraint import compiler_of
from weitiao.generate.engine import Sampling
from weitiao.models.opening import OpenModel, open_model
from weitiao.tasks.base import Task, add_counts, assign_task
from weitiao.tasks.grammar import form_grammar

LEAST_FEWER_STEPS = 2.0
MOST_MEDIAN_SECONDS = 100e-6


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The rows, and all that both sides need to answer them."""

    opened: OpenModel
    records: Sequence[Record]
    tasks: Sequence[Task]
    grammars: Sequence[str | None]
    limits: Sequence[int]
    batch: int

    def answer(self, *, constrained: bool) -> tuple[list[Reply], float]:
        """The replies in the order of the rows, and the seconds they took."""
        started = time.perf_counter()
        replies = reply_all(
            self.opened.model,
            self.opened.renderer,
            [record.messages for record in self.records],
            sampling=Sampling(max_new_tokens=max(self.limits)),
            limits=self.limits,
            grammars=self.grammars if constrained else None,
            max_rows=self.batch,
        )
        done = sorted(replies, key=lambda reply: reply.index)
        return done, time.perf_counter() - started


@dataclass(kw_only=True)
class Masks:
    """Seconds that parts of constrained decoding took, token by token."""

    masks: list[float] = field(default_factory=list)
    forced: list[float] = field(default_factory=list)
    compiled: list[float] = field(default_factory=list)


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--turns", type=int, default=2, help="how often each side answers all rows")
    parser.add_argument(
        "--dtype",
        help="of the weights, by default as in training; float32 scores without bfloat16's rounding",
    )
    parser.add_argument("--batch", type=int, default=48, help="rows that run together")
    args = parser.parse_args()

    asked = read_rows(args.run, args.data, args.rows, args.batch, args.dtype)
    print(
        f"{args.run}, {len(asked.records)} rows of {args.data}, {args.batch} together, "
        f"{torch.get_num_threads()} threads"
    )
    print(describe_machine(), flush=True)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    replies: dict[bool, list[Reply]] = {}
    for turn in range(args.turns):
        for constrained in (False, True) if turn % 2 == 0 else (True, False):
            replies[constrained], taken = asked.answer(constrained=constrained)
            seconds[constrained].append(taken)
            print(f"turn {turn + 1}, {'constrained' if constrained else 'free':11}: {taken:6.1f} s", flush=True)
    missed = compare(asked, free=replies[False], constrained=replies[True])
    ratio = mean(seconds[False]) / mean(seconds[True])
    free, held = mean(seconds[False]), mean(seconds[True])
    print(f"wall time: free {free:.1f} s, constrained {held:.1f} s: {ratio:.2f} times as fast")
    missed += ["wall time"] if ratio <= 1 else []
    missed += report_masks(time_masks(asked, replies[True]))
    print("missed: " + ", ".join(missed) if missed else "every target is met")
    return int(bool(missed))


def read_rows(run: Path, data: Path, count: int, batch: int, dtype: str | None) -> Asked:
    """The first `count` rows of `data` whose task the run knows and whose answers have a form."""
    folder, contract, opened = open_run(run)
    if dtype is not None:
        opened = open_model(contract.base, adapter=folder.adapter, dtype=dtype)
    known = [Task.from_json(task) for task in contract.tasks]
    pairs = [(record, assign_task(record, known)) for record in read_like(contract.reading, data)[:count]]
    formed = [(record, task) for record, task in pairs if isinstance(task, Task) and task.form.shape != "text"]
    return Asked(
        opened=opened,
        records=[record for record, _ in formed],
        tasks=[task for _, task in formed],
        grammars=[form_grammar(task.form, record.text) for record, task in formed],
        limits=[contract.answer_limits[task.name] for _, task in formed],
        batch=batch,
    )


def compare(asked: Asked, *, free: Sequence[Reply], constrained: Sequence[Reply]) -> list[str]:
    """Print the figures of both sides task by task; the targets that were missed."""
    missed = []
    for task in dict.fromkeys(task.name for task in asked.tasks):
        places = [place for place, owner in enumerate(asked.tasks) if owner.name == task]
        steps, scores = [], []
        for name, replies in (("free", free), ("constrained", constrained)):
            mine = [replies[place] for place in places]
            steps.append(mean(reply.num_steps for reply in mine))
            scores.append(summarise(asked, places, mine))
            metric = asked.tasks[places[0]].primary_metric
            refused = sum(reply.finish == "refused" for reply in mine)
            num_tokens = mean(reply.num_tokens for reply in mine)
            print(
                f"{task:10} {name:11}: {steps[-1]:6.1f} steps for {num_tokens:6.1f} tokens, {metric} "
                f"{scores[-1][metric]:.3f}, in form {scores[-1]['valid']:.1%}, refused {refused} of {len(mine)}"
            )
        print(f"{task:10} {'':11}  {steps[0] / steps[1] if steps[1] else float('inf'):6.2f} times fewer steps")
        same = sum(free[place].text == constrained[place].text for place in places)
        print(f"{task:10} {'':11}  {same} of {len(places)} answers the same")
        owner = asked.tasks[places[0]]
        if owner.kind == "extraction" and steps[1] and steps[0] / steps[1] < LEAST_FEWER_STEPS:
            missed.append(f"steps on {task}")
        if scores[1]["valid"] < 1:
            missed.append(f"form of {task}")
        if scores[1][owner.primary_metric] < scores[0][owner.primary_metric]:
            missed.append(f"{owner.primary_metric} of {task}")
    return missed


def summarise(asked: Asked, places: Sequence[int], replies: Sequence[Reply]) -> dict[str, float]:
    """The metrics of `replies` to the rows at `places`; a refusal earns nothing."""
    task = asked.tasks[places[0]]
    rows = [
        task.score(task.gold(asked.records[place]), reply.text) for place, reply in zip(places, replies, strict=True)
    ]
    return task.summarise(add_counts([row.counts for row in rows]))


def time_masks(asked: Asked, replies: Sequence[Reply]) -> Masks:
    """Replay the answers through their grammars, timing every mask and every look for forced tokens."""
    renderer = asked.opened.renderer
    compiler = compiler_of(renderer, asked.opened.model.config.get_text_config().vocab_size)
    timed = Masks()
    for grammar, reply, task in zip(asked.grammars, replies, asked.tasks, strict=True):
        try:
            task.form.parse(reply.text)
        except FormError:
            continue
        assert grammar is not None
        constraint = timing(timed.compiled, lambda grammar=grammar: compiler.compile(grammar))  # type: ignore[misc]
        tokens = list(renderer.render_answer(reply.text))
        while tokens:
            forced = timing(timed.forced, constraint.forced)
            if not forced:
                timing(timed.masks, constraint.allowed)
            for token in tokens[: max(1, len(forced))]:
                if token not in renderer.stop_ids:
                    assert constraint.advance(token)
            del tokens[: max(1, len(forced))]
    return timed


def timing(seconds: list[float], call):  # type: ignore[no-untyped-def]  # whatever `call` returns
    """What `call` returns; the time it took is added to `seconds`."""
    started = time.perf_counter()
    result = call()
    seconds.append(time.perf_counter() - started)
    return result


def report_masks(timed: Masks) -> list[str]:
    """Print medians and 99th percentiles; the target that was missed, if it was."""
    for name, seconds in (("mask", timed.masks), ("forced tokens", timed.forced), ("grammar", timed.compiled)):
        ordered = sorted(seconds)
        worst = ordered[int(0.99 * (len(ordered) - 1))]
        print(
            f"{name:13}: median {median(ordered) * 1e6:7.0f} µs, 99th percentile {worst * 1e6:7.0f} µs, {len(ordered)}"
        )
    return ["mask time"] if median(timed.masks) > MOST_MEDIAN_SECONDS else []


if __name__ == "__main__":
    sys.exit(main())
