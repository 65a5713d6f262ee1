"""The bodies of requests: OpenAI's fields, and a few of llama.cpp's. Unknown fields are ignored, wrong ones refused.

A list is checked up to its first fault: a million of them would be a million of pydantic's findings.
"""

from __future__ import annotations

from typing import Annotated, Literal, cast

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from ..bodies import Body, Whole, whole
from ..errors import ApiError

__all__ = [
    "ChatBody",
    "CompletionBody",
    "EmbeddingsBody",
    "GenerationBody",
    "JsonSchemaFormat",
    "Message",
    "Tool",
]


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("0 tokens are no answer; -1 stands for as many as fit")
    return value


Count = Annotated[int, Field(ge=1, le=2**31 - 1), Whole]
MostTokens = Annotated[int, Field(ge=-1, le=2**31 - 1), Whole, AfterValidator(_not_zero)]
Text = Annotated[str, Field(min_length=1)]
MOST_PROMPTS = 2048
MOST_TOKENS = "Most tokens that the answer may have; -1: as many as fit."
Priority = Annotated[int, Field(ge=-100, le=100), Whole]
Temperature = Annotated[float, Field(ge=0, le=1000)]
PRIORITY = "Higher goes first in the queue; 0 if left out. A level is worth some seconds of waiting."


def _ids(given: list[object]) -> list[int]:
    """Token ids."""
    ids = given if all(type(each) is int for each in given) else [whole(each) for each in given]
    if not ids or not all(type(each) is int and 0 <= each < 2**31 for each in ids):
        raise ValueError
    return cast("list[int]", ids)


def _prompt(value: object, info: ValidationInfo) -> object:
    """A prompt as it is given. A union's branches would be tried one after the other, with all of a long list each.

    What is wrong is no finding of pydantic's, which would keep a copy of the value.
    """
    try:
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value:
            if not isinstance(value[0], (str, list)):
                return _ids(value)
            if len(value) <= MOST_PROMPTS and all(type(each) is type(value[0]) for each in value):
                return value if isinstance(value[0], str) else [_ids(each) for each in value]
    except ValueError:
        pass
    words = "has to be a text, a list of texts, a list of token ids, or a list of such lists, none of them empty"
    raise ApiError(400, f"{info.field_name}: {words}", param=info.field_name)


def _bias(value: object) -> object:
    if isinstance(value, dict) and all(type(each) in (int, float) and -100 <= each <= 100 for each in value.values()):
        return value
    words = "logit_bias: has to be an object of token ids, each with a number from -100 to 100"
    raise ApiError(400, words, param="logit_bias")


_TOKEN_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}}
Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "maxItems": MOST_PROMPTS, "items": {"type": "string"}},
                _TOKEN_IDS,
                {"type": "array", "minItems": 1, "maxItems": MOST_PROMPTS, "items": _TOKEN_IDS},
            ]
        }
    ),
]
Bias = Annotated[
    dict[str, float],
    PlainValidator(_bias),
    WithJsonSchema(
        {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
    ),
]


class StreamOptions(Body):
    """What a stream contains beside the text."""

    include_usage: bool | None = Field(None, description="End the stream with an event that has the usage.")


class GenerationBody(Body):
    """What completions and chat have in common."""

    model: str | None = Field(None, description="Any name: the loaded model answers, and says its real name.")
    stream: bool | None = Field(None, description="Send the answer in pieces, as server-sent events.")
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128), Whole] | None = Field(None, description="How many answers to generate.")
    max_tokens: MostTokens | None = Field(None, description=MOST_TOKENS)
    stop: str | Annotated[list[str], Field(max_length=16, fail_fast=True)] | None = Field(
        None, description="Text that ends the answer, which does not contain it. Empty ones end nothing."
    )
    temperature: Temperature | None = Field(None, description="0: always the likeliest token.")
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), Whole] | None = Field(None, description="0 or -1: no limit.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=100)] | None = Field(None, description="llama.cpp's; 1 is off.")
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), Whole] | None = Field(
        None, description="The same seed gives the same choice of tokens; -1 is another one each time."
    )
    logit_bias: Bias | None = Field(None, description="Added to a token's logit, by token id; -100 forbids it.")
    grammar: Text | None = Field(None, description="GBNF grammar that the answer follows (llama.cpp's).")
    timeout: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        None, description="Seconds for queue, prompt and answer together; afterwards the request is cancelled."
    )
    priority: Priority | None = Field(None, description=PRIORITY)
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        return tuple(stop for stop in given if stop)


class CompletionBody(GenerationBody):
    """Body of `POST /v1/completions`."""

    prompt: Prompt = Field(description="Text, texts, token ids, or lists of token ids.")
    logprobs: Annotated[int, Field(ge=0, le=20), Whole] | None = Field(
        None, description="How many of the likeliest tokens to tell for each token of the answer."
    )
    best_of: Annotated[int, Whole] | None = Field(None, description="Only as many as n.")
    echo: bool | None = Field(
        None, description="Put the text of the prompt in front of the answer. Not together with logprobs."
    )
    suffix: str | None = Field(None, description="Not supported: only null.")

    @model_validator(mode="after")
    def _check_supported(self) -> CompletionBody:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo is not supported together with logprobs: those of the prompt are not computed")
        if self.suffix:
            raise ValueError("suffix is not supported")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is supported only when it is the same as n")
        return self


class TextPart(Body):
    """A part of a message's content; others than text cannot be read."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]


class FunctionCall(Body):
    """The function that a tool call names, with its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A tool call of an earlier answer."""

    model_config = ConfigDict(extra="ignore", strict=True)
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class SystemMessage(Body):
    """Instructions."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    """What the user said."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Body):
    """What the model answered."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _check(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("an assistant's message needs content or tool_calls")
        return self


class ToolMessage(Body):
    """What a tool answered."""

    role: Literal["tool", "function"]
    content: Content
    tool_call_id: str | None = None
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Body):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: Text
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None


class Tool(Body):
    """A tool that the model may call."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """A function's name."""

    name: Text


class NamedTool(Body):
    """The one tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Body):
    """A JSON schema with its name."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, JsonValue] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Body):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatBody(GenerationBody):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: MostTokens | None = Field(None, description="As max_tokens, which it replaces.")
    logprobs: bool | None = Field(None, description="Tell the log probability of each token of the answer.")
    top_logprobs: Annotated[int, Field(ge=0, le=20), Whole] | None = Field(
        None, description="How many of the likeliest tokens to tell for each; needs logprobs."
    )
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = Field(None, description="Given to the chat template.")
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = Field(None, description="Further variables of the template.")

    @model_validator(mode="after")
    def _check_chat(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.grammar is not None and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("grammar and response_format exclude each other")
        names = {tool.function.name for tool in self.tools or ()}
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not among the tools")
        return self


class EmbeddingsBody(Body):
    """Body of `POST /v1/embeddings`."""

    input: Prompt = Field(description="Text, texts, token ids, or lists of token ids.")
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = Field(
        None,
        description="Give only the first so many components, again with length 1: for models that were trained for it.",
    )
    timeout: Annotated[float, Field(gt=0, le=1e6)] | None = None
    priority: Priority | None = Field(None, description=PRIORITY)
    user: str | None = None
