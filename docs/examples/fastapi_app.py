"""A FastAPI app of your own with an engine inside, whose clients may hang up at any time.

MODEL=model.gguf uvicorn fastapi_app:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse

import llamacancel as lc
from llamacancel.server.disconnect import watched


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    with lc.Model.load(os.environ["MODEL"]) as model:
        async with lc.aio.Engine(model, slots=4, queue_limit=32) as engine:
            app.state.engine = engine
            yield


app = FastAPI(lifespan=lifespan)


def submitted(text: str) -> lc.aio.Generation:
    """Queue the text; a full queue and a text that is too long are told at once."""
    try:
        return app.state.engine.submit(text, max_tokens=64, timeout=60)
    except lc.QueueFullError:
        raise HTTPException(503, "busy, try again", headers={"Retry-After": "2"}) from None
    except lc.InvalidBatchError as error:
        raise HTTPException(413, str(error)) from None


@app.post("/continue")
async def answer(request: Request) -> str:
    """The whole continuation of the body's text."""
    generation = submitted((await request.body()).decode())
    # Leaving the block, for whatever reason, ends the generation and waits until its slot is free.
    async with generation, watched(request.receive, lambda: generation.cancel("the client hung up")):
        try:
            return (await generation.result()).text
        except lc.DeadlineExceeded:
            raise HTTPException(408, "it took too long") from None
        except lc.DecodeCancelled as error:
            raise HTTPException(499, error.reason) from None


@app.post("/stream")
async def stream(request: Request) -> StreamingResponse:
    """The continuation, piece by piece."""
    generation = submitted((await request.body()).decode())

    async def pieces() -> AsyncIterator[str]:
        async with generation, watched(request.receive, lambda: generation.cancel("the client hung up")):
            try:
                async for piece in generation:
                    yield piece
            except lc.DecodeCancelled as error:
                yield f"\n[stopped: {error.cause.value}]"

    return StreamingResponse(pieces(), media_type="text/plain")
