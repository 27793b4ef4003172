"""What a forward and backward pass takes beside what stays in memory: seen in two short ones, foretold of longer ones.

Tensors are counted as they come and go, so that the model, what learns in it, how its weights are packed and what is
kept for the backward pass need not be known here.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from ..render.base import Example
from ..render.example_store import lengths_of
from .batches import Batch, make_batches
from .memory import resident_bytes
from .model import TrainedModel

NOTHING_MOVED: AbstractContextManager[object] = nullcontext()

_SHORT_TOKENS, _LONG_TOKENS = 128, 512

_MOST_SCATTER = 3.0
"""On a CPU freed memory is not given back but lies scattered, so a process takes more than its tensors: 5 % more with
Gemma 3 270M, 140 % more where its layers are computed once more. What is seen of that in short passes is believed up to
this many times the tensors' own size, for kernels that are made meanwhile count in it too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """The most bytes that are held at a time during a pass, gradients included: linear in its tokens."""

    fixed: int
    per_token: float

    def bytes_of(self, tokens: int) -> int:
        """Those of a pass of so many `tokens`."""
        return round(self.fixed + self.per_token * tokens)

    def tokens_in(self, room: int) -> int:
        """The most tokens of a pass that takes no more than `room` bytes; 0 where there is no room for any."""
        return max(0, int((room - self.fixed) / self.per_token))


def measure_footprint(
    trained: TrainedModel, examples: Sequence[Example], *, keeping: AbstractContextManager[object] = NOTHING_MOVED
) -> Footprint:
    """Take two short passes of `examples` forward and back; no gradient stays, no weight moves, no random number goes.

    Without `TrainedModel.packing` a pass is one row, so the shortest and a longer row are taken. `keeping` is where the
    passes forward keep what the way back needs, see `Setup.offloading`.
    """
    lengths = lengths_of(examples)
    order = lengths.argsort(kind="stable").tolist()
    device = trained.model.device
    sizes, peaks, held = [], [], []
    for wanted in (_SHORT_TOKENS, _LONG_TOKENS):
        batch = _pass_of(trained, examples, order, lengths.tolist(), wanted).to(device)
        sizes.append(batch.token_ids.shape[1])
        peaks.append(_peak(trained, batch, keeping))
        held.append(resident_bytes(device))
    if sizes[0] == sizes[1]:  # all rows are of one length, and no two fit into a short pass
        return Footprint(fixed=0, per_token=peaks[1] / sizes[1])
    more = sizes[1] - sizes[0]
    per_token = max(1.0, (peaks[1] - peaks[0]) / more)
    fixed = max(0, round(peaks[1] - per_token * sizes[1]))
    if device.type == "cpu":
        per_token = min(_MOST_SCATTER * per_token, max(per_token, (held[1] - held[0]) / more))
    return Footprint(fixed=fixed, per_token=per_token)


def _pass_of(
    trained: TrainedModel, examples: Sequence[Example], order: Sequence[int], lengths: Sequence[int], wanted: int
) -> Batch:
    """A pass of about so many tokens; of one row, without packing, or where the shortest is longer."""
    if not trained.packing:
        place = next((place for place in order if lengths[place] >= wanted), order[-1])
        return make_batches([examples[place]], tokens_per_pass=1, row_prefix=trained.row_prefix)[0]
    shortest = order[0]
    rows = [examples[shortest]] * max(1, wanted // lengths[shortest])
    return make_batches(rows, tokens_per_pass=10**9, round_to=64, row_prefix=trained.row_prefix)[0]


def _peak(trained: TrainedModel, batch: Batch, keeping: AbstractContextManager[object] = NOTHING_MOVED) -> int:
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    devices = [batch.token_ids.device] if batch.token_ids.device.type == "cuda" else []
    was_training = trained.training
    trained.train()  # only then are layers computed once more, and numbers dropped
    with (
        torch.random.fork_rng(devices=devices),
        torch.compiler.set_stance("force_eager"),
        _LiveBytes([*trained.parameters(), *trained.buffers()]) as seen,
    ):
        # not backward(): nothing that is hooked to a gradient's arrival may happen
        with keeping:
            loss = trained(batch)
        torch.autograd.grad(loss, parameters, allow_unused=True)
    trained.train(was_training)
    peak: int = seen.peak
    return peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made within it and still held, beside those `known` and on the device of these.

    `peak` is the most of them at a time.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._live = 0
        self._device = known[0].device
        self._seen = {one.untyped_storage()._cdata for one in known if not is_traceable_wrapper_subclass(one)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and not is_traceable_wrapper_subclass(leaf):
                self._count(leaf)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or storage.device != self._device:
            return
        self._seen.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._live -= size
