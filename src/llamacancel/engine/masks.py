"""Threads that compute what constraints allow next, while llama.cpp computes a step."""

from __future__ import annotations

import threading
from contextlib import suppress
from queue import SimpleQueue

from ..cancel import CancelToken
from ..llama import Sampler, is_parked
from .joining import join

__all__ = ["Mask", "Masks"]


class Mask:
    """One row's mask, which a thread computes: the sampler keeps it, and is in use until `wait()` returns.

    What goes wrong shows when the sampler is used next, and is told by that: a constraint that has failed stays so.
    """

    __slots__ = ("_done", "_sampler", "_thread", "_token")

    def __init__(self, sampler: Sampler, token: CancelToken) -> None:
        self._sampler: Sampler | None = sampler
        self._token = token
        self._thread: int | None = None
        self._done = threading.Lock()
        self._done.acquire()

    def compute(self) -> None:
        """Computes it, unless nobody wants it any more."""
        self._thread = threading.get_ident()
        sampler, self._sampler = self._sampler, None
        try:
            if sampler is not None and not self._token.cancelled:
                with suppress(BaseException):
                    sampler._make_mask()
        finally:
            del sampler  # with what it holds, before anybody goes on
            self._done.release()

    def wait(self) -> None:
        """Waits until the sampler is free: as long as a mask takes at most, or not at all if the exit holds it."""
        while not self._done.acquire(timeout=0.1):
            if self._thread is not None and is_parked(self._thread):
                return
        self._done.release()

    @property
    def done(self) -> bool:
        return not self._done.locked()


class Masks:
    """Computes masks beside a step, each by itself: nobody's has to wait for another's as long as there are threads.

    All methods are the engine's thread's.

    Args:
        threads: How many compute at most. They are made when they are needed.
    """

    def __init__(self, threads: int) -> None:
        self._most = threads
        self._threads: list[threading.Thread] = []
        self._begun: list[Mask] = []  # while there may be more threads
        self._queue: SimpleQueue[Mask | None] = SimpleQueue()

    def begin(self, sampler: Sampler, token: CancelToken) -> Mask:
        """Has the sampler's mask computed. `token` says when nobody wants it any more.

        Raises:
            RuntimeError: If there is no thread, and none can be made.
        """
        mask = Mask(sampler, token)
        if len(self._threads) < self._most:
            self._begun = [each for each in self._begun if not each.done]
            if len(self._threads) <= len(self._begun):
                self._add_thread()
            self._begun.append(mask)
        self._queue.put(mask)
        return mask

    def _add_thread(self) -> None:
        try:
            thread = threading.Thread(target=self._main, name="llamacancel-masks", daemon=True)
            thread.start()
            self._threads.append(thread)
        except RuntimeError:
            if not self._threads:
                raise

    def _main(self) -> None:
        while (mask := self._queue.get()) is not None:
            mask.compute()
            del mask

    def close(self) -> None:
        """Ends the threads, each behind what it computes."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            join(thread)
        self._threads.clear()
