"""One optimiser step: how a model is made ready for it, what its passes are, how it is taken.

The loop takes thousands of them; a probe takes three to foretell how long that lasts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..data.order import share_passes, share_rows
from ..errors import DivergedError, RunError
from ..models.adapters import base_model
from ..models.opening import default_device
from ..models.out_of_memory import ran_out_of_memory
from ..models.own_weights import computing_dtype
from ..models.sources import first_line
from ..recipe import Train
from ..render.base import Example
from .activations import Offloading, checkpoint_layers
from .batches import ROUND_TOKENS, Batch, TellPrefix, make_batches, make_probe
from .deepspeed_engine import DividedOptimiser
from .deepspeed_file import divides, read_deepspeed
from .halving import PassesTooLargeError, PassSizes, cures
from .model import TrainedModel
from .optimisers import make_optimiser, make_scheduler
from .ranks import ALONE, Ranks
from .several_optimisers import UpdatesInBackward
from .sharding import clip_gradients, is_spread, learns_spread, shard_model, spreads
from .switches import updates_in_backward

_DEAD_LOSS = 0.1
"""Above this loss a gradient of exactly zero means that the model is broken, not that it has learnt everything."""

_LOWEST_SCALE = 1.0
"""Where float16 gradients overflow though the loss is scaled by no more than this, halving the scale again is vain.
From the scale that training starts with, it takes 16 steps in a row to get here."""


StepResult = tuple[float, float, list[Tensor]]
"""A step's loss, the norm of its gradient, and for each pass the losses of its learnt tokens."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model ready to learn, and what moves it."""

    trained: TrainedModel
    optimiser: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    accelerator: Accelerator
    ranks: Ranks = ALONE
    """The processes that take each step together."""
    divided: DividedOptimiser | None = None
    """The optimiser, where DeepSpeed divides it among the processes."""
    updates: UpdatesInBackward | None = None
    """What updates weights in the backward pass, where the recipe wants that."""
    offloading: AbstractContextManager[object] = field(default_factory=nullcontext)
    """Where forward passes keep what the backward pass needs."""


def set_up(model: PreTrainedModel | PeftModel, settings: Train, *, steps: int, ranks: Ranks = ALONE) -> Setup:
    """The trainable parameters of `model` with their optimiser and a schedule of `steps` steps.

    In all of `ranks` they have the values of the first. With ``shard: fsdp`` `model` is spread over these; it may be on
    the CPU until then. With ``deepspeed:`` they divide the optimiser.

    Raises:
        ModelError, RunError: it cannot be spread or divided.
    """
    base = base_model(model)
    checkpoint_layers(base, settings)
    seed_dropout(settings, ranks, step=0)
    trained = TrainedModel(base, packing=settings.packing)
    if spreads(settings, ranks):
        shard_model(trained, base, settings, ranks, torch.device(default_device()))
    accelerator = Accelerator(cpu=base.device.type == "cpu", mixed_precision=_mixed_precision(base))
    optimiser = make_optimiser(model, settings)
    scheduler = make_scheduler(optimiser, settings, steps)
    # made ready without a data-parallel wrapper: take_step adds the gradients, once for all passes of a step
    updates = updates_in_backward(optimiser, settings, accelerator, ranks)
    trained = accelerator.prepare_model(trained, evaluation_mode=True)
    ranks.copy_from_first([parameter for parameter in trained.parameters() if parameter.requires_grad])
    file = read_deepspeed(settings, ranks) if divides(settings, ranks) else None
    divided = DividedOptimiser(trained, optimiser, file, ranks) if file is not None else None
    optimiser = accelerator.prepare(optimiser) if divided is None else divided
    offloads = settings.offload_activations and base.device.type == "cuda"
    return Setup(
        trained=trained,
        optimiser=optimiser,
        scheduler=scheduler,
        accelerator=accelerator,
        ranks=ranks,
        divided=divided,
        updates=updates,
        offloading=Offloading(base, base.device) if offloads else nullcontext(),
    )


def seed_dropout(settings: Train, ranks: Ranks, *, step: int, resumed: bool = False) -> None:
    """Have each of `ranks` draw numbers of its own from here on.

    The first draws those of a process that is alone: from the recipe's seed, or on as the checkpoint has it.
    """
    if not ranks.is_first:
        torch.manual_seed(random.Random(f"{settings.seed}/{step}/{ranks.rank}").getrandbits(63))
    elif not resumed:
        torch.manual_seed(settings.seed)


def _mixed_precision(model: PreTrainedModel) -> str:
    """float16 weights need a loss scale; bfloat16 and float32 need nothing."""
    return "fp16" if computing_dtype(model) == torch.float16 and model.device.type == "cuda" else "no"


def step_batches(
    rows: Sequence[Example],
    row_tasks: Sequence[str],
    settings: Train,
    device: torch.device,
    *,
    row_prefix: TellPrefix | None = None,
    ranks: Ranks = ALONE,
    share: bool = False,
) -> list[Batch]:
    """The passes of a step over `rows`, on `device`; `row_prefix` tells a row's context, see `TrainedModel`.

    With `share`, what rows begin with alike is computed once where that pays; see `PromptSharing`.

    Of several `ranks` each has passes of its own, of about as many tokens, or none when there are too few rows. Where
    the model is spread over them, or gradients are divided in each pass, they all have as many: some compute a row of
    which nothing is learnt.
    """
    limit, round_to = _pass_rules(settings)
    lengths = [len(row) for row in rows]
    parts = share_rows(lengths, parts=ranks.size)
    own = None if ranks.size == 1 else parts[ranks.rank]
    batches = make_batches(
        rows,
        tokens_per_pass=limit,
        row_balance=settings.row_balance,
        row_weights=[settings.task_weights.get(task, 1.0) for task in row_tasks],
        round_to=round_to,
        row_prefix=row_prefix,
        places=own,
        share=share,
    )
    if spreads(settings, ranks) or divides(settings, ranks):
        counts = [len(share_passes([lengths[place] for place in part], tokens_per_pass=limit)) for part in parts]
        empty = replace(make_probe(rows, num_targets=0, row_prefix=row_prefix), num_tokens=0)
        batches += [empty] * (max(counts) - len(batches))
    return [batch.to(device) for batch in batches]


def pass_sizes(lengths: Sequence[int], settings: Train) -> list[int]:
    """The tokens of each pass that `step_batches` makes of rows of these `lengths`, what fills it up included."""
    limit, round_to = _pass_rules(settings)
    sizes = (sum(lengths[place] for place in places) for places in share_passes(lengths, tokens_per_pass=limit))
    return [size + -size % round_to for size in sizes]


def _pass_rules(settings: Train) -> tuple[int, int]:
    """The most tokens of a pass, and the number that its tokens are filled up to a multiple of."""
    return (settings.tokens_per_pass, ROUND_TOKENS) if settings.packing else (1, 1)


def take_step(setup: Setup, batches: Sequence[Batch], settings: Train) -> StepResult:
    """One optimiser step over the passes in `batches`, and over those of the other processes where there are any.

    Returns the step's loss, the gradient's norm, and for each pass the losses of its learnt tokens. The norm is not
    finite where float16 gradients overflowed: then nothing was learnt, and the loss is scaled by half as much from now.

    Raises:
        DivergedError: training has diverged.
        PassesTooLargeError: memory ran out in the passes of one of the processes. Nothing was learnt.
        RunError: it ran out where the step cannot be taken again.
    """
    accelerator = setup.accelerator
    total, why = 0.0, ""
    token_losses: list[Tensor] = []
    try:
        total, token_losses = _run_passes(setup, batches)
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        require_untouched(setup, settings)
        why = first_line(error)
    total = sum_losses(setup, total, batches, why)
    norm = setup.divided.take_step() if setup.divided is not None else _sum_gradients(setup, settings)
    # weights so large that a norm layer's variance is infinite give hidden states of zero: no gradient, ever again
    dead = norm == 0 and total > _DEAD_LOSS
    if not math.isfinite(total) or dead or not (math.isfinite(norm) or _may_lower_scale(accelerator)):
        raise DivergedError(
            f"The loss is {total} and the gradient's norm {norm}: training has diverged. Lower train.learning_rate "
            f"(now {settings.learning_rate}) and start again under another name, with name=OTHER."
        )
    setup.optimiser.step()
    if not accelerator.optimizer_step_was_skipped:
        setup.scheduler.step()
    setup.optimiser.zero_grad(set_to_none=True)
    return total, norm, token_losses


def _sum_gradients(setup: Setup, settings: Train) -> float:
    """The norm of the whole step's gradient, which each process then has, scaled down to the recipe's limit."""
    parameters = [parameter for parameter in setup.trained.parameters() if parameter.requires_grad]
    setup.ranks.add_gradients(parameters)
    limit = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
    clip = clip_gradients if learns_spread(setup.trained) else setup.accelerator.clip_grad_norm_
    return float(clip(parameters, limit)) if setup.updates is None else setup.updates.norm


def _run_passes(setup: Setup, batches: Sequence[Batch]) -> tuple[float, list[Tensor]]:
    """This process's share of the step's loss, and for each pass the losses of its learnt tokens."""
    trained, accelerator = setup.trained, setup.accelerator
    total = 0.0
    if setup.updates is not None:
        setup.updates.squares = 0.0
    token_losses = [torch.empty(len(batch.targets), device=batch.targets.device) for batch in batches]
    for number, (batch, losses) in enumerate(zip(batches, token_losses, strict=True), start=1):
        with setup.offloading:
            loss = trained(batch, losses) if setup.divided is None else setup.divided.run_pass(batch, losses)
        total += loss.item()
        if setup.divided is not None:
            setup.divided.backward(loss, last=number == len(batches))
            continue
        whole = number == len(batches) and math.isfinite(total)
        with setup.updates.in_last_pass() if setup.updates is not None and whole else nullcontext():
            accelerator.backward(loss)
    return total, token_losses


def sum_losses(setup: Setup, own: float, batches: Sequence[Batch], why: str = "") -> float:
    """The loss of the whole step, of which this process has its `own` share.

    Raises PassesTooLargeError in every process where memory ran out in one; `why` says so of this one.
    """
    told = setup.ranks.add(torch.tensor([own, float(bool(why))], dtype=torch.float64))
    if told[1]:
        setup.optimiser.zero_grad(set_to_none=True)
        raise PassesTooLargeError(why or "in another process", PassSizes.of(batches))
    return float(told[0])


def require_untouched(setup: Setup, settings: Train) -> None:
    """Raise RunError when memory ran out in a step that cannot be taken again."""
    if is_spread(setup.trained) or setup.divided is not None:
        raise RunError(
            f"Memory ran out, and a step of what is divided among processes cannot be taken again, for these wait for "
            f"each other inside of it. {cures(settings)}"
        )
    if setup.updates is not None and setup.updates.squares:
        raise RunError(
            f"Memory ran out while weights were updated already (train.update_in_backward), so the step cannot be "
            f"taken again. {cures(settings)}"
        )


def _may_lower_scale(accelerator: Accelerator) -> bool:
    """Whether the loss is scaled, as for float16, and by so much that less may end the overflow."""
    return accelerator.scaler is not None and accelerator.scaler.get_scale() > _LOWEST_SCALE
