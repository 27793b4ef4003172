"""Original checkpoints compute what the originals computed, whatever their sizes, files and dtypes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from glm_checkpoints import (
    NATIVE,
    Golden,
    config_of,
    golden_folder,
    make_config,
    make_weights,
    opened,
    original_gradients,
    stored_weights,
    write_checkpoint,
)
from weitiao.errors import ModelError
from weitiao.models.glm.config import WITHOUT_EFFECT
from weitiao.models.glm.original import open_original, original_name_map, read_prefix

LOGITS, LOSS, GRADIENT = 1e-4, 1e-5, 1e-3


@cache
def model_of(name: str) -> PreTrainedModel:
    return opened(golden_folder(name))


@cache
def golden_of(name: str) -> Golden:
    return Golden(name)


@pytest.fixture(params=NATIVE)
def case(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Golden]:
    return model_of(request.param), golden_of(request.param)


def far(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


@torch.no_grad()
def test_a_row_gives_the_logits_states_and_cache_of_the_original(case: tuple[PreTrainedModel, Golden]) -> None:
    model, golden = case
    ids = golden["single/input_ids"]
    told = model(
        ids,
        attention_mask=golden["single/attention_mask"],
        position_ids=golden["single/position_ids"],
        output_hidden_states=True,
        use_cache=True,
    )
    assert far(told.logits, golden["single/logits"]) <= LOGITS
    assert far(model(ids).logits, golden["single/logits"]) <= LOGITS
    *before, last = golden["single/hidden_states"]
    assert len(told.hidden_states) == len(before) + 1
    assert all(far(ours, theirs) <= LOGITS for ours, theirs in zip(told.hidden_states, before, strict=False))
    assert far(told.hidden_states[-1], model.model.norm(last)) <= LOGITS  # the originals' last one is not normed yet
    for kind in ("keys", "values"):
        theirs = golden[f"single/past_{kind[0]}"]
        if theirs.shape[1] == ids.shape[1]:
            theirs = theirs.permute(0, 2, 3, 1, 4)
        ours = torch.stack([getattr(layer, kind) for layer in told.past_key_values.layers])
        assert far(ours, theirs) <= LOGITS


@torch.no_grad()
@pytest.mark.parametrize("name", ["chatglm_v1", "chatglm_v1_28l", "chatglm_v1_int4/int4", "chatglm_v1_int4/int8"])
def test_chatglm_comes_out_of_its_files_as_it_was(name: str) -> None:
    model, golden = model_of(name), golden_of(name)
    assert far(model(golden["single/input_ids"]).logits, golden["single/logits"]) <= LOGITS


@torch.no_grad()
def test_steps_and_chunks_behind_a_cache_equal_the_original(case: tuple[PreTrainedModel, Golden]) -> None:
    model, golden = case
    past = model(golden["single/input_ids"], use_cache=True).past_key_values
    positions = golden["step2/position_ids"]
    step = model(golden["step2/input_ids"], position_ids=positions, past_key_values=past, use_cache=True)
    assert far(step.logits, golden["step2/logits"]) <= LOGITS
    assert far(model(golden["step2/full_input_ids"]).logits, golden["step2/full_logits"]) <= LOGITS
    past = model(golden["chunked/first_ids"], use_cache=True).past_key_values
    positions = golden["chunked/second_position_ids"]
    second = model(golden["chunked/second_ids"], position_ids=positions, past_key_values=past, use_cache=True)
    assert far(second.logits, golden["chunked/second_logits"]) <= LOGITS


@torch.no_grad()
def test_padded_long_and_tiny_rows_equal_the_original(case: tuple[PreTrainedModel, Golden]) -> None:
    model, golden = case
    mask, positions = golden["leftpad/attention_mask"], golden["leftpad/position_ids"]
    padded = model(golden["leftpad/input_ids"], attention_mask=mask, position_ids=positions).logits
    valid = golden["leftpad/valid"]
    assert far(padded[valid], golden["leftpad/logits"][valid]) <= LOGITS
    long = model(golden["long/input_ids"]).logits
    assert far(long[:, -8:], golden["long/logits_last8"]) <= LOGITS
    assert far(long[:, :4], golden["long/logits_first4"]) <= LOGITS
    assert far(model(golden["tiny_emb/input_ids"]).logits, golden["tiny_emb/logits"]) <= LOGITS


def test_losses_and_gradients_equal_the_original(case: tuple[PreTrainedModel, Golden]) -> None:
    model, golden = case
    cases = [key.partition("/")[0] for key in golden.arrays if key.endswith("/loss")]
    assert {"train_rightpad", "train_leftpad"} <= set(cases)
    for what in cases:
        compare_training(model, golden, what)


def compare_training(model: PreTrainedModel, golden: Golden, what: str) -> None:
    given_too = {
        key: golden[f"{what}/{key}"] for key in ("attention_mask", "position_ids") if f"{what}/{key}" in golden.arrays
    }
    model.zero_grad()
    told = model(golden[f"{what}/input_ids"], labels=golden[f"{what}/labels"], **given_too)
    told.loss.backward()
    gradients = original_gradients(model)
    model.zero_grad()
    valid = golden[f"{what}/valid"] if f"{what}/valid" in golden.arrays else torch.ones(told.logits.shape[:2]).bool()
    assert far(told.logits[valid].detach(), golden[f"{what}/logits"][valid]) <= LOGITS
    assert far(told.loss.detach(), golden[f"{what}/loss"]) <= LOSS
    compared = 0
    for key in golden.arrays:
        case_name, kind, name = (*key.split("/", 2), "")[:3]
        if case_name != what or not kind.startswith("grad"):
            continue
        ours, theirs = gradients[name].double(), golden[key].double()
        if kind == "gradstat":
            ours = torch.stack([ours.sum(), ours.abs().sum(), ours.norm()])
            assert far(ours[:2], theirs[:2]) <= GRADIENT * theirs[1] and far(ours[2], theirs[2]) <= GRADIENT * theirs[2]
        else:
            ours = ours.flatten()[:16] if kind == "gradhead" else ours
            assert far(ours, theirs) <= GRADIENT * gradients[name].abs().max()
        compared += 1
    assert compared >= 2 * len(gradients)


@torch.no_grad()
def test_greedy_answers_equal_the_original(case: tuple[PreTrainedModel, Golden]) -> None:
    model, golden = case
    for what in golden.cases("gen_"):
        ids, theirs = golden[f"{what}/input_ids"], golden[f"{what}/sequences"]
        stop = int(golden[f"{what}/eos_token_id"]) if f"{what}/eos_token_id" in golden.arrays else None
        ours = model.generate(
            input_ids=ids,
            attention_mask=golden[f"{what}/attention_mask"],
            do_sample=False,
            max_new_tokens=theirs.shape[1] - ids.shape[1],
            **({} if stop is None else {"eos_token_id": stop}),
        )
        assert ours.tolist() == theirs.tolist(), what


@pytest.mark.parametrize("name", [*NATIVE, "chatglm_v1", "chatglm_v1_28l"])
def test_a_model_is_opened_as_from_pretrained_leaves_one(name: str) -> None:
    folder = golden_folder(name)
    model, config = model_of(name), config_of(folder)
    assert not model.training
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())
    assert model.dtype == torch.float32 == model.config.dtype
    assert model.config.tie_word_embeddings == (model.lm_head.weight is model.get_input_embeddings().weight)
    assert model.name_or_path == str(folder)
    assert model.generation_config.eos_token_id == config["eos_token_id"]
    assert model.generation_config.pad_token_id == config["pad_token_id"]


def test_generation_settings_beside_the_weights_are_read_and_completed(tmp_path: Path) -> None:
    config = make_config()
    folder = write_checkpoint(tmp_path, config, make_weights(config))
    (folder / "generation_config.json").write_text('{"top_p": 0.7, "do_sample": true}')
    told = opened(folder).generation_config
    assert (told.top_p, told.do_sample, told.eos_token_id, told.pad_token_id) == (0.7, True, 2, 0)


def reference_logits(config: dict[str, Any], weights: dict[str, Tensor], ids: Tensor, *, interpolate: bool) -> Tensor:
    """Logits ``[tokens, vocabulary]`` of one row, from the formulas alone, in float64."""
    at = {name: tensor.double() for name, tensor in weights.items()}
    size, heads = config["kv_channels"], config["num_attention_heads"]
    groups = config["multi_query_group_num"] if config["multi_query_attention"] else heads
    ratio = config.get("rope_ratio", 1)
    base, places = (
        10_000.0 * (1 if interpolate else ratio),
        torch.arange(len(ids)).double() / (ratio if interpolate else 1),
    )
    half = size // 2
    angles = places[:, None] / base ** (torch.arange(0, half, 2).double() / half)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + config["layernorm_epsilon"]).rsqrt() * at[f"{name}.weight"]

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x[..., :half].reshape(*x.shape[:-1], half // 2, 2).contiguous())
        return torch.cat([torch.view_as_real(pairs * turn).flatten(-2), x[..., half:]], -1)

    x = at["transformer.embedding.word_embeddings.weight"][ids]
    for number in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{number}"
        qkv = norm(x, f"{layer}.input_layernorm") @ at[f"{layer}.self_attention.query_key_value.weight"].T
        if config["add_qkv_bias"]:
            qkv = qkv + at[f"{layer}.self_attention.query_key_value.bias"]
        if config["multi_query_attention"]:
            q, k, v = qkv.split([heads * size, groups * size, groups * size], -1)
            q, k, v = (part.view(len(ids), -1, size) for part in (q, k, v))
        else:
            q, k, v = qkv.view(len(ids), heads, 3 * size).split(size, -1)
        shared = torch.arange(heads) // (heads // groups)
        scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)[:, shared]) / size**0.5
        scores = scores.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -torch.inf)
        seen = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[:, shared]).reshape(len(ids), -1)
        x = x + seen @ at[f"{layer}.self_attention.dense.weight"].T
        inner = norm(x, f"{layer}.post_attention_layernorm") @ at[f"{layer}.mlp.dense_h_to_4h.weight"].T
        gate, up = inner.chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ at[f"{layer}.mlp.dense_4h_to_h.weight"].T
    return norm(x, "transformer.encoder.final_layernorm") @ at["transformer.output_layer.weight"].T


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_sizes_compute_the_formulas(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    groups, each = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    config = make_config(
        num_attention_heads=groups * each,
        multi_query_group_num=groups,
        multi_query_attention=data.draw(st.booleans()),
        kv_channels=data.draw(st.sampled_from([4, 8, 12, 20])),
        hidden_size=data.draw(st.sampled_from([8, 12, 20])),
        num_layers=data.draw(st.integers(1, 3)),
        rope_ratio=data.draw(st.sampled_from([1, 4, 50, 2.5])),
        add_qkv_bias=data.draw(st.booleans()),
        layernorm_epsilon=data.draw(st.sampled_from([1e-5, 1.5625e-07, 1e-2])),
        _name_or_path=data.draw(st.sampled_from(["x/chatglm2-6b-32k", "x/chatglm3-6b", "x/glm-4-9b"])),
    )
    weights = make_weights(config, seed=data.draw(st.integers(0, 99)))
    model = opened(write_checkpoint(tmp_path_factory.mktemp("sizes"), config, weights))
    ids = torch.randint(0, config["padded_vocab_size"], (data.draw(st.integers(1, 40)),))
    wanted = reference_logits(config, weights, ids, interpolate="chatglm2" in config["_name_or_path"])
    with torch.no_grad():
        assert far(model(ids[None]).logits[0].double(), wanted) <= LOGITS * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rmsnorm", False),
        ("add_bias_linear", True),
        ("apply_residual_connection_post_layernorm", True),
        ("post_layer_norm", False),
        ("fp32_residual_connection", True),
        ("hidden_dropout", 0.1),
    ],
)
def test_what_glm_cannot_compute_is_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    folder = write_checkpoint(tmp_path, make_config(**{key: value}), make_weights(make_config()))
    with pytest.raises(ModelError, match=rf"{key} is {value!r}, where .* is known"):
        opened(folder)


def test_all_that_is_wrong_with_a_configuration_is_told(tmp_path: Path) -> None:
    config = make_config(rmsnorm=False, post_layer_norm=False)
    folder = write_checkpoint(tmp_path, config, make_weights(make_config()))
    with pytest.raises(ModelError, match=r"rmsnorm is False.*post_layer_norm is False"):
        opened(folder)
    with pytest.raises(ModelError, match="num_attention_heads is 4, which is no multiple of multi_query_group_num, 3"):
        open_original(folder, make_config(multi_query_group_num=3), dtype=torch.float32)


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_keys_without_effect_have_none(tmp_path: Path, key: str) -> None:
    config, ids = make_config(), torch.arange(12)[None]
    folder = write_checkpoint(tmp_path, config, make_weights(config))
    values = ("sdpa", "eager") if key == "attn_implementation" else (True, False)
    with torch.no_grad():
        told = [open_original(folder, {**config, key: value}, dtype=torch.float32)(ids).logits for value in values]
    assert torch.equal(*told)


def test_remote_code_is_not_run_and_not_missed(tmp_path: Path) -> None:
    config = make_config(auto_map={"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"})
    folder = write_checkpoint(tmp_path / "model", config, make_weights(config))
    marker = tmp_path / "was-run"
    (folder / "modeling_chatglm.py").write_text(f"open({str(marker)!r}, 'w')\nraise SystemExit\n")
    assert opened(folder)(torch.tensor([[1, 2]])).logits.shape == (1, 2, 40)
    assert not marker.exists()
    assert "auto_map" not in opened(folder).config.to_dict()


def test_a_prefix_among_the_weights_or_beside_them_is_left_to_the_caller(tmp_path: Path) -> None:
    config = make_config()
    weights, prefix = make_weights(config), {"transformer.prefix_encoder.embedding.weight": torch.randn(3, 64)}
    plain = write_checkpoint(tmp_path / "plain", config, weights)
    inside = write_checkpoint(tmp_path / "inside", config, {**weights, **prefix})
    beside = write_checkpoint(tmp_path / "beside", config, weights)
    write_checkpoint(beside, config, prefix)
    (beside / "model.safetensors").rename(beside / "prefix_encoder.safetensors")
    write_checkpoint(beside, config, weights)
    alone = write_checkpoint(tmp_path / "alone", config, prefix, kind="bin")
    assert read_prefix(plain) is None
    for folder in (inside, beside, alone):
        assert {name: x.tolist() for name, x in (read_prefix(folder) or {}).items()} == {
            "embedding.weight": prefix["transformer.prefix_encoder.embedding.weight"].tolist()
        }
    for folder in (inside, beside):
        assert {n: x.tolist() for n, x in opened(folder).state_dict().items()} == {
            n: x.tolist() for n, x in opened(plain).state_dict().items()
        }
    with pytest.raises(ModelError, match="hold a P-Tuning prefix alone"):
        opened(alone)


def test_an_output_layer_that_is_not_the_embedding_is_told_of(tmp_path: Path) -> None:
    folder = golden_folder("chatglm_v1")
    weights, config = stored_weights(folder), config_of(folder)
    other = write_checkpoint(tmp_path, config, {**weights, "lm_head.weight": weights["lm_head.weight"] + 1})
    with pytest.warns(UserWarning, match=r"lm_head\.weight differs from the embedding"):
        model = opened(other)
    assert torch.equal(model.lm_head.weight, weights["transformer.word_embeddings.weight"])
    del weights["lm_head.weight"]
    assert opened(write_checkpoint(tmp_path / "without", config, weights)).lm_head.weight is not None


def test_the_names_of_old_adapters_lead_to_rows_of_ours(tmp_path: Path) -> None:
    config = make_config()
    model = opened(write_checkpoint(tmp_path, config, make_weights(config)))
    parts = original_name_map(model)["transformer.encoder.layers.1.self_attention.query_key_value"]
    assert [(part.name, part.rows) for part in parts] == [
        ("model.layers.1.self_attn.q_proj", (slice(0, 32),)),
        ("model.layers.1.self_attn.k_proj", (slice(32, 48),)),
        ("model.layers.1.self_attn.v_proj", (slice(48, 64),)),
    ]
    assert json.loads((tmp_path / "config.json").read_text()) == config
