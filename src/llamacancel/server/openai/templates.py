"""Chat templates of model files, rendered as the Hugging Face libraries do, in jinja2's sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...cancel import CancelToken
from ...llama import Model

__all__ = ["CHATML", "ChatTemplate", "TemplateFailed", "chat_tokens"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The template of models that have none."""


class TemplateFailed(ValueError):
    """The template cannot be used, or refuses these messages."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's part for training; here it is plain text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own escapes what HTML gives a meaning to, which would change the prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """Turns messages into a prompt.

    Args:
        source: The template; None for ChatML.
        tool_source: The template for requests with tools, where the model has one of its own for them.
        variables: Variables of every rendering, such as `bos_token`.

    Raises:
        TemplateFailed: If a template cannot be parsed.
    """

    def __init__(
        self,
        source: str | None = None,
        *,
        tool_source: str | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> None:
        environment = _environment()
        self.knows_developer = '"developer"' in (source or "") or "'developer'" in (source or "")
        try:
            self._template = environment.from_string(source or CHATML)
            self._tool_template = environment.from_string(tool_source) if tool_source else self._template
        except jinja2.TemplateError as error:
            raise TemplateFailed(f"the chat template cannot be parsed: {error}") from error
        self._variables = dict(variables or {})

    @classmethod
    def of_model(cls, model: Model, source: str | None = None) -> ChatTemplate:
        """The template of a model's file, or another one, with the model's special tokens as variables."""

        def text(token: int | None) -> str:
            return "" if token is None else model.token_to_piece(token).decode("utf-8", "replace")

        return cls(
            source or model.chat_template,
            tool_source=None if source else model.metadata.get("tokenizer.chat_template.tool_use"),
            variables={"bos_token": text(model.bos), "eos_token": text(model.eos)},
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt for messages.

        Args:
            messages: Dicts with "role", "content" and what else the template knows.
            tools: Descriptions of functions, in OpenAI's form.
            add_generation_prompt: End with the beginning of the assistant's answer.
            variables: Further variables for the template.

        Raises:
            TemplateFailed: If the template refuses the messages or cannot be rendered with them.
        """
        template = self._tool_template if tools else self._template
        given = {
            **self._variables,
            **(variables or {}),
            "messages": [dict(message) for message in messages],
            "tools": [dict(tool) for tool in tools] if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return template.render(given)
        except jinja2.TemplateError as error:
            raise TemplateFailed(f"the chat template refuses this: {error}") from error
        except Exception as error:
            raise TemplateFailed(f"the chat template cannot be rendered: {type(error).__name__}: {error}") from error


def chat_tokens(model: Model, prompt: str, token: CancelToken | None = None) -> list[int]:
    """The tokens of a rendered prompt: with its special tokens, and one BOS where the model wants it.

    Raises:
        DecodeCancelled: If the token was cancelled.
        ValueError: If the text cannot be tokenized.
    """
    tokens: list[int] = model.tokenize(prompt, add_special=False, parse_special=True, token=token).tolist()
    if model.adds_bos and model.bos is not None and tokens[:1] != [model.bos]:
        tokens.insert(0, model.bos)
    return tokens
