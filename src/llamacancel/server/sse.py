"""Server-sent events: a stream that several generations write to, at the pace of its client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from starlette.types import Send

__all__ = ["DONE", "EventStream", "event", "json_of", "json_parts"]

DONE = b"data: [DONE]\n\n"
PING_SECONDS = 15.0


_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def json_of(data: object, *, yielding: bool = False) -> str:
    """JSON as it is sent: short, and without the two signs that some clients take for the end of a line.

    Args:
        data: What it says.
        yielding: Let go of the interpreter lock in between. Slower; for a thread, if there is much to say.

    Raises:
        ValueError: If it has a number that JSON has not.
    """
    text = "".join(_encoder.iterencode(data)) if yielding else _encoder.encode(data)
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def json_parts(data: Mapping[str, Any], name: str, entries: Iterable[object]) -> Iterator[bytes]:
    """The JSON of an object whose last member, `name`, is a list that is too long to be made at once."""
    before = json_of({**data, name: []})[:-2].encode("utf-8", "replace")
    for entry in entries:
        yield before + json_of(entry).encode("utf-8", "replace")
        before = b","
    yield (before if before != b"," else b"") + b"]}"


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """An event with JSON."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json_of(data)}\n\n".encode("utf-8", "replace")


class EventStream:
    """Sends events of one response.

    Writers take turns, and each waits until the client has room for more: a client that stops reading holds up its own
    response and nobody else's. In silent times a comment is sent now and then, so that proxies keep the connection.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._turn = asyncio.Lock()
        self._pings: asyncio.Task[None] | None = None
        self._written = False

    async def start(self, headers: Mapping[str, str] | None = None) -> None:
        """Send status and headers, at once."""
        fields = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            **(headers or {}),
        }
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})
        self._pings = asyncio.create_task(self._ping())

    async def write(self, data: bytes) -> None:
        """Send an event."""
        async with self._turn:
            self._written = True
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        """Send the last events."""
        self.stop()
        async with self._turn:
            await self._send({"type": "http.response.body", "body": data, "more_body": False})

    def stop(self) -> None:
        """Send no more comments."""
        if self._pings is not None:
            self._pings.cancel()

    async def _ping(self) -> None:
        while True:
            self._written = False
            await asyncio.sleep(PING_SECONDS)
            if not self._written:
                await self.write(b": still there\n\n")
