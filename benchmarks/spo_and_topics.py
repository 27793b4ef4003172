"""The main job on `shared/data/spo_and_topics`: train the starter model with the defaults, score it on the dev rows.

    python benchmarks/spo_and_topics.py [train.learning_rate=3e-4 …]

Runs the verbs a user runs, prints the scores, the share of answers in the labelled form and the wall time, and exits
with 1 when a target is missed: topics accuracy 0.88, triples strict micro-F1 0.52, 98 % in the labelled form.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe_machine

DATA = Path(__file__).parents[2] / "shared/data/spo_and_topics"
TARGETS = {"labels": 0.88, "triples": 0.52}
LEAST_VALID = 0.98


def main() -> None:
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "spo_and_topics.yaml"
        sources = {"train": str(DATA / "train.jsonl"), "dev": str(DATA / "dev.jsonl")}
        settings = {"epochs": 3, "evaluate_every": "never"}
        method = {"name": "lora", "rank": 16, "targets": "all-linear"}
        recipe.write_text(json.dumps({"model": "starter", "data": sources, "method": method, "train": settings}))
        started = time.monotonic()
        weitiao(folder, "train", recipe.name, *sys.argv[1:])
        trained = time.monotonic()
        weitiao(folder, "evaluate", "runs/spo_and_topics", "--no-base")
        scored = time.monotonic()
        report = json.loads((Path(folder) / "runs/spo_and_topics/evaluations/dev/report.json").read_text("utf-8"))
    print(f"train {trained - started:.0f} s, score {scored - trained:.0f} s, loading included")
    missed = []
    for score in report["sides"]["tuned"]["scores"]:
        value, valid = score["metrics"][score["primary"]], score["metrics"]["valid"]
        print(f"{score['task']}: {score['primary']} {value:.3f}, in form {valid:.1%}, {score['rows']} rows")
        if value < TARGETS[score["task"]] or valid < LEAST_VALID:
            missed.append(score["task"])
    print("missed: " + ", ".join(missed) if missed else "every target is met")
    raise SystemExit(int(bool(missed)))


def weitiao(folder: str, *arguments: str) -> None:
    """Run one verb in `folder`; leave when it fails."""
    subprocess.run([sys.executable, "-m", "weitiao", *arguments], cwd=folder, check=True)


if __name__ == "__main__":
    main()
