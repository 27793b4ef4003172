"""Training speed of weitiao and of its peers: same model, rows, adapter, optimiser; one run, alternating.

    python benchmarks/train_speed.py --rows ../shared/data/spo_and_topics/train.jsonl

Every side runs in a process of its own (so peak memory is its own), `--rounds` times in turn. Printed: real tokens
per second (padding does not count), peak memory, the loss of every optimiser step (they must agree, else the
comparison is void), and the share of this machine's own matrix-product peak that weitiao's step reaches. Exits with 1
when a target is missed: 25 × the seeds' loop, 5 × Trainer, 4 × the better of TRL's settings, less memory than each.
`trl_patched` is no setting of TRL's but a subclass with another loss: shown, and held to no target.

The seeds' loop takes over a minute a step, so it runs `--seed-steps` steps only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from train_speed_peers import Setting, StepRecorder
from train_speed_rows import LEARNING_RATE, load_initial_adapter, plan_steps, read_token_rows, write_initial_adapter

from weitiao.models.opening import open_model
from weitiao.models.starter import starter_folder
from weitiao.recipe import Lora, Train
from weitiao.render.base import Example
from weitiao.train.batches import ROUND_TOKENS, make_batches
from weitiao.train.model import TrainedModel, can_compile
from weitiao.tuning.methods import add_adapter

ROWS = Path(__file__).parents[2] / "shared/data/spo_and_topics/train.jsonl"
PEERS = ("seed", "trainer", "trl_default", "trl_best", "trl_patched")
TARGETS = {"seed": 25.0, "trainer": 5.0, "trl": 4.0}
TOKENS_PER_PASS = Train.model_fields["tokens_per_pass"].default
"""weitiao's own default."""
LOSS_TOLERANCE = 0.05
"""Relative difference of the mean loss that bfloat16 rounding explains; a wrong mask or normalisation is far beyond."""


def run_weitiao(options: argparse.Namespace) -> None:
    """Train `options.steps` steps with weitiao's own training step and print the peers' JSON lines."""
    opened = open_model(str(options.model))
    model = add_adapter(opened.model, Lora(rank=16, alpha=32, dropout=0.0), seed=0)  # type: ignore[arg-type]
    load_initial_adapter(model, options.adapter)
    trained = TrainedModel(model.get_base_model(), packing=True)
    rows = read_token_rows(options.rows, opened.tokenizer)
    steps = plan_steps(rows, num_steps=options.steps, seed=options.seed)
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learnt, lr=LEARNING_RATE, weight_decay=0.0)
    compiled = options.compile and can_compile()
    recorder = StepRecorder(steps, sys.stdout)
    trained.train()
    if compiled:
        # Compiling is paid once per machine and version; it is stated apart, not spread over a few steps.
        started = time.perf_counter()
        trained.compile_layers()
        for batch in _batches(steps[0]):
            trained(batch).backward()
        optimiser.zero_grad()
        print(f"compiled in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    recorder.begin_training()
    for rows_of_step in steps:
        for batch in _batches(rows_of_step):
            loss = trained(batch)
            loss.backward()
            recorder.add_micro_batch_loss(loss.item())
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        recorder.end_step()
    recorder.write_summary("weitiao", Setting(rows_per_batch=16, weights="bfloat16", compiled=compiled))


def _batches(rows: Any) -> Any:
    examples = [Example(token_ids=row.input_ids, loss_mask=tuple(label >= 0 for label in row.labels)) for row in rows]
    return make_batches(examples, tokens_per_pass=TOKENS_PER_PASS, round_to=ROUND_TOKENS)


def measure(side: str, options: argparse.Namespace, adapter: Path) -> list[dict[str, Any]]:
    """Run one side in its own process; its JSON lines, the summary last."""
    steps = options.seed_steps if side == "seed" else options.steps
    script = "train_speed.py" if side.startswith("weitiao") else "train_speed_peers.py"
    verb = (
        ["--only-weitiao", *(["--no-compile"] if side == "weitiao_eager" else [])]
        if script == "train_speed.py"
        else [side]
    )
    command = [sys.executable, str(Path(__file__).parent / script), *verb, "--model", str(options.model),
               "--rows", str(options.rows), "--adapter", str(adapter), "--steps", str(steps),
               "--seed", str(options.seed)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def matrix_peak() -> float:
    """The fastest bfloat16 matrix product of this machine in GFLOP/s, over the shapes of the model and a square one."""
    best = 0.0
    for m, k, n in ((2048, 640, 2048), (2048, 2048, 640), (2048, 2048, 2048), (512, 640, 262144)):
        a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
        out = torch.mm(a, b.t())
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < 0.5:
            torch.mm(a, b.t(), out=out)
            count += 1
        best = max(best, 2 * m * k * n * count / (time.perf_counter() - started) / 1e9)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="default: the starter model")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--adapter", type=Path, help="made afresh when not given")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed-steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sides", nargs="+", default=["weitiao", "weitiao_eager", *PEERS])
    parser.add_argument("--only-weitiao", action="store_true", help="run weitiao's side in this process")
    parser.add_argument("--only-peak", action="store_true", help="measure the matrix-product peak in this process")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    options = parser.parse_args()
    options.model = options.model or starter_folder()
    if options.only_weitiao:
        run_weitiao(options)
        return
    if options.only_peak:
        print(matrix_peak())
        return

    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        adapter = options.adapter or Path(folder) / "initial.safetensors"
        if options.adapter is None:
            write_initial_adapter(options.model, adapter, seed=options.seed)
        runs: dict[str, list[list[dict[str, Any]]]] = {side: [] for side in options.sides}
        for number in range(options.rounds):
            for side in options.sides:
                lines = measure(side, options, adapter)
                runs[side].append(lines)
                speed = lines[-1]["tokens_per_second"]
                print(
                    f"round {number + 1} {side}: {speed:.1f} tokens/s, peak {lines[-1]['peak_rss_mb']:.0f} MB",
                    flush=True,
                )
    raise SystemExit(report(runs, options))


def report(runs: dict[str, list[list[dict[str, Any]]]], options: argparse.Namespace) -> int:
    """Print the table, the losses and the share of the peak; 1 when a target is missed, else 0."""
    speed = {side: max(lines[-1]["tokens_per_second"] for lines in rounds) for side, rounds in runs.items()}
    memory = {side: min(lines[-1]["peak_rss_mb"] for lines in rounds) for side, rounds in runs.items()}
    losses = {side: [line["loss"] for line in rounds[0][:-1]] for side, rounds in runs.items()}
    print("\n| side | real tokens/s | weitiao is | peak memory MB | mean loss |\n|---|---|---|---|---|")
    for side in runs:
        mean = sum(losses[side]) / len(losses[side])
        ratio = speed["weitiao"] / speed[side]
        print(
            f"| {side} | {speed[side]:.1f} | {ratio:.1f} × | {memory[side]:.0f} "
            f"| {mean:.4f} ({len(losses[side])} steps) |"
        )
    print("\nloss of every step:")
    for step in range(max(map(len, losses.values()))):
        print(step + 1, *(f"{side} {values[step]:.4f}" for side, values in losses.items() if step < len(values)))
    failures = []
    for side, values in losses.items():
        own = losses["weitiao"][: len(values)]
        off = abs(sum(values) - sum(own)) / sum(own)
        if off > LOSS_TOLERANCE:
            failures.append(f"the losses of {side} differ by {off:.1%}: its comparison is void")
        if side in PEERS and side != "trl_patched" and memory[side] <= memory["weitiao"]:
            failures.append(f"{side} needs less memory")
    trl = max((speed[side] for side in ("trl_default", "trl_best") if side in speed), default=None)
    for name, base in (("seed", speed.get("seed")), ("trainer", speed.get("trainer")), ("trl", trl)):
        if base is not None and speed["weitiao"] / base < TARGETS[name]:
            failures.append(f"{speed['weitiao'] / base:.1f} × {name}, wanted {TARGETS[name]:.0f} ×")
    _print_share(speed["weitiao"], runs["weitiao"][0], options)
    print("\n".join(["missed:", *failures]) if failures else "every target is met")
    return int(bool(failures))


def _print_share(speed: float, lines: list[dict[str, Any]], options: argparse.Namespace) -> None:
    opened = open_model(str(options.model))
    head = opened.model.get_output_embeddings().weight.numel()  # type: ignore[operator]
    body = sum(parameter.numel() for parameter in opened.model.parameters()) - head
    steps = plan_steps(read_token_rows(options.rows, opened.tokenizer), num_steps=options.steps, seed=options.seed)
    rows = [row for step in steps[1:] for row in step]
    supervised = sum(row.num_supervised_tokens for row in rows) / sum(len(row.input_ids) for row in rows)
    flop_per_token = 4 * body + 4 * head * supervised
    command = [sys.executable, __file__, "--only-peak", "--model", str(options.model)]
    peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(
        f"\nmatrix-product peak {peak:.0f} GFLOP/s; a step needs {flop_per_token / 1e9:.2f} GFLOP per token "
        f"({supervised:.0%} of them supervised) and reaches {speed * flop_per_token / 1e9:.0f} GFLOP/s, "
        f"{speed * flop_per_token / 1e9 / peak:.0%} of the peak"
    )


if __name__ == "__main__":
    main()
