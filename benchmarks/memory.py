"""What the switches that save memory save, and what they cost: peak bytes and seconds of a step, side by side.

    python benchmarks/memory.py [--tokens 1536] [--steps 6] [--cases 'lora;lora, checkpointing'] [--tried]

The starter model, in a process of its own for each case, learns the same rows of `shared/data/spo_and_topics`, laid
end to end and cut so that every step is one pass of `--tokens`. `peak` is that of the process from the second step on,
`beyond` what that is above the process with the model loaded and nothing set up: activations, gradients, the
optimiser's state, buffers. Ratios are to the first case of the same method. `loss` is the mean of the last quarter of
the steps, all at one learning rate. With `--tried`, other kinds of selective checkpointing too, which the recipe does
not have.

With OMP_NUM_THREADS=1 seconds are those of the processor, which other programs do not lengthen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, seconds
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from train_speed_rows import read_token_rows

from weitiao.models.opening import open_model
from weitiao.recipe import Full, Lora, Train
from weitiao.render.base import Example
from weitiao.train.memory import peak_bytes
from weitiao.train.step import set_up, step_batches, take_step
from weitiao.tuning.methods import add_adapter

DATA = Path(__file__).parents[2] / "shared/data/spo_and_topics/train.jsonl"
IN_BACKWARD = {"update_in_backward": True, "max_grad_norm": None}
SWITCHES: dict[str, dict[str, Any]] = {
    "": {},
    "checkpointing selective": {"gradient_checkpointing": "selective"},
    "checkpointing": {"gradient_checkpointing": True},
    "in backward": IN_BACKWARD,
    "adamw_8bit": {"optimiser": "adamw_8bit"},
    "adafactor": {"optimiser": "adafactor"},
    "muon": {"optimiser": "muon"},
    "schedule_free_adamw": {"optimiser": "schedule_free_adamw", "schedule": "constant"},
    "checkpointing, adamw_8bit, in backward": {
        "gradient_checkpointing": True, "optimiser": "adamw_8bit", **IN_BACKWARD,
    },
    "checkpointing, adafactor, in backward": {
        "gradient_checkpointing": True, "optimiser": "adafactor", **IN_BACKWARD,
    },
}  # fmt: skip
KEPT = {
    "matrix products kept": {"mm", "addmm", "bmm"},
    "attention kept": {"packed_attention"},
    "both kept": {"mm", "addmm", "bmm", "packed_attention"},
}
"""Kinds of selective checkpointing that were tried: names of the operators whose outputs are kept."""

METHODS = {"lora": (Lora(), 5e-4), "full": (Full(), 2e-5)}
_RESULT = "result: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1536, help="of a step, which is one pass")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--cases", default=None, help="some of them, with semicolons between")
    parser.add_argument("--tried", action="store_true", help="other kinds of selective checkpointing too")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(_RESULT + json.dumps(measure(options.one, tokens=options.tokens, steps=options.steps)))
        return
    cases = [f"{method}, {switch}".removesuffix(", ") for method in METHODS for switch in SWITCHES]
    if options.tried:
        cases += [f"lora, {name}" for name in KEPT]
    if options.cases is not None:
        cases = options.cases.split(";")
    print(f"{describe_machine()}\n{options.steps} steps of {options.tokens} tokens\n")
    print(
        "| case | peak | beyond the model | ratio | seconds of a step | ratio | loss |\n|---|---|---|---|---|---|---|"
    )
    first: dict[str, dict[str, float]] = {}
    for case in cases:
        command = [sys.executable, __file__, "--one", case, "--tokens", str(options.tokens)]
        done = subprocess.run([*command, "--steps", str(options.steps)], capture_output=True, text=True, check=False)
        found = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
        if not found:
            print(f"| {case} | failed: {(done.stderr.strip().splitlines() or ['nothing was said'])[-1][:200]} |")
            continue
        told = json.loads(found[0].removeprefix(_RESULT))
        plain = first.setdefault(case.partition(",")[0], told)
        print(
            f"| {case} | {told['peak'] / 2**30:.2f} GB | {told['beyond'] / 2**30:.2f} GB "
            f"| {told['beyond'] / plain['beyond']:.2f} | {told['seconds']:.2f} "
            f"| {told['seconds'] / plain['seconds']:.2f} | {told['loss']:.3f} |",
            flush=True,
        )


def measure(case: str, *, tokens: int, steps: int) -> dict[str, float]:
    """Tune some steps in this process."""
    name, _, switch = case.partition(", ")
    method, rate = METHODS[name]
    settings = Train(
        **{
            "learning_rate": rate,
            "schedule": "constant",
            "tokens_per_pass": tokens,
            "batch_size": tokens // 256,
            **({"gradient_checkpointing": True} if switch in KEPT else SWITCHES[switch]),
        }
    )
    opened = open_model("starter", dtype="bfloat16")
    model = add_adapter(opened.model, method, seed=0)  # type: ignore[arg-type]
    rows = cut_rows(opened.tokenizer, length=256, count=settings.batch_size * steps)
    device = opened.model.device
    loaded = _start_watching(device)
    setup = set_up(model, settings, steps=steps)
    if switch in KEPT:
        keep_outputs_of(setup.trained.model, KEPT[switch])
    setup.trained.train()
    took, losses = [], []
    for number in range(steps):
        examples = rows[number * settings.batch_size : (number + 1) * settings.batch_size]
        started = seconds()
        batches = step_batches(examples, [""] * len(examples), settings, device)
        losses.append(take_step(setup, batches, settings)[0])
        took.append(seconds() - started)
        if number == 0:
            _start_watching(device)
    peak = peak_bytes(device)
    last = losses[-max(1, steps // 4) :]
    return {
        "peak": peak,
        "beyond": peak - loaded,
        "seconds": statistics.median(took[1:]),
        "loss": statistics.fmean(last),
    }


def cut_rows(tokenizer: Any, *, length: int, count: int) -> list[Example]:
    """Rows end to end, cut into `count` examples of `length` tokens; those of answers are learnt."""
    ids: list[int] = []
    learnt: list[bool] = []
    for row in read_token_rows(DATA, tokenizer):
        ids += row.input_ids
        learnt += [label >= 0 for label in row.labels]
    pieces = [slice(place, place + length) for place in range(0, len(ids) - length, length)]
    some = [piece for piece in pieces if any(learnt[piece][1:])][:count]
    return [Example(token_ids=tuple(ids[piece]), loss_mask=tuple(learnt[piece])) for piece in some]


def keep_outputs_of(model: Any, operators: set[str]) -> None:
    """Checkpoint the layers of `model`, the outputs of these operators excepted."""

    def policy(_context: Any, operator: Any, *_inputs: Any, **_options: Any) -> CheckpointPolicy:
        kept = getattr(operator, "_opname", str(operator)) in operators
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})


def _start_watching(device: torch.device) -> int:
    """Forget the peak so far; the bytes taken now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_reserved()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak of the process is what it is now
    return peak_bytes(device)


if __name__ == "__main__":
    main()
