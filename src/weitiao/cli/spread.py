"""The options that spread a verb's work over a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from ..errors import RunError

Ray = Annotated[bool, typer.Option("--ray", help="Spread the work over a Ray cluster, or this machine's cores.")]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="With --ray: how many workers; by default one for each GPU, or for each machine."),
]
GpusPerWorker = Annotated[
    float | None, typer.Option(min=0, help="With --ray: GPUs of each worker; by default 1 where there are any.")
]
Address = Annotated[
    str | None,
    typer.Option(
        help="With --ray: of the cluster, such as auto on one of its machines; by default RAY_ADDRESS, "
        "else this machine alone."
    ),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """How work is spread over a Ray cluster; None: as it is by default."""

    workers: int | None
    gpus_per_worker: float | None
    address: str | None

    def words(self) -> list[str]:
        """The words that say so on the command line."""
        said = {"workers": self.workers, "gpus-per-worker": self.gpus_per_worker, "address": self.address}
        return [
            "--ray",
            *(word for key, value in said.items() if value is not None for word in (f"--{key}", str(value))),
        ]


def require_with_ray(ray: bool, **options: object) -> None:
    """Raise RunError when one of `options`, by its name, was given without ``--ray``, which alone knows it."""
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value not in (None, False)]
    if given and not ray:
        raise RunError(f"{' and '.join(given)} {'says' if len(given) == 1 else 'say'} how Ray works; add --ray.")
