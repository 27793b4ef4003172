"""Monitors of tools that are no part of the tests' own packages: each where it is installed, without a network."""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from test_monitor import DEV_LINE, PLAIN, TRAIN_LINE, own_folder, recipe_with, show_everything
from weitiao.errors import RunError
from weitiao.monitor.figures import flat_figures
from weitiao.recipe import make_recipe

__all__ = ["own_folder"]  # each test in a folder of its own, nobody logged in anywhere

MISSING = "not installed; pip install 'weitiao[{}]'"

third_party = pytest.mark.filterwarnings("ignore")  # what these tools warn of is theirs


@third_party
@pytest.mark.parametrize("mode", ["offline", "disabled", "local"])
def test_swanlab_without_a_network(mode: str) -> None:
    pytest.importorskip("swanlab", reason=MISSING.format("swanlab"))
    if mode == "local":
        pytest.importorskip("swanboard", reason="not installed; pip install 'swanlab[dashboard]'")
    handler = signal.getsignal(signal.SIGINT)
    _, said = show_everything(recipe_with({"name": "swanlab", "mode": mode, "project": "p"}))
    assert signal.getsignal(signal.SIGINT) is handler, "Ctrl-C saves a training; it is not SwanLab's"
    written = [file for file in Path("swanlog").rglob("*") if file.is_file()] if Path("swanlog").exists() else []
    names = {file.parent.parent.name for file in written}
    if mode == "disabled":
        assert said == []
        assert not [file for file in written if file.stat().st_size > 1]
        return
    ((told),) = said
    assert told.startswith(
        {"offline": "monitor swanlab: swanlab sync ", "local": "monitor swanlab: swanlab watch "}[mode]
    )
    content = b"".join(file.read_bytes() for file in written)
    for name in ("train/loss", "train/task_loss/标签", "dev/score/标签/f1", "dev/samples", "curve"):
        assert name.encode() in content, name
    assert any(file.suffix == ".png" for file in written), names


@third_party
def test_swanlab_online_without_a_key_says_what_to_do() -> None:
    pytest.importorskip("swanlab", reason=MISSING.format("swanlab"))
    with pytest.raises(RunError, match=r"swanlab could not be started: RuntimeError.*API key.*Mend that"):
        show_everything(recipe_with("swanlab"))


@third_party
def test_wandb_offline() -> None:
    pytest.importorskip("wandb", reason=MISSING.format("wandb"))
    run, said = show_everything(recipe_with({"name": "wandb", "mode": "offline"}))
    reference = json.loads(run.monitors.read_text(encoding="utf-8"))["wandb"]
    (folder,) = Path("wandb").glob(f"offline-run-*-{reference}")
    assert said == [f"monitor wandb: wandb sync {folder.resolve()}"] or said == [f"monitor wandb: wandb sync {folder}"]
    (file,) = folder.glob("*.wandb")
    names = (b"train/loss", "dev/score/标签/f1".encode(), b"dev/samples", b"curve")
    end = time.monotonic() + 30
    while not all(name in file.read_bytes() for name in names):  # wandb's own process writes them after `finish`
        assert time.monotonic() < end
        time.sleep(0.1)
    assert list(folder.rglob("*.png"))
    assert list(folder.rglob("*.table.json"))
    with pytest.raises(RunError, match=r"nobody is logged in\. Run wandb login, set WANDB_API_KEY"):
        show_everything(make_recipe({**PLAIN, "monitor": "wandb"}), resume=False)


@third_party
def test_mlflow_in_a_folder() -> None:
    mlflow = pytest.importorskip("mlflow", reason=MISSING.format("mlflow"))
    recipe = recipe_with({"name": "mlflow", "tracking_uri": "mlruns"})
    run, (told,) = show_everything(recipe)
    reference = json.loads(run.monitors.read_text(encoding="utf-8"))["mlflow"]
    assert told == f"monitor mlflow: run {reference} of experiment weitiao"
    client = mlflow.MlflowClient(tracking_uri="mlruns")
    shown = client.get_run(reference)
    assert shown.info.status == "FINISHED"
    assert shown.data.metrics == {**flat_figures(TRAIN_LINE), **flat_figures(DEV_LINE)}
    assert shown.data.params["train.epochs"] == "3.0"
    assert {file.path for file in client.list_artifacts(reference)} == {"recipe.yaml", "dev", "curve"}
    (table,) = Path("mlruns").rglob("step-000003.json")
    assert json.loads(table.read_text(encoding="utf-8"))["data"][0][-1] == '["财经"]'
    show_everything(recipe, resume=True)
    assert len(client.get_metric_history(reference, "train/loss")) == 2, "a resumed run is the same one"


@third_party
def test_trackio_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if "trackio" not in sys.modules:  # it reads this once, when it is imported
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason=MISSING.format("trackio"))
    logging.getLogger("httpx").setLevel(logging.WARNING)
    _, said = show_everything(recipe_with({"name": "trackio", "project": "weitiao-test"}))
    assert said == ["monitor trackio: trackio show --project weitiao-test"]
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("weitiao-test", "tiny")
    figures: dict[str, Any] = {key: value for row in rows for key, value in row.items()}
    assert figures["train/loss"] == 1.5
    assert figures["dev/score/标签/f1"] == 0.75
    assert figures["dev/samples"]["_type"] == "trackio.table"
    assert trackio.__version__
