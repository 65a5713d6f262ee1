"""What a user holds of a request that an engine has accepted: its state, its end, and the waiting for it."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from ..cancel import CancelToken, Cause, cancelled_error
from ..errors import LlamaCancelError
from .scheduler import FinishReason, RequestState
from .usage import Usage
from .views import RequestView
from .work import Registration, Work

__all__ = ["Handle"]

W = TypeVar("W", bound=Work)
H = TypeVar("H", bound="Handle")  # type: ignore[type-arg]


class Handle(Generic[W]):
    """A request that an engine has accepted. Made by `Engine.submit` and `Engine.embed`.

    Safe to use from any thread. In a `with` statement it is cancelled at the end, if it is not finished by then. One
    that nobody holds any more is cancelled, too: a loop over its text that was left, say.
    """

    _what = "request"

    def __init__(self, work: W) -> None:
        self._work = work

    # -- what it is and how it is

    @property
    def id(self) -> str:
        """Its name."""
        return self._work.id

    @property
    def ended(self) -> bool:
        """True once it is finished, its slot is free, and all that is to be told of it is there."""
        return self._work.ended

    @property
    def state(self) -> RequestState:
        """ "queued", "prefill", "decode" or "finished"; finished means that its slot is free, too."""
        return "finished" if self._work.ended else self._work.request.state

    @property
    def finish_reason(self) -> FinishReason | None:
        """How it ended: "stop", "length", "cancelled", "deadline", "shutdown" or "error"; None while it has not."""
        end = self._work.end
        return end.reason if end is not None else None

    @property
    def cause(self) -> Cause | None:
        """Who cancelled it, if that is how it ended."""
        end = self._work.end
        return end.cause if end is not None else None

    @property
    def reason(self) -> str:
        """The text given to `cancel()`, or ""."""
        end = self._work.end
        return end.text if end is not None else ""

    @property
    def cancel_latency(self) -> float | None:
        """Seconds from the cancel, or the deadline, to its slot being free; None if it was not cancelled."""
        end = self._work.end
        return end.latency if end is not None else None

    @property
    def error(self) -> Exception | None:
        """Why it failed, or None."""
        end = self._work.end
        return end.error if end is not None else None

    @property
    def usage(self) -> Usage:
        """Tokens and seconds so far."""
        request, end = self._work.request, self._work.end
        ended = end.at if end is not None else time.monotonic()
        started = request.started_at or ended
        first = request.first_token_at or ended
        return Usage(
            prompt_tokens=request.n_prompt,
            cached_tokens=request.cached_tokens,
            completion_tokens=request.n_generated,
            queue_seconds=max(started - request.submitted_at, 0.0),
            prompt_seconds=max(first - started, 0.0),
            decode_seconds=max(ended - first, 0.0),
        )

    def view(self) -> RequestView:
        """A picture of this moment."""
        return self._work.view()

    @property
    def readable(self) -> bool:
        """Whether there is something to read that was not read."""
        return self._work.readable

    # -- cancel and wait

    def cancel(self, reason: str = "") -> bool:
        """Stop it. From any thread; a repeated or late one does nothing.

        Returns:
            True for the first cancel of an unfinished request.
        """
        self._check_process()
        return self._work.cancel(reason)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is finished and its slot is free.

        Returns:
            False if `timeout` seconds passed first.
        """
        return self._await(lambda: self._work.ended, timeout)

    def add_notify(self, fn: Callable[[], object], after: Callable[[], object] | None = None) -> Registration:
        """Have `fn()` called when there is something new to read, or the end has come; at once if that is so now.

        It is called by the engine's thread, or by one that cancels what waits for a slot; never two at a time, and must
        not block. That somebody is to be called does not keep the request: whoever waits has to hold this handle.

        Args:
            fn: What is called.
            after: Called afterwards, too; once for all the requests that have news at the same time and the same
                `after`.
        """
        entry = Registration(fn, self._work.notify, after)
        if self._work.ended or self._work.readable:
            fn()
            if after is not None:
                after()
        return entry

    def __enter__(self: H) -> H:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._work.ended:
            return
        self.cancel("left the with statement")
        desk = self._work.desk
        if desk is None or not desk.is_this_thread:  # a garbage collection may leave it on the engine's thread
            self.wait()

    def __del__(self) -> None:
        work = getattr(self, "_work", None)
        if work is None or work.gone or work.desk is None or work.desk.is_foreign or sys.is_finalizing():
            return
        try:
            if work.accepted:
                warnings.warn(f"nobody waits for {self!r} any more", ResourceWarning, stacklevel=1, source=self)
        finally:
            work.cancel("nobody waits for it any more")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.finish_reason or self.state}>"

    def raise_if_failed(self) -> None:
        """Raise what a reader is to be told at the end, if it did not end well; do nothing otherwise."""
        end = self._work.end
        if end is None:
            return
        if end.error is not None:
            raise end.error
        if end.reason in ("cancelled", "deadline", "shutdown"):
            if end.cause is None:
                raise LlamaCancelError(f"{self._what} {self.id} ended: {end.reason}")
            raise cancelled_error(f"{self._what} {self.id}", end.cause, end.text, end.latency or 0.0)

    # -- inside

    @property
    def _token(self) -> CancelToken:
        return self._work.token

    def _check_process(self) -> None:
        if self._work.desk is not None:
            self._work.desk.check_process(repr(self))

    def _await(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        if ready():
            return True
        self._check_process()
        work = self._work
        if work.desk is not None and work.desk.is_this_thread:
            raise RuntimeError(f"the engine's own thread cannot wait for {self!r}")
        until = None if timeout is None else time.monotonic() + timeout
        bell = threading.Lock()
        bell.acquire()
        work.bells.append(bell)
        try:
            while not ready():
                if until is None:
                    bell.acquire()
                elif (left := until - time.monotonic()) <= 0:
                    return False
                else:
                    bell.acquire(timeout=min(left, threading.TIMEOUT_MAX))
            return True
        finally:
            work.bells.remove(bell)

    def _await_or_stop(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """Waits; Ctrl-C ends the work before it goes on its way."""
        try:
            return self._await(ready, timeout)
        except KeyboardInterrupt:
            self._work.cancel("Ctrl-C", Cause.INTERRUPT)
            self.wait()
            raise
