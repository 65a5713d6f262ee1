"""What a request and its result have in common, whatever it computes: its state, its end, and those who wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from ._cancel import CallbackHandle, CancelToken, Cause
from .errors import LlamaCancelError
from .outcome import cancelled_error
from .scheduler import FinishReason, Request, RequestState
from .usage import Usage
from .views import RequestView

__all__ = ["Registration", "Work", "ending_of"]

W = TypeVar("W", bound="Work")

ENDINGS: dict[Cause | None, Any] = {Cause.DEADLINE: "deadline", Cause.SHUTDOWN: "shutdown"}


def ending_of(token: CancelToken) -> Any:
    """The finish reason of work whose token was cancelled: "cancelled", "deadline" or "shutdown"."""
    return ENDINGS.get(token.cause, "cancelled")


class Registration:
    """A function that is called until `remove()`."""

    __slots__ = ("_list", "after", "fn")

    def __init__(
        self, fn: Callable[..., object], entries: list[Registration], after: Callable[[], object] | None = None
    ) -> None:
        self.fn = fn
        self.after = after
        self._list = entries
        entries.append(self)

    def remove(self) -> bool:
        """Take it back. False if that was done before. A call that is under way still ends."""
        try:
            self._list.remove(self)
        except ValueError:
            return False
        return True


class Work:
    """A request that an engine has accepted. Made by `Engine.submit` and `Engine.embed`.

    Safe to use from any thread. In a `with` statement it is cancelled at the end, if it is not finished by then.

    Attributes:
        ended: True once it is finished, its slot is free, and all that is to be told of it is there.
    """

    _what = "request"

    def __init__(self, request: Request, token: CancelToken) -> None:
        self._request = request
        self._token = token
        self._until: tuple[CancelToken, CancelToken] | None = None
        self._changed = threading.Condition()
        self._waiting = 0
        self._notify: list[Registration] = []
        self._callback: CallbackHandle | None = None
        self.ended = False
        self._cause: Cause | None = None
        self._reason = ""
        self._cancel_latency: float | None = None

    # -- what it is and how it is

    @property
    def id(self) -> str:
        """Its name."""
        return self._request.id

    @property
    def state(self) -> RequestState:
        """ "queued", "prefill", "decode" or "finished"; finished means that its slot is free, too."""
        return self._request.state

    @property
    def finish_reason(self) -> FinishReason | None:
        """How it ended: "stop", "length", "cancelled", "deadline", "shutdown" or "error"; None while it has not."""
        return self._request.finish_reason if self.ended else None

    @property
    def cause(self) -> Cause | None:
        """Who cancelled it, if that is how it ended."""
        return self._cause

    @property
    def reason(self) -> str:
        """The text given to `cancel()`, or ""."""
        return self._reason

    @property
    def cancel_latency(self) -> float | None:
        """Seconds from the cancel, or the deadline, to its slot being free; None if it was not cancelled."""
        return self._cancel_latency

    @property
    def error(self) -> Exception | None:
        """Why it failed, or None."""
        return self._request.error

    @property
    def usage(self) -> Usage:
        """Tokens and seconds so far."""
        request, now = self._request, time.monotonic()
        ended = request.finished_at or now
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
        request = self._request
        return RequestView(
            id=request.id,
            kind=request.kind,
            state=request.state,
            waits_for_memory=request.waits_for_memory,
            priority=request.priority,
            slot=request.last_slot,
            prompt_tokens=request.n_prompt,
            prompt_done=min(request.held, request.n_prompt),
            cached_tokens=request.cached_tokens,
            completion_tokens=request.n_generated,
            submitted_at=request.submitted_at,
            started_at=request.started_at,
            first_token_at=request.first_token_at,
            finished_at=request.finished_at,
            finish_reason=request.finish_reason,
            cause=self._cause.value if self._cause is not None else None,
            reason=self._reason or (str(request.error) if request.error is not None else ""),
            cancel_latency=self._cancel_latency,
        )

    # -- cancel and wait

    def cancel(self, reason: str = "") -> bool:
        """Stop it. From any thread; a repeated or late one does nothing.

        Returns:
            True for the first cancel of an unfinished request.
        """
        return not self.ended and self._token.cancel(reason)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is finished and its slot is free.

        Returns:
            False if `timeout` seconds passed first.
        """
        return self._await(lambda: self.ended, timeout)

    def add_notify(self, fn: Callable[[], object], after: Callable[[], object] | None = None) -> Registration:
        """Have `fn()` called when there is something new to read, or the end has come; at once if that is so now.

        It is called by the engine's thread or by one that cancels, never two at a time, and must not block.

        Args:
            fn: What is called.
            after: Called afterwards, too; once for all the requests that have news at the same time and the same
                `after`.
        """
        entry = Registration(fn, self._notify, after)
        if self.ended or self.readable:
            fn()
            if after is not None:
                after()
        return entry

    def __enter__(self: W) -> W:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.ended:
            self.cancel("left the with statement")
            self.wait()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.finish_reason or self.state}>"

    # -- for those who build on it

    def token_until(self, stop: CancelToken) -> CancelToken:
        """A token that is cancelled with its own or with `stop`: the same one for as long as `stop` is the same."""
        if self._until is None or self._until[0] is not stop:
            self._until = stop, CancelToken.any_of(self._token, stop)
        return self._until[1]

    @property
    def readable(self) -> bool:
        """Whether there is something to read that was not read."""
        return False

    def _await(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        if ready():
            return True
        with self._changed:
            self._waiting += 1
            try:
                return self._changed.wait_for(ready, timeout)
            finally:
                self._waiting -= 1

    def _await_or_stop(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """Waits; Ctrl-C ends the work before it goes on its way."""
        try:
            return self._await(ready, timeout)
        except KeyboardInterrupt:
            self._token.cancel("Ctrl-C", cause=Cause.INTERRUPT)
            self.wait()
            raise

    @property
    def has_readers(self) -> bool:
        """Whether somebody waits for something to read."""
        return bool(self._notify or self._waiting)

    def _wake(self) -> None:
        """Wakes the threads that wait."""
        if self._waiting:
            with self._changed:
                self._changed.notify_all()

    def _end(self, now: float) -> None:
        """Called once, when the request is finished and nothing of it is being computed."""
        if self._request.finish_reason in ("cancelled", "deadline", "shutdown"):
            self._cause, self._reason = self._token.cause, self._token.reason or ""
            self._cancel_latency = max(now - (self._token.cancelled_at or now), 0.0)
        if self._callback is not None:
            self._callback.remove()
            self._callback = None
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def raise_if_failed(self) -> None:
        """Raise what a reader is to be told at the end, if it did not end well; do nothing otherwise."""
        if self._request.error is not None:
            raise self._request.error
        if self._request.finish_reason in ("cancelled", "deadline", "shutdown"):
            if self._cause is None:
                raise LlamaCancelError(f"{self._what} {self.id} ended: {self._request.finish_reason}")
            raise cancelled_error(f"{self._what} {self.id}", self._cause, self._reason, self._cancel_latency or 0.0)
