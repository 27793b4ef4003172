"""weitiao (微调): fine-tune open language models on your own labelled rows.

    recipe = weitiao.load_recipe("recipe.yaml")
    run = weitiao.tune_model(recipe)
    weitiao.evaluate_run(run.path)

Names are loaded when first used, so that ``import weitiao`` costs nothing and checking data needs no torch.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # verbs
    from .apply import open_run, predict_file

    # what a run leaves behind
    from .contract import Contract

    # rows
    from .data.records import Record, read_records
    from .dataset import Dataset, load_dataset
    from .errors import WeitiaoError
    from .evaluate.compare import compare_runs
    from .evaluate.report import Report
    from .evaluate.score import score_predictions
    from .evaluation import evaluate_run
    from .init import init_recipe
    from .messages import Message
    from .models.opening import OpenModel, open_model
    from .recipe import Recipe, load_recipe, make_recipe
    from .render.base import Example, Renderer
    from .runs import RunFolder
    from .search.learning_curve import learning_curve
    from .search.space import load_space
    from .search.sweep import sweep_recipe

    # tasks
    from .tasks.base import Task, infer_tasks
    from .tasks.forms import AnswerForm
    from .tune import tune_model

_HOMES = {
    # verbs
    "init_recipe": ".init",
    "load_recipe": ".recipe",
    "make_recipe": ".recipe",
    "tune_model": ".tune",
    "evaluate_run": ".evaluation",
    "compare_runs": ".evaluate.compare",
    "predict_file": ".apply",
    # many trainings
    "load_space": ".search.space",
    "sweep_recipe": ".search.sweep",
    "learning_curve": ".search.learning_curve",
    # rows and tasks
    "Record": ".data.records",
    "read_records": ".data.records",
    "Dataset": ".dataset",
    "load_dataset": ".dataset",
    "Task": ".tasks.base",
    "infer_tasks": ".tasks.base",
    "AnswerForm": ".tasks.forms",
    # models and chat formats
    "open_model": ".models.opening",
    "OpenModel": ".models.opening",
    "Message": ".messages",
    "Renderer": ".render.base",
    "Example": ".render.base",
    # what a run leaves behind
    "Recipe": ".recipe",
    "RunFolder": ".runs",
    "open_run": ".apply",
    "Contract": ".contract",
    "Report": ".evaluate.report",
    "score_predictions": ".evaluate.score",
    "WeitiaoError": ".errors",
}

_LOUD = ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops", "torchao", "torch.utils._pytree")
"""Loggers that warn at every start, or in every product, where bitsandbytes or torchao is installed: of kernels for
other machines that they do without, and that LLM.int8 rounds to float16, which is how it is defined."""

for _logger in _LOUD:
    logging.getLogger(_logger).setLevel(logging.ERROR)  # before peft imports them

__all__ = list(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'weitiao' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
