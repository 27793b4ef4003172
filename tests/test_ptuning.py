"""P-Tuning v2: equal to the ChatGLM originals, and the same whatever the mask, cache, padding or packing."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GlmConfig, GlmForCausalLM, PreTrainedModel

from glm_checkpoints import golden_folder
from tiny_models import model_of
from weitiao.errors import ModelError
from weitiao.generate.engine import Sampling, generate
from weitiao.models.attention import PACKED
from weitiao.models.opening import open_model
from weitiao.models.ptuning import (
    PrefixEncoder,
    attach_prefix,
    prefix_encoder_of,
    prefix_shape,
    prefix_states,
    without_prefix,
)

GOLDENS = (
    "chatglm2_ptuning/no_projection",
    "chatglm3_ptuning/no_projection",
    "chatglm3_ptuning/projection",
    "chatglm_v1_ptuning/no_projection",
    "chatglm_v1_ptuning/projection",
)
NAME = "transformer.prefix_encoder."
LOGITS, LOSS, GRADIENT = 1e-4, 1e-5, 1e-3

golden = pytest.mark.parametrize("name", GOLDENS)
attention = pytest.mark.parametrize("implementation", ["sdpa", "eager"])


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def goldens(name: str) -> dict[str, Tensor]:
    with np.load(golden_folder(name) / "goldens.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@cache
def golden_model(name: str) -> PreTrainedModel:
    model = open_model(str(golden_folder(name)), dtype="float32", device="cpu").model
    assert isinstance(model, PreTrainedModel)
    return model


def inputs(case: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    names = ("input_ids", "attention_mask", "position_ids", "labels")
    return {name: case[f"{kind}/{name}"] for name in names if f"{kind}/{name}" in case}


def off(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


# --- The originals ----------------------------------------------------------------------------------------------------


@golden
def test_the_prefix_is_the_originals(name: str) -> None:
    case, states = goldens(name), prefix_states(golden_model(name))
    assert states is not None
    for ours, theirs in zip(states, (case["prefix/past_k"], case["prefix/past_v"]), strict=True):
        for row in range(theirs.shape[2]):  # the originals repeat it for every row
            assert off(ours.transpose(1, 2), theirs[:, :, row]) <= 1e-6


@golden
@attention
@torch.no_grad()
def test_logits_equal_the_originals(name: str, implementation: str) -> None:
    case, model = goldens(name), golden_model(name)
    model.set_attn_implementation(implementation)
    for kind in {key.partition("/")[0] for key in case if "/logits" in key}:
        row = inputs(case, kind)
        row.pop("labels", None)
        logits = model(**row).logits
        if kind == "long":
            assert off(logits[:, -8:], case["long/logits_last8"]) <= LOGITS
            assert off(logits[:, :4], case["long/logits_first4"]) <= LOGITS
            continue
        valid = case.get(f"{kind}/valid", torch.ones(logits.shape[:2], dtype=torch.bool))
        assert off(logits[valid], case[f"{kind}/logits"][valid]) <= LOGITS, kind


@golden
@torch.no_grad()
def test_positions_and_the_cache_do_without_the_prefix(name: str) -> None:
    case, model = goldens(name), golden_model(name)
    row = {"input_ids": case["single/input_ids"]}
    out = model(**row, use_cache=True)
    assert off(out.logits, case["single/logits"]) <= LOGITS
    assert out.past_key_values.get_seq_length() == row["input_ids"].shape[1]
    if "single/past_k" in case:
        states = prefix_states(model)
        assert states is not None
        for layer, cached in enumerate(out.past_key_values.layers):
            both = zip(states, (cached.keys, cached.values), ("past_k", "past_v"), strict=True)
            for prefix, own, key in both:
                ours = torch.cat([prefix[layer], own[0]], dim=1).transpose(0, 1)
                assert off(ours, case[f"single/{key}"][layer, :, 0]) <= LOGITS


@golden
@attention
def test_losses_and_the_prefixs_gradients_equal_the_originals(name: str, implementation: str) -> None:
    case, model = goldens(name), golden_model(name)
    model.set_attn_implementation(implementation)
    encoder = prefix_encoder_of(model)
    assert encoder is not None
    for kind in {key.partition("/")[0] for key in case if key.endswith("/loss")}:
        encoder.requires_grad_(True).zero_grad()
        loss = model(**inputs(case, kind)).loss
        assert abs(loss.item() - case[f"{kind}/loss"].item()) <= LOSS
        loss.backward()
        for name_, parameter in encoder.named_parameters():
            assert parameter.grad is not None
            head, whole = (case[f"{kind}/{what}/{NAME}{name_}"] for what in ("gradhead", "gradstat"))
            assert (parameter.grad.flatten()[:16] - head).norm() <= GRADIENT * head.norm()
            assert abs(parameter.grad.double().norm() - whole[2]) <= GRADIENT * whole[2]
            if f"{kind}/grad/{NAME}{name_}" in case:
                full = case[f"{kind}/grad/{NAME}{name_}"]
                assert (parameter.grad - full).norm() <= GRADIENT * full.norm()
        encoder.requires_grad_(False)
        assert all(parameter.grad is None for key, parameter in model.named_parameters() if "prefix_encoder" not in key)


@golden
@attention
def test_answers_equal_the_originals(name: str, implementation: str) -> None:
    case, model = goldens(name), golden_model(name)
    model.set_attn_implementation(implementation)
    for kind in {key.partition("/")[0] for key in case if key.startswith("gen_")}:
        stop = int(case["gen_eos/eos_token_id"]) if kind == "gen_eos" else None
        asked = inputs(case, kind)
        for positions in (asked.pop("position_ids"), None):
            extra = {} if positions is None else {"position_ids": positions}
            answers = model.generate(
                **asked,
                **extra,
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=stop,
                pad_token_id=model.config.pad_token_id,
            )
            assert torch.equal(answers, case[f"{kind}/sequences"]), kind


@golden
def test_the_engine_answers_as_the_originals(name: str) -> None:
    case, model = goldens(name), golden_model(name)
    model.set_attn_implementation("sdpa")
    for kind in {key.partition("/")[0] for key in case if key.startswith("gen_")}:
        stop = [int(case["gen_eos/eos_token_id"])] if kind == "gen_eos" else []
        prompts = [row[row != model.config.pad_token_id].tolist() for row in case[f"{kind}/input_ids"]]
        expected = case[f"{kind}/sequences"][:, case[f"{kind}/input_ids"].shape[1] :].tolist()
        found = generate(model, prompts, stop_ids=stop, sampling=Sampling(max_new_tokens=12))
        for done in found:
            whole = expected[done.index]
            cut = whole.index(stop[0]) if stop and stop[0] in whole else len(whole)
            assert list(done.token_ids) == whole[:cut], kind


# --- Every family -----------------------------------------------------------------------------------------------------


def tiny(family: str) -> PreTrainedModel:
    """A fresh tiny random model; Gemma 3 has a sliding window of 7."""
    if family != "glm":
        return copy.deepcopy(model_of(family, 64))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = GlmConfig(vocab_size=64, num_key_value_heads=2, head_dim=8, initializer_range=0.6, **sizes, **special)
        return GlmForCausalLM(config).float().eval()


def tuned(family: str, *, projection: bool = True, dropout: float = 0.0) -> PreTrainedModel:
    model = tiny(family)
    return attach_prefix(model, num_virtual_tokens=5, projection=projection, dropout=dropout, seed=3)


def rows(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 64, (1, length), generator=generator) for length in lengths]


families = pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "glm"])


@families
@attention
@torch.no_grad()
def test_in_parts_padded_or_generated_a_row_gives_what_it_gives_at_once(family: str, implementation: str) -> None:
    model = tuned(family)
    model.set_attn_implementation(implementation)
    (row,) = rows(23)
    whole = model(row).logits
    with without_prefix(model):
        assert off(model(row).logits, whole) > 0.1
    first = model(row[:, :9], use_cache=True)
    rest = model(row[:, 9:], past_key_values=first.past_key_values).logits
    assert off(torch.cat([first.logits, rest], dim=1), whole) <= 1e-4

    padded = nn.functional.pad(row, (4, 0))
    mask = (torch.arange(27) >= 4).long()[None]
    positions = (torch.arange(27) - 4).clamp(min=0)[None]
    together = model(
        torch.cat([padded, nn.functional.pad(row, (0, 4))]),
        attention_mask=torch.cat([mask, mask.flip(1)]),
        position_ids=torch.cat([positions, torch.arange(27)[None]]),
    ).logits
    assert off(together[:1, 4:], whole) <= 1e-4
    assert off(together[1:, :23], whole) <= 1e-4

    prompt, greedy = row[:, :11], row[:, :11]
    for _ in range(10):
        greedy = torch.cat([greedy, model(greedy).logits[:, -1:].argmax(-1)], dim=1)
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **options), greedy)
    beams = [model.generate(prompt, **options, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)
    assert torch.equal(model.generate(prompt, **options, cache_implementation="static"), greedy)
    left = model.generate(
        nn.functional.pad(prompt, (3, 0)), attention_mask=(torch.arange(14) >= 3).long()[None], **options
    )
    assert torch.equal(left[:, 3:], greedy)
    (engine,) = generate(model, [prompt[0].tolist()], stop_ids=[], sampling=Sampling(max_new_tokens=10))
    assert list(engine.token_ids) == greedy[0, 11:].tolist()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    length=st.integers(1, 30),
    cut=st.integers(0, 30),
    padding=st.integers(0, 9),
    tokens=st.integers(1, 20),
    data=st.data(),
)
@torch.no_grad()
def test_no_length_cut_or_padding_changes_a_row(length: int, cut: int, padding: int, tokens: int, data: Any) -> None:
    family = data.draw(st.sampled_from(["llama", "gemma3", "glm"]))
    model = attach_prefix(tiny(family), num_virtual_tokens=tokens, projection=data.draw(st.booleans()), seed=length)
    (row,) = rows(length, seed=cut)
    whole = model(row).logits
    padded, mask = nn.functional.pad(row, (padding, 0)), (torch.arange(padding + length) >= padding).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    assert off(model(padded, attention_mask=mask, position_ids=positions).logits[:, padding:], whole) <= 1e-4
    cut = min(cut, length - 1)
    cache = model(row[:, :cut], use_cache=True).past_key_values if cut else None
    assert off(model(row[:, cut:], past_key_values=cache).logits, whole[:, cut:]) <= 1e-4


def test_tokens_far_behind_a_sliding_window_still_see_the_prefix() -> None:
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=4,
        layer_types=["sliding_attention"],
    )
    model = attach_prefix(Gemma3ForCausalLM(config).eval(), num_virtual_tokens=3, projection=False)
    (row,) = rows(20)
    encoder = prefix_encoder_of(model)
    assert encoder is not None
    model(row).logits[0, -1].logsumexp(0).backward()
    assert encoder.embedding.weight.grad is not None
    assert encoder.embedding.weight.grad.abs().amin(-1).gt(0).all(), "the last token hangs on all of the prefix"


@families
@pytest.mark.parametrize("projection", [False, True])
def test_packed_rows_give_the_gradients_of_rows_alone(family: str, projection: bool) -> None:
    model = tuned(family, projection=projection)
    encoder = prefix_encoder_of(model)
    assert encoder is not None
    parts = rows(5, 17, 1, 11)

    def gradients() -> list[Tensor]:
        found = [parameter.grad.clone() for parameter in encoder.parameters() if parameter.grad is not None]
        encoder.zero_grad()
        return found

    def objective(hidden: Tensor) -> Tensor:
        return hidden.sin().sum()

    for row in parts:
        objective(model.get_decoder()(row, use_cache=False).last_hidden_state).backward()
    alone = gradients()
    model.set_attn_implementation(PACKED)
    states = prefix_states(model)
    assert states is not None
    starts = torch.tensor([0, *torch.tensor([row.shape[1] for row in parts]).cumsum(0)])
    packed = model.get_decoder()(
        torch.cat(parts, dim=1),
        position_ids=torch.cat([torch.arange(row.shape[1]) for row in parts])[None],
        use_cache=False,
        row_starts=starts,
        past_states=(states[0].unbind(), states[1].unbind()),
    )
    objective(packed.last_hidden_state).backward()
    for ours, theirs in zip(gradients(), alone, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@families
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = tuned(family, dropout=0.5).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(7)
        losses = [model(row, labels=row).loss for row in rows(9, 21)]  # both forwards before the first backward
        sum(losses, start=torch.zeros(())).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_only_the_prefix_learns_in_float32_and_starts_from_the_seed_alone() -> None:
    model = tiny("glm").to(torch.bfloat16)
    torch.manual_seed(1)
    attach_prefix(model, num_virtual_tokens=6, projection=True, seed=9)
    learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.partition(".")[0] for name in learnt} == {"prefix_encoder"}
    assert {p.dtype for p in learnt.values()} == {torch.float32}
    assert model.dtype == torch.bfloat16
    states = prefix_states(model)
    assert states is not None
    assert states[0].shape == states[1].shape == (2, 2, 6, 8)
    assert states[0].dtype == torch.bfloat16
    model(rows(7)[0], labels=rows(7)[0]).loss.backward()
    torch.manual_seed(2)
    again = attach_prefix(tiny("glm"), num_virtual_tokens=6, projection=True, seed=9)
    other = attach_prefix(tiny("glm"), num_virtual_tokens=6, projection=True, seed=8)
    for name, parameter in learnt.items():
        assert torch.equal(parameter, again.get_parameter(name))
    assert not torch.equal(
        learnt["prefix_encoder.embedding.weight"], other.get_parameter("prefix_encoder.embedding.weight")
    )


def test_a_copy_of_a_model_has_a_prefix_of_its_own() -> None:
    model = tuned("llama")
    (row,) = rows(6)
    before = model(row).logits
    twin = copy.deepcopy(model)
    encoder = prefix_encoder_of(twin)
    assert encoder is not None
    nn.init.zeros_(encoder.embedding.weight)
    assert off(model(row).logits, before) == 0
    assert off(twin(row).logits, before) > 0.01


def test_a_second_prefix_takes_the_place_of_the_first() -> None:
    model = tuned("llama")
    (row,) = rows(6)
    fresh = attach_prefix(tiny("llama"), num_virtual_tokens=2, projection=False, seed=1)(row).logits
    assert off(attach_prefix(model, num_virtual_tokens=2, projection=False, seed=1)(row).logits, fresh) == 0


def test_the_sizes_are_the_originals() -> None:
    shapes = {
        (family, projection): {name: tuple(p.shape) for name, p in encoder.named_parameters()}
        for family in ("llama", "glm")
        for projection in (False, True)
        if (encoder := prefix_encoder_of(tuned(family, projection=projection))) is not None
    }
    numbers = prefix_shape(tiny("glm")).num_numbers
    assert numbers == 2 * 2 * 2 * 8
    trans = {"trans.0.bias": (32,), "trans.2.weight": (numbers, 32), "trans.2.bias": (numbers,)}
    assert shapes["glm", False] == shapes["llama", False] == {"embedding.weight": (5, numbers)}
    assert shapes["llama", True] == {"embedding.weight": (5, 32), "trans.0.weight": (32, 32), **trans}  # as ChatGLM-6B
    assert shapes["glm", True] == {"embedding.weight": (5, numbers), "trans.0.weight": (32, numbers), **trans}


# --- What cannot be done ----------------------------------------------------------------------------------------------


def test_a_model_whose_layers_do_not_take_the_prefix_is_refused() -> None:
    model = tuned("llama")
    layer = model.get_decoder().layers[1]
    forward = layer.forward
    layer.forward = lambda hidden, **kwargs: forward(hidden, **{k: v for k, v in kwargs.items() if "prefix" not in k})
    with pytest.raises(ModelError, match="1 of 2 layers of LlamaModel took the prefix"):
        model(rows(4)[0])


def test_a_model_without_an_attention_in_every_layer_is_refused() -> None:
    model = tiny("llama")
    model.get_decoder().layers[0].self_attn = nn.Identity()
    with pytest.raises(ModelError, match=r"LlamaForCausalLM has 1, or of other sizes\. Use LoRA"):
        attach_prefix(model, num_virtual_tokens=2, projection=False)


def test_an_attention_that_knows_no_prefix_is_refused() -> None:
    model = tuned("llama")
    model.set_attn_implementation(PACKED)
    with pytest.raises(ModelError, match="set to 'weitiao_packed'"):
        model(rows(4)[0])


def test_the_prefix_comes_back_after_an_error() -> None:
    model = tuned("llama")
    with pytest.raises(RuntimeError), without_prefix(model):
        assert prefix_states(model) is None
        raise RuntimeError
    assert prefix_states(model) is not None
    with without_prefix(tiny("llama")) as nothing:
        assert nothing is None


def test_without_a_projection_the_embedding_is_the_prefix() -> None:
    encoder = PrefixEncoder(prefix_shape(tiny("llama")), num_virtual_tokens=3, projection=False)
    keys, values = encoder()
    numbers = encoder.embedding.weight.view(3, 4, 2, 8)  # token, part, head, feature
    for layer in range(2):
        assert torch.equal(keys[layer].transpose(0, 1), numbers[:, 2 * layer])
        assert torch.equal(values[layer].transpose(0, 1), numbers[:, 2 * layer + 1])
