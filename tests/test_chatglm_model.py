"""What holds for ChatGLM-6B whatever its weights: padding, caches and attention functions change nothing."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, modeling_flash_attention_utils

from weitiao.errors import ModelError
from weitiao.models.glm.chatglm import ChatGlmForCausalLM
from weitiao.models.glm.chatglm_config import ChatGlmConfig
from weitiao.models.prefix_lm import row_prefix

PAD, MASK, GMASK, SOP, EOP = 3, 90, 91, 94, 95


def tiny(**changes: Any) -> ChatGlmForCausalLM:
    torch.manual_seed(7)
    settings: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 32, "num_layers": 3, "num_attention_heads": 2, "inner_hidden_size": 48,
        "mask_token_id": MASK, "gmask_token_id": GMASK, "bos_token_id": SOP, "eos_token_id": EOP, "pad_token_id": PAD,
    }  # fmt: skip
    model = ChatGlmForCausalLM(ChatGlmConfig(**settings | changes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def row(rng: random.Random, *, answer: int) -> list[int]:
    """A context with its mask token at the end or inside, <sop> and an answer, none of them padding."""
    context = [rng.randrange(4, 90) for _ in range(rng.randrange(0, 9))]
    context.insert(rng.choice([len(context), rng.randrange(len(context) + 1)]), rng.choice([GMASK, MASK]))
    return [*context, SOP, *(rng.randrange(4, 90) for _ in range(answer))]


def padded(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows)) + 1
    blank = [[PAD] * (width - len(tokens)) for tokens in rows]
    ids = [pad + tokens if side == "left" else tokens + pad for tokens, pad in zip(rows, blank)]
    real = [[0] * len(pad) + [1] * len(t) if side == "left" else [1] * len(t) + [0] * len(pad)
            for t, pad in zip(rows, blank)]  # fmt: skip
    return torch.tensor(ids), torch.tensor(real)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float | None = None, causal: bool = False,
) -> Tensor:  # fmt: skip
    """What the kernels compute: rows end to end, no masks, causal from the last query and the last key on."""
    pieces, starts_q, starts_k = [], cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert max_seqlen_q == max(stop - start for start, stop in pairwise(starts_q))
    assert max_seqlen_k == max(stop - start for start, stop in pairwise(starts_k))
    for (q0, q1), (k0, k1) in zip(pairwise(starts_q), pairwise(starts_k)):
        seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        seen = seen.tril(k1 - k0 - (q1 - q0)) if causal else seen
        rows = (tokens.transpose(0, 1) for tokens in (q[q0:q1], k[k0:k1], v[k0:k1]))
        pieces.append(scaled_dot_product_attention(*rows, attn_mask=seen, scale=softmax_scale).transpose(0, 1))
    return torch.cat(pieces)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False
) -> Tensor:
    """The same for rows of one length."""
    batch, num_queries, num_keys = len(q), q.shape[1], k.shape[1]
    starts = (torch.arange(batch + 1) * num_queries, torch.arange(batch + 1) * num_keys)
    flat = (tokens.flatten(0, 1) for tokens in (q, k, v))
    return flash_attn_varlen_func(*flat, *starts, num_queries, num_keys, softmax_scale, causal).view(q.shape)


@pytest.fixture(autouse=True)
def _flash_kernels_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own flash attention, with kernels that need no GPU."""
    kernels = ModuleType("flash_attn_interface")
    kernels.__dict__.update(
        flash_attn_func=flash_attn_func,
        flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=None,
    )
    monkeypatch.setitem(sys.modules, "flash_attn_interface", kernels)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)


def use(model: ChatGlmForCausalLM, attention: str) -> None:
    model.config._attn_implementation = attention  # set_attn_implementation wants to see a GPU for flash attention


seen_by_attention: list[dict[str, Any]] = []


def _record(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    seen_by_attention.append({"layer": module.layer_idx, "mask": attention_mask, "shape": query.shape, **kwargs})
    return value.transpose(1, 2).contiguous(), None


AttentionInterface.register("test_record", _record)
AttentionMaskInterface.register("test_record", lambda *_, **__: None)
every_attention = pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_3"])


@every_attention
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_no_logits(attention: str, side: str) -> None:
    model, rng = tiny(), random.Random(side)
    for _ in range(8):
        rows = [row(rng, answer=rng.randrange(0, 7)) for _ in range(4)]
        model.set_attn_implementation("sdpa")
        alone = [model(torch.tensor([tokens])).logits[0] for tokens in rows]
        use(model, attention)
        ids, real = padded(rows, side)
        together = model(ids, attention_mask=real).logits
        assert together.isfinite().all()
        for logits, kept, expected in zip(together, real.bool(), alone):
            torch.testing.assert_close(logits[kept], expected, atol=2e-5, rtol=1e-5)


@every_attention
@torch.no_grad()
def test_the_cache_changes_no_logits(attention: str) -> None:
    model, rng = tiny(), random.Random(2)
    use(model, attention)
    for _ in range(8):
        rows = [row(rng, answer=6) for _ in range(3)]
        rows[0][-3] = SOP  # an answer may hold any token
        ids, real = padded(rows, "left")
        positions = model.transformer.read_positions(ids, real.bool(), None)
        whole = model(ids, attention_mask=real, position_ids=positions).logits
        cuts = sorted({ids.shape[1] - 6, rng.randrange(ids.shape[1] - 5, ids.shape[1]), ids.shape[1]})
        cached, first = DynamicCache(config=model.config), 0
        for stop in cuts:
            here = slice(first, stop)
            part = model(ids[:, here], attention_mask=real[:, :stop], position_ids=positions[..., here],
                         past_key_values=cached).logits  # fmt: skip
            kept = real[:, here].bool()
            torch.testing.assert_close(part[kept], whole[:, here][kept], atol=2e-5, rtol=1e-5)
            first = stop


@pytest.mark.parametrize("attention", ["eager", "flash_attention_3"])
def test_all_attention_functions_give_the_same_gradients(attention: str) -> None:
    rng = random.Random(3)
    ids, real = padded([row(rng, answer=5) for _ in range(4)], "left")
    labels = torch.where(real.cumsum(-1) > 1, ids, -100)  # the first token would be predicted by padding
    gradients = []
    for name in ("sdpa", attention):
        model = tiny().train()
        use(model, name)
        model(ids, attention_mask=real, labels=labels, use_cache=False).loss.backward()
        gradients.append({key: value.grad for key, value in model.named_parameters()})
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, atol=1e-4, rtol=1e-4, msg=key)


def test_generation_is_the_same_with_any_cache_and_attention() -> None:
    rng = random.Random(4)
    ids, real = padded([row(rng, answer=0) for _ in range(4)], "left")
    model = tiny()

    def answer(**options: Any) -> Tensor:
        given = model.generate(ids, attention_mask=real, max_new_tokens=9, do_sample=False, **options)
        assert isinstance(given, Tensor)
        return given

    expected = answer()
    assert torch.equal(answer(use_cache=False), expected)
    assert torch.equal(answer(cache_implementation="static", disable_compile=True), expected)
    assert torch.equal(answer(num_return_sequences=2, num_beams=2)[::2, : ids.shape[1]], ids)
    for attention in ("eager", "flash_attention_3"):
        use(model, attention)
        assert torch.equal(answer(), expected)
        assert torch.equal(answer(cache_implementation="static", disable_compile=True), expected)
    model.set_attn_implementation("sdpa")
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ModelError, match="inputs_embeds"):
        model.generate(inputs_embeds=embeds, attention_mask=real, max_new_tokens=9)
    positions = model.transformer.read_positions(ids, real.bool(), None)
    given = model.generate(
        inputs_embeds=embeds, attention_mask=real, position_ids=positions, max_new_tokens=9, do_sample=False
    )
    assert torch.equal(given, expected[:, ids.shape[1] :])


def test_a_prompt_in_pieces_is_right_or_refused() -> None:
    model = tiny()
    prompt = torch.tensor([[5, 6, 7, GMASK, SOP, 8, 9]])
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False)
    pieces = model.generate(prompt, max_new_tokens=5, do_sample=False, prefill_chunk_size=4)
    assert torch.equal(pieces, expected)
    for size in (1, 3):
        with pytest.raises(ModelError, match="Row 0 of the batch continues its context at position"):
            model.generate(prompt, max_new_tokens=5, do_sample=False, prefill_chunk_size=size)


@torch.no_grad()
def test_the_keywords_of_a_call_reach_every_attention_function() -> None:
    model = tiny()
    model.set_attn_implementation("test_record")
    seen_by_attention.clear()
    packed = torch.tensor([[5, GMASK, SOP, 8, GMASK, SOP, 9, 9]])
    positions = torch.tensor([[[0, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 2, 0, 1, 2, 3]]])
    starts = torch.tensor([0, 4, 8])
    model(packed, position_ids=positions, row_starts=starts, use_cache=False)
    assert [call["layer"] for call in seen_by_attention] == [0, 1, 2]
    for call in seen_by_attention:
        assert call["mask"] is None
        assert call["row_starts"] is starts
        assert call["scaling"] == 16**-0.5


def test_saved_weights_load_as_they_were(tmp_path: Path) -> None:
    model = tiny(residual_layers=3, pre_seq_len=4, auto_map={"AutoModel": "code.Model"}, of_old=1)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    kept = {"residual_layers": 3, "pre_seq_len": 4, "auto_map": {"AutoModel": "code.Model"}, "of_old": 1}
    assert {key: written[key] for key in kept} == kept
    again = ChatGlmForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.transformer.word_embeddings.weight
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())
    ids = torch.tensor([[5, 6, GMASK, SOP, 8]])
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_model_made_without_memory_works_once_its_weights_are_assigned() -> None:
    model = tiny()
    with torch.device("meta"):
        empty = ChatGlmForCausalLM(model.config)
    assert not list(empty.buffers()), "a buffer would have to be filled in as well"
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.tie_weights()
    assert empty.lm_head.weight is empty.transformer.word_embeddings.weight
    ids = torch.tensor([[5, 6, GMASK, SOP, 8]])
    assert torch.equal(empty.eval()(ids).logits, model(ids).logits)


@torch.no_grad()
def test_logits_are_computed_where_they_are_asked_for() -> None:
    model, ids = tiny(), torch.tensor([[5, 6, GMASK, SOP, 8, 9], [5, GMASK, 7, SOP, 8, 4]])
    everything = model(ids).logits
    which: list[tuple[int | Tensor, Callable[[Tensor], Tensor]]] = [
        (2, lambda logits: logits[:, -2:]),
        (torch.tensor([1, 4]), lambda logits: logits[:, [1, 4]]),
        (torch.tensor([[1, 4], [0, 2]]), lambda logits: torch.stack([logits[0, [1, 4]], logits[1, [0, 2]]])),
    ]
    for asked, expected in which:
        torch.testing.assert_close(model(ids, logits_to_keep=asked).logits, expected(everything))


@torch.no_grad()
def test_half_precision_keeps_padding_finite() -> None:
    ids, real = padded([[5, 6, GMASK, SOP, 8], [GMASK, SOP]], "left")
    for attention in ("sdpa", "eager"):
        for dtype in (torch.float16, torch.bfloat16):
            model = tiny().to(dtype)
            use(model, attention)
            assert model(ids, attention_mask=real).logits.isfinite().all()


def test_what_the_rest_of_transformers_asks_is_answered() -> None:
    model = tiny()
    assert model.get_decoder() is model.transformer
    assert model.get_input_embeddings() is model.transformer.word_embeddings
    assert model.get_output_embeddings() is model.lm_head
    assert model.config.num_hidden_layers == len(model.transformer.layers) == 3
    prefix = row_prefix(model, [5, MASK, 6, GMASK, SOP, 7])
    assert prefix is not None
    assert (prefix.num_tokens, prefix.mask_position) == (4, 3)
    ids = torch.tensor([[5, MASK, 6, GMASK, SOP, 7]])
    assert model.transformer.read_positions(ids, None, None)[0].tolist() == list(map(list, prefix.positions(0, 6)))
    assert ChatGlmConfig().vocab_size == 130528
    assert tiny(num_layers=1).transformer.layers[0].alpha == 56**0.5


@torch.no_grad()
def test_plain_positions_of_whole_rows_are_understood() -> None:
    model = tiny()
    ids, real = padded([[5, 6, GMASK, SOP, 8], [GMASK, SOP]], "left")
    plain = (real.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=real).logits
    assert torch.equal(model(ids, attention_mask=real, position_ids=plain).logits, expected)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ({"input_ids": [[5, GMASK, SOP], [5, GMASK, 7]]}, "Row 1 of the batch: There is no <sop>"),
        ({"input_ids": [[5, GMASK, SOP], [5, SOP, GMASK]]}, "Row 1 of the batch: There is no .gMASK. .id 91."),
        ({"input_ids": [[5, GMASK, SOP]], "position_ids": [[1, 2, 3]]}, "do not count the tokens of each row from 0"),
        ({"input_ids": [[5, GMASK, SOP]], "position_ids": [[0, 1]]}, "shape .1, 2. do not count"),
        ({"input_ids": [[5, GMASK, SOP]], "attention_mask": [[1, 1]]}, "attention_mask of shape .1, 2."),
        ({"input_ids": [[5, GMASK, SOP]], "attention_mask": [[1, 1, 1, 1]]}, "reaches over 4 columns"),
        ({"input_ids": [[5, GMASK, SOP]], "attention_mask": [[[[0, 1, 1]] * 3]]}, "type torch.int64"),
        ({}, "either input_ids or inputs_embeds"),
    ],
)
def test_what_cannot_be_read_is_told_in_a_sentence(call: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        tiny()(**{key: torch.tensor(value) for key, value in call.items()})


def test_masks_and_configurations_that_cannot_be_honoured_are_refused() -> None:
    model, ids = tiny(), torch.tensor([[5, GMASK, SOP, 8]])
    causal = ~torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    with pytest.raises(ModelError, match="is not that of a context and an answer"):
        model.generate(ids, attention_mask=causal, max_new_tokens=2)
    with pytest.raises(ValueError, match="generation mode"):
        model.generate(ids, max_new_tokens=2, prompt_lookup_num_tokens=2)
    use(model, "flash_attention_3")
    with pytest.raises(ModelError, match="attn_implementation='sdpa'"):
        model(ids, attention_mask=causal)
    with pytest.raises(ModelError, match="position_encoding_2d"):
        tiny(position_encoding_2d=False)
    with pytest.raises(ModelError, match="multiple of 4"):
        tiny(num_attention_heads=16)
