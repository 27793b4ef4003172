"""Every way of tuning on `shared/data/spo_and_topics` with the starter model: score, size, memory, speed of each.

    OMP_NUM_THREADS=1 python benchmarks/methods.py [--rows 200] [--dev 60] [--epochs 2] [--results methods.jsonl]
                                                   [--methods 'LoRA;full'] [train.seed=1 …]

Each method runs with its defaults, in a process of its own, and answers the dev rows once, at the end: held to the
form, and free. The untuned model is a line as well. What is found is added to the results file line by line; a second
call leaves out the methods that it holds for the same settings, and prints the table of all. A method that was
measured with --no-answers is measured again by a call without.

score        mean of both tasks' own figures, held to the form; triples strict micro-F1, topics accuracy
in form      the share of answers that have the labelled form when nothing holds them to it
dev loss     of the answers of the dev rows that are scored
memory       the peak of the process at the end of training, before it answers
tokens/s     of training rows over all steps; by processor time where torch has one thread, so that other programs on
             the machine do not count; layers are not compiled, so that short runs compare

Every row of the table is one run with one seed: on 60 rows that moves a score by some hundredths.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, seconds
from rich.console import Console

from weitiao.data.order import step_rows
from weitiao.dev_scoring import make_on_eval
from weitiao.models.adapters import base_model
from weitiao.preparation import prepare
from weitiao.recipe import make_recipe
from weitiao.runs import RunFolder, Sample
from weitiao.train.loop import train
from weitiao.train.memory import peak_bytes
from weitiao.train.model import TrainedModel
from weitiao.train.scoring import dev_loss
from weitiao.tuning.methods import count_parameters

DATA = Path(__file__).parents[2] / "shared/data/spo_and_topics"
REFERENCE = "LoRA"
METHODS: dict[str, dict[str, Any] | None] = {
    "untuned": None,
    REFERENCE: {"name": "lora"},
    "LoRA, rank 64, rsLoRA": {"name": "lora", "rslora": True, "rank": 64, "alpha": 16},
    "LoRA, DoRA": {"name": "lora", "dora": True},
    "LoRA, PiSSA": {"name": "lora", "init": "pissa", "alpha": 16},
    "LoRA+": {"name": "lora", "b_learning_rate": 4},
    "ptuning_v2": {"name": "ptuning_v2"},
    "ptuning_v2, projection": {"name": "ptuning_v2", "projection": True},
    "ptuning_v1": {"name": "ptuning_v1"},
    "prompt_tuning": {"name": "prompt_tuning"},
    "freeze, 2 layers": {"name": "freeze"},
    "full": {"name": "full"},
    "ia3": {"name": "ia3"},
}
_RESULT = "result: "
_COLUMNS = (
    "method", "score", "triples F1", "topics", "in form", "dev loss", "trainable", "adapter MB", "memory GB", "tokens/s"
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=None, help="train rows; all by default")
    parser.add_argument("--dev", type=int, default=0, help="dev rows that are scored; all by default")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--methods", default=None, help="some of them, with semicolons between; all by default")
    parser.add_argument("--results", type=Path, default=None, help="a file that keeps what was measured")
    parser.add_argument("--no-answers", action="store_true", help="only the dev loss, which takes a third of the time")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    if arguments.one is not None:
        print(_RESULT + json.dumps(run_one(arguments.one, arguments, overrides)))
        return
    settings = {"rows": arguments.rows, "dev": arguments.dev, "epochs": arguments.epochs, "overrides": overrides}
    print(describe_machine(), flush=True)
    known = {told["method"]: told for told in kept(arguments.results) if told["settings"] == settings}
    failed = False
    for name in arguments.methods.split(";") if arguments.methods else METHODS:
        if name not in METHODS:
            raise SystemExit(f"There is no method {name!r}. There are: {'; '.join(METHODS)}.")
        if name in known and (arguments.no_answers or "score" in known[name]):
            continue
        figures = measure(name, arguments, overrides)
        if figures is None:
            print(f"{name} failed", flush=True)
            failed = True
            continue
        known[name] = {"method": name, "settings": settings, "machine": describe_machine(), **figures}
        if arguments.results is not None:
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(known[name], ensure_ascii=False) + "\n")
        print(f"{name}: dev loss {known[name]['dev_loss']:.3f}", flush=True)
    print_table([known[name] for name in METHODS if name in known])
    raise SystemExit(int(failed))


def kept(results: Path | None) -> list[dict[str, Any]]:
    """What the results file holds; nothing where there is none."""
    if results is None or not results.exists():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def print_table(found: list[dict[str, Any]]) -> None:
    """The figures of every method; memory and speed as multiples of LoRA's as well, where that was measured."""
    usual = next((told for told in found if told["method"] == REFERENCE), None)
    print("\n| " + " | ".join(_COLUMNS) + " |\n|" + "---|" * len(_COLUMNS))
    for told in found:
        cells = [told["method"], *["–"] * 4]
        if "score" in told:
            cells[1:] = [*(f"{told[key]:.3f}" for key in ("score", "triples", "labels")), f"{told['in_form']:.0%}"]
        cells.append(f"{told['dev_loss']:.2f}")
        if told["method"] == "untuned":
            cells += ["–"] * 4
        else:
            cells += [f"{told['trainable']:,}", f"{told['adapter_bytes'] / 1e6:.1f}"]
            for key, unit, digits in (("memory", 2**30, 1), ("tokens_per_second", 1, 0)):
                of_usual = f" ({told[key] / usual[key]:.2f} ×)" if usual is not None else ""
                cells.append(f"{told[key] / unit:.{digits}f}{of_usual}")
        print("| " + " | ".join(cells) + " |")


def measure(name: str, arguments: argparse.Namespace, overrides: list[str]) -> dict[str, Any] | None:
    """The figures of one method, from a process of its own; None where it failed, which it says itself."""
    command = [sys.executable, os.path.abspath(__file__), "--one", name, "--dev", str(arguments.dev)]
    command += ["--epochs", str(arguments.epochs)]
    command += [] if arguments.rows is None else ["--rows", str(arguments.rows)]
    command += ["--no-answers"] if arguments.no_answers else []
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*command, *overrides], cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    return json.loads(lines[-1].removeprefix(_RESULT)) if done.returncode == 0 and lines else None


@dataclass(slots=True)
class Clock:
    """Follows a training: how long its steps took, and what memory it had come to before anything was answered."""

    steps: int = 0
    spent: float = 0.0
    memory: int = 0
    _since: float = 0.0

    def begin(self, step: int, steps: int) -> None:
        """Training begins."""
        self._since = seconds()

    def advance(self, step: int) -> None:
        """One optimiser step is done."""
        self.steps, self.spent = step, seconds() - self._since
        self.memory = peak_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def record(self, line: Mapping[str, Any]) -> None:
        """Losses are of no interest here."""

    def show_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Nor are samples."""

    def drew(self, step: int, path: Path) -> None:
        """Nor is the curve."""


def run_one(name: str, arguments: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Tune in this folder, answer the dev rows held to the form and free, and say what came of it."""
    recipe = make_recipe(recipe_of(name, arguments), overrides)
    console, clock = Console(stderr=True), Clock()
    prepared = prepare(recipe, console=console)
    base, trainable = base_model(prepared.model), count_parameters(prepared.model)[0]
    attention = base.config._attn_implementation
    run = RunFolder.create(Path("runs") / recipe.name, resume=False)
    if METHODS[name] is not None:  # LoRA that has learnt nothing is the untuned model
        train(
            prepared.model,
            prepared.train_rows.examples,
            prepared.weights,
            [],
            settings=recipe.train.model_copy(update={"evaluate_every": "never"}),
            run=run,
            tasks=prepared.train_tasks,
            followers=[clock],
            console=console,
        )
    base.set_attn_implementation(attention)
    trained = TrainedModel(base, packing=True)
    dev = prepared.scored_examples(recipe.train)
    figures: dict[str, Any] = {"dev_loss": dev_loss(trained, dev, [], recipe.train)[0]}
    for held in () if arguments.no_answers else (True, False):
        way = recipe.model_copy(update={"generate": recipe.generate.model_copy(update={"constrain": held})})
        on_eval = make_on_eval(way, prepared)
        assert on_eval is not None, "the recipe has dev rows"
        with trained.generating() as generating:
            tasks = on_eval(generating).tasks
        scores = {task: values["primary"] for task, values in tasks.items()}
        if held:
            figures |= {**scores, "score": sum(scores.values()) / len(scores)}
        else:
            asked = [prepared.dev_task(place).name for place in prepared.scored(recipe.train)]
            valid = sum(tasks[task]["valid"] for task in asked) / len(asked)
            figures |= {"in_form": valid, "free": scores}
    if METHODS[name] is not None:
        order = step_rows(prepared.weights, batch_size=recipe.train.batch_size, seed=recipe.train.seed, first_step=0)
        lengths = [len(example) for example in prepared.train_rows.examples]
        figures |= {
            "trainable": trainable,
            "memory": clock.memory,
            "tokens_per_second": sum(lengths[row] for _, rows in islice(order, clock.steps) for row in rows)
            / clock.spent,
            "adapter_bytes": sum(file.stat().st_size for file in run.adapter.glob("*.safetensors")),
        }
    return figures


def recipe_of(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A recipe that tunes by the method `name`."""
    return {
        "name": "measured",
        "model": "starter",
        "data": {
            "train": [{"path": str(DATA / "train.jsonl"), "limit": arguments.rows}],
            "dev": [{"path": str(DATA / "dev.jsonl")}],
        },
        "method": METHODS[name] or {},
        "train": {
            "epochs": arguments.epochs,
            "evaluate_every": "epoch",
            "evaluate_rows": arguments.dev,
            "save_every": 10**9,
            "compile": "never",
        },
    }


if __name__ == "__main__":
    main()
