"""Does what may take long beside the event loop, under the request's token."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

from ..cancel import CancelToken
from ..engine import LONG_TEXT
from ..errors import DecodeCancelled
from .service import Group

__all__ = ["under_token"]

_T = TypeVar("_T")


async def under_token(group: Group, work: Callable[[CancelToken], _T], *, size: int | None = None) -> _T:
    """Do what a request's body wants done, under the request's token.

    What may take long is done beside the event loop, because other clients' streams must not wait, and by a few at a
    time, because they must not lose the processors. Who is cancelled while waiting for that waits no more.

    Args:
        group: The request's.
        work: Takes the token.
        size: How large it is, in characters of text; by default as many as the body has bytes.

    Raises:
        ApiError: As `Group.check`.
    """
    group.check()
    try:
        if (group.size if size is None else size) < LONG_TEXT:
            done = work(group.token)
        else:
            done = await _in_thread(group, lambda: work(group.token))
    except DecodeCancelled:
        group.check()
        raise
    group.check()
    return done


async def _in_thread(group: Group, work: Callable[[], _T]) -> _T:
    loop = asyncio.get_running_loop()
    with anyio.CancelScope() as waiting:
        handle = group.token.add_callback(lambda: _cancel_soon(loop, waiting))
        try:
            return await anyio.to_thread.run_sync(work, limiter=group.preparing)  # once begun, it is not left alone
        finally:
            handle.remove()
    group.check()
    raise AssertionError("only a token that is cancelled cancels the wait")


def _cancel_soon(loop: asyncio.AbstractEventLoop, scope: anyio.CancelScope) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(scope.cancel)
