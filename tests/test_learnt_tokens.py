"""Tokens learnt before every row compute as tokens at its start would: packed, cached and padded, in all families."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Literal

import pytest
import torch
from peft import PeftModel, PromptEncoderConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from prefix_models import EOP, a_row, tiny
from tuned_models import FAMILIES, eight_rows, gradients, logits_of, set_up_for, settings_for
from weitiao.errors import ModelError, RecipeError
from weitiao.generate.engine import Sampling, generate
from weitiao.generate.likelihood import log_likelihoods
from weitiao.models.adapters import has_adapter, load_adapter, save_adapter, without_adapter
from weitiao.models.glm.chatglm_positions import positions_of
from weitiao.models.lora_layers import ignoring_peft_warnings
from weitiao.models.prompt_tuning import attach_prompt, prompt_encoder_of
from weitiao.models.ptuning import prefix_encoder_of
from weitiao.recipe import PromptTuning, PTuning, PTuningV1
from weitiao.train.model import TrainedModel
from weitiao.tuning.methods import add_adapter, resume_adapter

TOKENS = [7, 33, 12, 80, 41]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", ["qwen2", "glm", "llama"])
def test_learnt_tokens_compute_as_the_same_tokens_at_the_start_of_the_row(family: str) -> None:
    row = a_row(random.Random(1), family, context=12, answer=3)
    model = tiny(family)
    with torch.no_grad():
        expected = model(torch.tensor([[*TOKENS, *row]])).logits[:, len(TOKENS) :]
        attach_prompt(model, num_virtual_tokens=len(TOKENS))
        encoder = prompt_encoder_of(model)
        assert encoder is not None
        encoder.embedding.weight.copy_(model.get_input_embeddings()(torch.tensor(TOKENS)) / encoder.scale)
        torch.testing.assert_close(model(torch.tensor([row])).logits, expected, rtol=1e-4, atol=1e-4)
        with without_adapter(model):
            assert torch.equal(model(torch.tensor([row])).logits, tiny(family)(torch.tensor([row])).logits)


def test_in_chatglm_learnt_tokens_compute_as_a_context_before_that_of_the_row() -> None:
    plain, model, count = tiny("chatglm"), tiny("chatglm"), len(TOKENS)
    attach_prompt(model, num_virtual_tokens=count, seed=3)
    encoder = prompt_encoder_of(model)
    assert encoder is not None
    for example in eight_rows("chatglm"):
        ids = torch.tensor([example.token_ids])
        positions = positions_of(ids, None, model.config.special_ids)
        before = torch.stack([torch.arange(-count, 0), torch.zeros(count, dtype=torch.long)])[None]
        learnt = torch.arange(count + ids.shape[1]) < count
        context = ~learnt & (torch.cat([before, positions], dim=-1)[0, 1] == 0)
        sees = torch.ones(len(learnt), len(learnt), dtype=torch.bool).tril()
        sees |= learnt[:, None] & learnt | context[:, None] & (learnt | context)
        with torch.no_grad():
            whole = plain.get_decoder()(
                inputs_embeds=torch.cat([encoder()[None], model.get_input_embeddings()(ids)], dim=1),
                position_ids=torch.cat([before, positions], dim=-1),
                attention_mask=~sees[None, None],
            )
            expected = plain.get_output_embeddings()(whole.last_hidden_state[:, count:])
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_cached_and_padded_rows_see_the_learnt_tokens_alike(family: str) -> None:
    draw = random.Random(2)
    model = attach_prompt(tiny(family), num_virtual_tokens=9, seed=3)
    prompts = [a_row(draw, family, context=context, answer=0) for context in (5, 11, 23)]
    found = {
        one.index: one
        for one in generate(model, prompts, stop_ids=[EOP], sampling=Sampling(max_new_tokens=6), max_rows=2)
    }
    answers = []
    for index, prompt in enumerate(prompts):
        row = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                token = int(model(torch.tensor([row])).logits[0, -1].argmax())
            if token == EOP:
                break
            row.append(token)
        answers.append(tuple(row[len(prompt) :]))
        assert found[index].token_ids == answers[index], "each token from a cache as from the whole row"
    likely = log_likelihoods(model, list(zip(prompts, [answer[:3] or (5,) for answer in answers])))
    alone = [log_likelihoods(model, [(prompt, a[:3] or (5,))])[0] for prompt, a in zip(prompts, answers)]
    assert likely == pytest.approx(alone, abs=1e-4)
    whole = logits_of(model, eight_rows(family))
    with torch.no_grad():
        attach = model.generate(torch.tensor([prompts[0]]), max_new_tokens=6, do_sample=False, eos_token_id=EOP)
    assert tuple(attach[0, len(prompts[0]) :].tolist())[: len(answers[0])] == answers[0]
    assert torch.equal(whole, logits_of(model, eight_rows(family)))


@pytest.mark.parametrize("family", ["gemma3", "chatglm"])
def test_gradients_are_those_of_rows_alone_and_of_activations_kept(family: str) -> None:
    rows = eight_rows(family)
    found = []
    for packing, checkpointing in ((True, False), (False, False), (True, True)):
        settings = settings_for("ptuning_v1", checkpointing=checkpointing).model_copy(update={"packing": packing})
        setup = set_up_for(add_adapter(tiny(family), PTuningV1(num_virtual_tokens=5), seed=1), settings)
        found.append(gradients(setup, rows, settings))
        assert isinstance(setup.trained, TrainedModel)
    usual, single, recomputed = found
    assert all(float(gradient.abs().max()) > 0 for gradient in usual.values())
    for key, gradient in usual.items():
        torch.testing.assert_close(single[key], gradient, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(recomputed[key], gradient, rtol=1e-5, atol=1e-8)


def test_tokens_start_from_words_or_numbers_by_the_seed_alone() -> None:
    def start(method: PromptTuning | PTuningV1, seed: int) -> torch.Tensor:
        model = add_adapter(tiny("qwen2"), method, seed=seed)
        encoder = prompt_encoder_of(model)
        assert encoder is not None
        return encoder().detach()

    words = start(PromptTuning(num_virtual_tokens=8), 1)
    vocabulary = tiny("qwen2").get_input_embeddings().weight
    assert all(any(torch.equal(word, token) for token in vocabulary) for word in words)
    torch.manual_seed(99)
    assert torch.equal(start(PromptTuning(num_virtual_tokens=8), 1), words)
    assert not torch.equal(start(PromptTuning(num_virtual_tokens=8), 2), words)
    assert not torch.equal(start(PromptTuning(num_virtual_tokens=8, init="random"), 1), words)
    for method in (PTuningV1(num_virtual_tokens=8), PTuningV1(num_virtual_tokens=8, encoder="mlp", encoder_size=7)):
        assert torch.equal(start(method, 1), start(method, 1))


def test_a_network_adds_to_words_or_stands_alone() -> None:
    vocabulary = tiny("qwen2").get_input_embeddings().weight

    def start(init: Literal["vocabulary", "random"]) -> torch.Tensor:
        """The tokens, with what the network gives made zero."""
        model = add_adapter(tiny("qwen2"), PTuningV1(num_virtual_tokens=8, init=init), seed=1)
        encoder = prompt_encoder_of(model)
        assert encoder is not None
        for parameter in encoder.head[-1].parameters():
            nn.init.zeros_(parameter)
        return encoder().detach()

    assert all(any(torch.equal(word, token) for token in vocabulary) for word in start("vocabulary"))
    assert not start("random").any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_of_words_computes_at_first_as_the_same_words_as_tokens(family: str) -> None:
    rows = eight_rows(family)
    words = add_adapter(tiny(family), PromptTuning(num_virtual_tokens=8), seed=1)
    prefix = add_adapter(tiny(family), PTuning(num_virtual_tokens=8, init="vocabulary", dropout=0), seed=1)
    assert [name for name, p in prefix.named_parameters() if p.requires_grad] == ["prefix_encoder.embedding.weight"]
    torch.testing.assert_close(logits_of(prefix, rows), logits_of(words, rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma3", "glm"])
def test_a_prefix_is_learnt_in_units_of_its_size_and_written_as_it_is(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    with torch.no_grad():  # so that the keys of the second layer are large and its values small
        for name, parameter in model.get_decoder().layers[1].named_parameters():
            if "k_norm" in name or "k_proj" in name:
                parameter.mul_(64)
            if "v_proj" in name:
                parameter.mul_(1 / 64)
    add_adapter(model, PTuning(num_virtual_tokens=8, init="vocabulary", dropout=0), seed=1)
    encoder = prefix_encoder_of(model)
    assert encoder is not None
    (_, _), (large, small), (_, _) = encoder.units.flatten(1).tolist()
    assert large >= 256 * small
    learnt = encoder.embedding.weight.view(8, 3, 2, -1).transpose(0, 2).flatten(2).std(dim=-1)
    assert learnt.min() > 0.7 and learnt.max() < 1.5, "all of it near a spread of 1"
    keys, values = encoder()
    save_adapter(model, tmp_path)
    again = prefix_encoder_of(load_adapter(tiny(family), tmp_path))
    resumed = prefix_encoder_of(resume_adapter(tiny(family), PTuning(num_virtual_tokens=8, dropout=0), tmp_path))
    assert again is not None and resumed is not None
    assert torch.equal(resumed.units, encoder.units)
    assert torch.equal(resumed.embedding.weight, encoder.embedding.weight)
    for one in (again, resumed):
        assert torch.equal(one()[0], keys) and torch.equal(one()[1], values)


def test_models_without_rotary_positions_take_a_prefix_of_words() -> None:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=32, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.tensor([[5, 9, 3]])
    before = model(ids).logits
    tuned = add_adapter(model, PTuning(num_virtual_tokens=4, init="vocabulary"), seed=1).eval()
    assert not torch.allclose(tuned(ids).logits, before)


@pytest.mark.parametrize("kind", ["prompt_tuning", "lstm"])
def test_peft_computes_the_same_with_what_is_saved(kind: str, tmp_path: Path) -> None:
    network = "none" if kind == "prompt_tuning" else "lstm"
    model = attach_prompt(tiny("qwen2"), num_virtual_tokens=6, network=network, seed=3)  # type: ignore[arg-type]
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))["peft_type"] == "PROMPT_TUNING"
    ids = torch.tensor([[5, 9, 33, 12, 40, 8]])
    with ignoring_peft_warnings(), torch.no_grad():
        theirs = PeftModel.from_pretrained(tiny("qwen2"), str(tmp_path)).eval()
        told = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
        torch.testing.assert_close(told, model(ids).logits, rtol=1e-4, atol=1e-4)
        again = load_adapter(tiny("qwen2"), tmp_path)
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_pefts_own_p_tuning_opens(tmp_path: Path) -> None:
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=6, encoder_hidden_size=16)
    ids = torch.tensor([[5, 9, 33, 12, 40, 8]])
    with ignoring_peft_warnings(), torch.no_grad():
        theirs = get_peft_model(tiny("qwen2"), config).eval()
        theirs.save_pretrained(str(tmp_path))
        told = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
        model = load_adapter(tiny("qwen2"), tmp_path)
        assert has_adapter(model)
        torch.testing.assert_close(model(ids).logits, told, rtol=1e-4, atol=1e-4)


def test_tokens_of_another_model_and_broken_folders_are_refused(tmp_path: Path) -> None:
    save_adapter(attach_prompt(tiny("qwen2"), num_virtual_tokens=6), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "num_virtual_tokens": 5}))
    with pytest.raises(ModelError, match=r"of shape \[6, 32\], prompt_embeddings, where 5 tokens of 32 numbers"):
        load_adapter(tiny("qwen2"), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"is incomplete: adapter_model\.safetensors is missing"):
        load_adapter(tiny("qwen2"), tmp_path)
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=32))
    with pytest.raises(ModelError, match="its positions are not rotary"):
        attach_prompt(gpt, num_virtual_tokens=2)


def test_tuning_goes_on_from_tokens_and_only_from_those(tmp_path: Path) -> None:
    ids = torch.tensor([[5, 9, 33, 12, 40, 8]])
    model = attach_prompt(tiny("qwen2"), num_virtual_tokens=6, network="mlp", seed=3)
    save_adapter(model, tmp_path)
    resumed = resume_adapter(tiny("qwen2"), PromptTuning(num_virtual_tokens=6), tmp_path)
    assert [name for name, p in resumed.named_parameters() if p.requires_grad] == ["prefix_encoder.embedding.weight"]
    torch.testing.assert_close(resumed(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    for method, told in (
        (PromptTuning(num_virtual_tokens=7), "its num_virtual_tokens is 6, but method.num_virtual_tokens is 7"),
        (PTuningV1(num_virtual_tokens=6), "method.name is to be prompt_tuning"),
        (PTuning(num_virtual_tokens=6), "no P-Tuning prefix"),
    ):
        with pytest.raises(RecipeError, match=told):
            resume_adapter(tiny("qwen2"), method, tmp_path)
    with pytest.raises(RecipeError, match="a fresh one would take the place of"):
        add_adapter(resumed, PTuning(num_virtual_tokens=3), seed=1)  # type: ignore[arg-type]
    assert prefix_encoder_of(resumed) is None
