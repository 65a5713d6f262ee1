"""Waiting for a thread's end, which the interpreter's exit may put off for good."""

from __future__ import annotations

import math
import threading
import time

from ..llama import is_parked

__all__ = ["join"]


def join(thread: threading.Thread, timeout: float | None = None) -> bool:
    """Wait for the thread's end; True if it has come, or if the exit has stopped the thread for good."""
    until = math.inf if timeout is None else time.monotonic() + timeout
    while thread.is_alive() and not is_parked(thread.ident or 0):
        left = until - time.monotonic()
        if left <= 0:
            return False
        thread.join(min(left, 0.1))
    return True
