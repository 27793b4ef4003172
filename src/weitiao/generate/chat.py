"""The one place where messages meet the engine: evaluation, prediction and chat all ask a model through here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from peft import PeftModel
from transformers import PreTrainedModel

from ..messages import Message
from ..render.base import Renderer, Tools
from .constraint import Constraint, compiler_of, end_text
from .engine import Generation, Sampling, generate


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """One model answer."""

    index: int
    """Which conversation it answers."""
    text: str
    """Empty when the answer was refused: what was written until then is no answer."""
    finish: Literal["stop", "length", "refused"]
    """`length`: cut at the token limit; with a grammar, only where the answer may end. `refused`: see `refusal`."""
    num_tokens: int
    logprob: float
    refusal: str = ""
    """Why there is no answer, as a sentence; only where it was asked for with a grammar, or the model is broken."""
    tokens: tuple[tuple[int, int, float], ...] = ()
    """For each token (start, end, log-probability): which characters of `text` it wrote, and how probable it was among
    those that the grammar allowed. Tokens that only together make a character share its span. The stop token, where
    there is one, comes last and has an empty span."""
    num_steps: int = 0
    """Calls of the model that the answer took after the prompt's; fewer than tokens where a grammar forced some."""


def reply_all(
    model: PreTrainedModel | PeftModel,
    renderer: Renderer,
    conversations: Sequence[Sequence[Message]],
    *,
    sampling: Sampling,
    tools: Sequence[Tools] | None = None,
    limits: Sequence[int] | None = None,
    grammars: Sequence[str | None] | None = None,
    max_rows: int = 48,
) -> Iterator[Reply]:
    """Yield the reply to each conversation as it is done, in any order.

    Args:
        model: a causal model in eval mode.
        renderer: its chat format.
        conversations: lists of messages, each ending with the user's or a tool's.
        sampling: how tokens are chosen.
        tools: for each conversation, the tools on offer.
        limits: for each conversation, the most tokens of its reply, where that is less than `sampling` allows.
        grammars: for each conversation, the Lark grammar that its reply satisfies or is refused, or None.
        max_rows: conversations answered together.

    Raises:
        GrammarError: a grammar cannot be compiled; before anything runs.
        DataError, ModelError, ValueError: as `generate` says.
    """
    offers = tools if tools is not None else [()] * len(conversations)
    prompts = [renderer.render_prompt(messages, offer) for messages, offer in zip(conversations, offers, strict=True)]
    generations = generate(
        model,
        prompts,
        stop_ids=renderer.stop_ids,
        sampling=sampling,
        limits=limits,
        constraints=None if grammars is None else _compile(grammars, offers, model, renderer),
        max_rows=max_rows,
    )
    held = [grammar is not None for grammar in grammars] if grammars is not None else [False] * len(prompts)
    return (reply_of(done, renderer, offers[done.index], held=held[done.index]) for done in generations)


def _compile(
    grammars: Sequence[str | None], offers: Sequence[Tools], model: PreTrainedModel | PeftModel, renderer: Renderer
) -> list[Constraint | None]:
    """The constraint of each grammar; each different one is compiled once."""
    asked = [(grammar, renderer.before_answer(offer)) for grammar, offer in zip(grammars, offers, strict=True)]
    different = {(grammar, before) for grammar, before in asked if grammar is not None}
    if not different:
        return [None] * len(grammars)
    compiler = compiler_of(renderer, model.config.get_text_config().vocab_size)
    compiled = {(grammar, before): compiler.compile(grammar, before=before) for grammar, before in different}
    return [None if grammar is None else compiled[grammar, before] for grammar, before in asked]


def answer_text(token_ids: Sequence[int], renderer: Renderer, tools: Tools = (), *, stopped: bool, held: bool) -> str:
    """The text of an answer that was not refused; `stopped`: a stop token ended it, `held`: it had a constraint."""
    if held:  # the grammar made it end in what the chat format writes before the stop token, in whatever tokens
        return renderer.read_answer(token_ids, tools).removesuffix(end_text(renderer))
    # with its stop token, so that what the chat format writes before that one is known for what it is
    return renderer.read_answer((*token_ids, *(renderer.stop_ids[:1] if stopped else ())), tools)


def reply_of(done: Generation, renderer: Renderer, tools: Tools = (), *, held: bool) -> Reply:
    """The reply of a finished generation; `held` says whether by a grammar."""
    stopped, refused = done.finish == "stop", done.finish == "refused"
    text = "" if refused else answer_text(done.token_ids, renderer, tools, stopped=stopped, held=held)
    tokens: list[tuple[int, int, float]] = []
    if not refused:
        spans = token_spans(renderer, done.token_ids, text, tools)
        tokens = [(*span, logprob) for span, logprob in zip(spans, done.token_logprobs)]
        tokens += [(len(text), len(text), done.stop_logprob)] if stopped else []
    return Reply(
        index=done.index,
        text=text,
        finish=done.finish,
        num_tokens=len(done.token_ids),
        logprob=done.logprob,
        refusal=done.reason,
        tokens=tuple(tokens),
        num_steps=done.num_steps,
    )


def token_spans(renderer: Renderer, token_ids: Sequence[int], text: str, tools: Tools = ()) -> list[tuple[int, int]]:
    """For each token, where in `text`, which the tokens spell, what it wrote begins and ends.

    '你好' written as 你, three bytes of 好   →   (0, 1), (1, 2), (1, 2), (1, 2)

    Of a call in a format's own words, which `text` has in others, every token is taken to write the whole.
    """
    pieces = renderer.show_tokens(token_ids)
    if not "".join(pieces).startswith(text):  # tokens that read otherwise at the beginning of a text than inside it
        pieces = _pieces_by_prefix(renderer, token_ids, text, tools)
    spans: list[tuple[int, int]] = []
    end = 0
    for piece in pieces:
        if piece or not spans:
            start, end = end, min(end + len(piece), len(text))
            spans.append((start, end))
        else:
            spans.append(spans[-1])
    return spans


def _pieces_by_prefix(renderer: Renderer, token_ids: Sequence[int], text: str, tools: Tools) -> list[str]:
    """The text of each token as `show_tokens` gives it, by reading ever longer beginnings of the answer."""
    pieces = [""] * len(token_ids)
    first, read = 0, 0
    for place in range(len(token_ids)):
        prefix = renderer.read_answer(token_ids[: place + 1], tools)
        if place == len(token_ids) - 1 or (text.startswith(prefix) and len(prefix) > read):
            pieces[first] = text[read : len(prefix)]
            first, read = place + 1, len(prefix)
    return pieces
