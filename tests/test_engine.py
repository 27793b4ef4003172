"""The engine's batches against one-row `model.generate`, on tiny random models in fp32."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from weitiao.errors import DataError, ModelError
from weitiao.generate.engine import Generation, Sampling, generate

VOCABULARY = 61
SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    # Wide enough that the greedy answers of a random model differ from each other and visit many tokens.
    "initializer_range": 0.6,
}


def tiny_model(family: str) -> PreTrainedModel:
    torch.manual_seed(3)
    model: PreTrainedModel
    if family == "gemma3":
        layers = ["sliding_attention", "full_attention"]
        config = Gemma3TextConfig(**SHARED, head_dim=16, sliding_window=7, layer_types=layers)
        model = Gemma3ForCausalLM(config)
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SHARED))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHARED))
    return model.float().eval()


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["gemma3", "qwen2", "llama"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama")


def random_prompts(count: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def one_row(model: PreTrainedModel, prompt: list[int], stop_ids: list[int], max_new_tokens: int) -> list[int]:
    """The reference: transformers' own greedy answer, stop token cut off."""
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids or None,
        pad_token_id=0,
    )
    answer = output[0, len(prompt) :].tolist()
    return answer[:-1] if answer[-1] in stop_ids else answer


def in_order(generations: Iterator[Generation]) -> list[Generation]:
    return sorted(generations, key=lambda generation: generation.index)


def test_greedy_batches_with_refill_equal_one_row_at_a_time(model: PreTrainedModel) -> None:
    prompts, stop_ids = random_prompts(16), [5, 9, 17]
    expected = [one_row(model, prompt, stop_ids, 24) for prompt in prompts]
    assert {len(answer) for answer in expected} > {24}, "some rows must stop early and some not"
    sampling = Sampling(max_new_tokens=24)
    for max_rows, exact in ((1, False), (3, False), (8, True), (64, False), (64, True)):
        rows = generate(model, prompts, stop_ids=stop_ids, sampling=sampling, max_rows=max_rows, exact=exact)
        found = in_order(rows)
        assert [generation.index for generation in found] == list(range(16))
        assert [list(generation.token_ids) for generation in found] == expected


def test_exact_steps_give_the_model_its_attention_back(llama: PreTrainedModel) -> None:
    for _ in generate(llama, random_prompts(3), stop_ids=[], sampling=Sampling(max_new_tokens=3), exact=True):
        assert llama.config._attn_implementation == "sdpa"
    llama.set_attn_implementation("eager")
    with pytest.raises(ModelError, match="with eager"):
        generate(llama, [[3]], stop_ids=[], sampling=Sampling(), exact=True)


@pytest.mark.parametrize("seed", range(4))
def test_any_lengths_and_limits_give_the_same_answers(seed: int) -> None:
    model, draw = tiny_model("gemma3"), random.Random(seed)
    prompts = random_prompts(draw.randint(1, 12), longest=draw.choice([2, 20, 60]), seed=seed)
    stop_ids = draw.sample(range(VOCABULARY), 4)
    sampling = Sampling(max_new_tokens=draw.randint(1, 80))
    expected = [one_row(model, prompt, stop_ids, sampling.max_new_tokens) for prompt in prompts]
    for max_cache_tokens in (1, 300, 65536):
        rows = generate(
            model, prompts, stop_ids=stop_ids, sampling=sampling, max_rows=3, max_cache_tokens=max_cache_tokens
        )
        assert [list(generation.token_ids) for generation in in_order(rows)] == expected


def test_prompts_longer_than_one_prefill_are_split(monkeypatch: pytest.MonkeyPatch, llama: PreTrainedModel) -> None:
    prompts = random_prompts(12)
    together = in_order(generate(llama, prompts, stop_ids=[5], sampling=Sampling(max_new_tokens=6)))
    monkeypatch.setattr("weitiao.generate.engine._PREFILL_TOKENS", 50)
    apart = in_order(generate(llama, prompts, stop_ids=[5], sampling=Sampling(max_new_tokens=6)))
    assert [g.token_ids for g in apart] == [g.token_ids for g in together]


def test_finish_tells_a_stop_from_the_length_limit(llama: PreTrainedModel) -> None:
    [prompt] = random_prompts(1)
    answer = one_row(llama, prompt, [], 12)
    stop = answer[-1]
    first = answer.index(stop)
    [stopped] = generate(llama, [prompt], stop_ids=[stop], sampling=Sampling(max_new_tokens=12))
    assert (stopped.finish, list(stopped.token_ids)) == ("stop", answer[:first])
    [cut] = generate(llama, [prompt], stop_ids=[], sampling=Sampling(max_new_tokens=12))
    assert (cut.finish, list(cut.token_ids)) == ("length", answer)
    [at_once] = generate(llama, [prompt], stop_ids=[answer[0]], sampling=Sampling(max_new_tokens=1))
    assert (at_once.finish, at_once.token_ids) == ("stop", ())


def test_logprob_is_that_of_the_whole_text_stop_token_included(model: PreTrainedModel) -> None:
    prompts = random_prompts(7)
    sampling = Sampling(max_new_tokens=15, temperature=1.3, top_k=20)
    for generation in generate(model, prompts, stop_ids=[5, 9, 17, 20], sampling=sampling, max_rows=3):
        prompt, answer = prompts[generation.index], list(generation.token_ids)
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 :].log_softmax(-1)
        chosen = sum(float(logprobs[place, token]) for place, token in enumerate(answer))
        if generation.finish == "length":
            assert generation.logprob == pytest.approx(chosen, abs=1e-3)
        else:
            ways = [chosen + float(logprobs[len(answer), stop]) for stop in (5, 9, 17, 20)]
            assert min(abs(generation.logprob - way) for way in ways) < 1e-3


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=20, temperature=1.0, seed=4),
        Sampling(max_new_tokens=20, temperature=1.5, top_p=0.8),
        Sampling(max_new_tokens=20, temperature=0.7, top_k=5, top_p=0.9),
    ],
)
def test_drawn_answers_repeat_and_do_not_depend_on_the_batch(model: PreTrainedModel, sampling: Sampling) -> None:
    prompts = random_prompts(14)
    answers = [
        [g.token_ids for g in in_order(generate(model, prompts, stop_ids=[5], sampling=sampling, max_rows=rows))]
        for rows in (1, 3, 16, 16)
    ]
    assert answers[0] == answers[1] == answers[2] == answers[3]
    alone = in_order(generate(model, prompts[:1], stop_ids=[5], sampling=sampling))
    assert alone[0].token_ids == answers[0][0]


def test_same_prompt_twice_is_drawn_twice(llama: PreTrainedModel) -> None:
    prompts = random_prompts(1) * 6
    for seed in (0, 1):
        drawn = in_order(
            generate(llama, prompts, stop_ids=[], sampling=Sampling(max_new_tokens=9, temperature=2.0, seed=seed))
        )
        assert len({g.token_ids for g in drawn}) == 6


def test_draws_follow_the_distribution_left_by_top_k_and_top_p(monkeypatch: pytest.MonkeyPatch) -> None:
    from weitiao.generate.sampling import _draw

    logits = torch.tensor([0.2, 0.5, 0.3]).log()
    points = [i / 1000 for i in range(1000)]

    def shares(**options: float) -> list[float]:
        drawn = [_draw(logits, Sampling(temperature=1.0, **options), point) for point in points]  # type: ignore[arg-type]
        return [drawn.count(token) / 1000 for token in range(3)]

    for num_best in (1, 2, 1024):  # the shortcut over the best tokens changes nothing
        monkeypatch.setattr("weitiao.generate.sampling._NUCLEUS_TOKENS", num_best)
        assert shares() == pytest.approx([0.2, 0.5, 0.3], abs=0.002)
        assert shares(top_p=0.7) == pytest.approx([0, 0.625, 0.375], abs=0.002)
        assert shares(top_p=0.1) == [0, 1, 0]
        assert shares(top_k=2) == pytest.approx([0, 0.625, 0.375], abs=0.002)
        assert shares(top_k=2, top_p=0.6) == [0, 1, 0]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21 asks for it
def test_lora_adapter_is_used(llama: PreTrainedModel) -> None:
    adapted = get_peft_model(llama, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    prompts = random_prompts(6)
    found = [
        in_order(
            generate(adapted, prompts, stop_ids=[5], sampling=Sampling(max_new_tokens=10), max_rows=4, exact=exact)
        )
        for exact in (False, True)
    ]
    expected = [one_row(adapted, prompt, [5], 10) for prompt in prompts]
    assert all([list(g.token_ids) for g in rows] == expected for rows in found)


def test_closing_early_leaves_nothing_behind(llama: PreTrainedModel) -> None:
    generations = generate(llama, random_prompts(9), stop_ids=[5], sampling=Sampling(max_new_tokens=9), max_rows=2)
    next(generations)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    generations.close()  # type: ignore[attr-defined]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert len(list(generate(llama, random_prompts(2), stop_ids=[], sampling=Sampling(max_new_tokens=2)))) == 2


def test_no_prompts_give_nothing(llama: PreTrainedModel) -> None:
    assert list(generate(llama, [], stop_ids=[5], sampling=Sampling())) == []


def test_prompts_that_do_not_fit_are_all_named_before_anything_runs(llama: PreTrainedModel) -> None:
    prompts = [[3] * 10, [3] * 150, [], [3] * 149]
    with pytest.raises(DataError) as caught:
        generate(llama, prompts, stop_ids=[5], sampling=Sampling(max_new_tokens=12))
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert "prompt 1: tokens: 150 tokens + 12 new ones = 162 positions of 160." in text
    assert "prompt 2" in text and "prompt 3" in text and "prompt 0" not in text


def test_a_row_may_fill_the_last_position(llama: PreTrainedModel) -> None:
    [generation] = generate(llama, [[3] * 100], stop_ids=[], sampling=Sampling(max_new_tokens=60))
    assert len(generation.token_ids) == 60


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_models_that_cannot_be_run_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="training mode"):
        generate(llama.train(), [[3]], stop_ids=[5], sampling=Sampling())
    prompt_tuned = get_peft_model(llama, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    with pytest.raises(ModelError, match="virtual tokens"):
        generate(prompt_tuned, [[3]], stop_ids=[5], sampling=Sampling())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -1}, "top_k is -1"),
    ],
)
def test_impossible_sampling_is_refused_in_a_sentence(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampling(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"max_rows": 0}, {"max_cache_tokens": 0}])
def test_impossible_batches_are_refused(llama: PreTrainedModel, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        generate(llama, [[3]], stop_ids=[5], sampling=Sampling(), **options)


@pytest.mark.parametrize("limits", [[], [0], [2, 2]])
def test_impossible_limits_are_refused(llama: PreTrainedModel, limits: list[int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        generate(llama, [[3]], stop_ids=[5], sampling=Sampling(), limits=limits)


def test_limits_cut_each_row_at_its_own(llama: PreTrainedModel) -> None:
    prompts, limits = random_prompts(5), [1, 9, 4, 30, 2]
    sampling = Sampling(max_new_tokens=12)
    found = in_order(generate(llama, prompts, stop_ids=[], sampling=sampling, limits=limits, max_rows=2))
    assert [len(g.token_ids) for g in found] == [1, 9, 4, 12, 2]
