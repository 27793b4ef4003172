"""Verbs that let people and programs use a model: serve, chat, verify."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .base import BaseModel, RunArgument, app, err, out, reporting_errors

if TYPE_CHECKING:
    from ..serve.terminal import TerminalChat


@app.command()
def serve(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]RUN ...",
            help="Finished runs on one base model, each served under its name; or one base model, such as starter.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    keys: Annotated[
        Path | None, typer.Option(help="File of API keys; also WEITIAO_API_KEY in the environment.")
    ] = None,
    new_key: Annotated[
        str | None, typer.Option(metavar="NAME", help="Make an API key for NAME, add its hash to --keys, and end.")
    ] = None,
    origin: Annotated[
        list[str] | None, typer.Option(help="A web page's origin that may ask (CORS), such as https://example.com.")
    ] = None,
    feedback: Annotated[
        Path | None, typer.Option(help="Keep what users rate right or correct in this JSONL file, as training rows.")
    ] = None,
    embeddings: Annotated[
        str | None, typer.Option(metavar="MODEL", help="An embedding model for /v1/embeddings, such as BAAI/bge-m3.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Most requests that run together.")] = 32,
    queue: Annotated[
        int, typer.Option(min=1, help="Most requests that wait; one more is told when to come again.")
    ] = 256,
    max_context: Annotated[
        int | None, typer.Option(min=16, help="Most tokens of prompt and answer; by default what the model takes.")
    ] = None,
    cache_tokens: Annotated[
        int, typer.Option(min=64, help="Most positions of keys and values of all requests together.")
    ] = 65536,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that running requests get when the server ends.")] = 30.0,
    base_model: BaseModel = None,
    quantize: Annotated[str, typer.Option(help="Of a base model: int8 or int4. Runs say so themselves.")] = "none",
    engine: Annotated[
        Literal["weitiao", "vllm"], typer.Option(help="Who computes: this process, or a vLLM server behind it.")
    ] = "weitiao",
    vllm_url: Annotated[
        str | None, typer.Option(help="A vLLM server that runs already; its key is read from VLLM_API_KEY.")
    ] = None,
    vllm_args: Annotated[
        str,
        typer.Option(help='Of the vLLM server that is started: more arguments, such as "--tensor-parallel-size 2".'),
    ] = "",
    vllm_model: Annotated[
        Path | None, typer.Option(help="Of the vLLM server that is started: what weitiao export wrote of the run.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option(help="Log every request: route, status, seconds; never what is said.")
    ] = False,
) -> None:
    """Serve tuned models: an OpenAI-compatible API, typed answers at /v1/tasks, and a page to try them at /.

    Answers are those that evaluation scored: held to the labelled form unless a request says otherwise.

    Any OpenAI client works: base_url http://127.0.0.1:8000/v1 and the run's name as the model.
    """
    from ..errors import RunError

    with reporting_errors():
        if new_key is not None:
            from ..serve.keys import add_key

            if keys is None:
                raise RunError("--new-key needs a file for the hash: give --keys FILE.")
            key = add_key(keys, new_key)
            err.print(f"The key of {new_key}, shown only now; {keys} holds its hash:", soft_wrap=True)
            out.print(key)
            return
        if not targets:
            raise RunError("Say what to serve, such as: weitiao serve runs/rows")
        if engine != "vllm" and (vllm_url is not None or vllm_args or vllm_model is not None):
            raise RunError("--vllm-url, --vllm-args and --vllm-model are for --engine vllm. Add it, or leave them out.")
        vllm = {"url": vllm_url, "arguments": vllm_args, "model": vllm_model} if engine == "vllm" else None
        _serve(
            targets,
            host=host,
            port=port,
            keys=keys,
            origins=origin or [],
            feedback=feedback,
            embeddings=embeddings,
            limits={"max_rows": rows, "max_queue": queue, "max_cache_tokens": cache_tokens},
            max_context=max_context,
            drain=drain,
            base_model=base_model,
            quantize=quantize,
            verbose=verbose,
            vllm=vllm,
        )


def _serve(
    targets: list[str],
    *,
    host: str,
    port: int,
    keys: Path | None,
    origins: list[str],
    feedback: Path | None,
    embeddings: str | None,
    limits: dict[str, int],
    max_context: int | None,
    drain: float,
    base_model: str | None,
    quantize: str,
    verbose: bool,
    vllm: dict[str, Any] | None,
) -> None:
    import logging
    from importlib.util import find_spec

    from ..errors import RunError
    from ..serve.keys import read_keys

    known = read_keys(keys)
    if vllm is not None and find_spec("httpx") is None:
        raise RunError("--engine vllm needs httpx, not installed here: pip install 'weitiao[serve,vllm]'")
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise RunError(f"Serving needs {', '.join(missing)}, not installed here: pip install 'weitiao[serve]'")
    from ..serve.app import make_app
    from ..serve.embeddings import open_embedder
    from ..serve.limits import Limits
    from ..serve.listening import is_local, listen
    from ..serve.vllm_options import VllmOptions
    from ..serving import open_server

    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(message)s")
    server = open_server(
        targets,
        base_model=base_model,
        max_context=max_context,
        limits=Limits(**limits),
        feedback=feedback,
        quantize=quantize,
        vllm=None if vllm is None else VllmOptions(**vllm, say=lambda said: err.print(said, soft_wrap=True)),
    )
    try:
        embedder = open_embedder(embeddings) if embeddings is not None else None
        local = is_local(host)
        hosts = ("localhost", "127.0.0.1", "::1", "[::1]") if local else ("*",)
        application = make_app(server, keys=known, origins=origins, hosts=hosts, embedder=embedder, drain_seconds=drain)
        if not local and not known.needed:
            err.print(
                f"note: {host} lets other machines in, and no API key is asked for. Make one with --new-key.",
                soft_wrap=True,
            )
        for model in server.models.values():
            tasks = ", ".join(task.name for task in model.tasks) or "free conversation"
            err.print(f"{model.name}: {tasks}", soft_wrap=True)
        shown = "127.0.0.1" if local else host
        err.print(f"Serving at http://{shown}:{port} (page) and http://{shown}:{port}/v1 (API). Ctrl-C ends it.")
        listen(application, server.worker, host=host, port=port, drain_seconds=drain)
    finally:
        server.worker.close()


@app.command()
def chat(
    target: Annotated[str, typer.Argument(metavar="RUN", help="A finished run, or a base model such as starter.")],
    system: Annotated[str, typer.Option(help="The system message, such as the persona that was trained.")] = "",
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="By default as the run was scored.")] = None,
    base_model: BaseModel = None,
) -> None:
    """Talk to a tuned model in the terminal, or ask its tasks about texts. /help says what can be typed."""
    with reporting_errors():
        with suppress(ImportError):  # lines can be edited and called up again, except on Windows
            import readline  # noqa: F401
        from ..serve.limits import Limits
        from ..serve.terminal import TerminalChat
        from ..serving import open_server

        server = open_server([target], base_model=base_model, limits=Limits(max_rows=1))
        try:
            model = next(iter(server.models.values()))
            talk = TerminalChat(server=server, model=model, system=system)
            if temperature is not None:
                talk.settings["temperature"] = temperature
            tasks = ", ".join(task.name for task in model.tasks)
            err.print(f"{model.name}{f' ({tasks})' if tasks else ''}. /help says what can be typed.", soft_wrap=True)
            while not talk.over and (line := _read_line()) is not None:
                _print_reply(talk, line)
        finally:
            server.worker.close()


def _read_line() -> str | None:
    """What the user types, over several lines where they end in a backslash; None at the end."""
    line = ""
    while True:
        try:
            part = input("> " if not line else "… ")
        except EOFError:
            return None
        if not part.endswith("\\"):
            return line + part
        line += part[:-1] + "\n"


def _print_reply(talk: TerminalChat, line: str) -> None:
    pieces = talk.say(line)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]")
    finally:
        pieces.close()


@app.command()
def verify(
    run: RunArgument,
    url: Annotated[
        list[str] | None, typer.Option(help="A server that serves the run, such as http://127.0.0.1:8000.")
    ] = None,
    merged: Annotated[Path | None, typer.Option(help="A folder that weitiao export wrote of the run.")] = None,
    data: Annotated[str | None, typer.Option(help="Rows to ask; by default the run's dev rows.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many of them.")] = 20,
    model: Annotated[str | None, typer.Option(help="The run's name at the servers; by default its folder's.")] = None,
    base_model: BaseModel = None,
) -> None:
    """Prove that every route asks the model the same tokens and gets the same answers; shows the first difference.

    Without --url, a server is started here and asked. The API key of a server is read from WEITIAO_API_KEY. The exit
    code is 1 where something differs.
    """
    from ..serve.keys import ENVIRONMENT
    from ..verify import verify_run

    with reporting_errors():
        checks = verify_run(
            run,
            urls=url or (),
            merged=merged,
            data=data,
            rows=rows,
            api_key=os.environ.get(ENVIRONMENT, ""),
            model_name=model,
            base_model=base_model,
        )
    for check in checks:
        told = f"{check.same_prompts} of {check.rows} prompts and {check.same_answers} answers are the same"
        out.print(f"{check.route}: {told}")
        if check.first is not None:
            out.print(f"  {check.first.describe()}")
    if not all(check.holds for check in checks):
        raise typer.Exit(1)
