"""MLflow: a database, a folder or a tracking server, by its client alone."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunStatus
from mlflow.exceptions import MlflowException

from ..recipe.monitor import Mlflow
from .base import Ending, Monitor, MonitoredRun, Started

_ENDINGS = {"finished": RunStatus.FINISHED, "interrupted": RunStatus.KILLED, "failed": RunStatus.FAILED}

_LONGEST_PARAM = 500
"""Older servers take no longer values; a longer one stands in the artifact recipe.yaml only."""

_PARAMS_AT_ONCE = 100


class MlflowMonitor(Monitor):
    """One MLflow run, the same one whenever the run goes on; tables and the curve are its artifacts."""

    name = "mlflow"

    def __init__(self, options: Mlflow) -> None:
        self._options = options

    def start(self, run: MonitoredRun) -> Started:
        uri = self._options.tracking_uri
        if uri is not None and urlsplit(uri).scheme in ("", "file"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3.17 asks for it where a folder is meant
        self._client = MlflowClient(tracking_uri=uri)
        if run.reference:
            self._id = run.reference
            self._client.update_run(self._id, status=RunStatus.to_string(RunStatus.RUNNING))
        else:
            self._id = self._client.create_run(self._experiment(), run_name=run.name).info.run_id
            params = [
                Param(_safe(key), value)
                for key, value in _flat(run.recipe.model_dump(mode="json"))
                if len(value) <= _LONGEST_PARAM
            ]
            for start in range(0, len(params), _PARAMS_AT_ONCE):
                self._client.log_batch(self._id, params=params[start : start + _PARAMS_AT_ONCE])
            self._client.log_text(self._id, run.recipe.to_yaml(), "recipe.yaml")
        return Started(reference=self._id, shown=f"run {self._id} of experiment {self._options.experiment}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._id, metrics=[Metric(_safe(name), value, now, step) for name, value in metrics.items()]
        )

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = {"columns": list(columns), "data": [list(row) for row in rows]}
        self._client.log_dict(self._id, table, f"{_safe(name)}/step-{step:06}.json")

    def image(self, step: int, name: str, path: Path) -> None:
        self._client.log_artifact(self._id, str(path), _safe(name))

    def finish(self, ending: Ending) -> None:
        self._client.set_terminated(self._id, RunStatus.to_string(_ENDINGS[ending]))

    def _experiment(self) -> str:
        name = self._options.experiment
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(name))
        except MlflowException:  # another run has made it meanwhile
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)


def _safe(name: str) -> str:
    """`name` with an underscore for every character that MLflow takes in no name."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _flat(values: object, place: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested mappings and lists: ``("train.epochs", "3")``."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _flat(value, f"{place}.{key}" if place else str(key))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from _flat(value, f"{place}.{number}")
    elif values is not None:
        yield place, str(values)
