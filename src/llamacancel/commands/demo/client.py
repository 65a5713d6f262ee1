"""A client of the server, who may hang up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

import httpx

__all__ = ["Client"]


class Client:
    """Asks for a completion as a stream, on a connection of its own.

    Args:
        name: What it is called in the pictures.
        url: The server's address.
        request_id: The request's name on the server.
        body: Of the request.

    Attributes:
        text: The answer so far.
        done: Whether it has come to its end.
        sent_at, hung_up_at: `time.monotonic()` seconds.
    """

    def __init__(self, name: str, url: str, request_id: str, body: dict[str, Any]) -> None:
        self.name = name
        self.request_id = request_id
        self.text = ""
        self.done = False
        self.hung_up_at: float | None = None
        self.sent_at = time.monotonic()
        self._task = asyncio.create_task(self._ask(url, {**body, "stream": True}))

    async def _ask(self, url: str, body: dict[str, Any]) -> None:
        headers = {"X-Request-Id": self.request_id}
        async with (
            httpx.AsyncClient(base_url=url, timeout=None, trust_env=False) as http,
            http.stream("POST", "/v1/completions", json=body, headers=headers) as answer,
        ):
            if answer.status_code != 200:
                raise OSError(f"the server answered {answer.status_code}: {(await answer.aread()).decode()}")
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    self.done = True
                elif line.startswith("data: "):
                    self.text += json.loads(line[6:])["choices"][0]["text"]

    def raise_if_failed(self) -> None:
        """Raise what went wrong, if something did."""
        if self._task.done() and not self._task.cancelled() and (error := self._task.exception()) is not None:
            raise error

    async def answered(self) -> None:
        """Wait for the end of the answer."""
        await self._task

    async def hang_up(self) -> None:
        """Close the connection, in the middle of everything."""
        self.hung_up_at = time.monotonic()
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
