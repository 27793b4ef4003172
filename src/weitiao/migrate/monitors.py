"""Where an original shows its figures besides its log: ``report_to``, and SwanLab's own settings → ``monitor``.

The originals send figures alone, so the recipe's monitors are told to send no row's text.
"""

from __future__ import annotations

from typing import Any

from .ledger import Ledger

_KNOWN = ("swanlab", "tensorboard", "wandb", "mlflow", "trackio")
_SWANLAB = {"swanlab_project": "project", "swanlab_workspace": "workspace", "swanlab_logdir": "folder"}
"""LLaMA-Factory's settings of SwanLab → options of the monitor."""


def carry_monitors(ledger: Ledger, report_to: str, *, swanlab_mode: str = "swanlab_mode") -> None:
    """``monitor`` from the list of trackers under `report_to`, and from the settings of SwanLab.

    Args:
        ledger: where it is written down.
        report_to: the key of the list.
        swanlab_mode: the key that says how SwanLab runs, and in GLM-4's configurations that it runs.
    """
    listed = ledger.settings.get(report_to)
    names = [str(name).lower() for name in (listed if isinstance(listed, list) else str(listed or "none").split(","))]
    chosen = [{"name": name.strip(), "tables": False} for name in names if name.strip() in _KNOWN]
    keys = [report_to] if chosen else []
    if ledger.flag("use_swanlab") or (swanlab_mode == "swanlab" and ledger.has(swanlab_mode)):
        chosen = [one for one in chosen if one["name"] != "swanlab"]
        swanlab: dict[str, Any] = {"name": "swanlab", "tables": False}
        if (mode := ledger.text(swanlab_mode)) is not None:
            swanlab["mode"] = mode
        options = {key: name for key, name in _SWANLAB.items() if ledger.has(key)}
        swanlab |= {name: ledger.text(key) for key, name in options.items()}
        chosen.append(swanlab)
        keys += ["use_swanlab", swanlab_mode, *options]
    if chosen:
        ledger.carry(tuple(keys), "monitor", chosen, "figures alone, as in the original")
        strange = [name for name in names if name.strip() not in (*_KNOWN, "none")]
        if strange:
            ledger.note(f"weitiao has no monitor for {', '.join(strange)}: figures go to {', '.join(_KNOWN)} if asked.")
    ledger.leave(report_to, f"monitors are {', '.join(_KNOWN)}; metrics.jsonl and curve.png are always written")
    for key in (*_SWANLAB, swanlab_mode):
        ledger.leave(key, "SwanLab is off")
    ledger.leave("swanlab_run_name", "a run is called by the recipe's name")
    ledger.leave("swanlab_api_key", "no recipe holds a key: log in with swanlab login, or set SWANLAB_API_KEY")
    for key in ("swanlab_lark_webhook_url", "swanlab_lark_secret"):
        ledger.leave(key, "no messages are sent to Lark")
