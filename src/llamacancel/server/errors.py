"""Errors in the shape that OpenAI's clients know: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

__all__ = [
    "ERRORS",
    "GENERATION_ERRORS",
    "TOKEN_ERRORS",
    "ApiError",
    "ErrorBody",
    "cancelled",
    "error_body",
    "error_response",
    "install",
    "of_validation",
    "time_over",
]

TYPES: dict[int, str] = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    499: "cancelled",
    503: "unavailable_error",
}
NO_RETRY = {"x-should-retry": "false"}
"""Tells OpenAI's clients, which repeat a request after 408 and 409 by themselves, that it would not help."""


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status code.
        message: What was wrong, in a sentence.
        param: The field of the body that was wrong.
        code: A name for programs.
        type: OpenAI's kind of error; by default the one that goes with the status.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.type = type
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error as it is sent."""
        return error_body(self.status, self.message, param=self.param, code=self.code, type=self.type)


def time_over() -> ApiError:
    """The answer to a request whose deadline passed."""
    return ApiError(408, "the request's time was over before its answer", code="deadline", headers=NO_RETRY)


def cancelled(reason: str) -> ApiError:
    """The answer to a request that was cancelled, by its client's hang-up perhaps."""
    why = f": {reason}" if reason else ""
    return ApiError(499, f"the request was cancelled{why}", code="cancelled", headers=NO_RETRY)


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None, type: str | None = None
) -> dict[str, Any]:
    """An error as it is sent."""
    kind = type or TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: ApiError) -> Response:
    """The answer that tells an error."""
    return Response(
        json.dumps(error.body).encode(), status_code=error.status, headers=error.headers, media_type="application/json"
    )


def install(app: FastAPI) -> None:
    """Make an app tell its errors in this shape: its own, the framework's, and those of bad bodies."""

    async def own(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_response(error)

    async def bad_body(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(of_validation([{**each, "loc": each["loc"][1:]} for each in error.errors()]))

    async def framework(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        detail = error.detail if isinstance(error.detail, str) else HTTPStatus(error.status_code).phrase
        return error_response(ApiError(error.status_code, detail, headers=error.headers))

    async def gone(_: Request, error: Exception) -> Response:
        return error_response(ApiError(499, "the client hung up before its request was complete"))

    app.add_exception_handler(ApiError, own)
    app.add_exception_handler(RequestValidationError, bad_body)
    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(ClientDisconnect, gone)


def of_validation(errors: Sequence[Any]) -> ApiError:
    """Say what is wrong with a body or a header: the first few of pydantic's findings, and the field of the first."""
    words, param = [], None
    for error in errors[:3]:
        place = [part for part in error.get("loc", ()) if not _is_type(part)]
        if error.get("type") == "json_invalid":
            words.append(f"the body is no JSON: {error.get('ctx', {}).get('error', error['msg'])}")
            continue
        name = ".".join(str(part) for part in place)
        if not name and error.get("type") in ("model_type", "missing"):
            words.append("the body has to be a JSON object, sent with Content-Type: application/json")
            continue
        param = param or (str(place[0]) if place else None)
        text = str(error["msg"]).removeprefix("Value error, ")
        words.append(f"{name}: {text}" if name else text)
    if len(errors) > 3:
        words.append(f"and {len(errors) - 3} more")
    message = "; ".join(words).encode("utf-8", "replace").decode()
    return ApiError(400, message or "the request is not valid", param=param)


def _is_type(part: object) -> bool:
    """Whether a part of an error's place is one of several types that were tried there, and no field."""
    return isinstance(part, str) and (part in ("str", "int", "float") or "[" in part)


class Error(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error."""

    error: Error


_Responses = dict[int | str, dict[str, Any]]


def _errors(words: dict[int, str]) -> _Responses:
    return {status: {"model": ErrorBody, "description": text} for status, text in words.items()}


ERRORS = _errors(
    {
        400: "Something is wrong with the request.",
        401: "The API key is missing or wrong.",
        413: "The body is too long.",
        500: "The server failed.",
    }
)
GENERATION_ERRORS = _errors(
    {
        408: "The request's time was over.",
        409: "A request with this id is not finished yet.",
        429: "The queue is full; Retry-After says when to try again.",
        499: "The request was cancelled.",
        503: "The server is shutting down.",
    }
)
TOKEN_ERRORS: _Responses = {status: GENERATION_ERRORS[status] for status in (408, 409, 499)}
