"""P-Tuning prefixes on the disk: written, read, exchanged with the ChatGLM originals, refused where they do not fit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from glm_checkpoints import golden_folder
from tiny_models import model_of
from weitiao.errors import ModelError
from weitiao.models.adapters import adapter_fingerprint, load_adapter, save_adapter, without_adapter
from weitiao.models.opening import open_model
from weitiao.models.prefix_files import export_original_prefix, save_prefix
from weitiao.models.ptuning import attach_prefix, prefix_encoder_of

NAME = "transformer.prefix_encoder."
ROW = torch.tensor([[5, 9, 33, 12, 40, 8]])


def fresh(family: str = "llama") -> PreTrainedModel:
    model = model_of(family, 64)
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.float().eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(ROW).logits


def tuned(projection: bool = True) -> PreTrainedModel:
    return attach_prefix(fresh(), num_virtual_tokens=4, projection=projection, dropout=0.1, seed=2)


def base_of(name: str, folder: Path) -> Path:
    """The fixture's model alone, as it was before it was tuned."""
    source = golden_folder(name)
    shutil.copyfile(source / "model.safetensors", folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    del config["pre_seq_len"], config["prefix_projection"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def prefix_of(model: PreTrainedModel) -> dict[str, Tensor]:
    encoder = prefix_encoder_of(model)
    assert encoder is not None
    return encoder.state_dict()


# --- Ours -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", [False, True])
def test_a_saved_prefix_computes_the_same_when_it_is_read_again(projection: bool, tmp_path: Path) -> None:
    model = tuned(projection)
    save_adapter(model, tmp_path)
    stored = load_file(tmp_path / "prefix_encoder.safetensors")
    assert all(name.startswith(NAME) and value.dtype == torch.float32 for name, value in stored.items())
    again = load_adapter(fresh(), tmp_path)
    assert isinstance(again, PreTrainedModel)
    assert torch.equal(logits(again), logits(model))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert not again.training
    with without_adapter(again):
        assert torch.equal(logits(again), logits(fresh()))


def test_a_prefix_takes_the_place_of_one_that_the_model_had(tmp_path: Path) -> None:
    save_prefix(tuned(), tmp_path)
    other = attach_prefix(fresh(), num_virtual_tokens=9, projection=False, seed=5)
    assert torch.equal(logits(load_adapter(other, tmp_path)), logits(tuned()))  # type: ignore[arg-type]


def test_a_model_without_a_prefix_has_none_to_write(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no P-Tuning prefix, so none can be written"):
        save_adapter(fresh(), tmp_path)


def test_the_fingerprint_is_that_of_the_weights(tmp_path: Path) -> None:
    for name, projection in (("a", False), ("b", False), ("c", True)):
        (tmp_path / name).mkdir()
        save_prefix(tuned(projection), tmp_path / name)
    (tmp_path / "b" / "adapter_config.json").write_text("{}", encoding="utf-8")
    a, b, c = (adapter_fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c
    export_original_prefix(tuned(False), tmp_path / "original")
    export_original_prefix(tuned(True), tmp_path / "other")
    assert len({adapter_fingerprint(tmp_path / name) for name in ("original", "other")}) == 2


# --- The originals' ---------------------------------------------------------------------------------------------------

originals = pytest.mark.parametrize(
    "name", ["chatglm2_ptuning/no_projection", "chatglm3_ptuning/projection", "chatglm_v1_ptuning/projection"]
)


@originals
def test_a_checkpoint_of_the_originals_is_an_adapter(name: str, tmp_path: Path) -> None:
    source = golden_folder(name)
    base = base_of(name, tmp_path)
    opened = open_model(str(source), dtype="float32", device="cpu").model
    assert isinstance(opened, PreTrainedModel)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copyfile(source / "config.json", adapter / "config.json")
    torch.save(load_file(source / "prefix_encoder.safetensors"), adapter / "pytorch_model.bin")
    tuned = open_model(str(base), adapter=adapter, dtype="float32", device="cpu").model
    assert isinstance(tuned, PreTrainedModel)
    for key, value in prefix_of(opened).items():
        assert torch.equal(prefix_of(tuned)[key], value)

    whole = tmp_path / "whole"  # what the ChatGLM3 trainer writes: every weight of the tuned model
    whole.mkdir()
    shutil.copyfile(source / "config.json", whole / "config.json")
    weights = load_file(source / "model.safetensors") | load_file(source / "prefix_encoder.safetensors")
    save_file(weights, whole / "model.safetensors")
    for model in (
        open_model(str(whole), dtype="float32", device="cpu").model,
        open_model(str(base), adapter=whole, dtype="float32", device="cpu").model,
    ):
        assert isinstance(model, PreTrainedModel)
        assert prefix_of(model).keys() == prefix_of(opened).keys()
        assert all(torch.equal(prefix_of(model)[key], value) for key, value in prefix_of(opened).items())


@originals
def test_an_exported_prefix_is_what_the_originals_code_loads(name: str, tmp_path: Path) -> None:
    source = golden_folder(name)
    opened = open_model(str(source), dtype="float32", device="cpu").model
    assert isinstance(opened, PreTrainedModel)
    (tmp_path / "config.json").write_text('{"model_type": "chatglm"}', encoding="utf-8")
    export_original_prefix(opened, tmp_path)
    stored = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    expected = load_file(source / "prefix_encoder.safetensors")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[key], expected[key]) for key in expected)
    said = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    told = json.loads((source / "config.json").read_text(encoding="utf-8"))
    assert said == {"model_type": "chatglm"} | {key: told[key] for key in ("pre_seq_len", "prefix_projection")}


def test_a_prefix_is_exported_without_a_configuration_too(tmp_path: Path) -> None:
    export_original_prefix(tuned(), tmp_path / "new")
    said = json.loads((tmp_path / "new" / "config.json").read_text(encoding="utf-8"))
    assert said == {"pre_seq_len": 4, "prefix_projection": True}
    assert torch.equal(logits(load_adapter(fresh(), tmp_path / "new")), logits(tuned()))  # type: ignore[arg-type]


# --- Refused ----------------------------------------------------------------------------------------------------------


def test_a_prefix_of_another_length_is_named_with_both(tmp_path: Path) -> None:
    export_original_prefix(tuned(), tmp_path)
    (tmp_path / "config.json").write_text('{"pre_seq_len": 128}', encoding="utf-8")
    with pytest.raises(ModelError, match=r"has 4 tokens, but pre_seq_len is 128\. Set it to 4"):
        load_adapter(fresh(), tmp_path)


def test_a_projection_that_is_not_told_of_is_named(tmp_path: Path) -> None:
    export_original_prefix(tuned(), tmp_path)
    (tmp_path / "config.json").write_text('{"prefix_projection": false}', encoding="utf-8")
    with pytest.raises(ModelError, match=r"has a projection, but prefix_projection is false\. Set it to true"):
        load_adapter(fresh(), tmp_path)


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_of_another_model_is_named_with_both_sizes(projection: bool, tmp_path: Path) -> None:
    save_prefix(tuned(projection), tmp_path)
    what = (
        r"trans\.2\.weight is \[64, 32\] where \[128, 32\]" if projection else r"weight is \[4, 64\] where \[4, 128\]"
    )
    with pytest.raises(ModelError, match=rf"another model: .*{what} is wanted.* 2 layers with 2 key heads of 16"):
        load_adapter(fresh("gemma3"), tmp_path)


def _cut(folder: Path) -> None:
    file = folder / "prefix_encoder.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def _remove(folder: Path) -> None:
    (folder / "prefix_encoder.safetensors").unlink()


def _lose_one(folder: Path) -> None:
    weights = load_file(folder / "prefix_encoder.safetensors")
    del weights[f"{NAME}trans.0.bias"]
    save_file(weights, folder / "prefix_encoder.safetensors")


def _add_one(folder: Path) -> None:
    weights = load_file(folder / "prefix_encoder.safetensors")
    save_file({**weights, f"{NAME}trans.4.bias": torch.zeros(3)}, folder / "prefix_encoder.safetensors")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_cut, "cannot be read"),
        (_remove, "is incomplete: prefix_encoder.safetensors is missing"),
        (_lose_one, "no whole prefix encoder: .* and there are embedding.weight, trans.0.weight, trans.2.bias"),
        (_add_one, "no whole prefix encoder: .*trans.4.bias"),
    ],
)
def test_a_damaged_prefix_is_named(damage: object, said: str, tmp_path: Path) -> None:
    save_prefix(tuned(), tmp_path)
    assert callable(damage)
    damage(tmp_path)
    with pytest.raises(ModelError, match=said) as caught:
        load_adapter(fresh(), tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_model_among_the_adapters_is_told_from_a_prefix(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"hold no P-Tuning prefix \(transformer\.prefix_encoder\.\*\)"):
        load_adapter(fresh(), tmp_path)


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("code-has-run",)


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    torch.save({f"{NAME}embedding.weight": _Code()}, adapter / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"holds code besides weights \(posix\.mkdir\)\. It was not run"):
        load_adapter(fresh(), adapter)
    assert not (tmp_path / "code-has-run").exists()
