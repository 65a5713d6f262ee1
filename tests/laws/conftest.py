"""What the laws have in common: a context and its twin, and where the middle of a call is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import llamacancel as lc

from .clock import readings_of
from .words import NewContext, Pair, far


@pytest.fixture
def pair(new_context: NewContext) -> Pair:
    """Makes a context in pieces of 8 rows, and its twin that will see no cancel."""

    def make(arch: str, **params: Any) -> tuple[lc.Context, lc.Context]:
        settings = {"n_ubatch": 8, "n_seq_max": 3, **params}
        return new_context(arch, **settings), new_context(arch, **settings)

    return make


@pytest.fixture
def readings(new_context: NewContext) -> Callable[..., int]:
    """How often a whole call reads the clock, tried in a context of its own that was filled in the same way."""

    def count(
        arch: str,
        rows: lc.Batch,
        past: Callable[[lc.Context], object] = lambda context: None,
        token: Any = None,
        on_cancel: Any = "rollback",
        **params: Any,
    ) -> int:
        context = new_context(arch, **{"n_ubatch": 8, "n_seq_max": 3, **params})
        token = far() if token is None else token
        past(context)
        told = readings_of(lambda: context.decode(rows, token, on_cancel=on_cancel))
        context.close()
        return told

    return count
