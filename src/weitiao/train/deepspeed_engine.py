"""DeepSpeed's engine under a training: each process keeps a part of the optimiser's state, and of gradients (ZeRO-2).

The engine is given what learns and nothing else: the frozen base stays as it is. It averages gradients over the
processes where ours are summed, so each pass's loss is multiplied by their number. In checkpoints the parts are put
together in the form that torch's optimiser has in one process, so that any number of processes goes on from them, with
DeepSpeed or without.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RunError
from ..models.own_weights import computing_dtype
from .batches import Batch
from .deepspeed_file import DeepSpeedFile
from .model import TrainedModel
from .ranks import Ranks

_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for every number that learns, beside how many steps it has taken."""


class _Learning(nn.Module):
    """What learns of a model, as all that a module has; its forward pass is a pass of the model."""

    def __init__(self, trained: TrainedModel) -> None:
        super().__init__()
        self.learnt = nn.ParameterList(one for one in trained.parameters() if one.requires_grad)
        self._pass = trained.__call__  # a bound method is no submodule, so the frozen weights stay outside

    def forward(self, batch: Batch, token_losses: Tensor) -> Tensor:
        loss: Tensor = self._pass(batch, token_losses)
        return loss


class DividedOptimiser(torch.optim.Optimizer):
    """AdamW of which each process keeps a part, moved by DeepSpeed's engine."""

    def __init__(self, trained: TrainedModel, adamw: torch.optim.Optimizer, file: DeepSpeedFile, ranks: Ranks) -> None:
        """
        Args:
            trained: the model, with the same values in all processes.
            adamw: the optimiser of what learns; a schedule made for it stays in force.
            file: what the user's configuration says.
            ranks: the processes, of which each calls this.

        Raises:
            RunError: something learns that is not in float32.
        """
        file.require_dtype(computing_dtype(trained.model), trained.model.device)
        learnt = [list(group["params"]) for group in adamw.param_groups]
        others = {one.dtype for group in learnt for one in group} - {torch.float32}
        if others:
            raise RunError(
                f"What learns is in {', '.join(sorted(map(str, others)))}, and with train.deepspeed it must be in "
                f"float32. Set train.shard: fsdp and take train.deepspeed out."
            )
        own = [{**group, "params": some} for group, some in zip(adamw.param_groups, learnt, strict=True)]
        super().__init__(own, {})
        self._adamw, self._size = adamw, ranks.size
        self._gathered: dict[str, Any] = {}
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # its importing sets another one
        # of its own calls, which nobody here can change
        warnings.filterwarnings("ignore", r".*torch\.distributed\.all_gather_into_tensor", FutureWarning)
        self._engine, *_ = deepspeed.initialize(model=_Learning(trained), optimizer=adamw, config=dict(file.engine))

        # made now, for all groups: the engine finds only what is there when the first of them has taken its first step
        for group in adamw.param_groups:
            (part,) = group["params"]
            moments = {kind: torch.zeros_like(part) for kind in _MOMENTS}
            adamw.state[part] = {"step": torch.tensor(0.0), **moments}
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def run_pass(self, batch: Batch, token_losses: Tensor) -> Tensor:
        """The loss of a pass, as `TrainedModel` gives it."""
        loss: Tensor = self._engine(batch, token_losses)
        return loss

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """The gradient of a pass; `last` in its step. All processes have as many passes."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self._size)

    def take_step(self) -> float:
        """Move the weights; gives back the norm of the whole gradient. Where that is not finite, none is moved."""
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Nothing: `take_step` has moved the weights, and told the norm that is looked at before."""

    def gather(self, *, keep: bool) -> None:
        """Put the state together, in all processes at once, for `state_dict` where it is to `keep` it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        states: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for own, group in zip(self.param_groups, self._adamw.param_groups, strict=True):
            first, kept = len(states), self._adamw.state[group["params"][0]]
            for number, parameter in enumerate(own["params"], start=first):
                moments = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in _MOMENTS}
                states[number] = {"step": kept["step"].clone(), **moments} if keep else {}
            groups.append({**group, "params": list(range(first, len(states)))})
        self._gathered = {"state": states, "param_groups": groups} if keep else {}

    def state_dict(self) -> dict[str, Any]:
        """What was gathered last, in the form of torch's AdamW; given away."""
        gathered, self._gathered = self._gathered, {}
        assert gathered
        return gathered

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the weights that the model has now, and of the state in `state_dict` this process's part."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        groups = list(zip(self.param_groups, self._adamw.param_groups, state_dict["param_groups"], strict=True))
        for _, group, saved in groups:
            group.update({name: value for name, value in saved.items() if name != "params"})
            steps = [state_dict["state"][number]["step"] for number in saved["params"] if number in state_dict["state"]]
            self._adamw.state[group["params"][0]]["step"].fill_(max((float(one) for one in steps), default=0.0))
        for own, _, saved in groups:
            for parameter, number in zip(own["params"], saved["params"], strict=True):
                safe_set_full_fp32_param(parameter, parameter.detach())
                for kind in _MOMENTS if number in state_dict["state"] else ():
                    value = state_dict["state"][number][kind].to(parameter.device)
                    safe_set_full_optimizer_state(parameter, value, kind)
