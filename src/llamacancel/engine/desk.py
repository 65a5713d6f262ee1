"""What the engine's thread and all others share."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from queue import SimpleQueue

from ..cancel import CancelToken
from ..errors import ClosedError, QueueFullError
from .names import Names
from .scheduler import Flight, Outcome, Request
from .views import RequestView
from .work import Work

__all__ = ["Desk", "Watch"]


class Watch:
    """What a thread computes at this moment, for others who may have it stopped.

    Attributes:
        flight: What it computes; None in between.
        stop: Cancelled to stop that, for all of its requests. Whatever is begun listens to the one that is here then.
    """

    def __init__(self) -> None:
        self.flight: Flight | None = None
        self.stop = CancelToken()

    def begin(self, flight: Flight | None) -> CancelToken:
        """It is computed from now on. Returns the token that stops it."""
        if self.stop.cancelled:
            self.stop = CancelToken()
        self.flight = flight
        return self.stop

    def end(self) -> None:
        """It is computed no more."""
        self.flight = None

    def stop_for(self, work: Work) -> None:
        """Have it stopped for `work`, which was cancelled, if that pays."""
        flight = self.flight
        if flight is None:
            return
        requests = flight.plan.requests
        if work.request not in requests:
            return
        gone = [request.owner.token.cancelled for request in requests]
        if flight.stops_inside(gone, time.monotonic()) and self.flight is flight:
            self.stop.cancel("others in the step were cancelled")


class Desk:
    """Takes requests and cancels from any thread, and keeps them for the engine's, which alone enters the scheduler.

    There is no lock here that a thread could hold while it is interrupted, while the garbage collector runs somebody's
    `__del__` in it, or while the process is forked: each step is one that CPython does as a whole.

    Args:
        places: Requests that may be unfinished at the same time.
        queue_limit: How many of them may wait for a slot.
        history: Finished requests to remember.

    Attributes:
        box: What the engine's thread is to look at: requests that are new or were cancelled, and what came of texts to
            embed. None wakes it.
        works: The unfinished requests, the first to come first.
        recent: The last ones that finished.
        token: Cancelled to end all of them.
        closing: No new work is taken.
        over: Why nobody will look into the box any more; None as long as the engine's thread does.
        steps: Watches over the steps.
        texts: Watches over the batches of texts to embed.
        thread: The engine's thread, once it runs.
        pid: The process that it is in.
    """

    def __init__(self, places: int, queue_limit: int, history: int) -> None:
        self._places = places
        self._queue_limit = queue_limit
        self.box: SimpleQueue[Work | Outcome | None] = SimpleQueue()
        self.works: dict[Request, Work] = {}
        self.recent: deque[RequestView] = deque(maxlen=history)
        self.names = Names()
        self.token = CancelToken()
        self.closing = False
        self.failure: BaseException | None = None
        self.over: ClosedError | None = None
        self.steps, self.texts = Watch(), Watch()
        self.thread: threading.Thread | None = None
        self.pid = os.getpid()

    def submit(self, work: Work) -> None:
        """Take a request. Interrupted anywhere, it has either not been taken, or ends when its handle is dropped.

        Raises:
            ClosedError: If the engine is closed or failed.
            QueueFullError: If as many wait as may.
            ValueError: If a request that nobody has cancelled has its id.
        """
        self.check_open()
        work.desk = self
        request = work.request
        request.submitted_at = time.monotonic()
        self.works[request] = work
        if len(self.works) > self._places and list(self.works).index(request) >= self._places:
            self._refuse(work)
            raise QueueFullError(f"as many requests wait as may: queue_limit is {self._queue_limit}")
        if not self.names.claim(work):
            self._refuse(work)
            raise ValueError(f"there is an unfinished request {request.id!r}")
        self.box.put(work)
        if self.over is not None:  # since it was looked at: the engine's thread may not have found it
            work.finish("error", time.monotonic(), self.over)
            raise self.over
        handle = work.token.add_callback(work.on_cancel)
        work.callback = handle
        if work.ended:
            handle.remove()
        work.accepted = True

    def _refuse(self, work: Work) -> None:
        work.desk = None
        del self.works[work.request]

    def stop_for(self, work: Work) -> None:
        """Have what is being computed stopped for `work`, which was cancelled, if that pays."""
        for watch in (self.steps, self.texts):
            watch.stop_for(work)

    def check_open(self) -> None:
        """Raises `ClosedError` if no new work is taken."""
        if self.failure is not None:
            raise ClosedError(f"the engine failed: {type(self.failure).__name__}: {self.failure}") from self.failure
        if self.closing:
            raise ClosedError("the engine is closed")

    def check_process(self, what: str = "the engine") -> None:
        """Raises `ClosedError` in a process that was forked from the engine's."""
        if self.is_foreign:
            raise ClosedError(f"{what} belongs to process {self.pid}, from which this one was forked: make a new one")

    @property
    def is_foreign(self) -> bool:
        """Whether this is a process that was forked from the engine's."""
        return self.pid != os.getpid()

    @property
    def is_this_thread(self) -> bool:
        """Whether it is the engine's thread that asks."""
        return self.thread is threading.current_thread()
