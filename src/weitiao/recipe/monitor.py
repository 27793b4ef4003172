"""The recipe's part on monitors: where else the figures of metrics.jsonl are shown while a run trains.

Knows names and options only. Keys and passwords are no options: they come from the environment or a tool's own login.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from .part import Part

_SECRET_WORDS = ("key", "token", "password", "secret")


class MonitorPart(Part):
    """What every monitor's options share."""

    tables: bool = Field(
        True,
        description="Send some dev rows with their gold and predicted answers at each scoring. false: figures and the "
        "curve only, no text of any row.",
    )

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, values: Any) -> Any:
        secret = [key for key in values if _is_secret(str(key))] if isinstance(values, Mapping) else []
        if secret:
            raise PydanticCustomError(
                "secret",
                "a recipe is kept with the run, so {key} must not stand in it. Log in with the tool's own command, or "
                "set its environment variable (see docs/monitoring.md).",
                {"key": secret[0]},
            )
        return values


def _is_secret(key: str) -> bool:
    return any(word in key.lower() for word in _SECRET_WORDS)


class SwanLab(MonitorPart):
    """SwanLab: online, or a dashboard of one's own, or files to be uploaded later."""

    name: Literal["swanlab"] = "swanlab"
    mode: Literal["cloud", "local", "offline", "disabled"] = Field(
        "cloud",
        description="cloud: shown online. local: shown by swanlab watch FOLDER on this machine. offline: kept for "
        "swanlab sync. disabled: nothing.",
    )
    project: str = Field("weitiao", min_length=1, description="The project that the run belongs to.")
    workspace: str | None = Field(None, description="Whose project it is. Left out: the one logged in to.")
    folder: str = Field("swanlog", min_length=1, description="Where SwanLab keeps its files.")


class TensorBoard(MonitorPart):
    """TensorBoard: event files that tensorboard --logdir runs shows."""

    name: Literal["tensorboard"] = "tensorboard"
    folder: str | None = Field(None, min_length=1, description="Where event files go. Left out: runs/NAME/tensorboard.")


class Wandb(MonitorPart):
    """Weights & Biases: online, or files to be uploaded later with wandb sync."""

    name: Literal["wandb"] = "wandb"
    mode: Literal["online", "offline", "disabled"] = Field("online", description="offline: kept for wandb sync.")
    project: str = Field("weitiao", min_length=1, description="The project that the run belongs to.")
    entity: str | None = Field(None, description="The user or team whose project it is. Left out: the one logged in.")
    folder: str = Field(".", min_length=1, description="Where wandb makes its folder of files.")


class Mlflow(MonitorPart):
    """MLflow: a folder, a database or a tracking server."""

    name: Literal["mlflow"] = "mlflow"
    tracking_uri: str | None = Field(
        None,
        min_length=1,
        description="A database such as sqlite:///mlflow.db, a folder, or a server's address. Left out: as "
        "MLFLOW_TRACKING_URI says, else MLflow's own default.",
    )
    experiment: str = Field("weitiao", min_length=1, description="The experiment that the run belongs to.")

    @field_validator("tracking_uri")
    @classmethod
    def _no_password(cls, uri: str | None) -> str | None:
        if uri is not None and "@" in urlsplit(uri).netloc:
            raise PydanticCustomError(
                "secret",
                "a recipe is kept with the run, so no password may stand in it. Set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD.",
            )
        return uri


class Trackio(MonitorPart):
    """Trackio: a local database that trackio show shows, or a Space on Hugging Face."""

    name: Literal["trackio"] = "trackio"
    project: str = Field("weitiao", min_length=1, description="The project that the run belongs to.")
    space: str | None = Field(
        None, min_length=1, description="A Space on Hugging Face, such as OWNER/NAME. Left out: on this machine only."
    )


AnyMonitor = SwanLab | TensorBoard | Wandb | Mlflow | Trackio


def _as_monitor(value: Any) -> Any:
    if isinstance(value, Mapping) and "name" not in value:
        raise PydanticCustomError("no_name", "say which monitor it is, such as name: tensorboard.")
    return {"name": value} if isinstance(value, str) else value


def _as_monitors(value: Any) -> Any:
    return [value] if isinstance(value, str | Mapping) else value


OneMonitor = Annotated[
    Annotated[AnyMonitor, Field(discriminator="name")],
    BeforeValidator(_as_monitor, json_schema_input_type=str | AnyMonitor),
]
Monitors = Annotated[
    tuple[OneMonitor, ...],
    BeforeValidator(_as_monitors, json_schema_input_type=str | AnyMonitor | tuple[str | AnyMonitor, ...]),
]
"""A name, a name with options, or several of them."""
