"""`POST /v1/embeddings`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
from collections.abc import Iterator
from typing import Annotated, Any

import anyio.to_thread
import numpy as np
from fastapi import APIRouter, Depends, Request
from numpy.typing import NDArray
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...engine import Embedding, RequestView
from ...errors import QueueFullError
from ..bodies import body_of, described
from ..errors import ERRORS, GENERATION_ERRORS, ApiError
from ..service import Group, Service, TimeoutHeader
from ..sse import json_parts
from . import answers
from .answer import failure, refusals
from .prompts import prompt_tokens
from .schemas import EmbeddingsBody

__all__ = ["router"]

ENDPOINT = "/v1/embeddings"
FULL_SECONDS = 0.02
"""How long a request whose first inputs are done waits for room in a full queue, before it looks again."""
PART_BYTES = 65536
"""Bytes of an answer that are made and sent at once."""

router = APIRouter(tags=["generate"])


@router.post(
    ENDPOINT,
    openapi_extra=described(EmbeddingsBody),
    response_model=answers.EmbeddingList,
    responses=ERRORS | GENERATION_ERRORS,
    summary="Turn text into vectors",
)
async def create_embeddings(
    request: Request,
    body: Annotated[EmbeddingsBody, Depends(body_of(EmbeddingsBody))],
    x_request_timeout: TimeoutHeader = None,
) -> Response:
    """One vector of length 1 for each input. A client that hangs up cancels what is not done."""
    service: Service = request.app.state.service
    timeout = service.timeout(body.timeout, x_request_timeout)
    if service.engine.ranks:
        raise ApiError(400, "this model ranks texts: it gives scores, and no embeddings", code="no_embeddings")
    if body.dimensions is not None and body.dimensions > service.model.n_embd:
        raise ApiError(400, f"this model's vectors have {service.model.n_embd} dimensions", param="dimensions")
    return _EmbeddingsResponse(service, request, body, timeout)


class _AwaitableEmbedding:
    """An embedding of the engine, for asyncio: a task that is cancelled while it waits cancels it, too."""

    def __init__(self, embedding: Embedding) -> None:
        self.embedding = embedding
        self.id = embedding.id
        self._loop = asyncio.get_running_loop()
        self._done = asyncio.Event()
        self._handle = embedding.add_notify(self._notify)

    def _notify(self) -> None:
        if self.embedding.ended:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._done.set)

    def cancel(self, reason: str = "") -> bool:
        return self.embedding.cancel(reason)

    def view(self) -> RequestView:
        return self.embedding.view()

    async def wait(self) -> None:
        try:
            await self._done.wait()
        except asyncio.CancelledError:
            self.cancel("the task was cancelled")
            await asyncio.shield(self._done.wait())
            raise
        finally:
            self._handle.remove()


class _EmbeddingsResponse(Response):
    """Submits the inputs when it is sent, a few at a time, and answers with their vectors."""

    def __init__(self, service: Service, request: Request, body: EmbeddingsBody, timeout: float | None) -> None:
        super().__init__()
        self._service, self._request, self._body, self._timeout = service, request, body, timeout
        self._prompts: list[list[int]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(OSError):
            async with self._service.group(self._request, ENDPOINT, self._timeout) as group:
                self._prompts = await prompt_tokens(group, self._service.model, self._body.input, "input")
                works: list[_AwaitableEmbedding] = []
                with refusals(self._service):
                    self._submit(group, works)
                    await self._submit_rest(group, works)
                group.arrived.set()
                await group.settle()
                await self._send_answer(group, works, send)

    def _submit(self, group: Group, works: list[_AwaitableEmbedding]) -> None:
        """Queue the next input."""
        index = len(works)
        embedding = self._service.engine.embed(
            self._prompts[index],
            token=group.token,
            priority=self._body.priority or 0,
            request_id=f"{group.name}.{index}" if len(self._prompts) > 1 else group.name,
        )
        works.append(_AwaitableEmbedding(embedding))
        group.works.append(works[-1])

    async def _submit_rest(self, group: Group, works: list[_AwaitableEmbedding]) -> None:
        """Queue the other inputs, only as many at a time as there are slots, so that others come in between."""
        at_once = self._service.engine.slots
        while len(works) < len(self._prompts):
            if len(works) >= at_once:
                await works[len(works) - at_once].wait()
            if group.disconnected or any(work.embedding.finish_reason not in (None, "stop") for work in works):
                return
            try:
                self._submit(group, works)
            except QueueFullError:
                if group.token.cancelled:
                    return
                await asyncio.sleep(FULL_SECONDS)

    async def _send_answer(self, group: Group, works: list[_AwaitableEmbedding], send: Send) -> None:
        if group.disconnected:
            return
        error = failure([work.embedding for work in works], partial=False)
        if error is not None:
            raise error
        if len(works) < len(self._prompts):
            group.check()
        vectors = [work.embedding.result(0)[: self._body.dimensions] for work in works]
        tokens = sum(work.embedding.usage.prompt_tokens for work in works)
        head: dict[str, Any] = {
            "object": "list",
            "model": self._service.model_name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        lengths = await anyio.to_thread.run_sync(lambda: [float(np.linalg.norm(vector)) for vector in vectors])
        if not np.isfinite(lengths).all():
            raise ApiError(
                500,
                f"the model's vector of input {int(np.argmin(np.isfinite(lengths)))} has numbers that are none (NaN or "
                "infinite): its file may be damaged, or its weights too large for the type that it computes in",
                code="not_finite",
            )
        parts = json_parts(head, "data", map(self._item, itertools.count(), vectors, lengths))
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while not group.disconnected and (part := await anyio.to_thread.run_sync(_some_of, parts)):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def _item(self, index: int, vector: NDArray[np.float32], length: float) -> dict[str, Any]:
        unit = vector / length if length > 0 else vector
        given: Any = unit.tolist()
        if self._body.encoding_format == "base64":
            given = base64.b64encode(unit.astype("<f4").tobytes()).decode()
        return {"object": "embedding", "index": index, "embedding": given}


def _some_of(parts: Iterator[bytes]) -> bytes:
    """The next parts of an answer; nothing at its end."""
    taken = b""
    for part in parts:
        taken += part
        if len(taken) >= PART_BYTES:
            break
    return taken
