"""Reads the bodies of requests, and checks them beside the event loop: a stranger's body must hold up no other stream.

A thread alone is not enough, because parsing keeps the interpreter lock for as long as it takes. So a body is bounded
in two ways: in its size, and in how many values it has, which cost far more than their length.
Another stream's longest gap beside the worst lists that these bounds allow was 0.1 s on two busy cores, and 0.04 s
without them. One body of some length is parsed at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Annotated, Any, TypeVar

import anyio.to_thread
import numpy as np
from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.json_schema import models_json_schema

from .errors import ApiError, of_validation

__all__ = ["MOST_BYTES", "Body", "TokenId", "Whole", "body_of", "described", "schemas_of", "whole"]

MOST_BYTES = 4 * 2**20
"""The longest body, unless somebody says otherwise: a million tokens of English text, at four bytes each."""
MOST_VALUES = 2**18
"""Values after another one: as many as the longest contexts have tokens."""
MOST_MEMBERS = 2**16
"""Lists, objects and members of objects."""
SMALL = 16 * 2**10
"""Bytes up to which a body is parsed on the event loop: in less time than a thread takes to begin."""
SECONDS = 60.0
"""What a client has to send its body in."""

_M = TypeVar("_M", bound=BaseModel)


class Body(BaseModel):
    """A body or a part of one: nothing is converted, so that "1" is no number and 1 no text."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


def whole(value: object) -> object:
    """JSON knows one kind of number: 16.0 is an integer there."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(whole)
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1), Whole]


def body_of(model: type[_M]) -> Callable[[Request], Awaitable[_M]]:
    """What FastAPI's `Depends` wants to have a request's body read as `model`.

    It raises ApiError: 400 for a body that is none, 408 for one that takes too long, 413 for one that is too large.
    """

    async def read(request: Request) -> _M:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            raise ApiError(400, "the body has to be a JSON object, sent with Content-Type: application/json")
        try:
            data = await asyncio.wait_for(_content(request), SECONDS)
        except asyncio.TimeoutError:
            words = f"the body did not come within {SECONDS:g} s"
            raise ApiError(408, words, code="body_too_slow", headers={"connection": "close"}) from None
        request.state.body_size = len(data)
        if len(data) <= SMALL:
            return _parse(model, data)
        return await anyio.to_thread.run_sync(_parse, model, data, limiter=request.app.state.service.parsing)

    return read


async def _content(request: Request) -> bytes:
    """The body. It is not kept in the request: what was parsed is not needed any more."""
    content = bytearray()
    async for part in request.stream():
        content += part
    return bytes(content)


def _parse(model: type[_M], data: bytes) -> _M:
    if len(data) > SMALL:
        _check_count(data)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
    raise of_validation(found)  # outside of `except`, so that nothing keeps the body


def _check_count(data: bytes) -> None:
    """Refuse a body that has too many values.

    Signs are counted where they are first, which is fast, and outside of texts only if that is too many. Of a body that
    is no JSON, what precedes the fault is counted rightly, and nothing after it is parsed.
    """
    if data.count(b",") <= MOST_VALUES and sum(map(data.count, (b"[", b"{", b":"))) <= MOST_MEMBERS:
        return
    signs = np.frombuffer(data.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    signs = signs[~np.logical_xor.accumulate(signs == ord('"'))]
    values, *members = (int(np.count_nonzero(signs == ord(sign))) for sign in ",[{:")
    if values > MOST_VALUES or sum(members) > MOST_MEMBERS:
        raise ApiError(
            413,
            f"the body has more values than any request needs: {MOST_VALUES} values, and {MOST_MEMBERS} lists, objects "
            "and members are the most",
            code="body_too_long",
        )


def described(model: type[BaseModel]) -> dict[str, Any]:
    """A body's part of an operation, for the description of the API; see `schemas_of`."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def schemas_of(models: Iterable[type[BaseModel]]) -> dict[str, Any]:
    """The schemas of bodies by name, and of what they are made of."""
    given = [(model, "validation") for model in models]
    schemas: dict[str, Any] = models_json_schema(given, ref_template="#/components/schemas/{model}")[1]["$defs"]  # type: ignore[arg-type]
    return schemas
