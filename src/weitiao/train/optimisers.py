"""What moves the weights that learn: the optimiser and the schedule of its learning rate.

AdamW is torch's (Loshchilov & Hutter 2019, arXiv:1711.05101). Those that take less memory are others' too:

    adamw_8bit            both moments in 8 bits, in blocks of 256 (Dettmers et al. 2022, arXiv:2110.02861); of
                          bitsandbytes
    paged_adamw           AdamW whose moments the GPU's driver moves to the machine's memory and back; of
                          bitsandbytes
    paged_adamw_8bit      both of that
    adafactor             of a matrix's second moments the means of rows and columns (Shazeer & Stern 2018,
                          arXiv:1804.04235), no first moments; of transformers
    muon                  matrices by their orthogonalised momentum (Jordan 2024, kellerjordan.github.io/posts/muon),
                          what is no matrix, embeddings and the output layer by AdamW; of torch
    schedule_free_adamw   an average of the weights instead of a falling learning rate (Defazio et al. 2024,
                          arXiv:2405.15682); of schedulefree

All of them take the learning rates that suit AdamW, and have weight decay apart from the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, get_scheduler
from transformers.optimization import Adafactor

from ..errors import RunError
from ..recipe import Train
from ..tuning.pace import pace_of
from .several_optimisers import SeveralOptimisers

Groups = Sequence[dict[str, Any]]
"""Parameters that learn alike, each group with its learning rate and weight decay."""

_PACKAGES = {
    "adamw_8bit": "bitsandbytes",
    "paged_adamw": "bitsandbytes",
    "paged_adamw_8bit": "bitsandbytes",
    "schedule_free_adamw": "schedulefree",
}


def require_optimiser(settings: Train) -> None:
    """Raise RunError when the optimiser's package is not installed."""
    package = _PACKAGES.get(settings.optimiser)
    if package is not None and find_spec(package) is None:
        raise RunError(
            f"train.optimiser={settings.optimiser} needs {package}, which is not installed: pip install "
            f"'weitiao[{package}]'. Or set train.optimiser=adamw."
        )


def make_optimiser(model: PreTrainedModel | PeftModel, settings: Train) -> torch.optim.Optimizer:
    """The optimiser of what learns in `model`, each parameter at its pace (tuning/pace.py).

    Matrices decay as a rule, biases and norms do not. With `update_in_backward` every parameter has an optimiser of its
    own, all of them together in a `SeveralOptimisers`.

    Raises:
        RunError: its package is not installed.
    """
    require_optimiser(settings)
    by_muon = _hidden_matrices(model) if settings.optimiser == "muon" else set()
    found: dict[tuple[bool, bool, float], list[nn.Parameter]] = {(False, True, 1.0): [], (False, False, 1.0): []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            pace = pace_of(parameter)
            found.setdefault((id(parameter) in by_muon, pace.decays, pace.multiple), []).append(parameter)
    parts: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for (orthogonal, decays, multiple), parameters in found.items():
        pace_settings = {
            "weight_decay": settings.weight_decay if decays else 0.0,
            "lr": settings.learning_rate * multiple,
        }
        apart = [[parameter] for parameter in parameters] if settings.update_in_backward else [parameters]
        parts[orthogonal] += [{"params": some, **pace_settings} for some in apart if some]
    others = "adamw" if settings.optimiser == "muon" else settings.optimiser
    on_gpu = any(parameter.is_cuda for parameter in model.parameters() if parameter.requires_grad)
    makers = {True: _maker("muon", on_gpu=on_gpu), False: _maker(others, on_gpu=on_gpu)}
    if settings.update_in_backward:
        made = [makers[kind]([group], settings) for kind, groups in parts.items() for group in groups]
        return SeveralOptimisers(made)
    made = [makers[kind](groups, settings) for kind, groups in parts.items() if groups]
    return made[0] if len(made) == 1 else SeveralOptimisers(made)


def _maker(name: str, *, on_gpu: bool) -> Callable[[Groups, Train], torch.optim.Optimizer]:
    return {
        "adamw": _adamw,
        "adamw_8bit": lambda *given: _bitsandbytes("AdamW8bit", *given),
        # on a CPU the driver moves nothing, and bitsandbytes warns of it: the same arithmetic in ordinary memory
        "paged_adamw": lambda *given: _bitsandbytes("PagedAdamW" if on_gpu else "AdamW", *given),
        "paged_adamw_8bit": lambda *given: _bitsandbytes("PagedAdamW8bit" if on_gpu else "AdamW8bit", *given),
        "adafactor": _adafactor,
        "muon": _muon,
        "schedule_free_adamw": _schedule_free_adamw,
    }[name]


def _adamw(groups: Groups, settings: Train) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


def _bitsandbytes(name: str, groups: Groups, settings: Train) -> torch.optim.Optimizer:
    from bitsandbytes import optim

    made: torch.optim.Optimizer = getattr(optim, name)(groups, lr=settings.learning_rate)
    return made


def _adafactor(groups: Groups, settings: Train) -> torch.optim.Optimizer:
    # torch.optim.Adafactor scales every step by the size of the weights, which LoRA's B matrices have none of at first
    return Adafactor(groups, lr=settings.learning_rate, scale_parameter=False, relative_step=False)


def _muon(groups: Groups, settings: Train) -> torch.optim.Optimizer:
    # so scaled, an update has the size that AdamW's has (Liu et al. 2025, arXiv:2502.16982)
    return torch.optim.Muon(groups, lr=settings.learning_rate, adjust_lr_fn="match_rms_adamw")


def _schedule_free_adamw(groups: Groups, settings: Train) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    made: torch.optim.Optimizer = AdamWScheduleFree(groups, lr=settings.learning_rate)
    made.train()  # type: ignore[attr-defined]
    return made


def _hidden_matrices(model: PreTrainedModel | PeftModel) -> set[int]:
    """The ids of the parameters that Muon is for: matrices that are no table of tokens and no output layer."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    tables += [model.get_output_embeddings()]
    outside = {id(parameter) for table in tables for parameter in table.parameters()}
    return {id(p) for p in model.parameters() if p.ndim == 2} - outside


def make_scheduler(
    optimiser: torch.optim.Optimizer, settings: Train, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate's way over `steps` steps, warming up first."""
    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    warmup = math.ceil(settings.warmup * steps)
    scheduler: torch.optim.lr_scheduler.LRScheduler = get_scheduler(name, optimiser, warmup, steps)
    return scheduler


@contextmanager
def weights_in_use(optimiser: torch.optim.Optimizer, settings: Train) -> Iterator[None]:
    """Within this, the weights are those that the training would end with now: for scoring and saving them.

    Schedule-Free learns at other weights than their average, which is used. Afterwards they are what they were, to the
    bit; its own way back would round.
    """
    if settings.optimiser != "schedule_free_adamw":
        yield
        return
    averaging: Any = optimiser
    learning = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in learning]
    averaging.eval()
    try:
        yield
    finally:
        averaging.train()
        with torch.no_grad():
            for parameter, values in zip(learning, kept, strict=True):
                parameter.copy_(values)
