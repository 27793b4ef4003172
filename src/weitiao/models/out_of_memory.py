"""Memory that has run out: how each library says so, and giving back what nothing holds any more."""

from __future__ import annotations

import gc

import torch

_SAID = (
    "can't allocate memory",  # torch on a CPU
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "could not create a memory",  # oneDNN, of the memory that a product works in
)
"""What a RuntimeError says of it, where there is no type of its own."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory could not be had, of a GPU or of the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)


def give_memory_back() -> None:
    """Free what nothing holds any more: tensors in circles of references, and what torch keeps of a GPU's memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
