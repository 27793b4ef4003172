"""Tokens per second of two processes with one thread each, and of one with one thread; the same steps, in turns.

    python benchmarks/scaling.py

A random Qwen2 of about 60 million parameters with LoRA as by default, in float32; steps of 16 rows of 60 to 400 tokens.
Each turn is a torchrun of its own (one process is launched like two), and takes the same steps; the first two are not
timed. The efficiency is the rate of two over twice the rate of one, by the medians: by the clock, and by the processor
time that each step takes in the process that takes longest, in which other programs on the machine do not count. Each
round two processes also take the steps with the weights spread over them (train.shard: fsdp): what that costs, and the
bytes of weights that a process then holds between passes. Exits with 1 when the efficiency by processor time is below
0.9 or the losses differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from typing import Any, Literal

TARGET, TOLERANCE = 0.9, 1e-4
_UNTIMED = 2


def take_turn(steps: int, shard: Literal["none", "fsdp"]) -> None:
    """Train as one of those that torchrun launched; the first prints its figures as a line of JSON."""
    import torch
    from machine import seconds
    from torch.distributed.tensor import DTensor
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from weitiao.launch import read_launch
    from weitiao.recipe import Lora, Train
    from weitiao.render.base import Example
    from weitiao.train.ranks import joined
    from weitiao.train.step import set_up, step_batches, take_step
    from weitiao.tuning.methods import add_adapter

    torch.set_num_threads(1)
    torch.manual_seed(1)
    shape = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = Qwen2Config(vocab_size=16_000, hidden_size=640, intermediate_size=2_304, **shape)
    model = add_adapter(Qwen2ForCausalLM(config), Lora(dropout=0.0), seed=1)
    settings, draw = Train(tokens_per_pass=2048, shard=shard), random.Random(1)
    with joined(read_launch()) as ranks:
        setup = set_up(model, settings, steps=steps, ranks=ranks)
        device, losses, taken, tokens, started = setup.accelerator.device, [], [], 0, 0.0
        for step in range(steps):
            if step == _UNTIMED:
                ranks.add(torch.zeros(1))  # all begin together
                taken, tokens, started = [], 0, time.perf_counter()
            lengths = [draw.randint(60, 400) for _ in range(16)]
            rows = [
                Example(
                    token_ids=tuple(draw.randrange(16_000) for _ in range(length)),
                    loss_mask=tuple(place >= length - 30 for place in range(length)),
                )
                for length in lengths
            ]
            begun = seconds()
            batches = step_batches(rows, [""] * len(rows), settings, device, ranks=ranks)
            losses.append(take_step(setup, batches, settings)[0])
            taken.append(seconds() - begun)
            tokens += sum(lengths)
        slowest = sum(max(step) for step in zip(*ranks.gather(taken), strict=True))
        parts = [p.to_local() if isinstance(p, DTensor) else p for p in setup.trained.parameters()]
        held = sum(part.numel() * part.element_size() for part in parts)
        if ranks.is_first:
            by_clock = tokens / (time.perf_counter() - started)
            told = {"clock": by_clock, "processor": tokens / slowest, "losses": losses, "held": held}
            print(json.dumps(told), flush=True)


def launch(processes: int, steps: int, shard: str = "none") -> dict[str, Any]:
    """The figures of one turn by so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, __file__, "--steps", str(steps), "--turn", shard],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Take turns and print what they gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn", choices=("none", "fsdp"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turn:
        take_turn(arguments.steps, arguments.turn)
        return
    from machine import describe_machine

    print(describe_machine())
    sides = {"one": (1, "none"), "two": (2, "none"), "two, spread": (2, "fsdp")}
    turns: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(arguments.rounds):
        for side in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            processes, shard = sides[side]
            turn = launch(processes, arguments.steps, shard)
            turns[side].append(turn)
            rates = f"{turn['clock']:.0f} tokens/s by the clock, {turn['processor']:.0f} by processor time"
            print(f"{side}: {rates}, {turn['held'] / 2**20:.0f} MB of weights in each process", flush=True)
    for by in ("clock", "processor"):
        one, two, spread = (statistics.median(turn[by] for turn in turns[side]) for side in sides)
        efficiency = two / (2 * one)
        print(f"by {by}: medians {one:.0f}, {two:.0f} and spread {spread:.0f} tokens/s; efficiency {efficiency:.3f}, "
              f"spread {spread / two:.3f} of not spread")  # fmt: skip
    apart = max(
        abs(a - b) for side in sides for a, b in zip(turns["one"][0]["losses"], turns[side][0]["losses"], strict=True)
    )
    print(f"losses differ by at most {apart:.1e}")
    sys.exit(efficiency < TARGET or apart > TOLERANCE)


if __name__ == "__main__":
    main()
