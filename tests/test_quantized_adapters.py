"""LoRA and DoRA on packed weights, against PEFT's own layers on the same model unpacked."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLoraLinear

from test_quantized import glm
from weitiao.errors import ModelError
from weitiao.models.adapters import load_adapter
from weitiao.models.lora_layers import LoraLinear, ignoring_peft_warnings, use_lean_layers
from weitiao.models.packed_layers import model_packing, unpack_model
from weitiao.models.quantized import QuantizedLinear, quantize_model

KINDS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def tuned(kind: str, *, bits: int, lean: bool = True, unpacked: bool = False, dropout: float = 0.0) -> PeftModel:
    """A packed tiny model with an adapter that is not zero; `unpacked`: the same numbers in plain layers."""
    model = glm()
    quantize_model(model, bits)
    if unpacked:
        unpack_model(model, torch.float32)
    targets = "all-linear"
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM", **KINDS[kind]
    )
    if lean:
        use_lean_layers(config)
    with ignoring_peft_warnings():
        adapted = get_peft_model(model, config)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        for name, parameter in sorted(adapted.named_parameters()):
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(std=0.2)
            elif "lora_magnitude" in name:
                parameter.uniform_(0.5, 2.0)
    return adapted


def gradients(model: PeftModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("bits", [4, 8])
def test_logits_and_gradients_are_those_of_the_unpacked_model(bits: int, kind: str) -> None:
    packed = tuned(kind, bits=bits)
    plain = tuned(kind, bits=bits, lean=False, unpacked=True)
    assert sum(type(m) is LoraLinear for m in packed.modules()) == 12
    assert all(isinstance(m.base_layer, QuantizedLinear) for m in packed.modules() if isinstance(m, LoraLinear))
    assert sum(type(m) is PeftLoraLinear for m in plain.modules()) == 12
    ids = torch.randint(1, 64, (2, 11), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(packed(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(packed, ids), gradients(plain, ids)
    assert set(ours) == set(theirs) and len(ours) == (36 if kind == "dora" else 24)
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-5, atol=1e-5)


def test_dora_with_dropout_is_that_of_the_unpacked_model() -> None:
    packed = tuned("dora", bits=4, dropout=0.4).train()
    plain = tuned("dora", bits=4, lean=False, unpacked=True, dropout=0.4).train()
    ids = torch.randint(1, 64, (2, 11), generator=torch.Generator().manual_seed(3))
    logits = []
    for model in (packed, plain):
        torch.manual_seed(11)
        logits.append(model(ids).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_a_fresh_dora_adapter_changes_nothing() -> None:
    model = glm()
    quantize_model(model, 4)
    ids = torch.randint(1, 64, (2, 11), generator=torch.Generator().manual_seed(3))
    before = model(ids).logits
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM")
    use_lean_layers(config)
    with ignoring_peft_warnings():
        fresh = get_peft_model(model, config)
    torch.testing.assert_close(fresh(ids).logits, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", list(KINDS))
def test_only_the_adapter_learns_and_in_float32(kind: str) -> None:
    model = glm().bfloat16()
    quantize_model(model, 4)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **KINDS[kind])
    use_lean_layers(config)
    with ignoring_peft_warnings():
        adapted = get_peft_model(model, config)
    learning = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in name and p.dtype == torch.float32 for name, p in learning.items())
    ids = torch.randint(1, 64, (1, 9))
    assert adapted(ids).logits.dtype == torch.bfloat16
    assert set(gradients(adapted, ids)) == set(learning)


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_adapter_is_saved_and_put_back(kind: str, tmp_path: Path) -> None:
    adapted = tuned(kind, bits=4)
    ids = torch.randint(1, 64, (2, 8))
    logits = adapted(ids).logits
    with ignoring_peft_warnings():
        adapted.save_pretrained(tmp_path)
    model = glm()
    quantize_model(model, 4)
    again = load_adapter(model, tmp_path)
    assert torch.equal(again(ids).logits, logits)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("safe", [True, False])
def test_merging_is_refused_until_the_weights_are_unpacked(kind: str, safe: bool) -> None:
    adapted = tuned(kind, bits=8)
    ids = torch.randint(1, 64, (2, 8))
    logits = adapted(ids).logits
    with pytest.raises(ModelError, match="cannot be merged into packed weights"):
        adapted.merge_and_unload(safe_merge=safe)
    assert torch.equal(adapted(ids).logits, logits)
    unpack_model(adapted, torch.float32)
    assert model_packing(adapted) is None
    torch.testing.assert_close(adapted(ids).logits, logits, rtol=1e-5, atol=1e-5)
    merged = adapted.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, LoraLinear) for module in merged.modules())


def test_adapters_that_start_from_float_weights_are_refused() -> None:
    model = glm()
    quantize_model(model, 8)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa", task_type="CAUSAL_LM")
    use_lean_layers(config)
    with ignoring_peft_warnings(), pytest.raises(ModelError, match="init_lora_weights='pissa'"):
        get_peft_model(model, config)


def test_a_model_with_an_adapter_is_not_packed() -> None:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    with ignoring_peft_warnings():
        adapted = get_peft_model(glm(), config)
    with pytest.raises(ModelError, match="Quantise the model first"):
        quantize_model(adapted.get_base_model(), 4)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_learns_two_rows_by_heart(kind: str) -> None:
    model = glm()
    quantize_model(model, 4)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **KINDS[kind])
    use_lean_layers(config)
    torch.manual_seed(0)
    with ignoring_peft_warnings():
        adapted = get_peft_model(model, config)
    packed = copy.deepcopy({n: p for n, p in adapted.named_parameters() if not p.requires_grad})
    ids = torch.randint(1, 64, (2, 9))
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(60):
        loss = adapted(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
    assert all(torch.equal(p, packed[n]) for n, p in adapted.named_parameters() if n in packed)
