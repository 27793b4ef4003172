"""Opening what is to be served: runs on one base model, or a base model as it is, behind one worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from .apply import RunInUse
from .contract import Contract
from .errors import RunError
from .generate.sampling import Sampling
from .models.adapter_set import AdapterSet
from .models.adapters import adapter_fingerprint
from .models.adapters import base_model as base_of
from .models.opening import OpenModel, open_model
from .models.shell import open_shell
from .runs import RunFolder
from .serve.backend import Backend
from .serve.feedback import Feedback
from .serve.figures import Figures
from .serve.limits import Limits
from .serve.served import ServedModel
from .serve.server import Server
from .serve.vllm_options import VllmOptions
from .serve.worker import Worker


def open_server(
    targets: Sequence[str],
    *,
    base_model: str | None = None,
    max_context: int | None = None,
    limits: Limits | None = None,
    feedback: Path | None = None,
    quantize: str = "none",
    dtype: str = "auto",
    vllm: VllmOptions | None = None,
) -> Server:
    """Everything behind the routes; the worker runs.

    Args:
        targets: run folders that share one base model, each ``PATH`` or ``NAME=PATH``; or one base model.
        base_model: where the base model of the runs lies now, if it was moved.
        max_context: most tokens of prompt and answer together; by default what the model has positions for.
        limits: what the worker takes on at a time.
        feedback: the file that ratings go to.
        quantize: of a base model, in how many bits it is held; runs say so themselves.
        dtype: of a base model; runs say so themselves.
        vllm: how the vLLM server is found that computes the answers; None: they are computed here.

    Raises:
        RunError, ContractError, ModelError: something cannot be opened, or the runs do not belong together.
    """
    named = dict(_named(target) for target in targets)
    if len(named) < len(targets):
        raise RunError("Two of the served have the same name. Give each a name of its own: NAME=PATH.")
    runs = {name: path for name, path in named.items() if RunFolder(path).contract.exists()}
    if runs and len(runs) < len(named):
        others = ", ".join(path for name, path in named.items() if name not in runs)
        raise RunError(f"{others} is no finished run. Serve runs, or one base model, not both.")
    if not runs and len(named) > 1:
        raise RunError(f"None of {', '.join(named.values())} is a finished run, and only one base model can be served.")
    if runs:
        opened, folders, contracts = _open_runs(runs, base_model, shell=vllm is not None)
    else:
        path = next(iter(named.values()))
        opened = _open(path, dtype=dtype, quantize=quantize, shell=vllm is not None)
        folders, contracts = {}, {}
    positions = int(opened.model.config.get_text_config().max_position_embeddings)
    context = min(max_context or positions, positions)
    adapters = {name: folder.adapter for name, folder in folders.items()}
    limits = limits or Limits()
    worker: Backend
    if vllm is not None:
        from .serve.vllm_engine import open_vllm  # wants httpx, which nothing else does

        held = next(iter(contracts.values()), None)
        worker = open_vllm(
            vllm,
            opened,
            adapters=adapters,
            base_name="weitiao-base" if adapters else next(iter(named)),
            dtype=held.dtype if held is not None else dtype,
            quantize=held.quantize if held is not None else quantize,
            limits=limits,
        )
        context = min(context, worker.max_positions)
    else:
        worker = Worker(AdapterSet(base_of(opened.model), adapters), limits=limits)
        context = min(context, limits.max_cache_tokens)
    models = {}
    for name in named:
        contract = contracts.get(name)
        run = None
        if contract is not None:
            run = RunInUse(folder=folders[name], contract=contract, opened=opened)
        models[name] = ServedModel(
            name=name,
            opened=opened,
            adapter=name if contract is not None else None,
            run=run,
            decoding=Sampling(**contract.decoding) if contract is not None else _own_sampling(opened),
            max_context=context,
        )
    expected = {
        (model.name, task.name): _expected(model, task.name) for model in models.values() for task in model.tasks
    }
    figures = Figures(expected, lambda: _numbers(worker))
    return Server(models=models, worker=worker, figures=figures, feedback=Feedback(feedback))


def _named(target: str) -> tuple[str, str]:
    """Name and path of ``NAME=PATH`` or ``PATH``."""
    name, _, path = target.rpartition("=")
    return (name, path) if name and not Path(target).exists() else (Path(target).name or target, target)


def _open_runs(
    runs: Mapping[str, str], base_model: str | None, *, shell: bool
) -> tuple[OpenModel, dict[str, RunFolder], dict[str, Contract]]:
    """The base model that all `runs` were tuned on, their folders and their contracts."""
    folders = {name: RunFolder.open(path) for name, path in runs.items()}
    contracts = {name: Contract.read(folder.contract) for name, folder in folders.items()}
    first_name, first = next(iter(contracts.items()))
    for name, contract in contracts.items():
        contract.require_adapter(adapter_fingerprint(folders[name].adapter), folder=folders[name].adapter)
        for key in ("base_fingerprint", "dtype", "quantize", "template", "stop_ids"):
            if getattr(contract, key) != getattr(first, key):
                raise RunError(
                    f"{runs[name]} and {runs[first_name]} differ in {key} ({getattr(contract, key)!s:.20}, "
                    f"{getattr(first, key)!s:.20}), so they cannot be served on one base model. Start a server for "
                    f"each."
                )
    source = base_model or first.base
    opened = _open(source, dtype=first.dtype, quantize=first.quantize, shell=shell)
    first.require_base(opened.fingerprint, path=source)
    first.require_format(template=opened.renderer.template, stop_ids=opened.renderer.stop_ids)
    return opened, folders, contracts


def _open(path: str, *, dtype: str, quantize: str, shell: bool) -> OpenModel:
    """The model `path`, of which a `shell` has no weights."""
    return open_shell(path) if shell else open_model(path, dtype=dtype, quantize=quantize, must_speak=True)


def _own_sampling(opened: OpenModel) -> Sampling:
    """How a base model's makers have its tokens chosen; the protocol's own defaults where they say nothing."""
    config = getattr(opened.model, "generation_config", None)
    sampling = Sampling(max_new_tokens=1024, temperature=1.0)
    if config is None:
        return sampling
    if config.do_sample is False:
        return sampling
    return replace(
        sampling,
        temperature=float(config.temperature or 1.0),
        top_p=float(config.top_p or 1.0),
        top_k=int(config.top_k or 0),
    )


def _expected(model: ServedModel, task: str) -> float | None:
    """The share of the task's dev answers that were right, which calibrated confidences are to be on average."""
    known = model.calibration.answers.get(task) if model.calibration is not None else None
    return known.num_right / known.rows if known is not None and known.rows else None


def _numbers(worker: Backend) -> dict[str, float]:
    return {name: float(value) for name, value in asdict(worker.stats()).items()}
