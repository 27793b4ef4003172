"""A vLLM server: started here as a process of its own, or found running; and which runs it can compute.

vLLM is a program with a torch of its own, so it is never imported: it may lie in another environment, as long as its
command ``vllm`` is found.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from ..errors import RunError

ENVIRONMENT = "VLLM_API_KEY"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""
_SAY_S = 10.0
_PATIENCE_S = 3600.0
"""Big models take long to load; a server that has ended is noticed at once."""
_END_S = 20.0


def require_lora(folder: Path, *, name: str) -> int:
    """The rank of the adapter in `folder`. Raises RunError where vLLM cannot compute it as it was tuned.

    What vLLM refuses is said in `vllm/lora/peft_helper.py`; ranks and scales by layer it would not look at.
    """
    file = folder / "adapter_config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    against = [
        said
        for said, found in (
            ("it is no LoRA adapter", config.get("peft_type") != "LORA"),
            ("it is DoRA", config.get("use_dora")),
            ("it tunes biases", config.get("bias", "none") != "none"),
            ("it tunes whole modules beside LoRA", config.get("modules_to_save")),
            ("it trains tokens of its own", config.get("trainable_token_indices")),
            ("its layers have different ranks or scales", config.get("rank_pattern") or config.get("alpha_pattern")),
        )
        if found
    ]
    if against:
        raise RunError(
            f"vLLM cannot put the adapter of {name} on its model: {', '.join(against)}. Merge it (weitiao export RUN "
            f"FOLDER) and add --vllm-model FOLDER; a learnt prefix cannot be merged: serve it without --engine vllm."
        )
    return int(config["r"])


def launch_command(
    model: Path,
    *,
    name: str,
    adapters: Mapping[str, Path],
    dtype: str,
    port: int,
    more: Sequence[str] = (),
) -> list[str]:
    """The command line of a server for `model`, called `name`, with LoRA `adapters`. Raises RunError as `require_lora`.

    `more` comes last: of an option that is given twice vLLM takes the last.
    """
    command = ["vllm", "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", name]
    command += ["--dtype", dtype, "--generation-config", "vllm", "--structured-outputs-config.backend", "guidance"]
    if adapters:
        rank = max(require_lora(folder, name=each) for each, folder in adapters.items())
        if rank > _RANKS[-1]:
            raise RunError(f"vLLM takes LoRA adapters up to rank {_RANKS[-1]}; this one has {rank}. Merge it instead.")
        command += ["--enable-lora", "--max-loras", str(len(adapters))]
        command += ["--max-lora-rank", str(next(one for one in _RANKS if one >= rank))]
        command += ["--lora-modules", *(f"{each}={folder}" for each, folder in adapters.items())]
    return [*command, *more]


def read_arguments(text: str) -> list[str]:
    """The words of --vllm-args. Raises RunError where a quote is not closed."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise RunError(f"--vllm-args {text!r} cannot be read: {error}.") from None


class VllmProcess:
    """A vLLM server that was started here; ended by `end`."""

    def __init__(self, command: Sequence[str], *, port: int, say: Callable[[str], None]) -> None:
        """Start it. Raises RunError where vLLM is not installed."""
        found = shutil.which(command[0])
        if found is None:
            raise RunError(
                "vLLM is not installed here: the command vllm is not found. Install it (pip install vllm; in an "
                "environment of its own, with its bin folder on PATH, where its torch is another), or point to a "
                "running server with --vllm-url."
            )
        self.url = f"http://127.0.0.1:{port}"
        self.api_key = secrets.token_urlsafe(24)
        self._say = say
        descriptor, self.log = tempfile.mkstemp(prefix="weitiao-vllm-", suffix=".log")
        with os.fdopen(descriptor, "wb") as log:
            # in a session of its own, so that Ctrl-C leaves it time to finish what runs
            self._process = subprocess.Popen(
                [found, *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, ENVIRONMENT: self.api_key},
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until the server answers, saying so now and then. Raises RunError where it ends or never does."""
        began = said = time.monotonic()
        self._say(f"vLLM is starting; its log: {self.log}")
        while not _is_well(self.url):
            now = time.monotonic()
            if (code := self._process.poll()) is not None:
                raise RunError(
                    f"vLLM ended with code {code} before it was ready. Its log {self.log} ends: {self._tail()}"
                )
            if now - began > _PATIENCE_S:
                raise RunError(f"vLLM was not ready after {_PATIENCE_S / 60:.0f} minutes. Its log: {self.log}")
            if now - said > _SAY_S:
                said = now
                self._say(f"vLLM is loading the model ({now - began:.0f} s)")
            time.sleep(0.2)
        self._say(f"vLLM is ready ({time.monotonic() - began:.0f} s)")

    def end(self) -> None:
        """End the server and whatever it started; waits."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            try:
                self._process.wait(_END_S)
                return
            except subprocess.TimeoutExpired:
                continue

    def _tail(self) -> str:
        lines = Path(self.log).read_text(encoding="utf-8", errors="replace").split("\n")
        return " / ".join(line.strip() for line in lines if line.strip())[-500:] or "nothing was written"


def free_port() -> int:
    """A port of this machine that nobody listens on at the moment."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def served_there(url: str, *, api_key: str, names: Sequence[str]) -> int | None:
    """The most positions that the server at `url` allows, where it says so.

    Raises RunError when it cannot be reached or does not serve every one of `names`.
    """
    if not _is_well(url):
        raise RunError(f"There is no vLLM server that is well at {url}: {url}/health does not answer with 200.")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        reply = httpx.get(f"{url}/v1/models", headers=headers, timeout=10.0, trust_env=False)
        reply.raise_for_status()
        found = {str(one["id"]): one.get("max_model_len") for one in reply.json()["data"]}
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        hint = f" Set {ENVIRONMENT} to its key." if status in (401, 403) else ""
        raise RunError(f"The server at {url} answers /v1/models with {status}.{hint}") from None
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{url}/v1/models is not what vLLM answers: {type(error).__name__}.") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise RunError(
            f"The vLLM server at {url} serves {', '.join(found) or 'nothing'}, not {', '.join(missing)}. Start it with "
            f"--lora-modules {missing[0]}=FOLDER (or --served-model-name {missing[0]} for a merged model), or name the "
            f"run as it does: NAME=RUN."
        )
    lengths = [int(length) for name in names if (length := found[name]) is not None]
    lengths += [int(length) for length in found.values() if length is not None]
    return min(lengths, default=None)


def _is_well(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5.0, trust_env=False).status_code == 200
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
