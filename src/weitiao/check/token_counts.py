"""How many tokens a conversation takes in a model's chat format, from the model's tokenizer files alone.

Loads no model and no torch: the tokenizer is read from ``tokenizer.json``, or made of the vocabulary of an original GLM
checkpoint; what the chat format adds is measured once on three tiny conversations. Counts are those of training to
within a few tokens: where format and text meet, a tokenizer may join characters that are counted apart here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..errors import ModelError
from ..messages import Message

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WITHOUT_TEMPLATE = 2
"""A base model's text stands between a begin and an end token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateCost:
    """The tokens that a chat template adds."""

    once: int
    """To any conversation that ends with an answer."""
    system: int
    """More for a system message."""
    turn: int
    """More for each message after the first."""


class TokenCount(NamedTuple):
    """The tokens of one conversation."""

    total: int
    learnt: int
    """Those of the replies that are learnt, each with its end token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCounter:
    """Counts the tokens of conversations in one model's format."""

    folder: Path
    tokenizer: Tokenizer
    cost: TemplateCost

    def count(
        self,
        conversations: Sequence[tuple[Sequence[Message], str]],
        *,
        turns: Literal["flagged", "all", "last"] = "flagged",
    ) -> list[TokenCount]:
        """The tokens of each conversation with its answer, end token included; `turns`: which replies are learnt."""
        texts = [text for messages, answer in conversations for text in (*(m.text for m in messages), answer)]
        lengths = iter([len(encoding) for encoding in self._encode(texts)])
        counts = []
        for messages, _ in conversations:
            own = [next(lengths) for _ in range(len(messages) + 1)]
            num_system = sum(message.role == "system" for message in messages)
            more_turns = len(messages) - num_system - 1
            earlier = sum(
                length + 1
                for message, length in zip(messages, own, strict=False)
                if message.role == "assistant" and (turns == "all" or (turns == "flagged" and message.learn))
            )
            added = self.cost.once + self.cost.system * num_system + self.cost.turn * more_turns
            counts.append(TokenCount(sum(own) + added, earlier + own[-1] + 1))
        return counts

    def _encode(self, texts: Sequence[str]) -> list[Any]:
        return list(self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))


def open_counter(model: str) -> TokenCounter | None:
    """The counter for the recipe's `model`; None when its tokenizer files are not on this machine.

    Nothing is downloaded or unpacked. Raises ModelError when the files are there but cannot be read.
    """
    folder = _local_folder(model)
    if folder is None:
        return None
    if not (folder / "tokenizer.json").is_file():
        return _open_glm_counter(folder)
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception for a file it cannot read
        raise ModelError(f"{folder / 'tokenizer.json'} cannot be read: {error}. Download the model again.") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return TokenCounter(folder=folder, tokenizer=tokenizer, cost=_measure(tokenizer, folder))


def _open_glm_counter(folder: Path) -> TokenCounter | None:
    """The counter for an original GLM checkpoint; None where the folder holds none, or not its vocabulary."""
    from ..models.families import family_of

    has_config = (folder / "config.json").is_file()
    layout = family_of(folder).layout if has_config else None
    if layout is None or not any(folder.glob("*.model")):
        return None
    from ..models.glm.tokenizers import glm_tokenizer
    from ..render.glm import glm_renderer

    made = glm_tokenizer(folder, layout)
    renderer = glm_renderer(layout, made)
    made.backend_tokenizer.encode_special_tokens = True  # texts never spell control tokens
    own = len(made.backend_tokenizer.encode("a", add_special_tokens=False))
    ask, reply, system = (Message(role=role, text="a") for role in ("user", "assistant", "system"))

    def cost(*messages: Message) -> int:
        whole = renderer.render_prompt(messages) + renderer.render_answer("a")
        return len(whole) - own * (len(messages) + 1)

    once = cost(ask)
    turn = round((cost(ask, reply, ask) - once) / 2)
    added = TemplateCost(once=once, system=max(0, cost(system, ask) - once), turn=turn)
    return TokenCounter(folder=folder, tokenizer=made.backend_tokenizer, cost=added)


def _local_folder(model: str) -> Path | None:
    """Where the model's files lie, if they do."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model == "starter":
        from ..models.starter import made_starter_folder

        return made_starter_folder()
    if model.count("/") == 1 and not model.startswith((".", "/", "~", "modelscope:")):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "tokenizer.json")
        return Path(found).parent if isinstance(found, str) else None
    return None


def _measure(tokenizer: Tokenizer, folder: Path) -> TemplateCost:
    """What the chat template in `folder` adds; a base model's begin and end token where there is none."""
    template = _read_template(folder)
    if template is None:
        return TemplateCost(once=_WITHOUT_TEMPLATE, system=0, turn=1)
    render = _compile(template, folder)
    ask, reply = {"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}

    def cost(*messages: dict[str, str]) -> int:
        text = render(messages)
        return len(tokenizer.encode(text, add_special_tokens=False)) - len(messages)

    once = cost(ask)
    system = cost({"role": "system", "content": "a"}, ask) - once
    turn = (cost(ask, reply, ask) - once) / 2
    return TemplateCost(once=once + 1, system=max(0, system), turn=round(turn))


def _read_template(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    config = _read_config(folder)
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    try:
        value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}. Download the model again.") from None
    return value if isinstance(value, dict) else {}


def _compile(template: str, folder: Path) -> Any:
    """A function from messages to the rendered prompt; a template that refuses a conversation renders its texts."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: "2026-01-01"}
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    config = _read_config(folder)
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    tokens = {name: _token_text(config.get(name)) for name in names}
    try:
        compiled = environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ModelError(f"The chat template in {folder} cannot be read: {error}.") from None

    def render(messages: Sequence[dict[str, str]]) -> str:
        try:
            return compiled.render(messages=list(messages), add_generation_prompt=True, **tokens)
        except jinja2.TemplateError:  # no system message in this format, for one: it costs what its text costs
            return "".join(message["content"] for message in messages)

    return render


def _token_text(value: object) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
