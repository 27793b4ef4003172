"""Every way of tuning on `shared/data/spo_and_topics` with the starter model: score, size, memory, speed of each.

    python benchmarks/methods.py [--rows 200] [--dev 40] [--epochs 3] [--methods 'lora;full'] [train.seed=1 …]

Each method runs with its defaults, in a process of its own, and is scored once, at the end, by generation on the dev
rows, held to the form. `score` is the mean of both tasks' own figures; `memory` the peak of the process, dev scoring
included; `tokens/s` those of training rows, over all steps. Without --rows all train rows are learnt from.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import describe_machine

DATA = Path(__file__).parents[2] / "shared/data/spo_and_topics"
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora"},
    "lora, DoRA": {"name": "lora", "dora": True},
    "lora, rsLoRA": {"name": "lora", "rslora": True},
    "lora, PiSSA": {"name": "lora", "init": "pissa", "alpha": 16},
    "lora+": {"name": "lora", "b_learning_rate": 4},
    "ptuning_v2": {"name": "ptuning_v2"},
    "ptuning_v1": {"name": "ptuning_v1"},
    "prompt_tuning": {"name": "prompt_tuning"},
    "freeze": {"name": "freeze"},
    "full": {"name": "full"},
    "ia3": {"name": "ia3"},
}
_RESULT = "result: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=None, help="train rows; all by default")
    parser.add_argument("--dev", type=int, default=0, help="dev rows that are scored; all by default")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--methods", default=None, help="some of them, with semicolons between")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    if arguments.one is not None:
        print(_RESULT + json.dumps(run_one(json.loads(arguments.one), overrides)))
        return
    print(describe_machine(), flush=True)
    print(f"{'method':16} {'score':>6} {'triples':>8} {'topics':>7} {'trainable':>12} {'memory':>8} {'tokens/s':>9}")
    for name in arguments.methods.split(";") if arguments.methods else METHODS:
        told = measure(recipe_of(METHODS[name], arguments.rows, arguments.dev, arguments.epochs), overrides)
        if told is None:
            print(f"{name:16} failed", flush=True)
            continue
        figures = " ".join(f"{told[task]:>{width}.3f}" for task, width in (("triples", 8), ("labels", 7)))
        print(
            f"{name:16} {told['score']:6.3f} {figures} {told['trainable']:12,} {told['memory'] / 2**30:5.1f} GB "
            f"{told['tokens_per_second']:9.0f}",
            flush=True,
        )


def recipe_of(method: dict[str, Any], rows: int | None, dev: int, epochs: float) -> dict[str, Any]:
    """A recipe that tunes by `method` and scores at its end alone."""
    return {
        "name": "measured",
        "model": "starter",
        "data": {
            "train": [{"path": str(DATA / "train.jsonl"), "limit": rows}],
            "dev": [{"path": str(DATA / "dev.jsonl")}],
        },
        "method": method,
        "train": {"epochs": epochs, "evaluate_every": 10**9, "evaluate_rows": dev, "save_every": 10**9},
    }


def measure(recipe: dict[str, Any], overrides: list[str]) -> dict[str, Any] | None:
    """The figures of one method, from a process of its own; None where it failed, which it says itself."""
    command = [sys.executable, os.path.abspath(__file__), "--one", json.dumps(recipe), *overrides]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    return json.loads(lines[-1].removeprefix(_RESULT)) if done.returncode == 0 and lines else None


def run_one(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Tune in this folder, and say what came of it."""
    import torch

    from weitiao.recipe import make_recipe
    from weitiao.train.memory import peak_bytes
    from weitiao.tune import tune_model

    run = tune_model(make_recipe(values, overrides))
    lines = run.read_metrics()
    dev = [line for line in lines if line["kind"] == "dev"][-1]
    scores = {task: figures["primary"] for task, figures in dev["scores"].items()}
    train = [line for line in lines if line["kind"] == "train"]
    memory = peak_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        **scores,
        "score": sum(scores.values()) / len(scores),
        "losses": [round(line["loss"], 3) for line in train],
        "trainable": learning(values, overrides),
        "memory": memory,
        "tokens_per_second": train[-1]["tokens_per_second"],
        "adapter_bytes": sum(file.stat().st_size for file in run.adapter.glob("*.safetensors")),
    }


def learning(values: dict[str, Any], overrides: list[str]) -> int:
    """How many parameters learn; counted on a model of its own."""
    from weitiao.models.opening import open_model
    from weitiao.recipe import make_recipe
    from weitiao.tuning.methods import add_adapter, count_parameters

    recipe = make_recipe(values, overrides)
    model = open_model(recipe.model.path, dtype=recipe.model.dtype).model
    return count_parameters(add_adapter(model, recipe.method, seed=0))[0]  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
