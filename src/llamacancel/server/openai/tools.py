"""Tool calls in text, as several families of models write them: JSON between `<tool_call>` and `</tool_call>`."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...constraint import Source, calls_of
from .schemas import Tool

__all__ = ["ToolCall", "ToolCallReader", "tool_calls"]

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """A call that the model wrote."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    @property
    def body(self) -> dict[str, Any]:
        """The call in OpenAI's form."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ToolCallReader:
    """Finds calls in text that comes in pieces.

    Text that may yet become a call is held back. What stands between the tags but calls no known function stays text.

    Args:
        names: The functions that there are.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._held = ""
        self._inside = False
        self._after_call = False

    def feed(self, text: str) -> Iterator[str | ToolCall]:
        """What is certain now: texts and calls, in their order."""
        self._held += text
        while True:
            before, tag, rest = self._held.partition(CLOSE if self._inside else OPEN)
            if not tag:
                break
            self._held = rest
            yield from self._call(before, CLOSE) if self._inside else self._text(before)
            self._inside = not self._inside
        if not self._inside:
            keep = next(n for n in range(len(OPEN), -1, -1) if self._held.endswith(OPEN[:n]))
            ready = self._held[: len(self._held) - keep]
            self._held = self._held[len(ready) :]
            yield from self._text(ready)

    def end(self) -> Iterator[str | ToolCall]:
        """What was held back when the text is over; the last call needs no closing tag."""
        held, self._held = self._held, ""
        yield from self._call(held, "") if self._inside else self._text(held)
        self._inside = False

    def _text(self, text: str) -> Iterator[str]:
        """Text, without the white space that follows a call."""
        if self._after_call:
            text = text.lstrip()
        if text:
            self._after_call = False
            yield text

    def _call(self, text: str, tail: str) -> Iterator[str | ToolCall]:
        call = self._parse(text)
        if call is None:
            yield from self._text(OPEN + text + tail)
        else:
            self._after_call = True
            yield call

    def _parse(self, text: str) -> ToolCall | None:
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            return None
        name = given.get("name") if isinstance(given, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return None
        arguments = given.get("arguments", given.get("parameters", {}))
        if isinstance(arguments, str):
            return ToolCall(name, arguments)
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def tool_calls(tools: Sequence[Tool], *, several: bool) -> Source:
    """The constraint of an answer that calls one of some functions, or several of them one after the other."""
    functions = [(tool.function.name, tool.function.parameters or {"type": "object"}) for tool in tools]
    return calls_of(functions, f"{OPEN}\n", f"\n{CLOSE}", several=several)
