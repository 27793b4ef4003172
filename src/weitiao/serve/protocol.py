"""What the server is asked, in the shapes of OpenAI's protocol: read strictly, every field known or refused.

Source: the OpenAI API reference (chat completions, completions, embeddings) and the types of its Python client. A field
that changes the answer is honoured or refused with a sentence, never ignored; one that only labels a request (`user`,
`metadata`) is taken and has no effect. Knows neither HTTP nor models.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_CHOICES = 128
"""Most `n`, as OpenAI has it."""
MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20
MAX_METADATA = 16


class Shape(BaseModel):
    """A JSON object of the protocol: no other keys, no guessing of types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(Shape):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class FunctionCall(Shape):
    """A function that the assistant called, its arguments as JSON in a text."""

    name: str = Field(min_length=1)
    arguments: str


class ToolCallShape(Shape):
    """A call in an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class MessageShape(Shape):
    """One turn. Which keys belong to which role is looked at when it is read as a conversation."""

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCallShape] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    refusal: str | None = None
    audio: None = None
    annotations: list[Any] | None = Field(None, max_length=0)

    @property
    def text(self) -> str | None:
        """The content as one text; None where there is none."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content


class FunctionShape(Shape):
    """A function on offer."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[^\s\"\\{}]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolShape(Shape):
    """A tool on offer."""

    type: Literal["function"]
    function: FunctionShape


class NamedFunction(Shape):
    """The name of a function."""

    name: str


class NamedTool(Shape):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class TextFormat(Shape):
    """Free text: no form, not even the one that was labelled."""

    type: Literal["text"]


class JsonObjectFormat(Shape):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaShape(Shape):
    """A schema of the user's own."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Shape):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaShape


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StreamOptions(Shape):
    """What a stream tells besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


Stop = str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None
Penalty = Annotated[float, Field(ge=-2, le=2)]


class SamplingShape(Shape):
    """The fields that chat and plain completions share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, description="Not OpenAI's: draw from so many best tokens; 0 is off.")
    stop: Stop = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @model_validator(mode="after")
    def _consistent(self) -> SamplingShape:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is given, but stream is not true. Set stream, or leave the options out.")
        if any(not stop for stop in self.stops):
            raise ValueError("stop holds an empty text, which would end every answer at once. Leave it out.")
        for token in self.logit_bias or {}:
            if not token.isdecimal():
                raise ValueError(f"logit_bias has the key {token[:20]!r}; its keys are numbers of tokens.")
        return self


class ChatRequest(SamplingShape):
    """``POST /v1/chat/completions``."""

    messages: list[MessageShape] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[ToolShape] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    task: str | None = Field(None, description="Not OpenAI's: the task of a tuned model that the request belongs to.")
    functions: list[FunctionShape] | None = Field(None, max_length=128, description="The old name of tools.")
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    # these label a request and change nothing of its answer
    metadata: dict[str, str] | None = Field(None, max_length=MAX_METADATA)
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of the answer that were asked for, by the new name or the old one."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def one_call(self) -> bool:
        """Whether a reply may call one tool at most."""
        return self.functions is not None or self.parallel_tool_calls is False

    @model_validator(mode="after")
    def _consistent_chat(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is given, but logprobs is not true. Set logprobs, or leave it out.")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit. Give one of them.")
        if self.functions is not None and self.tools is not None:
            raise ValueError("functions is the old name of tools. Give tools alone.")
        if self.function_call is not None and self.functions is None:
            raise ValueError("function_call is given without functions. With tools it is called tool_choice.")
        offered = {tool.function.name for tool in self.tools or ()}
        if self.tool_choice not in (None, "none") and not offered:
            raise ValueError("tool_choice is given, but there are no tools.")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in offered:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not among the tools.")
        names = [one.name for one in self.functions or ()] or [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("Two tools have the same name. Give each a name of its own.")
        return self


class CompletionRequest(SamplingShape):
    """``POST /v1/completions``: plain text goes on, without a chat format and without a form."""

    prompt: str | list[str] | list[int] | list[list[int]]
    best_of: int | None = Field(None, ge=1, le=20)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=5)
    suffix: None = None

    @model_validator(mode="after")
    def _consistent_completion(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(
                f"best_of is {self.best_of} and n {self.n or 1}: choosing the best of more answers than are given is "
                "not supported. Ask for n and choose."
            )
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported: the prompt's log-probabilities are not computed.")
        if not self.prompt or any(isinstance(one, list) and not one for one in self.prompt):
            raise ValueError("prompt is empty. Give a text, tokens, or a list of either.")
        return self


class EmbeddingRequest(Shape):
    """``POST /v1/embeddings``."""

    model: str
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None

    @model_validator(mode="after")
    def _something(self) -> EmbeddingRequest:
        if not self.input or any(isinstance(one, str | list) and not one for one in self.input):
            raise ValueError("input is empty, or holds an empty text. Give texts of one character at least.")
        return self


class TokenizeRequest(Shape):
    """``POST /tokenize``, in the shape that vLLM gave it."""

    model: str
    messages: list[MessageShape] = Field(min_length=1)
    tools: list[ToolShape] | None = Field(None, max_length=128)
    task: str | None = None
    add_generation_prompt: Literal[True] | None = None

    def as_chat(self) -> ChatRequest:
        """The chat request whose prompt is asked for."""
        return ChatRequest(model=self.model, messages=self.messages, tools=self.tools, task=self.task)
