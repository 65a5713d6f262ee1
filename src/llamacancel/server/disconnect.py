"""Notices that a client has hung up, whatever its request is doing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.types import Receive

__all__ = ["watched"]

logger = logging.getLogger("llamacancel.server")


@contextlib.asynccontextmanager
async def watched(receive: Receive, on_disconnect: Callable[[], object]) -> AsyncIterator[None]:
    """Within, a client's hang-up calls `on_disconnect`, on the event loop, as soon as the server sees it.

    A response that only sends learns of it when a send fails: never in the queue or in a prompt, where nothing is sent.

    Args:
        receive: The request's own; its body has been read.
        on_disconnect: Called at most once.
    """

    async def watch() -> None:
        message: Any = {}
        while message.get("type") != "http.disconnect":
            try:
                message = await receive()
            except OSError:
                break
        try:
            on_disconnect()
        except Exception:
            logger.exception("a client hung up, and its request could not be cancelled")

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
