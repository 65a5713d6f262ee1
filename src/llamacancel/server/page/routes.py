"""The live page: a few files of its own, and nothing from anywhere else."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from typing import Annotated

from fastapi import APIRouter, Header
from starlette.responses import Response

from ..errors import ApiError

__all__ = ["PATHS", "router"]

FOLDER = "page"
TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    **dict.fromkeys(
        ("app.js", "dom.js", "feed.js", "lanes.js", "panels.js", "state.js"), "text/javascript; charset=utf-8"
    ),
}
PATHS = frozenset({"/", *(f"/{FOLDER}/{name}" for name in TYPES)})
"""Served without a key: they hold no data."""

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

router = APIRouter(include_in_schema=False)


@cache
def _content(name: str) -> tuple[bytes, str]:
    """A file and its tag."""
    content = resources.files(__package__).joinpath(name).read_bytes()
    return content, f'"{hashlib.sha256(content).hexdigest()[:32]}"'


def _answer(name: str, known: str | None) -> Response:
    content, tag = _content(name)
    headers = {**HEADERS, "etag": tag}
    if known is not None and tag in known:
        return Response(status_code=304, headers=headers)
    return Response(content, headers={**headers, "content-type": TYPES[name]})


@router.get("/")
async def index(if_none_match: Annotated[str | None, Header()] = None) -> Response:
    """The page."""
    return _answer("index.html", if_none_match)


@router.get(f"/{FOLDER}/{{name}}")
async def file(name: str, if_none_match: Annotated[str | None, Header()] = None) -> Response:
    """What the page is made of."""
    if name not in TYPES:
        raise ApiError(404, "there is no such file")
    return _answer(name, if_none_match)
