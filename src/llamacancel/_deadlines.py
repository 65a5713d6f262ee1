"""The thread that runs callbacks of tokens whose deadline passes."""

from __future__ import annotations

import heapq
import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Alarms"]

T = TypeVar("T")

_RETRY_NS = 1_000_000


class Alarms(Generic[T]):
    """Calls `ring(item)` once an item's deadline has passed, on one daemon thread.

    The thread starts with the first item. Items are held weakly, so those that die are forgotten. In a
    forked child the thread starts again with the first item that is added there.

    Args:
        ring: Called with the item, on the daemon thread; false if the deadline has not passed after all,
            and the item is to be tried again a little later. Must not raise.
    """

    _changed: threading.Condition
    _thread: threading.Thread | None

    def __init__(self, ring: Callable[[T], bool]) -> None:
        self._ring = ring
        self._heap: list[tuple[int, int, weakref.ref[T]]] = []
        self._order = itertools.count()
        self._sweep_at = 64
        self._forget_thread()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget_thread)

    def add(self, item: T, deadline_ns: int) -> None:
        """Rings for `item` at `deadline_ns`, on `time.monotonic_ns()`'s clock."""
        with self._changed:
            if len(self._heap) >= self._sweep_at:
                self._sweep()
            entry = (deadline_ns, next(self._order), weakref.ref(item))
            heapq.heappush(self._heap, entry)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="llamacancel-deadlines", daemon=True)
                thread.start()
                self._thread = thread
            elif self._heap[0] is entry:
                self._changed.notify()

    def _forget_thread(self) -> None:
        # Also in a forked child, where the thread is gone and its lock may be held for ever.
        self._changed = threading.Condition()
        self._thread = None

    def _sweep(self) -> None:
        # Many tokens die long before their deadline. Each sweep halves the list or doubles the limit.
        living = [entry for entry in self._heap if entry[2]() is not None]
        heapq.heapify(living)
        self._heap = living
        self._sweep_at = max(64, 2 * len(living))

    def _run(self) -> None:
        while True:
            self._fire(self._next())

    def _next(self) -> weakref.ref[T]:
        with self._changed:
            while True:
                if not self._heap:
                    self._changed.wait()
                elif (left_ns := self._heap[0][0] - time.monotonic_ns()) > 0:
                    self._changed.wait(min(left_ns / 1e9, threading.TIMEOUT_MAX))
                else:
                    return heapq.heappop(self._heap)[2]

    def _fire(self, reference: weakref.ref[T]) -> None:
        item = reference()
        if item is not None and not self._ring(item):
            self.add(item, time.monotonic_ns() + _RETRY_NS)
