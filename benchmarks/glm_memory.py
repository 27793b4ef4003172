"""GPU memory and speed of tuning full-size ChatGLM models at the configurations that the originals publish figures for.

    python benchmarks/glm_memory.py                  measured, where there is a GPU
    python benchmarks/glm_memory.py --dry-run        arithmetic alone, anywhere
    python benchmarks/glm_memory.py --tiny           the measuring itself on models of two layers, on any machine

| case | rows | bar | where the bar comes from |
|---|---|---|---|
| chatglm3-lora | 4 of 256 + 512 tokens | 14,082 MiB | finetune_demo of ChatGLM3, lora.yaml |
| chatglm3-ptuning | 4 of 256 + 512 tokens | 18,426 MiB | finetune_demo of ChatGLM3, ptuning_v2.yaml |
| chatglm-int4-lora | 4 of 100 + 100 tokens | 7 GB | ChatGLM-6B's table for INT4, parameter-efficient tuning |
| chatglm3-full | 4 of 256 + 512 tokens | one card of 80 GiB | sft.yaml takes four cards of 48,346 MiB each |

Weights are random and of the real size: neither memory nor speed depends on their values. Each case runs in a process
of its own, several optimiser steps, all rows of a step full to the last token. Its memory is what torch reserved at the
peak, and what the card holds besides (CUDA's own context), so that it compares with nvidia-smi, which the originals'
figures come from. Exits with 1 when a case is above its bar. There is no method yet that tunes every weight:
chatglm3-full is arithmetic always.

Without a GPU everything is arithmetic: the bytes of weights, adapter, gradients, AdamW's states and of the inputs that
checkpointed layers keep are exact, counted on a model without memory; the other activations are what `weitiao check
--plan` estimates before it takes a step. CUDA's context, some 300 to 600 MiB, is not in it. Measured nothing is.

The original remote code beside it, in an environment that still runs it (it fails on transformers 4.42 and later):

    python3.10 -m venv chatglm3 && . chatglm3/bin/activate
    pip install torch==2.2.2 transformers==4.40.2 peft==0.10.0 accelerate==0.29.3 datasets sentencepiece "numpy<2" \
        jieba rouge_chinese ruamel.yaml typer
    git clone https://github.com/THUDM/ChatGLM3 && cd ChatGLM3/finetune_demo
    python finetune_hf.py data/AdvertiseGen THUDM/chatglm3-6b configs/lora.yaml &
    nvidia-smi --query-gpu=memory.used --format=csv,noheader -l 5

`--rows 4 --source 256 --target 512` is the same work here; its Trainer logs train_samples_per_second, times 768 the
tokens of a second where its rows are full.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from glm_load import CONFIGS
from machine import describe_machine
from torch import nn
from transformers import GlmForCausalLM, PreTrainedModel

from weitiao.models.glm.chatglm import ChatGlmForCausalLM
from weitiao.models.glm.chatglm_config import ChatGlmConfig
from weitiao.models.glm.config import glm_config
from weitiao.models.quantized import QuantizedLinear, quantize_model, use_quantized_layers
from weitiao.recipe import Lora, PTuning, Train
from weitiao.render.base import Example
from weitiao.train.memory import peak_bytes
from weitiao.train.plan import make_plan
from weitiao.train.step import pass_sizes, set_up, step_batches, take_step
from weitiao.tuning.methods import add_adapter

MIB, GIB = 1 << 20, 1 << 30
_DTYPE = torch.bfloat16
_WARM_UP, _TIMED = 2, 5


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration of an original, and the memory that it may take."""

    name: str
    model: str
    method: Lora | PTuning | None
    """None: every weight."""
    bar: int
    """Bytes."""
    bits: int | None = None
    rows: int = 4
    source: int = 256
    target: int = 512

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.source + self.target


_LORA = {"rank": 8, "alpha": 32, "dropout": 0.1}
CASES = (
    Case(
        name="chatglm3-lora",
        model="chatglm3-6b",
        method=Lora(**_LORA, targets=("q_proj", "k_proj", "v_proj")),
        bar=14_082 * MIB,
    ),
    Case(name="chatglm3-ptuning", model="chatglm3-6b", method=PTuning(num_virtual_tokens=128), bar=18_426 * MIB),
    Case(
        name="chatglm-int4-lora",
        model="chatglm-6b",
        method=Lora(**_LORA, targets=("query_key_value",)),
        bar=7_000_000_000,
        bits=4,
        source=100,
        target=100,
    ),
    Case(name="chatglm3-full", model="chatglm3-6b", method=None, bar=80 * GIB),
)


def build(case: Case, device: str, *, tiny: bool) -> PreTrainedModel:
    """The case's model on `device`, its layers packed where the case says so."""
    settings: dict[str, Any] = dict(CONFIGS[case.model])
    if tiny:
        inner = "ffn_hidden_size" if "ffn_hidden_size" in settings else "inner_hidden_size"
        settings |= {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 4, inner: 256}
        settings |= {"kv_channels": 32} if "kv_channels" in settings else {}
    before = torch.get_default_dtype()
    torch.set_default_dtype(_DTYPE)
    try:
        with torch.device(device):
            if "padded_vocab_size" in settings:
                config = glm_config(settings, "chatglm3", dtype=_DTYPE, tie_word_embeddings=False)
                model: PreTrainedModel = GlmForCausalLM(config)
            else:
                model = ChatGlmForCausalLM(ChatGlmConfig(**settings, dtype=_DTYPE))
    finally:
        torch.set_default_dtype(before)
    if case.bits:
        (use_quantized_layers if device == "meta" else quantize_model)(model, case.bits)
        gc.collect()
    return model


def examples_of(case: Case, vocabulary: int) -> list[Example]:
    """Rows of random tokens, full to the last; ChatGLM-6B's end their context as its prompts do."""
    random = torch.Generator().manual_seed(0)
    mask = tuple(place >= case.source for place in range(case.length))
    made = []
    for _ in range(case.rows):
        ids = torch.randint(1000, vocabulary - 1000, (case.length,), generator=random).tolist()
        if case.model == "chatglm-6b":
            special = CONFIGS["chatglm-6b"]
            ids[case.source - 2 : case.source] = [special["gmask_token_id"], special["bos_token_id"]]
        made.append(Example(token_ids=tuple(ids), loss_mask=mask))
    return made


# ---- arithmetic ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """What a case takes, by its parts."""

    weights: int
    adapter: int
    gradients: int
    states: int
    inputs: int
    """What checkpointed layers keep: their inputs, from which the backward pass computes them again."""
    activations: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.weights + self.adapter + self.gradients + self.states + self.inputs + self.activations


def arithmetic(case: Case, *, checkpointing: bool, tokens_per_pass: int) -> tuple[Bytes, int]:
    """The bytes of a case, and the tokens of its largest pass; adapter, gradients and AdamW's states are float32."""
    model = build(case, "meta", tiny=False)
    weights = _size(model)
    if case.method is None:
        count = sum(parameter.numel() for parameter in model.parameters())
        learnt: nn.Module = model.requires_grad_(True)
        adapter, gradients, states = 0, weights, 2 * weights
    else:
        learnt = add_adapter(model, case.method, seed=0)
        count = sum(parameter.numel() for parameter in learnt.parameters() if parameter.requires_grad)
        adapter, gradients, states = 4 * count, 4 * count, 8 * count
    settings = Train(batch_size=case.rows, tokens_per_pass=tokens_per_pass, gradient_checkpointing=checkpointing)
    foretold = _foretell(case, model, settings)
    [*_, largest] = sorted(pass_sizes([case.length] * case.rows, settings))
    # what the forecast holds besides weights and learnt parameters is activations and the head's buffers
    parameters = {id(one): one for one in model.parameters()}.values()
    frozen = sum(one.numel() * one.element_size() for one in parameters)
    activations = foretold - frozen - 12 * count
    inputs = largest * model.config.num_hidden_layers * model.config.hidden_size * _DTYPE.itemsize
    took = Bytes(
        weights=weights,
        adapter=adapter,
        gradients=gradients,
        states=states,
        inputs=inputs if checkpointing else 0,
        activations=activations,
    )
    return took, largest


def _foretell(case: Case, model: PreTrainedModel, settings: Train) -> int:
    """The peak that `weitiao check --plan` estimates before it takes a step, for a GPU."""
    rows = examples_of(case, 60_000)
    return make_plan(model, rows, [1.0] * len(rows), settings).memory_bytes


def _size(model: nn.Module) -> int:
    """The bytes of a model's parameters and of the scales of its packed ones, each counted once."""
    tensors = {id(one): one for one in model.parameters()}
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            tensors[id(layer.weight_scale)] = layer.weight_scale  # type: ignore[assignment]
    return sum(one.numel() * one.element_size() for one in tensors.values())


def full_variants() -> Iterator[tuple[str, float]]:
    """Ways to tune every weight, and the bytes that each weight takes besides activations."""
    yield "bfloat16 weights, float32 gradients, copies and AdamW states", 2 + 4 + 4 + 8
    yield "bfloat16 weights, gradients and AdamW states", 2 + 2 + 4
    yield "the same, each gradient used and freed in the backward pass", 2 + 4
    yield "the same, AdamW states in 8 bits", 2 + 2


_ARITHMETIC = """ARITHMETIC, not measured, in MiB: exact bytes of weights, adapter, gradients, AdamW's states and the
inputs kept by checkpointed layers; other activations as weitiao's forecast has them; CUDA's context is not in it.
Passes of 1,536 tokens are the default: a step in several passes gives the same update.
"""


def report_arithmetic(cases: tuple[Case, ...]) -> int:
    """Print what each case takes by arithmetic; 1 where one is above its bar with checkpointing, else 0."""
    print(_ARITHMETIC)
    heads = "case | checkpointing | tokens a pass | weights | adapter | gradients | states"
    heads += " | inputs | activations | sum | bar"
    print(f"| {heads} |\n|{'---|' * 11}", flush=True)
    above = 0
    for case in cases:
        for checkpointing in (True, False):
            for tokens in sorted({min(1536, case.rows * case.length), case.rows * case.length}):
                took, largest = arithmetic(case, checkpointing=checkpointing, tokens_per_pass=tokens)
                parts = (took.weights, took.adapter, took.gradients, took.states, took.inputs, took.activations)
                print(
                    f"| {case.name} | {'on' if checkpointing else 'off'} | {largest:,} | "
                    f"{' | '.join(f'{part / MIB:,.0f}' for part in (*parts, took.total, case.bar))} |",
                    flush=True,
                )
                above += checkpointing and tokens <= 1536 and case.method is not None and took.total > case.bar
    model = build(CASES[-1], "meta", tiny=False)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"\nFull fine-tuning of ChatGLM3-6B, {count:,} weights; there is no such method yet, so nothing to measure.")
    print("sft.yaml takes four cards of 48,346 MiB, 193,384 MiB in all. On one card, activations aside:")
    for told, per_weight in full_variants():
        print(f"  {count * per_weight / MIB:>8,.0f} MiB  {told}")
    return int(above > 0)


# ---- measuring ----------------------------------------------------------------------------------------------------


def measure(case: Case, *, checkpointing: bool, tokens_per_pass: int, tiny: bool) -> dict[str, float]:
    """Tune the case's model some steps in this process: peak bytes and tokens per second."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = build(case, device.type, tiny=tiny)
    if case.method is None:
        raise SystemExit(f"{case.name}: there is no method yet that tunes every weight; see --dry-run.")
    tuned = add_adapter(model, case.method, seed=0)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what was packed, and its float weights, are no part of tuning
        torch.cuda.reset_peak_memory_stats()
    settings = Train(
        batch_size=case.rows,
        tokens_per_pass=tokens_per_pass,
        gradient_checkpointing=checkpointing,
        learning_rate=5e-5,
        row_balance=0.0,
    )
    setup = set_up(tuned, settings, steps=_WARM_UP + _TIMED)
    rows = examples_of(case, model.config.vocab_size)
    seconds = 0.0
    for step in range(_WARM_UP + _TIMED):
        batches = step_batches(rows, [""] * len(rows), settings, device, row_prefix=setup.trained.row_prefix)
        _wait(device)
        started = time.perf_counter()
        take_step(setup, batches, settings)
        _wait(device)
        seconds += time.perf_counter() - started if step >= _WARM_UP else 0.0
    besides = 0
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        besides = total - free - torch.cuda.memory_reserved()
    return {
        "peak": peak_bytes(device) + besides,
        "tokens_per_second": _TIMED * case.rows * case.length / seconds,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def report_measured(cases: tuple[Case, ...], options: argparse.Namespace) -> int:
    """Measure each case in a process of its own; 1 where one is above its bar or fails, else 0."""
    print("| case | checkpointing | tokens a pass | peak, MiB | bar, MiB | tokens/s |")
    print("|---|---|---|---|---|---|", flush=True)
    missed = []
    for case in cases:
        for checkpointing in (True, False):
            if case.method is None:
                continue
            command = [sys.executable, __file__, "--measure", case.name, "--tokens-per-pass", str(options.tokens)]
            command += ["--no-checkpointing"] if not checkpointing else []
            command += ["--tiny"] if options.tiny else []
            command += [f"--{key}={value}" for key, value in sizes_of(options).items()]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            told = f"| {case.name} | {'on' if checkpointing else 'off'} | {options.tokens:,} |"
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["failed"])[-1]
                print(f"{told} {reason[:100]} | {case.bar / MIB:,.0f} | |", flush=True)
                missed += [f"{case.name}: {reason}"] if checkpointing else []
                continue
            took = json.loads(done.stdout.splitlines()[-1])
            speed = took["tokens_per_second"]
            print(f"{told} {took['peak'] / MIB:,.0f} | {case.bar / MIB:,.0f} | {speed:,.0f} |", flush=True)
            if checkpointing and took["peak"] > case.bar and not options.tiny:
                missed.append(f"{case.name}: {took['peak'] / MIB:,.0f} MiB, at most {case.bar / MIB:,.0f} wanted")
    met = "measuring works; bars are for the full size" if options.tiny else "every bar is met"
    print("\n".join(["missed:", *missed]) if missed else met)
    return int(bool(missed))


def sizes_of(options: argparse.Namespace) -> dict[str, int]:
    """The sizes of a step that were given instead of the cases' own."""
    given = {"rows": options.rows, "source": options.source, "target": options.target}
    return {key: value for key, value in given.items() if value is not None}


def main() -> int:
    """Parse, measure or count, report; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="default: all")
    parser.add_argument("--dry-run", action="store_true", help="arithmetic alone")
    parser.add_argument("--tiny", action="store_true", help="models of two layers, to see that measuring works")
    parser.add_argument("--tokens-per-pass", dest="tokens", type=int, default=1536)
    parser.add_argument("--rows", type=int, help="rows of a step, instead of the case's own")
    parser.add_argument("--source", type=int, help="tokens of a prompt, instead of the case's own")
    parser.add_argument("--target", type=int, help="tokens of an answer, instead of the case's own")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sized = [replace(case, **sizes_of(options)) for case in CASES]
    if options.measure:
        [case] = (case for case in sized if case.name == options.measure)
        took = measure(case, checkpointing=options.checkpointing, tokens_per_pass=options.tokens, tiny=options.tiny)
        print(json.dumps(took))
        return 0
    cases = tuple(case for case in sized if not options.case or case.name in options.case)
    print(describe_machine(), flush=True)
    if options.tiny or (torch.cuda.is_available() and not options.dry_run):
        return report_measured(cases, options)
    if not options.dry_run:
        print("There is no GPU here, so nothing is measured.")
    return report_arithmetic(cases)


if __name__ == "__main__":
    sys.exit(main())
