"""One request to an OpenAI-compatible server, from a client that may hang up at a given moment."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from llamacancel.conformance.api import Api
from llamacancel.conformance.sse import EventReader
from llamacancel.conformance.wire import Exchange, ExchangeError, Target

__all__ = ["Answer", "Asker", "random_prompt"]


@dataclass
class Answer:
    """What a client saw. Times are `time.monotonic()` seconds; None if that did not happen.

    Attributes:
        sent: When it had connected and sent its request.
        first: When the first text came.
        last: When the latest text came.
        ended: When the answer was complete, or the client gone.
        hung_up: When it hung up.
        tokens: Tokens of the answer: what `usage` says, otherwise pieces of text.
        status: HTTP status.
        error: Why there is no whole answer.
    """

    sent: float
    first: float | None = None
    last: float | None = None
    ended: float | None = None
    hung_up: float | None = None
    tokens: int = 0
    status: int | None = None
    error: str | None = None
    pieces: int = field(default=0)

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def random_prompt(seed: Sequence[int], length: int, vocabulary: tuple[int, int]) -> list[int]:
    """Tokens that no other seed begins with."""
    low, high = vocabulary
    tokens: list[int] = np.random.default_rng(list(seed)).integers(low, high, length).tolist()
    return tokens


class Asker:
    """Sends requests to one server.

    Args:
        url: Its address, as http://127.0.0.1:8080/v1.
        end_tokens: Tokens that would end an answer early: they are forbidden, so that every answer has its length.
    """

    def __init__(self, url: str, end_tokens: Sequence[int]) -> None:
        self.api = Api(
            Target.parse(url),
            "bench",
            options={
                "temperature": 0,
                "seed": 1,
                "ignore_eos": True,
                "logit_bias": {str(token): -100 for token in end_tokens},
                "stream_options": {"include_usage": True},
            },
        )

    async def ask(
        self,
        prompt: Sequence[int] | str,
        max_tokens: int,
        *,
        stream: bool = True,
        hang_up: asyncio.Future[None] | None = None,
        leave: Callable[[Answer], bool] | None = None,
        headers: dict[str, str] | None = None,
        on_piece: Callable[[Answer], None] | None = None,
    ) -> Answer:
        """Send a request and see it through, or hang up.

        Args:
            prompt: Tokens or text.
            max_tokens: Length of the answer.
            stream: As events.
            hang_up: When it is done, the client closes its connection at once.
            leave: Asked at each piece of text; true makes the client close its connection.
            headers: Of the request.
            on_piece: Told of each piece of text.
        """
        body: dict[str, Any] = {"model": "bench", "prompt": prompt, "max_tokens": max_tokens, "stream": stream}
        options = dict(self.api.options)
        if not stream:
            del options["stream_options"]
        answer = Answer(time.monotonic())
        exchange: Exchange | None = None

        def close(_: object = None) -> None:
            if answer.ended is None and exchange is not None:
                answer.hung_up = answer.ended = time.monotonic()
                exchange.hang_up()

        try:
            exchange = await Exchange.open(self.api.target)
            answer.sent = time.monotonic()
            await exchange.send("POST", self.api.path, json.dumps({**body, **options}).encode(), headers)
            if hang_up is not None:
                if hang_up.done():
                    close()
                else:
                    hang_up.add_done_callback(close)
            head = await exchange.head()
            answer.status = head.status
            if stream and head.status == 200:
                await self._read(exchange, answer, leave, close, on_piece)
            else:
                data = b"".join([part async for part in exchange.body()])
                self._take(answer, data)
                if head.status != 200:
                    answer.error = f"HTTP {head.status}: {answer.error or data[:200]!r}"
        except ExchangeError as error:
            if answer.hung_up is None:
                answer.error = str(error)
        finally:
            if answer.ended is None:
                answer.ended = time.monotonic()
            if exchange is not None:
                exchange.hang_up()
        return answer

    async def _read(
        self,
        exchange: Exchange,
        answer: Answer,
        leave: Callable[[Answer], bool] | None,
        close: Callable[[], None],
        on_piece: Callable[[Answer], None] | None,
    ) -> None:
        events, complete = EventReader(), False
        async for data in exchange.body():
            for event in events.feed(data):
                if event == "[DONE]":
                    complete = True
                    continue
                before = answer.pieces
                self._take(answer, event)
                if answer.pieces == before:
                    continue
                if on_piece is not None:
                    on_piece(answer)
                if leave is not None and leave(answer):
                    close()
                    return
        if not complete and answer.error is None and answer.hung_up is None:
            answer.error = f"the stream ended after {answer.pieces} pieces without saying that it had"

    def _take(self, answer: Answer, data: str | bytes) -> None:
        piece = self.api.read(data)
        if piece.text:
            answer.last = time.monotonic()
            answer.pieces += 1
            if answer.first is None:
                answer.first = answer.last
        answer.tokens = max(answer.tokens, answer.pieces)
        if piece.usage is not None:
            answer.tokens = int(piece.usage.get("completion_tokens", answer.tokens))
        if piece.error is not None:
            answer.error = answer.error or piece.error
