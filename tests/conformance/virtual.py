"""An event loop whose clock moves only when there is nothing left to do: seconds pass in no time, on any machine."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

# Real time that the kernel is given to hand loopback data over before the clock moves on.
_HAND_OVER = 0.0001
_STUCK = 20.0


class _Selector(selectors.SelectSelector):
    """Looks at the sockets; when they are silent, it moves the loop's clock instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        if found or (timeout is not None and timeout <= 0):
            return found
        found = super().select(_HAND_OVER)
        if found:
            return found
        if timeout is None:
            found = super().select(_STUCK)
            if not found:
                raise RuntimeError("nothing happens any more, and nobody waits for a time")
            return found
        self.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop with real sockets and a virtual clock."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


async def _end_tasks() -> None:
    pending = asyncio.all_tasks() - {asyncio.current_task()}
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in virtual time."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.run_until_complete(_end_tasks())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
