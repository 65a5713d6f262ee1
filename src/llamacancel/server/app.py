"""Puts the app together: endpoints, what surrounds them, and the description of the API."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from os import fsdecode
from pathlib import PurePath
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from .. import __version__
from ..engine import Engine
from . import errors
from .bodies import MOST_BYTES, schemas_of
from .limits import ApiKeys, BodyLimit, Hosts, LastResort, RequestIds
from .openai import chat, completions, embeddings
from .openai.prompts import prepare_constraints
from .openai.schemas import ChatBody, CompletionBody, EmbeddingsBody
from .ops import routes as ops
from .ops.schemas import DetokenizeBody, TokenizeBody
from .page import routes as page
from .service import Service

__all__ = ["create_app"]

EXPOSED = ["X-Request-Id", "Retry-After"]


def create_app(
    engine: Engine,
    *,
    model_name: str | None = None,
    api_keys: Iterable[str] = (),
    operator_key: str | None = None,
    allowed_hosts: Sequence[str] = ("*",),
    cors_origins: Sequence[str] = (),
    max_body_bytes: int = MOST_BYTES,
    request_timeout: float | None = None,
    chat_template: str | None = None,
    drain_timeout: float = 30.0,
    close_engine: bool = True,
) -> FastAPI:
    """Make an ASGI app that serves an engine as OpenAI's API does.

    It can be served by itself or mounted in another app. A client that hangs up, in the queue, in a prompt or in the
    middle of its answer, cancels its own request and no other.

    The model's vocabulary is prepared for schemas here, once for a model: that takes about a second for each 100,000
    tokens, in which no other thread runs, and so would stop everybody's streams with the first schema that comes.

    Args:
        engine: Does the work.
        model_name: What answers call the model; by default its file's name.
        api_keys: Keys of which a request needs one; none: no key is needed.
        operator_key: A key whose holder may cancel everybody's requests. Others may cancel those that they can name:
            where there are keys, those of their own key.
        allowed_hosts: Names by which requests may call the server while no key is needed, beside addresses; "*": any.
        cors_origins: Origins whose pages may use the API, or "*" for all.
        max_body_bytes: Longest body of a request.
        request_timeout: Seconds for each request, queue, prompt and answer together. A request may ask for less.
        chat_template: A Jinja template in place of the model's own.
        drain_timeout: Seconds that requests on their way get when the app shuts down.
        close_engine: Close the engine when the app shuts down.

    Returns:
        The app. `app.state.service.close()` begins to shut down before the server does.

    Raises:
        ValueError: If `chat_template` cannot be parsed.
    """
    name = model_name or PurePath(fsdecode(engine.model.path)).stem or "model"
    service = Service(
        engine,
        model_name=name,
        chat_template=chat_template,
        request_timeout=request_timeout,
        drain_timeout=drain_timeout,
        close_engine=close_engine,
    )
    prepare_constraints(engine.model)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    keys = list(api_keys)
    app = FastAPI(
        title="llamacancel",
        version=__version__,
        description="llama.cpp behind OpenAI's API. A client that hangs up cancels exactly its own request, at once.",
        lifespan=lifespan,
        middleware=[
            Middleware(RequestIds, on_answer=_counter(service)),
            *_cors(cors_origins),
            *([] if keys or "*" in allowed_hosts else [Middleware(Hosts, names=allowed_hosts)]),
            Middleware(ApiKeys, keys=keys, operator_key=operator_key),
            Middleware(BodyLimit, max_bytes=max_body_bytes),
            Middleware(LastResort),
        ],
    )
    app.state.service = service
    errors.install(app)
    for module in (completions, chat, embeddings, ops, page):
        app.include_router(module.router)
    app.openapi = _described(app, with_keys=bool(keys))  # type: ignore[method-assign]
    return app


def _cors(origins: Sequence[str]) -> list[Middleware]:
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
    ]


BODIES = (CompletionBody, ChatBody, EmbeddingsBody, TokenizeBody, DetokenizeBody)
_COUNTED = frozenset({completions.ENDPOINT, chat.ENDPOINT, embeddings.ENDPOINT})


def _counter(service: Service) -> Callable[[str, int], None]:
    """Counts answers by endpoint: those that generate by name, so that a stranger's paths make no new ones."""
    return lambda path, status: service.metrics.answered(path if path in _COUNTED else "other", status)


def _described(app: FastAPI, *, with_keys: bool) -> Callable[[], dict[str, Any]]:
    """The API's description as it is: a bad body is a 400 here, and keys are needed where there are any."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            for path, methods in described["paths"].items():
                for operation in methods.values():
                    operation["responses"].pop("422", None)
                    if with_keys and path != "/health":
                        operation["security"] = [{"key": []}]
            components = described.setdefault("components", {})
            schemas = components.setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            schemas.update(schemas_of(BODIES))
            if with_keys:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = described
        return app.openapi_schema

    return describe
