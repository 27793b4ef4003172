"""Vectors of texts, by an encoder such as bge-m3: ``/v1/embeddings``.

How token vectors become one vector is read from the files that sentence-transformers keeps beside the weights
(``1_Pooling/config.json``, ``modules.json``); without them it is the mean, normalised.
"""

from __future__ import annotations

import base64
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ModelError
from ..models.sources import first_line, model_folder, read_json
from .problems import bad_request
from .protocol import EmbeddingRequest

Pooling = Literal["cls", "mean", "last"]

_BATCH = 32


@dataclass(kw_only=True)
class Embedder:
    """An encoder and how its token vectors become one."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pooling: Pooling
    normalise: bool
    max_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, request: EmbeddingRequest) -> dict[str, Any]:
        """The reply of the protocol. Raises RefusedError for texts that are too long."""
        given = request.input
        inputs: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)
        tokens = [self.tokenizer(one)["input_ids"] if isinstance(one, str) else list(one) for one in inputs]
        long = [place for place, ids in enumerate(tokens) if len(ids) > self.max_tokens]
        if long:
            raise bad_request(
                f"input[{long[0]}] has {len(tokens[long[0]])} tokens, but {self.name} takes {self.max_tokens}.",
                param="input",
                code="context_length_exceeded",
            )
        size = int(self.model.config.hidden_size)
        if request.dimensions not in (None, size):
            raise bad_request(f"{self.name} gives {size} dimensions, and no others.", param="dimensions")
        with self._turn:
            vectors = [
                vector
                for start in range(0, len(tokens), _BATCH)
                for vector in self._encode(tokens[start : start + _BATCH])
            ]
        data = [
            {"object": "embedding", "index": place, "embedding": _written(vector, request.encoding_format)}
            for place, vector in enumerate(vectors)
        ]
        count = sum(map(len, tokens))
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "model": self.name, "data": data, "usage": usage}

    @torch.inference_mode()
    def _encode(self, tokens: list[list[int]]) -> list[Tensor]:
        """One vector ``[H]`` float32 for each list of tokens."""
        width = max(map(len, tokens))
        padding = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[*one, *[padding] * (width - len(one))] for one in tokens], device=self.model.device)
        lengths = torch.tensor([len(one) for one in tokens], device=ids.device)
        mask = torch.arange(width, device=ids.device)[None] < lengths[:, None]
        states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        if self.pooling == "cls":
            vectors = states[:, 0]
        elif self.pooling == "last":
            vectors = states[torch.arange(len(tokens), device=ids.device), lengths - 1]
        else:
            vectors = (states * mask[..., None]).sum(1) / lengths[:, None]
        return list((torch.nn.functional.normalize(vectors, dim=-1) if self.normalise else vectors).cpu())


def _written(vector: Tensor, encoding: str | None) -> Any:
    if encoding == "base64":
        return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
    return vector.tolist()


def open_embedder(path: str, *, name: str | None = None) -> Embedder:
    """The encoder in the folder, or of the id, `path`. Raises ModelError when it cannot be opened."""
    folder = model_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        model = AutoModel.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - transformers raises bare Exception on broken files
        raise ModelError(f"The embedding model in {folder} cannot be opened: {first_line(error)}.") from None
    model.eval()
    limit = int(getattr(model.config, "max_position_embeddings", 0)) or 512
    return Embedder(
        name=name or Path(path).name,
        model=model,
        tokenizer=tokenizer,
        pooling=_pooling_of(folder),
        normalise=_normalises(folder),
        max_tokens=min(limit, tokenizer.model_max_length),
    )


def _pooling_of(folder: Path) -> Pooling:
    file = folder / "1_Pooling" / "config.json"
    if not file.exists():
        return "mean"
    config = read_json(file)
    if config.get("pooling_mode_cls_token"):
        return "cls"
    if config.get("pooling_mode_lasttoken"):
        return "last"
    if config.get("pooling_mode_mean_tokens"):
        return "mean"
    raise ModelError(f"{file} asks for a way of pooling that is not known here: cls, mean and last token are.")


def _normalises(folder: Path) -> bool:
    file = folder / "modules.json"
    return "Normalize" in file.read_text(encoding="utf-8") if file.exists() else True
