"""The monitors that a recipe names; a tool's package is imported for a run that asked for it, for no other."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from ..errors import RecipeError
from ..recipe.monitor import AnyMonitor, Mlflow, SwanLab, TensorBoard, Trackio, Wandb
from .base import Monitor


def needed_packages(options: AnyMonitor) -> tuple[str, ...]:
    """The packages that a monitor imports, by the names they are imported by."""
    if isinstance(options, SwanLab):
        return ("swanlab", "swanboard") if options.mode == "local" else ("swanlab",)
    return (options.name,)


def require_packages(monitors: Sequence[AnyMonitor]) -> None:
    """Raise RecipeError, with the command that installs them, when a monitor's packages are missing."""
    for options in monitors:
        missing = [package for package in needed_packages(options) if importlib.util.find_spec(package) is None]
        if missing:
            raise RecipeError(
                f"The recipe asks for the monitor {options.name}, but the package {' and '.join(missing)} is not "
                f"installed. Install it with: {_pip(options)}  Or take the monitor out of the recipe."
            )


def _pip(options: AnyMonitor) -> str:
    if isinstance(options, SwanLab) and options.mode == "local":
        return "pip install 'swanlab[dashboard]'"
    return f"pip install 'weitiao[{options.name}]'"


def make_monitor(options: AnyMonitor) -> Monitor:
    """The monitor that `options` describe, not started yet."""
    match options:
        case SwanLab():
            from .swanlab import SwanLabMonitor

            return SwanLabMonitor(options)
        case TensorBoard():
            from .tensorboard import TensorBoardMonitor

            return TensorBoardMonitor(options)
        case Wandb():
            from .wandb import WandbMonitor

            return WandbMonitor(options)
        case Mlflow():
            from .mlflow import MlflowMonitor

            return MlflowMonitor(options)
        case Trackio():
            from .trackio import TrackioMonitor

            return TrackioMonitor(options)
