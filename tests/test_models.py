"""Opening models and adapters: what comes back, and one sentence for everything that can be wrong with a folder."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from weitiao.errors import ModelError, RecipeError
from weitiao.models.families import family_of
from weitiao.models.lora_layers import LoraLinear, use_lean_layers
from weitiao.models.opening import OpenModel, load_tokenizer, open_model, open_renderer
from weitiao.models.sources import fingerprint, model_folder
from weitiao.recipe import Lora
from weitiao.tuning.methods import add_adapter, count_parameters

FOLDERS = ("tiny_llama_folder", "tiny_qwen2_folder", "tiny_gemma3_folder")
FAMILY = {"tiny_llama_folder": "llama", "tiny_qwen2_folder": "qwen", "tiny_gemma3_folder": "gemma"}
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def open_tiny(folder: Path, adapter: Path | None = None) -> OpenModel:
    return open_model(str(folder), adapter=adapter, dtype="float32", device="cpu")


def plain(opened: OpenModel) -> PreTrainedModel:
    assert isinstance(opened.model, PreTrainedModel)
    return opened.model


def logits_of(opened: OpenModel) -> Tensor:
    ids = torch.tensor([[3, 7, 11, 40, 200, 8]])
    with torch.no_grad():
        return opened.model(input_ids=ids).logits  # type: ignore[no-any-return]


@pytest.fixture
def copied(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))


@pytest.fixture
def adapter_folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """An adapter whose update is not zero, as training would leave it."""
    model = add_adapter(plain(open_tiny(tiny_llama_folder)), Lora(rank=4, alpha=8), seed=5)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(6)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


# ---- opening ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", FOLDERS)
def test_a_folder_opens_with_model_tokenizer_renderer_family_and_fingerprint(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(fixture)
    opened = open_tiny(folder)
    saved = load_file(folder / "model.safetensors")
    state = opened.model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in saved.items())
    assert opened.model.dtype == torch.float32
    assert not opened.model.training
    assert opened.tokenizer.padding_side == "left"
    assert opened.tokenizer.decode(opened.tokenizer("你好 Ada", add_special_tokens=False)["input_ids"]) == "你好 Ada"
    assert opened.renderer.stop_ids[0] == opened.tokenizer.eos_token_id
    assert bool(opened.renderer.template) == (fixture == "tiny_qwen2_folder")
    assert opened.family.name == FAMILY[fixture]
    assert opened.folder == folder
    assert opened.fingerprint == fingerprint(folder)


def test_an_unlisted_architecture_belongs_to_the_other_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}', encoding="utf-8")
    assert family_of(tmp_path).name == "other"


def test_dtype_is_as_asked(tiny_llama_folder: Path) -> None:
    assert open_model(str(tiny_llama_folder), dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16


def test_end_tokens_of_the_generation_config_also_stop_an_answer(copied: Path) -> None:
    (copied / "generation_config.json").write_text('{"eos_token_id": [1, 0]}', encoding="utf-8")
    assert open_renderer(str(copied)).stop_ids == (1, 0)
    (copied / "generation_config.json").write_text('{"eos_token_id": 0}', encoding="utf-8")
    assert open_renderer(str(copied)).stop_ids == (1, 0)
    (copied / "generation_config.json").unlink()
    assert open_renderer(str(copied)).stop_ids == (1,)


# ---- what can be wrong with a folder ---------------------------------------------------------------------------


def test_a_missing_folder_is_named_with_the_ways_to_name_a_model() -> None:
    with pytest.raises(ModelError, match=r"There is no model folder \./nowhere\. .*modelscope:.*or starter\.$"):
        open_model("./nowhere")


def test_a_bare_word_is_not_sent_to_the_hub() -> None:
    with pytest.raises(ModelError, match="There is no model folder startr"):
        open_model("startr")


def test_a_folder_without_config_holds_no_model(copied: Path) -> None:
    (copied / "config.json").unlink()
    with pytest.raises(ModelError, match=r"model holds no model: it has no config\.json\.$"):
        open_tiny(copied)


def test_a_broken_config_is_named(copied: Path) -> None:
    (copied / "config.json").write_text('{"model_type": "llama"', encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json is not JSON"):
        open_tiny(copied)
    with pytest.raises(ModelError, match=r"config\.json is not a JSON object|is not JSON"):
        fingerprint(copied)


def test_a_broken_generation_config_is_named(copied: Path) -> None:
    (copied / "generation_config.json").write_text('{"eos_token_id": ', encoding="utf-8")
    with pytest.raises(ModelError, match=r"generation_config\.json is not JSON"):
        open_renderer(str(copied))


def test_a_folder_without_tokenizer_is_named(copied: Path) -> None:
    for file in copied.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"^The tokenizer in \S+ cannot be loaded: [^\n]+$"):
        load_tokenizer(copied)


def test_a_folder_without_weights_is_named(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"^The model in \S+ cannot be loaded \([^\n]+\)\. A file may be cut"):
        open_tiny(copied)
    with pytest.raises(ModelError, match=r"holds no weights: no \.safetensors and no \.bin file\.$"):
        fingerprint(copied)


def test_a_cut_weight_file_is_named(copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"^The model in \S+ cannot be loaded \([^\n]+\)\. A file may be cut"):
        open_tiny(copied)


def test_missing_weights_are_named(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks 2 of its weights \(model\.layers\.1\.mlp\.up_proj\.weight, model\.norm"
    ):
        open_tiny(copied)


def test_a_model_with_code_of_its_own_is_not_run(copied: Path, tmp_path: Path) -> None:
    config = json.loads((copied / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "homemade", "auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Conf"}}
    (copied / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (copied / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_tiny(copied)
    assert not (tmp_path / "ran").exists()


# ---- fingerprints ----------------------------------------------------------------------------------------------


def test_another_weight_is_another_fingerprint(copied: Path) -> None:
    before = fingerprint(copied)
    weights = load_file(copied / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(copied) != before


def test_another_setting_is_another_fingerprint_but_not_another_transformers_version(copied: Path) -> None:
    before = fingerprint(copied)
    config = json.loads((copied / "config.json").read_text(encoding="utf-8"))
    (copied / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9"}), encoding="utf-8")
    assert fingerprint(copied) == before
    (copied / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}), encoding="utf-8")
    assert fingerprint(copied) != before


def test_a_moved_model_keeps_its_fingerprint(copied: Path, tiny_llama_folder: Path) -> None:
    assert fingerprint(copied) == fingerprint(tiny_llama_folder)


# ---- hubs ------------------------------------------------------------------------------------------------------


def test_a_hub_id_is_fetched_without_code_and_opened(
    tiny_qwen2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        return str(tiny_qwen2_folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    opened = open_model("Someone/Tiny-1.5", dtype="float32", device="cpu")
    assert opened.folder == tiny_qwen2_folder
    ((repo_id, patterns),) = asked
    assert repo_id == "Someone/Tiny-1.5"
    assert {"*.json", "*.safetensors"} <= set(patterns)
    assert not any(pattern.endswith((".py", "*")) and "LICENSE" not in pattern for pattern in patterns)


def test_a_local_folder_goes_before_a_hub_id(
    tiny_qwen2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_qwen2_folder, tmp_path / "Someone" / "Tiny")
    assert model_folder("Someone/Tiny") == Path("Someone/Tiny")


def test_a_hub_that_fails_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        raise ConnectionError("no route to host\nand forty more lines")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError) as caught:
        open_model("Someone/Tiny")
    assert str(caught.value) == (
        "Someone/Tiny is neither a folder here nor could it be fetched from the Hugging Face hub "
        "(ConnectionError: no route to host). Check the spelling and the network, or give a local folder."
    )


def test_a_modelscope_id_is_fetched_by_its_client(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    client = types.ModuleType("modelscope")

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.append(repo_id)
        return str(tiny_llama_folder)

    client.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", client)
    opened = open_model("modelscope:Someone/Tiny", dtype="float32", device="cpu")
    assert asked == ["Someone/Tiny"]
    assert opened.family.name == "llama"


def test_a_missing_modelscope_client_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ModelError, match=r"pip install 'weitiao\[modelscope\]'"):
        open_model("modelscope:Someone/Tiny")


def test_a_modelscope_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    client = types.ModuleType("modelscope")

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        raise ValueError("not found\nand forty more lines")

    client.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", client)
    with pytest.raises(ModelError, match=r"could not be fetched from ModelScope \(ValueError: not found\)\. Check"):
        open_model("modelscope:Someone/Tiny")


def test_a_download_without_a_config_holds_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "snapshot").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "snapshot"))
    with pytest.raises(ModelError, match=r"Someone/Tiny holds no model: it has no config\.json\.$"):
        open_model("Someone/Tiny")


# ---- adapters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", FOLDERS)
def test_a_fresh_adapter_changes_nothing_and_freezes_the_base(fixture: str, request: pytest.FixtureRequest) -> None:
    opened = open_tiny(request.getfixturevalue(fixture))
    before = logits_of(opened)
    total = count_parameters(opened.model)[1]
    model = add_adapter(plain(opened), Lora(rank=2), seed=0)
    assert torch.equal(logits_of(opened), before)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())
    assert count_parameters(model) == (sum(p.numel() for p in trainable.values()), total + sum(
        p.numel() for p in trainable.values()))  # fmt: skip


def test_an_adapter_starts_from_its_seed_alone(tiny_llama_folder: Path) -> None:
    def start(seed: int) -> dict[str, Tensor]:
        torch.rand(seed + 3)  # whatever was drawn before
        model = add_adapter(plain(open_tiny(tiny_llama_folder)), Lora(rank=2), seed=seed)
        return {name: p.detach() for name, p in model.named_parameters() if "lora_A" in name}

    state = torch.random.get_rng_state()
    first, again, other = start(1), start(1), start(2)
    torch.random.set_rng_state(state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_adding_an_adapter_draws_no_random_numbers_from_the_caller(tiny_llama_folder: Path) -> None:
    model = plain(open_tiny(tiny_llama_folder))
    state = torch.random.get_rng_state()
    add_adapter(model, Lora(rank=2), seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_targets_that_match_no_layer_name_the_layers_there_are(tiny_llama_folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"method\.targets=\('c_attn',\) matches no layer.*k_proj.*or use all-linear"):
        add_adapter(plain(open_tiny(tiny_llama_folder)), Lora(targets=("c_attn",)), seed=0)


def test_a_saved_adapter_opens_with_equal_logits(tiny_llama_folder: Path, tmp_path: Path) -> None:
    opened = open_tiny(tiny_llama_folder)
    before = logits_of(opened)
    model = add_adapter(plain(opened), Lora(rank=4, alpha=8), seed=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    tuned = logits_of(OpenModel(**{**vars(opened), "model": model}))
    model.save_pretrained(str(tmp_path / "adapter"))
    again = open_tiny(tiny_llama_folder, tmp_path / "adapter")
    assert torch.equal(logits_of(again), tuned)
    assert not torch.allclose(tuned, before, atol=1e-3)
    assert again.fingerprint == opened.fingerprint
    assert not any(p.requires_grad for p in again.model.parameters())
    assert not again.model.training
    assert any(isinstance(module, LoraLinear) for module in again.model.modules())


@PEFT_WARNS
def test_an_adapter_saved_by_plain_peft_opens_too(adapter_folder: Path, tiny_llama_folder: Path) -> None:
    from peft import PeftModel

    reference = PeftModel.from_pretrained(plain(open_tiny(tiny_llama_folder)), str(adapter_folder))
    opened = open_tiny(tiny_llama_folder, adapter_folder)
    expected = logits_of(OpenModel(**{**vars(opened), "model": reference.eval()}))
    assert torch.allclose(logits_of(opened), expected, atol=1e-5)


def test_a_folder_without_adapter_is_named(tiny_llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no adapter: it has no adapter_config\.json\.$"):
        open_tiny(tiny_llama_folder, tmp_path)


def _cut(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _remove(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def _reshape(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: w[:1].clone() if "lora_A" in name else w for name, w in weights.items()},
              folder / "adapter_model.safetensors")  # fmt: skip


def _lose_some(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.1." not in name}
    save_file(kept, folder / "adapter_model.safetensors")


def _rename(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("layers.", "blocks."): weight for name, weight in weights.items()}
    save_file(renamed, folder / "adapter_model.safetensors")


def _unjson(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{", encoding="utf-8")


@pytest.mark.parametrize("damage", [_cut, _remove, _reshape, _lose_some, _rename, _unjson])
def test_a_broken_adapter_is_named(
    damage: types.FunctionType, adapter_folder: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    damage(adapter_folder)
    with pytest.raises(ModelError, match=r"^The adapter in \S+adapter cannot be put on this model \([^\n]+\)\.$"):
        open_tiny(tiny_llama_folder, adapter_folder)


def test_an_adapter_of_another_model_is_named(adapter_folder: Path, tiny_gemma3_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"^The adapter in \S+adapter cannot be put on this model \([^\n]+\)\.$"):
        open_tiny(tiny_gemma3_folder, adapter_folder)


# ---- the lean LoRA layer ---------------------------------------------------------------------------------------


def lora_pair(*, dropout: float = 0.0, bias: bool = True, lora_bias: bool = False) -> tuple[LoraLinear, PeftLoraLinear]:
    """Our layer and PEFT's with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(24, 16, bias=bias)
        config = LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, init_lora_weights=False, lora_bias=lora_bias)
        ours = LoraLinear(linear, "default", config, r=4, lora_alpha=12)
        peft = PeftLoraLinear(linear, "default", config, r=4, lora_alpha=12)
        peft.load_state_dict(ours.state_dict())
    return ours, peft


def run_layer(layer: nn.Module, *, seed: int = 1) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, gradient of the input, gradients of the parameters, with the same dropout for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = torch.randn(2, 5, 24, requires_grad=True)
        weight = torch.randn(2, 5, 16)
        layer.zero_grad()
        y = layer(x)
        (y * weight).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad, {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


def assert_equal_runs(ours: nn.Module, peft: nn.Module) -> None:
    (y, x_grad, grads), (y_ref, x_ref, grads_ref) = run_layer(ours), run_layer(peft)
    torch.testing.assert_close(y, y_ref, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x_grad, x_ref, rtol=1e-6, atol=2e-6)
    assert grads.keys() == grads_ref.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], grads_ref[name], rtol=1e-6, atol=1e-5, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_the_lean_layer_computes_what_pefts_own_layer_does(dropout: float, bias: bool) -> None:
    ours, peft = lora_pair(dropout=dropout, bias=bias)
    assert_equal_runs(ours.train(), peft.train())
    assert_equal_runs(ours.eval(), peft.eval())


def test_the_lean_layer_leaves_everything_beyond_plain_lora_to_peft() -> None:
    ours, peft = lora_pair(lora_bias=True)
    assert_equal_runs(ours, peft)
    ours, peft = lora_pair()
    for layer in (ours, peft):
        layer.enable_adapters(False)
    y, _, _ = run_layer(peft)
    assert torch.equal(run_layer(ours)[0], y)
    for layer in (ours, peft):
        layer.enable_adapters(True)
        layer.merge()
    assert_equal_runs(ours, peft)


def test_the_lean_layer_keeps_the_dtype_of_its_input() -> None:
    ours, peft = lora_pair()
    for layer in (ours, peft):
        layer.base_layer.to(torch.bfloat16)
    x = torch.randn(3, 24, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    assert ours(x).dtype == torch.bfloat16
    torch.testing.assert_close(ours(x), peft(x), rtol=0.05, atol=0.05)
    assert ours.lora_A["default"].weight.dtype == torch.float32


@PEFT_WARNS
def test_peft_builds_the_lean_layer_with_the_same_names(tiny_llama_folder: Path) -> None:
    from peft import get_peft_model

    def names(lean: bool) -> set[str]:
        config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        if lean:
            use_lean_layers(config)
        model = get_peft_model(plain(open_tiny(tiny_llama_folder)), config)
        assert any(type(m) is LoraLinear for m in model.modules()) == lean
        return set(model.state_dict())

    assert names(lean=True) == names(lean=False)


def test_the_starter_model_is_a_gemma(starter_folder_or_skip: Path) -> None:
    assert model_folder("starter") == starter_folder_or_skip
    assert family_of(starter_folder_or_skip).name == "gemma"
    assert len(fingerprint(starter_folder_or_skip)) == 64
