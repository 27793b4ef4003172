"""From the options of `--engine vllm` to a worker that has its answers computed by vLLM."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import RunError
from ..models.opening import OpenModel
from .limits import Limits
from .vllm_options import VllmOptions
from .vllm_process import (
    ENVIRONMENT,
    VllmProcess,
    free_port,
    launch_command,
    read_arguments,
    require_lora,
    served_there,
)
from .vllm_worker import VllmWorker


def open_vllm(
    options: VllmOptions,
    opened: OpenModel,
    *,
    adapters: Mapping[str, Path],
    base_name: str,
    dtype: str,
    quantize: str,
    limits: Limits,
) -> VllmWorker:
    """A worker before a vLLM server that serves `adapters` on `opened`, or, without any, the model as `base_name`.

    Raises RunError where the server cannot be started, reached, or serves something else.
    """
    if quantize != "none" and options.model is None and options.url is None:
        raise RunError(
            f"The base model is held as {quantize} here, which vLLM would not do alike. Merge the run (weitiao export) "
            f"and add --vllm-model FOLDER."
        )
    if options.model is not None and len(adapters) > 1:
        raise RunError("--vllm-model is one run merged. Serve that run alone, or leave the option out.")
    if options.url is not None:
        key, url, process = os.environ.get(ENVIRONMENT, ""), options.url.rstrip("/").removesuffix("/v1"), None
    else:
        process = _start(options, opened, adapters, base_name=base_name, dtype=dtype)
        key, url = process.api_key, process.url
    try:
        if process is not None:
            process.wait()
        names: dict[str | None, str] = {name: name for name in adapters} if adapters else {None: base_name}
        there = served_there(url, api_key=key, names=list(names.values()))
        config = opened.model.config.get_text_config()
        return VllmWorker(
            url,
            names=names,
            max_positions=min(int(config.max_position_embeddings), there or int(config.max_position_embeddings)),
            vocab_size=int(config.vocab_size),
            end_id=opened.tokenizer.eos_token_id,
            between_ids=opened.renderer.render_answer("")[:-1],
            limits=limits,
            api_key=key,
            on_close=process.end if process is not None else lambda: None,
        )
    except BaseException:
        if process is not None:
            process.end()
        raise


def _start(
    options: VllmOptions, opened: OpenModel, adapters: Mapping[str, Path], *, base_name: str, dtype: str
) -> VllmProcess:
    port = free_port()
    merged = options.model
    if merged is not None and not (merged / "config.json").is_file():
        raise RunError(f"{merged} holds no model (config.json). Give the folder that weitiao export wrote.")
    if merged is not None:
        name, loras, folder = next(iter(adapters), base_name), {}, merged
    else:
        name, loras, folder = base_name, dict(adapters), opened.folder
    for each, where in loras.items():
        require_lora(where, name=each)
    command = launch_command(
        folder, name=name, adapters=loras, dtype=dtype, port=port, more=read_arguments(options.arguments)
    )
    return VllmProcess(command, port=port, say=options.say)
