"""A finished run → a model of its own, its adapter merged in: for transformers, or for tools made for the originals.

What was written is opened again and held against the run: the same rows must get the same logits, as far as the dtype
holds them. Only then does the folder get its name.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from .apply import open_run
from .errors import ModelError, RunError
from .messages import Message
from .models.adapters import base_model, without_adapter
from .models.glm.original_files import copy_companions, save_original
from .models.opening import DTYPES, OpenModel, open_model
from .models.own_weights import changed_weights_of
from .models.packed_layers import model_packing, unpack_model
from .models.prefix_files import export_original_prefix
from .models.prompt_tuning import prompt_encoder_of
from .models.ptuning import prefix_encoder_of
from .models.sources import fingerprint, first_line, read_json
from .runs import write_folder, write_json

Layout = Literal["native", "original"]
Onto = Literal["unpacked", "float"]
"""What an adapter on packed weights is merged onto: the numbers that the packed weights stand for, so that what is
written computes what the run computes; or the base model's own weights, as they were before they were packed."""

_SHARD_SIZE = "2GB"
_TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}
"""How far logits may move by merging: root mean square, in standard deviations of the logits. The sum of two weights is
rounded to the dtype, float32 keeping 24 bits of it, float16 11, bfloat16 8. Gemma 3 270M moves by 0.019 in bfloat16."""

_ROUNDS_INPUTS = "bnb_int8"
"""The packing whose layers compute with rounded inputs too, which no float weights do."""
_TIMES_MOVED = 3
"""How much more than the base model's own the logits may move where the weights, or the arithmetic, become others."""

_QUESTIONS = (
    "小王上周从北京搬到了上海，在一家书店上班。",
    "Which of these labels fits the text best: sport, science or money?",
    '{"城": "成都", "人": ["李梅", "赵东"]}',
    "这家面馆去年赚的钱比前年多一倍，店主打算再开一家。",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written, and how close it is to the run."""

    folder: Path
    layout: Layout
    dtype: str
    merged: bool
    """False for a P-Tuning v2 prefix, which stays apart and needs its base model."""
    num_tokens: int
    """How many places were compared."""
    difference: float
    """The change of the logits: root mean square, in standard deviations of the logits."""
    tolerance: float
    moved: float | None
    """How far the base model's own logits moved, adapter aside, where it became another one by being unpacked: merging
    onto float weights, or LLM.int8. The tolerance is then made from it."""
    same_choice: float
    """The share of places where the same token is the likeliest."""
    same_prompts: bool
    """Whether the written tokenizer and template make the same tokens of a question."""


def export_run(
    path: str | Path,
    out: str | Path,
    *,
    layout: Layout = "native",
    dtype: str | None = None,
    base_model: str | None = None,
    onto: Onto = "unpacked",
    console: Console | None = None,
) -> Exported:
    """Write the run at `path` to the folder `out` as a whole model, and prove that it answers as the run.

    Args:
        path: the run folder.
        out: is made; must be empty if it is there.
        layout: ``native`` for transformers' classes; ``original`` for the names and files of ChatGLM and GLM-4 as they
            were released. ChatGLM-6B, which transformers has no class for, is written in its original layout always.
        dtype: of the weights; by default that which the run computed in.
        base_model: where the base model lies now, if it was moved.
        onto: what an adapter on packed weights is merged onto.
        console: where it is said what happens.

    Raises:
        RunError: `out` is not empty, or cannot be written.
        ModelError: the model cannot be written so, or what was written computes something else.
        ContractError: the run cannot be opened.
    """
    console = console or Console(stderr=True, markup=False, emoji=False, highlight=False)
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} is there already and not empty. Name another folder.")
    if dtype is not None and dtype not in DTYPES:
        raise RunError(f"The dtype {dtype!r} is unknown. Choose one of {', '.join(DTYPES)}.")
    done: list[Exported] = []

    def fill(temporary: Path) -> None:
        written = _write(
            path,
            temporary,
            name=str(folder.resolve()),
            layout=layout,
            dtype=dtype,
            base_model=base_model,
            onto=onto,
            console=console,
        )
        gc.collect()  # two models at once would not fit
        console.print("checking: what was written is opened and compared with the run …")
        done.append(replace(_compare(written, temporary), folder=folder))

    write_folder(folder, fill)
    return done[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Written:
    """What is kept of a run once its model has left memory."""

    layout: Layout
    dtype: str
    tolerance: float
    moved: float | None
    base: str | None
    """The base model, where what was written is an adapter of it."""
    quantize: str
    """In how many bits that is to be held."""
    rows: tuple[tuple[int, ...], ...]
    prompts: tuple[tuple[int, ...], ...]
    logits: tuple[Tensor, ...]


def _write(
    path: str | Path,
    folder: Path,
    *,
    name: str,
    layout: Layout,
    dtype: str | None,
    base_model: str | None,
    onto: Onto,
    console: Console,
) -> _Written:
    """Open the run, keep its logits for some rows, merge its adapter, write everything into `folder`."""
    run, contract, opened = open_run(path, base_model=base_model)
    if opened.family.layout == "chatglm" and layout == "native":
        console.print("note: transformers has no class for ChatGLM-6B; it is written in its original layout.")
        layout = "original"
    _require_layout(opened, layout)
    _require_onto(opened, contract.quantize, onto)
    computed_in = contract.dtype
    dtype = dtype or computed_in
    prompts = _prompts(opened)
    rows = tuple(
        (*prompt, *opened.renderer.render_answer(text)) for prompt, text in zip(prompts, _QUESTIONS, strict=True)
    )
    logits = tuple(_logits(opened.model, rows))
    moved = None
    whole = isinstance(opened.model, PeftModel) or changed_weights_of(opened.model) is not None
    if whole:
        console.print(f"merging the adapter of {run.path} into {contract.base} …")
        opened, moved = _unpack(opened, run.adapter, rows, dtype=dtype, onto=onto)
        model = _merge(opened.model, DTYPES[dtype])
        console.print(f"writing the {layout} layout in {dtype} …")
        _write_model(model, opened, folder, layout, console)
        contract = replace(
            contract,
            base=name,
            base_fingerprint=fingerprint(folder),
            adapter_fingerprint="",
            dtype=dtype,
            quantize="none",
        )
    else:
        if dtype != computed_in:
            console.print("note: a prefix is written in float32 whatever the dtype; --dtype changes nothing.")
            dtype = computed_in
        console.print(f"writing the prefix of {run.path} as the originals' trainer does …")
        _write_prefix(opened, folder)
    contract.write(folder / "contract.json")
    return _Written(
        layout=layout,
        dtype=dtype,
        tolerance=max(_TOLERANCES[dtype], _TOLERANCES[computed_in], _TIMES_MOVED * (moved or 0.0)),
        moved=moved,
        base=None if whole else base_model or contract.base,
        quantize=contract.quantize,
        rows=rows,
        prompts=prompts,
        logits=logits,
    )


def _require_layout(opened: OpenModel, layout: Layout) -> None:
    """Raise ModelError where the model cannot be written in `layout`."""
    family = opened.family
    if layout == "original" and family.layout is None:
        raise ModelError(
            f"{opened.folder} has no original layout of its own: it is stored as transformers stores models. "
            f"Leave out --layout original."
        )
    if prompt_encoder_of(opened.model) is not None:
        raise ModelError(
            "This run learnt tokens that stand before every row. They cannot be merged into weights, and no layout has "
            "a place for them. Use the run as it is; PEFT reads its folder adapter too; or tune with LoRA."
        )
    if prefix_encoder_of(opened.model) is None:
        return
    if family.layout in (None, "glm4"):
        raise ModelError(
            f"This run learnt a P-Tuning prefix. It cannot be merged into weights, and the original code of "
            f"{family.models} has no place for one. Use the run as it is, or tune with LoRA."
        )
    if layout == "native":
        raise ModelError(
            "This run learnt a P-Tuning prefix. It cannot be merged into weights, and transformers' classes have no "
            "place for one. Export it for the originals' tools: --layout original."
        )


def _require_onto(opened: OpenModel, quantize: str, onto: Onto) -> None:
    """Raise ModelError where there are no weights such as `onto` means to merge onto."""
    quantizer = getattr(base_model(opened.model), "hf_quantizer", None)
    if quantizer is not None:
        raise ModelError(
            f"The base model in {opened.folder} is stored quantised by {quantizer.quantization_config.quant_method}, "
            f"whose weights cannot be unpacked here, so no adapter can be merged into them. Use the run as it is."
        )
    if onto == "float" and quantize == "none":
        packing = model_packing(opened.model)
        why = (
            "is not packed, so float weights are what is merged onto anyway"
            if packing is None
            else (f"is stored packed ({packing}), so there are no float weights of it to merge onto")
        )
        raise ModelError(f"The base model in {opened.folder} {why}. Leave out --onto float.")


def _unpack(
    opened: OpenModel, adapter: Path, rows: Sequence[Sequence[int]], *, dtype: str, onto: Onto
) -> tuple[OpenModel, float | None]:
    """The run's model with float weights, and how far the base model's logits moved where it is another one by that.

    It is another one with the weights that it had before they were packed, and where packed layers rounded their
    inputs.
    """
    packing = model_packing(opened.model)
    if packing is None:
        return opened, None
    is_other = onto == "float" or packing == _ROUNDS_INPUTS
    before = _base_logits(opened.model, rows) if is_other else None
    if onto == "float":
        opened = replace(opened, model=open_model(str(opened.folder), adapter=adapter, dtype=dtype).model)
    else:
        unpack_model(opened.model, DTYPES[dtype])
    if before is None:
        return opened, None
    return opened, _difference(_base_logits(opened.model, rows), before)


def _merge(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """The base model with the adapter added to its weights, or with the weights that were tuned, all in `dtype`."""
    if dtype == torch.float32:
        torch.nn.Module.to(model, dtype)  # before, so that the sum is rounded to nothing less
    merged = model.merge_and_unload(safe_merge=True) if isinstance(model, PeftModel) else model
    assert isinstance(merged, PreTrainedModel)
    torch.nn.Module.to(merged, dtype)
    merged.config.dtype = dtype
    return merged


def _write_model(model: PreTrainedModel, opened: OpenModel, folder: Path, layout: Layout, console: Console) -> None:
    if layout == "original":
        config = read_json(opened.folder / "config.json")
        save_original(model, folder, config=config, source=opened.folder)
        return
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        console.print(
            f"note: the generation settings of {opened.folder} contradict themselves ({first_line(error)}); only the "
            f"special tokens among them are kept.",
            soft_wrap=True,
        )
        model.generation_config = GenerationConfig.from_model_config(model.config)
    model.generation_config.eos_token_id = list(opened.renderer.stop_ids)
    model.save_pretrained(folder, max_shard_size=_SHARD_SIZE)
    opened.tokenizer.save_pretrained(folder)


def _write_prefix(opened: OpenModel, folder: Path) -> None:
    """The prefix with the configuration and the vocabulary of its base model, as the originals' trainer leaves them."""
    write_json(folder / "config.json", read_json(opened.folder / "config.json"))
    export_original_prefix(opened.model, folder)
    copy_companions(opened.folder, folder)


def _prompts(opened: OpenModel) -> tuple[tuple[int, ...], ...]:
    """Some questions as the model is asked them."""
    return tuple(opened.renderer.render_prompt([Message(role="user", text=text)]) for text in _QUESTIONS)


@torch.no_grad()
def _logits(model: PreTrainedModel | PeftModel, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits ``[tokens, vocabulary]`` of each row, as float32 on the CPU."""
    device = next(model.parameters()).device
    return [model(torch.tensor([row], device=device)).logits[0].float().cpu() for row in rows]


def _base_logits(model: PreTrainedModel | PeftModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """The logits of all rows, one behind the other, with the adapter off."""
    with without_adapter(model):
        return torch.cat(_logits(model, rows))


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Root mean square of what logits differ by, in standard deviations of `theirs`."""
    return float((ours - theirs).pow(2).mean().sqrt() / theirs.std())


def _compare(written: _Written, folder: Path) -> Exported:
    """Open what was written and compare it with the run. Raises ModelError where it computes something else."""
    source = str(folder) if written.base is None else written.base
    adapter = None if written.base is None else folder
    opened = open_model(source, adapter=adapter, dtype=written.dtype, quantize=written.quantize)
    ours = torch.cat(_logits(opened.model, written.rows))
    theirs = torch.cat(written.logits)
    difference = _difference(ours, theirs)
    if not difference <= written.tolerance:
        what = (
            "its logits are no numbers"
            if ours.isnan().any()
            else f"logits differ by {difference:.2g} standard deviations"
        )
        fix = "Try --dtype float32." if written.dtype != "float32" else "Please report this with the run."
        raise ModelError(
            f"What was written does not compute what the run computes: {what}, and rounding explains "
            f"{written.tolerance:.2g}. Nothing was kept. {fix}"
        )
    return Exported(
        folder=folder,
        layout=written.layout,
        dtype=written.dtype,
        merged=written.base is None,
        num_tokens=len(theirs),
        difference=difference,
        tolerance=written.tolerance,
        moved=written.moved,
        same_choice=float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        same_prompts=_prompts(opened) == written.prompts,
    )
