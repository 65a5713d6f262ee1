"""`GET /events`: the engine's state whenever it changes, for the live page."""

from __future__ import annotations

import asyncio
import contextlib
import time

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..disconnect import watched
from ..service import Asker, Service
from ..sse import EventStream, event
from .snapshots import Snapshots

__all__ = ["EventsResponse"]

INTERVAL = 0.1
"""Seconds between two events at least, and between two looks at work that goes on."""
LIFETIME = 60.0
"""Seconds after which the stream ends, so that no server waits for it for ever; readers connect again."""
MOST_READERS = 64
"""Streams at once. Each further one ends the oldest, whose reader connects again if it is still there."""


class EventsResponse(Response):
    """Sends the state of the engine, at once and after each change, until the client leaves or the app closes."""

    def __init__(self, service: Service, asker: Asker) -> None:
        super().__init__()
        self._service, self._asker = service, asker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        changed, over = asyncio.Event(), asyncio.Event()

        def notify(_: object) -> None:
            if changed.is_set():
                return
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(changed.set)

        def finish() -> None:
            over.set()
            changed.set()

        readers = self._service.readers
        readers[finish] = None
        if len(readers) > MOST_READERS:
            oldest = next(iter(readers))
            del readers[oldest]
            oldest()
        forget = self._service.on_close(finish)
        listener = self._service.engine.add_listener(notify)
        stream = EventStream(send)
        try:
            async with watched(receive, finish):
                await stream.start()
                await self._send(stream, changed, over)
                await stream.end()
        except OSError:
            pass
        finally:
            stream.stop()
            listener.remove()
            forget()
            readers.pop(finish, None)

    async def _send(self, stream: EventStream, changed: asyncio.Event, over: asyncio.Event) -> None:
        snapshots = Snapshots(self._service, self._asker)
        end = time.monotonic() + LIFETIME
        await stream.write(b"retry: 500\n\n")
        while not over.is_set() and time.monotonic() < end and not self._service.closing:
            changed.clear()
            state = snapshots.next()
            await stream.write(event(state, "snapshot"))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(over.wait(), INTERVAL)
            if not (state["active"] or state["queue"]):
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(changed.wait(), max(end - time.monotonic(), 0))
