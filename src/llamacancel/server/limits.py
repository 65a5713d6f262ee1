"""What surrounds every request: its id, the keys, the size of its body, and errors that nobody expected."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import uuid
from collections.abc import Callable, Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, error_response
from .page import routes as page
from .service import NOBODY, Asker

__all__ = ["ApiKeys", "BodyLimit", "Hosts", "LastResort", "NoPaths", "RequestIds"]

logger = logging.getLogger("llamacancel.server")

REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
OPEN_PATHS = page.PATHS | {"/health"}
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
    """Tells requests by their keys, in a time that does not depend on how much of a key is right, and refuses those
    without one where keys are needed.

    Args:
        app: What answers.
        keys: Keys of which a request needs one; none: no key is needed.
        operator_key: A further one, whose holder may cancel everybody's requests.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str], operator_key: str | None) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._operator = None if operator_key is None else _digest(operator_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        asker = self._asker(scope)
        scope.setdefault("state", {})["asker"] = asker
        if self._digests and asker == NOBODY and _path(scope) not in OPEN_PATHS:
            error = ApiError(
                401,
                "this needs an API key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
            return await error_response(error)(scope, receive, send)
        await self._app(scope, receive, send)

    def _asker(self, scope: Scope) -> Asker:
        kind, _, key = (header(scope, b"authorization") or "").partition(" ")
        if kind.lower() != "bearer":
            return NOBODY
        given = _digest(key.strip().encode("latin-1"))
        if self._operator is not None and hmac.compare_digest(given, self._operator):
            return Asker(given, operator=True)
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return Asker(given) if any(matches) else NOBODY


class Hosts:
    """Refuses requests that call the server by a name that is not its own, while anyone may ask.

    A page of a stranger's can have its own name lead to this machine, and would be of the same origin then. It cannot
    be served from an address, so addresses are taken.

    Args:
        app: What answers.
        names: The server's names; "*": any.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        self._app = app
        self._names = {name.lower().rstrip(".") for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = header(scope, b"host") if scope["type"] == "http" else None
        if given is None or self._is_ours(given):
            return await self._app(scope, receive, send)
        words = f"this server is not called {given[:200]}: --allowed-host lets it be"
        await error_response(ApiError(403, words, param="Host", code="host_not_allowed"))(scope, receive, send)

    def _is_ours(self, given: str) -> bool:
        name = given.lower()
        if name.startswith("["):
            name = name[1:].partition("]")[0]
        else:
            name = name.partition(":")[0].rstrip(".")
        if name in self._names or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


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


class NoPaths(logging.Filter):
    """Takes out of a log what a path tells of a request: whoever knows its id could cancel it."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(shown(each) if isinstance(each, str) else each for each in record.args)
        return True


def shown(path: str) -> str:
    """A path as it may be told to others."""
    before, found, _ = path.partition("/v1/requests/")
    return before + found + "..." if found else path


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
            logger.exception("%s %s failed", scope["method"], shown(scope["path"]))
            await error_response(ApiError(500, "the server failed; its log tells more"))(scope, receive, send)
