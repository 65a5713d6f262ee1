"""uvicorn's HTTP protocol with open ears, and with bounds on who may keep it waiting."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["ListeningProtocol"]

MOST_AHEAD = 65536
MOST_CONNECTIONS = 1000
OTHER_FILES = 64
"""Files that are kept free for all else, where the process may have few."""
FULL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def most_connections() -> int:
    """Connections that may be open at once, which leaves the process some files."""
    try:
        import resource
    except ImportError:  # not on Windows
        return MOST_CONNECTIONS
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return min(MOST_CONNECTIONS, max(files - OTHER_FILES, files // 2))


class ListeningProtocol(H11Protocol):
    """Goes on reading when bytes follow a request that is not answered yet, and bounds connections.

    uvicorn stops reading then, be it a pipelined request or a stray line end, and would not learn that the client has
    hung up until it next writes: never, in a silent prompt. Who sends very much ahead is disconnected instead.

    A connection that waits for its client, for a request or the rest of one, or for its reading of an answer, makes
    room for a new one where there are as many as may be. The head of a request has to be there in some time from the
    connection, or the last answer, on, however it comes.

    Attributes:
        most: Connections at once.
        head_seconds: What a client has for the head of its next request.
        since: The loop's time at which its last answer was complete, or it was made.
    """

    most: ClassVar[int] = most_connections()
    head_seconds: ClassVar[float] = 65.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline: asyncio.TimerHandle | None = None
        self._wait_for_head()
        if len(self.connections) > self.most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._deadline is not None:
            self._deadline.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body or not self.flow.read_paused:
            return
        if len(self.conn.trailing_data[0]) > MOST_AHEAD:
            self.transport.close()
        else:
            self.flow.resume_reading()

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def waits_for_client(self) -> bool:
        """Whether nothing goes on before the client sends or reads."""
        return self.is_idle or self.cycle.more_body or self.flow.write_paused

    def _wait_for_head(self) -> None:
        self.since = self.loop.time()
        if self._deadline is not None:
            self._deadline.cancel()
        if not self.transport.is_closing():
            self._deadline = self.loop.call_later(self.head_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        if self.is_idle:
            self.transport.close()

    def _make_room(self) -> None:
        """Close the connection that has waited for longest, one that is idle if there is any; else this one."""
        waiting = [
            each
            for each in self.connections
            if isinstance(each, ListeningProtocol) and each is not self and each.waits_for_client
        ]
        if not waiting:
            self.connections.discard(self)
            self.transport.write(FULL)
            self.transport.close()
            return
        last = min(waiting, key=lambda each: (not each.is_idle, each.since))
        self.connections.discard(last)  # it is counted no more, and closed in the next turn of the loop
        last.transport.abort()
