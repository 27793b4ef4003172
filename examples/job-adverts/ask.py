"""Asks a model that was never tuned for what job adverts require: one answered advert as an example, then the question.

python examples/job-adverts/ask.py                        the model of the recipe, which is small and errs much
python examples/job-adverts/ask.py Qwen/Qwen3-4B 4        any other model, with four examples
"""

from __future__ import annotations

import json
import sys

from weitiao.prompting import prompt_model
from weitiao.recipe import load_recipe

FOLDER = "examples/job-adverts"


def main(words: list[str]) -> None:
    model, shots = (words[0] if words else "starter"), (int(words[1]) if len(words) > 1 else 1)
    recipe = load_recipe(f"{FOLDER}/recipe.yaml", [f"model={model}"])
    told = prompt_model(recipe, rows=f"{FOLDER}/new.jsonl", out="runs/job-adverts.jsonl", shots=shots)
    for line in told.lines:
        print(line["input"])
        print(json.dumps(line["answer"], ensure_ascii=False) if line["valid"] else f"no answer: {line['reason']}")
        print()
    print(f"{told.num_valid} of {len(told.lines)} answers have the labelled form. They are in runs/job-adverts.jsonl.")


if __name__ == "__main__":
    main(sys.argv[1:])
