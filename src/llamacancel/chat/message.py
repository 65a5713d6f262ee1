"""What a model answered: a message, and the changes that make it up as it comes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["ChatDelta", "ChatMessage", "ToolCall", "ToolCallDelta"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function.

    Attributes:
        id: Its name in the conversation.
        name: The function's name.
        arguments: JSON text of an object; the beginning of one where the answer was cut.
    """

    id: str
    name: str
    arguments: str

    def as_dict(self) -> dict[str, Any]:
        """The call in OpenAI's form."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What became known of a tool call.

    Attributes:
        index: Which call of the answer, from 0 on.
        id, name: Given once, with the first delta of the call; else "".
        arguments: The next piece of them.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """What a piece of text has brought; together the deltas of an answer make up its message."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """An assistant's message.

    Attributes:
        content: What it says.
        reasoning: What was thought before, where the model's template tells that apart.
        tool_calls: The functions to call.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def role(self) -> str:
        return "assistant"

    @classmethod
    def of(cls, deltas: Iterable[ChatDelta]) -> ChatMessage:
        """The message that deltas make up."""
        content, reasoning = [], []
        calls: list[tuple[list[str], list[str], list[str]]] = []
        for delta in deltas:
            content.append(delta.content)
            reasoning.append(delta.reasoning)
            for each in delta.tool_calls:
                while len(calls) <= each.index:
                    calls.append(([], [], []))
                for parts, part in zip(calls[each.index], (each.id, each.name, each.arguments), strict=True):
                    parts.append(part)
        made = tuple(ToolCall("".join(id), "".join(name), "".join(arguments)) for id, name, arguments in calls)
        return cls("".join(content), "".join(reasoning), made)

    def as_dict(self) -> dict[str, Any]:
        """The message in OpenAI's form, as `messages` take it back; with `reasoning_content` where there is some."""
        given: dict[str, Any] = {"role": "assistant", "content": self.content or None}
        if self.reasoning:
            given["reasoning_content"] = self.reasoning
        if self.tool_calls:
            given["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        else:
            given["content"] = self.content
        return given
