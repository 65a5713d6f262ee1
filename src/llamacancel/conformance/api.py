"""What an OpenAI-compatible server is asked, and what its answers say."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from .wire import Target

__all__ = ["Api", "Piece", "Request"]


@dataclass(frozen=True)
class Request:
    """One piece of work.

    Args:
        prompt: Text of the prompt.
        max_tokens: How many tokens to generate.
        stream: Whether the answer comes token by token.
        extra: Further fields of the body, as `timeout`.
    """

    prompt: str
    max_tokens: int
    stream: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    def with_extra(self, **extra: Any) -> Request:
        return replace(self, extra={**self.extra, **extra})


@dataclass(frozen=True)
class Piece:
    """What one event of a stream, or a whole answer, says."""

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Api:
    """How this server is spoken to.

    Args:
        target: Its address.
        model: The model's name in requests.
        chat: Whether `/chat/completions` is asked instead of `/completions`.
        options: Fields that go into every body: those of temperature 0, seed and the like that the server takes.
        key: Bearer token, or None.
    """

    target: Target
    model: str
    chat: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    key: str | None = None

    @property
    def path(self) -> str:
        return self.target.path + ("/chat/completions" if self.chat else "/completions")

    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def body(self, request: Request) -> bytes:
        """Return the JSON body of a request."""
        fields: dict[str, Any] = {"model": self.model, "max_tokens": request.max_tokens, "stream": request.stream}
        if self.chat:
            fields["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            fields["prompt"] = request.prompt
        options = dict(self.options)
        if not request.stream:
            options.pop("stream_options", None)
        return json.dumps({**fields, **options, **request.extra}).encode()

    @staticmethod
    def read(data: str | bytes) -> Piece:
        """Read one event's data, or a whole answer. What is no JSON object is an error."""
        try:
            found = json.loads(data)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            return Piece(error=f"not a JSON object: {data[:80]!r}")
        if found.get("error"):
            return Piece(error=_message(found["error"]))
        usage = found.get("usage")
        usage = usage if isinstance(usage, dict) else None
        choices = found.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return Piece(usage=usage)
        choice = choices[0]
        holder = choice.get("delta") or choice.get("message") or {}
        text = choice.get("text")
        if not isinstance(text, str):
            text = "".join(str(holder.get(name) or "") for name in ("reasoning_content", "reasoning", "content"))
        reason = choice.get("finish_reason")
        return Piece(text, reason if isinstance(reason, str) else None, usage)


def _message(error: Any) -> str:
    if isinstance(error, dict):
        return str(error.get("message") or error)
    return str(error)
