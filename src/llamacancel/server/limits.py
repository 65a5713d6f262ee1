"""What surrounds every request: its id, the keys, the size of its body, and errors that nobody expected."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Callable, Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import live
from .errors import ApiError, error_response

__all__ = ["ApiKeys", "BodyLimit", "LastResort", "RequestIds"]

logger = logging.getLogger("llamacancel.server")

REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
OPEN_PATHS = live.PATHS | {"/health"}
"""Served without a key: the page (it has no data of its own) and what load balancers ask."""


def header(scope: Scope, name: bytes) -> str | None:
    """A header of a request, or None."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value).decode("latin-1")
    return None


class RequestIds:
    """Gives each request an id, its client's own from `X-Request-Id` or a new one, and each answer that header.

    Args:
        app: What answers.
        on_answer: Called with the path and the status of each answer.
    """

    def __init__(self, app: ASGIApp, on_answer: Callable[[str, int], object]) -> None:
        self._app = app
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = header(scope, b"x-request-id")
        valid = given is None or REQUEST_ID.fullmatch(given) is not None
        request_id = given if given is not None and valid else f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._on_answer(_path(scope), message["status"])
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        if valid:
            return await self._app(scope, receive, with_id)
        error = ApiError(400, "X-Request-Id has to be 1 to 128 letters, digits, or . _ : -", param="X-Request-Id")
        await error_response(error)(scope, receive, with_id)


class ApiKeys:
    """Refuses requests without one of the keys, in a time that does not depend on how much of a key is right."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _path(scope) not in OPEN_PATHS and not self._holds_key(scope):
            error = ApiError(
                401,
                "this needs an API key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
            return await error_response(error)(scope, receive, send)
        await self._app(scope, receive, send)

    def _holds_key(self, scope: Scope) -> bool:
        kind, _, key = (header(scope, b"authorization") or "").partition(" ")
        given = _digest(key.strip().encode("latin-1"))
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return kind.lower() == "bearer" and any(matches)


def _path(scope: Scope) -> str:
    """The path within the app, wherever that is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class BodyLimit:
    """Refuses bodies above a size: at once if their header says so, or when they turn out to be."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        length = header(scope, b"content-length")
        if length is not None and length.isdigit() and int(length) > self._max:
            return await error_response(self._error())(scope, receive, send)
        size = 0
        too_long = False
        started = False

        async def counted() -> Message:
            nonlocal size, too_long
            message = await receive()
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                if size > self._max:
                    too_long = True
                    raise self._error()
            return message

        async def guarded(message: Message) -> None:
            nonlocal started
            if too_long and not started:
                return  # the framework's words for a body that could not be read
            started = started or message["type"] == "http.response.start"
            await send(message)

        await self._app(scope, counted, guarded)
        if too_long and not started:
            await error_response(self._error())(scope, receive, send)

    def _error(self) -> ApiError:
        return ApiError(413, f"the body is longer than {self._max} bytes", code="body_too_long")


class LastResort:
    """Tells an exception that nobody expected as an error of the server, and logs it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            if started:
                raise
            logger.exception("%s %s failed", scope["method"], scope["path"])
            await error_response(ApiError(500, "the server failed; its log tells more"))(scope, receive, send)
