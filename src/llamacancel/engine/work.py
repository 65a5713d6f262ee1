"""What an engine keeps of a request that it has accepted: its token, its end, and who is told."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from ..cancel import CallbackHandle, CancelToken, Cause, call_as_callback
from .scheduler import FinishReason, Request
from .views import RequestView

if TYPE_CHECKING:
    from threading import Lock

    from .desk import Desk

__all__ = ["End", "Registration", "Work", "call", "ending_of"]

ENDINGS: dict[Cause | None, Any] = {Cause.DEADLINE: "deadline", Cause.SHUTDOWN: "shutdown"}


def ending_of(token: CancelToken) -> Any:
    """The finish reason of work whose token was cancelled: "cancelled", "deadline" or "shutdown"."""
    return ENDINGS.get(token.cause, "cancelled")


def call(fn: Callable[..., object], *args: object) -> None:
    """Calls somebody else's function; what it raises goes where it goes with a callback of a token."""
    call_as_callback(functools.partial(fn, *args))


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


class End(NamedTuple):
    """How a request ended."""

    reason: FinishReason
    at: float
    error: Exception | None = None
    cause: Cause | None = None
    text: str = ""  # what was given to `cancel()`
    latency: float | None = None


class Work:
    """The engine's half of a request. The other half, `Handle`, is what its user holds; when that is gone, so is the
    interest in this one.

    Whoever cancels it may be in any thread, in a signal handler, or in a garbage collection in the middle of anything.
    So nothing here takes a lock: what is to happen once is entered into a dictionary by `setdefault`, which CPython
    does as a whole, and all else may be done twice.

    Attributes:
        request: What the scheduler knows.
        token: Its own token.
        notify: What is called when there is something new to read.
        bells: Locks that threads wait for, released when there is something new.
        heir: Who has its id after it: see `Names`.
        taken: The engine's thread has taken it out of the box.
        settled: The scheduler has let go of it.
        accepted: Its user has the handle.
    """

    def __init__(self, request: Request, token: CancelToken) -> None:
        self.request = request
        self.token = token
        self.desk: Desk | None = None
        self.notify: list[Registration] = []
        self.bells: list[Lock] = []
        self.heir: dict[str, Work | None] = {}
        self.taken = self.settled = False
        self.accepted = False
        self.callback: CallbackHandle | None = None
        self._fate: dict[str, str] = {}  # "started", or "left" before it was
        self._end: dict[str, End] = {}
        self._until: tuple[CancelToken, CancelToken] | None = None
        request.owner = self

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def end(self) -> End | None:
        """How it ended; None while its slot is not free, or something is to be told."""
        return self._end.get("end")

    @property
    def ended(self) -> bool:
        return bool(self._end)

    @property
    def gone(self) -> bool:
        """Whether nobody waits for it: it has ended, or will as soon as the engine sees it."""
        return self.ended or self.token.cancelled

    @property
    def readable(self) -> bool:
        """Whether there is something to read that was not read."""
        return False

    @property
    def has_readers(self) -> bool:
        """Whether somebody waits for something to read."""
        return bool(self.notify or self.bells)

    def token_until(self, stop: CancelToken) -> CancelToken:
        """A token that is cancelled with its own or with `stop`: the same one for as long as `stop` is the same."""
        if self._until is None or self._until[0] is not stop:
            self._until = stop, CancelToken.any_of(self.token, stop)
        return self._until[1]

    def start(self) -> None:
        """It is given a slot: from now on its end comes from the engine's thread."""
        self._fate.setdefault("fate", "started")

    def cancel(self, reason: str = "", cause: Cause = Cause.CLIENT) -> bool:
        """Stop it. True for the first cancel of an unfinished request."""
        try:
            return not self.ended and self.token.cancel(reason, cause=cause)
        finally:
            if self.token.cancelled:  # if an interrupt came while the token's callbacks were called
                self.leave()

    def on_cancel(self) -> None:
        """The callback of its token."""
        try:
            self.leave()
        except KeyboardInterrupt:
            self.leave()
            raise

    def leave(self) -> None:
        """Its token was cancelled. One that never had a slot has ended with that; else the engine's thread ends it."""
        desk = self.desk
        if desk is None or desk.is_foreign or self.ended:
            return
        desk.box.put(self)
        if self._fate.setdefault("fate", "left") == "left":
            self.finish(ending_of(self.token), time.monotonic())
            for after in self.tell():
                call(after)
        desk.stop_for(self)

    def finish(self, reason: FinishReason, now: float, error: Exception | None = None) -> None:
        """It has ended so, unless it has already. `tell()` is to follow."""
        if self.desk is not None:
            self.desk.works.pop(self.request, None)
        if not self._end:
            end = End(reason, now, error)
            if reason in ("cancelled", "deadline", "shutdown"):
                token = self.token
                latency = max(now - (token.cancelled_at or now), 0.0)
                end = End(reason, now, None, token.cause, token.reason or "", latency)
            if self._end.setdefault("end", end) is end and self.desk is not None:
                self.desk.recent.append(self.view())
        self.let_go()

    def let_go(self) -> None:
        """Forgets what an ended request needs no more. A user may keep its answer for long."""
        callback, self.callback = self.callback, None
        if callback is not None:
            callback.remove()

    def tell(self) -> dict[Callable[[], object], None]:
        """Wakes those who wait, and calls those who want to know. Returns what they want to be called afterwards."""
        for bell in tuple(self.bells):
            with suppress(RuntimeError):  # it has rung, and nobody has come yet
                bell.release()
        afterwards: dict[Callable[[], object], None] = {}
        for entry in tuple(self.notify):
            call(entry.fn)
            if entry.after is not None:
                afterwards[entry.after] = None
        return afterwards

    def view(self) -> RequestView:
        """A picture of this moment."""
        request, end = self.request, self.end
        error = end.error if end is not None else request.error
        return RequestView(
            id=request.id,
            kind=request.kind,
            state="finished" if end is not None else request.state,
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
            finished_at=end.at if end is not None else request.finished_at,
            finish_reason=end.reason if end is not None else request.finish_reason,
            cause=end.cause.value if end is not None and end.cause is not None else None,
            reason=(end.text if end is not None else "") or (str(error) if error is not None else ""),
            cancel_latency=end.latency if end is not None else None,
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"
