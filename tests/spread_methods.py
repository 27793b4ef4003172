"""Run by torchrun: every method on every tiny model, by one process and spread over all; says what differs.

python -m torch.distributed.run --standalone --nproc-per-node=2 tests/spread_methods.py FAMILY …
"""

from __future__ import annotations

import math
import sys

import torch

from prefix_models import tiny
from tuned_models import LEARNT_TOKENS, METHODS, eight_rows, settings_for
from weitiao.generate.engine import Sampling, generate
from weitiao.launch import read_launch
from weitiao.models.adapters import base_model
from weitiao.models.quantized import quantize_model
from weitiao.recipe import AnyMethod, Train
from weitiao.train.batches import make_probe
from weitiao.train.model import check_head
from weitiao.train.ranks import ALONE, Ranks, joined
from weitiao.train.scoring import dev_loss
from weitiao.train.sharding import check_order, in_company, is_spread
from weitiao.train.step import set_up, step_batches, take_step
from weitiao.tuning.methods import add_adapter

KINDS = {
    "": (torch.float32, {}, 1e-5),
    "checkpointed": (torch.float32, {"gradient_checkpointing": True}, 1e-5),
    "selective": (torch.float32, {"gradient_checkpointing": "selective"}, 1e-5),
    "bfloat16": (torch.bfloat16, {}, 2e-2),
    "int8": (torch.float32, {}, 1e-5),
}
"""Dtype, settings and the tolerance of the first step's figures, by what is tried."""

LATER = 3e-4
"""Of the steps after it, in float32: at rates that overfit eight rows in a few steps, rounding grows."""


def figures(family: str, method: AnyMethod, settings: Train, kind: str, ranks: Ranks) -> list[float]:
    """Losses and gradient norms of four steps, the second with one row only, the dev loss, and answers' tokens."""
    model = tiny(family).to(KINDS[kind][0])
    if kind == "int8":
        quantize_model(model, 8)
    tuned, rows = add_adapter(model, method, seed=1), eight_rows(family)
    setup = set_up(tuned, settings, steps=100, ranks=ranks)
    trained, base = setup.trained, base_model(tuned)
    probe = make_probe(rows, row_prefix=trained.row_prefix)
    check_head(trained, probe)
    if is_spread(trained):
        check_order(trained, base, probe)
    trained.train()
    found: list[float] = []
    for taken in (rows, rows[:1], rows[1:], rows):
        batches = step_batches(
            taken, [""] * len(taken), settings, base.device, row_prefix=trained.row_prefix, ranks=ranks
        )
        loss, norm, _ = take_step(setup, batches, settings)
        found += [loss, norm]
    found.append(dev_loss(trained, rows[:3], [], settings, ranks)[0])
    own = range(ranks.rank, 3, ranks.size)
    with trained.generating() as generator, in_company(generator, ranks):
        prompts = [rows[place].token_ids[: len(rows[place]) - 2] for place in own]
        limits = Sampling(max_new_tokens=3 + 2 * ranks.rank)  # the processes call the model at other times
        answers = {
            own[one.index]: one.token_ids[:3] for one in generate(generator, prompts, sampling=limits, stop_ids=[0])
        }
    together = {place: tokens for part in ranks.gather(answers) for place, tokens in part.items()}
    return found + [float(token) for place in sorted(together) for token in together[place]]


def agree(one: list[float], other: list[float], tolerance: float) -> bool:
    """Whether all figures are the same, up to `tolerance`."""
    return all(math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance) for a, b in zip(one, other, strict=True))


def main() -> None:
    """Exit with 1 when anything differs."""
    torch.set_num_threads(1)
    wrong, tried = [], 0
    with joined(read_launch()) as ranks:
        for family in sys.argv[1:]:
            for name, method in METHODS.items():
                if name in LEARNT_TOKENS:
                    continue  # refused
                for kind, (dtype, changed, tolerance) in KINDS.items():
                    if kind and (family != "qwen2" or (kind == "int8" and name in ("full", "freeze", "pissa"))):
                        continue
                    settings = settings_for(name).model_copy(update={"tokens_per_pass": 40, **changed})
                    whole = figures(family, method, settings, kind, ALONE)
                    spread = figures(family, method, settings.model_copy(update={"shard": "fsdp"}), kind, ranks)
                    tried += 1
                    exact = dtype == torch.float32
                    near = agree(whole[:2], spread[:2], tolerance)
                    if exact:
                        near = near and agree(whole[2:9], spread[2:9], LATER) and whole[9:] == spread[9:]
                    if not near:
                        wrong.append(f"{family} {name} {kind}: {whole} {spread}")
        if ranks.is_first:
            print("\n".join([*wrong, f"{tried} tried, {len(wrong)} differ"]), flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
