"""One client's request: sent when it is made, read by a task of its own, and hung up on when it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from .api import Api, Piece, Request
from .sse import EventReader
from .wire import Exchange, ExchangeError

__all__ = ["Call"]


class Call:
    """A request under way, and what its client has seen so far. Times are those of the event loop's clock.

    Attributes:
        sent: When the request was sent.
        head_at: When status and headers came.
        pieces: When each piece of text came; one in all for an answer that is not streamed.
        ended: When the client had seen the end, whichever it was; None while it has not.
        hung_up: When the client hung up.
        half_closed: When it closed its sending side.
        stopped_reading: When it stopped to read.
        status: The HTTP status.
        text: The text so far.
        finish_reason: What the server gave as such.
        usage: The server's `usage`, if it gave one.
        error: Why there is no whole answer, in words.
    """

    def __init__(self, api: Api, request: Request, name: str = "client", *, receive_buffer: int | None = None) -> None:
        self.name = name
        self.request = request
        self.sent: float | None = None
        self.head_at: float | None = None
        self.pieces: list[float] = []
        self.ended: float | None = None
        self.hung_up: float | None = None
        self.half_closed: float | None = None
        self.stopped_reading: float | None = None
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.text = ""
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] | None = None
        self.error: str | None = None
        self._api = api
        self._done = False
        self._exchange: Exchange | None = None
        self._trap: Callable[[Call], bool] | None = None
        self._changed = asyncio.Event()
        self._clock = asyncio.get_running_loop().time
        self._task = asyncio.ensure_future(self._run(receive_buffer))

    # What was seen

    @property
    def first_token(self) -> float | None:
        """When the first text came, of a stream; None for an answer that is not streamed."""
        return self.pieces[0] if self.pieces and self.request.stream else None

    @property
    def answered(self) -> bool:
        """Whether the whole answer came: status 200, and an end that the server named."""
        return self._done

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token is None or self.sent is None else self.first_token - self.sent

    @property
    def seconds(self) -> float | None:
        """From sending to the end."""
        return None if self.ended is None or self.sent is None else self.ended - self.sent

    @property
    def n_tokens(self) -> int:
        """How many tokens were generated: what `usage` says, otherwise the pieces of text that came."""
        counted = (self.usage or {}).get("completion_tokens")
        return counted if isinstance(counted, int) else len(self.pieces)

    @property
    def counts_tokens(self) -> bool:
        return isinstance((self.usage or {}).get("completion_tokens"), int)

    @property
    def cached_tokens(self) -> int | None:
        """How many of the prompt's tokens the server says it had already."""
        details = (self.usage or {}).get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        return cached if isinstance(cached, int) else None

    @property
    def request_id(self) -> str | None:
        return self.headers.get("x-request-id")

    # What the client does

    def hang_up(self) -> None:
        """Close the connection at once."""
        if self.ended is None:
            self.hung_up = self.ended = self._clock()
            self._task.cancel()
            if self._exchange is not None:
                self._exchange.hang_up()
            self._changed.set()

    def hang_up_when(self, condition: Callable[[Call], bool]) -> None:
        """Hang up as soon as the condition holds, before anything more is read."""
        self._trap = condition

    def can_half_close(self) -> bool:
        return self._exchange is not None and self._exchange.can_half_close()

    def half_close(self) -> None:
        """Close the sending side alone."""
        if self.ended is None and self._exchange is not None:
            self.half_closed = self._clock()
            self._exchange.half_close()

    def stop_reading(self) -> None:
        """Read no more, with the connection open."""
        if self.ended is None and self._exchange is not None:
            self.stopped_reading = self._clock()
            self._exchange.stop_reading()

    def unread_bytes(self) -> int | None:
        return None if self._exchange is None or self.ended is not None else self._exchange.unread_bytes()

    # Waiting

    async def until(self, condition: Callable[[Call], bool], timeout: float) -> bool:
        """Wait until the condition holds, the call has ended or the time is up; return whether the condition holds."""
        deadline = self._clock() + timeout
        while not condition(self):
            left = deadline - self._clock()
            if self.ended is not None or left <= 0:
                return condition(self)
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except asyncio.TimeoutError:
                return condition(self)
        return True

    async def until_first_token(self, timeout: float) -> bool:
        return await self.until(lambda call: bool(call.pieces), timeout)

    async def until_end(self, timeout: float) -> bool:
        """Wait for the end; return whether it came in time."""
        return await self.until(lambda call: call.ended is not None, timeout)

    async def close(self) -> None:
        """Hang up if it is still open, and leave nothing behind."""
        self.hang_up()
        (outcome,) = await asyncio.gather(self._task, return_exceptions=True)
        if isinstance(outcome, Exception):
            raise outcome

    # Reading

    async def _run(self, receive_buffer: int | None) -> None:
        try:
            self._exchange = await Exchange.open(self._api.target, receive_buffer=receive_buffer)
            self.sent = self._clock()
            self._changed.set()
            await self._exchange.send("POST", self._api.path, self._api.body(self.request), self._api.headers())
            head = await self._exchange.head()
            self.head_at = self._clock()
            self.status, self.headers = head.status, head.headers
            self._changed.set()
            if self.request.stream and head.headers.get("content-type", "").startswith("text/event-stream"):
                await self._read_stream(self._exchange)
            else:
                await self._read_whole(self._exchange)
        except ExchangeError as error:
            if not self._done:
                self.error = self.error or str(error)
        finally:
            if self.ended is None:
                self.ended = self._clock()
            if self._exchange is not None:
                self._exchange.hang_up()
            self._changed.set()

    async def _read_stream(self, exchange: Exchange) -> None:
        events = EventReader()
        async for data in exchange.body():
            for event in events.feed(data):
                last = event.strip() == "[DONE]"
                if not last:
                    self._take(self._api.read(event))
                self._done = self.error is None and self.status == 200 and (last or self.finish_reason is not None)
                self._changed.set()
                if self._trap is not None and self._trap(self):
                    self.hang_up()
                    return
        if not self._done and self.error is None:
            self.error = f"the stream ended after {len(self.pieces)} pieces of text without saying that it had"

    async def _read_whole(self, exchange: Exchange) -> None:
        data = b""
        async for part in exchange.body():
            data += part
        piece = self._api.read(data)
        self._take(piece)
        if self.status != 200:
            self.error = f"HTTP {self.status}: {self.error or data[:200].decode('utf-8', 'replace')}"
        elif self.error is None:
            self._done = True
        self._changed.set()

    def _take(self, piece: Piece) -> None:
        if piece.error is not None:
            self.error = self.error or piece.error
        if piece.usage is not None:
            self.usage = piece.usage
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason
        if piece.text:
            self.text += piece.text
            self.pieces.append(self._clock())
