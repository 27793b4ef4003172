"""Where a training step's time goes, and what share of the machine's matrix peak each phase reaches.

    python benchmarks/roofline.py --rows ../shared/data/spo_and_topics/train.jsonl

Starter model, LoRA and batches as by default; the same steps with eager and with compiled layers, as many threads as
OMP_NUM_THREADS says; with one, the processor's time is counted, whatever else runs on the machine. Sides named
"-before" take the same steps with all logits of some positions at once, and LoRA's products added one by one: what
the step falls back to where the faster ways do not apply. The peak is that of
the fastest bfloat16 product of several shapes. Only products that the loss and its gradient need are counted: the body
forward and its input gradients, LoRA's weight gradients, attention's visible scores, the head at learnt tokens; not
what is computed again, nor what fills passes up.

Attention and the body's bare products are measured apart, in the same shapes, one layer after the other: the rest of
the body is norms, activations, additions, rotary positions, copies, and LoRA's thin products.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
from machine import describe_machine
from machine import seconds as clock
from torch import Tensor, nn
from train_speed import ROWS
from train_speed_rows import plan_steps, read_token_rows

from weitiao.models.attention import packed_attention
from weitiao.models.lora_layers import LoraLinear
from weitiao.models.opening import open_model
from weitiao.models.starter import starter_folder
from weitiao.recipe import Lora, Train
from weitiao.render.base import Example
from weitiao.train.batches import Batch
from weitiao.train.loss import head_of, supervised_loss
from weitiao.train.step import Setup, set_up, step_batches
from weitiao.tuning.methods import add_adapter

SIDES = ("eager-before", "eager", "compiled-before", "compiled")
PHASES = ("layout", "body forward", "head and loss", "body backward", "optimiser")
INSIDE = ("attention forward", "attention backward", "products forward", "products backward")


class Stopwatch:
    """Seconds by phase, of one step after the other."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def begin_step(self) -> None:
        self.steps.append(defaultdict(float))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent within to `name`."""
        started = clock()
        yield
        self.steps[-1][name] += clock() - started

    def median(self, name: str) -> float:
        return statistics.median(step[name] for step in self.steps)


def run_step(setup: Setup, rows: Sequence[Example], settings: Train, watch: Stopwatch) -> list[Batch]:
    """One optimiser step as `take_step` takes it, its phases timed."""
    trained = setup.trained
    watch.begin_step()
    with watch.phase("layout"):
        batches = step_batches(rows, [""] * len(rows), settings, trained.model.device)
    for batch in batches:
        with watch.phase("body forward"):
            known = trained.rows_of(batch)
            output = trained.body(input_ids=batch.token_ids, position_ids=batch.positions, use_cache=False, **known)
            hidden = output.last_hidden_state[0].index_select(0, batch.predictors)
        with watch.phase("head and loss"):
            seen = hidden.detach().requires_grad_()
            supervised_loss(seen, batch.targets, batch.weights, head_of(trained.model)).backward()
        with watch.phase("body backward"):
            hidden.backward(seen.grad)
    with watch.phase("optimiser"):
        learnt = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        setup.accelerator.clip_grad_norm_(learnt, settings.max_grad_norm)
        setup.optimiser.step()
        setup.scheduler.step()
        setup.optimiser.zero_grad(set_to_none=True)
    return batches


@contextmanager
def without_faster_ways() -> Iterator[None]:
    """Within this the step computes as if its faster ways did not apply to the model."""
    with ExitStack() as changes:
        changes.enter_context(patch.object(LoraLinear, "_is_bare", lambda *_: False))
        changes.enter_context(patch("weitiao.train.loss.loss_by_blocks", lambda *_, **__: None))
        yield


def windows_of(model: nn.Module) -> list[int]:
    """The sliding window of each layer, 0 for none."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else 0 for kind in kinds]


def time_attention(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, float]:
    """Seconds of all layers' attention over `batches`, forward and backward."""
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    forward = backward = 0.0
    for batch in batches:
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        tokens = batch.token_ids.shape[1]
        q, k, v = (torch.randn(1, tokens, n, size).bfloat16().transpose(1, 2).requires_grad_() for n in heads)
        for window in windows_of(model):
            started = clock()
            out = packed_attention(q, k, v, batch.row_starts, size**-0.5, window)
            between = clock()
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
            forward += between - started
            backward += clock() - between
    return forward, backward


def time_products(weights: Sequence[Tensor], batches: Sequence[Batch]) -> tuple[float, float]:
    """Seconds of the frozen weights' bare products over `batches`: activations, and gradients of inputs."""
    forward = backward = 0.0
    for batch in batches:
        for weight in weights:
            x = torch.randn(batch.token_ids.shape[1], weight.shape[1]).to(weight.dtype)
            started = clock()
            y = torch.mm(x, weight.t())
            between = clock()
            torch.mm(y, weight)
            forward += between - started
            backward += clock() - between
    return forward, backward


def frozen_weights(model: nn.Module) -> list[Tensor]:
    """The matrices of the body that do not learn."""
    linear = [one for name, one in model.named_modules() if isinstance(one, nn.Linear) and "lora" not in name]
    return [one.weight for one in linear if one is not model.get_output_embeddings() and not one.weight.requires_grad]


def count_flop(model: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """The floating-point operations that each phase needs."""
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frozen = sum(weight.numel() for weight in frozen_weights(model))
    learnt = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    tokens = sum(batch.num_tokens for batch in batches)
    seen = 0
    for batch in batches:
        for a, b in pairwise(batch.row_starts.tolist()):
            for window in windows_of(model) if b <= batch.num_tokens else ():
                seen += sum(min(place + 1, window or place + 1) for place in range(b - a))
    scores = 2 * config.num_attention_heads * size * seen
    head = sum(len(batch.targets) for batch in batches) * model.get_output_embeddings().weight.numel()
    return {
        "body forward": 2 * (frozen + learnt) * tokens + 2 * scores,
        "head and loss": 4 * head,
        "body backward": (2 * frozen + 4 * learnt) * tokens + 4 * scores,
        "attention forward": 2 * scores,
        "attention backward": 4 * scores,
        "products forward": 2 * frozen * tokens,
        "products backward": 2 * frozen * tokens,
    }


def measure(options: argparse.Namespace, *, side: str, peak: float) -> float:
    """Print the table of one side; the share of the peak that its steps reach."""
    compiled = side.startswith("compiled")
    opened = open_model(str(options.model), dtype="bfloat16")
    model = add_adapter(opened.model, Lora(), seed=0)  # type: ignore[arg-type]
    settings = Train(learning_rate=1e-4)
    setup = set_up(model, settings, steps=1000)
    setup.trained.train()
    if compiled:
        torch._dynamo.reset()  # or else the graphs of the side before would be taken
        setup.trained.compile_layers()
    read = plan_steps(read_token_rows(options.rows, opened.tokenizer), num_steps=options.steps + 2, seed=0)
    steps = [
        [Example(token_ids=row.input_ids, loss_mask=tuple(label >= 0 for label in row.labels)) for row in rows]
        for rows in read
    ]
    run_step(setup, steps[0], settings, Stopwatch())
    run_step(setup, steps[1], settings, Stopwatch())
    watch, flop = Stopwatch(), defaultdict(list)
    num_tokens, num_filled = 0, 0
    for rows in steps[2:]:
        batches = run_step(setup, rows, settings, watch)
        base = setup.trained.model
        attention = time_attention(base, batches)
        products = time_products(frozen_weights(base), batches)
        watch.steps[-1].update(zip(INSIDE, (*attention, *products), strict=True))
        for name, count in count_flop(base, batches).items():
            flop[name].append(count)
        num_tokens += sum(batch.num_tokens for batch in batches)
        num_filled += sum(batch.token_ids.shape[1] for batch in batches)
    seconds = {name: watch.median(name) for name in (*PHASES, *INSIDE)}
    counted = {name: statistics.median(counts) for name, counts in flop.items()}
    whole = sum(seconds[name] for name in PHASES)
    needed = sum(counted.get(name, 0.0) for name in PHASES)
    print(
        f"\n{side}: {num_tokens / options.steps / whole:.0f} tokens/s, steps of "
        f"{num_tokens / options.steps:.0f} tokens ({num_filled / options.steps:.0f} computed)\n"
    )
    print("| phase | ms | of the step | GFLOP | GFLOP/s | of the peak |\n|---|---|---|---|---|---|")
    rest = {"forward": 0.0, "backward": 0.0}
    for way in rest:
        rest[way] = seconds[f"body {way}"] - seconds[f"attention {way}"] - seconds[f"products {way}"]
    for name in PHASES:
        _print_line(name, seconds[name], counted.get(name, 0.0), whole, peak)
        way = name.removeprefix("body ")
        if way in rest:
            for part in ("products", "attention"):
                _print_line(f"… {part}", seconds[f"{part} {way}"], counted[f"{part} {way}"], whole, peak)
            _print_line("… all else", rest[way], 0.0, whole, peak)
    _print_line("whole step", whole, needed, whole, peak)
    return needed / whole / 1e9 / peak


def _print_line(name: str, seconds: float, flop: float, whole: float, peak: float) -> None:
    speed = flop / seconds / 1e9 if seconds > 0 else 0.0
    figures = f"{flop / 1e9:.1f} | {speed:.0f} | {speed / peak:.0%}" if flop else "– | – | –"
    print(f"| {name} | {seconds * 1e3:.0f} | {seconds / whole:.0%} | {figures} |", flush=True)


def matrix_peak() -> float:
    """The fastest bfloat16 product here in GFLOP/s, over the shapes of the starter model and square ones."""
    best = 0.0
    for m, k, n in ((1536, 640, 2048), (1536, 2048, 640), (1536, 640, 1024), (2048, 2048, 2048), (1024, 1024, 1024)):
        a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
        out = torch.mm(a, b.t())
        for _ in range(5):
            started = clock()
            for _ in range(8):
                torch.mm(a, b.t(), out=out)
            best = max(best, 8 * 2 * m * k * n / (clock() - started) / 1e9)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="default: the starter model")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    options = parser.parse_args()
    options.model = options.model or starter_folder()
    peak = matrix_peak()
    print(
        f"{describe_machine()}\n{torch.get_num_threads()} threads, matrix-product peak {peak:.0f} GFLOP/s", flush=True
    )
    shares = {}
    for side in options.sides:
        with without_faster_ways() if side.endswith("before") else ExitStack():
            shares[side] = measure(options, side=side, peak=peak)
    print("\n" + ", ".join(f"{side} {share:.0%} of the peak" for side, share in shares.items()))


if __name__ == "__main__":
    main()
