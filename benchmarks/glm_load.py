"""Peak memory of opening full-size ChatGLM checkpoints, as a share of the model's own bytes.

    python benchmarks/glm_load.py [--model chatglm3-6b] [--kind bin] [--dtype float16] [--folder DIR]

Makes a checkpoint of the model's full size with random float16 weights in files of 2 GB, as the released ones have,
opens it in a process of its own with `open_original`, touches every weight there, and reads from the kernel how much
memory that process ever held (VmHWM: its own and mapped files' pages together). The checkpoint is deleted afterwards.

Exits with 1 when a peak is above 1.10 times the model's bytes. What Python and the libraries take before the checkpoint
is opened counts in the peak.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from safetensors.torch import save_file
from torch import Tensor

WANTED_RATIO = 1.10
SHARD_BYTES = 2_000_000_000

_SHARED = {"model_type": "chatglm", "num_layers": 28, "hidden_size": 4096, "num_attention_heads": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "chatglm3-6b": {
        **_SHARED,
        "_name_or_path": "chatglm3-6b",
        "padded_vocab_size": 65024,
        "ffn_hidden_size": 13696,
        "kv_channels": 128,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "add_qkv_bias": True,
        "layernorm_epsilon": 1e-5,
        "seq_length": 8192,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "chatglm-6b": {
        **_SHARED,
        "vocab_size": 130528,
        "inner_hidden_size": 16384,
        "layernorm_epsilon": 1e-5,
        "max_sequence_length": 2048,
        "position_encoding_2d": True,
        "bos_token_id": 130004,
        "eos_token_id": 130005,
        "mask_token_id": 130000,
        "gmask_token_id": 130001,
        "pad_token_id": 3,
    },
}


def original_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the released checkpoint's tensors, in its order."""
    hidden = config["hidden_size"]
    if "padded_vocab_size" in config:
        vocabulary, inner = config["padded_vocab_size"], config["ffn_hidden_size"]
        rows = (config["num_attention_heads"] + 2 * config["multi_query_group_num"]) * config["kv_channels"]
        yield "transformer.embedding.word_embeddings.weight", (vocabulary, hidden)
        yield "transformer.rotary_pos_emb.inv_freq", (32,)
        for number in range(config["num_layers"]):
            layer = f"transformer.encoder.layers.{number}"
            yield f"{layer}.input_layernorm.weight", (hidden,)
            yield f"{layer}.self_attention.query_key_value.weight", (rows, hidden)
            yield f"{layer}.self_attention.query_key_value.bias", (rows,)
            yield f"{layer}.self_attention.dense.weight", (hidden, hidden)
            yield f"{layer}.post_attention_layernorm.weight", (hidden,)
            yield f"{layer}.mlp.dense_h_to_4h.weight", (2 * inner, hidden)
            yield f"{layer}.mlp.dense_4h_to_h.weight", (hidden, inner)
        yield "transformer.encoder.final_layernorm.weight", (hidden,)
        yield "transformer.output_layer.weight", (vocabulary, hidden)
        return
    vocabulary, inner = config["vocab_size"], config["inner_hidden_size"]
    yield "transformer.word_embeddings.weight", (vocabulary, hidden)
    for number in range(config["num_layers"]):
        layer = f"transformer.layers.{number}"
        yield f"{layer}.attention.rotary_emb.inv_freq", (32,)
        modules = {
            "input_layernorm": (hidden,),
            "attention.query_key_value": (3 * hidden, hidden),
            "attention.dense": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.dense_h_to_4h": (inner, hidden),
            "mlp.dense_4h_to_h": (hidden, inner),
        }
        for name, shape in modules.items():
            yield f"{layer}.{name}.weight", shape
            yield f"{layer}.{name}.bias", shape[:1]
    yield "transformer.final_layernorm.weight", (hidden,)
    yield "transformer.final_layernorm.bias", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def write_skeleton(folder: Path, config: dict[str, Any], kind: str) -> None:
    """Write the checkpoint file by file; its output layer equals its embedding where the model is tied."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in original_shapes(config):
        held = sum(2 * torch.Size(one).numel() for one in files[-1].values())
        if held and held + 2 * torch.Size(shape).numel() > SHARD_BYTES:
            files.append({})
        files[-1][name] = shape
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    places = {}
    for number, shapes in enumerate(files, start=1):
        file = f"{stem}-{number:05}-of-{len(files):05}.{suffix}"
        tensors = {name: _random(name, shape) for name, shape in shapes.items()}
        save_file(tensors, folder / file) if kind == "safetensors" else torch.save(tensors, folder / file)
        places |= dict.fromkeys(shapes, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")


def _random(name: str, shape: tuple[int, ...]) -> Tensor:
    """Random numbers of a weight's size: one million of them over and over, other ones for every shape."""
    random = torch.Generator().manual_seed(torch.Size(shape).numel())
    count = torch.Size(shape).numel()
    some = (torch.randn(min(count, 1_000_003), generator=random) * 0.02).half()
    return some.repeat(-(-count // len(some)))[:count].view(shape).clone()


def measure(folder: Path, dtype: str, bits: int | None) -> dict[str, float]:
    """Open the checkpoint in `folder` in this process; what it took."""
    from weitiao.models.glm.original import open_original

    before = _memory()
    start = time.perf_counter()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = open_original(folder, config, dtype=getattr(torch, dtype), bits=bits)
    seconds = time.perf_counter() - start
    opened = _memory()
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values()
    for tensor in tensors:
        for part in tensor.detach().flatten().split(1 << 24):
            part.max()  # every page is touched
    after = _memory()
    return {
        "model": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "before": before["VmRSS"],
        "opened": opened["VmRSS"],
        "peak": after["VmHWM"],
        "own": after["RssAnon"],
        "mapped": after["RssFile"],
        "seconds": seconds,
    }


def _memory() -> dict[str, int]:
    """What the kernel says of this process, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    wanted = ("VmHWM:", "VmRSS:", "RssAnon:", "RssFile:")
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[0] in wanted}


def main() -> int:
    """Make, open, report, delete; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, action="append", help="which one; by default both, one by one")
    parser.add_argument("--kind", choices=["bin", "safetensors"], default="bin")
    parser.add_argument("--dtype", action="append", help="dtypes to open it in; default: float16")
    parser.add_argument("--bits", type=int, choices=[4, 8], help="pack the weights of the layers as they are read")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made; 13 GB must be free there")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    dtypes = chosen.dtype or ["float16"]
    if chosen.measure is not None:
        print(json.dumps(measure(chosen.measure, dtypes[0], chosen.bits)))
        return 0
    print(describe_machine())
    print("| model | files | opened as | model, GB | peak, GB | ratio | own, GB | mapped, GB | before, GB | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    worst = 0.0
    for name in chosen.model or CONFIGS:
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=chosen.folder))
        try:
            write_skeleton(folder, CONFIGS[name], chosen.kind)
            for dtype in dtypes:
                command = [sys.executable, __file__, "--measure", str(folder), "--dtype", dtype]
                command += ["--bits", str(chosen.bits)] if chosen.bits else []
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    print(done.stderr, file=sys.stderr)
                    return 1
                took = json.loads(done.stdout)
                ratio = took["peak"] / took["model"]
                worst = max(worst, ratio)
                figures = [took[key] / 1e9 for key in ("own", "mapped", "before")]
                told = f"{dtype}, {chosen.bits} bits" if chosen.bits else dtype
                print(
                    f"| {name} | {chosen.kind} | {told} | {took['model'] / 1e9:.2f} | {took['peak'] / 1e9:.2f} | "
                    f"{ratio:.3f} | {' | '.join(f'{figure:.2f}' for figure in figures)} | {took['seconds']:.1f} |",
                    flush=True,
                )
        finally:
            shutil.rmtree(folder)
    return int(worst > WANTED_RATIO)


if __name__ == "__main__":
    sys.exit(main())
