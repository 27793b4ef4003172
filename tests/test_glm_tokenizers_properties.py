"""The fast tokenizers of the GLM family against SentencePiece and tiktoken themselves, on random Unicode.

Small vocabularies are trained here. The real ones are used where they are (shared/golden); `make slow` runs 100,000
texts on them, and every code point that there is.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from conftest import CORPUS
from random_texts import random_texts
from weitiao.errors import ModelError
from weitiao.models.glm.charsmap import normalizer_steps, read_rules
from weitiao.models.glm.sentencepiece_file import PieceType, read_sentencepiece
from weitiao.models.glm.tiktoken_file import as_byte_level, read_tiktoken
from weitiao.models.glm.tokenizers import chatglm2_tokenizer, chatglm_tokenizer, glm_tokenizer

TOKENIZERS = Path(__file__).parents[2] / "shared" / "golden" / "tokenizers"
GLM4_PATTERN = (  # of GLM-4's own tokenization code
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ASCII = " ".join(map(chr, range(33, 127)))
BLANKS = [f"<|blank_{k}|>" for k in range(2, 81)]
TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)

needs_vocabularies = pytest.mark.skipif(
    not TOKENIZERS.is_dir(), reason="the vocabularies are not here (shared/golden/tokenizers)"
)


def trained(path: Path, kind: str) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model of some hundred pieces with the control tokens of ChatGLM-6B or of ChatGLM2, at `path`."""
    file = io.BytesIO()
    chatglm = kind == "unigram"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*CORPUS, ASCII, "aaaa == ---- .... ！！ 哈哈哈哈哈 a  b   c"] * 20),
        model_writer=file,
        vocab_size=800,
        hard_vocab_limit=not chatglm,
        model_type=kind,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc" if chatglm else "identity",
        remove_extra_whitespaces=chatglm,
        split_digits=True,
        allow_whitespace_only_pieces=not chatglm,
        user_defined_symbols=["<n>", "<|tab|>", *BLANKS] if chatglm else [],
        control_symbols=["<pad>", "[MASK]", "[gMASK]", "<sop>", "<eop>"] if chatglm else [],
        minloglevel=2,
    )
    path.write_bytes(file.getvalue())
    return sentencepiece.SentencePieceProcessor(str(path))


def as_text(tokenizer: PreTrainedTokenizerFast) -> Callable[[Sequence[str]], list[list[int]]]:
    """Ids of texts, none of which spells a control token."""
    return lambda texts: tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def chatglm_text(text: str) -> str:
    """What ChatGLM-6B's tokenizer gives SentencePiece instead of `text`."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    return re.sub(" {2,80}", lambda run: f"<|blank_{len(run[0])}|>", text)


def assert_equal_but_for_ties(
    texts: Sequence[str], found: Sequence[Sequence[int]], model: sentencepiece.SentencePieceProcessor, *, ties: int
) -> None:
    """Nothing but a choice between equally good ways to cut a text may differ, and that in at most `ties` texts.

    SentencePiece adds scores in float32, whose rounding depends on all that stands before; here they are exact.
    """
    num_ties = 0
    for text, ids in zip(texts, found, strict=True):
        expected = model.encode(chatglm_text(text))
        if list(ids) == expected:
            continue
        num_ties += 1
        ours, theirs = sum(map(model.get_score, ids)), sum(map(model.get_score, expected))
        assert model.decode(list(ids)) == model.decode(expected), ascii(text)
        assert abs(ours - theirs) < 1e-6 * max(1, abs(theirs)), f"{text!a}: {ours} for {theirs}"
    assert num_ties <= ties, f"{num_ties} of {len(texts)} texts were cut in another, equally good way"


# ---- made vocabularies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_sentencepiece_file_is_read_as_sentencepiece_reads_it(tmp_path: Path, kind: str) -> None:
    model = trained(tmp_path / "a.model", kind)
    found = read_sentencepiece(tmp_path / "a.model")
    assert (found.algorithm, found.byte_fallback, found.add_dummy_prefix) == (kind, True, True)
    assert found.remove_extra_whitespaces == (kind == "unigram") == bool(found.charsmap)
    assert len(found.pieces) == model.get_piece_size()
    for i, piece in enumerate(found.pieces):
        assert (piece.text, piece.score) == (model.id_to_piece(i), model.get_score(i))
        assert (piece.type is PieceType.CONTROL, piece.type is PieceType.BYTE) == (
            model.is_control(i),
            model.is_byte(i),
        )
    content = (tmp_path / "a.model").read_bytes()
    for broken in (content[:1000], b"", b"\x00" * 64, b"{}", content[: len(content) // 2]):
        (tmp_path / "b.model").write_bytes(broken)
        with pytest.raises(ModelError, match=r"b\.model: this is no SentencePiece model"):
            read_sentencepiece(tmp_path / "b.model")


def test_made_unigram_vocabulary_gives_the_ids_of_sentencepiece(tmp_path: Path) -> None:
    model = trained(tmp_path / "ice_text.model", "unigram")
    vocabulary = read_sentencepiece(tmp_path / "ice_text.model")
    with pytest.raises(ModelError, match="The rules by which this vocabulary normalises texts cannot be used"):
        chatglm_tokenizer(replace(vocabulary, charsmap=vocabulary.charsmap[:100]), max_length=2048)
    encode = as_text(chatglm_tokenizer(vocabulary, max_length=2048))
    texts = list(random_texts(3000, seed=1, runs=False))
    assert_equal_but_for_ties(texts, encode(texts), model, ties=30)

    @settings(max_examples=200, deadline=None)
    @given(TEXTS)
    def any_text(text: str) -> None:
        assert_equal_but_for_ties([text], encode([text]), model, ties=1)

    any_text()


def test_made_bpe_vocabulary_gives_the_ids_of_sentencepiece(tmp_path: Path) -> None:
    model = trained(tmp_path / "tokenizer.model", "bpe")
    vocabulary = read_sentencepiece(tmp_path / "tokenizer.model")
    encode = as_text(chatglm2_tokenizer(vocabulary, roles=True, max_length=8192))
    texts = list(random_texts(3000, seed=2))
    for text, ids in zip(texts, encode(texts), strict=True):
        assert ids == model.encode(text), ascii(text)

    @settings(max_examples=200, deadline=None)
    @given(TEXTS)
    def any_text(text: str) -> None:
        assert encode([text])[0] == model.encode(text)

    any_text()


def test_made_ranks_give_the_ids_of_tiktoken(tmp_path: Path) -> None:
    words = sorted({word.encode() for text in CORPUS for word in re.findall(r"\w+|\W", text)})
    parts = {word[:end] for word in words for end in range(2, len(word) + 1)}
    tokens = [*(bytes([byte]) for byte in range(256)), *sorted(parts, key=lambda part: (len(part), part))]
    lines = [b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines))
    ranks = read_tiktoken(tmp_path / "tokenizer.model")
    assert ranks == {token: rank for rank, token in enumerate(tokens)}
    vocabulary, merges = as_byte_level(ranks)
    assert sorted(vocabulary.values()) == list(range(len(tokens)))
    assert len(merges) >= len(parts) and len(set(merges)) == len(merges)


def test_normalised_texts_are_those_of_sentencepiece(tmp_path: Path) -> None:
    model = trained(tmp_path / "a.model", "unigram")
    rules = read_sentencepiece(tmp_path / "a.model").charsmap
    read = read_rules(rules)
    assert (read["\uff21"], read["か\u3099"], read["\x07"], read["\u200b"]) == ("A", "\u304c", "", " ")
    steps = normalizers.Sequence(normalizer_steps(rules, kept=["<n>"]))
    for text in random_texts(3000, seed=3):
        # SentencePiece's own words, without what it does to blanks
        expected = model.normalize(f"<n>{text}<n>").removeprefix("▁<n>").removesuffix("<n>").replace("▁", " ")
        found = steps.normalize_str(f"<n>{text}<n>").removeprefix("<n>").removesuffix("<n>")
        assert re.sub(" +", " ", found) == expected, ascii(text)
    with pytest.raises(ValueError, match="another length than it says"):
        normalizer_steps(rules[:1000])


# ---- the real ones ----------------------------------------------------------------------------------------------


@cache
def real(layout: str) -> tuple[PreTrainedTokenizerFast, Callable[[str], list[int]]]:
    """A real tokenizer, and what gives the original's ids of a text."""
    if layout == "glm4":
        ranks = {}
        for line in (TOKENIZERS / "glm4" / "tokenizer.model").read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
        original = tiktoken.Encoding("glm4", pat_str=GLM4_PATTERN, mergeable_ranks=ranks, special_tokens={})
        return glm_tokenizer(TOKENIZERS / "glm4", "glm4"), original.encode_ordinary
    model = sentencepiece.SentencePieceProcessor(str(TOKENIZERS / "chatglm2" / "tokenizer.model"))
    return glm_tokenizer(TOKENIZERS / "chatglm3", "chatglm3"), model.encode


@cache
def real_chatglm() -> tuple[PreTrainedTokenizerFast, sentencepiece.SentencePieceProcessor]:
    folder = TOKENIZERS / "chatglm_v1"
    return glm_tokenizer(folder, "chatglm"), sentencepiece.SentencePieceProcessor(str(folder / "ice_text.model"))


@needs_vocabularies
@pytest.mark.parametrize("layout", ["chatglm3", "glm4"])
@pytest.mark.parametrize("count", [2500, pytest.param(100_000, marks=pytest.mark.slow)])
def test_random_texts_have_the_ids_of_the_original_library(layout: str, count: int) -> None:
    tokenizer, original = real(layout)
    texts = list(random_texts(count, seed=4))
    for text, ids in zip(texts, as_text(tokenizer)(texts), strict=True):
        assert ids == original(text), ascii(text)


@needs_vocabularies
@pytest.mark.parametrize("count", [2500, pytest.param(100_000, marks=pytest.mark.slow)])
def test_random_texts_have_the_ids_of_sentencepiece_with_chatglm(count: int) -> None:
    tokenizer, model = real_chatglm()
    texts = list(random_texts(count, seed=5))
    assert_equal_but_for_ties(texts, as_text(tokenizer)(texts), model, ties=count // 100)


@needs_vocabularies
def test_chatglm3_reads_a_conversation_as_its_pieces_encoded_apart() -> None:
    tokenizer, original = real("chatglm3")
    texts = list(random_texts(600, seed=6))
    for metadata, content in zip(texts[::2], texts[1::2], strict=True):
        message = {"role": "assistant", "metadata": metadata, "content": content}
        found = tokenizer.apply_chat_template([message])["input_ids"]
        assert found == [64790, 64792, 64796, *original(f"{metadata}\n"), *original(content)], ascii(content)


@needs_vocabularies
@pytest.mark.parametrize("layout", ["chatglm3", "glm4"])
def test_decoded_texts_are_those_that_were_encoded(layout: str) -> None:
    tokenizer, _ = real(layout)
    texts = [text.replace("▁", " ") for text in random_texts(1000, seed=8)]
    for text, ids in zip(texts, as_text(tokenizer)(texts), strict=True):
        assert tokenizer.decode(ids) == text


@needs_vocabularies
def test_chatglm_decodes_as_sentencepiece() -> None:
    tokenizer, model = real_chatglm()
    texts = list(random_texts(1000, seed=9))
    for text, ids in zip(texts, as_text(tokenizer)(texts), strict=True):
        expected = model.decode(ids).replace("<n>", "\n").replace("<|tab|>", "\t")
        expected = re.sub(r"<\|blank_([2-9]|[1-7]\d|80)\|>", lambda piece: " " * int(piece[1]), expected)
        assert tokenizer.decode(ids) == expected, ascii(text)


@pytest.mark.slow
@needs_vocabularies
@pytest.mark.parametrize("layout", ["chatglm", "chatglm3", "glm4"])
def test_every_code_point_has_the_original_ids(layout: str) -> None:
    points = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000 and code != 0x20]
    tokenizer, model = real_chatglm() if layout == "chatglm" else real(layout)
    encode = as_text(tokenizer)
    for start in range(0, len(points), 20_000):
        texts = [f"a{point}b {point}1{point}\u0301 c{point}{point}" for point in points[start : start + 20_000]]
        for text, ids in zip(texts, encode(texts), strict=True):
            expected = model.encode(chatglm_text(text)) if layout == "chatglm" else model(text)
            assert ids == expected, ascii(text)
