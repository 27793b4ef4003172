"""A hardly tuned run on a tiny model, served: what the tests of the server ask."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from command_line import light_training, succeed, write_rows
from weitiao.serve.app import make_app
from weitiao.serve.embeddings import Embedder
from weitiao.serve.guard import Bounds
from weitiao.serve.keys import Keys
from weitiao.serve.limits import Limits
from weitiao.serve.listening import Listener, socket_for
from weitiao.serve.server import Server
from weitiao.serving import open_server

NAMES = ("王安", "李白川", "赵东", "钱方", "孙光", "周海", "吴江", "郑林")
TOWNS = ("北京", "上海")


def rows() -> list[dict[str, Any]]:
    """Rows of two tasks: people and towns to extract, and a label."""
    found = []
    for name in NAMES:
        for town in TOWNS:
            text = f"去年{name}搬到了{town}。"
            facts = json.dumps([{"人": name, "城": town}], ensure_ascii=False)
            found.append(
                {"context": f"Instruction: 回答。\nInput: 谁搬到了哪里？\n\n{text}\nAnswer: ", "target": facts}
            )
            label = json.dumps(["南方" if town == "上海" else "北方"], ensure_ascii=False)
            found.append({"context": f"Instruction: 回答。\nInput: 在哪一边？\n\n{text}\nAnswer: ", "target": label})
    return found


def make_run(folder: Path, model: Path, *more: str) -> Path:
    """A run in `folder`, tuned for an epoch; with dev rows, ``dev.jsonl``."""
    made = rows()
    write_rows(folder / "train.jsonl", made[:24])
    write_rows(folder / "dev.jsonl", made[24:])
    settings = ["model.dtype=float32", "train.epochs=1", "train.learning_rate=1e-3", "train.compile=never"]
    with pytest.MonkeyPatch.context() as patch, light_training():
        patch.chdir(folder)
        succeed("init", "train.jsonl", "--dev", "dev.jsonl", "--model", model, "--force")
        succeed("train", "recipe.yaml", *settings, "train.evaluate_every=never", *more)
    return folder / "runs" / "train"


@contextmanager
def serving(
    *targets: str | Path,
    keys: Keys = Keys(digests={}),  # noqa: B008 - frozen
    bounds: Bounds | None = None,
    limits: Limits | None = None,
    drain: float = 0.0,
    origins: Sequence[str] = (),
    hosts: Sequence[str] = ("*",),
    embedder: Embedder | None = None,
    **options: Any,
) -> Iterator[tuple[str, Server]]:
    """The address of a real server on localhost, and what stands behind it."""
    server = open_server([str(target) for target in targets], limits=limits, **options)
    app = make_app(
        server, keys=keys, bounds=bounds, origins=origins, hosts=hosts, embedder=embedder, drain_seconds=drain
    )
    listener = Listener(app, server.worker, drain_seconds=drain)
    with socket_for("127.0.0.1", 0) as bound:
        thread = threading.Thread(target=listener.run, kwargs={"sockets": [bound]})
        thread.start()
        address = f"http://127.0.0.1:{bound.getsockname()[1]}"
        try:
            _wait_for(f"{address}/ready")
            yield address, server
        finally:
            listener.handle_exit(signal.SIGTERM, None)
            thread.join(30)
            assert not thread.is_alive(), "the server did not end"


def _wait_for(url: str) -> None:
    for _ in range(200):
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.05)
    raise AssertionError(f"{url} never answered")
