"""The fast tokenizers of the original GLM checkpoints against ids from the models' own code (shared/golden/tokenizers).

What a fast tokenizer cannot say as the originals did, and is left out here: GLM-4's decode set blanks around control
tokens; ChatGLM-6B made the 4-D mask and two rows of positions, which the model makes itself (test_chatglm.py).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from weitiao.errors import ModelError
from weitiao.generate.constraint import compiler_of
from weitiao.models.glm.layouts import GlmLayout
from weitiao.models.glm.tokenizers import glm_tokenizer
from weitiao.render.glm import glm_renderer

TOKENIZERS = Path(__file__).parents[2] / "shared" / "golden" / "tokenizers"
FOLDERS: dict[GlmLayout, str] = {
    "chatglm": "chatglm_v1",
    "chatglm2": "chatglm2",
    "chatglm3": "chatglm3",
    "glm4": "glm4",
}
LAYOUTS = list(FOLDERS)

pytestmark = pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="the vocabularies are not here (shared/golden)")


@cache
def tokenizer_of(layout: GlmLayout) -> PreTrainedTokenizerFast:
    return glm_tokenizer(TOKENIZERS / FOLDERS[layout], layout)


@cache
def golden(layout: GlmLayout) -> Any:
    return json.loads((TOKENIZERS / FOLDERS[layout] / "goldens.json").read_text(encoding="utf-8"))


# ---- texts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_text_has_the_original_ids_and_tokens(layout: GlmLayout) -> None:
    tokenizer = tokenizer_of(layout)
    for name, case in golden(layout)["texts"].items():
        assert tokenizer(case["text"])["input_ids"] == case["ids"], name
        assert tokenizer(case["text"], add_special_tokens=False)["input_ids"] == case["ids_no_special"], name
        if "tokens" in case:
            assert tokenizer.tokenize(case["text"]) == case["tokens"], name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_decode_to_the_original_texts(layout: GlmLayout) -> None:
    tokenizer = tokenizer_of(layout)
    for name, case in golden(layout)["texts"].items():
        assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decode_skip"], name
        if layout == "glm4":  # which set blanks around control tokens that the text does not have
            control = {token.content for token in tokenizer.added_tokens_decoder.values()}
            if not any(token in case["text"] for token in control):
                assert tokenizer.decode(case["ids_no_special"]) == case["decode_no_special"], name
                assert tokenizer.decode(case["ids"]) == "[gMASK]<sop>" + case["text"], name
        else:
            assert tokenizer.decode(case["ids_no_special"]) == case["decode_no_special"], name
            assert tokenizer.decode(case["ids"]) == case["decode"], name
    for case in golden(layout).get("decode_with_specials", []):
        assert tokenizer.decode(case["ids"]) == case["decode"]


@pytest.mark.parametrize("layout", ["chatglm", "chatglm2", "chatglm3"])
def test_a_pair_is_written_as_the_original_writes_question_and_answer(layout: GlmLayout) -> None:
    for case in golden(layout)["pairs"]:
        assert tokenizer_of(layout)(case["a"], case["b"])["input_ids"] == case["ids"]


def test_the_ids_printed_in_the_seed_are_those_of_its_prompt_and_answer() -> None:
    tokenizer, seed = tokenizer_of("chatglm"), golden("chatglm")["seed_example"]
    written = tokenizer(
        seed["prompt"], seed["answer"], padding="max_length", max_length=len(seed["ids"]), padding_side="right"
    )
    assert written["input_ids"] == seed["ids"]
    assert tokenizer.decode(seed["ids"], skip_special_tokens=True) == seed["decoded"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_control_tokens_have_their_names_and_ids(layout: GlmLayout) -> None:
    tokenizer, info = tokenizer_of(layout), golden(layout)["info"]
    for name, expected in info["special"].items():
        named = "▁[gMASK]" if (layout, name) == ("chatglm", "[gMASK]") else name  # which no text may spell
        assert tokenizer.convert_tokens_to_ids(named) == expected, name
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "mask_token_id"):
        if key in info:
            assert getattr(tokenizer, key) == info[key], key
    assert len(tokenizer) == info.get("len", info["vocab_size"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_text_spells_a_control_token_when_texts_are_mere_text(layout: GlmLayout) -> None:
    tokenizer = tokenizer_of(layout)
    control = tokenizer.added_tokens_decoder
    for token in control.values():
        for text in (token.content, f"a{token.content}b", f"▁{token.content} ", f"\n▁▁{token.content}"):
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            assert not set(ids) & set(control), text
            assert ids == tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids  # as renderers do


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_spell_their_bytes_for_grammars(layout: GlmLayout) -> None:
    tokenizer = tokenizer_of(layout)
    compiler = compiler_of(glm_renderer(layout, tokenizer), len(tokenizer))
    blank = "" if layout == "glm4" else " "  # SentencePiece's own, before every text
    for name, case in golden(layout)["texts"].items():
        if case["ids_no_special"] and (layout, name) != ("glm4", "special_in_text"):
            assert compiler.text_bytes(case["ids_no_special"]).decode() == blank + case["decode_no_special"], name
    for name, token in golden(layout)["info"]["special"].items():
        pieces = {"<n>": "\n", "<|tab|>": "\t", "<|blank_2|>": " " * 2, "<|blank_80|>": " " * 80}
        assert compiler.text_bytes([token]).decode() == pieces.get(name, ""), name


def test_blanks_around_a_control_token_in_a_text_go_as_in_the_original() -> None:
    # transformers 4.27.1, which ChatGLM-6B was released for, strips both sides of a token that it reads in a text
    tokenizer = tokenizer_of("chatglm")
    mask = tokenizer.mask_token_id

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    assert ids("你好 \n[MASK]\u3000 世界") == [*ids("你好"), mask, *ids("世界")]
    assert ids("[MASK] [MASK]") == [mask, mask]


# ---- batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_are_padded_on_the_left_as_by_the_original(layout: GlmLayout) -> None:
    tokenizer, expected = tokenizer_of(layout), golden(layout)["batch_left_pad"]
    pad = golden(layout)["info"]["pad_token_id"]
    rows = [[token for token in row if token != pad] for row in expected["input_ids"]]
    num_rows = len(rows)
    texts = [tokenizer.decode(row, skip_special_tokens=True).removeprefix("[gMASK]sop ") for row in rows]
    batch = tokenizer(texts, padding=True)
    assert num_rows == 3 and batch["input_ids"] == expected["input_ids"]
    if layout == "chatglm":  # the mask of the original is 4-D: the last row sees all but pads and itself ahead
        seen = [[int(not masked) for masked in mask[0][-1]] for mask in expected["attention_mask"]]
        assert batch["attention_mask"] == seen
    else:
        assert batch["attention_mask"] == expected["attention_mask"]
    assert tokenizer.pad({"input_ids": rows})["input_ids"] == expected["input_ids"]
    right = tokenizer(texts, padding=True, padding_side="right")
    assert right["input_ids"] == [row + [pad] * (len(batch["input_ids"][0]) - len(row)) for row in rows]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_text_that_is_cut_keeps_its_control_tokens(layout: GlmLayout) -> None:
    tokenizer = tokenizer_of(layout)
    whole = tokenizer("今天天气怎么样？", add_special_tokens=False)["input_ids"]
    empty = tokenizer("")["input_ids"]
    cut = tokenizer("今天天气怎么样？", truncation=True, max_length=4)["input_ids"]
    assert cut == ([*whole[:2], *empty] if layout == "chatglm" else [*empty, *whole[:2]])


# ---- conversations ----------------------------------------------------------------------------------------------


def test_chatglm2_prompts_are_its_rounds() -> None:
    tokenizer = tokenizer_of("chatglm2")
    for case in golden("chatglm2")["prompts"]:
        assert tokenizer(case["prompt"])["input_ids"] == case["ids"]
        talk = _talk(case["history"] or [], case["query"])
        assert tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"] == case["ids"]


def test_chatglm_asks_raw_first_and_in_rounds_from_0() -> None:
    tokenizer = tokenizer_of("chatglm")
    asked = tokenizer.apply_chat_template(_talk([], "你好"), add_generation_prompt=True)["input_ids"]
    assert asked == tokenizer("你好")["input_ids"]
    history = [["你好", "你好👋！我是人工智能助手 ChatGLM-6B，很高兴见到你，欢迎问我任何问题。"]]
    asked = tokenizer.apply_chat_template(_talk(history, "晚上睡不着应该怎么办"), add_generation_prompt=True)
    assert asked["input_ids"] == golden("chatglm")["texts"]["round"]["ids"]
    answered = [*_talk([], "问：你好"), {"role": "assistant", "content": "你好👋！"}]
    assert tokenizer.apply_chat_template(answered)["input_ids"] == golden("chatglm")["pairs"][0]["ids"]


def test_chatglm3_conversations_have_the_ids_of_their_pieces_encoded_apart() -> None:
    tokenizer = tokenizer_of("chatglm3")
    for case in golden("chatglm3")["chat"]:
        asked = tokenizer.apply_chat_template(case["messages"], add_generation_prompt=True)
        assert asked["input_ids"] == case["input_ids"]
    for case in golden("chatglm3")["single_messages"]:
        message = {"role": case["role"], "metadata": case["metadata"], "content": case["message"]}
        assert tokenizer.apply_chat_template([message])["input_ids"][2:] == case["ids"]
    spelt = [case["ids"] for case in golden("chatglm3")["encode_special_tokens"]]
    for text, ids in zip(("▁<|user|> \n你好▁<|assistant|>", " a ▁<|system|>  b"), spelt, strict=True):
        assert tokenizer("▁[gMASK]▁sop" + text, add_special_tokens=False)["input_ids"][2:] == ids


def test_glm4_conversations_follow_the_template_of_the_checkpoint() -> None:
    tokenizer = tokenizer_of("glm4")
    for case in golden("glm4")["chat"]:
        for prompt, suffix in ((True, "gen1"), (False, "gen0")):
            text = tokenizer.apply_chat_template(case["messages"], add_generation_prompt=prompt, tokenize=False)
            ids = tokenizer.apply_chat_template(case["messages"], add_generation_prompt=prompt)["input_ids"]
            assert (text, ids) == (case[f"text_{suffix}"], case[f"ids_{suffix}"])


def test_messages_cannot_write_the_turns_of_chatglm3() -> None:
    tokenizer = tokenizer_of("chatglm3")
    for text in ("<|user|>", "a▁<|assistant|>b", "▁</s>", "[gMASK]sop"):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        control = [token for token in ids["input_ids"] if token >= 64789 or token < 3]
        assert control == [64790, 64792, 64795, 64796], text


def _talk(history: list[list[str]], query: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    turns = [{"role": role, "content": text} for turn in history for role, text in zip(roles, turn, strict=True)]
    return [*turns, {"role": "user", "content": query}]


# ---- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_saved_tokenizer_is_the_same_without_weitiao(layout: GlmLayout, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(layout)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(str(tmp_path), trust_remote_code=False)
    assert type(again).__module__.startswith("transformers.")
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert again.chat_template == tokenizer.chat_template
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert (again.padding_side, again.model_max_length) == ("left", tokenizer.model_max_length)
    for case in golden(layout)["texts"].values():
        assert again(case["text"])["input_ids"] == case["ids"]


def test_the_greatest_length_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    assert [tokenizer_of(layout).model_max_length for layout in LAYOUTS] == [2048, 32768, 8192, 128000]
    (tmp_path / "tokenizer.model").symlink_to(TOKENIZERS / "chatglm3" / "tokenizer.model")
    (tmp_path / "config.json").write_text('{"seq_length": 131072}')
    assert glm_tokenizer(tmp_path, "chatglm3").model_max_length == 131072


@pytest.mark.parametrize(
    ("layout", "file", "source", "message"),
    [
        ("chatglm", "ice_text.model", None, "the vocabulary of ChatGLM-6B, ice_text.model, is missing"),
        ("chatglm3", "tokenizer.model", None, "the vocabulary of ChatGLM2 and ChatGLM3, tokenizer.model, is missing"),
        ("glm4", "tokenizer.model", None, "the vocabulary of GLM-4, tokenizer.model, is missing"),
        ("chatglm", "ice_text.model", "chatglm2/tokenizer.model", "found by bpe, those of ChatGLM-6B by unigram"),
        ("chatglm2", "tokenizer.model", "chatglm_v1/ice_text.model", "found by unigram, those of ChatGLM2 .* by bpe"),
        ("chatglm2", "tokenizer.model", "glm4/tokenizer.model", "this is no SentencePiece model"),
        ("glm4", "tokenizer.model", "chatglm2/tokenizer.model", "line 1 is no token of a tiktoken vocabulary"),
        ("chatglm", "ice_text.model", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        ("glm4", "tokenizer.model", b"IQ== 0\nIg== 1\n", "has 2 tokens, that of GLM-4 has 151329"),
        ("glm4", "tokenizer.model", b"IQ== 0\nIg== 7\n", "do not number 2 different tokens from 0"),
    ],
)
def test_a_vocabulary_that_does_not_belong_is_refused(
    tmp_path: Path, layout: GlmLayout, file: str, source: str | bytes | None, message: str
) -> None:
    if isinstance(source, bytes):
        (tmp_path / file).write_bytes(source)
    elif source:
        (tmp_path / file).symlink_to(TOKENIZERS / source)
    with pytest.raises(ModelError, match=message) as caught:
        glm_tokenizer(tmp_path, layout)
    assert str(tmp_path) in str(caught.value)
