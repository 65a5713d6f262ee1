"""The threads that run callbacks of tokens whose deadline passes."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

__all__ = ["Alarms"]

T = TypeVar("T")
_Entry = tuple[int, int, "weakref.ref[T]"]

_RETRY_NS = 1_000_000


class Alarms(Generic[T]):
    """Calls `ring(item)` once an item's deadline has passed, on daemon threads.

    The first one starts with the first item. One watches the clock and another one stands by, so that a callback that
    blocks holds up no other item. Items are held weakly, so those that die are forgotten. `add()` takes no lock: it may
    be called by a signal handler or a finalizer in the middle of itself. In a forked child a thread starts again with
    the first item that is added there.

    Args:
        ring: Called with the item, on a daemon thread; false if the deadline has not passed after all,
            and the item is to be tried again a little later. Must not raise.
    """

    def __init__(self, ring: Callable[[T], bool]) -> None:
        self._ring = ring
        self._heap: list[_Entry[T]] = []  # belongs to who watches
        self._order = itertools.count()
        self._sweep_at = 64
        self._box: SimpleQueue[_Entry[T]] = SimpleQueue()
        self._forget_threads()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget_threads)

    def add(self, item: T, deadline_ns: int) -> None:
        """Rings for `item` at `deadline_ns`, on `time.monotonic_ns()`'s clock."""
        self._box.put((deadline_ns, next(self._order), weakref.ref(item)))
        if not self._first:
            thread = self._new_thread()
            if self._first.setdefault("first", thread) is thread:
                try:
                    thread.start()
                except BaseException:
                    self._first.clear()
                    raise

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._run, name="llamacancel-deadlines", daemon=True)

    def _forget_threads(self) -> None:
        # Also in a forked child, where the threads are gone, and what they held is held for ever.
        box, self._box = self._box, SimpleQueue()
        while not box.empty():
            self._box.put(box.get_nowait())
        self._first: dict[str, threading.Thread] = {}
        self._watching = threading.Lock()
        self._standing_by: set[int] = set()

    def _run(self) -> None:
        me = threading.get_ident()
        while True:
            self._standing_by.add(me)
            if len(self._standing_by) > 2:
                self._standing_by.discard(me)
                return
            with self._watching:
                self._standing_by.discard(me)
                reference = self._next()
                if not self._standing_by:
                    with contextlib.suppress(RuntimeError):  # no thread could be started: this one comes back
                        self._new_thread().start()
            self._fire(reference)

    def _next(self) -> weakref.ref[T]:
        """Waits for the next deadline."""
        while True:
            left_ns = self._heap[0][0] - time.monotonic_ns() if self._heap else None
            if left_ns is not None and left_ns <= 0:
                return heapq.heappop(self._heap)[2]
            try:
                entry = self._box.get(timeout=None if left_ns is None else min(left_ns / 1e9, threading.TIMEOUT_MAX))
            except Empty:
                continue
            if len(self._heap) >= self._sweep_at:
                self._sweep()
            heapq.heappush(self._heap, entry)

    def _sweep(self) -> None:
        # Many tokens die long before their deadline. Each sweep halves the list or doubles the limit.
        living = [entry for entry in self._heap if entry[2]() is not None]
        heapq.heapify(living)
        self._heap = living
        self._sweep_at = max(64, 2 * len(living))

    def _fire(self, reference: weakref.ref[T]) -> None:
        item = reference()
        if item is not None and not self._ring(item):
            self.add(item, time.monotonic_ns() + _RETRY_NS)
