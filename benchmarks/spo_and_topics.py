"""The main job on `shared/data/spo_and_topics`: train the starter model with the defaults, score it on the dev rows.

    python benchmarks/spo_and_topics.py [--seeds 42,1,2] [train.learning_rate=3e-4 …]

Runs the verbs a user runs, once for each seed, and prints the scores, the share of answers in the labelled form with
the constraint and without, and the wall time. The dev set has 51 rows of triples, so that one seed moves their F1 by
0.02: with several seeds the targets are held to the means. Topics accuracy 0.88, triples strict micro-F1 0.52, 98 % in
the labelled form; each of them both for answers held to the form and for what the model writes by itself. Exits with 1
when one is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean

from machine import describe_machine

DATA = Path(__file__).parents[2] / "shared/data/spo_and_topics"
TARGETS = {"labels": 0.88, "triples": 0.52}
LEAST_VALID = 0.98
FREE = "tuned, unconstrained"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="42", help="seeds of order and adapter, with commas between them")
    arguments, overrides = parser.parse_known_args()
    print(describe_machine(), flush=True)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for seed in arguments.seeds.split(","):
        for key, value in run_once(seed, overrides).items():
            found[key].append(value)
    missed = []
    for (task, what), values in found.items():
        least = TARGETS[task] if what.startswith("score") else LEAST_VALID
        each = " ".join(f"{value:.3f}" for value in values)
        print(f"{task}: {what} {mean(values):.3f} ({each}), wanted {least}")
        if mean(values) < least:
            missed.append(f"{task} {what}")
    print("missed: " + ", ".join(missed) if missed else "every target is met")
    raise SystemExit(int(bool(missed)))


def run_once(seed: str, overrides: list[str]) -> dict[tuple[str, str], float]:
    """The figures of one run, by task and what they say."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "spo_and_topics.yaml"
        sources = {"train": str(DATA / "train.jsonl"), "dev": str(DATA / "dev.jsonl")}
        settings = {"epochs": 3, "evaluate_every": "never", "seed": int(seed)}
        method = {"name": "lora", "rank": 16, "targets": "all-linear"}
        recipe.write_text(json.dumps({"model": "starter", "data": sources, "method": method, "train": settings}))
        started = time.monotonic()
        weitiao(folder, "train", recipe.name, *overrides)
        trained = time.monotonic()
        weitiao(folder, "evaluate", "runs/spo_and_topics", "--no-base", "--unconstrained")
        scored = time.monotonic()
        report = json.loads((Path(folder) / "runs/spo_and_topics/evaluations/dev/report.json").read_text("utf-8"))
    print(f"seed {seed}: train {trained - started:.0f} s, score twice {scored - trained:.0f} s, loading included")
    figures: dict[tuple[str, str], float] = {}
    for side, suffix in (("tuned", ""), (FREE, ", unconstrained")):
        for score in report["sides"][side]["scores"]:
            figures[score["task"], f"score{suffix}"] = score["metrics"][score["primary"]]
            figures[score["task"], f"in form{suffix}"] = score["metrics"]["valid"]
    for name, value in figures.items():
        print(f"  {name[0]}: {name[1]} {value:.3f}", flush=True)
    return figures


def weitiao(folder: str, *arguments: str) -> None:
    """Run one verb in `folder`; leave when it fails."""
    subprocess.run([sys.executable, "-m", "weitiao", *arguments], cwd=folder, check=True)


if __name__ == "__main__":
    main()
