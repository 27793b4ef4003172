"""What a user says of the vLLM server that is to compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import RunError


@dataclass(frozen=True, kw_only=True)
class VllmOptions:
    """How vLLM is to be found or started."""

    url: str | None = None
    """Of a running server; None: one is started."""
    arguments: str = ""
    """Further arguments of ``vllm serve``, as in a shell."""
    model: Path | None = None
    """What `weitiao export` wrote of the one run that is served, in place of base model and adapter."""
    say: Callable[[str], None] = lambda _: None
    """Gets sentences on the way."""

    def __post_init__(self) -> None:
        if self.url is not None and (self.arguments or self.model is not None):
            raise RunError(
                "--vllm-args and --vllm-model are for a vLLM server that is started here; that at --vllm-url runs "
                "already. Leave out one or the other."
            )
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise RunError(f"--vllm-url {self.url} is no address. Give one such as http://127.0.0.1:8001.")
