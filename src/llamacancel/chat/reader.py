"""Reads an answer as it comes, and tells thinking, content and tool calls apart."""

from __future__ import annotations

import secrets
import string
import uuid

from ..cancel import CancelToken
from .message import ChatDelta, ChatMessage, ToolCallDelta
from .template import Reader

__all__ = ["ChatReader"]


class ChatReader:
    """Reads one answer, in the format of the model's family. Made by `ChatPrompt.reader()`.

    One thread uses it at a time. It does not matter where the text is cut: the deltas add up to the same message. Text
    that may yet become a marker is held back. Text that leaves the format, or calls no tool of the request, is content.
    """

    def __init__(self, native: Reader, *, short_ids: bool = False) -> None:
        self._native = native
        self._short_ids = short_ids
        self._deltas: list[ChatDelta] = []
        self._calls = 0
        self._ended = False

    def feed(self, text: str, token: CancelToken | None = None) -> list[ChatDelta]:
        """What is certain now.

        Args:
            text: The next piece of the answer, with its markers.
            token: Cancels it. The text has been taken all the same.

        Raises:
            DecodeCancelled: If `token` was cancelled.
            ChatError: If the text cannot be read: it is nested too deep, or takes too many steps.
            ValueError: If the answer has ended.
        """
        if self._ended:
            raise ValueError("the answer has ended: nothing follows")
        return self._take(text, False, token)

    def end(self, token: CancelToken | None = None) -> list[ChatDelta]:
        """What was held back: nothing more will come. A second end does nothing.

        Raises:
            DecodeCancelled, ChatError: As `feed`.
        """
        if self._ended:
            return []
        deltas = self._take("", True, token)
        self._ended = True
        return deltas

    @property
    def steps(self) -> int:
        """Steps that reading has taken so far, of some ten nanoseconds each."""
        return self._native.steps

    @property
    def message(self) -> ChatMessage:
        """The message so far."""
        if len(self._deltas) > 1:
            whole = ChatMessage.of(self._deltas)
            calls = (ToolCallDelta(i, each.id, each.name, each.arguments) for i, each in enumerate(whole.tool_calls))
            self._deltas = [ChatDelta(whole.content, whole.reasoning, tuple(calls))]
        return ChatMessage.of(self._deltas)

    def _take(self, text: str, last: bool, token: CancelToken | None) -> list[ChatDelta]:
        deltas = [self._delta(*change) for change in self._native.feed(text, last, token)]
        self._deltas += deltas
        return deltas

    def _delta(self, content: str, reasoning: str, call: int, id: str, name: str, arguments: str) -> ChatDelta:
        if call < 0:
            return ChatDelta(content, reasoning)
        if call >= self._calls:  # what comes of its id later is too late: the first one was told
            self._calls = call + 1
            return ChatDelta(tool_calls=(ToolCallDelta(call, id or self._new_id(), name, arguments),))
        return ChatDelta(tool_calls=(ToolCallDelta(call, arguments=arguments),))

    def _new_id(self) -> str:
        if self._short_ids:
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
        return f"call_{uuid.uuid4().hex[:24]}"
