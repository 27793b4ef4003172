"""Weights come whole and unchanged from any kind of files, go back bit for bit, and damaged files are told apart."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from glm_checkpoints import (
    NATIVE,
    config_of,
    golden_folder,
    make_chatglm_config,
    make_config,
    make_weights,
    opened,
    stored_weights,
    write_checkpoint,
)
from weitiao.errors import ModelError
from weitiao.models import shards
from weitiao.models.glm import original
from weitiao.models.glm.original import open_original
from weitiao.models.glm.original_files import save_original
from weitiao.models.quantized import quantize_weight
from weitiao.models.shards import open_shards

KINDS = ("safetensors", "bin", "old bin")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QKV = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
GATE = "transformer.encoder.layers.0.mlp.dense_h_to_4h.weight"


class Code:
    """What runs when it is unpickled: it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = make_config()
    return write_checkpoint(tmp_path / "model", config, make_weights(config), kind="bin", num_files=4)


@pytest.fixture(params=["copied", "mapped"])
def small_weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether weights as small as those here are parts of their mapped file, as large ones are."""
    if request.param == "mapped":
        monkeypatch.setattr(original, "_WORTH_MAPPING", 0)
    return str(request.param)


@pytest.mark.usefixtures("small_weights")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [make_config, make_chatglm_config])
def test_loaded_and_saved_weights_are_the_same_bits(
    tmp_path: Path, make: Callable[..., dict[str, Any]], kind: str, num_files: int, dtype: torch.dtype
) -> None:
    config = make(torch_dtype=str(dtype).removeprefix("torch."))
    weights = make_weights(config, dtype=dtype)
    folder = write_checkpoint(tmp_path / "original", config, weights, kind=kind, num_files=num_files)
    model = opened(folder, dtype)
    for shard_bytes in (1 << 30, 2000):
        back = tmp_path / f"back-{shard_bytes}"
        save_original(model, back, config=config, source=folder, shard_bytes=shard_bytes)
        assert same(stored_weights(back), weights)
        assert config_of(back) == config
        assert same(opened(back, dtype).state_dict(), model.state_dict())
        assert len(list(back.glob("*.safetensors"))) == 1 if shard_bytes > 2000 else len(list(back.iterdir())) > 5


@pytest.mark.parametrize("name", [*NATIVE, "chatglm_v1", "chatglm_v1_int4/int4", "chatglm_v1_int4/int8"])
def test_reference_checkpoints_come_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    folder = golden_folder(name)
    config = config_of(folder)
    model = opened(folder, torch.float16 if "int" in name else torch.float32)
    save_original(model, tmp_path / "back", config=config, source=folder, shard_bytes=30_000)
    assert same(stored_weights(tmp_path / "back"), load_file(folder / "model.safetensors"))
    assert config_of(tmp_path / "back") == config


@pytest.mark.parametrize("name", ["chatglm_v1_ptuning/projection", "chatglm3_ptuning/no_projection"])
def test_a_prefix_goes_back_with_the_weights(tmp_path: Path, name: str) -> None:
    from weitiao.models.glm.original import read_prefix
    from weitiao.models.ptuning import attach_original_prefix

    folder = golden_folder(name)
    config, prefix = config_of(folder), read_prefix(folder)
    assert prefix is not None
    model = attach_original_prefix(opened(folder), config, prefix)
    save_original(model, tmp_path / "back", config={**config, "pre_seq_len": None}, source=folder)
    assert config_of(tmp_path / "back") == config
    assert same(read_prefix(tmp_path / "back") or {}, prefix)
    save_original(opened(folder), tmp_path / "without", config=config)
    assert config_of(tmp_path / "without")["pre_seq_len"] is None


def test_weights_are_cast_packed_and_split_as_they_come(tmp_path: Path) -> None:
    config = make_config()
    weights = make_weights(config, dtype=torch.float16)
    folder = write_checkpoint(tmp_path, config, weights, num_files=2)
    attention = opened(folder, torch.bfloat16, bits=8).model.layers[0].self_attn
    packed, scale = quantize_weight(weights[QKV], 8)
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert torch.equal(torch.cat([part.weight for part in parts]), packed)
    assert torch.equal(torch.cat([part.weight_scale for part in parts]), scale)
    assert {part.weight.requires_grad for part in parts} == {False}
    assert attention.q_proj.bias.dtype == torch.bfloat16


def test_packed_weights_are_read_and_written_packed(tmp_path: Path) -> None:
    config = make_config(quantization_bit=4)
    weights: dict[str, Tensor] = {}
    for name, weight in make_weights(config, dtype=torch.float16).items():
        if "layers" in name and weight.ndim == 2:
            weights[name], weights[f"{name}_scale"] = quantize_weight(weight, 4)
        else:
            weights[name] = weight
    folder = write_checkpoint(tmp_path / "packed", config, weights)
    model = opened(folder, torch.float16)
    save_original(model, tmp_path / "back", config=make_config(torch_dtype="float32"))
    assert same(stored_weights(tmp_path / "back"), weights)
    assert config_of(tmp_path / "back") == {**config, "torch_dtype": "float16"}
    with pytest.raises(ModelError, match="is stored in 4 bits, so it cannot be held in 8"):
        opened(folder, bits=8)
    with pytest.raises(ModelError, match=r"has packed embeddings \(quantization_embeddings is true\)"):
        open_original(folder, {**config, "quantization_embeddings": True}, dtype=torch.float16)
    with pytest.raises(ModelError, match=r"config\.json has no quantization_bit"):
        open_original(folder, make_config(), dtype=torch.float16)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_saves_what_was_opened(tmp_path: Path, kind: str, small_weights: str) -> None:
    config = make_config()
    model = opened(write_checkpoint(tmp_path / "model", config, make_weights(config), kind=kind))
    q, k = model.model.layers[0].self_attn.q_proj.weight, model.model.layers[0].self_attn.k_proj.weight
    together = q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert together == (small_weights == "mapped")
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert same(again.state_dict(), model.state_dict())
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.usefixtures("small_weights")
@pytest.mark.parametrize("kind", KINDS)
def test_learning_changes_no_file(tmp_path: Path, kind: str) -> None:
    config = make_config()
    folder = write_checkpoint(tmp_path, config, make_weights(config), kind=kind)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = opened(folder)
    model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_handed_out_once_the_largest_of_a_file_first(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_MAPPED_BYTES", 1000)
    config = make_config()
    weights = make_weights(config)
    opened_shards = open_shards(write_checkpoint(tmp_path, config, weights, kind=kind, num_files=3))
    read: dict[str, Tensor] = {}
    places = []
    for name, tensor in opened_shards.stream(weights):
        assert name not in read
        read[name] = tensor
        places.append((opened_shards.stored[name].file.name, -opened_shards.stored[name].num_bytes))
    assert same(read, weights)
    files = list(dict.fromkeys(file for file, _ in places))
    assert places == sorted(places, key=lambda place: (files.index(place[0]), place[1]))
    largest = [min(size for file, size in places if file == each) for each in files]
    assert largest == sorted(largest)


def test_every_missing_file_is_named(checkpoint: Path) -> None:
    for number in (2, 4):
        (checkpoint / f"pytorch_model-0000{number}-of-00004.bin").unlink()
    names = r"pytorch_model-00002-of-00004\.bin, pytorch_model-00004-of-00004\.bin"
    with pytest.raises(ModelError, match=rf"2 of the 4 files .*index\.json tells of are missing in .*{names}"):
        opened(checkpoint)
    (checkpoint / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(ModelError, match=rf"2 of the 4 files .* their numbers tells of are missing in .*{names}"):
        opened(checkpoint)


def test_files_without_an_index_are_read_all(checkpoint: Path) -> None:
    (checkpoint / "pytorch_model.bin.index.json").unlink()
    torch.save({"step": 3}, checkpoint / "training_args.bin")
    weights = make_weights(make_config())
    assert same(dict(open_shards(checkpoint).stream(weights)), weights)


def test_an_index_that_tells_untruths_is_refused(checkpoint: Path) -> None:
    index = checkpoint / "pytorch_model.bin.index.json"
    told = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**told["weight_map"], "more": "pytorch_model-00001-of-00004.bin"}}))
    with pytest.raises(ModelError, match=r"lack weights that their index names: 1 \(more\)"):
        opened(checkpoint)
    index.write_text(json.dumps({"weight_map": {"a": "../outside.bin"}}))
    with pytest.raises(ModelError, match=r"names files outside of its folder \(\.\./outside\.bin\)"):
        opened(checkpoint)
    for broken in ("{", "[]", '{"weight_map": [1]}'):
        index.write_text(broken)
        with pytest.raises(ModelError, match="is not an index of weights"):
            opened(checkpoint)


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"holds no weights: no \.safetensors and no \.bin file"):
        open_shards(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_file_is_told_as_such_wherever_it_is_cut(tmp_path: Path, kind: str) -> None:
    config = make_config()
    folder = write_checkpoint(tmp_path, config, make_weights(config), kind=kind)
    (file,) = (file for file in folder.iterdir() if file.suffix in (".bin", ".safetensors"))
    whole = file.read_bytes()
    for length in (0, 1, 7, 100, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cannot be read .*cut short|is not a file of weights"):
            opened(folder)


@pytest.mark.parametrize("kind", ["bin", "old bin", "plain pickle"])
def test_code_in_a_pickled_file_is_named_and_not_run(tmp_path: Path, kind: str) -> None:
    config, marker = make_config(), tmp_path / "was-run"
    folder = write_checkpoint(tmp_path / "model", config, make_weights(config), kind="bin")
    bad = {**make_weights(config), "bonus": Code(marker)}
    file = folder / "pytorch_model.bin"
    if kind == "plain pickle":
        file.write_bytes(pickle.dumps(Code(marker)))
    else:
        torch.save(bad, file, _use_new_zipfile_serialization=kind == "bin")
    named = "" if kind == "plain pickle" else r" \(posix\.mkdir\)"
    with pytest.raises(ModelError, match=rf"holds code besides weights{named}\. It was not run\. .* safetensors"):
        opened(folder)
    assert not marker.exists()


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, make_config(), make_weights(make_config()), kind="bin")
    for held, named in (({"model": make_weights(make_config())}, "model"), ([torch.ones(2)], "list")):
        torch.save(held, folder / "pytorch_model.bin")
        with pytest.raises(ModelError, match=rf"holds something besides named weights \({named}\)"):
            opened(folder)
    (folder / "pytorch_model.bin").write_text("<html>404</html>")
    with pytest.raises(ModelError, match="is not a file of weights"):
        opened(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_pointer_in_place_of_a_file_is_told_as_such(tmp_path: Path, kind: str) -> None:
    folder = write_checkpoint(tmp_path, make_config(), make_weights(make_config()), kind=kind)
    (file,) = (file for file in folder.iterdir() if file.suffix in (".bin", ".safetensors"))
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 1815221411\n")
    with pytest.raises(ModelError, match=r"only points to the weights, .* git lfs pull"):
        opened(folder)


def test_a_weight_in_two_files_is_refused(checkpoint: Path) -> None:
    (checkpoint / "pytorch_model.bin.index.json").unlink()
    torch.save({GATE: torch.zeros(2)}, checkpoint / "pytorch_model_old.bin")
    with pytest.raises(ModelError, match=rf"{GATE} is in .*\.bin and in pytorch_model_old\.bin"):
        opened(checkpoint)
    torch.save({"transformer.rotary_pos_emb.inv_freq": torch.zeros(2)}, checkpoint / "pytorch_model_old.bin")
    assert opened(checkpoint) is not None


def test_weights_that_lack_are_too_many_or_of_another_shape_are_told_together(tmp_path: Path) -> None:
    config = make_config()
    weights = make_weights(config)
    del weights["transformer.encoder.final_layernorm.weight"]
    weights |= {GATE: weights[GATE].T.contiguous(), QKV: weights[QKV][:-1], "transformer.extra": torch.zeros(1)}
    folder = write_checkpoint(tmp_path, config, weights)
    with pytest.raises(ModelError) as told:
        opened(folder)
    for sentence in (
        "1 weights are not there (transformer.encoder.final_layernorm.weight)",
        "1 weights have no place in the model (transformer.extra)",
        f"2 weights have another shape ({GATE} is [16, 48] where [48, 16] is wanted; {QKV} is [63, 16] where [64, 16]",
    ):
        assert sentence in str(told.value)


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    config = make_config()
    weights = {**make_weights(config), GATE: torch.ones(48, 16, dtype=torch.int8)}
    with pytest.raises(ModelError, match=rf"{GATE} is torch\.int8"):
        opened(write_checkpoint(tmp_path, config, weights))


def test_nothing_is_written_over(tmp_path: Path) -> None:
    config = make_config()
    folder = write_checkpoint(tmp_path, config, make_weights(config))
    with pytest.raises(ModelError, match="is there already and not empty"):
        save_original(opened(folder), folder, config=config)


def test_what_lies_beside_the_weights_comes_along(tmp_path: Path) -> None:
    config = make_config()
    folder = write_checkpoint(tmp_path / "model", config, make_weights(config), num_files=2)
    beside = ("tokenizer.model", "tokenizer_config.json", "modeling_chatglm.py", "MODEL_LICENSE")
    for name in beside:
        (folder / name).write_text(f"raise SystemExit({name!r})")
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    save_original(opened(folder), tmp_path / "out", config=config, source=folder)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*beside, "config.json", "model.safetensors"}
    assert all((tmp_path / "out" / name).read_text() == (folder / name).read_text() for name in beside)
