"""The starter model held packed in every way that is installed here: memory, speed and score of a short LoRA run.

    OMP_NUM_THREADS=1 python benchmarks/quantised.py [--rows 100] [--dev 20] [--epochs 1] [--kinds none,bnb_nf4_double]

Each way runs in a process of its own: the base model is opened, LoRA learns on it by its defaults from rows of
`shared/data/spo_and_topics`, and answers dev rows held to their form.

load         seconds to open the base model
held         memory of its weights, scales included
resident     what the process holds more after opening than before, the libraries' own parts included
train        tokens of training rows a second, over all steps
generate     tokens a second, 16 rows together, 32 new tokens each
score        mean of both tasks' figures, on the base model as it was packed
unpacked     how far the logits move when the weights are unpacked, in standard deviations: what merging costs
on float     the same where the base model's own weights take their place under the same adapter

Times are of the processor where torch has one thread, so that other programs on the machine do not count.
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
from pathlib import Path
from typing import Any

import psutil
import torch
from machine import describe_machine, seconds
from peft import PeftModel
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from weitiao.dev_scoring import make_on_eval
from weitiao.generate.engine import Sampling, generate
from weitiao.models.adapters import base_model
from weitiao.models.opening import open_model
from weitiao.models.packed_layers import held_bytes, unpack_model
from weitiao.models.quantizing import PACKINGS
from weitiao.preparation import Prepared, prepare
from weitiao.recipe import Recipe, make_recipe
from weitiao.runs import RunFolder, Sample
from weitiao.train.loop import train

DATA = Path(__file__).parents[2] / "shared/data/spo_and_topics"
_RESULT = "result: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100, help="train rows")
    parser.add_argument("--dev", type=int, default=20, help="dev rows that are scored")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--kinds", default=",".join(("none", *PACKINGS)), help="ways to pack, with commas between")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(_RESULT + json.dumps(run_one(arguments.one, arguments)))
        return
    print(describe_machine())
    print(f"{arguments.rows} rows, {arguments.epochs:g} epochs, {arguments.dev} dev rows\n", flush=True)
    print("| quantize | load s | held MB | resident MB | train tok/s | generate tok/s | score | unpacked | on float |")
    print("|---" * 9 + "|", flush=True)
    failed = False
    for kind in arguments.kinds.split(","):
        told = measure(kind, arguments)
        failed = failed or told is None
        print(f"| {kind} | failed |" if told is None else line_of(kind, told), flush=True)
    raise SystemExit(int(failed))


def line_of(kind: str, told: Mapping[str, float]) -> str:
    """One row of the table."""
    cells = [f"{told['load']:.1f}", f"{told['held'] / 1e6:.0f}", f"{told['resident'] / 1e6:.0f}"]
    cells += [f"{told['train']:.0f}", f"{told['generate']:.0f}", f"{told['score']:.3f}"]
    cells += ["–", "–"] if kind == "none" else [f"{told['unpacked']:.3f}", f"{told['on_float']:.3f}"]
    return f"| {kind} | {' | '.join(cells)} |"


def measure(kind: str, arguments: argparse.Namespace) -> dict[str, float] | None:
    """The figures of one way, from a process of its own; None where it failed, which it says itself."""
    command = [sys.executable, os.path.abspath(__file__), "--one", kind, "--dev", str(arguments.dev)]
    command += ["--epochs", str(arguments.epochs), "--rows", str(arguments.rows)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    return json.loads(lines[-1].removeprefix(_RESULT)) if done.returncode == 0 and lines else None


@dataclass(slots=True)
class Clock:
    """Follows a training: the time of its steps."""

    spent: float = 0.0
    _since: float = 0.0

    def begin(self, step: int, steps: int) -> None:
        """Training begins."""
        self._since = seconds()

    def advance(self, step: int) -> None:
        """One optimiser step is done."""
        self.spent = seconds() - self._since

    def record(self, line: Mapping[str, Any]) -> None:
        """Losses are of no interest here."""

    def show_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Nor are samples."""

    def drew(self, step: int, path: Path) -> None:
        """Nor is the curve."""


def run_one(kind: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Open, tune in this folder, generate, answer, unpack; and answer with the base model's own weights."""
    figures: dict[str, float] = {}
    process = psutil.Process()
    before, since = process.memory_info().rss, seconds()
    base = open_model("starter", quantize=kind).model
    figures |= {"load": seconds() - since, "held": held_bytes(base)}
    figures["resident"] = process.memory_info().rss - before
    del base

    recipe, clock = make_recipe(recipe_of(kind, arguments)), Clock()
    prepared = prepare(recipe, console=Console(stderr=True))
    run = RunFolder.create(Path("runs") / recipe.name, resume=False)
    settings = recipe.train.model_copy(update={"evaluate_every": "never"})
    examples = prepared.train_rows.examples
    quiet = Console(stderr=True)
    train(prepared.model, examples, prepared.weights, [], settings=settings, run=run, followers=[clock], console=quiet)
    figures["train"] = arguments.epochs * sum(len(example) for example in examples) / clock.spent

    tuned = open_model("starter", adapter=run.adapter, quantize=kind).model
    prompts = [list(example.token_ids[: example.loss_mask.index(True)]) for example in prepared.dev_rows.examples[:16]]
    since = seconds()
    answers = list(generate(tuned, prompts, stop_ids=[], sampling=Sampling(max_new_tokens=32), max_rows=16))
    figures["generate"] = sum(len(answer.token_ids) for answer in answers) / (seconds() - since)
    figures["score"] = score(recipe, prepared, tuned)
    if kind != "none":
        theirs = logits_of(tuned, prompts)
        unpack_model(tuned, torch.bfloat16)
        figures["unpacked"] = difference(logits_of(tuned, prompts), theirs)
        floats = open_model("starter", adapter=run.adapter).model
        figures["on_float"] = difference(logits_of(floats, prompts), theirs)
    return figures


@torch.no_grad()
def logits_of(model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Logits of the last places of each prompt ``[tokens, vocabulary]``, as float32."""
    return torch.cat([model(torch.tensor([prompt[-64:]])).logits[0, -16:].float() for prompt in prompts])


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Root mean square of what logits differ by, in standard deviations of `theirs`."""
    return float((ours - theirs).pow(2).mean().sqrt() / theirs.std())


def score(recipe: Recipe, prepared: Prepared, model: PreTrainedModel | PeftModel) -> float:
    """The mean of the tasks' own figures over the dev rows, answers held to their form."""
    on_eval = make_on_eval(recipe, prepared)
    assert on_eval is not None, "the recipe has dev rows"
    tasks = on_eval(base_model(model)).tasks  # the adapter's layers stay in it
    return sum(float(values["primary"]) for values in tasks.values()) / len(tasks)


def recipe_of(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A recipe that tunes the starter model packed so."""
    return {
        "name": "measured",
        "model": {"path": "starter", "quantize": kind},
        "data": {
            "train": [{"path": str(DATA / "train.jsonl"), "limit": arguments.rows}],
            "dev": [{"path": str(DATA / "dev.jsonl")}],
        },
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
