"""What is beside generation: models, tokens, health, metrics, slots, and cancelling by id."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from starlette.responses import JSONResponse, Response

from ...cancel import CancelToken
from ...engine import LONG_TEXT
from ..bodies import body_of, described
from ..errors import ERRORS, TOKEN_ERRORS, ApiError, ErrorBody
from ..service import Asker, Service, TimeoutHeader
from ..sse import json_of
from ..threads import under_token
from .events import EventsResponse
from .metrics import CONTENT_TYPE
from .schemas import (
    Cancelled,
    DetokenizeBody,
    Detokenized,
    Health,
    ModelInfo,
    ModelList,
    Snapshot,
    TokenizeBody,
    Tokenized,
)
from .snapshots import Snapshots

__all__ = ["router"]

router = APIRouter()


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _model(service: Service) -> dict[str, Any]:
    model = service.model
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "llamacancel",
        "meta": {
            "description": model.description,
            "memory": model.memory_kind,
            "n_params": model.n_params,
            "size": model.size,
            "n_vocab": model.n_vocab,
            "n_embd": model.n_embd,
            "n_ctx_train": model.n_ctx_train,
            "n_ctx": service.engine.n_ctx,
        },
    }


@router.get("/v1/models", response_model=ModelList, responses=ERRORS, tags=["models"])
async def list_models(request: Request) -> Response:
    """The loaded model."""
    return JSONResponse({"object": "list", "data": [_model(_service(request))]})


@router.get("/v1/models/{model:path}", response_model=ModelInfo, responses=ERRORS, tags=["models"])
async def get_model(request: Request, model: str) -> Response:
    """The loaded model, whatever name is asked for: it is what would answer."""
    return JSONResponse(_model(_service(request)))


@router.delete(
    "/v1/requests/{request_id}",
    response_model=Cancelled,
    responses=ERRORS | {404: {"model": ErrorBody, "description": "There is no such request."}},
    tags=["requests"],
)
async def cancel_request(
    request: Request, request_id: Annotated[str, Path(description="As in the header X-Request-Id of its answer.")]
) -> Response:
    """Cancel a request: all of it, or one of several generations by its own id. Answers when the slots are free.

    Where there are keys, it finds the requests of one's own key alone, also by the names in `/slots`.
    """
    cancelled, latency = await _cancel(_service(request), request.state.asker, request_id)
    if not cancelled:
        raise ApiError(404, f"there is no unfinished request {request_id[:200]}", code="request_not_found")
    return JSONResponse({"id": request_id, "cancelled": True, "cancel_latency": latency})


async def _cancel(service: Service, asker: Asker, request_id: str) -> tuple[bool, float | None]:
    """Whether there was an unfinished request; and the seconds until its slots were free, if we know."""
    reason = "cancelled by DELETE"
    found = service.find(asker, request_id)
    if found is None:  # one from beside the server, through the same engine, is the operator's business
        return asker.operator and service.engine.cancel(request_id, reason), None
    group, work = found
    if work is not None:
        if not work.cancel(reason):
            return False, None
        await work.wait()
        return True, work.view().cancel_latency
    if not group.cancel(reason):
        return False, None
    await group.settle()
    return True, group.cancel_latency


@router.post(
    "/tokenize",
    response_model=Tokenized,
    responses=ERRORS | TOKEN_ERRORS,
    openapi_extra=described(TokenizeBody),
    tags=["tokens"],
)
async def tokenize(
    request: Request,
    body: Annotated[TokenizeBody, Depends(body_of(TokenizeBody))],
    x_request_timeout: TimeoutHeader = None,
) -> Response:
    """The tokens of a text."""
    service = _service(request)
    model, timeout = service.model, service.timeout(None, x_request_timeout)

    def work(token: CancelToken) -> bytes:
        try:
            tokens = model.tokenize(body.content, body.add_special, body.parse_special, token).tolist()
        except ValueError as error:
            raise ApiError(400, str(error), param="content") from error
        pieces: list[str] | None = None
        if body.with_pieces:
            pieces = [model.token_to_piece(token).decode("utf-8", "replace") for token in tokens]
        is_long = len(tokens) > LONG_TEXT
        return json_of({"tokens": tokens, "pieces": pieces}, yielding=is_long).encode("utf-8", "replace")

    async with service.group(request, "/tokenize", timeout) as group:
        return Response(await under_token(group, work), media_type="application/json")


@router.post(
    "/detokenize",
    response_model=Detokenized,
    responses=ERRORS | TOKEN_ERRORS,
    openapi_extra=described(DetokenizeBody),
    tags=["tokens"],
)
async def detokenize(
    request: Request,
    body: Annotated[DetokenizeBody, Depends(body_of(DetokenizeBody))],
    x_request_timeout: TimeoutHeader = None,
) -> Response:
    """The text of tokens. Once begun it is not stopped in between: if the time is over by then, that is told."""
    service = _service(request)
    model, timeout = service.model, service.timeout(None, x_request_timeout)

    def work(_: CancelToken) -> str:
        try:
            return model.detokenize(body.tokens, unparse_special=True)
        except ValueError as error:
            raise ApiError(400, str(error), param="tokens") from error

    async with service.group(request, "/detokenize", timeout) as group:
        return JSONResponse({"content": await under_token(group, work)})


@router.head("/health", include_in_schema=False)
@router.get(
    "/health",
    response_model=Health,
    responses={503: {"model": Health, "description": "The engine failed, or the server is shutting down."}},
    tags=["state"],
)
async def health(request: Request) -> Response:
    """Whether new requests are taken. Needs no key."""
    service = _service(request)
    told: dict[str, Any] = {"status": "ok", "model": service.model_name}
    failure = service.engine.failure
    if failure is not None:
        told |= {"status": "failed", "error": f"{type(failure).__name__}: {failure}"}
    elif service.closing or service.engine.closed:
        told["status"] = "shutting down"
    return JSONResponse(told, status_code=200 if told["status"] == "ok" else 503)


@router.get(
    "/metrics",
    response_class=Response,
    responses=ERRORS | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    tags=["state"],
)
async def metrics(request: Request) -> Response:
    """Metrics, as Prometheus reads them."""
    return Response(_service(request).metrics.text(), headers={"content-type": CONTENT_TYPE})


@router.get("/slots", response_model=Snapshot, responses=ERRORS, tags=["state"])
async def slots(request: Request) -> Response:
    """Slots, queue, and the last requests."""
    return JSONResponse(Snapshots(_service(request), request.state.asker).whole())


@router.get(
    "/events",
    response_class=Response,
    responses=ERRORS | {200: {"content": {"text/event-stream": {}}}},
    tags=["state"],
)
async def events(request: Request) -> Response:
    """As `/slots`, again whenever something changes; after the first, `recent` has only what is new."""
    return EventsResponse(_service(request), request.state.asker)
