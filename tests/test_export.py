"""A finished run becomes a model of its own that computes the same, for transformers and for the originals' tools."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from command_line import refuse, succeed
from glm_checkpoints import (
    config_of,
    make_chatglm_config,
    make_config,
    make_weights,
    stored_weights,
    write_checkpoint,
)
from made_glm import made_tokenizer
from weitiao import export as export_module
from weitiao.apply import open_run
from weitiao.contract import Contract
from weitiao.errors import ModelError, RunError
from weitiao.export import export_run
from weitiao.messages import Message
from weitiao.models import opening
from weitiao.models.adapters import adapter_fingerprint, save_adapter
from weitiao.models.glm.layouts import GlmLayout
from weitiao.models.glm.original import read_prefix
from weitiao.models.opening import open_model
from weitiao.recipe import Lora, PTuning
from weitiao.runs import RunFolder
from weitiao.tuning.methods import add_adapter

ROW = torch.tensor([[5, 9, 3, 7, 11, 2]])


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def made_vocabularies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders of the GLM family made here have small vocabularies, which their makers' files cannot hold."""
    monkeypatch.setattr(opening, "glm_tokenizer", lambda folder, layout: vocabulary(layout))


@cache
def vocabulary(layout: GlmLayout) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = deepcopy(made_tokenizer(layout))
    tokenizer.eos_token = "<eop>" if layout == "chatglm" else "</s>"  # in itself the made one only knows formats
    return tokenizer


def make_glm_folder(folder: Path, layout: GlmLayout) -> Path:
    """A tiny checkpoint of ChatGLM-6B or ChatGLM3 that can be asked."""
    ids = vocabulary(layout).convert_tokens_to_ids
    code = {"auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}, "torch_dtype": "float16"}
    if layout == "chatglm":
        special = {"bos": "<sop>", "eos": "<eop>", "gmask": "[gMASK]", "mask": "[MASK]"}
        named = {f"{name}_token_id": ids(token) for name, token in special.items()}
        config = make_chatglm_config(vocab_size=1200, **code, **named)
    else:
        config = make_config(padded_vocab_size=1200, eos_token_id=ids("</s>"), **code)
    write_checkpoint(folder, config, make_weights(config))
    (folder / "modeling_chatglm.py").write_text("raise SystemExit")
    (folder / "tokenizer.model").write_bytes(b"a vocabulary")
    return folder


def make_run(
    folder: Path,
    model: Path,
    *,
    prefix: bool = False,
    dtype: str = "float32",
    quantize: str = "none",
    dora: bool = False,
) -> Path:
    """A finished run on `model` whose adapter is random and changes every answer."""
    opened = open_model(str(model), dtype=dtype, quantize=quantize)
    method = PTuning(name="ptuning_v2", num_virtual_tokens=5) if prefix else Lora(rank=4, alpha=16, dora=dora)
    tuned = add_adapter(opened.model, method, seed=3)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(4)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    run = RunFolder(folder)
    run.adapter.mkdir(parents=True)
    save_adapter(tuned, run.adapter)
    Contract(
        base=str(model),
        base_fingerprint=opened.fingerprint,
        adapter_fingerprint=adapter_fingerprint(run.adapter),
        family=opened.family.name,
        template=opened.renderer.template,
        stop_ids=opened.renderer.stop_ids,
        tasks=(),
        decoding={},
        answer_limits={},
        batch_rows=1,
        max_length=64,
        shorten_input=False,
        data_fingerprint="",
        dtype=dtype,
        quantize=quantize,
    ).write(run.contract)
    return folder


@pytest.fixture
def run(tmp_path: Path, tiny_qwen2_folder: Path) -> Path:
    return make_run(tmp_path / "run", tiny_qwen2_folder)


@torch.no_grad()
def logits_of(model: nn.Module, row: Tensor = ROW) -> Tensor:
    logits: Tensor = model(row).logits
    return logits.float()


def test_the_exported_model_is_the_run_to_transformers_alone(run: Path, tmp_path: Path) -> None:
    printed = succeed("export", run, tmp_path / "out")
    assert f"{tmp_path / 'out'}: the merged model in float32, native layout." in printed
    assert "at 100.0% of them the same token is the likeliest" in " ".join(printed.split())
    _, kept, opened = open_run(run)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    wanted = logits_of(opened.model)
    assert torch.allclose(logits_of(alone), wanted, atol=1e-5)
    assert isinstance(opened.model, PeftModel)
    with opened.model.disable_adapter():
        assert not torch.allclose(logits_of(opened.model), wanted, atol=1e-2)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("小王")["input_ids"] == opened.tokenizer("小王")["input_ids"]
    assert alone.generation_config.eos_token_id == list(kept.stop_ids)


def test_the_contract_goes_with_the_model_and_holds_for_it(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "out", dtype="bfloat16")
    before, after = Contract.read(run / "contract.json"), Contract.read(tmp_path / "out" / "contract.json")
    opened = open_model(after.base, dtype=after.dtype)
    after.require_base(opened.fingerprint, path=after.base)
    after.require_format(template=opened.renderer.template, stop_ids=opened.renderer.stop_ids)
    assert (after.base, after.dtype, after.adapter_fingerprint) == (str(tmp_path / "out"), "bfloat16", "")
    assert (after.tasks, after.max_length, after.stop_ids) == (before.tasks, before.max_length, before.stop_ids)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_dtype_is_as_close_as_its_rounding(run: Path, tmp_path: Path, dtype: str) -> None:
    done = export_run(run, tmp_path / "out", dtype=dtype)
    assert done.difference <= done.tolerance == {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}[dtype]
    assert (done.dtype, done.layout, done.merged, done.same_prompts) == (dtype, "native", True, True)
    assert {tensor.dtype for tensor in stored_weights(tmp_path / "out").values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_an_adapter_on_packed_weights_is_merged_into_unpacked_ones(
    tmp_path: Path, tiny_qwen2_folder: Path, quantize: str
) -> None:
    packed = make_run(tmp_path / "run", tiny_qwen2_folder, quantize=quantize)
    done = export_run(packed, tmp_path / "out")
    assert done.difference <= 1e-4
    assert {tensor.dtype for tensor in stored_weights(tmp_path / "out").values()} == {torch.float32}
    assert Contract.read(tmp_path / "out" / "contract.json").quantize == "none"


def test_dora_is_merged_too(tmp_path: Path, tiny_qwen2_folder: Path) -> None:
    assert export_run(make_run(tmp_path / "run", tiny_qwen2_folder, dora=True), tmp_path / "out").difference <= 1e-4


def test_generation_settings_that_contradict_themselves_do_not_stop_it(
    tmp_path: Path, tiny_qwen2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_qwen2_folder, tmp_path / "model"))
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**settings, "do_sample": False, "temperature": 0.3}))
    export_run(make_run(tmp_path / "run", model), tmp_path / "out")
    assert "the generation settings of" in " ".join(capsys.readouterr().err.split())
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert "temperature" not in written


def test_nothing_is_kept_of_a_model_that_computes_something_else(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = export_module._write_model

    def write_wrong(model: Any, *rest: Any) -> None:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0] += 1
        write(model, *rest)

    monkeypatch.setattr(export_module, "_write_model", write_wrong)
    with pytest.raises(ModelError, match="does not compute what the run computes: logits differ by"):
        export_run(run, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run"]


def test_what_cannot_be_done_is_refused_before_anything_is_written(
    run: Path, tmp_path: Path, tiny_qwen2_folder: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    assert "is there already and not empty" in refuse("export", run, full)
    assert "holds no finished run" in refuse("export", tmp_path, tmp_path / "out")
    assert "has no original layout" in refuse("export", run, tmp_path / "out", "--layout", "original")
    prefix = make_run(tmp_path / "prefix", tiny_qwen2_folder, prefix=True)
    assert "cannot be merged into weights" in refuse("export", prefix, tmp_path / "out")
    with pytest.raises(RunError, match="The dtype 'int3' is unknown"):
        export_run(run, tmp_path / "out", dtype="int3")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["chatglm", "chatglm3"])
def test_glm_runs_go_back_to_the_originals_names(tmp_path: Path, layout: GlmLayout) -> None:
    model = make_glm_folder(tmp_path / "model", layout)
    run = make_run(tmp_path / "run", model)
    done = export_run(run, tmp_path / "out", layout="original")
    assert (done.layout, done.same_prompts) == ("original", True)
    assert done.difference <= 1e-4
    before, after = stored_weights(model), stored_weights(tmp_path / "out")
    rotary = {name for name in after if name.endswith("inv_freq")}
    assert before.keys() | rotary == after.keys()
    name = next(name for name in after if name.endswith("query_key_value.weight"))
    assert before[name].shape == after[name].shape
    assert not torch.equal(before[name], after[name])
    assert config_of(tmp_path / "out") == {**config_of(model), "torch_dtype": "float32"}
    beside = {file.name for file in model.iterdir()} - {"model.safetensors"}
    assert beside <= {file.name for file in (tmp_path / "out").iterdir()}
    _, _, opened = open_run(run)
    row = torch.tensor([opened.renderer.render_prompt([Message(role="user", text="小王住在北京。")])])
    again = open_model(str(tmp_path / "out"), dtype="float32")
    assert torch.allclose(logits_of(again.model, row), logits_of(opened.model, row), atol=1e-3)


def test_chatglm_has_no_other_layout_and_chatglm3_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_glm_folder(tmp_path / "chatglm", "chatglm")
    done = export_run(make_run(tmp_path / "run", model, quantize="int8"), tmp_path / "out")
    assert "transformers has no class for ChatGLM-6B" in " ".join(capsys.readouterr().err.split())
    assert done.layout == "original"
    assert "quantization_bit" not in config_of(tmp_path / "out")
    model = make_glm_folder(tmp_path / "chatglm3", "chatglm3")
    export_run(make_run(tmp_path / "run3", model), tmp_path / "out3")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out3")).__name__ == "GlmForCausalLM"


@pytest.mark.parametrize("layout", ["chatglm", "chatglm3"])
def test_a_prefix_is_written_as_the_originals_trainer_does(tmp_path: Path, layout: GlmLayout) -> None:
    model = make_glm_folder(tmp_path / "model", layout)
    run = make_run(tmp_path / "run", model, prefix=True)
    done = export_run(run, tmp_path / "out", layout="original")
    assert not done.merged
    assert done.difference == 0
    assert {name.partition(".")[0] for name in read_prefix(tmp_path / "out") or {}} == {"embedding"}
    stored = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert set(stored) == {"transformer.prefix_encoder.embedding.weight"}
    told = config_of(tmp_path / "out")
    assert (told["pre_seq_len"], told["prefix_projection"]) == (5, False)
    assert {**told, **config_of(model)} == told
    if layout == "chatglm3":
        with pytest.raises(ModelError, match="Export it for the originals' tools: --layout original"):
            export_run(run, tmp_path / "native")
