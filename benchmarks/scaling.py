"""Tokens per second of two processes with one thread each, and of one with one thread; the same steps, in turns.

    python benchmarks/scaling.py

A random Qwen2 of about 60 million parameters with LoRA as by default, in float32; steps of 16 rows of 60 to 400 tokens.
Each turn is a torchrun of its own (one process is launched like two), and takes the same steps; the first two are not
timed. The efficiency is the rate of two over twice the rate of one, by the medians: by the clock, and by the processor
time that each step takes in the process that takes longest, in which other programs on the machine do not count. Exits
with 1 when the latter is below 0.9 or the losses differ.
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
from typing import Any

TARGET, TOLERANCE = 0.9, 1e-4
_UNTIMED = 2


def take_turn(steps: int) -> None:
    """Train as one of those that torchrun launched; the first prints its figures as a line of JSON."""
    import torch
    from machine import seconds
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
    settings, draw = Train(tokens_per_pass=2048), random.Random(1)
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
        if ranks.is_first:
            by_clock = tokens / (time.perf_counter() - started)
            print(json.dumps({"clock": by_clock, "processor": tokens / slowest, "losses": losses}), flush=True)


def launch(processes: int, steps: int) -> dict[str, Any]:
    """The figures of one turn by so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, __file__, "--steps", str(steps), "--turn"],
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
    parser.add_argument("--turn", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turn:
        take_turn(arguments.steps)
        return
    from machine import describe_machine

    print(describe_machine())
    turns: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for number in range(arguments.rounds):
        for processes in (1, 2) if number % 2 == 0 else (2, 1):
            turn = launch(processes, arguments.steps)
            turns[processes].append(turn)
            rates = f"{turn['clock']:.0f} tokens/s by the clock, {turn['processor']:.0f} by processor time"
            print(f"{processes} × 1 thread: {rates}")
    for by in ("clock", "processor"):
        one, two = (statistics.median(turn[by] for turn in turns[processes]) for processes in (1, 2))
        efficiency = two / (2 * one)
        print(f"by {by}: medians {one:.0f} and {two:.0f} tokens/s, efficiency {efficiency:.3f}")
    apart = max(abs(a - b) for a, b in zip(turns[1][0]["losses"], turns[2][0]["losses"], strict=True))
    print(f"losses differ by at most {apart:.1e}")
    sys.exit(efficiency < TARGET or apart > TOLERANCE)


if __name__ == "__main__":
    main()
